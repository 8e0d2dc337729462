"""What the estimators return: changes and derivatives with the influence values of their errors."""

from typing import NamedTuple

import torch
from torch import Tensor

from .uncertainty import ONE_PROMPT, interval, standard_error


class Estimate(NamedTuple):
    """Changes of the entropy along a line, with influence values from which errors follow.

    On the CPU, in float64.
    """

    etas: Tensor  # [K] float64
    base: Tensor  # [] the entropy at params, nats per token or per sequence
    value: Tensor  # [K] its change, in the same unit
    psi: Tensor  # [K, G] influence values of the change by prompt; they sum to 0
    base_psi: Tensor  # [G] influence values of the base
    ess: Tensor  # [K] effective sample size of the sequence weights, 1..N
    khat: Tensor  # [K] Pareto k-hat, nan where undefined (eta = 0)
    mean_weight: Tensor  # [K] 1 in expectation if the rows came from the scored policy
    weight_range: Tensor  # [K, 2] least and largest sequence weight
    rows: int  # N
    per: str  # "token" | "sequence"
    quantity: str  # "entropy" | "value"
    weights: str  # "sequence" | "prefix" | "prefix_raw" | "none"
    mean_weight_z: Tensor  # [K] of the test mean weight = 1, clustered by prompt
    spread: Tensor  # [K] standard deviation of the log weights, nats
    largest_share: Tensor  # [K] the largest weight over the sum of all
    kl: Tensor  # [K] KL(base || shifted) per sequence, nats
    clipped: Tensor  # [K] fraction of rows whose weight was clipped
    adjusted: Tensor  # [K] how far clipping or smoothing moved `value`
    off_policy: bool  # whether base weights were applied

    @property
    def stderr(self) -> Tensor:
        """[K] standard errors of `value`, clustered by prompt; nan with a single prompt."""
        return standard_error(self.psi)

    @property
    def base_stderr(self) -> Tensor:
        """[] standard error of `base`."""
        return standard_error(self.base_psi)

    def interval(self, level: float = 0.95) -> Tensor:
        """[K, 2] ``value +- t stderr``, Student's t at G - 1; pointwise, see `band` for all K."""
        return interval(self.value, self.psi, level)

    @property
    def unit(self) -> str:
        """What `value` is in: nats/token, nats/sequence, or per token of another quantity."""
        return f"nats/{self.per}" if self.quantity == "entropy" else f"per {self.per}"

    def __str__(self) -> str:
        name = "dH" if self.quantity == "entropy" else "d value"
        lines = [
            f"{name} = {float(value):+.3e} +- {float(error):.1e} {self.unit} at eta = "
            f"{float(eta):.3g}, ESS {float(ess):.0f}/{self.rows}"
            for eta, value, error, ess in zip(
                self.etas, self.value, self.stderr, self.ess, strict=True
            )
        ]
        if self.psi.shape[-1] < 2:
            lines.append(ONE_PROMPT)
        return "\n".join(lines)


class Series(NamedTuple):
    """Derivatives in eta at 0 of the very estimator that `entropy_change` computes; on the CPU."""

    value: Tensor  # [M] orders 1..M, nats per token or per sequence, per unit of eta^m
    psi: Tensor  # [M, G] their influence values by prompt
    per: str = "token"
    quantity: str = "entropy"
    weights: str = "sequence"

    @property
    def stderr(self) -> Tensor:
        """[M] standard errors, clustered by prompt."""
        return standard_error(self.psi)

    def interval(self, level: float = 0.95) -> Tensor:
        """[M, 2] ``value +- t stderr``, Student's t at G - 1."""
        return interval(self.value, self.psi, level)

    def predict(self, etas: Tensor) -> Tensor:
        """The Taylor polynomial of the change at `etas`, [K]."""
        return polynomial(self.value, etas)

    def predict_stderr(self, etas: Tensor) -> Tensor:
        """[K] standard errors of `predict`, the orders' correlation included."""
        return standard_error(polynomial(self.psi, etas))

    def __str__(self) -> str:
        name = "H" if self.quantity == "entropy" else "value"
        return "\n".join(
            f"d^{m}{name}/d eta^{m} = {float(value):+.4e} +- {float(error):.1e}"
            for m, (value, error) in enumerate(zip(self.value, self.stderr, strict=True), start=1)
        )


def polynomial(derivatives: Tensor, t: Tensor) -> Tensor:
    """``sum_m t^m / m! d_m``, [*t, ...] from d [M, ...], without the constant."""
    t = torch.as_tensor(t, dtype=torch.float64).to(derivatives.device)
    t = t.reshape(*t.shape, *[1] * (derivatives.ndim - 1))
    total, factor = 0.0, 1.0
    for m, d in enumerate(derivatives, start=1):
        factor = factor * t / m
        total = total + factor * d
    return total
