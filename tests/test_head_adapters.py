"""Adapters of the head, with more tokens than a slice holds, against the live module in float64."""

import warnings
from functools import cache
from types import SimpleNamespace

import cases
import peft
import pytest
import reference
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import funcprobe as fp

VOCABULARY = 5000
BOTH = ["q_proj", "lm_head"]

ADAPTERS = {  # the adapter, whether the head is tied, and whether it may be read in slices
    "trained tokens": (
        lambda: peft.LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices=[3, 9, VOCABULARY - 1]
        ),
        True,
        False,
    ),
    "lora": (lambda: peft.LoraConfig(r=2, target_modules=BOTH), False, True),
    "saved": (
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        False,
        True,
    ),
    "lokr": (lambda: peft.LoKrConfig(r=2, target_modules=BOTH), False, False),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=BOTH), False, False),
    "road": (lambda: peft.RoadConfig(group_size=8, target_modules=BOTH), False, False),
    "miss": (lambda: peft.MissConfig(r=2, target_modules=BOTH), False, False),
    "vblora": (
        lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=BOTH),
        False,
        False,
    ),
}


@cache
def case(name):
    """A live module in float64, what `split` makes of it, and a direction."""
    make, tied, sliced = ADAPTERS[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        sizes = cases.CONFIGS["llama"]().to_dict() | dict(vocab_size=VOCABULARY)
        config = LlamaConfig(**sizes | dict(tie_word_embeddings=tied))
        module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        module = peft.get_peft_model(module, make()).eval()
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
    model, params, base = fp.split(module.double())
    v = cases.direction(params, size=0.05)
    return SimpleNamespace(module=module, model=model, params=params, base=base, v=v, sliced=sliced)


def batch():
    """Two rows that hold trained tokens, also one beyond the first slice."""
    return fp.collate([[5, 9, 11], [7]], [[14, VOCABULARY - 1, 3, 4200], [9, 2]])


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_head_is_read_in_slices_where_they_give_the_whole(name):
    assert case(name).model.sliced == case(name).sliced


@pytest.mark.parametrize("name", ADAPTERS)
def test_values_along_a_direction_are_the_live_modules(name):
    c = case(name)
    score = fp.scorer(c.model, c.base)
    swept = fp.sweep(score, c.params, c.v, [0.5, 1.0], batch())
    with reference.float64(c.module):
        base, change = reference.sweep(c.module, c.v, [0.5, 1.0], batch())
    for ours, want in zip((*swept.base, *swept.change), (*base, *change), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_are_the_live_modules(name):
    c = case(name)
    ours = fp.gradient(fp.scorer(c.model, c.base), c.params, batch())
    weights = {n: p for n, p in c.module.named_parameters() if p.requires_grad}
    with reference.float64(c.module):
        loss = sum(x.sum() for x in reference.scores(c.module, batch()))
        want = torch.autograd.grad(loss, list(weights.values()))
    for name, grad in zip(weights, want, strict=True):
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-10)
