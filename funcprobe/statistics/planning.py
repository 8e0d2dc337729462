"""How many prompts are needed, and which estimator to use, from a pilot."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .change import entropy_change
from .estimators import Per, Rows
from .inputs import Swept
from .results import Estimate, Series
from .tables import text_table


def prompts_needed(pilot: Estimate | Series, eta: float, relative_error: float) -> int:
    """How many prompts bring the standard error at `eta` to a share of the change there.

    ``G (stderr / (relative_error |change|))^2``, rounded up: errors fall with the root of the
    number of prompts, at as many responses each as in the pilot. As uncertain as the pilot: with a
    pilot z = |change| / stderr, relatively by about 2 / z from the change alone.

    Args:
        pilot: from `entropy_change`, swept at `eta`; or from `entropy_series`, whose polynomial is
            taken at `eta`.
        eta: the learning rate.
        relative_error: wanted standard error over the change, such as 0.1.

    Raises:
        ValueError: one prompt, which has no error; an eta that was not swept or has no change.
    """
    if isinstance(pilot, Series):
        at = torch.tensor([eta], dtype=torch.float64)
        value, error = pilot.predict(at)[0], pilot.predict_stderr(at)[0]
    else:
        near = (pilot.etas - eta).abs() <= 1e-6 * abs(eta)
        if not near.any():
            raise ValueError(
                f"prompts_needed: a swept eta was expected, {eta} is none of "
                f"{pilot.etas[:5].tolist()}. Sweep it, or pass the series."
            )
        k = int(near.nonzero()[0])
        value, error = pilot.value[k], pilot.stderr[k]
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
    # Rounded first: 25 prompts times exactly 4 must not become 101.
    return math.ceil(round(g * float(error / (relative_error * value)) ** 2, 9))


class Comparison(NamedTuple):
    """Estimators on one batch; prints a table of their changes and errors."""

    etas: Tensor  # [K]
    estimates: dict[str, Estimate]  # by the name of their weights

    def __str__(self) -> str:
        estimates = list(self.estimates.values())
        header = ["eta", *self.estimates, "ESS"]
        rows = []
        for k, eta in enumerate(self.etas.tolist()):
            found = [f"{float(e.value[k]):+.3e} +- {float(e.stderr[k]):.1e}" for e in estimates]
            ess = f"{float(estimates[0].ess[k]):.0f}/{estimates[0].rows}"
            rows.append([f"{eta:.3g}", *found, ess])
        return "\n".join(text_table(header, rows))


def compare(
    sweep: Swept, batch: Rows, *, per: Per = "token", behaviour: Tensor | None = None
) -> Comparison:
    """Each estimator's change and error on one batch, side by side.

    Which has the smaller error depends on the policy. Choose by the error, before looking at the
    change: choosing by the value would bias it.

    Args:
        sweep, batch, per, behaviour: as for `entropy_change`.
    """
    estimates = {
        weights: entropy_change(sweep, batch, weights=weights, per=per, behaviour=behaviour)
        for weights in ("sequence", "prefix", "prefix_raw")
    }
    return Comparison(sweep.etas.cpu(), estimates)
