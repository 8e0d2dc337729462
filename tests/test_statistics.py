"""Estimates against hand formulas in loops: the change, its errors, and what the weights say."""

import math
from types import SimpleNamespace

import cases
import pytest
import reference
import torch

import funcprobe as fp
from funcprobe.calculus.tree import Terms
from funcprobe.statistics.estimators import Estimator
from funcprobe.statistics.uncertainty import by_group, standard_error
from funcprobe.statistics.weights import (
    effective_sample_size,
    log_weights,
    mean_weight,
    pareto_khat,
)

EXACT = dict(rtol=1e-12, atol=1e-13)
ETAS = torch.tensor([0.0, 0.5, 1.0]).double()


def rows(n=30, width=6, *, prompts=7, seed=0, empty=True):
    """A batch by shape alone: ragged responses, one of them empty, of a few prompts."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, width + 1, (n,), generator=generator)
    length[0], length[3] = width, 0 if empty else 1
    group = torch.randint(0, prompts, (n,), generator=generator)
    group[:prompts] = torch.arange(prompts)
    made = fp.collate([[1]] * n, [[1] * int(t) for t in length], group=group * 10)
    return made


def swept(batch, *, etas=ETAS, size=0.3, seed=0, dtype=torch.float64):
    """Random scores along a line; garbage off the response, which must not matter."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch.response.shape
    base = fp.Scores(
        *(x.to(dtype) for x in (-torch.rand(shape, generator=generator) * 3,
                                torch.rand(shape, generator=generator) * 2))
    )  # fmt: skip
    slope = [size * torch.randn(shape, generator=generator).double() for _ in range(2)]
    change = fp.Scores(*((etas.view(-1, 1, 1) * x).to(dtype) for x in slope))
    k = len(etas)
    return fp.Sweep(etas, base, change, torch.zeros(k), torch.zeros(k, dtype=torch.int8))


def every_row_its_prompt(batch):
    return batch._replace(group=torch.arange(len(batch.group)))


