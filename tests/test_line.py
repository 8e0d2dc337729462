"""Sweeps along a line, against in-place writes to the live module; exact zeros, settings, names."""

import gc
import types

import cases
import pytest
import reference
import torch

import funcprobe as fp

ETAS = [0.0, 1e-3, -0.01, 0.05, 0.1]
TIGHT = dict(rtol=1e-12, atol=1e-12)


def setting(family="llama", dtype=torch.float64, seed=0):
    case = cases.case(family, dtype)
    return fp.scorer(case.model, case.base), case.params, cases.direction(case.params, seed=seed)


def leaves(sweep):
    return [*sweep.base, *sweep.change]


# Shift and the other verbs on trees


def test_one_shifted_name_changes_only_itself():
    params = cases.case().params
    v = {n: torch.zeros_like(p) for n, p in params.items()}
    name = sorted(v)[3]
    v[name] += 1.0
    out = fp.shift(params, v, 0.5)
    assert set(out) == set(params)
    for n in params:
        assert torch.equal(out[n], params[n] + 0.5 if n == name else params[n])


def test_a_shift_without_a_direction_is_a_copy_of_the_dict():
    params = cases.case().params
    out = fp.shift(params, None, 3.0)
    assert out is not params and out.keys() == params.keys()
    assert all(out[n] is params[n] for n in params)


def test_shift_keeps_the_dtype_of_the_parameters():
    p = {"a": torch.ones(2, dtype=torch.float32)}
    out = fp.shift(p, {"a": torch.ones(2, dtype=torch.float64)}, torch.tensor(0.5).double())
    assert out["a"].dtype == torch.float32


def renamed(v):
    name = next(n for n in sorted(v) if "q_proj.lora_A" in n)
    return {n.replace("q_proj", "q_porj") if n == name else n: t for n, t in v.items()}


def shortened(v):
    name = sorted(v)[0]
    return {n: t[:1] if n == name else t for n, t in v.items()}


def poisoned(v, value):
    name = sorted(v)[2]
    return {n: torch.full_like(t, value) if n == name else t for n, t in v.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (renamed, r"others did: '.*q_porj.*'\. .*nearest trainable name.*q_proj.lora_A"),
        (lambda v: {n: t for n, t in v.items() if "layers.0" not in n}, "14 of 28 are missing"),
        (lambda v: v | {"lm_head.weight": torch.zeros(1)}, "1 others did: 'lm_head.weight'"),
        (shortened, r"1 tensors have another shape.*is \[1, .*expected \["),
        (lambda v: poisoned(v, torch.nan), "must be finite, 1 tensors hold nan or inf"),
        (lambda v: poisoned(v, torch.inf), "must be finite"),
    ],
)
@pytest.mark.parametrize("where", ["shift", "sweep", "taylor", "changes"])
def test_a_direction_that_does_not_fit_is_refused(where, spoil, message):
    score, params, v = setting()
    call = {
        "shift": lambda v: fp.shift(params, v, 0.1),
        "sweep": lambda v: fp.sweep(score, params, v, [0.1], cases.batch()),
        "taylor": lambda v: fp.taylor(score, params, v, cases.batch()),
        "changes": lambda v: fp.changes(score, params, fp.stack([v, v]), cases.batch()),
    }[where]
    if where == "changes" and spoil is shortened:
        message = "another shape"
    with pytest.raises(ValueError, match=f"(?s){where}: .*{message}"):
        call(spoil(v))


def test_a_direction_is_not_refused_for_the_size_of_its_sum():
    v = {"a": torch.full((2,), 3e38)}
    params = {"a": torch.zeros(2)}
    assert torch.equal(fp.shift(params, v, 0.5)["a"], 0.5 * v["a"])
    for values in ([torch.inf, -torch.inf], [torch.nan, 3e38]):
        with pytest.raises(ValueError, match="must be finite"):
            fp.shift(params, {"a": torch.tensor(values)}, 0.5)


