"""How many prompts are needed, and which estimator to use, from a pilot."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .change import entropy_change
from .estimators import Per, Rows, Weights
from .inputs import Swept
from .results import Estimate, Series
from .tables import html_table, shortened, text_table

COMPARED: tuple[Weights, ...] = ("sequence", "prefix", "prefix_raw")


def prompts_needed(pilot: Estimate | Series, eta: float, relative_error: float) -> int:
    """How many prompts bring the standard error at `eta` to a share of the change there.

    ``G (stderr / (relative_error |change|))^2``, rounded up: errors fall with the root of the
    number of prompts, with as many responses to each as in the pilot. The answer inherits the
    pilot's uncertainty: with ``z = |change| / stderr`` in the pilot, its relative error is about
    ``2 / z`` from the change alone.

    Args:
        pilot: from `entropy_change`, swept at `eta`; or from `entropy_series`, whose polynomial is
            taken at `eta`.
        eta: the learning rate.
        relative_error: the wanted standard error over the change, such as 0.1.

    Raises:
        ValueError: the pilot has one prompt and so no error, has no change at `eta`, or was not
            swept there; or `relative_error` is not positive.
    """
    value, error = _predicted(pilot, eta) if isinstance(pilot, Series) else _swept(pilot, eta)
    g = pilot.psi.shape[-1]
    if g < 2:
        raise ValueError(
            "prompts_needed: several prompts were expected, the pilot has one and so no error. "
            "Run a pilot on at least ten."
        )
    if value == 0 or not relative_error > 0:
        raise ValueError(
            f"prompts_needed: a change other than 0 and a positive relative error were expected, "
            f"not {float(value)} and {relative_error}. Choose an eta other than 0."
        )
    # This is rounded before ceil: 25 prompts times exactly 4 must not become 101.
    return math.ceil(round(g * float(error / (relative_error * value)) ** 2, 9))


def _predicted(pilot: Series, eta: float) -> tuple[Tensor, Tensor]:
    """The change at `eta` by the series' polynomial, and its standard error."""
    at = torch.tensor([eta], dtype=torch.float64)
    return pilot.predict(at)[0], pilot.predict_stderr(at)[0]


def _swept(pilot: Estimate, eta: float) -> tuple[Tensor, Tensor]:
    """The change that was measured at `eta`, and its standard error."""
    near = (pilot.etas - eta).abs() <= 1e-6 * abs(eta)
    if not near.any():
        raise ValueError(
            f"prompts_needed: a swept eta was expected, {eta} is none of "
            f"{pilot.etas[:5].tolist()}. Sweep it, or pass the series."
        )
    k = int(near.nonzero()[0])
    return pilot.value[k], pilot.stderr[k]


class Comparison(NamedTuple):
    """Estimators on one batch. It prints as a table of their changes and errors."""

    etas: Tensor  # [K]
    estimates: dict[str, Estimate]  # by the name of their weights

    def _columns(self) -> list[str]:
        return ["eta", *self.estimates, "ESS"]

    def _rows(self) -> list[list[str]]:
        """For each eta the change and error of each estimator, and the effective sample size."""
        estimates = list(self.estimates.values())
        rows = []
        for k, eta in enumerate(self.etas.tolist()):
            changes = [f"{float(e.value[k]):+.3e} +- {float(e.stderr[k]):.1e}" for e in estimates]
            ess = f"{float(estimates[0].ess[k]):.0f}/{estimates[0].rows}"
            rows.append([f"{eta:.3g}", *changes, ess])
        return rows

    def __str__(self) -> str:
        return "\n".join(text_table(self._columns(), self._rows()))

    def __repr__(self) -> str:
        columns = self._columns()
        return "\n".join(text_table(columns, shortened(self._rows(), ["..."] * len(columns))))

    def _repr_html_(self) -> str:
        columns = self._columns()
        return html_table(columns, shortened(self._rows(), ["..."] * len(columns)))


def compare(
    sweep: Swept, batch: Rows, *, per: Per = "token", behaviour: Tensor | None = None
) -> Comparison:
    """Each estimator's change and error on one batch, side by side.

    Which one has the smaller error depends on the policy. Choose by the error, before looking at
    the change: choosing by the value would bias it.

    Args:
        sweep, batch, per, behaviour: as for `entropy_change`.

    Raises:
        ValueError: what `entropy_change` raises.
    """
    estimates: dict[str, Estimate] = {
        weights: entropy_change(sweep, batch, weights=weights, per=per, behaviour=behaviour)
        for weights in COMPARED
    }
    return Comparison(sweep.etas.cpu(), estimates)
