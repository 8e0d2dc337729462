"""Log-probability and entropy of softmaxes that are never held whole, in every mode."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .rematerialise import Cotangents, Needed, Tensors, pull_back, rematerialise

# The least logit relative to the largest. e^-10000 is exactly 0 in float64, so that the clamp
# changes no value; and it stops the tangent of an infinite logit.
LEAST = -1e4

WIDTH = 4096  # tokens of the vocabulary in a slice: their logits stay in a CPU's cache


def logp_and_entropy(slices: Iterable[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` and entropy of a softmax whose logits arrive in slices.

    With m the largest logit, ``z = logits - m``, ``s = sum e^z`` and ``t = sum z e^z``:
    ``logp = z_y - log s`` and ``H = log s - t / s``, which does not cancel. The sums are rescaled
    as m grows, so that only one slice is held at a time. A logit of -inf has probability 0 and adds
    nothing to H, in value and in every derivative.

    Args:
        slices: the logits [..., V] in consecutive slices of the last axis.
        target: [...] int64, the token whose log-probability is wanted.

    Returns:
        ``(logp, entropy)``, [...] nats.

    >>> logits = torch.tensor([0.0, 0.0, -torch.inf])
    >>> logp, entropy = logp_and_entropy(logits.split(2), torch.tensor(1))
    >>> round(float(logp.exp()), 6), round(float(entropy.exp()), 6)
    (0.5, 2.0)
    """
    statistics = _statistics(slices, target)
    return statistics.logp, statistics.entropy


