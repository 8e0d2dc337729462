"""Readouts against loops over full logits, and at every size of change."""

import math

import cases
import mpmath
import pytest
import reference
import torch
from transformers.generation.logits_process import TopPLogitsWarper

import funcprobe as fp
from funcprobe import readouts
from funcprobe.language.readouts import log_probabilities

READOUTS = {
    "top": readouts.top_probability,
    "margin": readouts.margin,
    "collision": readouts.collision_probability,
    "tail": readouts.tail_mass(3),
    "eos": readouts.eos_probability(cases.EOS),
    "ends": readouts.eos_probability([cases.EOS, 14]),
    "kl": readouts.expected_kl,
}
WITHOUT = sorted(set(READOUTS) - {"kl"})


def by_hand(name, lp, lq=None):
    """The same of one list of log-probabilities, in Python's floats."""
    p = sorted((math.exp(x) for x in lp), reverse=True)
    first, second = sorted(lp, reverse=True)[:2]
    return {
        "top": lambda: p[0],
        "margin": lambda: min(first - second, 1e4),
        "collision": lambda: math.fsum(x * x for x in p),
        "tail": lambda: math.fsum(p[3:]),
        "eos": lambda: math.exp(lp[cases.EOS]),
        "ends": lambda: math.exp(lp[cases.EOS]) + math.exp(lp[14]),
        "kl": lambda: math.fsum(
            math.exp(a) * (a - b) for a, b in zip(lp, lq, strict=True) if a > -math.inf
        ),
    }[name]()


def scorer(name, case, *, at=None, **options):
    extra = {"reference": case.params if at is None else at} if name == "kl" else {}
    return fp.scorer(case.model, case.base, readout=READOUTS[name], **extra, **options)


# Parity


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_readouts_are_those_of_full_logits_row_by_row(family, top_p):
    case, batch = cases.case(family), cases.batch()
    v, temperature = cases.direction(case.params), 1.3
    moved = fp.shift(case.params, v, 0.02)
    sampling = fp.Sampling(temperature, top_p)
    support = case.params if top_p < 1 else None
    values = {
        name: scorer(name, case, at=moved, sampling=sampling, support=support)(case.params, batch)
        for name in READOUTS
    }
    module = cases.module64(family)
    warper = TopPLogitsWarper(top_p)
    cut = 0
    with torch.no_grad(), reference.float64(module):
        for i in range(len(batch.tokens)):
            here, target = reference.row_logits(module, batch, i)
            with reference.moved(module, v, 0.02):
                other, _ = reference.row_logits(module, batch, i)
            for k in range(len(target)):
                row, twin = here[k] / temperature, other[k] / temperature
                if top_p < 1:
                    out = warper(None, row.unsqueeze(0))[0].isneginf()
                    row, twin = (z.masked_fill(out, -math.inf) for z in (row, twin))
                    cut += int(out.sum())
                lp, lq = (z.log_softmax(-1).tolist() for z in (row, twin))
                for name, got in values.items():
                    assert float(got.value[i, k]) == pytest.approx(
                        by_hand(name, lp, lq), rel=1e-9, abs=1e-13
                    ), name
                    assert got.logp[i, k] == pytest.approx(lp[target[k]], rel=1e-12)
    assert (cut > 0) == (top_p < 1)
    for got in values.values():
        assert isinstance(got, fp.Readings)
        assert (got.value[~batch.response] == 0).all() and (got.logp[~batch.response] == 0).all()


def test_a_readout_of_ones_own_gets_logits_and_targets():
    case, batch = cases.case(), cases.batch()

    def chosen(z, y):
        return z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    score = fp.scorer(case.model, case.base, readout=chosen, chunk=5)
    got = fp.evaluate(score, case.params, batch, rows=3)
    torch.testing.assert_close(got.value, got.logp, rtol=1e-12, atol=1e-12)


# Impossible tokens


@pytest.mark.parametrize("name", sorted(READOUTS))
def test_impossible_tokens_add_nothing_to_value_or_derivatives(name):
    generator = torch.Generator().manual_seed(0)
    z, dz, q = torch.randn(3, 5, 20, generator=generator, dtype=torch.float64)
    out = torch.rand(5, 20, generator=generator) < 0.4
    out[:, [cases.EOS, 14]] = False
    target = torch.full((5,), cases.EOS)

    def fn(t, z, dz, q, mask):
        z, q = ((x if mask is None else x.masked_fill(mask, -math.inf)) for x in (z + t * dz, q))
        return READOUTS[name](z, target[: len(z)], *([q] if name == "kl" else []))

    def orders(*args):
        zero, one = torch.zeros(()).double(), torch.ones(()).double()
        slope = lambda t: torch.func.jvp(lambda s: fn(s, *args), (t,), (one,))  # noqa: E731
        (value, first), (_, second) = torch.func.jvp(slope, (zero,), (one,))
        return value, first, second

    whole = orders(z, dz, q, out)
    assert all(x.isfinite().all() for x in whole)
    for i in range(5):  # over the possible tokens alone, which keep their order, EOS and 14 too
        kept = (~out[i]).nonzero().flatten()
        if name in ("eos", "ends"):  # ids are positions: put the impossible ones last
            kept = torch.arange(20)
            z[i, out[i]], dz[i, out[i]] = -80.0, 0.0
        for got, want in zip(
            whole, orders(*(x[i : i + 1, kept] for x in (z, dz, q)), None), strict=True
        ):
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-10, atol=1e-12)
    masked = torch.func.grad(lambda x: fn(0.0, x, dz, q, out).sum())(z)
    assert masked.isfinite().all() and (masked[out] == 0).all()


