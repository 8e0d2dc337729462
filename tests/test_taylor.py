"""Derivatives along v: against differences, and the limit of the swept estimator to rounding."""

import cases
import pytest
import reference
import torch

import funcprobe as fp


def setting(family="llama", **sampling):
    case = cases.case(family)
    score = fp.scorer(case.model, case.base, sampling=fp.Sampling(**sampling))
    return score, case.params, cases.direction(case.params)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_the_derivative_is_the_limit_of_central_differences(family):
    score, params, v = setting(family)
    batch = cases.batch()
    value, slope = fp.taylor(score, params, v, batch)
    for a, b in zip(value, fp.evaluate(score, params, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    steps = [2e-5, -2e-5, 4e-5, -4e-5]
    change = fp.sweep(score, params, v, steps, batch).change
    for ours, x in zip(slope, change, strict=True):
        near, far = (x[0] - x[1]) / 4e-5, (x[2] - x[3]) / 8e-5
        own = (4 * near - far) / 3  # Richardson: the error is of fourth order
        scale = float(own.abs().max())
        assert scale > 0.1
        torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_the_derivative_at_other_temperatures(temperature):
    score, params, v = setting(temperature=temperature)
    batch = cases.batch()
    _, slope = fp.taylor(score, params, v, batch)
    change = fp.sweep(score, params, v, [1e-5, -1e-5], batch).change
    for ours, x in zip(slope, change, strict=True):
        own = (x[0] - x[1]) / 2e-5
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6 * float(own.abs().max()))


def test_the_derivative_within_a_fixed_nucleus():
    case = cases.case()
    sampling = fp.Sampling(top_p=0.9)
    score = fp.scorer(case.model, case.base, sampling=sampling, support=case.params)
    logp = score(case.params, cases.batch()).logp
    kept = [i for i in cases.FULL if logp[i].isfinite().all()]
    assert kept
    batch = cases.batch(rows=kept)
    v = cases.direction(case.params)
    _, slope = fp.taylor(score, case.params, v, batch)
    change = fp.sweep(score, case.params, v, [1e-5, -1e-5], batch).change
    for ours, x in zip(slope, change, strict=True):
        assert ours.isfinite().all()
        own = (x[0] - x[1]) / 2e-5
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6 * float(own.abs().max()))


