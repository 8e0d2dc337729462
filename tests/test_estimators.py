"""Every estimator against its definition in loops, in which rows may count more than once."""

import math
from types import SimpleNamespace

import cases
import pytest
import torch
from arrays import N, R, Readings, arrays, swept
from enumerated import ETAS, SEQUENCES, exact, exact_batch, log_probability, setting

import funcprobe as fp
from funcprobe.statistics.doubts import doubts

WEIGHTS = ["sequence", "prefix", "prefix_raw", "none"]
PER = ["token", "sequence"]


def defined(base, change, rows, weights, per, times, control=None):
    """The change as the difference of two weighted means, row i counted `times[i]` times."""
    out = []
    for moved in (False, True):
        top = bottom = 0.0
        seen = [sum(times)] * R
        if moved and weights == "prefix":
            seen = [
                sum(times[i] * math.exp(float(change.logp[i, :k].sum())) for i in range(N))
                for k in range(R)
            ]
        for i in range(N):
            for k in range(R):
                if not rows.response[i, k]:
                    continue
                until = {"sequence": R, "none": 0}.get(weights, k)
                w = math.exp(float(change.logp[i, :until].sum())) if moved else 1.0
                w *= times[i] * sum(times) / seen[k]
                x = float(base.entropy[i, k]) + (float(change.entropy[i, k]) if moved else 0.0)
                top, bottom = top + w * x, bottom + w
                if control is not None and moved:
                    top -= w * float(control[i, k]) * math.expm1(float(change.logp[i, k]))
        if per == "sequence":
            bottom = sum(times)
            if moved and weights == "sequence":
                bottom = sum(
                    t * math.exp(float(row.sum()))
                    for t, row in zip(times, change.logp, strict=True)
                )
        out.append(top / bottom)
    return out[1] - out[0]


def closed_form(terms, rows, weights, per):
    """Slope and curvature by the hand formulas."""
    base, d1, d2 = terms
    a, total = rows.response.double(), float(rows.response.sum())
    ratio = base.entropy.sum() / (total if per == "token" else 1.0)
    size = total if per == "token" else N
    if weights in ("prefix", "prefix_raw"):
        h = base.entropy - (ratio if per == "token" else 0.0)
        c, m2 = (x.cumsum(1) - x for x in (d1.logp, d2.logp))
        m2 = m2 + c * c
        r1, r2 = c, m2
        if weights == "prefix":
            r1 = c - c.mean(0)
            r2 = m2 - m2.mean(0) - 2 * c.mean(0) * r1
        slope = (a * (d1.entropy + r1 * h)).sum() / size
        turn = 2 * slope * (a * r1).sum() if per == "token" else 0.0
        second = (a * (d2.entropy + 2 * r1 * d1.entropy + r2 * h)).sum() - turn
        return torch.stack([slope, second / size])
    t = a.sum(1) if per == "token" else torch.ones(N).double()
    h = base.entropy.sum(1) - base.entropy.sum() / t.sum() * t
    s, ds = (x.logp.sum(1) * (weights != "none") for x in (d1, d2))
    dh, d2h = d1.entropy.sum(1), d2.entropy.sum(1)
    slope = (dh + h * s).sum() / size
    second = (d2h + 2 * s * dh + h * (s * s + ds) - 2 * slope * t * s).sum() / size
    return torch.stack([slope, second])


def a_control():
    return torch.rand(N, R, generator=torch.Generator().manual_seed(9)).double()


CASES = [(w, p, c) for w in WEIGHTS for p in PER for c in (False, True) if "prefix" in w or not c]


