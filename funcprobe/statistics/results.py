"""What the estimators return: changes and derivatives with the influence values of their errors."""

import math
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .estimators import Estimator, Per, Weights
from .inputs import Quantity
from .tables import html_table, shortened
from .uncertainty import ONE_PROMPT, interval, standard_error


class Diagnostics(NamedTuple):
    """What the importance weights of the rows say of an estimate, at each eta.

    They are those of the sequence weights, whatever weights the estimator has; only `skew` and
    `adjusted` are of the estimate itself.
    """

    ess: Tensor  # [K] effective sample size, 1..N
    khat: Tensor  # [K] Pareto k-hat, nan where undefined (eta = 0)
    skew: Tensor  # [K] skewness of the estimate's influence values, nan where undefined (eta = 0)
    mean_weight: Tensor  # [K] 1 in expectation if the rows came from the scored policy
    weight_range: Tensor  # [K, 2] least and largest weight
    mean_weight_z: Tensor  # [K] of the test mean weight = 1, clustered by prompt
    spread: Tensor  # [K] standard deviation of the log weights, nats
    largest_share: Tensor  # [K] the largest weight over the sum of all
    kl: Tensor  # [K] KL(base || shifted) per sequence, nats
    clipped: Tensor  # [K] fraction of rows whose weight was clipped
    adjusted: Tensor  # [K] how far clipping or smoothing moved the estimate


