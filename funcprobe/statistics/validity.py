"""How far the linear law holds, and when an estimate deserves doubt."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .results import Estimate, Series
from .uncertainty import standard_error


class Ratio(NamedTuple):
    """``r(eta) = Delta H / (eta slope) - 1``: 0 where the line holds; nan at eta = 0."""

    value: Tensor  # [K]
    psi: Tensor  # [K, G] joint influence values of the change and the slope

    @property
    def stderr(self) -> Tensor:
        """[K] standard errors, clustered by prompt; the noise that both share cancels."""
        return standard_error(self.psi)


def ratio(change: Estimate, series: Series) -> Ratio:
    """The measured change relative to the line, with its joint error.

    ``psi = psi_change / (eta slope) - Delta H psi_slope / (eta slope^2)`` (the delta method).
    Meaningless where the slope itself is within its error of 0.

    Args:
        change: from `entropy_change`.
        series: from `entropy_series`, of the same rows and unit.
    """
    eta = torch.where(change.etas == 0, torch.nan, change.etas)
    slope = series.value[0]
    line = eta * slope
    psi = change.psi / line[:, None] - (change.value / (line * slope))[:, None] * series.psi[0]
    return Ratio(change.value / line - 1, psi)


def reach(law: Ratio, etas: Tensor, *, within: float) -> tuple[float | None, float | None]:
    """Where pointwise 95% intervals of the ratio say that the line holds, and that it does not.

    Args:
        law: from `ratio`.
        etas: [K] the learning rates it is of.
        within: the tolerance on ``|r|``.

    Returns:
        The largest ``|eta|`` whose interval, as every smaller one's, lies within; and the smallest
        beyond it whose interval lies outside. None where there is none.
    """
    low, high = law.value - 1.96 * law.stderr, law.value + 1.96 * law.stderr
    inside = (low > -within) & (high < within)
    outside = (low > within) | (high < -within)
    holds, unbroken = None, True
    for k in etas.abs().argsort().tolist():
        if etas[k] == 0:
            continue
        unbroken = unbroken and bool(inside[k])
        if unbroken:
            holds = abs(float(etas[k]))
        elif outside[k]:
            return holds, abs(float(etas[k]))
    return holds, None


def doubts(change: Estimate) -> list[str]:
    """Why an estimate should not be trusted as it stands, each reason with its remedy."""
    found = []
    n = change.rows
    if change.psi.shape[-1] < 2:
        found.append("no error bars: all rows share one prompt. Evaluate on several prompts.")
    if n > 10:
        limit = min(1 - 1 / math.log10(n), 0.7)
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
    return found
