"""Responses come from exactly the scored policy, and nothing else moves."""

from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import funcprobe as fp
from funcprobe.language.batch import targets
from funcprobe.runtime.serialize import checksum

PROMPTS = ["3+4+5=", "9+9+9+1=", "2+2+2="]


def draw(checkpoint, **options):
    options = {"samples": 4, "max_new_tokens": 24, "seed": 1} | options
    return fp.rollout(checkpoint, PROMPTS, **options)


def test_a_seed_repeats_and_leaves_the_random_state_and_weights_alone(checkpoint):
    state, before = torch.get_rng_state(), checksum(checkpoint.base | checkpoint.params)
    first, second, other = draw(checkpoint), draw(checkpoint), draw(checkpoint, seed=2)
    assert torch.equal(first.tokens, second.tokens)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert checksum(checkpoint.base | checkpoint.params) == before
    assert first.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    "sampling",
    [
        fp.Sampling(),
        fp.Sampling(0.6),
        fp.Sampling(1.3, 0.8),
        fp.Sampling(2, top_k=4),
        fp.Sampling(1.5, min_p=0.1),
        fp.Sampling(2.0, 0.9, 6, 0.05),
    ],
)
def test_the_sampler_is_the_scored_policy(checkpoint, sampling):
    # rollout itself compares the sampler's log-probabilities with the scorer's.
    batch = draw(checkpoint, sampling=sampling, tolerance=1e-6)
    support = checkpoint.params if sampling.truncates else None
    score = fp.scorer(checkpoint.model, checkpoint.base, sampling=sampling, support=support)
    logp = fp.evaluate(score, checkpoint.params, batch).logp
    assert torch.allclose(logp[batch.response], batch.old_logp[batch.response], atol=1e-12)


@pytest.mark.parametrize(
    "sampling",
    [
        fp.Sampling(2.0),
        fp.Sampling(2.0, 0.8),
        fp.Sampling(2.0, 0.95, 7, 0.02),
    ],
)
def test_tokens_come_as_often_as_the_scored_policy_says(checkpoint, sampling):
    """Pearson's test of first tokens: what the sampler does after its last record shows here."""
    batch = fp.rollout(
        checkpoint,
        PROMPTS[:1],
        samples=6000,
        max_new_tokens=1,
        seed=3,
        sampling=sampling,
        rows=6000,
    )
    z = fp.logits(checkpoint.model, checkpoint.params, checkpoint.base, batch.rows([0]))[0, 0]
    z = z / sampling.temperature
    if sampling.top_k > 0:
        z = TopKLogitsWarper(sampling.top_k)(None, z.unsqueeze(0))[0]
    if sampling.top_p < 1:
        z = TopPLogitsWarper(sampling.top_p)(None, z.unsqueeze(0))[0]
    if sampling.min_p > 0:
        z = MinPLogitsWarper(sampling.min_p)(None, z.unsqueeze(0))[0]
    p = z.softmax(-1)
    count = targets(batch)[:, 0].bincount(minlength=len(p)).double()
    assert (count[p == 0] == 0).all()
    expected, possible = 6000 * p, p > 0
    square = ((count - expected) ** 2 / expected)[possible].sum()
    degrees = int(possible.sum()) - 1
    assert degrees >= 3 and square < degrees + 5 * (2 * degrees) ** 0.5


def test_a_policy_that_is_not_the_scored_one_is_refused(checkpoint):
    with pytest.raises(ValueError, match="must be the scorer's"):
        draw(checkpoint, tolerance=-1.0)


def test_the_first_eos_ends_a_response_and_belongs_to_it(checkpoint):
    batch = draw(checkpoint)
    eos = checkpoint.tokenizer.eos_token_id
    for row, response in zip(batch.tokens, batch.attention.sum(1).tolist(), strict=True):
        text = row[:response].tolist()
        assert eos not in text[:-1]
    assert (batch.tokens[torch.arange(12), batch.attention.sum(1) - 1] == eos).any()
    short = draw(checkpoint, max_new_tokens=2)
    assert short.response.sum(1).max() == 2


def test_rewards_see_the_prompt_and_the_text(checkpoint):
    seen = []

    def reward(prompt, text):
        seen.append((prompt, text))
        return len(text)

    batch = draw(checkpoint, reward=reward)
    assert [prompt for prompt, _ in seen] == [p for p in PROMPTS for _ in range(4)]
    assert batch.reward.tolist() == [len(text) for _, text in seen]
    assert all("<" not in text for _, text in seen)


def test_resampling_gives_every_prompt_mixed_rewards(checkpoint):
    def reward(_, text):
        return float(sum(map(ord, text)) % 2)

    batch = draw(checkpoint, samples=3, reward=reward, resample=50)
    for group in range(3):
        assert len(batch.reward[batch.group == group].unique()) == 2
    with pytest.raises(ValueError, match="responses of different rewards were expected"):
        draw(checkpoint, reward=lambda *_: 1.0, resample=1)
    with pytest.raises(ValueError, match="resample needs a reward"):
        draw(checkpoint, resample=1)


