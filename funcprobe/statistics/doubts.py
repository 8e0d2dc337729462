"""When an estimate deserves doubt, and what to do about it."""

import math

import torch
from torch import Tensor

from .policy_test import PolicyTest
from .results import Estimate, Series
from .tails import SKEW_LIMIT, heavy_weights, lopsided
from .uncertainty import t_pvalue
from .weights import khat_limit

_SPREAD = 0.1  # of log weights, up to which the test of their mean holds its level
MEAN_WEIGHT_LEVEL = 0.0025  # of that test; both alarm below 1%, with the policy test's 0.005

_REMEDY = (
    "Sample E from this checkpoint, say how it was drawn by the key sampling of its lines, or "
    "weight it by the log-probabilities that it records with off_policy=True."
)


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


def another_policy(change: Estimate, test: PolicyTest | None = None) -> str:
    """Why the rows may not be draws of the scored policy, with the remedy; "" if no test says so.

    Two tests together give a false alarm in at most 1% of correct batches: `policy_test`, and
    Student's t by prompt of the mean weight at the largest change whose log weights spread by less
    than 0.1.

    Args:
        change: from `entropy_change`.
        test: from `policy_test`; None if the rows are weighted by recorded log-probabilities.
    """
    if test is not None and test.rejects:
        return f"E was not drawn from the policy that is scored {test.evidence()}: {_cause(test)}"
    p, t = _mean_weight_p(change)
    if not p < MEAN_WEIGHT_LEVEL:
        return ""
    evidence = f"(t = {t:+.1f}, df = {change.psi.shape[-1] - 1}, p = {p:.1g})"
    if change.off_policy:
        return (
            f"the mean weight is not 1 {evidence}: the recorded log-probabilities are not those "
            "that E was drawn with. Record the sampler's, at its temperature and truncation, or "
            "sample E from the scored policy."
        )
    return (
        f"the mean weight is not 1 {evidence}: E was not drawn from the policy that is scored. "
        f"{_REMEDY}"
    )


def _cause(test: PolicyTest) -> str:
    """What drew such rows, and the remedy."""
    if test.nats < 0:
        how = "likelier than its draws, as at a lower temperature, with top-p or greedy"
    else:
        how = (
            "less likely than its draws, as at a higher temperature, from another model, or where "
            "the prompts are not those of sampling (another chat template, a BOS twice or missing)"
        )
    return f"its responses are {how}. {_REMEDY}"


def _mean_weight_p(change: Estimate) -> tuple[float, float]:
    """The p-value of mean weight = 1 and its t, at the largest eta of a small spread; else nan."""
    small = (change.spread < _SPREAD) & change.mean_weight_z.isfinite()
    if not small.any():
        return math.nan, math.nan
    k = int(torch.where(small, change.spread, -1.0).argmax())
    t = float(change.mean_weight_z[k])
    return t_pvalue(t, change.psi.shape[-1] - 1), t