@pytest.mark.parametrize(("weights", "per", "controlled"), CASES)
@pytest.mark.parametrize("eta", [0.1, 1.0, -2.0])
def test_value_and_influence_are_the_definitions(weights, per, controlled, eta):
    terms, rows = arrays()
    control = a_control() if controlled else None
    sweep = swept(terms, [eta])
    alone = SimpleNamespace(response=rows.response, group=torch.arange(N))
    got = fp.entropy_change(sweep, alone, weights=weights, per=per, control=control)
    change = fp.Scores(sweep.change.logp[0], sweep.change.entropy[0])

    def at(times):
        return defined(terms[0], change, rows, weights, per, times, control)

    assert float(got.value[0]) == pytest.approx(at([1.0] * N), rel=1e-11, abs=1e-13)
    h = 1e-5
    for i in range(N):
        up, down = ([1.0 + s * h * (j == i) for j in range(N)] for s in (1, -1))
        influence = (at(up) - at(down)) / (2 * h)
        assert float(got.psi[0, i]) == pytest.approx(influence, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_slope_and_curvature_are_the_closed_forms(weights, per):
    terms, rows = arrays()
    got = fp.entropy_series(terms, rows, weights=weights, per=per)
    want = closed_form(terms, rows, weights, per)
    torch.testing.assert_close(got.value, want, rtol=1e-11, atol=1e-12)
    assert (got.per, got.weights, got.quantity) == (per, weights, "entropy")


@pytest.mark.parametrize(("weights", "per", "controlled"), CASES)
def test_the_series_is_the_limit_of_the_change(weights, per, controlled):
    terms, rows = arrays()
    options = dict(weights=weights, per=per, control=a_control() if controlled else None)
    law = fp.entropy_series(terms, rows, **options)
    tiny = fp.entropy_change(swept(terms, [1e-10]), rows, **options)
    torch.testing.assert_close(tiny.value / 1e-10, law.value[:1], rtol=1e-8, atol=0)
    torch.testing.assert_close(tiny.psi / 1e-10, law.psi[:1], rtol=1e-7, atol=1e-10)
    etas = torch.tensor([4e-3, 2e-3]).double()
    left = fp.entropy_change(swept(terms, etas), rows, **options).value - law.predict(etas)
    if weights == "none":  # the scores are quadratic in eta, and a mean is linear in them
        assert left.abs().max() < 1e-17
    else:
        assert 7 < float(left[0] / left[1]) < 9


# The gradient in the scores


@pytest.mark.parametrize(("weights", "per", "controlled"), CASES)
def test_the_slope_is_the_covector_on_any_perturbation(weights, per, controlled):
    terms, rows = arrays()
    options = dict(weights=weights, per=per, control=a_control() if controlled else None)
    cot = fp.entropy_covector(terms[0], rows, **options)
    assert isinstance(cot, fp.Scores) and (cot.logp[~rows.response] == 0).all()
    for seed in range(3):
        (_, d, _), _ = arrays(seed=seed + 5)
        slope = fp.entropy_series((terms[0], d), rows, **options).value[0]
        inner = sum((a * b).sum() for a, b in zip(cot, d, strict=True))
        torch.testing.assert_close(inner, slope, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("per", PER)
def test_the_covector_is_the_surrogates_coefficients(per):
    (base, *_), rows = arrays()
    a, total = rows.response.double(), float(rows.response.sum())
    size = total if per == "token" else N
    ratio = base.entropy.sum() / total if per == "token" else 0.0
    cot = fp.entropy_covector(base, rows, weights="prefix", per=per)
    torch.testing.assert_close(cot.entropy, a / size, rtol=1e-13, atol=0)
    u = a * (base.entropy - ratio)
    later = u.flip(1).cumsum(1).flip(1) - u
    # cbar runs over all rows: the mean of a later sum counts ended rows, whose own is 0.
    torch.testing.assert_close(cot.logp, a * (later - _bar(u)) / size, rtol=1e-11, atol=1e-13)
    t = a.sum(1) if per == "token" else torch.ones(N).double()
    h = base.entropy.sum(1) - base.entropy.sum() / t.sum() * t
    cot = fp.entropy_covector(base, rows, per=per)
    torch.testing.assert_close(cot.logp, a * h[:, None] / size, rtol=1e-12, atol=1e-14)


def _bar(u):
    """The mean over all rows of the sum over later positions."""
    return (u.flip(1).cumsum(1).flip(1) - u).mean(0)


def test_the_covector_keeps_dtype_and_type():
    (base, *_), rows = arrays()
    low = Readings(base.logp.float(), base.entropy.float())
    cot = fp.entropy_covector(low, rows)
    assert isinstance(cot, Readings) and cot.value.dtype == torch.float32
    high = fp.entropy_covector(base, rows)
    torch.testing.assert_close(cot.logp, high.logp.float(), rtol=1e-5, atol=1e-7)


# The truth, by enumeration


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", ["sequence", "prefix", "prefix_raw"])
def test_every_estimator_gives_the_exact_change(weights, per):
    params, v, prompts = setting()
    batch = exact_batch(params, prompts)
    sweep = fp.sweep(cases.toy_score, params, v, ETAS, batch)
    control = torch.where(batch.response, sweep.base.entropy * 2, 0.0)  # of the prefix alone
    truth = exact(params, prompts, per)
    for b in (None, control) if weights != "sequence" else (None,):
        out = fp.entropy_change(sweep, batch, weights=weights, per=per, control=b)
        for k, eta in enumerate(ETAS):
            change = exact(fp.shift(params, v, eta), prompts, per) - truth
            torch.testing.assert_close(float(out.value[k]), change, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", ["prefix", "prefix_raw"])
def test_both_orders_are_the_truths(weights, per):
    params, v, prompts = setting()
    batch = exact_batch(params, prompts)
    terms = fp.taylor(cases.toy_score, params, v, batch, order=2)
    got = fp.entropy_series(terms, batch, weights=weights, per=per).value

    def at(h):
        return exact(fp.shift(params, v, h), prompts, per)

    def first(h):
        return (at(h) - at(-h)) / (2 * h)

    def second(h):
        return (at(h) - 2 * at(0.0) + at(-h)) / h**2

    truth = [(4 * first(1e-3) - first(2e-3)) / 3, (4 * second(1e-2) - second(2e-2)) / 3]
    torch.testing.assert_close(float(got[0]), truth[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(float(got[1]), truth[1], rtol=1e-6, atol=1e-7)


def expected_reward(params, prompts, reward):
    return sum(
        math.exp(log_probability(params, p, s)) * reward[j]
        for p in prompts
        for j, s in enumerate(SEQUENCES)
    ) / len(prompts)


@pytest.mark.parametrize("where", [0, 3])
def test_a_reward_is_a_value_in_one_position(where):
    params, v, prompts = setting()
    batch = exact_batch(params, prompts)
    generator = torch.Generator().manual_seed(2)
    reward = torch.rand(len(SEQUENCES), generator=generator).double().tolist()
    ids = {tuple(s): j for j, s in enumerate(SEQUENCES)}
    rewards = [
        reward[ids[tuple(row[1:][keep].tolist())]]
        for row, keep in zip(batch.tokens, batch.response, strict=True)
    ]
    sweep = fp.sweep(cases.toy_score, params, v, ETAS, batch)
    at = batch.response.sum(1).clamp(max=where + 1) - 1
    value = torch.zeros_like(sweep.base.logp).scatter(
        1, at[:, None], torch.tensor(rewards).double()[:, None]
    )
    read = sweep._replace(
        base=Readings(sweep.base.logp, value),
        change=Readings(sweep.change.logp, torch.zeros_like(sweep.change.logp)),
    )
    out = fp.entropy_change(read, batch, per="sequence")
    truth = expected_reward(params, prompts, reward)
    assert float(out.base) == pytest.approx(truth, rel=1e-12)
    for k, eta in enumerate(ETAS):
        change = expected_reward(fp.shift(params, v, eta), prompts, reward) - truth
        assert float(out.value[k]) == pytest.approx(change, rel=1e-11, abs=1e-12)
    assert abs(float(out.value[-1])) > 1e-2
    assert out.quantity == "value" and str(out).startswith("d value = ")
    assert "nats" not in str(out) and " per sequence at eta" in str(out)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", ["sequence", "prefix"])
def test_rows_of_another_policy_give_the_scored_ones_truth(weights, per):
    """Rows in exact proportion to one policy, scored under a second, swept from there."""
    behaviour, v, prompts = setting()
    batch = exact_batch(behaviour, prompts)
    params = fp.shift(behaviour, cases.direction(behaviour, seed=41), 0.6)
    old = cases.toy_score(behaviour, batch).logp
    sweep = fp.sweep(cases.toy_score, params, v, ETAS, batch)
    truth = exact(params, prompts, per)
    plain = fp.entropy_change(sweep, batch, weights=weights, per=per)
    assert abs(float(plain.base) - truth) > 1e-3 and not plain.off_policy
    out = fp.entropy_change(sweep, batch, weights=weights, per=per, behaviour=old)
    assert float(out.base) == pytest.approx(truth, rel=1e-12) and out.off_policy
    for k, eta in enumerate(ETAS):
        change = exact(fp.shift(params, v, eta), prompts, per) - truth
        assert float(out.value[k]) == pytest.approx(change, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(out.mean_weight, torch.ones(len(ETAS)).double(), rtol=1e-12, atol=0)
    assert out.ess[0] < len(batch.group) - 1
    series = fp.entropy_series(
        fp.taylor(cases.toy_score, params, v, batch), batch, weights=weights, per=per, behaviour=old
    )
    h = 1e-4
    up, down = (exact(fp.shift(params, v, s), prompts, per) for s in (h, -h))
    assert float(series.value[0]) == pytest.approx((up - down) / (2 * h), rel=1e-6)
    cot = fp.entropy_covector(sweep.base, batch, weights=weights, per=per, behaviour=old)
    d = fp.taylor(cases.toy_score, params, v, batch)[1]
    inner = sum((a * b).sum() for a, b in zip(cot, d, strict=True))
    torch.testing.assert_close(inner, series.value[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_base_weight_of_two_is_the_row_twice(weights, per):
    terms, rows = arrays()
    times = torch.tensor([1, 2, 1, 3, 1, 1, 2, 1, 1])
    old = terms[0].logp.clone()
    old[:, 0] -= times.double().log()
    index = torch.arange(N).repeat_interleave(times)
    sweep = swept(terms, [0.0, 0.7, -2.0])
    more = SimpleNamespace(response=rows.response[index], group=rows.group[index])
    twice = SimpleNamespace(
        etas=sweep.etas,
        base=fp.Scores(*(x[index] for x in sweep.base)),
        change=fp.Scores(*(x[:, index] for x in sweep.change)),
    )
    a = fp.entropy_change(sweep, rows, weights=weights, per=per, behaviour=old)
    b = fp.entropy_change(twice, more, weights=weights, per=per)
    for name in ("base", "value", "psi", "base_psi", "kl"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-11, atol=1e-13)


def test_unknown_behaviour_is_refused():
    terms, rows = arrays()
    old = terms[0].logp.clone()
    old[2, 0] = torch.nan
    with pytest.raises(ValueError, match="1 rows have unknown ones"):
        fp.entropy_change(swept(terms, [0.1]), rows, behaviour=old)


# Clipping, smoothing, other quantities


@pytest.mark.parametrize("per", PER)
def test_clipping_is_the_clipped_weights_ratio_and_says_how_much(per):
    terms, rows = arrays()
    sweep = swept(terms, [0.0, 1.0, 3.0])
    out = fp.entropy_change(sweep, rows, per=per, clip=1.5)
    free = fp.entropy_change(sweep, rows, per=per)
    t = rows.response.sum(1).double() if per == "token" else torch.ones(N).double()
    for k in range(3):
        w = sweep.change.logp[k].sum(1).exp()
        cut = w.clamp(max=1.5)
        h = (terms[0].entropy + sweep.change.entropy[k]).sum(1)
        want = (cut * h).sum() / (cut * t).sum() - terms[0].entropy.sum() / t.sum()
        torch.testing.assert_close(out.value[k], want, rtol=1e-11, atol=1e-12)
        assert out.clipped[k] == (w > 1.5).double().mean()
    assert out.clipped[2] > 0 and (free.clipped == 0).all() and (free.adjusted == 0).all()
    torch.testing.assert_close(out.adjusted, out.value - free.value, rtol=1e-12, atol=1e-15)
    assert any("clipped" in doubt for doubt in doubts(out))


def test_smoothing_uses_the_smoothed_weights():
    generator = torch.Generator().manual_seed(0)
    n = 100
    logp, h, dh = torch.randn(3, n, 1, generator=generator).double()
    rows = SimpleNamespace(response=torch.ones(n, 1, dtype=torch.bool), group=torch.arange(n))
    sweep = SimpleNamespace(
        etas=torch.tensor([1.0]),
        base=fp.Scores(logp, h),
        change=fp.Scores(2 * logp[None], dh[None]),
    )
    out = fp.entropy_change(sweep, rows, smooth=True)
    w = fp.pareto_smooth(2 * logp[:, 0]).softmax(-1)
    want = (w * (h + dh)[:, 0]).sum() - h.mean()
    torch.testing.assert_close(out.value[0], want, rtol=1e-11, atol=1e-12)
    free = fp.entropy_change(sweep, rows)
    assert out.adjusted[0] == out.value[0] - free.value[0] != 0


@pytest.mark.parametrize("options", [dict(clip=1.5), dict(smooth=True)])
def test_clipping_and_smoothing_act_on_the_product_with_base_weights(options):
    generator = torch.Generator().manual_seed(1)
    n = 100
    logp, h, dh, logw, logb = torch.randn(5, n, 1, generator=generator).double()
    rows = SimpleNamespace(response=torch.ones(n, 1, dtype=torch.bool), group=torch.arange(n))
    sweep = SimpleNamespace(
        etas=torch.tensor([1.0]),
        base=fp.Scores(logp, h),
        change=fp.Scores(2 * logw[None], dh[None]),
    )
    logb = logb - logb.max()  # the largest base weight is the unit of clip
    out = fp.entropy_change(sweep, rows, behaviour=logp - logb, **options)
    product = 2 * logw + logb
    product = (
        fp.pareto_smooth(product[:, 0])
        if "smooth" in options
        else product[:, 0].clamp(max=math.log(1.5))
    )
    w, b = product.softmax(-1), logb[:, 0].softmax(-1)
    want = (w * (h + dh)[:, 0]).sum() - (b * h[:, 0]).sum()
    torch.testing.assert_close(out.value[0], want, rtol=1e-10, atol=1e-12)
    assert out.adjusted[0] != 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(clip=2.0, weights="prefix"), "act on sequence weights"),
        (dict(smooth=True, weights="none"), "act on sequence weights"),
        (dict(clip=2.0, smooth=True), "one of the two"),
        (dict(clip=-1.0), "one of the two"),
        (dict(clip=0.0), "one of the two"),
        (dict(control=torch.zeros(N, R)), "belongs to prefix weights"),
        (dict(weights="tokens"), "weights must be one of sequence, prefix, prefix_raw, none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, complaint):
    terms, rows = arrays()
    with pytest.raises(ValueError, match=complaint):
        fp.entropy_change(swept(terms, [0.1]), rows, **options)


def test_without_weights_it_is_the_mean_of_the_set():
    terms, rows = arrays()
    sweep = swept(terms, [0.5])
    read = SimpleNamespace(
        etas=sweep.etas,
        base=Readings(terms[0].logp, terms[0].logp),
        change=Readings(sweep.change.logp, sweep.change.logp),
    )
    out = fp.entropy_change(read, rows, weights="none", per="sequence")
    torch.testing.assert_close(out.value[0], sweep.change.logp[0].sum() / N, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.ess[0], torch.tensor(float(N)).double())
    assert out.kl[0] == 0 and out.khat.isnan().all()


def test_entropy_and_value_are_one_code():
    terms, rows = arrays()
    a = fp.entropy_change(swept(terms, [0.5]), rows)
    read = swept(terms, [0.5])
    read.base, read.change = Readings(*read.base), Readings(*read.change)
    b = fp.entropy_change(read, rows)
    assert torch.equal(a.value, b.value) and torch.equal(a.psi, b.psi)
    series = fp.entropy_series([Readings(*t) for t in terms], rows)
    assert torch.equal(series.value, fp.entropy_series(terms, rows).value)
    assert series.quantity == "value" and str(series).startswith("d^1value/d eta^1")
    with pytest.raises(ValueError, match="entropy or value were expected, not SimpleNamespace"):
        fp.entropy_covector(SimpleNamespace(logp=terms[0].logp), rows)
