"""Doubts about a probe's results that only the probe itself can see, and what to do about them."""

import json
from collections import Counter

import torch

from ..calculus.results import Sweep
from ..calculus.tree import norm
from ..language.batch import Batch
from ..language.model.positions import positions
from ..language.model.split import Model
from ..language.objectives import clipped
from ..language.recipes import Recipe, as_recipe
from ..rollouts.sample import end_tokens
from ..statistics.doubts import another_policy
from ..statistics.policy_test import PolicyTest
from ..statistics.results import Estimate
from ..statistics.rounding import Rounding
from ..training.checkpoint import Checkpoint
from .checks import rows_beyond
from .provenance import Records
from .rows import chance_of_repeat, copied_rows, divided_prompts, no_draws, prompts_of
from .setup import Plan, Setup, slope_eta

# How far a log-probability recorded in bfloat16 strays from the policy's own, in nats a token.
ENGINE_NATS = 0.05

# How many of its steps an optimizer may lack: in float16, those that overflow are skipped.
STEPS_OFF = 0.1

# What is lost of a token's log-probability where the tokens that top-k, top-p or min-p exclude
# count, in nats: less than this matters to no ratio, and is more than rounding.
KEPT_NATS = 1e-3

_UNSEEN = (
    "Yet it records this checkpoint's log-probabilities, as an engine does that takes them before "
    "its temperature and truncation; then off_policy=True does not help."
)


def probe_doubts(
    setup: Setup, plan: Plan, swept: Sweep, rounded: Rounding | None, *, drawn: bool
) -> list[str]:
    """Why a probe's results should not be trusted as they stand, each reason with its remedy.

    `drawn` says that nothing speaks against E being the scored policy's draws.
    """
    update, evaluation, recipe = plan.update, setup.evaluation, as_recipe(setup.settings.recipe)
    model = setup.checkpoint.model
    elsewhere = _update_from_elsewhere(plan, recipe, truncated=setup.update_truncated)
    ends = end_tokens(model.skeleton, setup.checkpoint.tokenizer)
    reasons = [
        _no_gradient(plan, recipe),
        _equal_advantages(update, recipe),
        _mixed_groups(plan, recipe),
        elsewhere,
        no_draws("U", update, ends),
        no_draws("E", evaluation, ends),
        _shared_rows(update, evaluation, swept),
        # How often chance repeats a response is known for draws of the policy alone.
        "" if elsewhere else copied_rows("U", update, plan.logp),
        copied_rows("E", evaluation, swept.base.logp) if drawn else "",
        divided_prompts(evaluation),
        _uneven_groups(update),
        _another_optimizer(setup.checkpoint),
        _guessed_divisor(setup, recipe),
        _extrapolated("U", update, model),
        _extrapolated("E", evaluation, model),
        _below_rounding(swept, rounded),
        _secant(setup, plan),
        _without_rule(swept),
        _out_of_memory(swept),
    ]
    return [reason for reason in reasons if reason]


def policy_doubts(
    change: Estimate, test: PolicyTest | None, recorded: Records | None, *, alike: bool
) -> list[str]:
    """Why E may not be the scored policy's, once and by the best evidence, with its remedy.

    What E records says most about the cause; without records, or if they are the checkpoint's but
    for rounding, the tests of the draws speak.

    Args:
        change: from `entropy_change`.
        test: from `policy_test`, if it was made.
        recorded: what E's records are, if not the checkpoint's.
        alike: whether E records the checkpoint's own log-probabilities.
    """
    if recorded is None or recorded.cause == "rounding":
        reason = another_policy(change, test)
        if reason and alike:
            reason += f" {_UNSEEN}"
        return [reason] if reason else []
    remedy = "ample E from this checkpoint, or weight it by what it records with off_policy=True."
    if recorded.cause == "sampling":
        settings = json.dumps(recorded.settings())
        remedy = f'If it was sampled so, say in its lines "sampling": {settings}. If not, s{remedy}'
        fault = "an engine took them before its temperature and truncation"
    else:
        remedy = f"S{remedy}"
        fault = "shifted by a token, in another unit, of another file"
    if test is not None and not test.rejects and not test.weak:
        remedy += (
            f" But its draws pass the policy test {test.evidence()}, which sees large differences. "
            f"If the records are at fault instead ({fault}), E is right as it is, and "
            "off_policy=True is wrong."
        )
    return [f"E was not sampled from this policy, by its records. {recorded} {remedy}"]


