"""The log-probability and entropy, or a readout, of every response token, chunk by chunk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .head.rematerialise import Tensors, closed, rematerialise
from .head.softmax import WIDTH, head_scores, logp_and_entropy
from .model.split import Model, Params
from .sampling import Sampling
from .summaries import summary
from .tracing import concrete

_CHUNK_BYTES = 2**24  # of logits at a time, per lane

Readout = Callable[..., Tensor]  # (logits [T, V], target [T][, reference [T, V]]) -> [T]


class Scores(NamedTuple):
    """The log-probability and the entropy of the response tokens under a policy.

    Both are 0 off the response.
    """

    logp: Tensor  # [..., N, R] nats, of the token that was sampled
    entropy: Tensor  # [..., N, R] nats, of the whole next-token distribution given the prefix

    def __repr__(self) -> str:
        return summary(self)


class Readings(NamedTuple):
    """The log-probability of the response tokens under a policy, and what a readout gives of them.

    Both are 0 off the response.
    """

    logp: Tensor  # [..., N, R] nats, of the token that was sampled
    value: Tensor  # [..., N, R] in the readout's own unit

    def __repr__(self) -> str:
        return summary(self)


Score = Callable[[Params, Batch], Scores | Readings]


def scorer(
    model: Model,
    base: Params,
    *,
    sampling: Sampling = Sampling(),
    support: Params | None = None,
    readout: Readout | None = None,
    reference: Params | None = None,
    chunk: int | None = None,
) -> Score:
    """A pure function of the trainable parameters: the scores of a batch's responses.

    ``logp_k = log pi(y_k | x, y_<k)`` and ``H_k = -sum_y pi(y) log pi(y)`` over the full softmax
    of ``logits / temperature`` (Rao-Blackwell: the entropy given the prefix, not a sampled one).
    With top-k, top-p or min-p, both are those of the tokens that remain possible, renormalised.
    These are the tokens that are possible at `support`, so that the policy stays differentiable. A
    readout's values take the place of the entropy.

    An impossible response token has a log-probability of -inf, and the change of it along a
    direction is nan: those responses were sampled with other settings, or from another model, than
    they are scored with. Otherwise a score is nan only if the logits are, as after a step so long
    that the model overflows.

    Args:
        model, base: what `split` gave.
        sampling: the policy's temperature, top-p, top-k and min-p.
        support: the parameters that decide which tokens are possible. If ``sampling.truncates``
            they are required, and cost one more forward pass; otherwise they are not used.
        readout: ``(logits [T, V], target [T]) -> [T]``, a function of its arguments alone. Its
            logits are divided by the temperature, and -inf at impossible tokens; see `readouts`.
        reference: parameters that stay fixed. The readout gets their logits, under the same
            settings, as a third argument, which costs one more forward pass.
        chunk: response positions per pass through the head; the default fills 16 MiB of logits.
            It bounds memory, forward and backward, and changes results by rounding only.

    Returns:
        ``fn(params, batch) -> Scores``, or `Readings` with a readout. The arrays are [N, R], and
        each row is computed from the batch's same row alone.

    Raises:
        ValueError: ``sampling.truncates`` without `support`, or `reference` without `readout`. The
            function itself raises it if a readout does not give one floating number a token.
    """
    if sampling.truncates and support is None:
        raise ValueError(
            f"scorer: {sampling} needs support=, the parameters that decide which tokens are "
            "possible. Pass those that sampled the responses."
        )
    if reference is not None and readout is None:
        raise ValueError(
            "scorer: reference= is an argument of the readout, and there is none. Pass readout=, "
            "readouts.expected_kl for instance."
        )
    return _Scorer(model, base, sampling, support, readout, reference, chunk)


@dataclass(frozen=True, eq=False, repr=False)
class _Scorer:
    """What `scorer` returns; see there for the fields."""

    model: Model
    base: Params
    sampling: Sampling
    support: Params | None
    readout: Readout | None
    reference: Params | None
    chunk: int | None

    def __repr__(self) -> str:
        readout = "entropy" if self.readout is None else self.readout
        return f"scorer({getattr(readout, '__name__', readout)}, {self.sampling})"

    @property
    def separable(self) -> bool:
        """Whether the rows are known not to depend on each other; a readout could make them."""
        return self.readout is None

    @property
    def false_derivative(self) -> str:
        """How its derivative differs from that of its values; "" if it does not."""
        return self.model.false_derivative

    @property
    def nan_means(self) -> str:
        """What a nan in the scores, or in a change or derivative of them, means."""
        return (
            "Either the parameters or the model's logits hold nan, or a scored token has "
            "probability 0: a token that top-k, top-p or min-p excludes scores -inf, which has no "
            "change. Such a response was sampled with other settings or from another model."
        )

    def __call__(self, params: Params, batch: Batch) -> Scores | Readings:
        """The scores of the batch's responses at `params`, [N, R]."""
        layout = self.model.layout(batch)
        target = layout.target
        policies = self._policies(params)
        hidden = [self.model.states(policy, self.base, layout) for policy in policies]
        heads = [self._head_tensors(policy) for policy in policies]
        call = rematerialise if self._closed(target.device) else _call
        blocks = [
            self._block(target[rows], [states[rows] for states in hidden], heads, call)
            for rows in self._chunks(len(target))
        ]
        zero = hidden[0].new_zeros(())
        flat = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        scores = (torch.where(batch.response, x[layout.slot], zero) for x in flat)
        return Scores(*scores) if self.readout is None else Readings(*scores)

    def _policies(self, params: Params) -> list[Params]:
        """The policies whose logits are read: the scored one first, the support policy last."""
        support = self.support if self.sampling.truncates else None
        return [params, *(policy for policy in (self.reference, support) if policy is not None)]

    @property
    def _sliced(self) -> bool:
        """Whether the logits are read in slices of the vocabulary.

        So they are where nothing needs them all at once and the head may be cut.
        """
        return self.readout is None and not self.sampling.truncates and self.model.sliced

    def _temperature(self) -> tuple[Tensor, ...]:
        temperature = self.sampling.temperature
        return (temperature,) if isinstance(temperature, Tensor) else ()

    def _head_tensors(self, params: Params) -> Tensors:
        """The tensors that `_logits` reads at these parameters.

        A differentiable temperature is passed with the head's tensors.
        """
        names = self.model.head_names
        tensors = (params[name] if name in params else self.base[name] for name in names)
        return *tensors, *self._temperature()

    def _chunks(self, count: int) -> Iterator[slice]:
        """Slices of the response positions, each of which goes through the head at once."""
        vocabulary = self.model.vocabulary
        width = min(WIDTH, vocabulary) if self._sliced else vocabulary
        rows = self.chunk or max(_CHUNK_BYTES // (4 * width), 1)
        return (slice(start, start + rows) for start in range(0, count, rows))

    def _block(
        self,
        target: Tensor,
        hidden: list[Tensor],
        heads: list[Tensors],
        call: Callable[..., Tensors],
    ) -> Tensors:
        """Log-probability and entropy, or the readout's value, of a block of tokens, [T].

        `call` runs `_read` where all logits are needed at once: `rematerialise`, or a plain call.
        """
        if self._sliced:
            vocabulary = self.model.vocabulary
            width = min(WIDTH, vocabulary)
            return head_scores(
                self._logits, hidden[0], target, heads[0], vocabulary=vocabulary, width=width
            )
        pairs = zip(hidden, heads, strict=True)
        return call(self._read, target, *(x for states, head in pairs for x in (states, *head)))

    def _logits(self, hidden: Tensor, *tensors: Tensor) -> Tensor:
        """The logits over the temperature, [T, V] or a slice of V, in float32 at least."""
        names = self.model.head_names
        head = dict(zip(names, tensors[: len(names)], strict=True))
        out = self.model.head({}, head, hidden.unsqueeze(0)).squeeze(0)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if len(tensors) > len(names):
            return out / tensors[-1]
        return out if self.sampling.temperature == 1 else out / self.sampling.temperature

    def _read(self, target: Tensor, *inputs: Tensor) -> Tensors:
        """What `_block` returns, from all logits of a block of tokens at once.

        Args:
            target: [T] int64.
            inputs: for each policy its hidden states and its head's tensors. The support policy
                comes last.
        """
        size = 1 + len(self.model.head_names) + len(self._temperature())
        logits = [self._logits(*inputs[i : i + size]) for i in range(0, len(inputs), size)]
        if self.sampling.truncates:
            impossible = ~self.sampling.possible(logits.pop())
            logits = [z.masked_fill(impossible, -torch.inf) for z in logits]
        logp, entropy = logp_and_entropy(logits[:1], target)
        if self.readout is None:
            return logp, entropy
        value = self.readout(logits[0], target, *logits[1:])
        if value.shape != target.shape or not value.is_floating_point():
            raise ValueError(
                f"scorer: a readout gives one floating number a token, {list(target.shape)}; this "
                f"one gave {list(value.shape)} of {value.dtype}. Reduce it over the vocabulary."
            )
        return logp, value

    def _closed(self, device: torch.device) -> bool:
        """Whether a block may be computed again: the readout holds nothing that is differentiated.

        A readout that does must be followed as it runs, see `rematerialise`.
        """
        if self.readout is None or not torch.is_grad_enabled():
            return True
        logits = torch.zeros(1, self.model.vocabulary, device=device)
        target = torch.zeros(1, dtype=torch.int64, device=device)
        return closed(self.readout, logits, target, *[logits] * (self.reference is not None))


def with_value(
    score: Score, value: Callable[[Batch], Tensor]
) -> Callable[[Params, Batch], Readings]:
    """A scorer whose value is one number a sequence, which is the sum over the row.

    The number stands at the first response position, with 0 elsewhere. It does not move with the
    parameters: its mean changes because the policy does, through the importance weights. A row
    without a response has no place for it.

    Args:
        score: a scorer, for the log-probabilities.
        value: ``batch -> [N]``, row by row, ``lambda batch: batch.reward`` for instance.

    Returns:
        ``fn(params, batch) -> Readings``; row i depends on row i of the batch alone.

    Raises:
        ValueError: by the function that is returned, if a value is nan.
    """

    def fn(params: Params, batch: Batch) -> Readings:
        logp = score(params, batch).logp
        first = torch.zeros_like(batch.response)
        first[:, 0] = True
        first = first & batch.response
        numbers = value(batch).to(logp.dtype).unsqueeze(-1)
        _check_known(numbers, first, batch)
        return Readings(logp, torch.where(first, numbers, logp.new_zeros(())))

    return fn


def _check_known(numbers: Tensor, first: Tensor, batch: Batch) -> None:
    """Raises ValueError if a number [N, 1] that is used (where `first` is True) is nan."""
    unknown = (numbers.isnan() & first).any(-1)
    if concrete(unknown) and unknown.any():
        prompts = batch.group[unknown].unique().tolist()
        raise ValueError(
            f"with_value: the value is nan in {int(unknown.sum())} of these {batch.n} rows, of the "
            f"prompts (group) {prompts[:5]}. The batch lacks a field that the value reads: give it "
            "to collate, or write it into the file that read_batch reads."
        )


def _call(fn: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
    return fn(*inputs)
