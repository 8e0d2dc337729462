"""A policy of three tokens and at most four steps: every sequence enumerated, so truth is known."""

import math

import cases
import pytest
import torch
from enumerated import ETAS, PROMPTS, SEQUENCES, exact, exact_batch, log_probability, setting

import funcprobe as fp
from funcprobe.statistics.weights import log_weights


def test_the_probabilities_sum_to_one():
    params, v, prompts = setting()
    for eta in (0.0, 0.7):
        there = fp.shift(params, v, eta)
        for prompt in prompts:
            total = sum(math.exp(log_probability(there, prompt, s)) for s in SEQUENCES)
            assert abs(total - 1) < 1e-13
    assert len(SEQUENCES) == 1 + 2 + 4 + 8 + 16


def test_the_score_is_the_sequences_log_probability():
    params, v, _ = setting()
    there = fp.shift(params, v, 0.7)
    for prompt in range(PROMPTS):
        batch = cases.toy_batch(SEQUENCES, [prompt] * len(SEQUENCES))
        ours = cases.toy_score(there, batch).logp.sum(-1)
        own = [log_probability(there, prompt, s) for s in SEQUENCES]
        torch.testing.assert_close(
            ours, torch.tensor(own, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_weights_are_the_ratios_of_the_enumerated_probabilities(dtype):
    """Whatever stands off the response; summed in float64 whatever the scores are stored in."""
    params, v, _ = setting()
    there, batch = fp.shift(params, v, 0.7), cases.toy_batch(SEQUENCES)
    change = fp.sweep(cases.toy_score, params, v, [0.7], batch).change.logp
    change = change.where(batch.response, torch.nan).to(dtype)
    ratios = [log_probability(there, 0, s) - log_probability(params, 0, s) for s in SEQUENCES]
    want = torch.tensor(ratios, dtype=torch.float64)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        log_weights(change, batch.response)[0], want, rtol=rounding, atol=rounding
    )


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("seed", [0, 1])
def test_importance_sampling_gives_the_exact_change(per, seed):
    params, v, prompts = setting(seed)
    batch = exact_batch(params, prompts)
    out = fp.entropy_change(fp.sweep(cases.toy_score, params, v, ETAS, batch), batch, per=per)
    truth = exact(params, prompts, per)
    torch.testing.assert_close(float(out.base), truth, rtol=1e-12, atol=1e-12)
    for k, eta in enumerate(ETAS):
        change = exact(fp.shift(params, v, eta), prompts, per) - truth
        torch.testing.assert_close(float(out.value[k]), change, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.mean_weight, torch.ones(5).double(), rtol=1e-12, atol=0)
    assert out.value[4].abs() > 0.05


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_slope_is_the_derivative_of_the_truth(per):
    params, v, prompts = setting()
    batch = exact_batch(params, prompts)
    series = fp.entropy_series(fp.taylor(cases.toy_score, params, v, batch), batch, per=per)

    def slope(h):
        up, down = (exact(fp.shift(params, v, s), prompts, per) for s in (h, -h))
        return (up - down) / (2 * h)

    truth = (4 * slope(1e-3) - slope(2e-3)) / 3
    torch.testing.assert_close(float(series.value[0]), truth, rtol=1e-9, atol=1e-10)
    assert abs(truth) > 1e-2


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_second_order_is_the_truths(per):
    params, v, prompts = setting()
    batch = exact_batch(params, prompts)
    terms = fp.taylor(cases.toy_score, params, v, batch, order=2)
    series = fp.entropy_series(terms, batch, per=per)

    def second(h):
        up, here, down = (exact(fp.shift(params, v, s), prompts, per) for s in (h, 0.0, -h))
        return (up - 2 * here + down) / h**2

    truth = (4 * second(1e-2) - second(2e-2)) / 3
    torch.testing.assert_close(float(series.value[1]), truth, rtol=1e-6, atol=1e-7)
    assert abs(truth) > 1e-2


def test_the_expected_score_function_is_zero():
    params, v, prompts = setting()
    for prompt in prompts:
        batch = exact_batch(params, [prompt])
        _, d = fp.taylor(cases.toy_score, params, v, batch)
        assert d.logp.sum(-1).mean().abs() < 1e-14
        # and so is each step's, given its prefix: the mean over rows alive there
        for k in range(cases.TOY_LENGTH):
            assert d.logp[batch.response[:, k], k].mean().abs() < 1e-14
        assert d.logp.abs().max() > 0.1


def test_entropy_is_the_expected_surprise_of_the_tokens():
    params, _, prompts = setting()
    batch = exact_batch(params, prompts)
    scores = cases.toy_score(params, batch)
    torch.testing.assert_close(scores.entropy.sum(), -scores.logp.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("recipe", ["reinforce", "rloo", "grpo", "dr_grpo", "dapo"])
def test_equal_rewards_teach_nothing(recipe):
    """The policy gradient of a constant reward is zero in expectation, baseline or not."""
    params, _, prompts = setting()
    batch = exact_batch(params, prompts)
    batch = batch._replace(reward=torch.ones(len(batch.group)).double())
    old = cases.toy_score(params, batch).logp
    batch = fp.prepare(batch, recipe, old_logp=old)
    grads = fp.gradient(fp.objective(cases.toy_score, recipe), params, batch)
    assert max(float(g.abs().max()) for g in grads.values()) < 1e-12


def test_reinforce_is_the_gradient_of_the_expected_reward():
    params, v, prompts = setting()
    batch = exact_batch(params, prompts)
    reward = batch.response.sum(-1).double()  # longer is better
    batch = fp.prepare(batch._replace(reward=reward), "reinforce")
    grads = fp.gradient(fp.objective(cases.toy_score, "reinforce"), params, batch)

    def expected(eta):
        there = fp.shift(params, v, eta)
        return sum(
            math.exp(log_probability(there, p, s)) * len(s) for p in prompts for s in SEQUENCES
        ) / len(prompts)

    truth = (expected(1e-5) - expected(-1e-5)) / 2e-5
    torch.testing.assert_close(-float(fp.dot(grads, v)), truth, rtol=1e-8, atol=1e-10)


# Intervals cover


def replications(prompts, copies, *, draws, seed=0, eta=0.4):
    """Batches of rows sampled by prompt; the truth, and what entropy_change says of each."""
    params = cases.toy_params(prompts=20, seed=3, counts=False)
    # Prompts differ much, so that the rows of one are correlated.
    tilt = 2.5 * torch.randn(20, generator=torch.Generator().manual_seed(5)).double()
    for depth in range(cases.TOY_LENGTH):
        params[f"depth{depth}"][:, 0] += tilt.repeat_interleave(2**depth)
    v = cases.direction(params, seed=8)
    count = len(SEQUENCES)
    every = cases.toy_batch(SEQUENCES * 20, [p for p in range(20) for _ in SEQUENCES])
    sweep = fp.sweep(cases.toy_score, params, v, [eta], every, rows=1000)
    logp = sweep.base.logp.sum(-1).view(20, count)
    truth = {
        per: exact(fp.shift(params, v, eta), range(20), per) - exact(params, range(20), per)
        for per in ("token", "sequence")
    }
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        owner = torch.randint(20, (prompts,), generator=generator)
        drawn = torch.multinomial(logp.exp()[owner], copies, True, generator=generator)
        index = (owner.unsqueeze(1) * count + drawn).flatten()
        batch = every.rows(index)._replace(group=torch.arange(prompts).repeat_interleave(copies))
        yield batch, sweep._replace(
            base=fp.Scores(*(x[index] for x in sweep.base)),
            change=fp.Scores(*(x[:, index] for x in sweep.change)),
            row_hashes=sweep.row_hashes[index],
        ), truth  # fmt: skip


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_95_percent_intervals_cover(per):
    """60 prompts of 8 rows, 600 batches; Student's t at 59 degrees of freedom."""
    draws, hits, naive_hits, z = 600, 0, 0, []
    for batch, sweep, truth in replications(60, 8, draws=draws):
        out = fp.entropy_change(sweep, batch, per=per)
        error = float(out.value[0]) - truth[per]
        hits += abs(error) < 2.001 * float(out.stderr[0])
        z.append(error / float(out.stderr[0]))
        alone = batch._replace(group=torch.arange(len(batch.group)))
        naive = fp.entropy_change(sweep, alone, per=per)
        naive_hits += abs(error) < 2.001 * float(naive.stderr[0])
    noise = math.sqrt(0.95 * 0.05 / draws)
    assert abs(hits / draws - 0.95) < 4 * noise, hits / draws
    assert naive_hits / draws < 0.95 - 6 * noise, naive_hits / draws  # prompts do matter here
    spread = torch.tensor(z).std()
    assert abs(float(spread) - 1) < 4 / math.sqrt(2 * draws) + 0.05, spread


def test_the_error_of_the_slope_covers_too():
    params = cases.toy_params(prompts=1, seed=3, counts=False)
    v = cases.direction(params, seed=8)
    every = cases.toy_batch(SEQUENCES)
    terms = fp.taylor(cases.toy_score, params, v, every)
    p = terms[0].logp.sum(-1).exp()

    def slope(h):
        up, down = (exact(fp.shift(params, v, s), [0], "token") for s in (h, -h))
        return (up - down) / (2 * h)

    truth, draws, hits = slope(1e-4), 500, 0
    generator = torch.Generator().manual_seed(1)
    for _ in range(draws):
        index = torch.multinomial(p, 200, True, generator=generator)
        batch = every.rows(index)._replace(group=torch.arange(200))
        some = tuple(fp.Scores(*(x[index] for x in term)) for term in terms)
        out = fp.entropy_series(some, batch)
        hits += abs(float(out.value[0]) - truth) < 1.972 * float(out.stderr[0])
    assert abs(hits / draws - 0.95) < 4 * math.sqrt(0.95 * 0.05 / draws), hits / draws