def test_an_error_lists_at_most_five_names_sorted():
    params = {f"p{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"'p0', 'p1', 'p2', 'p3', 'p4', \.\.\.") as error:
        fp.shift(params, {}, 0.1)
    assert "'p5'" not in str(error.value)


@pytest.mark.parametrize("eta", [torch.nan, torch.inf, -torch.inf])
def test_an_eta_that_is_not_finite_is_refused(eta):
    score, params, v = setting()
    with pytest.raises(ValueError, match="shift: eta must be finite"):
        fp.shift(params, v, eta)
    with pytest.raises(ValueError, match="sweep: one or more finite etas"):
        fp.sweep(score, params, v, [0.1, eta], cases.batch())


def test_no_eta_at_all_is_refused():
    score, params, v = setting()
    with pytest.raises(ValueError, match="sweep: one or more finite etas"):
        fp.sweep(score, params, v, [], cases.batch())


def test_dot_and_norm_are_those_of_the_flat_vectors():
    params = cases.case().params
    v = cases.direction(params)
    a, b = (torch.cat([t[n].flatten() for n in sorted(params)]) for t in (params, v))
    torch.testing.assert_close(fp.dot(params, v), a @ b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fp.norm(v), b.norm(), rtol=1e-12, atol=0)
    big = {"a": torch.full((1,), 2.0**70, dtype=torch.float32)}
    assert fp.norm(big) == 2.0**70
    with pytest.raises(ValueError, match="dot: .*missing"):
        fp.dot(params, {})


def test_stack_needs_the_same_names():
    with pytest.raises(ValueError, match="stack: .*'b'"):
        fp.stack([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])


# Parity with the in-place loop


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_sweep_is_the_loop_over_in_place_writes(family):
    score, params, v = setting(family)
    batch = cases.batch()
    ours = fp.sweep(score, params, v, ETAS, batch)
    with reference.float64(cases.module64(family)) as module:
        base, change = reference.sweep(module, v, ETAS, batch)
    for a, b in zip(ours.base, base, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    for a, b in zip(ours.change, change, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
        assert b[-1].abs().max() > 1e-2
    assert ours.etas.tolist() == ETAS and ours.etas.dtype == torch.float64
    assert (ours.bound == 0).all() and (ours.source == 0).all()


def test_a_float32_sweep_is_the_loop_to_float32_rounding():
    score, params, v = setting(dtype=None)
    batch = cases.batch()
    ours = fp.sweep(score, params, v, ETAS, batch)
    base, change = reference.sweep(cases.case("llama", None).module, v, ETAS, batch)
    for a, b in zip(leaves(ours), [*base, *change], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5)


def test_changes_are_the_sweep_of_stacked_deltas():
    score, params, v = setting()
    other = cases.direction(params, seed=5)
    batch = cases.batch()
    deltas = [{n: 0.1 * t for n, t in v.items()}, {n: 0.02 * t for n, t in other.items()}]
    base, change = fp.changes(score, params, fp.stack(deltas), batch)
    for i, (direction, eta) in enumerate([(v, 0.1), (other, 0.02)]):
        one = fp.sweep(score, params, direction, [eta], batch)
        for a, b in zip([*base, *(c[i] for c in change)],
                        [*one.base, *(c[0] for c in one.change)], strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, **TIGHT)


def test_changes_need_one_length():
    score, params, v = setting()
    deltas = fp.stack([v, v])
    deltas[next(iter(deltas))] = deltas[next(iter(deltas))][:1]
    with pytest.raises(ValueError, match=r"changes: .*same K, found \[1, 2\]"):
        fp.changes(score, params, deltas, cases.batch())


def test_the_base_is_the_function_at_params():
    score, params, v = setting()
    batch = cases.batch()
    for a, b in zip(
        fp.sweep(score, params, v, ETAS, batch).base, score(params, batch), strict=True
    ):
        torch.testing.assert_close(a, b, **TIGHT)


# Exact zeros, lanes and rows


@pytest.mark.parametrize("dtype", [torch.float64, None])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 5, None])
def test_no_step_and_no_direction_are_zero_bit_for_bit(lanes, dtype):
    score, params, v = setting(dtype=dtype)
    batch = cases.batch()
    zero = {n: torch.zeros_like(t) for n, t in v.items()}
    still = fp.sweep(score, params, zero, [1.0, -3.0, 1e6, 0.0], batch, lanes=lanes, rows=3)
    assert all((x == 0).all() for x in still.change)
    etas = [0.0, 0.1, 0.0, -0.2, 0.0]
    moved = fp.sweep(score, params, v, etas, batch, lanes=lanes, rows=3)
    for x in moved.change:
        assert (x[[0, 2, 4]] == 0).all() and (x[[1, 3]] != 0).any()


@pytest.mark.parametrize("family", cases.SOME)
def test_lanes_and_rows_change_nothing(family):
    score, params, v = setting(family)
    batch = cases.batch()
    whole = fp.sweep(score, params, v, ETAS, batch, lanes=1, rows=8)
    for lanes in (1, 2, 3, 6, 50):
        for rows in (1, 3, 8, 50):
            other = fp.sweep(score, params, v, ETAS, batch, lanes=lanes, rows=rows)
            for a, b in zip(leaves(other), leaves(whole), strict=True):
                torch.testing.assert_close(a, b, **TIGHT)


def test_the_order_and_company_of_etas_change_nothing():
    score, params, v = setting()
    batch = cases.batch()
    whole = fp.sweep(score, params, v, ETAS, batch, lanes=3)
    back = fp.sweep(score, params, v, ETAS[::-1], batch, lanes=3)
    for i, eta in enumerate(ETAS):
        alone = fp.sweep(score, params, v, [eta], batch)
        for a, b, c in zip(whole.change, back.change, alone.change, strict=True):
            torch.testing.assert_close(b[len(ETAS) - 1 - i], a[i], **TIGHT)
            torch.testing.assert_close(c[0], a[i], **TIGHT)


def test_the_same_call_gives_the_same_bits():
    score, params, v = setting(dtype=None)
    one, two = (fp.sweep(score, params, v, ETAS, cases.batch()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(two), strict=True))


@pytest.mark.parametrize("tokens", [9, 20, 30, 1000])
def test_blocks_by_length_join_into_the_sweep(tokens):
    score, params, v = setting()
    batch = cases.batch()
    whole = fp.sweep(score, params, v, ETAS, batch)
    blocks, order = fp.by_length(batch, tokens=tokens)
    parts = list(fp.sweep_blocks(score, params, v, ETAS, blocks, lanes=3))
    assert len(parts) == len(blocks)
    joined = fp.join(parts, order)
    assert torch.equal(joined.etas, whole.etas)
    for a, b in zip(leaves(joined), leaves(whole), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    unordered = fp.join(iter(parts))
    torch.testing.assert_close(unordered.base.logp, whole.base.logp[order], **TIGHT)
    torch.testing.assert_close(unordered.change.logp, whole.change.logp[:, order], **TIGHT)


def test_join_needs_the_same_etas():
    score, params, v = setting()
    parts = [fp.sweep(score, params, v, etas, cases.batch()) for etas in ([0.1], [0.2])]
    with pytest.raises(ValueError, match="join: the sweeps must share their etas"):
        fp.join(parts)
    with pytest.raises(ValueError, match="join: one or more results of blocks were expected"):
        fp.join([])
    with pytest.raises(ValueError, match="join: an order of 8 rows was expected.*not of 7"):
        fp.join(parts[:1], torch.arange(7))


# Continuity


def test_a_nudge_of_one_weight_moves_the_scores_a_little():
    score, params, v = setting()
    v = {n: torch.zeros_like(t) for n, t in v.items()}
    name = next(n for n in v if "down_proj.lora_B" in n)
    v[name].view(-1)[0] = 1.0
    out = fp.sweep(score, params, v, [1e-6, 2e-6, -1e-6], cases.batch())
    for x in out.change:
        size = x[0].abs().max()
        assert 1e-9 < size < 1e-4
        torch.testing.assert_close(x[1], 2 * x[0], rtol=1e-3, atol=1e-4 * float(size))
        torch.testing.assert_close(x[2], -x[0], rtol=1e-3, atol=1e-4 * float(size))


def test_opposite_steps_are_antisymmetric_to_second_order():
    score, params, v = setting()
    out = fp.sweep(score, params, v, [1e-3, -1e-3, 2e-3, -2e-3], cases.batch())
    for x in out.change:
        even = (x[0] + x[1]).norm(), (x[2] + x[3]).norm()
        assert 0 < even[0] < 0.1 * (x[0] - x[1]).norm()
        assert 3.8 < even[1] / even[0] < 4.2


# Settings


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_changes_no_result_and_is_restored(precision):
    score, params, v = setting(dtype=None)
    expected = fp.sweep(score, params, v, ETAS, cases.batch())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        tf32 = torch.backends.cuda.matmul.allow_tf32
        ours = fp.sweep(score, params, v, ETAS, cases.batch())
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(leaves(ours), leaves(expected), strict=True))


def test_products_are_ieee_inside_whatever_the_callers_setting():
    _, params, v = setting(dtype=None)
    seen = []

    def spy(params, batch):
        seen.append(
            (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        )
        seen.append(torch.is_autocast_enabled("cpu"))
        return batch.reward * params[next(iter(params))].sum()

    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fp.sweep(spy, params, v, [0.1], cases.batch(), lanes=1)
            fp.evaluate(spy, params, cases.batch())
            fp.gradient(spy, params, cases.batch())
            fp.row_gradients(spy, params, cases.batch())
            fp.taylor(spy, params, v, cases.batch())
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("ieee", "ieee"), False}


def test_autocast_outside_changes_no_result():
    score, params, v = setting(dtype=None)
    batch = cases.batch()
    expected = fp.sweep(score, params, v, ETAS, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fp.sweep(score, params, v, ETAS, batch)
        terms = fp.taylor(score, params, v, batch)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(leaves(ours), leaves(expected), strict=True))
    for a, b in zip(terms[1], fp.taylor(score, params, v, batch)[1], strict=True):
        assert torch.equal(a, b)


def test_settings_are_restored_after_an_error():
    _, params, v = setting()

    def broken(params, batch):
        raise KeyError("mine")

    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError, match="mine"):
            fp.sweep(broken, params, v, [0.1], cases.batch())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# What fn may be