# The change


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("size", [0.01, 0.3, 1.5])
def test_the_change_and_its_influence_are_the_hand_formulas(per, size):
    batch = rows()
    sweep = swept(batch, size=size)
    ours = fp.entropy_change(sweep, every_row_its_prompt(batch), per=per)
    clustered = fp.entropy_change(sweep, batch, per=per)
    for k in range(3):
        change = [x[k] for x in sweep.change]
        value, psi = reference.entropy_change(sweep.base, change, batch.response, per=per)
        torch.testing.assert_close(float(ours.value[k]), value, rtol=1e-11, atol=1e-13)
        n = len(psi)
        torch.testing.assert_close(n * ours.psi[k], torch.tensor(psi, dtype=torch.float64), **EXACT)
        assert abs(sum(psi)) < 1e-11
        if k:
            expected = reference.stderr(psi, batch.group)
            torch.testing.assert_close(float(clustered.stderr[k]), expected, rtol=1e-11, atol=0)
            expected = reference.stderr(psi, range(n))
            torch.testing.assert_close(float(ours.stderr[k]), expected, rtol=1e-11, atol=0)
    h = torch.where(batch.response, sweep.base.entropy, 0.0).sum()
    count = batch.response.sum() if per == "token" else len(batch.response)
    torch.testing.assert_close(ours.base, h / count, **EXACT)
    assert (ours.value[0], ours.stderr[0]) == (0.0, 0.0)
    assert ours.per == per and ours.rows == 30


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_small_changes_are_exact_to_rounding(per):
    """From differences: at eta = 1e-12 the value has all its digits."""
    batch = rows()
    etas = torch.tensor([1e-12, 2e-12]).double()
    sweep = swept(batch, etas=etas)
    ours = fp.entropy_change(sweep, batch, per=per)
    derivative = [x[0] / etas[0] for x in sweep.change]
    slope, _ = reference.slope(sweep.base, derivative, batch.response, per=per)
    torch.testing.assert_close(ours.value, slope * etas, rtol=1e-10, atol=0)
    assert ours.psi.sum(-1).abs().max() < 1e-26


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_float32_scores_are_summed_in_float64(per):
    batch = rows(n=60)
    low = swept(batch, dtype=torch.float32)
    high = low._replace(
        base=fp.Scores(*(x.double() for x in low.base)),
        change=fp.Scores(*(x.double() for x in low.change)),
    )
    narrow, wide = (fp.entropy_change(s, batch, per=per) for s in (low, high))
    for a, b in zip(narrow.tensors().values(), wide.tensors().values(), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    terms = (low.base, fp.Scores(*(x[1] for x in low.change)))
    assert fp.entropy_series(terms, batch, per=per).value.dtype == torch.float64


def test_only_the_response_counts():
    batch = rows()
    sweep = swept(batch)
    spoilt = sweep._replace(
        base=fp.Scores(*(torch.where(batch.response, x, 99.0) for x in sweep.base)),
        change=fp.Scores(*(torch.where(batch.response, x, -7.0) for x in sweep.change)),
    )
    for per in ("token", "sequence"):
        a, b = (fp.entropy_change(s, batch, per=per) for s in (sweep, spoilt))
        assert torch.equal(a.value, b.value) and torch.equal(a.psi, b.psi)
        assert torch.equal(a.ess, b.ess)


def test_an_unknown_unit_is_refused():
    batch = rows()
    with pytest.raises(ValueError, match="per must be 'token' or 'sequence', not 'row'"):
        fp.entropy_change(swept(batch), batch, per="row")


def test_scores_of_another_batch_are_refused():
    batch = rows()
    with pytest.raises(ValueError, match=r"responses \[10, 6\] but the scores are \[3?,? ?30, 6\]"):
        fp.entropy_change(swept(batch), batch.rows(slice(0, 10)))


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_rows_of_another_batch_are_refused_by_their_hashes(per):
    """Two batches of one shape: where the sweep and the batch can tell rows apart, they must."""

    def identified(batch, hashes):
        return SimpleNamespace(
            response=batch.response, group=batch.group, row_hashes=lambda: torch.tensor(hashes)
        )

    batch = rows(n=4, prompts=2, empty=False)
    sweep = SimpleNamespace(**swept(batch)._asdict())
    terms = [sweep.base, fp.Scores(*(x[1] for x in sweep.change))]
    free = fp.entropy_change(sweep, identified(batch, [1, 2, 3, 4]), per=per)
    sweep.row_hashes = torch.tensor([1, 2, 3, 4])
    unidentified = SimpleNamespace(response=batch.response, group=batch.group)
    assert torch.equal(fp.entropy_change(sweep, unidentified, per=per).value, free.value)
    same = fp.entropy_change(sweep, identified(batch, [1, 2, 3, 4]), per=per)
    assert torch.equal(same.value, free.value)
    other = identified(batch, [1, 7, 3, 8])
    complaint = r"rows were expected to be those that were scored, 2 of 4 differ, first \[1, 3\]"
    for function in (fp.entropy_change, fp.jackknife, fp.bootstrap, fp.compare):
        with pytest.raises(ValueError, match=complaint):
            function(sweep, other, per=per)
    series = fp.entropy_series(terms, other, per=per)
    tagged = type("Tagged", (tuple,), {"row_hashes": sweep.row_hashes})(terms)
    with pytest.raises(ValueError, match=f"entropy_series: the batch's {complaint}"):
        fp.entropy_series(tagged, other, per=per)
    good = fp.entropy_series(tagged, identified(batch, [1, 2, 3, 4]), per=per)
    assert torch.equal(good.value, series.value)


def test_a_real_batch_tells_its_rows_from_anothers():
    batch = cases.batch(rows=cases.FULL)
    base = fp.Scores(*(torch.zeros(batch.response.shape) for _ in range(2)))
    change = fp.Scores(*(x[None] for x in base))
    hashes = batch.row_hashes()
    sweep = SimpleNamespace(etas=torch.zeros(1), base=base, change=change, row_hashes=hashes)
    wider = batch._replace(
        tokens=torch.nn.functional.pad(batch.tokens, (0, 2)),
        attention=torch.nn.functional.pad(batch.attention, (0, 2)),
    )
    swapped = batch.rows(torch.tensor([0, 1, 2, 3, 5, 4, 6]))
    other = batch._replace(tokens=batch.tokens + 1)
    for function, scored in (
        (fp.entropy_change, sweep),
        (fp.entropy_series, Terms([base, base], hashes)),
    ):
        for same in (batch, wider):
            assert (function(scored, same).value == 0).all()
        with pytest.raises(ValueError, match=r"2 of 7 differ, first \[4, 5\]"):
            function(scored, swapped)
        with pytest.raises(ValueError, match="7 of 7 differ"):
            function(scored, other)


# Extremes


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_huge_weights_do_not_overflow(per):
    batch = rows()
    sweep = swept(batch, size=600.0)
    out = fp.entropy_change(sweep, batch, per=per)
    logw = log_weights(sweep.change.logp, batch.response)
    assert logw.max() > 800  # its exponential is inf
    winner = int(logw[2].argmax())
    t = int(batch.response[winner].sum()) if per == "token" else 1
    shifted = (sweep.base.entropy + sweep.change.entropy[2])[winner][batch.response[winner]]
    torch.testing.assert_close(out.base + out.value[2], shifted.sum() / t, rtol=1e-9, atol=1e-9)
    assert out.value.isfinite().all() and out.psi.isfinite().all()
    torch.testing.assert_close(out.ess[2], torch.tensor(1.0).double(), rtol=1e-6, atol=0)


# Errors


def test_the_error_is_that_of_a_mean():
    """With equal weights per sequence it is the textbook error of the mean of dh."""
    batch = every_row_its_prompt(rows(n=50))
    sweep = swept(batch)
    still = sweep._replace(change=sweep.change._replace(logp=torch.zeros_like(sweep.change.logp)))
    dh = torch.where(batch.response, still.change.entropy[2], 0.0).sum(-1)
    out = fp.entropy_change(still, batch, per="sequence")
    torch.testing.assert_close(out.value[2], dh.mean(), **EXACT)
    torch.testing.assert_close(out.stderr[2], dh.std() / math.sqrt(50), **EXACT)
    h = torch.where(batch.response, sweep.base.entropy, 0.0).sum(-1)
    torch.testing.assert_close(out.base_stderr, h.std() / math.sqrt(50), **EXACT)


def test_the_error_of_the_base_per_token_is_that_of_a_ratio():
    batch = rows()
    sweep = swept(batch)
    out = fp.entropy_change(sweep, batch)
    h = torch.where(batch.response, sweep.base.entropy, 0.0).sum(-1)
    t = batch.response.sum(-1).double()
    psi = (h - h.sum() / t.sum() * t) / t.mean()
    expected = reference.stderr(psi, batch.group)
    torch.testing.assert_close(float(out.base_stderr), expected, rtol=1e-12, atol=0)


def test_influence_values_are_summed_by_prompt():
    psi = torch.tensor([[1.0, -2.0, 4.0, -3.0], [0.0, 0.0, 0.0, 0.0]]).double()
    group = torch.tensor([5, 9, 5, 9])
    assert by_group(psi, group).tolist() == [[5.0, -5.0], [0.0, 0.0]]
    assert standard_error(by_group(psi, group)).tolist() == [10.0, 0.0]


def test_copies_within_a_prompt_do_not_shrink_the_error():
    batch = every_row_its_prompt(rows())
    sweep = swept(batch)
    four = torch.arange(30).repeat_interleave(4)
    other = sweep._replace(
        base=fp.Scores(*(x[four] for x in sweep.base)),
        change=fp.Scores(*(x[:, four] for x in sweep.change)),
    )
    one = fp.entropy_change(sweep, batch)
    many = fp.entropy_change(other, batch.rows(four))
    torch.testing.assert_close(one.stderr, many.stderr, **EXACT)
    naive = fp.entropy_change(other, every_row_its_prompt(batch.rows(four)))
    ratio = float(naive.stderr[1] / many.stderr[1])
    assert 0.45 < ratio < 0.55  # what ignoring the prompts would claim


def test_one_prompt_has_no_error_and_says_why():
    batch = rows(prompts=1)
    out = fp.entropy_change(swept(batch), batch)
    assert out.stderr.isnan().all() and out.base_stderr.isnan()
    assert out.value.isfinite().all()
    assert "no standard error: all rows share one prompt, the unit of resampling" in str(out)


def test_an_estimate_prints_itself():
    batch = rows()
    text = str(fp.entropy_change(swept(batch), batch, per="sequence"))
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[0] == "dH = +0.000e+00 +- 0.0e+00 nats/sequence at eta = 0, ESS 30/30"
    assert "no standard error" not in text
    series = fp.entropy_series((swept(batch).base, swept(batch).base), batch)
    assert str(series).startswith("d^1H/d eta^1 = ")


def test_estimators_are_equal_by_what_they_read():
    old = torch.tensor([[0.0, math.nan]])
    one, same = Estimator("prefix", behaviour=old), Estimator("prefix", behaviour=old.clone())
    assert one == same and hash(one) == hash(same) and not one.differences(same)
    for other in (Estimator(), Estimator("prefix"), Estimator("prefix", behaviour=old + 1.0)):
        assert one != other
    assert one != Estimator("prefix", behaviour=old.repeat(2, 1)) and one != "prefix"
    assert repr(one) == "Estimator(weights='prefix', per='token', behaviour=<[1, 2]>)"


# What the weights say


@pytest.mark.parametrize("size", [1e-3, 0.5, 5.0])
def test_the_effective_sample_size_is_kishs(size):
    logw = size * torch.randn(4, 25, generator=torch.Generator().manual_seed(0)).double()
    w = logw.exp()
    kish = w.sum(-1) ** 2 / (w**2).sum(-1)
    torch.testing.assert_close(effective_sample_size(logw), kish, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean_weight(logw), w.mean(-1), rtol=1e-12, atol=0)
    flat = torch.full((25,), 700.0).double()
    torch.testing.assert_close(effective_sample_size(flat), torch.tensor(25.0).double())
    flat[3] = 2000.0
    torch.testing.assert_close(effective_sample_size(flat), torch.tensor(1.0).double())


@pytest.mark.parametrize("n", [30, 100, 1000])
@pytest.mark.parametrize("size", [0.01, 0.5, 1.0, 3.0, 30.0])
def test_khat_is_that_of_psis(n, size):
    logw = size * torch.randn(n, generator=torch.Generator().manual_seed(n)).double()
    expected = reference.pareto_khat(logw.tolist())
    torch.testing.assert_close(float(pareto_khat(logw)), expected, rtol=1e-8, atol=1e-8)


def test_khat_finds_the_tail_of_a_pareto():
    generator = torch.Generator().manual_seed(0)
    for k in (0.2, 0.5, 1.0):
        u = torch.rand(20_000, generator=generator).double()
        khat = float(pareto_khat(-k * torch.log(u)))
        assert abs(khat - k) < 0.15, (k, khat)


def test_khat_is_undefined_for_equal_or_few_weights():
    assert pareto_khat(torch.zeros(100).double()).isnan()
    assert pareto_khat(torch.randn(12, generator=torch.Generator().manual_seed(0))).isnan()
    assert pareto_khat(torch.zeros(1).double()).isnan()
    batch = rows(n=60)
    out = fp.entropy_change(swept(batch), batch)
    assert out.khat[0].isnan() and out.khat[1:].isfinite().all()
    logw = log_weights(swept(batch).change.logp, batch.response)
    torch.testing.assert_close(
        out.weight_range[1], torch.stack([logw[1].min(), logw[1].max()]).exp()
    )


def test_khat_ignores_a_constant_and_the_order():
    logw = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    a = pareto_khat(logw)
    torch.testing.assert_close(pareto_khat(logw.flip(0) + 900), a, rtol=1e-9, atol=0)
    both = pareto_khat(torch.stack([logw, 2 * logw]))
    assert both.shape == (2,) and both[0] == a and both[1] > a


def test_statistics_change_nothing_they_are_given():
    batch = rows()
    sweep = swept(batch)
    tensors = [sweep.etas, *sweep.base, *sweep.change, *batch]
    before = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    fp.entropy_change(sweep, batch)
    assert [t._version for t in tensors] == versions
    for a, b in zip(tensors, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_real_results_refuse_another_batch_and_blocks_joined_without_their_order():
    case, batch = cases.case(), cases.batch(rows=cases.FULL)
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    blocks, order = fp.by_length(batch, tokens=8)
    swept_blocks = [fp.sweep(score, case.params, v, [0.1], block) for block in blocks]
    derived_blocks = [fp.taylor(score, case.params, v, block) for block in blocks]
    other = batch._replace(tokens=batch.tokens + 1)
    for function, parts in ((fp.entropy_change, swept_blocks), (fp.entropy_series, derived_blocks)):
        assert function(fp.join(parts, order), batch).value.isfinite().all()
        with pytest.raises(ValueError, match="7 of 7 differ"):
            function(fp.join(parts, order), other)
        with pytest.raises(ValueError, match=r"of 7 differ.* give join\(\) the order"):
            function(fp.join(parts), batch)


def test_a_real_sweep_goes_through():
    case = cases.case()
    batch = cases.batch()
    score = fp.scorer(case.model, case.base)
    etas = [0.0, 0.01, 0.1]
    sweep = fp.sweep(score, case.params, cases.direction(case.params), etas, batch)
    out = fp.entropy_change(sweep, batch)
    with reference.float64(cases.module64()) as module:
        base, change = reference.sweep(module, cases.direction(case.params), etas, batch)
    for k in range(3):
        value, psi = reference.entropy_change(
            base, [x[k] for x in change], batch.response, per="token"
        )
        torch.testing.assert_close(float(out.value[k]), value, rtol=1e-10, atol=1e-12)
        expected = reference.stderr(psi, batch.group)
        torch.testing.assert_close(float(out.stderr[k]), expected, rtol=1e-9, atol=1e-12)
