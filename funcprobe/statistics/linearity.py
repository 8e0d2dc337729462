"""How far the linear law holds: the change over its line, a band around it, a verdict."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .results import Estimate, Series, check_same_estimator
from .uncertainty import band, standard_error, t_quantile
from .weights import khat_limit


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
        series: from `entropy_series`, of the same rows, unit and weights.

    Raises:
        ValueError: the two are not of one estimator on the same prompts.
    """
    check_same_estimator("ratio", change, series)
    eta = torch.where(change.etas == 0, torch.nan, change.etas)
    slope = series.value[0]
    line = eta * slope
    psi = change.psi / line[:, None] - (change.value / (line * slope))[:, None] * series.psi[0]
    return Ratio(change.value / line - 1, psi)


class Linearity(NamedTuple):
    """How far the line through 0 holds. Prints as a sentence."""

    etas: Tensor  # [K]
    ratio: Tensor  # [K] change / (eta slope) - 1
    psi: Tensor  # [K, G] its influence values, of change and slope jointly
    low: Tensor  # [K] the band, simultaneous over the points that are not excluded; nan there
    high: Tensor  # [K]
    excluded: tuple[str, ...]  # [K] why a point was left out; "" where it was not
    verdicts: tuple[str, ...]  # [K] "holds" | "fails" | "inconclusive", by the band at that point
    holds: float  # the line holds up to this |eta|; 0 if nowhere
    fails: float  # and fails from this |eta|; inf if nowhere
    verdict: str  # "holds" at all points, "fails" at some, or "inconclusive"
    tolerance: float
    level: float

    @property
    def stderr(self) -> Tensor:
        """[K] standard errors of `ratio`, clustered by prompt."""
        return standard_error(self.psi)

    @property
    def eta_max(self) -> tuple[float, float]:
        """The largest |eta| at which the line holds lies between these: ``(holds, fails)``."""
        return self.holds, self.fails

    def describe(self, unit: float = 1.0, name: str = "") -> str:
        """The verdict in a sentence, etas over `unit`, whose name follows them."""

        def at(eta: float) -> str:
            return f"{eta / unit:.4g}{name}"

        used = sum(not reason for reason in self.excluded)
        text = f"The line is within {self.tolerance:.0%} "
        text += f"up to |eta| = {at(self.holds)}" if self.holds else "nowhere for sure"
        if self.verdict == "fails":
            text += f", surely off it from {at(self.fails)}"
        elif self.verdict == "inconclusive":
            text += ", inconclusive beyond" if self.holds else ": inconclusive"
        text += f" ({self.level:.0%} band over {used} points)."
        left_out: dict[str, list[str]] = {}
        for eta, reason in zip(self.etas.tolist(), self.excluded, strict=True):
            if reason and eta:
                left_out.setdefault(reason, []).append(at(eta))
        reasons = [f"{_listed(found)} ({reason})" for reason, found in left_out.items()]
        return text + (f" Left out: {'; '.join(reasons)}." if reasons else "")

    def __str__(self) -> str:
        return self.describe()


def _listed(words: list[str]) -> str:
    return ", ".join(words) if len(words) < 4 else f"{words[0]} to {words[-1]}"


def linearity(
    change: Estimate,
    series: Series,
    *,
    tolerance: float = 0.1,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    floor: float | None = None,
) -> Linearity:
    r"""Up to which eta the change stays within a tolerance of the line through its slope.

    ``r(eta) = Delta H / (eta slope) - 1`` with joint influence values, in which noise that change
    and slope share cancels, and a band around it that covers all points at once (see `band`). The
    line holds up to the largest ``|eta|`` whose whole band, and that of every smaller one, lies
    within the tolerance; it fails from the first whose whole band lies outside; between the two
    nothing is sure. Both signs of eta must hold, each from 0 outwards.

    Left out, with the reason: points whose k-hat is above its limit, points below `floor`, and all
    of them where the slope is within its error of 0 or there is one prompt. The band is of first
    order in the noise (delta method), its level is approximate below about 30 prompts.

    Args:
        change: from `entropy_change`.
        series: from `entropy_series`, of the same rows, unit and weights.
        tolerance: on ``|r|``.
        level: of the band and of the slope's test.
        draws, seed: of the band's multiplier bootstrap.
        floor: ``|eta|`` below which rounding drowns the change; none if not given.

    Raises:
        ValueError: tolerance or level out of range; what `ratio` raises.
    """
    if not (tolerance > 0 and 0 < level < 1):
        raise ValueError(
            f"linearity: a positive tolerance and a level in (0, 1) were expected, not {tolerance} "
            f"and {level}. Ten percent is tolerance=0.1."
        )
    law = ratio(change, series)
    excluded = _excluded(change, series, level, floor)
    used = torch.tensor([not reason for reason in excluded])
    half = torch.full_like(law.value, torch.nan)
    if used.any():
        half[used] = band(law.psi[used], level=level, draws=draws, seed=seed)
    low, high = law.value - half, law.value + half
    inside = (low >= -tolerance) & (high <= tolerance)
    outside = (low > tolerance) | (high < -tolerance)
    verdicts = tuple(
        "holds" if i else "fails" if o else "inconclusive"
        for i, o in zip(inside.tolist(), outside.tolist(), strict=True)
    )
    holds, fails = _reach(change.etas, used, inside, outside)
    verdict = "inconclusive"
    if used.any() and inside[used].all():
        verdict = "holds"
    elif outside.any():
        verdict = "fails"
    return Linearity(
        change.etas,
        law.value,
        law.psi,
        low,
        high,
        excluded,
        verdicts,
        holds,
        fails,
        verdict,
        tolerance,
        level,
    )


def _reach(etas: Tensor, used: Tensor, inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """Where the line holds and where it fails, the smaller over both signs of eta."""
    holds, fails = [], []
    for sign in (1, -1):
        side = (used & (etas * sign > 0)).nonzero().flatten()
        if not len(side):
            continue
        side = side[etas[side].abs().argsort()]
        size = etas[side].abs()
        run = inside[side].long().cumprod(0).sum()
        holds.append(float(size[run - 1]) if run else 0.0)
        off = outside[side].nonzero().flatten()
        fails.append(float(size[off[0]]) if len(off) else math.inf)
    return min(holds, default=0.0), min(fails, default=math.inf)


def _excluded(
    change: Estimate, series: Series, level: float, floor: float | None
) -> tuple[str, ...]:
    everywhere = ""
    g = change.psi.shape[-1]
    slope, error = abs(float(series.value[0])), float(series.stderr[0])
    if g < 2:
        everywhere = "one prompt has no error"
    elif not slope > t_quantile(level, g - 1) * error:
        everywhere = "the slope is within its error of 0: more prompts are needed"
    limit = khat_limit(change.rows)
    reasons = []
    for eta, khat in zip(change.etas.tolist(), change.khat.tolist(), strict=True):
        reason = everywhere
        if eta == 0:
            reason = "eta = 0"
        elif not reason and floor is not None and abs(eta) < floor:
            reason = f"below the noise floor {floor:.2g}"
        elif not reason and khat > limit:
            reason = f"k-hat above {limit:.2f}"
        reasons.append(reason)
    return tuple(reasons)
