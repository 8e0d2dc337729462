"""Log-probability and entropy, or a readout, of every response token; the head in chunks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .head.rematerialise import closed, recompute
from .head.softmax import head_scores, logp_and_entropy, nucleus
from .model.split import Model, Params

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
        readout: ``(logits [T, V], target [T]) -> [T]``, a function of its arguments alone: the
            logits over the temperature, -inf outside the nucleus; see `readouts`.
        reference: parameters whose logits, under the same settings, the readout gets as a third
            argument; they stay fixed, and cost one forward more.
        chunk: response positions per pass through the head; the default fills 16 MiB of logits.
            It bounds memory, forward and backward, and changes results by rounding only.

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

    narrow, names = sampling.top_p < 1, model.head_names
    # A temperature to differentiate in goes where the head's own tensors do.
    heat = [sampling.temperature] if isinstance(sampling.temperature, Tensor) else []

    def of_head(params: Params) -> list[Tensor]:
        return [params[name] if name in params else base[name] for name in names] + heat

    def read(hidden: Tensor, *tensors: Tensor) -> Tensor:
        own = dict(zip(names, tensors, strict=not heat))
        out = model.head({}, own, hidden.unsqueeze(0)).squeeze(0)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if heat:
            return out / tensors[-1]
        return out if sampling.temperature == 1 else out / sampling.temperature

    def say(target: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of each policy the hidden states and the head's tensors, the fixed one's the last."""
        each = 1 + len(names) + len(heat)
        logits = [read(*inputs[i : i + each]) for i in range(0, len(inputs), each)]
        if narrow:
            outside = ~nucleus(logits.pop(), sampling.top_p)
            logits = [z.masked_fill(outside, -torch.inf) for z in logits]
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

    def alone(device: torch.device) -> bool:
        """Whether the readout may be computed again: it holds nothing that is differentiated."""
        z = torch.zeros(1, model.vocabulary, device=device)
        target = torch.zeros(1, dtype=torch.int64, device=device)
        references = [] if reference is None else [z]
        return not torch.is_grad_enabled() or closed(readout, z, target, *references)

    def score(params: Params, batch: Batch) -> Scores | Readings:
        policies = [params]
        policies += [] if reference is None else [reference]
        policies += [support] if narrow else []
        layout = model.layout(batch)
        hidden, target = [model.states(p, base, layout) for p in policies], layout.target
        heads = [of_head(p) for p in policies]
        whole = readout is not None or narrow
        size = {"vocabulary": model.vocabulary, "width": min(_WIDTH, model.vocabulary)}
        rows = chunk or max(_CHUNK_BYTES // (4 * size["vocabulary" if whole else "width"]), 1)
        again = recompute if readout is None or alone(target.device) else _once
        parts = []
        for start in range(0, len(target), rows):
            some = slice(start, start + rows)
            if whole:
                states = zip(hidden, heads, strict=True)
                inputs = [x for h, tensors in states for x in (h[some], *tensors)]
                parts.append(again(say, target[some], *inputs))
            else:
                parts.append(head_scores(read, hidden[0][some], target[some], heads[0], **size))
        flat = (torch.cat(part) for part in zip(*parts, strict=True))
        zero = hidden[0].new_zeros(())
        kind = Scores if readout is None else Readings
        return kind(*(torch.where(batch.response, f[layout.slot], zero) for f in flat))

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


def _once(fn: Callable, *inputs: Tensor):
    return fn(*inputs)
