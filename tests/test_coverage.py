"""What intervals, bands and verdicts promise, counted on an enumerable policy: truth is known.

Twenty kinds of prompt differ in how soon they end, so responses of one prompt are correlated and
lengths vary. Each of 600 batches draws 64 prompts of 8 responses. Seeds are fixed.
"""

import math
from functools import cache
from types import SimpleNamespace

import cases
import pytest
import torch
from enumerated import SEQUENCES, exact

import funcprobe as fp
from funcprobe.statistics.uncertainty import interval

pytestmark = pytest.mark.slow

KINDS, DRAWS, PROMPTS, COPIES = 20, 600, 64, 8
TOLERANCE = 0.1
SHARES = torch.tensor([0.125, 0.25, 0.5, 0.8, 1.05, 1.5], dtype=torch.float64)  # of the true reach
WEIGHTS = ["sequence", "prefix", "prefix_raw"]
PER = ["token", "sequence"]


@cache
def policy():
    """Its tables, a direction that sharpens it, and every response of every kind of prompt."""
    params = cases.toy_params(prompts=KINDS, seed=3, counts=False)
    tilt = torch.randn(KINDS, generator=torch.Generator().manual_seed(5)).double()
    for depth in range(cases.TOY_LENGTH):
        params[f"depth{depth}"][:, 0] += tilt.repeat_interleave(2**depth)
    noise = cases.direction(params, seed=8)
    v = {n: p - p.mean(-1, keepdim=True) + 0.1 * noise[n] for n, p in params.items()}
    owner = [kind for kind in range(KINDS) for _ in SEQUENCES]
    return params, v, cases.toy_batch(SEQUENCES * KINDS, owner)


@cache
def truth(per):
    """The slope, and where the true change leaves the line by the tolerance."""
    params, v, _ = policy()
    slope = (true_change(per, 1e-4) - true_change(per, -1e-4)) / 2e-4
    low, high = 0.0, 1.0
    for _ in range(40):
        eta = (low + high) / 2
        within = abs(true_change(per, eta) / (eta * slope) - 1) < TOLERANCE
        low, high = (eta, high) if within else (low, eta)
    return slope, low


@cache
def true_change(per, eta):
    params, v, _ = policy()
    there = exact(fp.shift(params, v, eta), range(KINDS), per) if eta else 0.0
    return there - exact(params, range(KINDS), per) if eta else 0.0


def batches(etas, *, prompts=PROMPTS, draws=DRAWS, seed=0):
    """Sampled batches: the sweep, the terms and the rows of each."""
    params, v, every = policy()
    whole = fp.sweep(cases.toy_score, params, v, etas, every)
    terms = fp.taylor(cases.toy_score, params, v, every)
    p = whole.base.logp.sum(-1).view(KINDS, -1).exp()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        kind = torch.randint(KINDS, (prompts,), generator=generator)
        drawn = torch.multinomial(p[kind], COPIES, True, generator=generator)
        index = (kind[:, None] * len(SEQUENCES) + drawn).flatten()
        sweep = SimpleNamespace(
            etas=whole.etas,
            base=fp.Scores(*(x[index] for x in whole.base)),
            change=fp.Scores(*(x[:, index] for x in whole.change)),
        )
        group = torch.arange(prompts).repeat_interleave(COPIES)
        rows = SimpleNamespace(response=every.response[index], group=group)
        yield sweep, [fp.Scores(*(x[index] for x in term)) for term in terms], rows


@cache
def simulated(per):
    """For each kind of weights: estimates, errors, bands and verdicts of all batches."""
    slope, reach = truth(per)
    etas = (SHARES * reach).tolist()
    out = {w: {} for w in WEIGHTS}
    for sweep, terms, rows in batches(etas):
        alone = SimpleNamespace(response=rows.response, group=torch.arange(len(rows.group)))
        for w in WEIGHTS:
            change = fp.entropy_change(sweep, rows, weights=w, per=per)
            series = fp.entropy_series(terms, rows, weights=w, per=per)
            naive = fp.entropy_series(terms, alone, weights=w, per=per)
            naive_base = by_row(sweep.base, rows.response, per)
            law = fp.linearity(change, series, tolerance=TOLERANCE, draws=1000)
            found = dict(
                value=change.value,
                interval=change.interval(),
                width=fp.band(change.psi, draws=1000),
                slope=series.value[0],
                slope_interval=series.interval()[0],
                naive=naive.interval()[0],
                base=interval(change.base, change.base_psi),
                naive_base=interval(change.base, naive_base),
                low=law.low,
                high=law.high,
                holds=torch.tensor(law.holds, dtype=torch.float64),
                fails=torch.tensor(law.fails, dtype=torch.float64),
            )
            for name, x in found.items():
                out[w].setdefault(name, []).append(x)
    changes = torch.tensor([true_change(per, eta) for eta in etas], dtype=torch.float64)
    result = {w: {n: torch.stack(x) for n, x in found.items()} for w, found in out.items()}
    return result, changes, slope, reach


def by_row(base, response, per):
    """Influence values of the base by row, as if rows were independent."""
    h, t = base.entropy.sum(1), response.sum(1).double()
    t = t if per == "token" else torch.ones_like(t)
    return (h - h.sum() / t.sum() * t) / t.sum()


