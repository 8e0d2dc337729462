"""What finite precision leaves in an entropy change, measured on a sample of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from .change import entropy_covector
from .inputs import Scored
from .results import Series

SHARE = 0.1  # a change means nothing where its rounding error exceeds this part of it


class Rounding(NamedTuple):
    """The rounding error of an entropy change, and the learning rate below which it drowns it."""

    error: float  # standard deviation of the change's error at `eta`, in the change's unit
    relative: float  # the same over the predicted change there
    eta: float
    floor: float  # |eta| below which the error exceeds a tenth of the change; 0 or inf: at every
    rows: int  # it was measured on

    def at(self, etas: Tensor) -> Tensor:
        """The error at `etas`, [K]: constant for differences, in proportion for increments."""
        etas = torch.as_tensor(etas, dtype=torch.float64).abs()
        if self.floor in (0.0, torch.inf):
            return self.error * etas / abs(self.eta)
        return torch.where(etas == 0, 0.0, torch.full_like(etas, self.error))

    def __str__(self) -> str:
        text = f"Rounding: +- {self.relative:.1e} of the change at eta = {self.eta:.3g}"
        if self.floor == 0:
            return text + ", and at every other."
        if self.floor == torch.inf:
            return text + ", and at every other: too much at any eta."
        return text + f"; it drowns the change below eta = {self.floor:.2g}."


def rounding(
    scores: Scored,
    off: Scored,
    index: Tensor,
    batch,
    series: Series,
    eta: float,
    *,
    proportional: bool,
    behaviour: Tensor | None = None,
) -> Rounding:
    r"""The rounding error of a change, from how far its scores are off on some of the rows.

    With c_i the part of row i in ``<covector, off>``, the covector being the estimate's gradient
    in the scores, the estimate is off by ``sum_i c_i`` over all N rows: from n sampled ones

    .. math:: \text{error}^2 = N \, \mathrm{var}(c) + N^2 \bar c^2,

    the second term, an error that all rows share, only where the mean is three of its own standard
    errors from 0. Of first order in the change. A difference of values is off by as much at every
    eta; an increment in proportion to eta.

    Args:
        scores: at the base policy, arrays [N, R].
        off: how far the changes at `eta` of rows `index` are from the same computed in another
            way, arrays [n, R].
        index: [n] the sampled rows.
        batch: of the N rows.
        series: from `entropy_series`, of the estimator whose change it is.
        eta: where the changes were computed, not 0.
        proportional: whether the error grows with eta.
        behaviour: as for `entropy_series`.

    Raises:
        ValueError: eta is 0, or fewer than two rows were sampled.
    """
    n, rows = len(index), len(batch.group)
    if eta == 0 or n < 2:
        raise ValueError(
            f"rounding: an eta other than 0 and two or more rows were expected, not {eta} and {n}."
        )
    kind = {"weights": series.weights, "per": series.per, "behaviour": behaviour}
    covector = entropy_covector(scores, batch, **kind)
    parts = 0.0
    for each, error in zip(covector, off, strict=True):
        width = min(each.shape[-1], error.shape[-1])
        each = each[index.to(each.device), :width]
        parts = parts + (each.double() * error[..., :width].double()).sum(-1)
    parts = parts.cpu()
    var, mean = float(parts.var()), float(parts.mean())
    shared = mean if mean**2 > 9 * var / n else 0.0
    error = (rows * var + (rows * shared) ** 2) ** 0.5
    slope = abs(float(series.value[0]))
    change = abs(eta) * slope
    relative = error / change if change else torch.inf if error else 0.0
    if proportional:
        floor = 0.0 if relative <= SHARE else torch.inf
    else:
        floor = relative / SHARE * abs(eta)
    return Rounding(error, relative, eta, floor, n)
