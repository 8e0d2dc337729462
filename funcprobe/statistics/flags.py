"""When an estimate deserves doubt, and what to do about it."""

import torch

from .results import Estimate
from .weights import khat_limit


def doubts(change: Estimate) -> list[str]:
    """Why an estimate should not be trusted as it stands, each reason with its remedy."""
    found = []
    n = change.rows
    if change.psi.shape[-1] < 2:
        found.append("no error bars: all rows share one prompt. Evaluate on several prompts.")
    limit = khat_limit(n)
    heavy = change.etas[change.khat > limit]
    if len(heavy):
        found.append(
            f"k-hat above {limit:.2f} at eta = {float(heavy.abs().min()):.3g} and beyond: a "
            "few responses carry the estimate. Trust smaller eta, or sample more responses."
        )
    scarce = change.etas[change.ess < n / 10]
    if len(scarce):
        found.append(
            f"effective sample size below a tenth of the rows at eta = "
            f"{float(scarce.abs().min()):.3g} and beyond. Sample the shifted policy there."
        )
    # At larger spreads the test raises false alarms.
    z = torch.where(change.spread < 0.5, change.mean_weight_z, 0.0).nan_to_num(0.0)
    if len(z) and float(z.abs().max()) > 4:
        found.append(
            f"the mean weight is not 1 (z = {float(z[z.abs().argmax()]):+.1f}): E was not sampled "
            "from the policy that is scored. Sample E from it, or pass its log-probabilities as "
            "behaviour=."
        )
    if (change.clipped > 0).any():
        worst = int(change.clipped.argmax())
        found.append(
            f"{float(change.clipped[worst]):.1%} of the weights were clipped at eta = "
            f"{float(change.etas[worst]):.3g}, which moved the estimate by "
            f"{float(change.adjusted[worst]):+.2g}: it is pulled towards the base. Raise clip=, or "
            "trust smaller eta."
        )
    return found
