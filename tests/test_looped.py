"""Functions whose lanes vmap cannot stack: a sweep computes them one by one and says so."""

import pytest
import torch

import funcprobe as fp

PARAMS = {"a": torch.tensor([0.3, -0.2], dtype=torch.float64)}
V = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)}
X = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)
ETAS = [0.0, 0.1, -0.4, 0.2]


def plain(params, x):
    return torch.stack([x * params["a"][0], (x * params["a"][1]).exp()], 1)


def writes(params, x):
    out = torch.zeros(len(x), 2, dtype=x.dtype)
    out[:, 0] = x * params["a"][0]
    out[:, 1] = (x * params["a"][1]).exp()
    return out


def branches(params, x):
    return plain(params, x) if params["a"].sum() > 0 else 2 * plain(params, x)


def accumulates(params, x):  # as DeLoRA does
    return torch.zeros(len(x), 2, dtype=x.dtype).add_(plain(params, x))


@pytest.mark.parametrize("nodes", [None, 4])
@pytest.mark.parametrize("fn", [writes, branches, accumulates])
def test_a_sweep_that_vmap_refuses_runs_one_lane_at_a_time(fn, nodes):
    swept = fp.sweep(fn, PARAMS, V, ETAS, X, rows=4, nodes=nodes)
    alone = fp.sweep(fn, PARAMS, V, ETAS, X, rows=4, nodes=nodes, lanes=1)
    assert torch.equal(swept.base, alone.base) and torch.equal(swept.change, alone.change)
    assert torch.equal(swept.change[0], torch.zeros(6, 2))
    assert alone.looped == () and len(swept.looped) == 1 and len(swept.looped[0]) > 20
    assert "one lane at a time, since vmap refused: " + swept.looped[0][:20] in repr(swept)
    assert fp.join([alone, swept]).looped == swept.looped
    if fn is not branches and nodes is None:
        there = torch.stack([plain({"a": PARAMS["a"] + eta * V["a"]}, X) for eta in ETAS])
        torch.testing.assert_close(swept.change, there - plain(PARAMS, X), rtol=1e-13, atol=1e-15)


def test_lanes_that_vmap_stacks_are_not_looped():
    swept = fp.sweep(plain, PARAMS, V, ETAS, X)
    assert swept.looped == () and "one lane" not in repr(swept)


def test_a_function_that_remembers_or_draws_is_still_refused():
    seen = torch.zeros((), dtype=torch.float64)

    def remembers(params, x):
        seen.add_(params["a"].sum())
        return x * seen

    def draws(params, x):
        return x * params["a"].sum() * torch.rand(())

    for fn in (remembers, draws):
        with pytest.raises(RuntimeError, match="vmap|broadcast shape"):
            fp.sweep(fn, PARAMS, V, ETAS, X, rows="all")


def test_an_error_of_the_function_itself_stays_what_it_is():
    def wrong(params, x):
        return torch.zeros(1, dtype=x.dtype).add_(x * params["a"].sum())

    with pytest.raises(RuntimeError, match=r"shape \[1\] doesn't match the broadcast shape \[6\]"):
        fp.sweep(wrong, PARAMS, V, ETAS, X, rows="all")