def _secant(setup: Setup, plan: Plan) -> str:
    eta = slope_eta(setup, plan)
    if eta is None:
        return ""
    return (
        f"{setup.checkpoint.model.false_derivative}. The step is the one that the trainer takes, "
        f"and the slope is the secant of the changes at plus and minus {eta:.1e}, whose error is "
        "of second order in that. Derivatives (taylor, pullback) are refused: train an adapter "
        "that detaches nothing, such as plain LoRA, if you need them."
    )


def _below_rounding(swept: Sweep, rounded: Rounding | None) -> str:
    if rounded is None or rounded.floor <= min(eta for eta in swept.etas.abs().tolist() if eta):
        return ""
    return (
        f"rounding drowns the change below eta = {rounded.floor:.2g}. Use change='increment' "
        "in full precision, or load the checkpoint with dtype=torch.float64."
    )


def _out_of_memory(swept: Sweep) -> str:
    if not swept.shrunk:
        return ""
    return (
        f"memory ran out {len(swept.shrunk)} times in the sweep, first: {swept.shrunk[0]}. The "
        "results are as good; pass a smaller tokens= to save the time."
    )


def _without_rule(swept: Sweep) -> str:
    if not swept.fallbacks:
        return ""
    return (
        f"there is no increment rule for {', '.join(swept.fallbacks)}: values were subtracted "
        "there, with rounding. Load the checkpoint with dtype=torch.float64, or in Python, call "
        "sweep with rules= for them."
    )


def _guessed_divisor(setup: Setup, recipe: Recipe) -> str:
    if recipe.aggregate != "constant" or setup.settings.max_length is not None:
        return ""
    return (
        f"U's longest response, {setup.divisor} tokens, was taken as the constant that the loss is "
        "divided by. The saved moments are in the run's own unit: pass max_length=, its longest "
        "allowed completion."
    )


def _no_gradient(plan: Plan, recipe: Recipe) -> str:
    """Whether v is nothing but what the optimizer remembers."""
    update, gradient = plan.update, float(norm(plan.grads))
    largest = float(update.reward.abs().nan_to_num(0.0).max())
    # A mean of equal rewards is off by a rounding error.
    blank = bool((update.advantage.abs() <= 1e-12 * max(largest, 1.0)).all())
    if gradient and not blank:
        return ""
    cause = "every token's ratio is clipped, or the loss does not reach a parameter"
    if blank:
        cause = (
            "all advantages are 0, since no group has responses with different rewards"
            if recipe.baseline in ("mean", "loo")
            else "all advantages are 0"
        )
    rest = " but for that of the KL penalty" if gradient and recipe.beta else ""
    return (
        f"U causes no gradient{rest}: {cause}. The update is the optimizer's momentum and weight "
        "decay alone, and the change is theirs. Give U groups whose rewards differ, in complete "
        "groups."
    )


def _equal_advantages(update: Batch, recipe: Recipe) -> str:
    """Whether advantages were given that compare nothing."""
    first = float(update.advantage[0])
    same = bool((update.advantage == first).all())
    if recipe.baseline not in ("mean", "loo") or not same or first == 0 or update.n < 2:
        return ""
    return (
        f"all advantages of U are {first:g}: no response is compared with another, as the recipe "
        "does. Likely rewards, or placeholders, were written as advantages. Write rewards, or "
        "advantages less their baseline."
    )


def _mixed_groups(plan: Plan, recipe: Recipe) -> str:
    """Whether rewards are compared across prompts."""
    if recipe.baseline not in ("mean", "loo") and recipe.scale != "group":
        return ""
    pairs = set(zip(plan.update.group.tolist(), prompts_of(plan.update), strict=True))
    mixed = [group for group, n in Counter(group for group, _ in pairs).items() if n > 1]
    if not mixed:
        return ""
    return (
        f"{len(mixed)} groups of U hold different prompts, the first is group {min(mixed)}: their "
        "rewards were compared across prompts. Give every prompt a group of its own, or leave "
        "group out of U's lines, where equal prompts share one."
    )


