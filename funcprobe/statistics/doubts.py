"""When an estimate deserves doubt, and what to do about it."""

import torch
from torch import Tensor

from .results import Estimate, Series
from .tails import SKEW_LIMIT, heavy_weights, lopsided
from .weights import khat_limit


def doubts(change: Estimate, series: Series | None = None) -> list[str]:
    """Why an estimate should not be trusted as it stands, each reason with its remedy.

    Args:
        change: from `entropy_change`.
        series: from `entropy_series`, whose slope is doubted too if it is given.
    """
    reasons = [
        _one_prompt(change),
        _heavy_tail(change),
        _lopsided_slope(series),
        _lopsided_change(change, series),
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
    heavy = heavy_weights(change.khat, change.ess, change.rows)
    if not heavy.any():
        return ""
    return (
        f"k-hat above {khat_limit(change.rows):.2f} at {_from(change, heavy)}: a few responses "
        f"carry the estimate. {_remedy(change, heavy)}, or sample more responses."
    )


def _lopsided_slope(series: Series | None) -> str:
    if series is None or not lopsided(series.skew[0]):
        return ""
    skew = float(series.skew[0])
    return (
        f"the slope hangs on a few responses (skew {skew:+.2f}, beyond {SKEW_LIMIT}), and so does "
        f"the change at small eta: {_misses(skew)}. Sample more responses; a smaller eta does not "
        "help."
    )


def _lopsided_change(change: Estimate, series: Series | None) -> str:
    leaning = lopsided(change.skew) & ~heavy_weights(change.khat, change.ess, change.rows)
    if not leaning.any() or (series is not None and lopsided(series.skew[0])):
        return ""
    first = _least(change, leaning)
    skew = float(change.skew[first])
    return (
        f"skew {skew:+.2f}, beyond {SKEW_LIMIT}, at {_from(change, leaning)}: a few responses "
        f"carry the error, and {_misses(skew)}. Trust smaller eta, or sample more responses."
    )


def _few_effective_rows(change: Estimate) -> str:
    scarce = change.ess < change.rows / 10
    if not scarce.any():
        return ""
    remedy = "Sample the shifted policy there"
    if _at_base(change, scarce):
        remedy = "Sample E from the policy that is scored"
    return f"effective sample size below a tenth of the rows at {_from(change, scarce)}. {remedy}."


def _misses(skew: float) -> str:
    """On which side an interval misses too often."""
    side = "above" if skew > 0 else "below"
    return f"the truth lies {side} a 95% interval more than twice as often as it should"


def _remedy(change: Estimate, doubtful: Tensor) -> str:
    """What helps where weights are doubtful: a smaller eta, unless base weights are to blame."""
    if _at_base(change, doubtful):
        return "The rows are of another policy: sample E from the one that is scored"
    return "Trust smaller eta"


def _at_base(change: Estimate, doubtful: Tensor) -> bool:
    """Whether weights are doubtful at the smallest eta, and base weights are to blame for it."""
    return change.off_policy and bool(doubtful[change.etas.abs().argmin()])


def _least(change: Estimate, doubtful: Tensor) -> int:
    """The index of the doubtful point with the smallest ``|eta|``."""
    return int(torch.where(doubtful, change.etas.abs(), torch.inf).argmin())


def _from(change: Estimate, doubtful: Tensor) -> str:
    """Where an estimate is doubtful, in words."""
    first = abs(float(change.etas[_least(change, doubtful)]))
    return f"eta = {first:.3g} and beyond"


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
