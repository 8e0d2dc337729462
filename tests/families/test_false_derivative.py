"""Where a module's backward is not the derivative of its values, what needs that is refused."""

import re
from functools import partial

import examine
import pytest
import torch
from zoo import build

import funcprobe as fp

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


CASES = [
    ("llama", "DoRA", "DoRA"),
    ("llama", "DoRA last", "DoRA"),
    ("llama", "DoRA head", "DoRA"),
    ("qwen2", "DoRA last", "DoRA"),
    ("gpt2", "DoRA last", "DoRA"),
    ("gemma3", "DoRA head", "DoRA"),
    ("hrm", "none", "embed_tokens"),
]


@pytest.mark.parametrize(("family", "adapter", "cause"), CASES)
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["float32", "float64"])
def test_a_false_derivative_is_named_and_refused_where_it_is_used(family, adapter, cause, dtype):
    module = build(family, adapter)
    model, params, base = fp.split(module, dtype=dtype)
    assert re.search(cause, model.false_derivative)
    score = fp.scorer(model, base)
    v = examine.direction(params)
    ones = fp.Scores(*torch.ones(2, *examine.batch().response.shape, dtype=torch.float64))
    for call in (
        lambda fn: fp.taylor(fn, params, v, examine.batch()),
        lambda fn: fp.pullback(fn, params, examine.batch(), ones),
        lambda fn: fp.sweep(fn, params, v, [0.1], examine.batch(), nodes="auto"),
    ):
        for fn in (score, lambda p, b: score(p, b), partial(score)):
            with pytest.raises(ValueError, match=f"(?s){cause}"):
                call(fn)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "adapter", "cause"), CASES)
def test_all_else_is_right_beside_a_false_derivative(family, adapter, cause):
    """The gradient is that of the module's own backward, and changes are those of its values."""
    checks = ("scores", "moved", "direct", "lanes", "gradient", "increments")
    examine.right(build(family, adapter), checks=checks)
