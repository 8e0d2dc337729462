"""Log-probability and entropy of every response token, the head streamed in chunks of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch, targets
from .model import Model, Params

_CHUNK_BYTES = 2**24  # of logits at a time, per lane


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

    def read(params: Params, hidden: Tensor) -> Tensor:
        out = model.head(params, base, hidden.unsqueeze(0)).squeeze(0)
        return out.to(torch.promote_types(out.dtype, torch.float32)) / sampling.temperature

    def score(params: Params, batch: Batch) -> Scores:
        hidden = model.hidden(params, base, batch).flatten(0, 1)
        target = targets(batch).flatten()
        fixed = None
        if sampling.top_p < 1:
            fixed = model.hidden(support, base, batch).flatten(0, 1)
        rows = chunk or max(_CHUNK_BYTES // (4 * model.vocabulary), 1)
        parts = []
        for start in range(0, len(target), rows):
            some = slice(start, start + rows)
            z = read(params, hidden[some])
            if fixed is not None:
                z = z.masked_fill(~nucleus(read(support, fixed[some]), sampling.top_p), -torch.inf)
            parts.append(logp_and_entropy(z, target[some]))
        flat = (torch.cat(part) for part in zip(*parts, strict=True))
        zero = hidden.new_zeros(())
        return Scores(
            *(torch.where(batch.response, f.unflatten(0, batch.response.shape), zero) for f in flat)
        )

    return score


def logp_and_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` and entropy of softmax(`logits`), both [...] nats.

    With ``z = logits - max``, ``s = sum e^z`` and ``t = sum z e^z``: ``logp = z_y - log s`` and
    ``H = log s - t / s``, which does not cancel. A logit of -inf has probability 0 and adds
    nothing to H, in value and in every derivative.

    >>> logp, entropy = logp_and_entropy(torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor(1))
    >>> round(float(logp.exp()), 6), round(float(entropy.exp()), 6)
    (0.5, 2.0)
    """
    z = logits - logits.amax(-1, keepdim=True).detach()
    # e^z is exactly 0 there in float64 already, and the clamp stops the tangent of an infinity.
    finite = z.clamp(min=-1e4)
    e = finite.exp()
    s = e.sum(-1)
    log_s = s.log()
    logp = z.gather(-1, target.unsqueeze(-1)).squeeze(-1) - log_s
    return logp, log_s - (finite * e).sum(-1) / s


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens with probability at least `top_p`, [..., V] bool.

    The same rule as Hugging Face's sampler: tokens are dropped, least likely first, while their
    cumulative probability is at most ``1 - top_p``; the likeliest always stays.
    """
    ascending, index = logits.sort(-1)
    keep = ascending.softmax(-1).cumsum(-1) > 1 - top_p
    keep[..., -1] = True
    return torch.zeros_like(keep).scatter(-1, index, keep)
