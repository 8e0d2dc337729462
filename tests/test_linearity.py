"""The verdict on the line, its band, and what goes with it."""

import math
from types import SimpleNamespace

import pytest
import torch
from arrays import N, arrays, swept

import funcprobe as fp
from funcprobe.statistics.doubts import another_policy, doubts
from funcprobe.statistics.estimators import Estimator
from funcprobe.statistics.results import Diagnostics
from funcprobe.statistics.uncertainty import by_group, standard_error


def law(
    etas,
    curve,
    *,
    noise=1e-3,
    shared=0.2,
    prompts=40,
    khat=0.3,
    ess=0.8,
    skew=0.1,
    rows=400,
    seed=0,
):
    """A change ``eta (1 + curve(eta))`` and its line, with noise that both share and some alone."""
    generator = torch.Generator().manual_seed(seed)
    etas = torch.tensor(etas, dtype=torch.float64)
    common, alone = torch.randn(2, prompts, generator=generator).double()
    common, alone = ((x - x.mean()) / prompts for x in (common, alone))
    k = len(etas)
    value = etas * (1 + torch.tensor([curve(float(e)) for e in etas], dtype=torch.float64))
    psi = etas[:, None] * (shared * common + noise * etas.abs()[:, None] * alone * prompts**0.5)
    diagnostics = Diagnostics(
        ess=torch.full((k,), ess * rows), khat=torch.as_tensor(khat).expand(k).double(),
        skew=torch.as_tensor(skew).expand(k).double(),
        mean_weight=torch.ones(k), weight_range=torch.ones(k, 2), mean_weight_z=torch.zeros(k),
        spread=torch.full((k,), 0.1), largest_share=torch.ones(k) / rows, kl=torch.zeros(k),
        clipped=torch.zeros(k), adjusted=torch.zeros(k),
    )  # fmt: skip
    base = torch.tensor(1.0).double()
    change = fp.Estimate(etas, base, value, psi, common, diagnostics, rows)
    series = fp.Series(torch.ones(1).double(), shared * common[None])
    return change, series


def test_a_line_that_bends_holds_then_fails():
    etas = [0.0, 0.5, 1.0, 2.0, 4.0]
    got = fp.linearity(*law(etas, lambda e: 0.05 * e))
    assert got.excluded[0] == "eta = 0" and not any(got.excluded[1:])
    assert got.verdicts[1:3] == ("holds", "holds") and got.verdicts[4] == "fails"
    assert got.eta_max == (1.0, 4.0) and got.verdict == "fails"
    torch.testing.assert_close(got.ratio[1:], 0.05 * got.etas[1:], rtol=1e-12, atol=1e-14)
    assert got.low[0].isnan() and (got.low[1:] < got.ratio[1:]).all()
    half = fp.band(got.psi[1:])
    torch.testing.assert_close(got.high[1:] - got.ratio[1:], half, rtol=1e-12, atol=0)
    text = str(got)
    assert text == (
        "The line is within 10% up to |eta| = 1, surely off it from 4 (95% band over 4 points)."
    )
    wide = fp.linearity(*law(etas, lambda e: 0.05 * e), tolerance=0.25)
    assert wide.verdict == "holds" and wide.eta_max == (4.0, math.inf)
    assert "within 25% up to |eta| = 4 (" in str(wide)


def test_noise_makes_it_inconclusive():
    got = fp.linearity(*law([1.0, 2.0], lambda e: 0.05 * e, noise=0.5))
    assert got.verdict == "inconclusive" and got.eta_max == (0.0, math.inf)
    assert set(got.verdicts) == {"inconclusive"}
    assert "nowhere for sure: inconclusive" in str(got)
    none = fp.linearity(*law([1.0, 2.0], lambda e: 0.5 * e, noise=0.02))
    assert none.verdict == "fails" and none.eta_max == (0.0, 1.0)


def test_shared_noise_cancels_from_the_band():
    noisy, quiet = (fp.linearity(*law([1.0], lambda e: 0.02, shared=s)) for s in (0.5, 0.2))
    change, series = law([1.0], lambda e: 0.0, shared=0.5)
    assert float(noisy.stderr[0]) < 0.1 * float(change.stderr[0])
    assert float(noisy.stderr[0]) < 2 * float(quiet.stderr[0])
    joint = fp.ratio(change, series)
    assert float(joint.stderr[0]) < float(change.stderr[0]) / 10


