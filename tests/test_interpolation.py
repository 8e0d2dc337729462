"""Dense curves: what interpolation gives is what evaluation gives, within the printed bound."""

import math

import cases
import pytest
import torch

import funcprobe as fp
from funcprobe import EVALUATED, INTERPOLATED, LAW


def counted(fn):
    """The function, and a list of how many lanes each of its calls was given."""
    calls = []

    def spy(params, batch):
        calls.append(1)
        return fn(params, batch)

    return spy, calls


def analytic(params, batch):
    """Rows of smooth functions whose value along a line is known."""
    t = params["t"]
    return torch.stack([torch.exp(batch * t), torch.sin(3 * batch * t)], dim=1)


@pytest.mark.parametrize("span", [(0.0, 1.0), (-1.0, 1.0), (-0.3, 1.0), (-1.0, 0.0)])
def test_a_known_function_is_interpolated_within_the_bound(span):
    batch, zero = (
        torch.tensor([0.5, -0.2, 0.7], dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    etas = torch.linspace(*span, 41, dtype=torch.float64)
    got = fp.sweep(analytic, {"t": zero}, {"t": zero + 1}, etas, batch, nodes="auto", tol=1e-9)
    want = analytic({"t": etas[:, None]}, batch[None]).transpose(1, 2) - analytic(
        {"t": zero}, batch
    )
    off = (got.change - want).abs().amax((1, 2))
    middle = got.source == INTERPOLATED
    # `want` is a difference of values, and rounds like one.
    assert (off[middle] <= got.bound[middle] + 1e-15).all() and off.max() < 1e-9
    assert got.bound.max() < 1e-8
    assert (got.change[etas == 0] == 0).all() and (got.source[etas == 0] == LAW).all()


def test_nodes_are_evaluated_and_say_so():
    batch, zero = torch.ones(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    etas = torch.tensor([0.0, 0.4, 1.0, 1e-12], dtype=torch.float64)
    got = fp.sweep(analytic, {"t": zero}, {"t": zero + 1}, etas, batch, nodes=3)
    assert len({LAW, INTERPOLATED, EVALUATED}) == 3
    assert got.source.tolist() == [LAW, INTERPOLATED, EVALUATED, INTERPOLATED]
    assert got.bound[[0, 2]].tolist() == [0.0, 0.0] and (got.bound[[1, 3]] > 0).all()
    plain = fp.sweep(analytic, {"t": zero}, {"t": zero + 1}, etas, batch)
    assert torch.allclose(got.change[2], plain.change[2], rtol=1e-12)


def test_tiny_etas_keep_their_relative_accuracy():
    batch, zero = (
        torch.tensor([0.5, 0.7], dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    etas = torch.tensor([1e-12, 1e-9, 1e-6, 1.0], dtype=torch.float64)
    got = fp.sweep(analytic, {"t": zero}, {"t": zero + 1}, etas, batch, nodes="auto", tol=1e-10)
    want = torch.stack(
        [torch.expm1(batch * etas[:, None]), torch.sin(3 * batch * etas[:, None])], dim=2
    )
    assert torch.allclose(got.change, want, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["direct", "increment"])
def test_a_curve_of_sixty_four_points_takes_nine_evaluations(checkpoint, evaluation, stepped, kind):
    """Over a range in which tokens move by about half a nat, from at most nine evaluations."""
    score, v, batch = (
        fp.scorer(checkpoint.model, checkpoint.base),
        stepped[1],
        evaluation.rows(slice(0, 512, 32)),
    )
    top = 0.5 / float(fp.taylor(score, checkpoint.params, v, batch)[1].logp.abs().max())
    etas = torch.linspace(0, top, 64, dtype=torch.float64)
    spy, calls = counted(score)
    same = {"change": kind, "rows": len(batch.tokens), "lanes": 1}
    got = fp.sweep(spy, checkpoint.params, v, etas, batch, nodes="auto", **same)
    runs_of_base = 2 if kind == "direct" else 0  # one a call at lanes = 1
    assert len(calls) - runs_of_base <= 9
    want = fp.sweep(score, checkpoint.params, v, etas, batch, change=kind)
    moved = float(want.change.logp.abs().max())
    assert 0.2 < moved < 1
    middle = got.source == INTERPOLATED
    assert middle.sum() >= 60
    for a, b in zip(got.change, want.change, strict=True):
        off = (a - b).abs().amax((1, 2))
        # Differences of values of a few nats round to 1e-14.
        assert (off[middle] <= got.bound[middle] + 1e-13).all()
        assert off.max() < 1e-6 * moved
    exact = fp.entropy_change(want, batch).value
    assert torch.allclose(fp.entropy_change(got, batch).value, exact, rtol=1e-5, atol=1e-12)


def poles(params, batch):
    """Functions whose nearest singularity along a line is at -1 / batch."""
    t = params["t"]
    return torch.stack([torch.log1p(batch * t), batch * t / (1 + batch * t)], dim=-1)


ZERO = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("fn", [analytic, poles])
def test_the_bound_holds_for_fast_and_slow_curves(fn, tol):
    batch = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0], dtype=torch.float64)
    etas = torch.linspace(0, 1, 101, dtype=torch.float64)
    got = fp.sweep(fn, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, nodes="auto", tol=tol)
    want = torch.stack([fn({"t": eta}, batch) - fn({"t": ZERO}, batch) for eta in etas])
    off = (got.change - want).abs()
    largest = float((want[1:] / etas[1:, None, None]).abs().max())
    assert (off.amax((1, 2)) <= got.bound + 1e-15).all()
    # What was asked for is kept and not much overdone by the row that needed most.
    assert off.max() <= tol * largest + 1e-15
    assert got.bound.max() <= 4.2 * tol * largest + 1e-13


def test_each_row_is_evaluated_as_often_as_it_needs():
    batch = torch.tensor([0.01, 2.0, 0.3, 2.0], dtype=torch.float64)
    seen = []

    def counting(params, batch):
        seen.extend(batch.tolist())
        return poles(params, batch)

    etas = torch.linspace(0, 1, 21, dtype=torch.float64)
    got = fp.sweep(
        counting, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, nodes="auto", rows=1, lanes=1
    )
    few, some, many = (seen.count(x) for x in (0.01, 0.3, 2.0))
    assert few < some < many / 2
    want = torch.stack([poles({"t": eta}, batch) for eta in etas])
    assert torch.allclose(got.change, want, rtol=0, atol=2e-6)
    assert torch.allclose(got.change[:, 1], got.change[:, 3], rtol=0, atol=0)


def test_the_bound_holds_for_softmaxes():
    """Of random logits that move along a line; each row alone, so that its own bound counts."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2, 150, 20, generator=generator, dtype=torch.float64)

    def scores(params, batch):
        logp = (batch[:, 0] + params["t"] * batch[:, 1]).log_softmax(-1)
        return torch.stack([logp[:, 0], -(logp.exp() * logp).sum(-1)], dim=1)

    etas = torch.linspace(0, 1, 101, dtype=torch.float64)
    for row in logits.transpose(0, 1):
        batch = row.unsqueeze(0)
        got = fp.sweep(scores, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, nodes="auto", tol=1e-3)
        want = torch.stack([scores({"t": eta}, batch) for eta in etas])
        off = (got.change - (want - scores({"t": ZERO}, batch))).abs().amax((1, 2))
        assert (off <= got.bound + 1e-14).all()


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_the_roughest_output_decides(names):
    def both(params, batch):
        rough, smooth = poles(params, 2 * batch), params["t"] * batch
        return dict(zip(names, (rough, smooth), strict=True))

    batch = torch.ones(2, dtype=torch.float64)
    etas = torch.linspace(0, 1, 21, dtype=torch.float64)
    got = fp.sweep(both, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, nodes="auto")
    want = torch.stack([poles({"t": eta}, 2 * batch) for eta in etas])
    off = (got.change[names[0]] - want).abs().amax((1, 2))
    assert off.max() < 4e-6 and (off <= got.bound + 1e-15).all()


def test_an_error_small_by_chance_is_not_believed():
    """A polynomial that the first four nodes predict exactly at the fifth, and nowhere else."""
    seen = []

    def visited(params, batch):
        seen.append(float(params["t"]))
        return params["t"].exp() * batch

    batch, etas = torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, 101, dtype=torch.float64)
    fp.sweep(visited, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, nodes=4, lanes=1)
    nodes = list(dict.fromkeys(seen))
    assert len(nodes) == 5 and nodes[0] == 0

    def lucky(params, batch):
        """t times a polynomial in Newton's form, whose coefficient of the fourth order is 0."""
        t, product, total = params["t"], 1.0, 0.0
        for node, coefficient in zip(nodes, (1.0, 1.0, 2.0, 4.0, 0.0), strict=True):
            total = total + coefficient * product
            product = product * (t - node)
        return t * (total + 4 * product) * batch

    got = fp.sweep(lucky, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, nodes="auto", tol=1e-6)
    want = torch.stack([lucky({"t": eta}, batch) for eta in etas])
    off = (got.change - want).abs().amax(1)
    assert (off <= got.bound + 1e-14).all() and off.max() < 1e-5


def test_coarse_products_are_interpolated_to_what_they_hold():
    case, batch = cases.case("llama"), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params, size=1e-3)
    etas = torch.linspace(0, 1, 9, dtype=torch.float64)
    same = {"change": "increment", "nodes": "auto"}
    got = fp.sweep(score, case.params, v, etas, batch, matmul="bfloat16", **same)
    want = fp.sweep(score, case.params, v, etas, batch, change="increment")
    off = (got.change.logp - want.change.logp).abs().amax((1, 2))
    assert (off <= got.bound)[got.source != EVALUATED].all()
    assert off.max() < 0.03 * want.change.logp.abs().max()
    with pytest.raises(ValueError, match="matmul was expected to be"):
        fp.sweep(score, case.params, v, etas, batch, matmul="float8", **same)


def test_no_tolerance_at_all_is_what_rounding_leaves():
    batch, etas = torch.ones(2, dtype=torch.float64), torch.linspace(0, 1, 21, dtype=torch.float64)
    got = fp.sweep(analytic, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, nodes="auto", tol=0.0)
    want = torch.stack([analytic({"t": eta}, batch) for eta in etas]) - analytic({"t": ZERO}, batch)
    assert ((got.change - want).abs().amax((1, 2)) <= got.bound + 1e-15).all()
    assert got.bound.max() < 1e-12


def test_blocks_join_with_their_bounds():
    case, batch = cases.case("llama", torch.float64), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params, size=1e-3)
    etas = torch.linspace(0, 1, 20, dtype=torch.float64)
    blocks, order = fp.by_length(batch, tokens=20)
    same = {"nodes": "auto", "tol": 1e-7}
    got = fp.join(fp.sweep_blocks(score, case.params, v, etas, blocks, **same), order)
    want = fp.sweep(score, case.params, v, etas, batch)
    off = (got.change.logp - want.change.logp).abs().amax((1, 2))
    assert (off <= got.bound + 1e-12).all()


def test_a_rough_curve_is_refused():
    def rough(params, batch):
        return torch.sin(300 * params["t"]) * batch

    zero = torch.zeros((), dtype=torch.float64)
    with pytest.raises(ValueError, match="not smooth enough"):
        fp.sweep(
            rough,
            {"t": zero},
            {"t": zero + 1},
            [0.0, 1.0],
            torch.ones(1, dtype=torch.float64),
            nodes="auto",
        )


@pytest.mark.parametrize("nodes", ["many", 2, 0, 3.5])
def test_bad_nodes_are_refused(nodes):
    zero = torch.zeros((), dtype=torch.float64)
    with pytest.raises(ValueError, match="nodes must be"):
        fp.sweep(
            analytic,
            {"t": zero},
            {"t": zero + 1},
            [1.0],
            torch.ones(1, dtype=torch.float64),
            nodes=nodes,
        )


def test_what_is_infinite_is_refused():
    def steep(params, batch):
        return batch * torch.exp(2000 * params["t"])

    batch = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="infinite somewhere"):
        fp.sweep(steep, {"t": ZERO}, {"t": ZERO + 1}, [0.0, 1.0], batch, nodes="auto")


