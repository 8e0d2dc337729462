"""How far the linear law holds: the change over its line, a band around it, a verdict."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .results import Estimate, Series, check_same_estimator
from .tables import html_table, shortened
from .tails import SKEW_LIMIT, heavy_weights, lopsided
from .uncertainty import band, standard_error, t_quantile
from .weights import khat_limit

Verdict = Literal["holds", "fails", "inconclusive"]

# A point whose error times this stays within the tolerance holds whatever tail the error has.
_SAFE = 10


class Ratio(NamedTuple):
    """``r(eta) = Delta H / (eta slope) - 1``: 0 where the line holds; nan at eta = 0."""

    value: Tensor  # [K]
    psi: Tensor  # [K, G] joint influence values of the change and the slope

    @property
    def stderr(self) -> Tensor:
        """[K] standard errors, clustered by prompt; the noise that both share cancels."""
        return standard_error(self.psi)

    def _rows(self) -> list[tuple[str, str]]:
        pairs = zip(self.value.tolist(), self.stderr.tolist(), strict=True)
        return [(_percent(value), _percent(error).removeprefix("+")) for value, error in pairs]

    def __str__(self) -> str:
        return "\n".join(f"{value} +- {error} off the line" for value, error in self._rows())

    def __repr__(self) -> str:
        return "\n".join(shortened(str(self).splitlines(), "..."))

    def _repr_html_(self) -> str:
        return html_table(("off the line", "+-"), shortened(self._rows(), ("...", "...")))


def ratio(change: Estimate, series: Series) -> Ratio:
    """The measured change relative to the line, with its joint error.

    ``psi = psi_change / (eta slope) - Delta H psi_slope / (eta slope^2)`` (the delta method).
    It means nothing where the slope itself is within its error of 0.

    Args:
        change: from `entropy_change`.
        series: from `entropy_series`, of the same rows and the same estimator.

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
    """How far the line through 0 holds. It prints as a sentence."""

    etas: Tensor  # [K]
    ratio: Tensor  # [K] change / (eta slope) - 1
    psi: Tensor  # [K, G] its influence values, of change and slope jointly
    low: Tensor  # [K] the band, which covers all points at once; nan where one is excluded
    high: Tensor  # [K] its upper end
    excluded: tuple[str, ...]  # [K] why a point was left out; "" where it was not
    verdicts: tuple[Verdict, ...]  # [K] by the band at that point; "inconclusive" where left out
    holds: float  # the line holds up to this |eta|; 0 if nowhere
    fails: float  # and fails from this |eta|; inf if nowhere
    verdict: Verdict  # "holds" at all points, "fails" at some, or "inconclusive"
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

    def describe(self, unit: float = 1.0, name: str = "", *, excluded: bool = True) -> str:
        """The verdict in a sentence.

        Args:
            unit: etas are shown in multiples of it.
            name: of the unit; it follows each eta.
            excluded: whether a second sentence says which points were left out, and why.
        """

        def at(eta: float) -> str:
            return f"{eta / unit:.4g}{name}"

        if not self.etas.any():
            return "Nothing can be said of the line: no eta but 0 was measured."
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
        if not excluded or not left_out:
            return text
        reasons = (f"{_listed(etas)} ({reason})" for reason, etas in left_out.items())
        return f"{text} Left out: {'; '.join(reasons)}."

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        numbers = (self.etas, self.ratio, self.stderr, self.low, self.high)
        rows = [
            (
                f"{eta:.3g}",
                *(_percent(value) for value in values),
                reason or verdict,
            )
            for (eta, *values), reason, verdict in zip(
                zip(*(x.tolist() for x in numbers), strict=True),
                self.excluded,
                self.verdicts,
                strict=True,
            )
        ]
        columns = ("eta", "off the line", "+-", "band from", "to", "verdict")
        return html_table(columns, shortened(rows, ("...",) * len(columns)), str(self))


