"""Slope and curvature from symmetric learning rates, and where the curvature takes over."""

from typing import NamedTuple

import torch
from torch import Tensor

from .results import Estimate, Series
from .tables import formatted, html_table, shortened
from .uncertainty import standard_error


class OddEven(NamedTuple):
    """Odd and even parts of the change at pairs +-eta. It prints as a line for each pair."""

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

    def _rows(self) -> list[tuple[str, ...]]:
        """For each pair eta, slope and curvature with their errors, as text."""
        columns = (self.etas, self.slope, self.slope_stderr, self.curvature, self.curvature_stderr)
        return formatted([x.tolist() for x in columns], (".3g", "+.4e", ".1e", "+.4e", ".1e"))

    def _lines(self) -> list[str]:
        return [
            f"slope {slope} +- {error}, curvature {curvature} +- {its_error} from +-{eta}"
            for eta, slope, error, curvature, its_error in self._rows()
        ]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return "\n".join(shortened(self._lines(), "..."))

    def _repr_html_(self) -> str:
        columns = ("+-eta", "slope", "+-", "curvature", "+-")
        return html_table(columns, shortened(self._rows(), ("...",) * len(columns)))


def odd_even(change: Estimate) -> OddEven:
    """Slope and curvature from symmetric learning rates, without a derivative.

    ``[D(eta) - D(-eta)] / (2 eta)`` and ``[D(eta) + D(-eta)] / eta^2`` are the law's own slope and
    curvature up to O(eta^2). The errors include the correlation of the two signs.

    Args:
        change: from `entropy_change`; some of its etas come with both signs.

    Returns:
        Both at each of the P pairs, ascending in eta.

    Raises:
        ValueError: no eta comes with both signs.
    """
    etas = change.etas.tolist()
    pairs = sorted(
        (eta, etas.index(eta), etas.index(-eta)) for eta in etas if eta > 0 and -eta in etas
    )
    if not pairs:
        raise ValueError(
            f"odd_even: learning rates with both signs were expected, not {etas[:5]}. Sweep a "
            "symmetric grid, such as [-1e-5, 1e-5]."
        )
    up, down = [i for _, i, _ in pairs], [j for _, _, j in pairs]
    positive = torch.tensor([eta for eta, _, _ in pairs], dtype=torch.float64)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        size = positive.view(-1, *[1] * (x.ndim - 1))
        return (x[up] - x[down]) / (2 * size), (x[up] + x[down]) / (size * size)

    (slope, curvature), (slope_psi, curvature_psi) = parts(change.value), parts(change.psi)
    return OddEven(positive, slope, slope_psi, curvature, curvature_psi)


def takeover(series: Series) -> tuple[float, float]:
    """The eta at which the curvature's share equals the slope's, and its standard error.

    ``eta = 2 |slope| / |curvature|``; the line is off by 10% at about a tenth of it. The error is
    of first order and includes the correlation of the two.

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
