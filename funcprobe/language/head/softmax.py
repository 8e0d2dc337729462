"""Log-probability and entropy of softmaxes that are never held whole, in every mode."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from .rematerialise import Needed, Tensors, pull_back, recompute

# e^-10000 is exactly 0 in float64, and a clamp there stops the tangent of an infinity.
_LEAST = -1e4


def logp_and_entropy(slices: Iterable[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` and entropy of a softmax whose logits arrive in slices.

    With m the largest logit, ``z = logits - m``, ``s = sum e^z`` and ``t = sum z e^z``:
    ``logp = z_y - log s`` and ``H = log s - t / s``, which does not cancel. The sums are rescaled
    as m grows, so no more than a slice is held. A logit of -inf has probability 0 and adds nothing
    to H, in value and in every derivative.

    Args:
        slices: the logits [..., V] in consecutive slices of the last axis.
        target: [...] int64, the token whose log-probability is wanted.

    >>> logits = torch.tensor([0.0, 0.0, -torch.inf])
    >>> logp, entropy = logp_and_entropy(logits.split(2), torch.tensor(1))
    >>> round(float(logp.exp()), 6), round(float(entropy.exp()), 6)
    (0.5, 2.0)
    """
    return _statistics(slices, target)[:2]


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

    Reverse mode keeps hidden states and the numbers [T] of each token, and reads each slice of the
    logits again. With p the softmax of z,

    .. math:: d\,logp / dz_j = 1_{j = y} - p_j, \qquad dH / dz_j = -p_j (\log p_j + H).

    Args:
        read: ``(hidden, *tensors) -> logits``; of a slice of the vocabulary if every tensor that
            leads with V is given in that slice.
        hidden: [T, D].
        target: [T] int64.
        tensors: the head's own, weights and all.
        vocabulary: V.
        width: tokens of a slice.

    Returns:
        ``(logp, entropy)``, [T] nats.
    """
    by_token = [t.shape[:1] == (vocabulary,) for t in tensors]

    def cut(tensors: Tensors) -> Iterator[tuple[int, Tensors]]:
        for start in range(0, vocabulary, width):
            yield (
                start,
                tuple(
                    t[start : start + width] if some else t
                    for t, some in zip(tensors, by_token, strict=True)
                ),
            )

    def forward(hidden: Tensor, target: Tensor, *tensors: Tensor) -> Tensors:
        return _statistics((read(hidden, *some) for _, some in cut(tensors)), target)

    def pull(needed: Needed, inputs: Tensors, outputs: Tensors, cotangents: Tensors):
        (hidden, target, *tensors), (_, *seen) = inputs, outputs
        moves = (needed[0], *needed[2:])
        joined = [some for some, moving in zip((False, *by_token), moves, strict=True) if moving]
        total = [[] if some else None for some in joined]
        for start, own in cut(tensors):
            of_slice = partial(_pull_slice, read, moves, start)
            parts = recompute(of_slice, hidden, target, *seen, *cotangents[:3], *own)
            for i, part in enumerate(parts):
                if joined[i]:
                    total[i].append(part)
                else:
                    # In at least float32.
                    part = part.to(torch.promote_types(part.dtype, torch.float32))
                    total[i] = part if total[i] is None else total[i] + part
        grads = (torch.cat(g) if some else g for g, some in zip(total, joined, strict=True))
        kinds = (hidden, *tensors)
        first, *rest = (
            next(grads).to(x.dtype) if moving else None
            for x, moving in zip(kinds, moves, strict=True)
        )
        return first, None, *rest

    return recompute(forward, hidden, target, *tensors, pull=pull)[:2]


def _statistics(slices: Iterable[Tensor], target: Tensor) -> Tensors:
    """Log-probability, entropy, log s and m, the last without a derivative."""
    start, m = 0, None
    for logits in slices:
        largest = logits.detach().amax(-1).clamp(min=torch.finfo(logits.dtype).min)
        before, m = m, largest if m is None else torch.maximum(m, largest)
        z = (logits - m.unsqueeze(-1)).clamp(min=_LEAST)
        e = z.exp()
        s_here, t_here = e.sum(-1), (z * e).sum(-1)
        y_here = logits.gather(-1, (target - start).clamp(0, logits.shape[-1] - 1).unsqueeze(-1))
        y_here = y_here.squeeze(-1)
        if before is None:
            s, t, y = s_here, t_here, y_here
        else:
            lower = before - m
            scale = lower.exp()
            s, t = s * scale + s_here, (t + lower * s) * scale + t_here
            y = torch.where(target >= start, y_here, y)
        start += logits.shape[-1]
    log_s = s.log()
    return y - m - log_s, log_s - t / s, log_s, m


def _pull_slice(
    read: Callable[..., Tensor],
    moves: Needed,
    start: int,
    hidden: Tensor,
    target: Tensor,
    entropy: Tensor,
    log_s: Tensor,
    m: Tensor,
    to_logp: Tensor,
    to_entropy: Tensor,
    to_log_s: Tensor,
    *tensors: Tensor,
) -> Tensors:
    """What a slice of the logits passes back to the hidden states and the head's tensors."""

    def cotangent(logits: Tensor) -> Tensor:
        # m only shifts, so its derivative is left out here as in the statistics.
        logp = (logits - m.unsqueeze(-1)).clamp(min=_LEAST) - log_s.unsqueeze(-1)
        shared = (to_log_s - to_logp - to_entropy * entropy).unsqueeze(-1)
        out = logp.exp() * (shared - to_entropy.unsqueeze(-1) * logp)
        last = logits.shape[-1] - 1
        here = (target >= start) & (target <= start + last)
        index = (target - start).clamp(0, last).unsqueeze(-1)
        return out.scatter_add(-1, index, torch.where(here, to_logp, 0.0).unsqueeze(-1))

    return pull_back(read, moves, (hidden, *tensors), cotangent)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens with probability at least `top_p`, [..., V] bool.

    The same rule as Hugging Face's sampler: tokens are dropped, least likely first, while their
    cumulative probability is at most ``1 - top_p``; the likeliest always stays.
    """
    ascending, index = logits.sort(-1)
    keep = ascending.softmax(-1).cumsum(-1) > 1 - top_p
    keep[..., -1] = True
    return torch.zeros_like(keep).scatter(-1, index, keep)