def _uneven_groups(update: Batch) -> str:
    """Whether rows of U seem to be missing: most groups have one size, and others another."""
    groups, counts = update.group.unique(return_counts=True)
    sizes, often = counts.unique(return_counts=True)
    usual = int(sizes[often == often.max()].max())
    odd = groups[counts != usual]
    if not len(odd) or 2 * len(odd) > len(groups):
        return ""
    first = int(odd[0])
    return (
        f"{len(odd)} of U's {len(groups)} groups do not have the usual {usual} rows; group {first} "
        f"has {int((update.group == first).sum())}. Likely rows of U are missing, or groups were "
        "merged: the run's own step had another baseline and another mean. Give U whole."
    )


def _update_from_elsewhere(plan: Plan, recipe: Recipe, *, truncated: bool) -> str:
    """Whether U was sampled from a policy that is not the checkpoint's.

    `truncated` says that U's lines state top-k, top-p or min-p.
    """
    update = plan.update
    impossible = update.response & plan.logp.isneginf()
    if impossible.any():
        return (
            f"{int(impossible.sum())} tokens of U have probability 0 under the sampling settings: "
            "U was sampled under others, or from another model, and their loss has no gradient. "
            "Sample U from this checkpoint under its settings."
        )
    gap = (update.old_logp - plan.logp)[update.response]
    within = gap.mean() > KEPT_NATS and (truncated or gap.min() > -KEPT_NATS)
    if within and recipe.ratio != "none":
        return (
            f"U's recorded log-probabilities are {float(gap.mean()):.2g} nats a token above the "
            "loss's on average, as those are that are normalised within top-k, top-p or min-p. The "
            "loss is normalised over all tokens, as TRL's is, so its ratios are below 1. If the "
            "run's own step was on policy, leave old_logp out; if its loss is normalised like "
            "them, in Python, pass update_sampling=, how U was drawn."
        )
    off = float(gap.abs().mean())
    if not off > ENGINE_NATS:
        return ""
    share = float(clipped(plan.logp, update, recipe)[update.response].double().mean())
    clips = "" if recipe.ratio == "none" else f", {share:.0%} of its tokens are clipped"
    return (
        f"U's recorded log-probabilities differ from the checkpoint's by {off:.2g} nats a token on "
        f"average{clips}: U was sampled from another policy, such as one some steps before, or "
        "under other sampling settings. If the run's own step was on policy, sample U from this "
        "checkpoint, or leave old_logp out."
    )


def _shared_rows(update: Batch, evaluation: Batch, swept: Sweep) -> str:
    """Whether E holds rows of U, more than two samples of one policy would share by chance."""
    here, other = evaluation.row_hashes(), update.row_hashes()
    shared = torch.isin(here, other)
    prompts = Counter(prompts_of(update))
    draws = torch.tensor([float(prompts[prompt]) for prompt in prompts_of(evaluation)])
    chance, telling = chance_of_repeat(evaluation, swept.base.logp, draws)
    expected = float(chance[telling].sum())
    same = torch.equal(here.sort().values, other.sort().values)
    if not same and int((shared & telling).sum()) <= 2 + 3 * expected:
        return ""
    return (
        f"{int(shared.sum())} of E's {evaluation.n} rows stand in U too: the step is judged on "
        "rows that it was made from, which it changes more than others. Sample E anew, apart from "
        "U."
    )


def _another_optimizer(checkpoint: Checkpoint) -> str:
    """Whether the optimizer has taken another number of steps than the trainer."""
    steps = max(float(count) for count in checkpoint.state.count.values())
    said = checkpoint.step
    if not steps or not said or abs(steps - said) <= STEPS_OFF * max(steps, said):
        return ""
    return (
        f"the optimizer's state has taken {steps:.0f} steps, but trainer_state.json says {said}. "
        "Likely optimizer.pt is of another checkpoint, and so are the moments that the step is "
        "made of: take all files from one. If the run started its optimizer anew, all is right."
    )


def _extrapolated(name: str, batch: Batch, model: Model) -> str:
    """Whether rows are longer than the model was made for."""
    longer = rows_beyond(batch, model)
    if not len(longer):
        return ""
    row = int(longer[0])
    return (
        f"{len(longer)} rows of {name} are longer than the {positions(model.skeleton)} positions "
        f"that the model was made for; row {row} has {int(batch.attention[row].sum())} tokens. The "
        "model extrapolates there, and other software may do it otherwise. Use shorter rows."
    )
