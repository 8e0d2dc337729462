"""Each recipe is its trainer's loss, in value and in the gradient of the live module."""

import pickle
import subprocess
import sys
from dataclasses import replace

import cases
import pytest
import reference
import torch

import funcprobe as fp
from funcprobe.language import objectives
from funcprobe.language.advantages import advantages
from funcprobe.language.recipes import RECIPES, Recipe

EXACT = dict(rtol=1e-12, atol=1e-12)


def noisy(logp, response, seed, size=0.25):
    """Log-probabilities some way off, so that ratios differ from 1 and some are clipped."""
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(response, logp + size * noise.double(), torch.nan)


def prepared(recipe, *, rows=None, max_length=None):
    case = cases.case()
    score = fp.scorer(case.model, case.base)
    batch = cases.batch(rows=rows)
    logp = fp.evaluate(score, case.params, batch).logp
    old, ref = noisy(logp, batch.response, 1), noisy(logp, batch.response, 2)
    batch = fp.prepare(batch, recipe, old_logp=old, ref_logp=ref, max_length=max_length)
    return case, fp.objective(score, recipe), batch, old, ref


def live_loss(name, batch, old, ref, **options):
    """The trainer's loss on the live module in float64, and its gradient by backward()."""
    module = cases.module64()
    weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with reference.float64(module):
        logp, _ = reference.scores(module, batch)
        loss = reference.loss(
            name, logp, batch.response, batch.reward, batch.group, old=old, ref=ref, **options
        )
        grads = torch.autograd.grad(loss, list(weights.values()))
    return loss.detach(), dict(zip(weights, grads, strict=True))


def penalties(name: str) -> list[float]:
    """RLOO's trainer puts the KL into the reward, and the plain estimator has none."""
    return [0.0] if name == "reinforce" or RECIPES[name].ratio == "sequence" else [0.0, 0.3]