def test_a_further_try_draws_other_responses(checkpoint):
    seen = []

    def reward(_, text):
        seen.append(text)
        return float(len(seen) % 2) if len(seen) > 12 else 0.0  # the first try fails as a whole

    batch = draw(checkpoint, reward=reward, resample=1)
    assert len(seen) == 24 and seen[:12] != seen[12:]
    first = draw(checkpoint)
    assert first.tokens.shape != batch.tokens.shape or not torch.equal(first.tokens, batch.tokens)


class OwnPolicy(NamedTuple):
    """What a user might write: the five attributes of a `Policy`, and no more."""

    model: fp.Model
    params: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    sampling: fp.Sampling
    tokenizer: Any


def test_a_named_tuple_is_a_policy(checkpoint, evaluation):
    own = OwnPolicy(*(getattr(checkpoint, name) for name in OwnPolicy._fields))
    assert torch.equal(draw(own).tokens, draw(checkpoint).tokens)
    v = {name: torch.zeros_like(p) for name, p in own.params.items()}
    options = dict(samples=1, max_new_tokens=4, seed=0)
    truth = fp.ground_truth(own, v, 1e-3, evaluation.rows(slice(0, 2)), **options)
    assert truth.rows == 2


def test_token_ids_need_no_tokenizer_but_rewards_do(checkpoint):
    fields = {name: getattr(checkpoint, name) for name in OwnPolicy._fields}
    own = OwnPolicy(**fields | {"tokenizer": None})
    ids = [checkpoint.tokenizer(prompt).input_ids for prompt in PROMPTS]
    options = {"samples": 4, "max_new_tokens": 24, "seed": 1}
    assert torch.equal(fp.rollout(own, ids, **options).tokens, draw(checkpoint).tokens)
    with pytest.raises(ValueError, match="rewards are given to texts"):
        fp.rollout(own, ids, reward=lambda *_: 1.0, **options)


@contextmanager
def generation(checkpoint, **settings):
    """The model's own generation settings, changed for a while."""
    skeleton = checkpoint.model.skeleton.get_base_model()
    saved = skeleton.generation_config
    try:
        skeleton.generation_config = type(saved)(**(saved.to_dict() | settings))
        yield
    finally:
        skeleton.generation_config = saved


def test_the_model_own_generation_settings_do_not_leak(checkpoint):
    own = dict(do_sample=True, top_k=2, temperature=0.3, repetition_penalty=3.0, min_new_tokens=9)
    with generation(checkpoint, **own):
        batch = draw(checkpoint, tolerance=1e-6)
    assert torch.equal(batch.tokens, draw(checkpoint).tokens)


def test_any_of_several_eos_ids_ends_a_response(checkpoint):
    ids = checkpoint.tokenizer.convert_tokens_to_ids(["<eos>", ",", ";"])
    with generation(checkpoint, eos_token_id=ids):
        batch = draw(checkpoint)
    ends = set()
    for row, kept in zip(targets(batch), batch.response, strict=True):
        *before, last = row[kept].tolist()
        assert not set(before) & set(ids) and last in ids
        ends.add(last)
    assert len(ends) > 1


def test_without_an_eos_of_its_own_the_tokenizers_ends_a_response(checkpoint):
    with generation(checkpoint, eos_token_id=None):
        batch = draw(checkpoint)
    assert torch.equal(batch.tokens, draw(checkpoint).tokens)


def test_rows_at_once_bound_what_is_generated_together(checkpoint, monkeypatch):
    widths, generate = [], LlamaForCausalLM.generate

    def noted(self, tokens, **options):
        widths.append(len(tokens))
        return generate(self, tokens, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    batch = draw(checkpoint, rows=5, tolerance=1e-6)
    assert widths == [5, 5, 2] and len(batch.group) == 12


def test_a_shifted_policy_can_be_sampled(checkpoint, update):
    v = {name: torch.randn_like(p).sign() for name, p in checkpoint.params.items()}
    moved = fp.shift(checkpoint.params, v, 3e-2)
    batch = draw(checkpoint, params=moved, samples=8)
    score = fp.scorer(checkpoint.model, checkpoint.base)
    assert torch.allclose(
        fp.evaluate(score, moved, batch).logp[batch.response], batch.old_logp[batch.response]
    )
    draw(checkpoint, params=moved, sampling=fp.Sampling(top_p=0.8), tolerance=1e-6)  # its nucleus
    here = fp.evaluate(score, checkpoint.params, batch).logp
    assert (here - batch.old_logp)[batch.response].abs().max() > 1e-3
