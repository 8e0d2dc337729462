"""What the estimators read of a scorer's output and a batch, and what they refuse."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .estimators import Ground, Per, Rows, check_weights, ground


class Scores(Protocol):
    """Log-probability of response tokens, [..., N, R] nats, and `entropy` or `value` beside it."""

    logp: Tensor


class Swept(Protocol):
    """What is read of a sweep."""

    etas: Tensor
    base: Scores
    change: Scores


class Reading(NamedTuple):
    """The rows of a batch at the base policy."""

    ground: Ground
    group: Tensor  # [N]
    behaviour: Tensor  # [N] log base weights, 0 on policy
    quantity: str  # "entropy" | "value"


def read(
    base: Scores, batch: Rows, *, weights: str, per: Per, behaviour: Tensor | None = None
) -> Reading:
    """The rows at the base policy.

    Args:
        base: scores [N, R] at the base policy.
        batch: gives response [N, R] and group [N].
        weights, per: of the estimator; an unknown name is refused.
        behaviour: [N, R] log-probabilities under the policy that sampled the rows.

    Raises:
        ValueError: the batch is not that of the scores, or holds a token of probability 0.
    """
    check_weights(weights)
    response, group = _rows(batch, base.logp)
    logb = base.logp.new_zeros(len(response), dtype=torch.float64)
    if behaviour is not None:
        behaviour = behaviour[:, : response.shape[1]].to(response.device).double()
        unknown = (behaviour.isnan() & response).any(-1)
        if unknown.any():
            raise ValueError(
                f"behaviour: log-probabilities of every response token were expected, "
                f"{int(unknown.sum())} rows have unknown ones. Pass those that the rows were "
                "sampled with, or leave behaviour= out if E was sampled from the scored policy."
            )
        logb = torch.where(response, base.logp.double() - behaviour, 0.0).sum(-1)
    name = quantity(base)
    made = ground(getattr(base, name), response, per, None if behaviour is None else logb)
    return Reading(made, group, logb, name)


def quantity(scores: Scores) -> str:
    """The field that is estimated: "entropy", or "value" where a scorer reads something else."""
    for name in ("entropy", "value"):
        if hasattr(scores, name):
            return name
    raise ValueError(
        f"scores with a field entropy or value were expected, not {type(scores).__name__}. "
        "Use scorer(), or a NamedTuple (logp, value) of your own."
    )


def _rows(batch: Rows, logp: Tensor) -> tuple[Tensor, Tensor]:
    response, width = batch.response, logp.shape[-1]
    if response[:, width:].any() or response[:, :width].shape != logp.shape[-2:]:
        raise ValueError(
            f"the batch has responses {list(batch.response.shape)} but the scores are "
            f"{list(logp.shape)}: they belong to another batch, or join() lacked its order."
        )
    response = response[:, :width].to(logp.device)
    impossible = ((logp == -torch.inf) & response).any(-1).nonzero().flatten().tolist()
    if impossible:
        raise ValueError(
            f"the scored policy cannot produce tokens of {len(impossible)} rows, "
            f"{impossible[:5]}: they lie outside its nucleus. The responses were sampled with "
            "another top_p, temperature or model than they are scored with."
        )
    return response, batch.group.to(logp.device)