def test_rows_change_nothing():
    score, params, v = setting()
    batch = cases.batch()
    whole = fp.taylor(score, params, v, batch)
    for rows in (1, 3, 8):
        for a, b in zip(fp.taylor(score, params, v, batch, rows=rows), whole, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_forward_and_reverse_mode_agree():
    score, params, v = setting()
    batch = cases.batch()
    weight = torch.rand(2, *batch.response.shape, generator=torch.Generator().manual_seed(0))
    weight = weight.double()

    def scalar(params, batch):
        scores = score(params, batch)
        return weight[0] * scores.logp + weight[1] * scores.entropy

    _, slope = fp.taylor(scalar, params, v, batch, rows=8)
    grads = fp.gradient(scalar, params, batch, rows=8)
    torch.testing.assert_close(slope.sum(), fp.dot(grads, v), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_each_order_is_the_derivative_of_the_one_before(family):
    """Nested forward mode is silently wrong in some operations; no family may be."""
    score, params, v = setting(family)
    batch = cases.batch(rows=[0, 1, 4])
    orders = 3 if family in cases.SOME else 2
    terms = fp.taylor(score, params, v, batch, order=orders)
    assert len(terms) == orders + 1
    h = 2e-5

    def at(eta):
        return fp.taylor(score, fp.shift(params, v, eta), v, batch, order=orders - 1)

    there = {step: at(step * h) for step in (1, -1, 2, -2)}
    for m in range(1, orders + 1):
        for i, ours in enumerate(terms[m]):
            near, far = (
                (there[step][m - 1][i] - there[-step][m - 1][i]) / (2 * step * h) for step in (1, 2)
            )
            own = (4 * near - far) / 3
            scale = float(own.abs().max())
            assert scale > 0.1
            torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6 * scale)


def test_a_higher_order_keeps_the_lower_ones():
    score, params, v = setting()
    batch = cases.batch()
    for a, b in zip(
        fp.taylor(score, params, v, batch, order=3),
        fp.taylor(score, params, v, batch),
        strict=False,
    ):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_no_order_is_refused():
    score, params, v = setting()
    with pytest.raises(ValueError, match="taylor: order must be at least 1, not 0"):
        fp.taylor(score, params, v, cases.batch(), order=0)


# The slope is the derivative of the very estimator that is swept


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("family", cases.SOME)
def test_the_series_is_the_limit_of_the_change(family, per):
    score, params, v = setting(family)
    batch = cases.batch()
    series = fp.entropy_series(fp.taylor(score, params, v, batch), batch, per=per)
    errors = []
    for h in (1e-4, 1e-5):
        sweep = fp.sweep(score, params, v, [h, -h], batch)
        change = fp.entropy_change(sweep, batch, per=per).value
        errors.append(abs(float((change[0] - change[1]) / (2 * h) - series.value[0])))
    size = abs(float(series.value[0]))
    assert size > 1e-3
    assert errors[1] < 1e-4 * size + 1e-9  # of second order, and then rounding
    assert errors[1] < 0.02 * errors[0] + 1e-9


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_change_over_eta_tends_to_the_slope_to_rounding(per):
    """On scores that are exactly linear in eta nothing but the estimator is left."""
    score, params, v = setting()
    batch = cases.batch()
    terms = fp.taylor(score, params, v, batch)
    series = fp.entropy_series(terms, batch, per=per)
    previous = None
    for eta in (1e-4, 1e-6, 1e-8, 1e-10, 1e-12):
        change = fp.Scores(*((eta * x).unsqueeze(0) for x in terms[1]))
        sweep = fp.Sweep(torch.tensor([eta]).double(), terms[0], change, None, None)
        value = fp.entropy_change(sweep, batch, per=per)
        error = abs(float(value.value[0] / eta - series.value[0]) / float(series.value[0]))
        assert error < 1e3 * eta + 1e-13
        gap = (value.psi[0] / eta - series.psi[0]).abs().max() / series.psi[0].abs().max()
        assert gap < 1e3 * eta + 1e-12
        assert previous is None or error < previous + 1e-13
        previous = error


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_series_is_the_closed_form(per):
    score, params, v = setting()
    batch = cases.batch()
    base, derivative = fp.taylor(score, params, v, batch)
    series = fp.entropy_series((base, derivative), batch, per=per)
    value, phi = reference.slope(base, derivative, batch.response, per=per)
    torch.testing.assert_close(float(series.value[0]), value, rtol=1e-12, atol=1e-13)
    by_prompt = torch.stack([phi[batch.group == g].sum() for g in range(4)]) / len(phi)
    torch.testing.assert_close(series.psi[0], by_prompt, rtol=1e-11, atol=1e-13)
    own = reference.stderr(phi, batch.group)
    torch.testing.assert_close(float(series.stderr[0]), own, rtol=1e-11, atol=0)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_second_order_is_the_closed_form(per):
    """Hand formula: d2h + 2 S dh + (h - R T)(S^2 + dS) - 2 slope T S, summed over sum T."""
    batch = cases.batch()
    generator = torch.Generator().manual_seed(0)
    terms = [
        fp.Scores(*torch.rand(2, *batch.response.shape, generator=generator).double())
        for _ in range(3)
    ]
    series = fp.entropy_series(tuple(terms), batch, per=per)
    zero = torch.zeros(()).double()
    (_, h), (s, dh), (ds, d2h) = (
        [torch.where(batch.response, x, zero).sum(1) for x in term] for term in terms
    )
    t = batch.response.sum(1).double() if per == "token" else torch.ones(8).double()
    ratio = h.sum() / t.sum()
    slope = (dh + (h - ratio * t) * s).sum() / t.sum()
    second = d2h + 2 * s * dh + (h - ratio * t) * (s**2 + ds) - 2 * slope * t * s
    torch.testing.assert_close(
        series.value, torch.stack([slope, second.sum() / t.sum()]), rtol=1e-12, atol=1e-12
    )
    assert series.psi.shape == (2, 4)
    assert series.psi.sum(-1).abs().max() < 1e-12
    etas = torch.tensor([0.0, 0.1, -0.2]).double()
    expected = series.value[0] * etas + series.value[1] * etas**2 / 2
    torch.testing.assert_close(series.predict(etas), expected, rtol=1e-13, atol=1e-15)
    assert series.predict_stderr(etas)[0] == 0 and series.predict_stderr(etas).shape == (3,)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_series_is_the_expansion_of_the_change(per):
    """What is left beyond order M falls with the power M + 1 of eta."""
    score, params, v = setting()
    batch = cases.batch()
    series = fp.entropy_series(fp.taylor(score, params, v, batch, order=2), batch, per=per)
    etas = torch.tensor([2e-3, 1e-3]).double()
    change = fp.entropy_change(fp.sweep(score, params, v, etas, batch), batch, per=per)
    left = change.value - series.predict(etas)
    assert 6 < left[0] / left[1] < 10
    first = series._replace(value=series.value[:1], psi=series.psi[:1])
    left = change.value - first.predict(etas)
    assert 3.5 < left[0] / left[1] < 4.5


def test_an_operation_without_a_derivative_in_forward_mode_is_named():
    def fn(params, x):
        logp = params["a"].expand(4, 1, 3).log_softmax(-1)
        return x * torch.nn.functional.ctc_loss(logp, torch.tensor([[1]]), [4], [1])

    params = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match=r"taylor: .*forward mode.*_ctc_loss.*Write that.*sweep"):
        fp.taylor(fn, params, params, torch.ones(2))
