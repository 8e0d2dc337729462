"""What the estimators read of a scorer's output and a batch, and what they refuse."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .estimators import Estimator, Ground, Rows, Sums, change_sums, ground

Quantity = Literal["entropy", "value"]


class Scored(Protocol):
    """Log-probabilities of response tokens, with a field `entropy` or `value` beside them."""

    @property
    def logp(self) -> Tensor:
        """[..., N, R] nats."""
        ...


class Swept(Protocol):
    """What the estimators read of a sweep."""

    @property
    def etas(self) -> Tensor:
        """[K] learning rates."""
        ...

    @property
    def base(self) -> Scored:
        """Scores at the base policy, arrays [N, R]."""
        ...

    @property
    def change(self) -> Scored:
        """Their changes, arrays [K, N, R]."""
        ...


class Inputs(NamedTuple):
    """The rows of a batch at the base policy, as an estimator takes them."""

    estimator: Estimator
    ground: Ground
    group: Tensor  # [N] the prompt of each row
    logb: Tensor  # [N] log base weights, 0 on policy
    control: Tensor | None  # [N, R] the control variate, as wide as the scores
    quantity: Quantity

    def sums(
        self, logp: Tensor, x: Tensor, *, adjust: Callable[[Tensor], Tensor] | None = None
    ) -> Sums:
        """The change of the estimate, from changes [..., N, R]; see `change_sums`."""
        return change_sums(
            self.ground, logp, x, self.estimator.weights, adjust=adjust, control=self.control
        )


def read(function: str, base: Scored, batch: Rows, estimator: Estimator, source: object) -> Inputs:
    """The rows at the base policy.

    Args:
        function: the name of the caller, for the errors.
        base: scores [N, R] at the base policy.
        batch: gives response [N, R] and group [N].
        estimator: the estimator's settings.
        source: the sweep or the terms that hold the scores. Where it has `row_hashes` and the batch
            can compute its own, they must be the same.

    Raises:
        ValueError: the batch is not that of the scores, holds a token of probability 0, or lacks
            the log-probabilities that the estimator needs.
    """
    response = _response(function, batch, base.logp)
    check_rows(function, source, batch)
    name = quantity(base)
    logb = _base_weights(function, base.logp, response, estimator.behaviour)
    control = estimator.control
    if control is not None:
        control = control[:, : response.shape[1]].to(response.device)
    made = ground(
        getattr(base, name), response, estimator.per, logb if estimator.off_policy else None
    )
    return Inputs(estimator, made, batch.group.to(response.device), logb, control, name)


def check_rows(function: str, source: object, batch: Rows) -> None:
    """Refuses scores of other rows than the batch's, where both can tell their rows apart.

    Args:
        function: the name of the caller, for the error.
        source: a sweep or terms, whose `row_hashes` [N], if it has any, identify its rows.
        batch: a batch, whose method `row_hashes`, if it has one, gives those of its rows.

    Raises:
        ValueError: some rows differ.
    """
    expected, compute = getattr(source, "row_hashes", None), getattr(batch, "row_hashes", None)
    if not isinstance(expected, Tensor) or compute is None:
        return
    expected, hashes = expected.cpu(), compute().cpu()
    if len(expected) != len(hashes):
        raise ValueError(
            f"{function}: the scores are of {len(expected)} rows, the batch has {len(hashes)}. "
            "Pass the batch that was scored. If you selected rows yourself, select those of "
            "row_hashes too."
        )
    differing = (expected != hashes).nonzero().flatten().tolist()
    if differing:
        raise ValueError(
            f"{function}: the batch's rows were expected to be those that were scored, "
            f"{len(differing)} of {len(hashes)} differ, first {differing[:5]}. The scores belong "
            "to another batch, or their order is not the batch's: pass the batch that was scored, "
            "and give join() the order of its blocks."
        )


def quantity(scores: Scored) -> Quantity:
    """The field that is estimated: "entropy", or "value" where a scorer reads something else.

    Raises:
        ValueError: the scores have neither.
    """
    if hasattr(scores, "entropy"):
        return "entropy"
    if hasattr(scores, "value"):
        return "value"
    raise ValueError(
        f"scores with a field entropy or value were expected, not {type(scores).__name__}. "
        "Use scorer(), or a NamedTuple (logp, value) of your own."
    )


def _response(function: str, batch: Rows, logp: Tensor) -> Tensor:
    """The response mask [N, R], as wide as the scores and on their device."""
    response, width = batch.response, logp.shape[-1]
    if response[:, width:].any() or response[:, :width].shape != logp.shape[-2:]:
        raise ValueError(
            f"{function}: the batch has responses {list(batch.response.shape)} but the scores are "
            f"{list(logp.shape)}. They belong to another batch, or join() lacked its order: pass "
            "the batch that was scored."
        )
    response = response[:, :width].to(logp.device)
    impossible = ((logp == -torch.inf) & response).any(-1).nonzero().flatten().tolist()
    if impossible:
        raise ValueError(
            f"{function}: the scored policy cannot produce tokens of {len(impossible)} rows, "
            f"{impossible[:5]}: top-p, top-k or min-p excludes them. The responses were sampled "
            "with other settings, or from another model, than they are scored with. Score them "
            "with the settings they were sampled with."
        )
    return response


def _base_weights(
    function: str, logp: Tensor, response: Tensor, behaviour: Tensor | None
) -> Tensor:
    """Log weights [N] of the scored policy over the one that sampled the rows; 0 on policy."""
    if behaviour is None:
        return logp.new_zeros(len(response), dtype=torch.float64)
    behaviour = behaviour[:, : response.shape[1]].to(response.device).double()
    unknown = (behaviour.isnan() & response).any(-1)
    if unknown.any():
        raise ValueError(
            f"{function}: behaviour= was expected to hold the log-probability of every response "
            f"token, {int(unknown.sum())} rows have unknown ones. Pass those that the rows were "
            "sampled with, or leave behaviour= out if E was sampled from the scored policy."
        )
    return torch.where(response, logp.double() - behaviour, 0.0).sum(-1)