def test_points_not_to_be_trusted_are_left_out_with_the_reason():
    change, series = law(
        [0.0, 0.1, 1.0, 2.0, 4.0], lambda e: 0.05 * e, khat=[math.nan, 0.1, 0.2, 0.3, 0.9]
    )
    got = fp.linearity(change, series, floor=0.5)
    limit = 1 - 1 / math.log10(400)
    assert got.excluded == (
        "eta = 0",
        "below the noise floor 0.5",
        "",
        "",
        f"k-hat above {limit:.2f}",
    )
    assert got.verdicts[1] == got.verdicts[4] == "inconclusive"
    assert got.eta_max == (1.0, math.inf) and got.low[4].isnan()
    assert "Left out: 0.1 (below the noise floor 0.5); 4 (k-hat above 0.62)." in str(got)
    assert str(got).startswith(got.describe(excluded=False) + " Left out: ")
    assert "Left out" not in got.describe(0.1, " lr", excluded=False)
    # Fewer points, a narrower band.
    free = fp.linearity(*law([1.0, 2.0], lambda e: 0.05 * e))
    torch.testing.assert_close(got.low[2:4], free.low, rtol=1e-12, atol=1e-14)


def test_a_slope_within_its_error_decides_nothing():
    change, series = law([1.0, 2.0], lambda e: 0.0, shared=4.0)
    assert float(series.stderr[0]) > 0.5
    got = fp.linearity(change, series)
    assert got.verdict == "inconclusive" and got.eta_max == (0.0, math.inf)
    assert set(got.excluded) == {"the slope is within its error of 0: more prompts are needed"}
    many = fp.linearity(*law([1.0, 2.0, 3.0, 4.0], lambda e: 0.0, shared=4.0))
    assert "Left out: 1 to 4 (the slope is" in str(many)
    lone = law([1.0], lambda e: 0.0, prompts=1)
    assert fp.linearity(*lone).excluded == ("one prompt has no error",)


def test_with_few_prompts_the_slope_is_held_to_students_quantile():
    change, series = law([1.0], lambda e: 0.0, prompts=3)
    error = float(series.stderr[0])  # Student's quantile is 4.30 with three prompts
    clear, unclear = (series._replace(value=torch.tensor([t * error])) for t in (4.4, 4.2))
    assert fp.linearity(change, clear).excluded == ("",)
    assert "within its error of 0" in fp.linearity(change, unclear).excluded[0]


def test_both_signs_must_hold():
    etas = [-4.0, -1.0, 1.0, 2.0, 4.0]
    got = fp.linearity(*law(etas, lambda e: 0.0 if e > 0 else -0.04 * e))
    assert got.eta_max == (1.0, 4.0)
    mirrored = fp.linearity(*law(etas, lambda e: 0.0 if e < 0 else 0.04 * e))
    assert mirrored.eta_max == (2.0, 4.0)
    assert mirrored.verdicts == ("holds", "holds", "holds", "holds", "fails")


def test_a_point_beyond_a_gap_is_not_reached():
    etas, bent = [4.0, 1.0, 2.0, 3.0], lambda eta: 0.5 if eta == 2 else 0.0
    got = fp.linearity(*law(etas, bent))
    assert got.verdicts == ("holds", "holds", "fails", "holds")
    assert got.eta_max == (1.0, 2.0)
    # A point that is left out is no gap.
    without = fp.linearity(*law(etas, bent, khat=[0.1, 0.1, 0.9, 0.1]))
    assert without.excluded[2].startswith("k-hat") and without.eta_max == (4.0, math.inf)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("weights", ["sequence", "prefix"])
def test_the_ratios_influence_is_its_derivative_in_the_rows_weight(weights, per):
    """Rows weighted through their base weights, estimator and slope alike."""
    terms, rows = arrays()
    rows.group = torch.arange(N)
    sweep = swept(terms, [0.5, -1.0])
    options = dict(weights=weights, per=per)

    def at(i, h):
        old = terms[0].logp.clone()
        old[i, 0] -= math.log1p(h)
        change = fp.entropy_change(sweep, rows, behaviour=old, **options)
        return fp.ratio(change, fp.entropy_series(terms, rows, behaviour=old, **options))

    psi = at(0, 0.0).psi
    for i in range(N):
        influence = (at(i, 1e-5).value - at(i, -1e-5).value) / 2e-5
        torch.testing.assert_close(psi[:, i], influence, rtol=1e-6, atol=1e-8)


def test_units_and_batches_are_not_mixed():
    terms, rows = arrays()
    change = fp.entropy_change(swept(terms, [0.5]), rows)
    for options, complaint in (
        (dict(per="sequence"), r"differ in per \('token' and 'sequence'\). Pass the same per= to"),
        (dict(weights="prefix"), r"differ in weights \('sequence' and 'prefix'\)"),
        (dict(behaviour=terms[0].logp), r"differ in behaviour \(given for one of them only\)"),
    ):
        series = fp.entropy_series(terms, rows, **options)
        with pytest.raises(ValueError, match=complaint):
            fp.ratio(change, series)
        with pytest.raises(ValueError, match=complaint):
            fp.linearity(change, series)
    series = fp.entropy_series(terms, rows)
    with pytest.raises(ValueError, match="of the entropy, the series of the value"):
        fp.ratio(change, series._replace(quantity="value"))
    alone = SimpleNamespace(response=rows.response, group=torch.arange(N))
    with pytest.raises(ValueError, match="the change has 3 and the series 9"):
        fp.ratio(change, fp.entropy_series(terms, alone))
    with pytest.raises(ValueError, match="positive tolerance and a level"):
        fp.linearity(change, series, tolerance=0.0)