def test_any_tree_of_outputs_will_do():
    _, params, v = setting()

    def fn(params, batch):
        x = sum(p.sum() for p in params.values()) * batch.reward
        return {"a": x, "b": (x.unsqueeze(-1).expand(-1, 3), x.double() ** 2)}

    out = fp.sweep(fn, params, v, ETAS, cases.batch(), rows=3, lanes=3)
    assert out.change["b"][0].shape == (5, 8, 3) and out.base["a"].shape == (8,)
    for i, eta in enumerate(ETAS):
        there = fn(fp.shift(params, v, eta), cases.batch())
        torch.testing.assert_close(out.change["b"][1][i] + out.base["b"][1], there["b"][1])


def test_any_batch_of_leading_rows_will_do():
    rows = types.SimpleNamespace(x=torch.arange(5.0).double(), y=torch.ones(5).double())
    batch = {"x": rows.x, "y": rows.y}
    out = fp.sweep(
        lambda p, b: p["a"] * b["x"] + b["y"],
        {"a": torch.ones(()).double()},
        {"a": torch.ones(()).double()},
        [0.5],
        batch,
        rows=2,
    )
    assert out.change.tolist() == [[0.0, 0.5, 1.0, 1.5, 2.0]]
    with pytest.raises(ValueError, match=r"same N, found \[4, 5\]"):
        fp.evaluate(lambda p, b: b["x"], {}, batch | {"y": torch.ones(4)})


