"""What finite precision leaves in an entropy change, measured on a sample of rows."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .change import entropy_covector
from .estimators import Estimator, Rows
from .inputs import Scored, quantity
from .results import Series
from .tables import html_table

SHARE = 0.1  # a change means nothing where its rounding error exceeds this part of it


class Rounding(NamedTuple):
    """The rounding error of an entropy change, and the eta below which it drowns the change."""

    error: float  # standard deviation of the change's error at `eta`, in the change's unit
    relative: float  # the same over the predicted change there
    eta: float
    floor: float  # |eta| below which the error exceeds a tenth of the change; 0 if none, inf if all
    rows: int  # the number of rows that it was measured on
    proportional: bool  # whether the error grows with eta, or is the same at each

    def at(self, etas: Tensor) -> Tensor:
        """The error at `etas`, [K]: constant for differences, proportional for increments."""
        etas = torch.as_tensor(etas, dtype=torch.float64).abs()
        if self.proportional:
            return self.error * etas / abs(self.eta)
        return torch.where(etas == 0, 0.0, torch.full_like(etas, self.error))

    def __str__(self) -> str:
        text = f"Rounding: +- {self.relative:.1e} of the change at eta = {self.eta:.3g}"
        if self.floor == 0:
            return text + ", and at every other."
        if self.floor == torch.inf:
            return text + ", and at every other: too much at any eta."
        return text + f"; it drowns the change below eta = {self.floor:.2g}."

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        columns = ("eta", "rounding error", "over the change", "floor", "rows")
        numbers = (f"{x:.3g}" for x in (self.eta, self.error, self.relative, self.floor))
        return html_table(columns, [[*numbers, str(self.rows)]])


def rounding(
    scores: Scored,
    off: Scored,
    *,
    index: Tensor,
    batch: Rows,
    series: Series,
    eta: float,
    proportional: bool,
    behaviour: Tensor | None = None,
) -> Rounding:
    r"""The rounding error of a change, from how far its scores are off on a sample of the rows.

    With c_i the part of row i in ``<covector, off>``, the covector being the estimate's gradient
    in the scores, the estimate is off by ``sum_i c_i`` over all N rows: from n sampled ones

    .. math:: \text{error}^2 = N \, \mathrm{var}(c) + N^2 \bar c^2.

    The second term is an error that all rows share. It is added only where the mean is more than
    three of its own standard errors from 0. The error is of first order in the change. A difference
    of values is off by as much at every eta, an increment in proportion to eta.

    Args:
        scores: at the base policy, arrays [N, R].
        off: how far the changes at `eta` of rows `index` are from the same changes computed in
            another way, arrays [n, R].
        index: [n] the sampled rows.
        batch: of the N rows.
        series: from `entropy_series`, of the estimator whose change is meant.
        eta: where the changes were computed, not 0.
        proportional: whether the error grows with eta.
        behaviour: the series' own, which is used anyway; another one is refused.

    Returns:
        The error at `eta`, its ratio to the change there, and the eta below which it is too large.

    Raises:
        ValueError: eta is 0, fewer than two rows were sampled, or the series is of another quantity
            or behaviour.
    """
    n, rows = len(index), len(batch.group)
    if eta == 0 or n < 2:
        raise ValueError(
            f"rounding: an eta other than 0 and two or more rows were expected, not {eta} and {n}. "
            "Sample at least two rows at an eta that moves them."
        )
    parts = _parts(scores, off, index, batch, _estimator(scores, series, behaviour))
    error = _error(parts, rows)
    change = abs(eta) * abs(float(series.value[0]))
    relative = error / change if change else torch.inf if error else 0.0
    if proportional:
        floor = 0.0 if relative <= SHARE else torch.inf
    else:
        floor = relative / SHARE * abs(eta)
    return Rounding(error, relative, eta, floor, n, proportional)


def _estimator(scores: Scored, series: Series, behaviour: Tensor | None) -> Estimator:
    """The series' estimator, unless the scores or the behaviour are those of another."""
    if quantity(scores) != series.quantity:
        raise ValueError(
            f"rounding: the scores are of the {quantity(scores)}, the series of the "
            f"{series.quantity}. Use one scorer for both."
        )
    if behaviour is not None:
        differing = series.estimator.differences(replace(series.estimator, behaviour=behaviour))
        if differing:
            raise ValueError(
                "rounding: the behaviour of the series was expected, it is "
                f"{differing['behaviour']}. Pass the same behaviour= to entropy_series, or leave "
                "it out here."
            )
    return series.estimator


def _parts(scores: Scored, off: Scored, index: Tensor, batch: Rows, estimator: Estimator) -> Tensor:
    """The part of each sampled row in ``<covector, off>``, [n] on the CPU."""
    covector = entropy_covector(
        scores,
        batch,
        weights=estimator.weights,
        per=estimator.per,
        behaviour=estimator.behaviour,
        control=estimator.control,
    )

    def part(name: str) -> Tensor:
        slope, error = getattr(covector, name), getattr(off, name)
        width = min(slope.shape[-1], error.shape[-1])
        slope = slope[index.to(slope.device), :width]
        return (slope.double() * error[..., :width].double()).sum(-1)

    return (part("logp") + part(quantity(scores))).cpu()


def _error(parts: Tensor, rows: int) -> float:
    """The standard deviation of a sum over all rows, from a sample of its terms [n]."""
    var, mean = float(parts.var()), float(parts.mean())
    shared = mean if mean**2 > 9 * var / len(parts) else 0.0
    return (rows * var + (rows * shared) ** 2) ** 0.5
