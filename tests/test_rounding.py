"""The measured rounding error against errors that are known, and in the report."""

import types

import pytest
import torch

import funcprobe as fp

N, R = 200, 5


def arrays(seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, R + 1, (N,), generator=generator)
    response = torch.arange(R) < length[:, None]
    batch = types.SimpleNamespace(response=response, group=torch.arange(N) // 4)

    def draw():
        return torch.randn(N, R, generator=generator).double() * response

    base = fp.Scores(draw(), draw().abs())
    terms = (base, fp.Scores(draw(), draw()))
    return batch, base, terms, generator


@pytest.mark.parametrize("weights", ["sequence", "prefix"])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_error_is_that_of_the_estimate_under_errors_of_the_scores(weights, per):
    """Noise of a known size on every score, drawn anew 400 times: the estimate's own spread."""
    batch, base, terms, generator = arrays()
    series = fp.entropy_series(terms, batch, weights=weights, per=per)
    eta, noise = 1e-6, 1e-9

    def draw():
        return fp.Scores(
            *(noise * torch.randn(N, R, generator=generator) * batch.response for _ in "le")
        )

    def estimate(off):
        change = fp.Scores(*(eta * t + e for t, e in zip(terms[1], off, strict=True)))
        sweep = types.SimpleNamespace(
            etas=torch.tensor([eta]), base=base, change=fp.Scores(*(c[None] for c in change))
        )
        return float(fp.entropy_change(sweep, batch, weights=weights, per=per).value[0])

    spread = torch.tensor([estimate(draw()) for _ in range(400)]).std()
    index = torch.arange(0, N, 2)
    sample = dict(index=index, batch=batch, series=series)
    errors = []
    for _ in range(50):
        off = fp.Scores(*(leaf[index] for leaf in draw()))
        at = fp.rounding(base, off, eta=eta, proportional=False, **sample)
        errors.append(at.error)
    assert torch.tensor(errors).mean() == pytest.approx(float(spread), rel=0.12)
    slope = abs(float(series.value[0]))
    assert at.floor == pytest.approx(at.error / (0.1 * slope), rel=1e-6)
    assert at.relative == pytest.approx(at.error / (eta * slope), rel=1e-6)


def test_an_error_that_all_rows_share_is_not_averaged_away():
    batch, base, terms, _ = arrays()
    series = fp.entropy_series(terms, batch)
    off = fp.Scores(torch.zeros(N, R), 1e-9 * batch.response)
    index = torch.arange(0, N, 4)
    off = fp.Scores(*(x[index] for x in off))
    at = fp.rounding(
        base, off, index=index, batch=batch, series=series, eta=1e-6, proportional=False
    )
    assert at.error == pytest.approx(1e-9, rel=0.2)  # of every token, and so of their mean


def test_increments_have_no_floor_unless_they_are_hopeless():
    batch, base, terms, _ = arrays()
    series = fp.entropy_series(terms, batch)
    small = fp.Scores(*(1e-6 * 1e-4 * t for t in terms[1]))
    sample = dict(index=torch.arange(N), batch=batch, series=series, eta=1e-6)
    good = fp.rounding(base, small, proportional=True, **sample)
    assert good.floor == 0 and good.relative < 0.05
    assert float(good.at([1e-12, 1e-3])[1] / good.at([1e-12, 1e-3])[0]) == pytest.approx(1e9)
    assert float(good.at([1e-6])[0]) == pytest.approx(good.error)
    large = fp.Scores(*(1e-6 * 30 * t for t in terms[1]))
    bad = fp.rounding(base, large, proportional=True, **sample)
    assert bad.floor == torch.inf
    constant = fp.rounding(base, small, proportional=False, **sample)
    assert constant.at([0.0, 1e-3]).tolist() == [0.0, constant.error]
    flat = series._replace(value=torch.zeros_like(series.value))
    drowned = fp.rounding(base, small, proportional=False, **sample | {"series": flat})
    assert drowned.floor == torch.inf
    assert drowned.at([1e-6, 1e-3]).tolist() == [drowned.error, drowned.error]


def test_errors_of_both_scores_may_cancel():
    """An error of the log-probabilities and one of the entropies, made to undo each other."""
    batch, base, terms, generator = arrays()
    series, slope = fp.entropy_series(terms, batch), fp.entropy_covector(base, batch)
    noise = 1e-9 * torch.randn(N, R, generator=generator).double() * batch.response
    undone = -slope.logp * noise / slope.entropy.where(batch.response, 1.0)
    sample = dict(index=torch.arange(N), batch=batch, series=series, eta=1e-6, proportional=False)
    both, one, other = (
        fp.rounding(base, fp.Scores(*off), **sample).error
        for off in ((noise, undone), (noise, 0 * noise), (0 * noise, undone))
    )
    assert one == pytest.approx(other) and one > 0 and both < 1e-12 * one


def test_what_cannot_be_measured_is_refused():
    batch, base, terms, _ = arrays()
    series = fp.entropy_series(terms, batch)
    for eta, n in ((0.0, 5), (1e-6, 1)):
        off = fp.Scores(*(x[:n] for x in terms[1]))
        sample = dict(index=torch.arange(n), batch=batch, series=series, eta=eta)
        with pytest.raises(ValueError, match="two or more rows"):
            fp.rounding(base, off, proportional=True, **sample)


def test_the_error_is_of_the_series_estimator_and_of_no_other():
    batch, base, terms, _ = arrays()
    off = fp.Scores(*(1e-10 * x for x in terms[1]))
    sample = dict(index=torch.arange(N), batch=batch, eta=1e-6, proportional=True)
    old = base.logp - 0.3 * base.entropy
    on, away = (fp.entropy_series(terms, batch, behaviour=b) for b in (None, old))
    known = fp.rounding(base, off, series=away, behaviour=old.clone(), **sample)
    assert fp.rounding(base, off, series=away, **sample) == known
    assert known.error != fp.rounding(base, off, series=on, **sample).error
    for series, other in ((on, old), (away, old + 1.0)):
        with pytest.raises(ValueError, match="rounding: the behaviour of the series was expected"):
            fp.rounding(base, off, series=series, behaviour=other, **sample)
    with pytest.raises(ValueError, match="scores are of the entropy, the series of the value"):
        fp.rounding(base, off, series=on._replace(quantity="value"), **sample)


def test_the_probe_measures_what_float32_loses(checkpoint, update, evaluation):
    """Differences of float32 values: the floor is where they really go wrong."""
    narrow = fp.load_checkpoint(checkpoint.path, dtype=torch.float32)
    rows = evaluation.rows(slice(0, 64))
    etas = [1e-9, 1e-7, 1e-6, 1e-5, 1e-3]
    same = dict(max_length=24)
    direct = fp.probe(narrow, update, rows, etas, change="direct", **same)
    exact = fp.probe(narrow, update, rows, etas, **same)
    coarse = fp.probe(narrow, update, rows, etas, matmul="bfloat16", **same)
    off = (direct.change.value / exact.change.value - 1).abs()
    floor = direct.rounding.floor
    assert off[-1] < 0.1 and off[0] > 1
    assert 1e-8 < floor < 1e-4
    assert (off[direct.change.etas > 10 * floor] < 0.1).all()
    assert (off[direct.change.etas < 0.01 * floor] > 0.1).all()
    assert exact.rounding.floor == 0 and 1e-9 < exact.rounding.relative < 1e-3
    assert any("rounding drowns" in flag for flag in direct.flags)
    assert not any("rounding" in flag for flag in exact.flags)
    assert "noise floor" in direct.linearity.excluded[0]
    assert "Rounding: " in str(direct)
    loss = (coarse.change.value / exact.change.value - 1).abs()[0]
    assert exact.rounding.relative < coarse.rounding.relative
    assert loss < 5 * coarse.rounding.relative