@pytest.mark.parametrize("tol", [float("nan"), float("inf"), -1e-3])
def test_bad_tolerances_are_refused(tol):
    batch = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="tol must be"):
        fp.sweep(analytic, {"t": ZERO}, {"t": ZERO}, [1.0], batch, nodes="auto", tol=tol)


@pytest.mark.parametrize("nodes", ["auto", 3, 40])
def test_a_function_that_does_not_move_has_a_flat_curve(nodes):
    batch = torch.ones(2, dtype=torch.float64)
    got = fp.sweep(analytic, {"t": ZERO}, {"t": ZERO}, [0.0, 0.5, 1.0], batch, nodes=nodes)
    assert (got.change == 0).all() and got.change.shape == (3, 2, 2)


def test_a_curve_at_zero_alone_is_zero():
    zero = torch.zeros((), dtype=torch.float64)
    got = fp.sweep(
        analytic,
        {"t": zero},
        {"t": zero + 1},
        [0.0, 0.0],
        torch.ones(1, dtype=torch.float64),
        nodes="auto",
    )
    assert (got.change == 0).all() and got.change.shape == (2, 1, 2)


def test_a_subtraction_does_not_make_the_curve_start_in_noise():
    """Increments of an operation without a rule: the derivative at 0 is a true one all the same."""

    def bell(params, batch):
        return torch.erf(0.3 + batch * params["t"])

    batch = torch.tensor([0.5, 0.7], dtype=torch.float64)
    etas = torch.tensor([1e-12, 0.5, 1.0], dtype=torch.float64)
    got = fp.sweep(
        bell, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, change="increment", nodes="auto"
    )
    slope = batch * 2 / math.sqrt(math.pi) * math.exp(-(0.3**2))
    assert got.fallbacks == ("erf",)
    assert torch.allclose(got.change[0], etas[0] * slope, rtol=1e-11, atol=0)


def test_increments_need_no_derivative():
    """One a rounding away from 0 stands for it: an evaluation in the place of two."""
    spy, calls = counted(analytic)
    batch = torch.tensor([0.5, 0.7], dtype=torch.float64)
    etas = torch.tensor([1e-12, 0.5, 1.0], dtype=torch.float64)
    same = {"change": "increment", "nodes": 4, "lanes": 1}
    got = fp.sweep(spy, {"t": ZERO}, {"t": ZERO + 1}, etas, batch, **same)
    assert len(calls) == 5
    want = torch.stack([batch, 3 * batch], dim=1)
    assert torch.allclose(got.change[0], etas[0] * want, rtol=1e-11, atol=0)
    assert torch.equal(got.base, analytic({"t": ZERO}, batch))