def test_one_possible_token_is_certain():
    z = torch.tensor([[0.3, -torch.inf, -torch.inf]])
    y = torch.tensor([0])
    assert readouts.top_probability(z, y) == 1 and readouts.collision_probability(z, y) == 1
    assert readouts.tail_mass(1)(z, y) == 0 and readouts.expected_kl(z, y, z) == 0
    assert readouts.margin(z, y) == 1e4
    assert readouts.tail_mass(7)(z, y) == 0  # more than there are


# Derivatives and increments


@pytest.mark.parametrize("name", sorted(READOUTS))
@pytest.mark.parametrize("family", cases.SOME)
def test_two_derivatives_are_those_of_differences(name, family):
    case, batch = cases.case(family), cases.batch()
    v, h = cases.direction(case.params), 1e-5
    score = scorer(name, case, at=fp.shift(case.params, v, 0.02))
    _, first, second = fp.taylor(score, case.params, v, batch, order=2)

    def slope(eta):
        return fp.taylor(score, fp.shift(case.params, v, eta), v, batch)

    ahead, behind = slope(h), slope(-h)
    for got, want in (
        (first.value, (ahead[0].value - behind[0].value) / (2 * h)),
        (second.value, (ahead[1].value - behind[1].value) / (2 * h)),
    ):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", sorted(READOUTS))
@pytest.mark.parametrize("family", cases.SOME)
def test_increments_have_every_rule_and_agree_with_slopes_and_differences(name, family):
    batch, etas = cases.batch(), [1e-12, -1e-10, 1e-3, 0.1]
    exact = cases.case(family)
    v = cases.direction(exact.params)
    for dtype, close in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        case = cases.case(family, dtype)
        score = scorer(name, case, at=fp.shift(case.params, v, 0.02))
        got = fp.sweep(score, case.params, v, etas, batch, change="increment")
        assert got.fallbacks == ()
        _, slope = fp.taylor(score, case.params, v, batch)
        for k in (0, 1):
            off = got.change.value[k] / etas[k] - slope.value
            assert off.norm() <= close * slope.value.norm()
    score = scorer(name, exact, at=fp.shift(exact.params, v, 0.02))
    got = fp.sweep(score, exact.params, v, etas, batch, change="increment").change.value
    want = fp.sweep(score, exact.params, v, etas, batch).change.value
    torch.testing.assert_close(got[2:], want[2:], rtol=1e-9, atol=1e-12)


def test_the_divergence_is_of_second_order_at_any_learning_rate():
    """At the reference KL and its slope are 0 and its curvature is Fisher's information."""
    case, batch = cases.case(), cases.batch()
    v = cases.direction(case.params)
    score = scorer("kl", case)
    value, first, second = fp.taylor(score, case.params, v, batch, order=2)

    def log_p(eta):
        return fp.logits(case.model, fp.shift(case.params, v, eta), case.base, batch).log_softmax(
            -1
        )

    moved = (log_p(1e-6) - log_p(-1e-6)) / 2e-6
    fisher = torch.where(batch.response, (log_p(0.0).exp() * moved**2).sum(-1), 0.0)
    assert value.value.abs().max() == 0 and first.value.abs().max() < 1e-12
    torch.testing.assert_close(second.value, fisher, rtol=1e-7, atol=1e-9)
    for dtype, close in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        case = cases.case("llama", dtype)
        for change, etas in (("increment", [1e-9, 1e-12]), ("direct", [1e-4])):
            if change == "direct" and dtype == torch.float32:
                continue
            got = fp.sweep(
                scorer("kl", case), case.params, v, etas, batch, change=change
            ).change.value.double()
            for eta, kl in zip(etas, got, strict=True):
                off = kl / (eta * eta / 2) - fisher
                assert off.norm() <= max(close, 300 * eta) * fisher.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-7, 1e-2, 0.49, 1.0, 30.0])