def _percent(value: float) -> str:
    return f"{value:+.2%}" if math.isfinite(value) else "-"


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
    r"""Up to which eta the change stays within a tolerance of the line with its slope.

    ``r(eta) = Delta H / (eta slope) - 1`` has joint influence values, in which noise that change
    and slope share cancels, and a band around it that covers all points at once (see `band`). The
    line holds up to the largest ``|eta|`` whose whole band, and that of every smaller one, lies
    within the tolerance; it fails from the first whose whole band lies outside; between the two
    nothing is sure. Both signs of eta must hold, each from 0 outwards.

    Points at eta = 0, below `floor`, or where the change is exactly 0 because eta underflowed are
    left out, and so are all points if the slope is within its error of 0 or there is one prompt;
    `excluded` says why. Points are also left out where a few responses carry the change
    (`heavy_weights`) or its error or that of the slope (`skewness`), unless the ratio is within the
    tolerance by ten of its standard errors: a tail that hardly moves it cannot turn the verdict.
    The band is of first order in the noise (delta method), and its level is approximate below about
    30 prompts.

    Args:
        change: from `entropy_change`.
        series: from `entropy_series`, of the same rows and the same estimator.
        tolerance: on ``|r|``.
        level: of the band and of the slope's test.
        draws, seed: of the band's multiplier bootstrap.
        floor: ``|eta|`` below which rounding drowns the change; None if there is none.

    Returns:
        The ratio with its band, the verdicts, and up to where the line holds.

    Raises:
        ValueError: `tolerance` or `level` is out of range, or `ratio` raises.
    """
    if not (tolerance > 0 and 0 < level < 1):
        raise ValueError(
            f"linearity: a positive tolerance and a level in (0, 1) were expected, not {tolerance} "
            f"and {level}. Ten percent is tolerance=0.1."
        )
    law = ratio(change, series)
    safe = law.value.abs() + _SAFE * law.stderr <= tolerance
    excluded = _excluded(change, series, level, floor, safe)
    used = torch.tensor([not reason for reason in excluded])
    half = torch.full_like(law.value, torch.nan)
    if used.any():
        half[used] = band(law.psi[used], level=level, draws=draws, seed=seed)
    low, high = law.value - half, law.value + half
    inside = (low >= -tolerance) & (high <= tolerance)
    outside = (low > tolerance) | (high < -tolerance)
    holds, fails = _reach(change.etas, used, inside, outside)
    return Linearity(
        etas=change.etas,
        ratio=law.value,
        psi=law.psi,
        low=low,
        high=high,
        excluded=excluded,
        verdicts=_verdicts(inside, outside),
        holds=holds,
        fails=fails,
        verdict=_overall(used, inside, outside),
        tolerance=tolerance,
        level=level,
    )


def _excluded(
    change: Estimate, series: Series, level: float, floor: float | None, safe: Tensor
) -> tuple[str, ...]:
    """Why each point is left out, [K]; "" where it is not.

    Args:
        change, series, level, floor: as for `linearity`.
        safe: [K] bool, where no tail can turn the verdict.
    """
    everywhere = _undecidable(series, level)
    vanished = (change.value == 0) & (change.psi == 0).all(-1)
    reasons = []
    points = (change.etas.tolist(), vanished.tolist(), safe.tolist(), _tails(change, series))
    for eta, gone, sure, tail in zip(*points, strict=True):
        reason = everywhere or ("" if sure else tail)
        if eta == 0:
            reason = "eta = 0"
        elif not everywhere and gone:
            reason = "the change is exactly 0, since eta underflows"
        elif not everywhere and floor is not None and abs(eta) < floor:
            reason = f"below the noise floor {floor:.2g}"
        reasons.append(reason)
    return tuple(reasons)


def _tails(change: Estimate, series: Series) -> tuple[str, ...]:
    """Which tail makes each point doubtful, [K]; "" where none does."""
    weights = heavy_weights(change.khat, change.ess, change.rows).tolist()
    errors = lopsided(change.skew).tolist()
    slope = bool(lopsided(series.skew[0]))
    reasons = []
    for few_weights, few_errors in zip(weights, errors, strict=True):
        reason = "the slope hangs on a few responses" if slope else ""
        if few_weights:
            reason = f"k-hat above {khat_limit(change.rows):.2f}"
        elif few_errors and not slope:
            reason = f"skew beyond {SKEW_LIMIT}"
        reasons.append(reason)
    return tuple(reasons)


def _undecidable(series: Series, level: float) -> str:
    """Why nothing can be said of any point; "" if something can."""
    g = series.psi.shape[-1]
    if g < 2:
        return "one prompt has no error"
    slope, error = abs(float(series.value[0])), float(series.stderr[0])
    if not slope > t_quantile(level, g - 1) * error:
        return "the slope is within its error of 0: more prompts are needed"
    return ""


def _verdicts(inside: Tensor, outside: Tensor) -> tuple[Verdict, ...]:
    """The verdict at each point, [K]."""
    pairs = zip(inside.tolist(), outside.tolist(), strict=True)
    return tuple("holds" if i else "fails" if o else "inconclusive" for i, o in pairs)


def _overall(used: Tensor, inside: Tensor, outside: Tensor) -> Verdict:
    """The verdict over all points that are not left out."""
    if used.any() and inside[used].all():
        return "holds"
    return "fails" if outside.any() else "inconclusive"


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
