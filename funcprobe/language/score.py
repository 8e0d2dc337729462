"""Log-probability and entropy, or a readout, of every response token; the head in chunks."""

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


class Readings(NamedTuple):
    """Log-probability and what a readout says of the response tokens; 0 off the response."""

    logp: Tensor  # [..., N, R] nats, of the token that was sampled
    value: Tensor  # [..., N, R] in the readout's own unit


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
    readout: Callable[..., Tensor] | None = None,
    reference: Params | None = None,
    chunk: int | None = None,
) -> Callable[[Params, Batch], Scores | Readings]:
    """A pure function of the trainable parameters: the scores of a batch's responses.

    ``logp_k = log pi(y_k | x, y_<k)`` and ``H_k = -sum_y pi(y) log pi(y)`` over the full softmax
    of ``logits / temperature`` (Rao-Blackwell: the entropy given the prefix, not a sampled one).
    With top-p both are of the renormalised nucleus, whose tokens are those at `support`, so that
    the policy stays differentiable; a token outside scores -inf. With a readout it gives that in
    the place of the entropy.

    Args:
        model, base: from `split`.
        sampling: the policy's temperature and top-p.
        support: parameters whose nucleus is held fixed; required if ``top_p < 1``, it costs one
            forward more.
        readout: ``(logits [T, V], target [T]) -> [T]``, of the logits over the temperature, -inf
            outside the nucleus; see `readouts`.
        reference: parameters whose logits, under the same settings, the readout gets as a third
            argument; they stay fixed, and cost one forward more.
        chunk: response positions per pass through the head; the default fills 16 MiB of logits.
            It bounds memory and changes results by rounding only.

    Returns:
        ``fn(params, batch) -> Scores``, or `Readings` with a readout; arrays [N, R];
        row-separable.

    Raises:
        ValueError: ``top_p < 1`` without `support`, `reference` without `readout`; where the
            function is called, a readout that does not give one floating number a token.
    """
    if sampling.top_p < 1 and support is None:
        raise ValueError(
            f"scorer: top_p = {sampling.top_p} needs support=, the parameters whose nucleus is "
            "held fixed (those that sampled the responses)."
        )
    if reference is not None and readout is None:
        raise ValueError(
            "scorer: reference= is an argument of the readout, and there is none. Pass readout=, "
            "readouts.expected_kl for instance."
        )

    def read(params: Params, hidden: Tensor, tokens: slice = slice(None)) -> Tensor:
        out = model.head(params, base, hidden.unsqueeze(0), tokens).squeeze(0)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return out if sampling.temperature == 1 else out / sampling.temperature

    def say(target: Tensor, *logits: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = logp_and_entropy(logits[:1], target)
        if readout is None:
            return logp, entropy
        value = readout(logits[0], target, *logits[1:])
        if value.shape != target.shape or not value.is_floating_point():
            raise ValueError(
                f"scorer: a readout gives one floating number a token, {list(target.shape)}; this "
                f"one gave {list(value.shape)} of {value.dtype}. Reduce it over the vocabulary."
            )
        return logp, value

    def score(params: Params, batch: Batch) -> Scores | Readings:
        policies = [params] if reference is None else [params, reference]
        fixed = support if sampling.top_p < 1 else None
        hidden = [
            model.hidden(p, base, batch).flatten(0, 1)
            for p in (policies if fixed is None else [*policies, fixed])
        ]
        target = targets(batch).flatten()
        whole = readout is not None or fixed is not None
        width = model.vocabulary if whole else min(_WIDTH, model.vocabulary)
        rows = chunk or max(_CHUNK_BYTES // (4 * width), 1)
        parts = []
        for start in range(0, len(target), rows):
            some = slice(start, start + rows)
            if not whole:
                edges = range(0, model.vocabulary, width)
                slices = (read(params, hidden[0][some], slice(v, v + width)) for v in edges)
                parts.append(logp_and_entropy(slices, target[some]))
                continue
            z = [read(p, h[some]) for p, h in zip(policies, hidden, strict=False)]
            if fixed is not None:
                outside = ~nucleus(read(fixed, hidden[-1][some]), sampling.top_p)
                z = [each.masked_fill(outside, -torch.inf) for each in z]
            parts.append(say(target[some], *z))
        flat = (torch.cat(part) for part in zip(*parts, strict=True))
        zero = hidden[0].new_zeros(())
        kind = Scores if readout is None else Readings
        return kind(
            *(torch.where(batch.response, f.unflatten(0, batch.response.shape), zero) for f in flat)
        )

    return score


def with_value(
    score: Callable[[object, Batch], Scores | Readings], value: Callable[[Batch], Tensor]
) -> Callable[[object, Batch], Readings]:
    """A scorer whose value is one number a sequence: summed over a row, it is that number.

    It stands at the first response position, 0 elsewhere, and does not move with the parameters:
    what moves its mean is the policy, through the importance weights. A row without a response has
    no place for it.

    Args:
        score: a scorer, for the log-probabilities.
        value: ``batch -> [N]``, of the batch's rows alone; ``lambda batch: batch.reward``.

    Returns:
        ``fn(params, batch) -> Readings``; row-separable.
    """

    def fn(params, batch: Batch) -> Readings:
        logp = score(params, batch).logp
        first = torch.zeros_like(batch.response)
        first[:, 0] = True
        each = value(batch).to(logp.dtype).unsqueeze(-1)
        return Readings(logp, torch.where(first & batch.response, each, logp.new_zeros(())))

    return fn


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
        largest = logits.detach().amax(-1).clamp(min=torch.finfo(logits.dtype).min)
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