def covered(ends, true):
    return ((ends[..., 0] <= true) & (true <= ends[..., 1])).double().mean(0)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_bias_shows_and_95_percent_intervals_cover(weights, per):
    result, changes, slope, _ = simulated(per)
    found = result[weights]
    for value, true in (
        (found["value"], changes),
        (found["slope"][:, None], torch.tensor([slope])),
    ):
        z = (value - true).mean(0) / value.std(0) * math.sqrt(DRAWS)
        assert z.abs().max() < 4, z
    cover = covered(found["interval"], changes)
    assert ((cover >= 0.92) & (cover <= 0.98)).all(), cover
    assert 0.92 <= covered(found["slope_interval"], slope) <= 0.98
    # Responses of one prompt are correlated: errors that ignore it are too small.
    params, _, _ = policy()
    base = exact(params, range(KINDS), per)
    assert 0.92 <= covered(found["base"], base) <= 0.98
    assert covered(found["naive_base"], base) < 0.8
    assert covered(found["naive"], slope) < 0.92


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_bands_cover_all_points_at_once(weights, per):
    result, changes, slope, reach = simulated(per)
    found = result[weights]
    inside = ((found["value"] - changes).abs() <= found["width"]).all(-1).double().mean()
    assert 0.92 <= inside <= 0.98, inside
    pointwise = found["interval"]
    every = ((pointwise[..., 0] <= changes) & (changes <= pointwise[..., 1])).all(-1)
    assert every.double().mean() < inside
    true = changes / (SHARES * reach * slope) - 1
    kept = ~found["low"].isnan()
    hit = ((found["low"] <= true) & (true <= found["high"]) | ~kept).all(-1).double().mean()
    assert 0.92 <= hit <= 0.985, hit


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_verdicts_are_rarely_wrong_and_mostly_said(weights, per):
    result, _, _, reach = simulated(per)
    found = result[weights]
    wrong = (found["holds"] > reach).double().mean()
    early = (found["fails"] < reach).double().mean()
    said = (found["holds"] >= 0.49 * reach).double().mean()
    assert wrong <= 0.05 and early <= 0.05, (wrong, early)
    assert said >= 0.8, said


def chain(seed, *, rows, length=60, states=5):
    """Responses of a Markov chain that ends in state 0, and their scores at any eta."""
    generator = torch.Generator().manual_seed(seed)
    logits, v = torch.randn(2, states, states, generator=generator).double()
    logits[:, 0] -= 3
    p = logits.softmax(-1)
    state, alive = torch.ones(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    columns = []
    for _ in range(length):
        token = torch.multinomial(p[state], 1, True, generator=generator)[:, 0]
        columns.append((state, token, alive))
        alive = alive & (token != 0)
        state = torch.where(alive, token, state)
    state, token, alive = (torch.stack(column, 1) for column in zip(*columns, strict=True))

    def score(eta):
        logp = (logits + eta * v).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return fp.Scores(
            torch.where(alive, logp[state, token], 0.0), torch.where(alive, entropy[state], 0.0)
        )

    return score, alive


@pytest.mark.parametrize("seed", [0, 1])
def test_position_normalised_prefix_weights_are_the_better_ones_on_long_responses(seed):
    """Per token, up to 60 tokens, 500 batches of 64 rows."""
    draws, n = 500, 64
    score, response = chain(seed, rows=draws * n)
    base, there = score(0.0), score(0.05)
    values = {"sequence": [], "prefix": []}
    for start in range(0, draws * n, n):
        some = slice(start, start + n)
        sweep = SimpleNamespace(
            etas=torch.tensor([0.05]),
            base=fp.Scores(*(x[some] for x in base)),
            change=fp.Scores(*(a[None, some] - b[some] for a, b in zip(there, base, strict=True))),
        )
        rows = SimpleNamespace(response=response[some], group=torch.arange(n))
        for weights, found in values.items():
            found.append(fp.entropy_change(sweep, rows, weights=weights).value[0])
    snis, prefix = (torch.stack(found).var() for found in values.values())
    assert prefix / snis <= 0.75, prefix / snis


@pytest.mark.parametrize("per", PER)
def test_resampled_intervals_cover_too(per):
    _, reach = truth(per)
    eta = 0.5 * reach
    true = true_change(per, eta)
    hits, jack, draws = [], [], 500
    for sweep, _, rows in batches([eta], prompts=32, draws=draws, seed=1):
        boot = fp.bootstrap(sweep, rows, per=per, draws=400)
        hits.append(bool(boot.low[0] <= true <= boot.high[0]))
        left = fp.jackknife(sweep, rows, per=per)
        jack.append([float(left.value[0]), float(left.bias[0]), float(left.stderr[0])])
    assert 0.9 <= sum(hits) / draws <= 0.98, sum(hits) / draws
    value, bias, error = torch.tensor(jack, dtype=torch.float64).T
    assert float(error.square().mean().sqrt() / value.std()) == pytest.approx(1, abs=0.1)
    corrected = value - bias
    assert abs(float((corrected - true).mean() / corrected.std())) * math.sqrt(draws) < 4


def test_few_prompts_need_the_studentised_bootstrap():
    _, reach = truth("token")
    eta, draws = 0.5 * reach, 500
    true = true_change("token", eta)
    hits = torch.zeros(2)
    for sweep, _, rows in batches([eta], prompts=8, draws=draws, seed=2):
        for k, studentised in enumerate((False, True)):
            boot = fp.bootstrap(sweep, rows, draws=600, studentised=studentised)
            hits[k] += bool(boot.low[0] <= true <= boot.high[0])
    plain, studentised = (hits / draws).tolist()
    assert 0.92 <= studentised <= 0.98, studentised
    assert plain < 0.92 and plain < studentised, plain
