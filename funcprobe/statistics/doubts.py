"""When an estimate deserves doubt, and what to do about it."""

import torch

from .results import Estimate
from .weights import khat_limit


def doubts(change: Estimate) -> list[str]:
    """Why an estimate should not be trusted as it stands, each reason with its remedy."""
    reasons = [
        _one_prompt(change),
        _heavy_tail(change),
        _few_effective_rows(change),
        _another_policy(change),
        _clipped(change),
    ]
    return [reason for reason in reasons if reason]


def _one_prompt(change: Estimate) -> str:
    if change.psi.shape[-1] > 1:
        return ""
    return "no error bars: all rows share one prompt. Evaluate on several prompts."


def _heavy_tail(change: Estimate) -> str:
    limit = khat_limit(change.rows)
    heavy = change.etas[change.khat > limit]
    if not len(heavy):
        return ""
    return (
        f"k-hat above {limit:.2f} at eta = {float(heavy.abs().min()):.3g} and beyond: a "
        "few responses carry the estimate. Trust smaller eta, or sample more responses."
    )


def _few_effective_rows(change: Estimate) -> str:
    scarce = change.etas[change.ess < change.rows / 10]
    if not len(scarce):
        return ""
    return (
        f"effective sample size below a tenth of the rows at eta = "
        f"{float(scarce.abs().min()):.3g} and beyond. Sample the shifted policy there."
    )


def _another_policy(change: Estimate) -> str:
    # At larger spreads the test raises false alarms; see `mean_weight_z`.
    z = torch.where(change.spread < 0.5, change.mean_weight_z, 0.0).nan_to_num(0.0)
    if not len(z) or float(z.abs().max()) <= 4:
        return ""
    return (
        f"the mean weight is not 1 (z = {float(z[z.abs().argmax()]):+.1f}): E was not sampled "
        "from the policy that is scored. Sample E from it, or pass its log-probabilities as "
        "behaviour=."
    )


def _clipped(change: Estimate) -> str:
    if not (change.clipped > 0).any():
        return ""
    worst = int(change.clipped.argmax())
    return (
        f"{float(change.clipped[worst]):.1%} of the weights were clipped at eta = "
        f"{float(change.etas[worst]):.3g}, which moved the estimate by "
        f"{float(change.adjusted[worst]):+.2g}: it is pulled towards the base. Raise clip=, or "
        "trust smaller eta."
    )
