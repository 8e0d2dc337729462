"""Slope and curvature from symmetric learning rates, and where the curvature takes over."""

from typing import NamedTuple

import torch
from torch import Tensor

from .results import Estimate, Series
from .uncertainty import standard_error


class OddEven(NamedTuple):
    """Odd and even parts of the change at pairs +-eta; prints as a line for each."""

    etas: Tensor  # [P] positive, ascending
    slope: Tensor  # [P] odd part over eta: the slope plus O(eta^2)
    slope_psi: Tensor  # [P, G]
    curvature: Tensor  # [P] twice the even part over eta^2: the curvature plus O(eta^2)
    curvature_psi: Tensor  # [P, G]

    @property
    def slope_stderr(self) -> Tensor:
        """[P] standard errors of `slope`."""
        return standard_error(self.slope_psi)

    @property
    def curvature_stderr(self) -> Tensor:
        """[P] standard errors of `curvature`."""
        return standard_error(self.curvature_psi)

    def __str__(self) -> str:
        columns = (self.etas, self.slope, self.slope_stderr, self.curvature, self.curvature_stderr)
        return "\n".join(
            f"slope {s:+.4e} +- {es:.1e}, curvature {c:+.4e} +- {ec:.1e} from +-{eta:.3g}"
            for eta, s, es, c, ec in zip(*(column.tolist() for column in columns), strict=True)
        )


def odd_even(change: Estimate) -> OddEven:
    """Slope and curvature from symmetric learning rates, without a derivative.

    ``[D(eta) - D(-eta)] / (2 eta)`` and ``[D(eta) + D(-eta)] / eta^2``: the law's own slope and
    curvature up to O(eta^2), with the error that both signs share.

    Args:
        change: from `entropy_change`, at etas of which some come with both signs.

    Raises:
        ValueError: no eta comes with both signs.
    """
    etas = change.etas.tolist()
    pairs = sorted(
        (eta, etas.index(eta), etas.index(-eta)) for eta in etas if eta > 0 and -eta in etas
    )
    if not pairs:
        raise ValueError(
            f"odd_even: learning rates with both signs were expected, found {etas[:5]}. Sweep a "
            "symmetric grid, such as [-1e-5, 1e-5]."
        )
    eta, up, down = (list(column) for column in zip(*pairs, strict=True))
    eta = torch.tensor(eta, dtype=torch.float64)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        size = eta.view(-1, *[1] * (x.ndim - 1))
        return (x[up] - x[down]) / (2 * size), (x[up] + x[down]) / (size * size)

    (slope, curvature), (slope_psi, curvature_psi) = parts(change.value), parts(change.psi)
    return OddEven(eta, slope, slope_psi, curvature, curvature_psi)


def takeover(series: Series) -> tuple[float, float]:
    """The eta at which the curvature's share equals the slope's, and its standard error.

    ``eta = 2 |slope| / |curvature|``; the line is off by 10% at about a tenth of it. The error is
    of first order, the correlation of the two included.

    Args:
        series: from `entropy_series`, of second order at least.

    Raises:
        ValueError: the series is of first order.
    """
    if len(series.value) < 2:
        raise ValueError(
            "takeover: a series of second order was expected, it is of first. "
            "Pass entropy_series the terms of taylor(..., order=2)."
        )
    slope, curvature = series.value[:2]
    eta = 2 * (slope / curvature).abs()
    psi = eta * (series.psi[0] / slope - series.psi[1] / curvature)
    return float(eta), float(standard_error(psi))