@pytest.mark.parametrize(("name", "beta"), [(n, b) for n in sorted(RECIPES) for b in penalties(n)])
def test_a_recipe_is_its_trainers_loss_and_gradient(name, beta):
    recipe = replace(RECIPES[name], beta=beta)
    case, loss, batch, old, ref = prepared(recipe, rows=cases.FULL)
    want, want_grads = live_loss(name, batch, old, ref, beta=beta)
    torch.testing.assert_close(fp.evaluate(loss, case.params, batch).sum(), want, **EXACT)
    grads = fp.gradient(loss, case.params, batch)
    scale = max(float(g.abs().max()) for g in want_grads.values())
    assert scale > 1e-3
    for n in grads:
        torch.testing.assert_close(grads[n], want_grads[n], rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_an_empty_response_moves_no_parameter_but_counts_among_the_rows(name):
    case, loss, batch, old, ref = prepared(name)
    _, want_grads = live_loss(name, batch, old, ref)
    grads = fp.gradient(loss, case.params, batch)
    for n in grads:
        torch.testing.assert_close(grads[n], want_grads[n], rtol=1e-9, atol=1e-12)


def test_ratios_are_clipped_somewhere():
    case, _, batch, old, _ = prepared("dapo", rows=cases.FULL)
    logp = fp.evaluate(fp.scorer(case.model, case.base), case.params, batch).logp
    ratio = (logp - old).exp()[batch.response]
    assert (ratio > 1.28).any() and (ratio < 0.8).any() and ((ratio - 1).abs() < 0.2).any()


def test_the_constant_divisor_is_the_longest_response_allowed():
    _, _, batch, _, _ = prepared("dr_grpo")
    _, _, longer, _, _ = prepared("dr_grpo", max_length=100)
    n, r = batch.response.shape
    torch.testing.assert_close(batch.weight, batch.response.double() / (n * r))
    torch.testing.assert_close(longer.weight, batch.response.double() / (n * 100))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_weights_are_zero_off_the_response(name):
    _, _, batch, _, _ = prepared(name)
    assert (batch.weight[~batch.response] == 0).all()
    assert (batch.weight[batch.response] > 0).all()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_microbatches_sum_to_the_batch(name):
    case, loss, batch, _, _ = prepared(name)
    whole = loss(case.params, batch)
    assert whole.shape == batch.response.shape
    cut = [loss(case.params, batch.rows(slice(i, i + 3))).sum() for i in (0, 3, 6)]
    torch.testing.assert_close(sum(cut), whole.sum(), **EXACT)
    grads = fp.gradient(loss, case.params, batch)
    for rows in (1, 3):
        for n, g in fp.gradient(loss, case.params, batch, rows=rows).items():
            torch.testing.assert_close(g, grads[n], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_on_the_behaviour_policy_every_ratio_is_one(name):
    case = cases.case()
    score = fp.scorer(case.model, case.base)
    batch = cases.batch()
    old = fp.evaluate(score, case.params, batch).logp
    batch = fp.prepare(batch, name, old_logp=old)
    value = fp.evaluate(fp.objective(score, name), case.params, batch)
    if RECIPES[name].ratio != "none":
        expected = -batch.advantage.unsqueeze(-1) * batch.weight
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    # Its gradient is that of -sum weight A logp, whatever the ratio.
    plain = fp.gradient(
        lambda p, b: -b.weight * b.advantage.unsqueeze(-1) * score(p, b).logp, case.params, batch
    )
    if RECIPES[name].ratio == "sequence":  # there each token carries the sequence's whole ratio
        t = batch.response.sum(1, keepdim=True)
        plain = fp.gradient(
            lambda p, b: (
                -b.weight
                * b.response.sum(1, keepdim=True)
                * b.advantage.unsqueeze(-1)
                * score(p, b).logp
            ),
            case.params,
            batch,
        )
        assert t.max() > 1
    for n, g in fp.gradient(fp.objective(score, name), case.params, batch).items():
        torch.testing.assert_close(g, plain[n], rtol=1e-9, atol=1e-13)


# Advantages


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
def test_advantages_are_those_of_loops(baseline, scale):
    batch = cases.batch()
    ours = advantages(batch.reward, batch.group, Recipe(baseline=baseline, scale=scale))
    want = reference.group_advantages(batch.reward, batch.group, baseline=baseline, scale=scale)
    torch.testing.assert_close(ours, want, **EXACT)


def test_a_group_of_one_has_no_peers():
    reward, group = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([7, 4, 4])
    mean = advantages(reward, group, RECIPES["grpo"])
    assert mean[0] == 0 and mean.isfinite().all()
    loo = advantages(reward, group, RECIPES["rloo"])
    assert loo.tolist() == [3.0, -1.0, 1.0]


def test_two_rewards_have_a_scale_and_one_has_none():
    reward, group = torch.tensor([3.0, 1.0]).double(), torch.tensor([0, 1])
    recipe = Recipe(baseline="none", scale="batch")
    own = reference.group_advantages(reward, group, baseline="none", scale="batch")
    torch.testing.assert_close(advantages(reward, group, recipe), own, **EXACT)
    assert advantages(reward[:1], group[:1], recipe).tolist() == [3.0 / recipe.scale_eps]


def test_a_group_of_equal_rewards_has_no_advantage():
    reward, group = torch.full((4,), 0.1).double(), torch.zeros(4, dtype=torch.int64)
    for recipe in ("grpo", "dr_grpo", "rloo"):
        assert advantages(reward, group, RECIPES[recipe]).abs().max() < 1e-12


def test_given_advantages_are_kept():
    given = torch.arange(8.0).double()
    batch = cases.batch(advantage=given)
    kept = fp.prepare(batch, Recipe(baseline="given", ratio="none"))
    assert torch.equal(kept.advantage, given)
    without = batch._replace(reward=torch.full_like(given, torch.nan))
    assert torch.equal(fp.prepare(without, "reinforce").advantage, given)


def test_advantages_that_contradict_the_rewards_are_refused():
    batch = cases.batch(advantage=torch.arange(8.0))
    with pytest.raises(ValueError, match="prepare: .*advantages that differ.*baseline='given'"):
        fp.prepare(batch, "reinforce")
    agreeing = cases.batch(advantage=cases.batch().reward)
    assert torch.equal(fp.prepare(agreeing, "reinforce").advantage, agreeing.reward)


def test_preparing_twice_changes_nothing():
    _, _, batch, _, _ = prepared("grpo")
    for a, b in zip(fp.prepare(batch, "grpo"), batch, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


# Refusals


def test_an_unprepared_batch_is_refused():
    case = cases.case()
    loss = fp.objective(fp.scorer(case.model, case.base), "reinforce")
    with pytest.raises(ValueError, match=r"objective: .*not prepared.*prepare\(batch, recipe\)"):
        loss(case.params, cases.batch())


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="unknown recipe 'ppo'.*'dr_grpo', 'grpo'"):
        fp.prepare(cases.batch(), "ppo")
    with pytest.raises(ValueError, match="unknown recipe 'ppo'"):
        fp.objective(None, "ppo")


def test_missing_fields_are_named():
    batch = cases.batch()
    with pytest.raises(ValueError, match=r"prepare: old_logp is unknown in 7 rows, \[0, 1, 3"):
        fp.prepare(batch, "grpo")
    with pytest.raises(ValueError, match="prepare: ref_logp is unknown"):
        fp.prepare(batch, Recipe(beta=0.1, ratio="none"))
    with pytest.raises(ValueError, match="prepare: advantage is unknown in 8 rows"):
        fp.prepare(batch, Recipe(baseline="given", ratio="none"))
    reward = batch.reward.clone()
    reward[3] = torch.nan
    with pytest.raises(ValueError, match=r"prepare: reward is unknown in 1 rows, \[3\]"):
        fp.prepare(batch._replace(reward=reward), "reinforce")


def test_values_of_another_shape_are_refused():
    batch = cases.batch()
    with pytest.raises(ValueError, match=r"must be \[8, 6\].*not \[8, 5\]"):
        fp.prepare(batch, "grpo", old_logp=torch.zeros(8, 5))


@pytest.mark.parametrize("wrong", [{"baseline": "average"}, {"scale": "std"}, {"ratio": "both"}])
def test_a_recipe_of_unknown_parts_is_refused(wrong):
    with pytest.raises(ValueError, match="Recipe: .* must be one of"):
        Recipe(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"clip_low": -0.2}, {"clip_high": float("nan")}, {"beta": -1}, {"beta": "0.1"}]
)
def test_a_recipe_of_impossible_numbers_is_refused(wrong):
    with pytest.raises(ValueError, match="Recipe: .* must be a number of at least 0, not"):
        Recipe(**wrong)


def test_recipes_need_no_torch():
    code = (
        "import sys, types; package = types.ModuleType('funcprobe'); "
        f"package.__path__ = {list(fp.__path__)!r}; sys.modules['funcprobe'] = package; "
        "import funcprobe.language.recipes as r; assert 'grpo' in r.RECIPES; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert objectives.RECIPES is RECIPES and objectives.Recipe is Recipe


@pytest.mark.parametrize("max_length", [0, -5])
def test_a_divisor_below_one_is_refused(max_length):
    with pytest.raises(ValueError, match="max_length must be a positive number of tokens"):
        prepared("dr_grpo", max_length=max_length)


def test_a_loss_copies_and_pickles_and_names_its_recipe():
    score = cases.toy_score
    loss = pickle.loads(pickle.dumps(fp.objective(score, "reinforce")))
    assert loss.recipe == fp.RECIPES["reinforce"] and "baseline='none'" in repr(loss)
