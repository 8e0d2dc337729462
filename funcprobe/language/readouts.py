"""Readouts: numbers a scorer reads off each next-token distribution, one short function each.

A readout is any function ``(logits [T, V], target [T]) -> [T]``. The scorer has already divided the
logits by the temperature and set impossible tokens to -inf. With ``scorer(reference=)`` the
readout gets the reference's logits as a third argument, which `expected_kl` needs and the others do
not take. All readouts here are finite at logits of -inf, in value and in every derivative, and each
of their operations has an increment rule.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .head.softmax import LEAST


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax in nats, [..., V], always finite.

    A logit of -inf gets a log-probability of about -1e4 and no derivative.
    """
    z = (logits - logits.detach().amax(-1, keepdim=True)).clamp(min=LEAST)
    return z - z.exp().sum(-1, keepdim=True).log()


def top_probability(logits: Tensor, target: Tensor) -> Tensor:
    """The probability of the likeliest token, ``max_y p_y``, [T].

    >>> top_probability(torch.tensor([[3.0, 1.0, 0.0]]).log(), torch.tensor([0]))
    tensor([0.7500])
    """
    return log_probabilities(logits).amax(-1).exp()


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """How far the likeliest token's log-probability lies above the second's, [T] nats.

    It is 1e4 where only one token is possible.

    >>> margin(torch.tensor([[5.0, 3.0, 3.5]]), torch.tensor([0]))
    tensor([1.5000])
    """
    z = (logits - logits.detach().amax(-1, keepdim=True)).clamp(min=LEAST)
    first, second = z.topk(2, -1).values.unbind(-1)
    return first - second


def collision_probability(logits: Tensor, target: Tensor) -> Tensor:
    """The probability that two draws agree, ``sum_y p_y^2``, [T].

    Minus its logarithm is the Renyi entropy of order 2.

    >>> collision_probability(torch.zeros(1, 4), torch.tensor([0]))
    tensor([0.2500])
    """
    return (2 * log_probabilities(logits)).exp().sum(-1)


def tail_mass(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A readout of the probability outside the k likeliest tokens, [T]. It sorts the vocabulary.

    The tail itself is summed, so that a tiny tail is exact. The readout has a kink where the k-th
    and the next token change places.

    Args:
        k: how many of the likeliest tokens are left out.

    Raises:
        ValueError: k is below 1.

    >>> tail_mass(2)(torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([0]))
    tensor([0.2500])
    """
    if k < 1:
        raise ValueError(
            f"tail_mass: k must be at least 1, not {k}. It counts the likeliest tokens."
        )

    def readout(logits: Tensor, target: Tensor) -> Tensor:
        lp = log_probabilities(logits)
        return lp.topk(max(lp.shape[-1] - k, 0), -1, largest=False).values.exp().sum(-1)

    return readout


def eos_probability(eos_id: int | Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """A readout of the probability that the response ends here, [T].

    Args:
        eos_id: the id of the token that ends a response, or the ids of several.

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

    This is the divergence of the whole distribution given the prefix (Rao-Blackwell), not of the
    sampled token. It is computed as

    .. math:: \sum_y q_y \, \phi(\log p_y - \log q_y), \qquad
              \phi(d) = d e^d - e^d + 1 = d^2 / 2 + d^3 / 3 + ... \ge 0,

    whose terms do not cancel: it is never negative, and a small divergence, which is of the second
    order in d, has full relative precision. Amini, Vieira and Cotterell, arXiv 2504.10637.

    >>> z = torch.tensor([[3.0, 1.0]]).log()
    >>> expected_kl(z, torch.tensor([0]), torch.zeros(1, 2))  # log 2 - H
    tensor([0.1308])
    """
    lp, lq = log_probabilities(logits), log_probabilities(reference)
    p, q, d = lp.exp(), lq.exp(), lp - lq
    near = d.clamp(-0.5, 0.5)
    far = d - near
    series: Tensor | float = 0.0
    for k in reversed(range(15)):  # 0.5^15 / (15! 17) is below rounding
        series = series * near + 1 / (math.factorial(k) * (k + 2))
    # This is p - q e^near, from which phi(d) - phi(near) follows. It is exactly 0 where |d| <= 0.5,
    # and is written without e^d, which may overflow.
    over = q * near.exp() * far.clamp(max=0).expm1() - p * (-far.clamp(min=0)).expm1()
    return (q * near * near * series + (near - 1) * over + far * p).sum(-1)
