"""Rotary tables that change with the length of the rows: right up to the limit, refused beyond."""

import cases
import pytest
import reference
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

import funcprobe as fp

LIMITS = {"dynamic": 64, "longrope": 32}


def live(rope_type):
    """A tiny module; its tables change beyond `LIMITS` tokens."""
    sizes = cases.CONFIGS["llama"]().to_dict()
    sizes = {name: sizes[name] for name in cases._SIZES} | cases._TOKENS
    if rope_type == "dynamic":
        rope = dict(rope_type=rope_type, rope_theta=10000.0, factor=4.0)
        config = LlamaConfig(**sizes, rope_parameters=rope)
    else:
        rope = dict(
            rope_type=rope_type,
            rope_theta=10000.0,
            short_factor=[1.0, 1.5],
            long_factor=[3.0, 7.0],
            original_max_position_embeddings=32,
        )
        config = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=32)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, p in module.named_parameters():
        p.requires_grad_("layers.1" in name)
    return module


def batch(length):
    """A row of `length` tokens and a short one."""
    tokens = [3 + i * i % 60 for i in range(length)]
    return fp.collate([tokens[:5], [7, 9]], [tokens[5:], [11, 12, 13]])


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("rope_type", LIMITS)
def test_rows_up_to_the_limit_are_scored_as_the_live_module_does(rope_type, ran_before):
    module = live(rope_type)
    if ran_before:  # a row beyond the limit, which leaves another table in the module
        with torch.no_grad():
            module(input_ids=torch.arange(3, 63).repeat(1, 2), use_cache=False)
    model, params, base = fp.split(module, dtype=torch.float64)
    assert model.longest == LIMITS[rope_type]
    rows = batch(LIMITS[rope_type] - 1)
    ours = fp.scorer(model, base)(params, rows)
    fresh = live(rope_type).double()
    with torch.no_grad(), reference.float64(fresh):
        for x, y in zip(ours, reference.scores(fresh, rows), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rope_type", LIMITS)
def test_rows_beyond_the_limit_are_refused_by_the_ropes_name(rope_type):
    limit = LIMITS[rope_type]
    model, params, base = fp.split(live(rope_type))
    score, rows = fp.scorer(model, base), batch(limit + 1)
    score(params, batch(limit))
    message = f"model: rows of at most {limit} tokens.*one has {limit + 1}.*type '{rope_type}'"
    with pytest.raises(ValueError, match=message):
        score(params, rows)
    with pytest.raises(ValueError, match=message):
        fp.row_gradients(lambda p, b: sum(x.sum(-1) for x in score(p, b)), params, rows)
    with pytest.raises(ValueError, match=message):
        fp.logits(model, params, base, rows)


@pytest.mark.parametrize("rope_type", LIMITS)
def test_a_call_changes_no_later_call(rope_type):
    model, params, base = fp.split(live(rope_type))
    score, rows = fp.scorer(model, base), batch(LIMITS[rope_type])
    before = score(params, batch(8))
    first, again = score(params, rows), score(params, rows)
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, before, score(params, batch(8))))


def test_a_model_whose_tables_stay_reads_rows_of_any_length():
    assert cases.case("llama").model.longest is None


@pytest.mark.parametrize("rope_type", LIMITS)
def test_the_live_module_is_not_moved(rope_type):
    module = live(rope_type)
    before = {name: table.clone() for name, table in module.named_buffers()}
    fp.split(module)
    assert all(torch.equal(before[name], table) for name, table in module.named_buffers())