def test_nan_in_the_output_is_named_by_row():
    _, params, v = setting()

    def fn(params, batch):
        return torch.where(batch.group.eq(3), torch.nan, batch.reward) * params["a"]

    one = {"a": torch.ones(())}
    with pytest.raises(ValueError, match=r"evaluate: the function gave nan in 1 rows.*\[6\]"):
        fp.evaluate(fn, one, cases.batch(), rows=3)
    with pytest.raises(ValueError, match=r"sweep.*: the function gave nan in 1 rows.*\[6\]"):
        fp.sweep(fn, one, one, [0.1], cases.batch(), rows=3)
    with pytest.raises(ValueError, match=r"taylor: the function gave nan in 1 rows.*\[6\]"):
        fp.taylor(fn, one, one, cases.batch(), rows=3)


@pytest.mark.parametrize("change", ["direct", "increment"])
def test_a_sweep_holds_the_deltas_of_one_turn_only(change):
    """Wherever the function is called, as many tensors of two lanes live as at the first call."""
    wide, etas, alive = (2, 1237), torch.linspace(0.1, 1, 9).double(), []

    def fn(params, batch):
        gc.collect()
        tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
        alive.append(sum(tuple(t.shape) == wide for t in tensors))
        return params["a"].sum() * batch.reward

    zero = {"a": torch.zeros(wide[1], dtype=torch.float64)}
    v = {"a": torch.full_like(zero["a"], 1 / wide[1])}
    out = fp.sweep(fn, zero, v, etas, cases.batch(), change=change, lanes=2)
    torch.testing.assert_close(out.change, etas[:, None] * cases.batch().reward)
    assert len(alive) >= 5 and alive[0] > 0 and max(alive) == alive[0], alive


def test_randomness_in_fn_is_refused():
    score, params, v = setting()
    with pytest.raises(RuntimeError, match="random"):
        fp.sweep(lambda p, b: torch.randn(len(b.tokens)), params, v, [0.1], cases.batch())
