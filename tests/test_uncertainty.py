"""Resampling against rows really dropped and repeated; weights' diagnostics against references."""

import math
from statistics import NormalDist

import cases
import pytest
import torch
from arrays import N, arrays, swept, taken
from enumerated import exact_batch, setting

import funcprobe as fp
from funcprobe.statistics.uncertainty import interval, standard_error, t_quantile
from funcprobe.statistics.weights import (
    khat_limit,
    kl,
    largest_share,
    mean_weight_z,
    pareto_khat,
    pareto_smooth,
)

WEIGHTS = ["sequence", "prefix", "prefix_raw"]
PER = ["token", "sequence"]


# Jackknife and bootstrap


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_jackknife_really_leaves_prompts_out(weights, per):
    terms, rows = arrays()
    sweep = swept(terms, [0.0, 0.5, -2.0])
    got = fp.jackknife(sweep, rows, weights=weights, per=per)
    full = fp.entropy_change(sweep, rows, weights=weights, per=per).value
    without = []
    for g in range(3):
        kept = (rows.group != g).nonzero().flatten()
        left = taken(sweep, rows, kept)
        without.append(fp.entropy_change(*left, weights=weights, per=per).value)
    without = torch.stack(without)
    bias = 2 * (without.mean(0) - full)
    error = (2 / 3 * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(got.value, full, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got.bias, bias, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.stderr, error, rtol=1e-9, atol=1e-12)
    assert "bias" in str(got) and not got.note and got.stderr[0] == 0


@pytest.mark.parametrize("studentised", [False, True])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_draw_of_the_bootstrap_is_the_estimator_on_repeated_rows(weights, per, studentised):
    terms, rows = arrays()
    sweep = swept(terms, [0.5, -1.0])
    options = dict(weights=weights, per=per)
    draws, seed = 40, 3
    got = fp.bootstrap(sweep, rows, draws=draws, seed=seed, studentised=studentised, **options)
    index = torch.randint(3, (draws, 3), generator=torch.Generator().manual_seed(seed))
    values, t = [], []
    full = fp.entropy_change(sweep, rows, **options)
    for drawn in index:
        members = [3 * int(g) + torch.arange(3) for g in drawn]
        drawn_sweep, drawn_rows = taken(sweep, rows, torch.cat(members))
        drawn_rows.group = torch.arange(3).repeat_interleave(3)  # a prompt drawn twice is two
        out = fp.entropy_change(drawn_sweep, drawn_rows, **options)
        values.append(out.value)
        t.append((out.value - full.value) / out.stderr)
    values = torch.stack(values)
    torch.testing.assert_close(got.draws, values, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(got.stderr, values.std(0), rtol=1e-10, atol=1e-13)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    if studentised:
        # Three times the same prompt leaves no spread: such draws say nothing of t.
        t = torch.stack(t)
        same = (index == index[:, :1]).all(1)
        low, high = t[~same].quantile(ends, 0)
        want = full.value - high * full.stderr, full.value - low * full.stderr
    else:
        want = values.quantile(ends, 0)
    torch.testing.assert_close(
        torch.stack([got.low, got.high]), torch.stack([*want]), rtol=1e-7, atol=1e-9
    )
    assert ("studentised" in got.note) != studentised


def test_bayesian_draws_weigh_every_prompt():
    terms, rows = arrays()
    sweep = swept(terms, [0.5])
    got = fp.bootstrap(sweep, rows, draws=4000, bayesian=True)
    counts = fp.bootstrap(sweep, rows, draws=4000)
    error = float(fp.entropy_change(sweep, rows).stderr[0])
    # Dirichlet weights have the counts' variance times G / (G + 1), and stderr^2 G / (G - 1).
    assert float(got.stderr[0]) == pytest.approx(error * math.sqrt(2 / 4), rel=0.15)
    assert float(counts.stderr[0]) == pytest.approx(error * math.sqrt(2 / 3), rel=0.15)
    assert len(got.draws.unique()) == 4000 and len(counts.draws.unique()) <= 27
    with pytest.raises(ValueError, match="leave bayesian= out"):
        fp.bootstrap(sweep, rows, bayesian=True, studentised=True)


def test_one_prompt_has_no_error_and_says_why():
    terms, rows = arrays()
    rows.group = torch.zeros(N).long()
    sweep = swept(terms, [0.0, 0.5])
    for got in (fp.jackknife(sweep, rows), fp.bootstrap(sweep, rows, draws=20)):
        assert got.stderr.isnan().all() and got.value.isfinite().all()
        assert "all rows share one prompt" in got.note and got.note in str(got)
    assert fp.bootstrap(sweep, rows, draws=20).low.isnan().all()
    assert fp.entropy_change(sweep, rows).interval().isnan().all()
    assert fp.band(fp.entropy_change(sweep, rows).psi).isnan().all()


def test_two_prompts_have_errors():
    terms, rows = arrays()
    rows.group = (rows.group > 0).long()
    sweep = swept(terms, [0.5])
    left, drawn = fp.jackknife(sweep, rows), fp.bootstrap(sweep, rows, draws=20)
    assert left.stderr > 0 and not left.note
    assert drawn.stderr > 0 and drawn.low < drawn.high and "only 2 prompts" in drawn.note


# Intervals and bands


@pytest.mark.parametrize(
    ("level", "df", "t"),
    [  # Abramowitz and Stegun, table 26.10
        (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 7, 2.365), (0.95, 30, 2.042),
        (0.99, 5, 4.032), (0.5, 4, 0.741), (0.95, 10**6, 1.960),
    ],
)  # fmt: skip
def test_students_quantiles_are_the_tabulated_ones(level, df, t):
    assert t_quantile(level, df) == pytest.approx(t, abs=6e-4)


def test_students_quantiles_meet_where_the_formula_changes():
    assert t_quantile(0.95, 999) == pytest.approx(t_quantile(0.95, 1000), rel=3e-6)
    assert math.isnan(t_quantile(0.95, 0))


def test_an_interval_is_value_plus_minus_t():
    psi = torch.tensor([[1.0, -2.0, 1.0]]).double()
    low, high = interval(torch.tensor([5.0]).double(), psi)[0]
    assert float(high - 5) == pytest.approx(4.3026527 * 3.0, rel=1e-6)
    assert float(5 - low) == pytest.approx(4.3026527 * 3.0, rel=1e-6)


def test_a_band_over_one_point_is_students_interval_and_grows_with_independent_ones():
    generator = torch.Generator().manual_seed(0)
    psi = torch.randn(12, 400, generator=generator).double()
    psi = psi - psi.mean(-1, keepdim=True)
    error = standard_error(psi)
    few = torch.randn(1, 6, generator=generator).double()
    few = few - few.mean()
    for one in (psi[:1], few):
        half = fp.band(one, draws=40_000) / standard_error(one)
        want = t_quantile(0.95, one.shape[-1] - 1)
        assert float(half[0]) == pytest.approx(want, rel=0.03)
    # Twelve independent points: Sidak's level.
    half = fp.band(psi, draws=40_000) / error
    assert float(half[0]) == pytest.approx(
        NormalDist().inv_cdf((1 + 0.95 ** (1 / 12)) / 2), rel=0.02
    )
    assert (half - half[0]).abs().max() < 1e-12
    # The same point twelve times over costs nothing.
    copies = psi[:1] * torch.arange(1, 13).double()[:, None]
    half = fp.band(copies, draws=40_000) / standard_error(copies)
    assert float(half[3]) == pytest.approx(1.96, rel=0.02)
    assert fp.band(torch.zeros(3, 5).double()).tolist() == [0, 0, 0]


# What the weights say


def draws(n, size):
    """Quantiles of a normal in a scrambled order, the same everywhere."""
    golden = 0.6180339887498949
    x = [size * NormalDist().inv_cdf((i * golden + 0.5) % 1) for i in range(n)]
    return torch.tensor(x, dtype=torch.float64)


# arviz_stats 0.8.0: `lw, k = arviz_stats.base.array_stats.psislw(-draws(n, size))`; then k, the
# three largest of exp(lw) and the sum of its squares.
ARVIZ = [
    (30, 1.0, 0.3606636960172623, [0.15106639097765534, 0.11434980929226311, 0.08544675637004005],
     0.06667994504260796),
    (100, 0.3, 0.26277737941421475, [0.022998332840425448, 0.020573164128358388,
     0.018430302333104324], 0.01103661129804675),
    (100, 2.0, 0.8186212153922533, [0.2997456410514039, 0.11792595511506271, 0.07530783843467947],
     0.12067572332447282),
    (500, 0.01, -0.07738717121215784, [0.002059919259700116, 0.002059919259700116,
     0.002056194638073209], 0.002000203122601449),
    (500, 1.0, 0.2829247490429187, [0.02353385214989474, 0.01952250295155699, 0.01628531364537414],
     0.00503541935045063),
    (2000, 3.0, 1.0388789423097453, [0.30727966608109125, 0.09790612529303892, 0.0574447460014476],
     0.11318335963841177),
]  # fmt: skip


@pytest.mark.parametrize(("n", "size", "khat", "largest", "squares"), ARVIZ)
def test_khat_and_smoothed_weights_are_those_of_arviz(n, size, khat, largest, squares):
    logw = draws(n, size)
    assert float(pareto_khat(logw)) == pytest.approx(khat, abs=1e-9)
    smoothed = pareto_smooth(logw + 3)
    w = smoothed.softmax(-1)
    assert w.sort(descending=True).values[:3].tolist() == pytest.approx(largest, rel=1e-9)
    assert float((w * w).sum()) == pytest.approx(squares, rel=1e-9)
    body = logw < logw.sort().values[-(math.floor(min(n / 5, 3 * math.sqrt(n))))]
    torch.testing.assert_close(smoothed[body], logw[body] + 3, rtol=1e-14, atol=1e-14)
    assert (smoothed <= logw.max() + 3 + 1e-12).all()


def test_smoothing_keeps_small_weights_digits_and_undefined_ones():
    logw = draws(500, 1e-9)
    moved = pareto_smooth(logw) - logw
    assert 0 < moved.abs().max() < 1e-9
    larger = pareto_smooth(draws(500, 1e-6)) - draws(500, 1e-6)
    torch.testing.assert_close(1e3 * moved, larger, rtol=1e-3, atol=1e-11)
    for undefined in (torch.zeros(50).double(), draws(20, 1.0)):
        assert torch.equal(pareto_smooth(undefined), undefined)


def test_tied_tails_do_not_crash():
    many = draws(40, 1.0).repeat_interleave(8)
    assert pareto_khat(many).isfinite()
    flat = torch.zeros(300).double()
    flat[:3] = 1.0
    assert pareto_khat(flat).isnan()
    flat[:40] = torch.linspace(1, 2, 40).double()
    assert pareto_khat(flat).isfinite()


@pytest.mark.parametrize("size", [1e-9, 0.3, 2.0, 40.0])
def test_kl_is_minus_the_mean_log_weight_normalised(size):
    logw = draws(400, size) + 0.1 * size
    got = float(kl(logw))
    centred = logw - logw.mean()
    want = float(centred.logsumexp(-1)) - math.log(400)
    if size < 1e-6:
        want = float((centred * centred).mean()) / 2  # to second order
    assert got == pytest.approx(want, rel=1e-6)
    assert float(kl(logw + 700.0)) == pytest.approx(got, rel=1e-4)
    assert float(kl(torch.zeros(7).double())) == 0
    times = torch.tensor([1, 3, 2])
    more = kl(logw[:3].repeat_interleave(times))
    torch.testing.assert_close(kl(logw[:3], times.double().log()), more, rtol=1e-9, atol=0)


def test_the_kl_is_the_enumerated_one():
    params, v, prompts = setting()
    batch = exact_batch(params, prompts)
    sweep = fp.sweep(cases.toy_score, params, v, [0.3], batch)
    out = fp.entropy_change(sweep, batch)
    w = sweep.change.logp[0].sum(-1)
    torch.testing.assert_close(out.kl[0], -w.mean(), rtol=1e-11, atol=0)  # E[w] is exactly 1


def test_the_mean_weights_z_by_hand():
    generator = torch.Generator().manual_seed(0)
    logw = 0.2 * torch.randn(2, 12, generator=generator).double() + 0.1
    group = torch.arange(12) // 3
    z = mean_weight_z(logw, group)
    for k in range(2):
        w = [math.exp(x) for x in logw[k].tolist()]
        mean = sum(w) / 12
        total = [sum(w[3 * g + j] - mean for j in range(3)) / 12 for g in range(4)]
        error = math.sqrt(4 / 3 * sum(x * x for x in total))
        assert float(z[k]) == pytest.approx((mean - 1) / error, rel=1e-11)
    torch.testing.assert_close(largest_share(logw), logw.softmax(-1).amax(-1), rtol=1e-12, atol=0)
    assert math.isnan(khat_limit(10)) and khat_limit(100) == 0.5 and khat_limit(10**6) == 0.7
