"""Readouts: numbers a scorer reads off each next-token distribution, one short function each.

A readout is any function ``(logits [T, V], target [T]) -> [T]`` of the logits that the sampling
settings give, -inf outside the nucleus; with ``scorer(reference=)`` it gets the logits there as a
third argument. `expected_kl` needs them, the others do without. All are finite at -inf logits in
value and in every derivative, and each of their operations has an increment rule.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LEAST = -1e4  # e^-10000 is exactly 0 in float64, and the clamp stops the tangent of an infinity


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax in nats, [..., V], finite: a logit of -inf has about -1e4, and no derivative."""
    z = (logits - logits.detach().amax(-1, keepdim=True)).clamp(min=_LEAST)
    return z - z.exp().sum(-1, keepdim=True).log()


def top_probability(logits: Tensor, target: Tensor) -> Tensor:
    """The probability of the likeliest token, ``max_y p_y``, [T].

    >>> top_probability(torch.tensor([[3.0, 1.0, 0.0]]).log(), torch.tensor([0]))
    tensor([0.7500])
    """
    return log_probabilities(logits).amax(-1).exp()


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """The log-probability of the likeliest token over the second, [T] nats.

    1e4 where only one token is possible.

    >>> margin(torch.tensor([[5.0, 3.0, 3.5]]), torch.tensor([0]))
    tensor([1.5000])
    """
    z = (logits - logits.detach().amax(-1, keepdim=True)).clamp(min=_LEAST)
    first, second = z.topk(2, -1).values.unbind(-1)
    return first - second


def collision_probability(logits: Tensor, target: Tensor) -> Tensor:
    """The probability that two draws agree, ``sum_y p_y^2``, [T]; minus its log: Renyi-2 entropy.

    >>> collision_probability(torch.zeros(1, 4), torch.tensor([0]))
    tensor([0.2500])
    """
    return (2 * log_probabilities(logits)).exp().sum(-1)


def tail_mass(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The readout of the probability outside the k likeliest tokens, [T]; it sorts V.

    Summed from the tail itself, so that a tiny one is exact; it has a kink where the k-th and the
    next token change places.

    Raises:
        ValueError: k is below 1.

    >>> tail_mass(2)(torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([0]))
    tensor([0.2500])
    """
    if k < 1:
        raise ValueError(f"tail_mass: k must be at least 1, not {k}. It counts the tokens kept.")

    def readout(logits: Tensor, target: Tensor) -> Tensor:
        lp = log_probabilities(logits)
        return lp.topk(max(lp.shape[-1] - k, 0), -1, largest=False).values.exp().sum(-1)

    return readout


def eos_probability(eos_id: int | Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """The readout of the probability that the response ends here, [T].

    Args:
        eos_id: the id that ends a response, or the ids.

    >>> eos_probability(2)(torch.tensor([[1.0, 2.0, 1.0]]).log(), torch.tensor([0]))
    tensor([0.2500])
    """
    ids = [eos_id] if isinstance(eos_id, int) else list(eos_id)

    def readout(logits: Tensor, target: Tensor) -> Tensor:
        lp = log_probabilities(logits)
        return torch.stack([lp[..., i] for i in ids], -1).exp().sum(-1)

    return readout


def expected_kl(logits: Tensor, target: Tensor, reference: Tensor) -> Tensor:
    r"""``KL(p || q) = sum_y p_y log(p_y / q_y)`` to the policy at the reference, [T] nats.

    Of the whole distribution given the prefix (Rao-Blackwell), not of the sampled token; computed
    as

    .. math:: \sum_y q_y \, \phi(\log p_y - \log q_y), \qquad
              \phi(d) = d e^d - e^d + 1 = d^2 / 2 + d^3 / 3 + ... \ge 0,

    whose terms do not cancel: it is never negative, and of the second order in d to full relative
    precision. Amini, Vieira and Cotterell, arXiv 2504.10637.

    >>> z = torch.tensor([[3.0, 1.0]]).log()
    >>> expected_kl(z, torch.tensor([0]), torch.zeros(1, 2))  # log 2 - H
    tensor([0.1308])
    """
    lp, lq = log_probabilities(logits), log_probabilities(reference)
    p, q, d = lp.exp(), lq.exp(), lp - lq
    near = d.clamp(-0.5, 0.5)
    far = d - near
    series = 0.0
    for k in reversed(range(15)):  # 0.5^15 / (15! 17) is below rounding
        series = series * near + 1 / (math.factorial(k) * (k + 2))
    # What phi(d) has over phi(near), by p - q e^near: exactly 0 where d is near, and e^d, which may
    # overflow, does not appear.
    over = q * near.exp() * far.clamp(max=0).expm1() - p * (-far.clamp(min=0)).expm1()
    return (q * near * near * series + (near - 1) * over + far * p).sum(-1)
