"""Responses sampled from exactly the policy that is scored, at any parameters."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..calculus.blocks import evaluate
from ..calculus.precision import exact
from ..calculus.tree import Params
from ..language.batch import Batch, collate
from ..language.model.split import assemble
from ..language.sampling import Sampling
from ..language.score import scorer
from .policy import Policy
from .records import Prompt, encode_prompt

Reward = Callable[[Any, str], float]  # of a prompt and the text of a completion


def rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    params: Params | None = None,
    reward: Reward | None = None,
    sampling: Sampling | None = None,
    resample: int = 0,
    rows: int = 64,
    tolerance: float = 1e-2,
) -> Batch:
    """Samples responses with `generate` and scores them again by teacher forcing.

    Temperature, top-k, top-p and min-p are those of the scored policy, whatever the model's
    generation config says, so that importance weights have mean 1. With
    ``params=shift(policy.params, v, eta)`` the shifted policy is sampled, which is the independent
    ground truth of a sweep.

    Args:
        policy: a `Checkpoint`, or any `Policy`; `funcprobe.rollout` also takes a checkpoint's path.
        prompts: G texts, chat message lists, or lists of token ids.
        samples: responses per prompt.
        max_new_tokens: a response ends at EOS, which it includes, or at this length.
        seed: of the sampler. The global random state is left unchanged.
        params: the parameters to sample at; the policy's own if not given.
        reward: ``reward(prompt, completion_text)``; rewards are unknown (nan) if not given.
        sampling: the policy's own if not given.
        resample: how often a prompt is sampled again if its responses all have the same reward, and
            so no advantage. The result is a sample conditioned on mixed rewards, which is right for
            U and wrong for E.
        rows: responses generated at once.
        tolerance: the largest difference in nats allowed between the sampler's log-probability of
            a token and the scorer's.

    Returns:
        A batch of G * samples rows. Groups are numbered as the prompts; old_logp is the scorer's.

    Raises:
        ValueError: the sampler's log-probabilities are not the scorer's, a prompt keeps uniform
            rewards through `resample` further tries, or a tokenizer is needed and missing.
    """
    if resample and reward is None:
        raise ValueError(
            "rollout: resample needs a reward, since it looks for groups of mixed rewards, but "
            "none was given. Pass reward=."
        )
    if reward is not None and policy.tokenizer is None:
        raise ValueError(
            "rollout: a tokenizer was expected, since rewards are given to texts, but the policy "
            "has none. Pass a policy with a tokenizer."
        )
    sampler = _Sampler(
        policy=policy,
        params=policy.params if params is None else params,
        sampling=sampling or policy.sampling,
        prompts=prompts,
        ids=[encode_prompt(prompt, policy.tokenizer) for prompt in prompts],
        samples=samples,
        max_new_tokens=max_new_tokens,
        rows=rows,
        reward=reward,
    )
    draws = sampler.draw(range(len(prompts)), seed)
    if resample:
        draws = _redraw_uniform(sampler, draws, _further_seeds(seed, resample))
    return _rescored(sampler, _collate(sampler.ids, draws), tolerance)


class _Draw(NamedTuple):
    """One sampled response."""

    response: list[int]  # token ids
    logp: list[float]  # nats of each token, under the sampler
    reward: float  # nan if unknown


_Draws = dict[int, list[_Draw]]  # by the index of the prompt


@dataclass(frozen=True, eq=False)
class _Sampler:
    """What it takes to draw responses, besides a choice of prompts and a seed."""

    policy: Policy
    params: Params
    sampling: Sampling
    prompts: Sequence[Prompt]
    ids: list[list[int]]  # of the prompts
    samples: int
    max_new_tokens: int
    rows: int
    reward: Reward | None

    def draw(self, chosen: Iterable[int], seed: int) -> _Draws:
        """All responses to the chosen prompts."""
        answered = [g for g in chosen for _ in range(self.samples)]
        draws: _Draws = {g: [] for g in answered}
        for g, (response, logp) in zip(answered, self._generate(answered, seed), strict=True):
            draws[g].append(_Draw(response, logp, self._reward(g, response)))
        return draws

    def _reward(self, g: int, response: list[int]) -> float:
        if self.reward is None or self.policy.tokenizer is None:
            return float("nan")
        text = self.policy.tokenizer.decode(response, skip_special_tokens=True)
        return float(self.reward(self.prompts[g], str(text)))

    @torch.no_grad()
    def _generate(self, answered: list[int], seed: int) -> list[tuple[list[int], list[float]]]:
        """For each prompt in turn, the response's token ids and their log-probabilities."""
        module: Any = assemble(self.policy.model, self.params, self.policy.base)
        device = next(module.parameters()).device
        eos = end_tokens(module, self.policy.tokenizer)
        # generate fills what a config leaves unset from the module's own config. The module is a
        # copy, so we may replace that.
        module.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=eos or None,
            pad_token_id=eos[0] if eos else 0,
        )
        devices = range(torch.cuda.device_count()) if device.type == "cuda" else []
        responses: list[tuple[list[int], list[float]]] = []
        with torch.random.fork_rng(devices), exact(), self.policy.model.precision():
            torch.manual_seed(seed)
            for start in range(0, len(answered), self.rows):
                prompts = [self.ids[g] for g in answered[start : start + self.rows]]
                responses += _generate_block(module, prompts, self.sampling, eos)
        return responses