def test_a_change_and_a_series_are_of_one_behaviour_and_one_control():
    terms, rows = arrays()
    sweep, old = swept(terms, [0.5]), terms[0].logp - 0.1
    control = torch.ones_like(old)

    def ratio(first, second):
        change = fp.entropy_change(sweep, rows, **first)
        return fp.ratio(change, fp.entropy_series(terms, rows, **second))

    with pytest.raises(ValueError, match=r"behaviour \(given for one of them only\)"):
        ratio(dict(behaviour=old), dict())
    with pytest.raises(ValueError, match=r"differ in behaviour \(other numbers\)"):
        ratio(dict(behaviour=old), dict(behaviour=old - 0.1))
    with pytest.raises(ValueError, match=r"differ in control \(given for one of them only\)"):
        ratio(dict(weights="prefix", control=control), dict(weights="prefix"))
    with pytest.raises(ValueError, match=r"weights .* behaviour .* same weights= and behaviour="):
        ratio(dict(weights="prefix", behaviour=old), dict())
    # Equal numbers are one behaviour, in a wider tensor and with nan off the responses too.
    old = torch.where(rows.response, old, torch.nan)
    wider = torch.nn.functional.pad(old, (0, 2), value=7.0)
    same = ratio(dict(behaviour=old), dict(behaviour=wider))
    assert torch.equal(same.value, ratio(dict(behaviour=old), dict(behaviour=old.clone())).value)


# Orders


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_odd_and_even_parts_are_slope_and_curvature(per):
    terms, rows = arrays()
    series = fp.entropy_series(terms, rows, per=per)
    errors = []
    for eta in (2e-2, 1e-2):
        change = fp.entropy_change(swept(terms, [eta, 0.0, -eta, 0.7]), rows, per=per)
        parts = fp.odd_even(change)
        assert parts.etas.tolist() == [eta]
        errors.append(
            [float(parts.slope[0] - series.value[0]), float(parts.curvature[0] - series.value[1])]
        )
        torch.testing.assert_close(parts.slope_psi[0], series.psi[0], rtol=0.05, atol=2e-3)
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine == pytest.approx(4, rel=0.05)
    change = fp.entropy_change(swept(terms, [1e-3, -1e-3]), rows, per=per)
    parts = fp.odd_even(change)
    torch.testing.assert_close(parts.slope_stderr[0], series.stderr[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(parts.curvature_stderr[0], series.stderr[1], rtol=1e-3, atol=0)
    assert str(parts).startswith("slope ") and " from +-0.001" in str(parts)
    with pytest.raises(ValueError, match="both signs were expected"):
        fp.odd_even(fp.entropy_change(swept(terms, [0.1, 0.2]), rows, per=per))


def test_the_curvature_takes_over_where_its_share_is_the_slopes():
    terms, rows = arrays()
    series = fp.entropy_series(terms, rows)
    eta, error = fp.takeover(series)
    assert abs(eta * float(series.value[0])) == pytest.approx(
        abs(eta**2 / 2 * float(series.value[1]))
    )

    def at(i, h):
        """With row i weighted by 1 + h."""
        old = terms[0].logp.clone()
        old[i, 0] -= math.log1p(h)
        return fp.takeover(fp.entropy_series(terms, alone, behaviour=old))[0]

    alone = SimpleNamespace(response=rows.response, group=torch.arange(N))
    influence = torch.tensor([(at(i, 1e-5) - at(i, -1e-5)) / 2e-5 for i in range(N)]).double()
    spread = standard_error(by_group(influence, rows.group))
    assert error == pytest.approx(float(spread), rel=1e-6)
    with pytest.raises(ValueError, match="second order was expected"):
        fp.takeover(fp.entropy_series(terms[:2], rows))


# Doubts


def test_rows_of_another_policy_are_found_by_their_mean_weight():
    change, _ = law([0.5, 1.0], lambda e: 0.0)
    z = torch.tensor([60.0, 6.0])
    diagnostics = change.diagnostics._replace(mean_weight_z=z, spread=torch.tensor([0.01, 0.09]))
    off = change._replace(diagnostics=diagnostics)
    df = change.psi.shape[-1] - 1
    assert f"(t = +6.0, df = {df}, p = " in another_policy(off)
    weighted = off._replace(estimator=Estimator(behaviour=torch.zeros(1)))
    assert "recorded log-probabilities are not those" in another_policy(weighted)
    for quiet in (dict(spread=torch.tensor([2.0, 2.0])), dict(mean_weight_z=z / 100)):
        assert another_policy(change._replace(diagnostics=diagnostics._replace(**quiet))) == ""
    # With two prompts a t of 125 is seen in one of 200 correct batches, and 6 in one of ten.
    assert another_policy(off._replace(psi=off.psi[:, :2])) == ""
    assert another_policy(change) == "" and doubts(change) == []
