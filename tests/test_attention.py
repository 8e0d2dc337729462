"""Attention against a loop over queries and heads, and against the models' own."""

import math

import cases
import pytest
import torch

import funcprobe as fp
from funcprobe.language.model import attention


def by_hand(query, key, value, mask, scaling, softcap):
    """Query by query, head by head, over every key."""
    b, heads, length, size = query.shape
    shared = heads // key.shape[1]
    out = torch.zeros(b, length, heads, size, dtype=query.dtype)
    for i in range(b):
        for h in range(heads):
            for t in range(length):
                scores = torch.stack([query[i, h, t] @ k for k in key[i, h // shared]]) * scaling
                scores = softcap * (scores / softcap).tanh() if softcap else scores
                scores = scores if mask is None else scores + mask[0, 0, t]
                p = scores.softmax(-1)
                out[i, t, h] = sum(w * v for w, v in zip(p, value[i, h // shared], strict=True))
    return out


@pytest.mark.parametrize("masked", ["causal", "window", "none"])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_blocks_of_queries_are_every_query_on_its_own(monkeypatch, masked, softcap, groups):
    monkeypatch.setitem(attention._QUERIES, "cpu", 2)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 7, 4, generator=generator).double() for heads in (6, groups, groups)
    )
    hidden = torch.ones(7, 7).triu(1).bool()
    if masked == "window":
        hidden = hidden | torch.ones(7, 7).tril(-3).bool()
    lowest = torch.finfo(torch.float64).min
    mask = (
        None
        if masked == "none"
        else torch.zeros(7, 7).double().masked_fill(hidden, lowest)[None, None]
    )
    ours, _ = attention.attend(None, query, key, value, mask, 0.7, softcap=softcap)
    want = by_hand(query, key, value, mask, 0.7, softcap)
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-13)


def test_the_default_scaling_is_by_the_root_of_the_size():
    x = torch.randn(1, 1, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    ours, _ = attention.attend(None, x, x, x, None)
    torch.testing.assert_close(ours, by_hand(x, x, x, None, 1 / math.sqrt(5), None))


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"s_aux": torch.zeros(1)}])
def test_what_it_cannot_do_is_refused(options):
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="neither dropout nor attention sinks"):
        attention.attend(None, x, x, x, None, 1.0, **options)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_models_attend_as_by_their_own_function(monkeypatch, family):
    monkeypatch.setitem(attention._QUERIES, "cpu", 2)
    module, batch = cases.live(family, attention="eager"), cases.batch()
    model, params, base = fp.split(module)
    assert model.skeleton.config._attn_implementation == attention.NAME
    with torch.no_grad():
        causal = module.get_base_model()
        decoder = getattr(causal, causal.base_model_prefix)
        expected = decoder(input_ids=batch.tokens, use_cache=False).last_hidden_state
        expected = torch.take_along_dim(expected, batch.position.unsqueeze(-1), 1)
        torch.testing.assert_close(
            model.hidden(params, base, batch), expected, rtol=1e-5, atol=1e-5
        )


def test_a_model_that_attends_in_another_way_keeps_its_own(monkeypatch):
    def other(module, query, key, value, *rest, **options):
        return attention.attend(module, 1.1 * query, key, value, *rest, **options)

    monkeypatch.setattr(
        attention, "register", lambda: attention.AttentionInterface.register(attention.NAME, other)
    )
    try:
        module, batch = cases.live("llama", attention="eager"), cases.batch()
        model, params, base = fp.split(module)
    finally:
        monkeypatch.undo()
        attention.register()
    assert model.skeleton.config._attn_implementation == "eager"
    with torch.no_grad():
        expected = module(input_ids=batch.tokens).logits.take_along_dim(
            batch.position[..., None], 1
        )
        torch.testing.assert_close(
            fp.logits(model, params, base, batch), expected, rtol=1e-5, atol=1e-5
        )