def test_the_divergence_to_full_relative_precision(dtype, size):
    generator = torch.Generator().manual_seed(3)
    lp = torch.randn(20, 6, generator=generator).double().log_softmax(-1)
    lq = (lp + size * torch.randn(20, 6, generator=generator)).to(dtype)
    lp = lp.to(dtype)
    got = readouts.expected_kl(lp, torch.zeros(20, dtype=torch.int64), lq)
    assert (got >= 0).all()
    with mpmath.workdps(40):
        for a, b, kl in zip(lp.tolist(), lq.tolist(), got.tolist(), strict=True):
            p, q = ([mpmath.exp(x) for x in row] for row in (a, b))
            p, q = [x / mpmath.fsum(p) for x in p], [x / mpmath.fsum(q) for x in q]
            want = mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True))
            # Rounding of the log-ratios themselves, twice.
            eps = torch.finfo(dtype).eps
            assert abs(kl - want) <= 60 * eps * (want + mpmath.sqrt(want))


def test_a_tiny_tail_is_exact():
    z = torch.tensor([[0.0, -25.0, -26.0, -40.0]])
    want = math.exp(-26.0) + math.exp(-40.0)
    got = float(readouts.tail_mass(2)(z, torch.tensor([0])))
    assert got == pytest.approx(want, rel=1e-5)


def test_log_probabilities_are_torchs():
    z = 8 * torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(log_probabilities(z), z.log_softmax(-1), rtol=1e-13, atol=1e-13)


# Numbers a sequence has


@pytest.mark.parametrize("change", ["direct", "increment"])
def test_a_value_a_sequence_stands_once_in_its_row_and_does_not_move(change):
    case, batch = cases.case(), cases.batch()
    plain = fp.scorer(case.model, case.base)
    fn = fp.with_value(plain, lambda b: b.reward)
    out = fp.evaluate(fn, case.params, batch, rows=3)
    assert isinstance(out, fp.Readings) and out.value.dtype == out.logp.dtype
    torch.testing.assert_close(out.logp, fp.evaluate(plain, case.params, batch).logp)
    alive = batch.response.any(1)
    assert torch.equal(out.value.sum(1), torch.where(alive, batch.reward, 0.0))
    assert (out.value[:, 1:] == 0).all() and not alive.all()
    v = cases.direction(case.params)
    swept = fp.sweep(fn, case.params, v, [0.1, 0.2], batch, change=change, rows=3)
    assert swept.change.value.shape == (2, *batch.response.shape)
    assert (swept.change.value == 0).all() and (swept.change.logp[0] != 0).any()
    terms = fp.taylor(fn, case.params, v, batch, order=2)
    assert all((term.value == 0).all() for term in terms[1:])


def test_an_unknown_value_is_refused():
    case, batch = cases.case(), cases.batch(reward=None)
    fn = fp.with_value(fp.scorer(case.model, case.base), lambda b: b.reward)
    with pytest.raises(ValueError, match="with_value: the value is nan in 7 of these 8 rows"):
        fp.evaluate(fn, case.params, batch)


# Refusals


def test_what_is_not_a_readout_is_refused():
    case, batch = cases.case(), cases.batch()
    for wrong in (lambda z, y: z, lambda z, y: z.argmax(-1), lambda z, y: z.sum()):
        score = fp.scorer(case.model, case.base, readout=wrong)
        with pytest.raises(
            ValueError, match=r"one floating number a token, \[28\]"
        ):  # 27, in fours
            score(case.params, batch)
    with pytest.raises(ValueError, match="reference= is an argument of the readout"):
        fp.scorer(case.model, case.base, reference=case.params)
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        readouts.tail_mass(0)


@pytest.mark.parametrize("name", ["top", "kl", "tail", "reward"])
def test_estimates_of_any_quantity_come_by_the_same_code(checkpoint, evaluation, name):
    """On the bundled checkpoint: change over eta is the slope, and curvature what is left."""
    params, rows = checkpoint.params, evaluation.rows(slice(0, 64))
    plain = fp.scorer(checkpoint.model, checkpoint.base)
    read, more = {
        "top": (fp.readouts.top_probability, {}),
        "kl": (fp.readouts.expected_kl, {"reference": params}),
        "tail": (fp.readouts.tail_mass(3), {}),
        "reward": (None, {}),
    }[name]
    if name == "reward":
        score, per = fp.with_value(plain, lambda batch: batch.reward), "sequence"
    else:
        score = fp.scorer(checkpoint.model, checkpoint.base, readout=read, **more)
        per = "token"
    v = cases.direction(params)
    etas = [1e-8, 1e-4]
    change = fp.entropy_change(
        fp.sweep(score, params, v, etas, rows, change="increment"), rows, per=per
    )
    series = fp.entropy_series(fp.taylor(score, params, v, rows, order=2), rows, per=per)
    first, second = series.value.tolist()
    assert change.quantity == series.quantity == "value" and "d value" in str(change)
    got = [float(c) / eta for c, eta in zip(change.value, etas, strict=True)]
    if name == "kl":  # of second order: its slope is 0
        assert first == pytest.approx(0, abs=1e-12) and second > 0
        assert got[1] == pytest.approx(etas[1] * second / 2, rel=0.05)
    else:
        assert first != 0 and got[0] == pytest.approx(first, rel=1e-5)
        left = got[1] - first
        assert left == pytest.approx(etas[1] * second / 2, rel=0.05)
