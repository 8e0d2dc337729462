"""Responses sampled from exactly the policy that is scored, at any parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..calculus.blocks import evaluate
from ..calculus.precision import exact
from ..calculus.tree import Params
from ..language.batch import Batch, collate
from ..language.model.split import assemble
from ..language.score import Sampling, scorer
from .records import encode_prompt


def rollout(
    checkpoint,
    prompts: Sequence,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    params: Params | None = None,
    reward: Callable[[object, str], float] | None = None,
    sampling: Sampling | None = None,
    resample: int = 0,
    rows: int = 64,
    tolerance: float = 1e-2,
) -> Batch:
    """Samples responses with `generate` and scores them again by teacher forcing.

    Temperature and top-p are the scored policy's, top-k is off whatever the model's generation
    config says, so that importance weights have mean 1. With
    ``params=shift(checkpoint.params, v, eta)`` it samples the shifted policy: the independent
    ground truth of a sweep.

    Args:
        checkpoint: has model, params, base, tokenizer and sampling (`load_checkpoint`).
        prompts: G texts, chat message lists, or lists of token ids.
        samples: responses per prompt.
        max_new_tokens: a response ends at EOS, which it includes, or here.
        seed: of the sampler; the global random state is left as it was.
        params: the policy to sample; the checkpoint's if not given.
        reward: ``reward(prompt, completion_text)``; rewards are unknown (nan) if not given.
        sampling: the checkpoint's if not given.
        resample: how often a prompt whose responses all have one reward, and so no advantage, is
            sampled anew. What remains is a sample given mixed rewards: good for U, wrong for E.
        rows: responses generated at once.
        tolerance: the largest difference in nats allowed between the sampler's log-probability of
            a token and the scorer's.

    Returns:
        A batch of G * samples rows, groups numbered as the prompts, old_logp the scorer's.

    Raises:
        ValueError: the sampler's log-probabilities are not the scorer's, or a prompt keeps
            uniform rewards through `resample` further tries.
    """
    params = checkpoint.params if params is None else params
    sampling = sampling or checkpoint.sampling
    ids = [encode_prompt(prompt, checkpoint.tokenizer) for prompt in prompts]
    if resample and reward is None:
        raise ValueError("rollout: resample needs a reward; it looks for groups of mixed rewards.")
    draws: dict[int, list] = {}
    missing = list(range(len(ids)))
    # A CPU generator sees the low 32 bits of a seed alone, and seed + 1 is another rollout's.
    further = torch.Generator().manual_seed(seed)
    seeds = [seed, *torch.randint(2**32, (resample,), generator=further).tolist()]
    for own_seed in seeds:
        each = [g for g in missing for _ in range(samples)]
        sampled = _generate(
            checkpoint,
            params,
            [ids[g] for g in each],
            sampling,
            max_new_tokens,
            own_seed,
            rows,
        )
        for g in missing:
            draws[g] = []
        for g, (response, logp) in zip(each, sampled, strict=True):
            value = float("nan")
            if reward is not None:
                text = checkpoint.tokenizer.decode(response, skip_special_tokens=True)
                value = float(reward(prompts[g], text))
            draws[g].append((response, logp, value))
        missing = [g for g in missing if len({value for *_, value in draws[g]}) == 1]
        if not missing:
            break
    if missing and resample:
        raise ValueError(
            f"rollout: every prompt was to have responses of different rewards, "
            f"{len(missing)} of {len(prompts)} have not after {resample + 1} tries: "
            f"{missing[:5]}. Raise samples or resample, or leave such prompts out."
        )
    flat = [(g, *draw) for g in range(len(ids)) for draw in draws[g]]
    batch = collate(
        [ids[g] for g, *_ in flat],
        [response for _, response, *_ in flat],
        group=[g for g, *_ in flat],
        reward=[value for *_, value in flat],
        old_logp=[logp for _, _, logp, _ in flat],
    )
    return _rescored(checkpoint, params, sampling, batch, tolerance)


class _Recorder(LogitsProcessor):
    """Notes the sampler's log-probability of each token it draws."""

    def __init__(self):
        self.steps: list[Tensor] = []
        self.logp: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids)
        self.logp = scores.log_softmax(-1)
        return scores

    def note(self, ids: Tensor) -> None:
        if self.logp is not None:
            self.steps.append(self.logp.gather(1, ids[:, -1:]))


@torch.no_grad()
def _generate(checkpoint, params, prompts, sampling, max_new_tokens, seed, rows) -> list:
    """For each prompt the response's token ids and the sampler's log-probabilities."""
    module = assemble(checkpoint.model, params, checkpoint.base)
    device = next(module.parameters()).device
    eos = _eos(module, checkpoint.tokenizer)
    pad = eos[0] if eos else 0
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=pad,
    )
    # generate fills what a config leaves unset from the module's own; this copy is ours to change.
    module.generation_config = config
    # generate puts its own warpers after the processors it is given, where a recorder cannot see.
    warpers = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    out = []
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(devices), exact(), checkpoint.model.precision():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), rows):
            some = prompts[start : start + rows]
            width = max(map(len, some))
            tokens = torch.tensor([[pad] * (width - len(p)) + p for p in some], device=device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in some], device=device
            )
            recorder = _Recorder()
            ids = module.generate(
                tokens,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([*warpers, recorder]),
            )
            recorder.note(ids)
            logp = torch.cat(recorder.steps, 1).tolist()
            for response, row in zip(ids[:, width:].tolist(), logp, strict=True):
                ends = [k for k, token in enumerate(response) if token in eos]
                stop = ends[0] + 1 if ends else len(response)
                out.append((response[:stop], row[:stop]))
    return out


def _rescored(checkpoint, params, sampling, batch: Batch, tolerance: float) -> Batch:
    support = params if sampling.top_p < 1 else None
    score = scorer(checkpoint.model, checkpoint.base, sampling=sampling, support=support)
    batch = batch.to(next(iter(params.values())).device)
    logp = evaluate(score, params, batch).logp.double()
    off = torch.where(batch.response, (logp - batch.old_logp).abs(), 0.0)
    if not off.max() <= tolerance:
        rows = (off.amax(1) > tolerance).nonzero().flatten().tolist()
        raise ValueError(
            f"rollout: the sampler's log-probabilities must be the scorer's, they differ by up to "
            f"{float(off.max()):.2g} nats in {len(rows)} of {len(off)} rows, {rows[:5]}. "
            "A low-precision base does this; load it in float32, or raise tolerance=."
        )
    return batch._replace(old_logp=torch.where(batch.response, logp, torch.nan))


def _eos(module, tokenizer) -> list[int]:
    own = getattr(module.generation_config, "eos_token_id", None)
    if own is None:
        own = getattr(tokenizer, "eos_token_id", None)
    return [] if own is None else [own] if isinstance(own, int) else list(own)
