"""Doubts about a probe's results that only the probe itself can see, and what to do about them."""

from ..calculus.results import Sweep
from ..language.recipes import as_recipe
from ..statistics.doubts import another_policy
from ..statistics.policy_test import PolicyTest
from ..statistics.results import Estimate
from ..statistics.rounding import Rounding
from .setup import Setup


def probe_doubts(
    setup: Setup,
    swept: Sweep,
    rounded: Rounding | None,
    change: Estimate,
    policy: PolicyTest | None,
) -> list[str]:
    """Why a probe's results should not be trusted as they stand, each reason with its remedy."""
    reasons = [
        _recorded_otherwise(setup, swept) or another_policy(change, policy),
        _below_rounding(swept, rounded),
        _out_of_memory(swept),
        _without_rule(swept),
        _guessed_divisor(setup),
    ]
    return [reason for reason in reasons if reason]


def _recorded_otherwise(setup: Setup, swept: Sweep) -> str:
    evaluation = setup.evaluation
    off = (swept.base.logp.double() - evaluation.old_logp).abs()[evaluation.response]
    if setup.settings.off_policy or not (off > 0.05).any():
        return ""
    return (
        f"E's recorded log-probabilities differ from the checkpoint's by up to "
        f"{float(off[~off.isnan()].max()):.2g} nats a token: E was not sampled from this "
        "policy, or the base model, its precision or the sampling settings differ. Sample E "
        "from this checkpoint, or weigh it by what it records with off_policy=True."
    )


def _below_rounding(swept: Sweep, rounded: Rounding | None) -> str:
    if rounded is None or rounded.floor <= min(eta for eta in swept.etas.abs().tolist() if eta):
        return ""
    return (
        f"rounding drowns the change below eta = {rounded.floor:.2g}. Use change='increment' "
        "in full precision, or load the checkpoint in float64."
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
        "there, with rounding. Call sweep with rules= for them, or load the checkpoint in float64."
    )


def _guessed_divisor(setup: Setup) -> str:
    constant = as_recipe(setup.settings.recipe).aggregate == "constant"
    if not constant or setup.settings.max_length is not None:
        return ""
    return (
        f"U's longest response, {setup.divisor} tokens, was taken as the constant that the loss is "
        "divided by. The saved moments are in the run's own unit: pass max_length=, its longest "
        "allowed completion."
    )
