"""Identities of the estimators for any scores, by hypothesis."""

import math
from types import SimpleNamespace

import pytest
import torch
from arrays import SEEDS, drawn, taken
from hypothesis import example, given
from hypothesis import strategies as st

import funcprobe as fp

PER = st.sampled_from(["token", "sequence"])
WEIGHTS = st.sampled_from(["sequence", "prefix", "prefix_raw", "none"])
CLOSE = dict(rtol=1e-8, atol=1e-11)


def same(a, b, *names):
    for name in names:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True, **CLOSE)


@given(SEEDS, WEIGHTS, PER)
def test_the_order_of_rows_does_not_matter(seed, weights, per):
    sweep, rows = drawn(seed)
    order = torch.randperm(len(rows.group), generator=torch.Generator().manual_seed(seed))
    a = fp.entropy_change(sweep, rows, weights=weights, per=per)
    b = fp.entropy_change(*taken(sweep, rows, order), weights=weights, per=per)
    same(a, b, "base", "value", "psi", "stderr", "base_psi", "base_stderr")
    same(a, b, "ess", "khat", "kl", "mean_weight", "weight_range", "largest_share")


@given(SEEDS, WEIGHTS, PER, st.integers(2, 4))
def test_repeating_every_row_changes_neither_value_nor_error(seed, weights, per, times):
    sweep, rows = drawn(seed)
    index = torch.arange(len(rows.group)).repeat(times)
    a = fp.entropy_change(sweep, rows, weights=weights, per=per)
    b = fp.entropy_change(*taken(sweep, rows, index), weights=weights, per=per)
    same(a, b, "base", "value", "psi", "stderr", "base_psi", "base_stderr", "kl", "mean_weight")
    torch.testing.assert_close(b.ess, times * a.ess, **CLOSE)


@given(SEEDS, st.floats(0.0, 300.0))
def test_the_effective_sample_size_lies_between_1_and_n(seed, size):
    sweep, rows = drawn(seed, size=size)
    out = fp.entropy_change(sweep, rows)
    n = len(rows.group)
    assert 1 - 1e-9 <= float(out.ess[0]) <= n + 1e-9
    assert 1 / n - 1e-9 <= float(out.largest_share[0]) <= 1 + 1e-9
    assert float(out.kl[0]) >= -1e-12


@given(SEEDS, WEIGHTS, PER)
def test_no_step_is_no_change(seed, weights, per):
    sweep, rows = drawn(seed, size=0.0)
    out = fp.entropy_change(sweep, rows, weights=weights, per=per)
    assert float(out.value[0]) == 0 and (out.psi == 0).all() and float(out.stderr[0]) == 0
    assert out.khat.isnan().all() and float(out.kl[0]) == 0
    boot = fp.bootstrap(sweep, rows, weights=weights, per=per, draws=20)
    assert float(boot.low[0]) == 0 == float(boot.high[0])
    series = fp.entropy_series(
        (sweep.base, fp.Scores(*(x[0] for x in sweep.change))), rows, weights=weights, per=per
    )
    law = fp.linearity(out, series)
    assert law.verdict == "inconclusive" and law.eta_max[0] == 0


@given(SEEDS, PER)
def test_responses_of_one_token_need_no_weights_by_prefix(seed, per):
    sweep, rows = drawn(seed, width=1)
    plain = fp.entropy_change(sweep, rows, weights="none", per=per)
    for weights in ("prefix", "prefix_raw"):
        same(fp.entropy_change(sweep, rows, weights=weights, per=per), plain, "value", "psi")
    torch.testing.assert_close(plain.value[0], sweep.change.entropy.mean(), **CLOSE)


@example(0, "token", -17.0)  # w - 1 would round as 1 does
@given(SEEDS, PER, st.floats(-800, 800))
def test_a_constant_in_every_log_weight_cancels(seed, per, constant):
    sweep, rows = drawn(seed)
    logp = sweep.change.logp.clone()
    logp[:, :, 0] += constant
    moved = SimpleNamespace(
        etas=sweep.etas, base=sweep.base, change=fp.Scores(logp, sweep.change.entropy)
    )
    a, b = (fp.entropy_change(s, rows, per=per) for s in (sweep, moved))
    same(a, b, "value", "psi", "stderr", "ess", "khat", "kl", "largest_share")
    if abs(constant) < 10:
        expected = a.mean_weight * math.exp(constant)
        torch.testing.assert_close(b.mean_weight, expected, rtol=1e-10, atol=0)


@given(SEEDS, WEIGHTS, PER, st.floats(-2000, 2000))
def test_a_constant_in_every_base_weight_cancels(seed, weights, per, constant):
    sweep, rows = drawn(seed)
    behaviour = sweep.base.logp - drawn(seed + 1, n=len(rows.group))[0].base.logp[:, :1]
    moved = behaviour.clone()
    moved[:, 0] += constant
    a, b = (
        fp.entropy_change(sweep, rows, weights=weights, per=per, behaviour=old)
        for old in (behaviour, moved)
    )
    same(a, b, "base", "value", "psi", "stderr", "base_psi", "kl")


@given(SEEDS, st.sampled_from(["sequence", "prefix", "prefix_raw"]), st.floats(-5, 5))
def test_a_constant_in_every_entropy_moves_the_base_alone(seed, weights, constant):
    sweep, rows = drawn(seed)
    entropy = sweep.base.entropy + constant * rows.response.double()
    moved = SimpleNamespace(
        etas=sweep.etas, base=fp.Scores(sweep.base.logp, entropy), change=sweep.change
    )
    a, b = (fp.entropy_change(s, rows, weights=weights) for s in (sweep, moved))
    same(a, b, "value", "psi")
    assert float(b.base - a.base) == pytest.approx(constant, abs=1e-9)


@given(SEEDS, WEIGHTS, PER)
def test_influences_sum_to_zero(seed, weights, per):
    sweep, rows = drawn(seed)
    out = fp.entropy_change(sweep, rows, weights=weights, per=per)
    assert float(out.psi.sum().abs()) < 1e-12 * (1 + float(out.psi.abs().sum()))
    assert float(out.base_psi.sum().abs()) < 1e-12 * (1 + float(out.base_psi.abs().sum()))