def _generate_block(
    module: Any, prompts: list[list[int]], sampling: Sampling, eos: list[int]
) -> list[tuple[list[int], list[float]]]:
    """Token ids and log-probabilities of one response to each prompt, generated together."""
    device = next(module.parameters()).device
    width, pad = max(map(len, prompts)), module.generation_config.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    recorder = _Recorder()
    ids = module.generate(
        tokens,
        attention_mask=mask,
        generation_config=module.generation_config,
        logits_processor=LogitsProcessorList([*_warpers(sampling), recorder]),
    )
    recorder.note(ids)
    logp = torch.cat(recorder.steps, 1).tolist()
    responses = []
    for response, row in zip(ids[:, width:].tolist(), logp, strict=True):
        ends = [k for k, token in enumerate(response) if token in eos]
        stop = ends[0] + 1 if ends else len(response)
        responses.append((response[:stop], row[:stop]))
    return responses


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    # generate would put its own warpers after the processors it is given, where a recorder does not
    # see their effect. So the warpers are given too, before the recorder.
    warpers: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


class _Recorder(LogitsProcessor):
    """Notes the sampler's log-probability of each token it draws."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.logp: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids)
        self.logp = scores.log_softmax(-1)
        return scores

    def note(self, ids: Tensor) -> None:
        """Looks up the log-probability of the tokens that were drawn last."""
        if self.logp is not None:
            self.steps.append(self.logp.gather(1, ids[:, -1:]))


def end_tokens(module: Any, tokenizer: Any) -> list[int]:
    """The ids that end a response: the generation config's, else the tokenizer's."""
    ids = getattr(module.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _further_seeds(seed: int, count: int) -> list[int]:
    # A CPU generator only sees the low 32 bits of a seed, and seed + 1 may be another rollout's.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**32, (count,), generator=generator).tolist()


def _redraw_uniform(sampler: _Sampler, draws: _Draws, seeds: list[int]) -> _Draws:
    """Draws prompts of uniform rewards again, with each seed in turn; raises if any are left."""
    for seed in seeds:
        uniform = _uniform(draws)
        if not uniform:
            return draws
        draws = draws | sampler.draw(uniform, seed)
    uniform = _uniform(draws)
    if uniform:
        raise ValueError(
            f"rollout: responses of different rewards were expected for every prompt, but "
            f"{len(uniform)} of {len(draws)} prompts have none after {len(seeds) + 1} tries: "
            f"{uniform[:5]}. Raise samples or resample, or leave such prompts out."
        )
    return draws


def _uniform(draws: _Draws) -> list[int]:
    """The prompts whose responses all have the same reward."""
    return [g for g, group in draws.items() if len({draw.reward for draw in group}) == 1]


def _collate(ids: list[list[int]], draws: _Draws) -> Batch:
    flat = [(g, draw) for g, group in draws.items() for draw in group]
    return collate(
        [ids[g] for g, _ in flat],
        [draw.response for _, draw in flat],
        group=[g for g, _ in flat],
        reward=[draw.reward for _, draw in flat],
        old_logp=[draw.logp for _, draw in flat],
    )


def _rescored(sampler: _Sampler, batch: Batch, tolerance: float) -> Batch:
    """The batch with the scorer's log-probabilities, which must agree with the sampler's."""
    policy, params, sampling = sampler.policy, sampler.params, sampler.sampling
    score = scorer(policy.model, policy.base, sampling=sampling, support=params)
    batch = batch.to(next(iter(params.values())).device)
    logp = evaluate(score, params, batch).logp.double()
    off = torch.where(batch.response, (logp - batch.old_logp).abs(), 0.0)
    if not off.max() <= tolerance:
        rows = (off.amax(1) > tolerance).nonzero().flatten().tolist()
        raise ValueError(
            f"rollout: the sampler's log-probabilities must be the scorer's, but they differ by up "
            f"to {float(off.max()):.2g} nats in {len(rows)} of {len(off)} rows, {rows[:5]}. Likely "
            "the base is in low precision. Load it in float32, or raise tolerance=."
        )
    return batch._replace(old_logp=torch.where(batch.response, logp, torch.nan))
