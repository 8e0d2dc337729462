"""Log-probability and entropy of every response token, the head streamed in chunks of rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch, targets
from .model import Model, Params

_CHUNK_BYTES = 2**24  # of logits at a time, per lane
_WIDTH = 4096  # tokens of the vocabulary at a time: their logits stay in a CPU's cache


class Scores(NamedTuple):
    """What a policy says of the response tokens; 0 off the response."""

    logp: Tensor  # [..., N, R] nats, of the token that was sampled
    entropy: Tensor  # [..., N, R] nats, of the whole next-token distribution given the prefix


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn, and so which policy is scored: temperature first, then top-p."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(
                f"Sampling: temperature must be positive, not {self.temperature}. "
                "Greedy decoding has no entropy and no gradient."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must lie in (0, 1], not {self.top_p}.")


def scorer(
    model: Model,
    base: Params,
    *,
    sampling: Sampling = Sampling(),
    support: Params | None = None,
    chunk: int | None = None,
) -> Callable[[Params, Batch], Scores]:
    """A pure function of the trainable parameters: the scores of a batch's responses.

    ``logp_k = log pi(y_k | x, y_<k)`` and ``H_k = -sum_y pi(y) log pi(y)`` over the full softmax
    of ``logits / temperature`` (Rao-Blackwell: the entropy given the prefix, not a sampled one).
    With top-p both are of the renormalised nucleus, whose tokens are those at `support`, so that
    the policy stays differentiable; a token outside scores -inf.

    Args:
        model, base: from `split`.
        sampling: the policy's temperature and top-p.
        support: parameters whose nucleus is held fixed; required if ``top_p < 1``, it costs one
            forward more.
        chunk: response positions per pass through the head; the default fills 16 MiB of logits.
            It bounds memory and changes results by rounding only.

    Returns:
        ``fn(params, batch) -> Scores`` with arrays [N, R]; row-separable.
    """
    if sampling.top_p < 1 and support is None:
        raise ValueError(
            f"scorer: top_p = {sampling.top_p} needs support=, the parameters whose nucleus is "
            "held fixed (those that sampled the responses)."
        )

    def read(params: Params, hidden: Tensor, tokens: slice = slice(None)) -> Tensor:
        out = model.head(params, base, hidden.unsqueeze(0), tokens).squeeze(0)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return out if sampling.temperature == 1 else out / sampling.temperature

    def score(params: Params, batch: Batch) -> Scores:
        hidden = model.hidden(params, base, batch).flatten(0, 1)
        target = targets(batch).flatten()
        fixed = None
        if sampling.top_p < 1:
            fixed = model.hidden(support, base, batch).flatten(0, 1)
        width = model.vocabulary if fixed is not None else _WIDTH
        rows = chunk or max(_CHUNK_BYTES // (4 * min(width, model.vocabulary)), 1)
        parts = []
        for start in range(0, len(target), rows):
            some = slice(start, start + rows)
            h, y = hidden[some], target[some]
            if fixed is not None:
                keep = nucleus(read(support, fixed[some]), sampling.top_p)
                slices = [read(params, h).masked_fill(~keep, -torch.inf)]
            else:
                edges = range(0, model.vocabulary, width)
                slices = (read(params, h, slice(v, v + width)) for v in edges)
            parts.append(logp_and_entropy(slices, y))
        flat = (torch.cat(part) for part in zip(*parts, strict=True))
        zero = hidden.new_zeros(())
        return Scores(
            *(torch.where(batch.response, f.unflatten(0, batch.response.shape), zero) for f in flat)
        )

    return score


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
    start, m = 0, None
    for logits in slices:
        largest = logits.amax(-1).detach().clamp(min=torch.finfo(logits.dtype).min)
        before, m = m, largest if m is None else torch.maximum(m, largest)
        # e^z is exactly 0 there in float64 already, and the clamp stops the tangent of an infinity.
        z = (logits - m.unsqueeze(-1)).clamp(min=-1e4)
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
    return y - m - log_s, log_s - t / s


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens with probability at least `top_p`, [..., V] bool.

    The same rule as Hugging Face's sampler: tokens are dropped, least likely first, while their
    cumulative probability is at most ``1 - top_p``; the likeliest always stays.
    """
    ascending, index = logits.sort(-1)
    keep = ascending.softmax(-1).cumsum(-1) > 1 - top_p
    keep[..., -1] = True
    return torch.zeros_like(keep).scatter(-1, index, keep)