class Estimate(NamedTuple):
    """Changes of the entropy along a line, with influence values from which errors follow.

    Its tensors are on the CPU, in float64.
    """

    etas: Tensor  # [K] float64
    base: Tensor  # [] the entropy at params, nats per token or per sequence
    value: Tensor  # [K] its change, in the same unit
    psi: Tensor  # [K, G] influence values of the change by prompt; they sum to 0
    base_psi: Tensor  # [G] influence values of the base
    diagnostics: Diagnostics  # what the importance weights say
    rows: int  # N
    estimator: Estimator = Estimator()
    quantity: Quantity = "entropy"

    @property
    def stderr(self) -> Tensor:
        """[K] standard errors of `value`, clustered by prompt; nan with a single prompt."""
        return standard_error(self.psi)

    @property
    def base_stderr(self) -> Tensor:
        """[] standard error of `base`."""
        return standard_error(self.base_psi)

    def interval(self, level: float = 0.95) -> Tensor:
        """[K, 2] ``value +- t stderr``, with Student's t at G - 1 degrees of freedom.

        Each eta has its own interval; `band` covers all of them at once.
        """
        return interval(self.value, self.psi, level)

    @property
    def weights(self) -> Weights:
        """The estimator's importance weights: "sequence", "prefix", "prefix_raw" or "none"."""
        return self.estimator.weights

    @property
    def per(self) -> Per:
        """The estimator's unit: "token" or "sequence"."""
        return self.estimator.per

    @property
    def off_policy(self) -> bool:
        """Whether base weights were applied to rows of another policy."""
        return self.estimator.off_policy

    @property
    def unit(self) -> str:
        """The unit of `value`: nats/token or nats/sequence, without nats for other quantities."""
        return _unit(self.per, self.quantity)

    @property
    def ess(self) -> Tensor:
        """[K] effective sample size of the sequence weights, 1..N."""
        return self.diagnostics.ess

    @property
    def khat(self) -> Tensor:
        """[K] Pareto k-hat, nan where undefined (eta = 0)."""
        return self.diagnostics.khat

    @property
    def skew(self) -> Tensor:
        """[K] how far the influence values of `value` lean to one side; see `skewness`."""
        return self.diagnostics.skew

    @property
    def mean_weight(self) -> Tensor:
        """[K] mean weight, 1 in expectation if the rows came from the scored policy."""
        return self.diagnostics.mean_weight

    @property
    def weight_range(self) -> Tensor:
        """[K, 2] least and largest sequence weight."""
        return self.diagnostics.weight_range

    @property
    def mean_weight_z(self) -> Tensor:
        """[K] z of the test mean weight = 1, clustered by prompt."""
        return self.diagnostics.mean_weight_z

    @property
    def spread(self) -> Tensor:
        """[K] standard deviation of the log weights, nats."""
        return self.diagnostics.spread

    @property
    def largest_share(self) -> Tensor:
        """[K] the largest weight over the sum of all."""
        return self.diagnostics.largest_share

    @property
    def kl(self) -> Tensor:
        """[K] KL(base || shifted) per sequence, nats."""
        return self.diagnostics.kl

    @property
    def clipped(self) -> Tensor:
        """[K] fraction of rows whose weight was clipped."""
        return self.diagnostics.clipped

    @property
    def adjusted(self) -> Tensor:
        """[K] how far clipping or smoothing moved `value`."""
        return self.diagnostics.adjusted

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, the diagnostics' among them, as a report stores them.

        The estimator's own tensors, which belong to the rows, are left out.
        """
        fields = self._asdict() | self.diagnostics._asdict()
        return {name: x for name, x in fields.items() if isinstance(x, Tensor)}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        rows: int,
        estimator: Estimator | None = None,
        quantity: Quantity = "entropy",
    ) -> Self:
        """The estimate whose `tensors` these are.

        Args:
            tensors: by name, as `tensors` gives them; other names are ignored.
            rows: the number of rows N.
            estimator: the estimator's settings; the default is that of `entropy_change`.
            quantity: what was estimated.

        Raises:
            KeyError: a tensor is missing.
        """
        return cls(
            etas=tensors["etas"],
            base=tensors["base"],
            value=tensors["value"],
            psi=tensors["psi"],
            base_psi=tensors["base_psi"],
            diagnostics=Diagnostics(*(tensors[name] for name in Diagnostics._fields)),
            rows=rows,
            estimator=estimator or Estimator(),
            quantity=quantity,
        )

    def _lines(self) -> list[str]:
        name = "dH" if self.quantity == "entropy" else "d value"
        columns = (self.etas, self.value, self.stderr, self.ess)
        lines = [
            f"{name} = {value:+.3e} +- {error:.1e} {self.unit} at eta = {eta:.3g}, "
            f"ESS {ess:.0f}/{self.rows}"
            for eta, value, error, ess in zip(*(x.tolist() for x in columns), strict=True)
        ]
        return lines if self.psi.shape[-1] > 1 else [*lines, ONE_PROMPT]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return "\n".join(shortened(self._lines(), "..."))

    def _repr_html_(self) -> str:
        name = "dH" if self.quantity == "entropy" else "d value"
        numbers = (self.etas, self.value, self.stderr, self.ess, self.khat, self.skew)
        rows = [
            (
                f"{eta:.3g}",
                f"{value:+.3e}",
                f"{error:.1e}",
                f"{ess:.0f}/{self.rows}",
                "-" if math.isnan(khat) else f"{khat:.2f}",
                "-" if math.isnan(skew) else f"{skew:+.2f}",
            )
            for eta, value, error, ess, khat, skew in zip(
                *(x.tolist() for x in numbers), strict=True
            )
        ]
        columns = ("eta", f"{name} [{self.unit}]", "+-", "ESS", "k-hat", "skew")
        note = ONE_PROMPT if self.psi.shape[-1] < 2 else ""
        return html_table(columns, shortened(rows, ("...",) * len(columns)), note)


class Series(NamedTuple):
    """Derivatives in eta at 0 of the very estimator that `entropy_change` computes; on the CPU."""

    value: Tensor  # [M] orders 1..M, nats per token or per sequence, per unit of eta^m
    psi: Tensor  # [M, G] their influence values by prompt
    estimator: Estimator = Estimator()
    quantity: Quantity = "entropy"
    # [M] skewness of their influence values by row or prompt, see `skewness`; [1] nan if not given
    skew: Tensor = torch.full((1,), torch.nan, dtype=torch.float64)

    @property
    def stderr(self) -> Tensor:
        """[M] standard errors, clustered by prompt."""
        return standard_error(self.psi)

    def interval(self, level: float = 0.95) -> Tensor:
        """[M, 2] ``value +- t stderr``, with Student's t at G - 1 degrees of freedom."""
        return interval(self.value, self.psi, level)

    @property
    def weights(self) -> Weights:
        """The estimator's importance weights: "sequence", "prefix", "prefix_raw" or "none"."""
        return self.estimator.weights

    @property
    def per(self) -> Per:
        """The estimator's unit: "token" or "sequence"."""
        return self.estimator.per

    @property
    def off_policy(self) -> bool:
        """Whether base weights were applied to rows of another policy."""
        return self.estimator.off_policy

    def predict(self, etas: Tensor) -> Tensor:
        """The Taylor polynomial of the change at `etas`, [K]."""
        return polynomial(self.value, etas)

    def predict_stderr(self, etas: Tensor) -> Tensor:
        """[K] standard errors of `predict`, the orders' correlation included."""
        return standard_error(polynomial(self.psi, etas))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as a report stores them."""
        return {"value": self.value, "psi": self.psi, "skew": self.skew}

    @property
    def unit(self) -> str:
        """The unit of a change, as in `Estimate`; order m is in this unit per unit of eta^m."""
        return _unit(self.per, self.quantity)

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        """For each order its name, value, error, unit and skewness, as text."""
        name = "H" if self.quantity == "entropy" else "value"
        rows = []
        numbers = (self.value, self.stderr, self.skew.expand_as(self.value))
        for m, (value, error, skew) in enumerate(
            zip(*(x.tolist() for x in numbers), strict=True), start=1
        ):
            unit = f"{self.unit} per unit of eta" + (f"^{m}" if m > 1 else "")
            leaning = "-" if math.isnan(skew) else f"{skew:+.2f}"
            rows.append((f"d^{m}{name}/d eta^{m}", f"{value:+.4e}", f"{error:.1e}", unit, leaning))
        return rows

    def __str__(self) -> str:
        return "\n".join(
            f"{name} = {value} +- {error} {unit}" for name, value, error, unit, _ in self._rows()
        )

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(("derivative", "value", "+-", "unit", "skew"), self._rows())


def _unit(per: Per, quantity: Quantity) -> str:
    return f"nats/{per}" if quantity == "entropy" else f"per {per}"


def polynomial(derivatives: Tensor, t: Tensor) -> Tensor:
    """``sum_m t^m / m! d_m``, [*t, ...] from d [M, ...], without the constant."""
    t = torch.as_tensor(t, dtype=torch.float64).to(derivatives.device)
    t = t.reshape(*t.shape, *[1] * (derivatives.ndim - 1))
    total, factor = torch.zeros_like(t), torch.ones_like(t)
    for m, d in enumerate(derivatives, start=1):
        factor = factor * t / m
        total = total + factor * d
    return total


def check_same_estimator(function: str, change: Estimate, series: Series) -> None:
    """Refuses a change and a series that are not of one estimator on the same prompts.

    Args:
        function: the name of the caller, for the error.
        change: from `entropy_change`.
        series: from `entropy_series`.

    Raises:
        ValueError: quantity, weights, unit, base weights, control variate or the number of prompts
            differ.
    """
    if change.quantity != series.quantity:
        raise ValueError(
            f"{function}: the change is of the {change.quantity}, the series of the "
            f"{series.quantity}. Use one scorer for both."
        )
    differing = change.estimator.differences(series.estimator)
    if differing:
        listed = ", ".join(f"{name} ({how})" for name, how in differing.items())
        names = " and ".join(f"{name}=" for name in differing)
        raise ValueError(
            f"{function}: a change and a series of one estimator were expected, these differ in "
            f"{listed}. Pass the same {names} to entropy_change and entropy_series."
        )
    prompts = change.psi.shape[-1], series.psi.shape[-1]
    if prompts[0] != prompts[1]:
        raise ValueError(
            f"{function}: the same prompts were expected, the change has {prompts[0]} and the "
            f"series {prompts[1]}. Evaluate both on one batch."
        )