def head_scores(
    read: Callable[..., Tensor],
    hidden: Tensor,
    target: Tensor,
    tensors: Tensors,
    *,
    vocabulary: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    r"""`logp_and_entropy` of a head's logits, in slices of the vocabulary forward and backward.

    Reverse mode keeps the hidden states and a few numbers [T] of each token, and reads each slice
    of the logits again. With p the softmax of the logits z,

    .. math:: d\,logp / dz_j = 1_{j = y} - p_j, \qquad dH / dz_j = -p_j (\log p_j + H).

    Args:
        read: ``(hidden, *tensors) -> logits``. It gives a slice of the vocabulary's logits if every
            tensor that leads with V is given in that slice.
        hidden: [T, D].
        target: [T] int64.
        tensors: the tensors that the head reads, weights and all others.
        vocabulary: V.
        width: tokens of the vocabulary in a slice.

    Returns:
        ``(logp, entropy)``, [T] nats.
    """
    head = _Head(read, vocabulary, width, _leads(tensors, vocabulary))
    outputs = rematerialise(head.forward, target, hidden, *tensors, pull=head.pull)
    statistics = _Statistics(*outputs)
    return statistics.logp, statistics.entropy


def head_slices(tensors: Tensors, *, vocabulary: int, width: int) -> Iterator[tuple[int, Tensors]]:
    """The first token of each slice of the vocabulary, and a head's tensors there.

    A tensor that leads with V is cut, any other is given whole.

    Args:
        tensors: the tensors that the head reads.
        vocabulary: V.
        width: tokens of the vocabulary in a slice.
    """
    leads = _leads(tensors, vocabulary)
    for start in range(0, vocabulary, width):
        here = slice(start, start + width)
        pairs = zip(tensors, leads, strict=True)
        yield start, tuple(tensor[here] if cut else tensor for tensor, cut in pairs)


class _Statistics(NamedTuple):
    """What is known of each token's softmax when all of its logits have been read."""

    logp: Tensor  # [...] nats
    entropy: Tensor  # [...] nats
    log_sum: Tensor  # [...] log s
    largest: Tensor  # [...] m, without a derivative


class _Sums(NamedTuple):
    """Sums over the slices that have been read so far, in the notation of `logp_and_entropy`."""

    m: Tensor
    s: Tensor
    t: Tensor
    y: Tensor  # the target's logit; arbitrary until its slice has come


class _Known(NamedTuple):
    """What the backward pass of a slice needs of each token, [T]."""

    entropy: Tensor
    log_sum: Tensor
    largest: Tensor
    to_logp: Tensor  # the cotangent of the log-probability
    to_entropy: Tensor
    to_log_sum: Tensor


@dataclass(frozen=True)
class _Head:
    """A head that is read in slices of the vocabulary; see `head_scores`."""

    read: Callable[..., Tensor]
    vocabulary: int
    width: int
    sliced: tuple[bool, ...]  # which of the head's tensors lead with V

    def slices(self, tensors: Tensors) -> Iterator[tuple[int, Tensors]]:
        """The first token of each slice of the vocabulary, and the head's tensors there."""
        return head_slices(tensors, vocabulary=self.vocabulary, width=self.width)

    def forward(self, target: Tensor, hidden: Tensor, *tensors: Tensor) -> _Statistics:
        """The statistics of the head's logits."""
        return _statistics((self.read(hidden, *here) for _, here in self.slices(tensors)), target)

    def pull(
        self, needed: Needed, inputs: Tensors, outputs: Tensors, cotangents: Tensors
    ) -> Cotangents:
        """The cotangents of the inputs of `forward`, by reading each slice of the logits again.

        A tensor given in slices gets its slices' cotangents joined, any other input their sum.
        """
        (target, *read_inputs), (_, *moves) = inputs, needed
        statistics, to = _Statistics(*outputs), _Statistics(*cotangents)
        known = _Known(*statistics[1:], to.logp, to.entropy, to.log_sum)
        moving = [i for i, moves_here in enumerate(moves) if moves_here]
        joined = (False, *self.sliced)
        hidden, *tensors = read_inputs
        sums: dict[int, Tensor] = {}
        pieces: dict[int, list[Tensor]] = {i: [] for i in moving if joined[i]}
        for start, here in self.slices(tuple(tensors)):
            of_slice = partial(_slice_cotangents, self.read, tuple(moves), start)
            parts = rematerialise(of_slice, target, *known, hidden, *here)
            for i, part in zip(moving, parts, strict=True):
                if joined[i]:
                    pieces[i].append(part)
                else:  # The sum is taken in float32 at least.
                    part = part.to(torch.promote_types(part.dtype, torch.float32))
                    sums[i] = sums[i] + part if i in sums else part
        grads = sums | {i: torch.cat(parts) for i, parts in pieces.items()}
        return None, *(
            grads[i].to(x.dtype) if i in grads else None for i, x in enumerate(read_inputs)
        )


def _leads(tensors: Tensors, vocabulary: int) -> tuple[bool, ...]:
    """Which tensors lead with V."""
    return tuple(tensor.shape[:1] == (vocabulary,) for tensor in tensors)


def _statistics(slices: Iterable[Tensor], target: Tensor) -> _Statistics:
    """Reads the logits [..., V] slice by slice; see `logp_and_entropy` for the notation."""
    sums, start = None, 0
    for logits in slices:
        sums = _add_slice(sums, logits, target - start)
        start += logits.shape[-1]
    if sums is None:
        raise ValueError("logp_and_entropy: at least one slice of logits was expected, none came.")
    log_s = sums.s.log()
    return _Statistics(sums.y - sums.m - log_s, log_s - sums.t / sums.s, log_s, sums.m)


def _add_slice(before: _Sums | None, logits: Tensor, index: Tensor) -> _Sums:
    """The sums with one slice more. `index` is the target's place in it, negative if before it."""
    largest = logits.detach().amax(-1).clamp(min=torch.finfo(logits.dtype).min)
    m = largest if before is None else torch.maximum(before.m, largest)
    z = (logits - m.unsqueeze(-1)).clamp(min=LEAST)
    e = z.exp()
    s, t = e.sum(-1), (z * e).sum(-1)
    y = logits.gather(-1, index.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    if before is None:
        return _Sums(m, s, t, y)
    lower = before.m - m
    scale = lower.exp()
    return _Sums(
        m,
        before.s * scale + s,
        (before.t + lower * before.s) * scale + t,
        torch.where(index >= 0, y, before.y),
    )


def _slice_cotangents(
    read: Callable[..., Tensor], moves: Needed, start: int, target: Tensor, *rest: Tensor
) -> Tensors:
    """What a slice of the logits passes back to the hidden states and the head's tensors.

    Args:
        read: as in `head_scores`.
        moves: whether the hidden states, then each of the head's tensors, need a cotangent.
        start: the slice's first token.
        target: [T] int64.
        rest: the fields of `_Known`, the hidden states, and the head's tensors in the slice.
    """
    fields = len(_Known._fields)
    known, read_inputs = _Known(*rest[:fields]), rest[fields:]

    def cotangent(logits: Tensor) -> Tensor:
        # m only shifts the logits: the statistics have no derivative in it, nor is there one here.
        logp = (logits - known.largest.unsqueeze(-1)).clamp(min=LEAST) - known.log_sum.unsqueeze(-1)
        shared = (known.to_log_sum - known.to_logp - known.to_entropy * known.entropy).unsqueeze(-1)
        out = logp.exp() * (shared - known.to_entropy.unsqueeze(-1) * logp)
        last = logits.shape[-1] - 1
        here = (target >= start) & (target <= start + last)
        index = (target - start).clamp(0, last).unsqueeze(-1)
        return out.scatter_add(-1, index, torch.where(here, known.to_logp, 0.0).unsqueeze(-1))

    return pull_back(read, moves, read_inputs, cotangent)
