"""A batch of prompts and responses as one NamedTuple of arrays, right-padded, rows leading."""

from collections.abc import Sequence, Sized
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .summaries import summary
from .tracing import concrete

# The responses that share a sequence also attend to each other's keys, which are then masked.
# Sharing wastes work on masked keys; below 32 prompt tokens the waste exceeds the saving, and so it
# does in sequences of more than 512 tokens.
SHARED = 32
_SEQUENCE = 512


class Batch(NamedTuple):
    """Prompts and responses with what an objective needs to know of them. Every field leads with N.

    There are N sequences, L positions and R response positions. Unknown floating fields are nan; a
    function that needs an unknown field refuses the batch and names the field.

    The number of rows is `n`. As for every NamedTuple, ``len(batch)`` is the number of fields,
    ``batch[i]`` is the i-th field and iterating gives the fields; `rows` selects rows.
    """

    tokens: Tensor  # [N, L] int64, prompt then response then padding
    attention: Tensor  # [N, L] bool, True on prompt and response
    position: Tensor  # [N, R] int64, index into L of the token that predicts response token k
    response: Tensor  # [N, R] bool, True for k < T_i
    group: Tensor  # [N] int64, prompt id: the unit of resampling
    reward: Tensor  # [N] float64
    advantage: Tensor  # [N] float64
    weight: Tensor  # [N, R] float64, aggregation weights of the objective
    old_logp: Tensor  # [N, R] float64, nats under the behaviour policy
    ref_logp: Tensor  # [N, R] float64, nats under a KL reference

    @property
    def n(self) -> int:
        """The number of rows, N."""
        return self.tokens.shape[0]

    def row_hashes(self) -> Tensor:
        """A hash of each row's prompt and response, [N] int64, by which rows can be told apart.

        Rows with the same prompt tokens and the same response tokens have the same hash, on every
        device and in every batch: padding and the other fields do not enter it. The same tokens
        divided elsewhere into prompt and response have another hash.

        >>> batch = collate([[5, 6], [5], [5, 6]], [[7], [6, 7], [7]])
        >>> a, b, c = batch.row_hashes().tolist()
        >>> a == c, a == b
        (True, False)
        """
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        # A sum over the tokens, each mixed with its place, needs no order and ignores padding.
        mixed = _mix(_mix(self.tokens) + place)
        content = torch.where(self.attention, mixed, 0).sum(1)
        return _mix(_mix(content + self.attention.sum(1)) + self.response.sum(1))

    def rows(self, index: slice | Tensor) -> "Batch":
        """The rows that `index` (a slice, an integer or boolean tensor) selects."""
        return Batch(*(leaf[index] for leaf in self))

    def cut(self, tokens: int) -> tuple[list["Batch"], Tensor]:
        """As `by_length`, but every block keeps all L positions and R response slots.

        Functions that take a batch block by block cut it like this unless they are told how many
        rows a block has.

        Raises:
            ValueError: `tokens` is below 1.
        """
        if tokens < 1:
            raise ValueError(f"by_length: tokens must be at least 1, not {tokens}.")
        index = _cut(self, tokens)
        return [self.rows(rows.to(self.tokens.device)) for rows in index], torch.cat(index)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(leaf.to(device) for leaf in self))

    def __repr__(self) -> str:
        if not all(isinstance(leaf, Tensor) and concrete(leaf) for leaf in self):
            return summary(self)
        if self.tokens.ndim != 2 or self.tokens.is_meta:
            return summary(self)
        return (
            f"Batch({self.n} rows of {len(self.group.unique())} prompts, L={self.tokens.shape[1]}, "
            f"R={self.response.shape[1]}, {int(self.response.sum())} response tokens,\n"
            f"      {_known_fields(self)})"
        )


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int = 0,
    group: Sequence[int] | Tensor | None = None,
    reward: Sequence[float] | Tensor | None = None,
    advantage: Sequence[float] | Tensor | None = None,
    old_logp: Sequence[Sequence[float]] | Tensor | None = None,
) -> Batch:
    """Right-pads token ids into a `Batch`.

    Lengths come from the lists, never from `pad_id`, so that a pad id equal to the EOS id is safe.
    A sampled EOS is part of the response: it is scored and counted.

    Args:
        prompts: N lists of token ids. No list may be empty, since a response token needs a token
            that predicts it.
        responses: N lists of token ids. Some lists may be empty, but not all of them.
        pad_id: fills `tokens` past each row's end; its value changes no result.
        group: [N] prompt ids. Rows with equal prompts share one if they are not given.
        reward, advantage: [N]; nan if not given.
        old_logp: T_i nats for each row, as lists or as a tensor with any numbers past T_i; nan if
            not given.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: lengths disagree, a prompt is empty, or every response is.

    >>> batch = collate([[5, 6], [7]], [[1, 2, 3], [4]], reward=[1.0, 0.0])
    >>> batch
    Batch(2 rows of 2 prompts, L=5, R=3, 4 response tokens,
          known: reward, unknown: advantage, weight, old_logp, ref_logp)
    >>> batch.tokens.tolist()
    [[5, 6, 1, 2, 3], [7, 4, 0, 0, 0]]
    >>> batch.position.tolist()
    [[1, 2, 3], [0, 0, 0]]
    """
    n = len(prompts)
    _check_lists(prompts, responses)
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    steps = max(len(r) for r in responses)
    tokens = torch.full((n, width), pad_id, dtype=torch.int64)
    attention = torch.zeros(n, width, dtype=torch.bool)
    position = torch.zeros(n, steps, dtype=torch.int64)
    response = torch.zeros(n, steps, dtype=torch.bool)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        row = torch.tensor([*p, *r], dtype=torch.int64)
        tokens[i, : len(row)] = row
        attention[i, : len(row)] = True
        position[i, : len(r)] = torch.arange(len(p) - 1, len(row) - 1)
        response[i, : len(r)] = True
    return Batch(
        tokens=tokens,
        attention=attention,
        position=position,
        response=response,
        group=_groups(prompts) if group is None else _column("group", group, n, torch.int64),
        reward=_column("reward", reward, n),
        advantage=_column("advantage", advantage, n),
        weight=torch.full((n, steps), torch.nan, dtype=torch.float64),
        old_logp=_ragged("old_logp", old_logp, response),
        ref_logp=torch.full((n, steps), torch.nan, dtype=torch.float64),
    )


def by_length(batch: Batch, *, tokens: int) -> tuple[list[Batch], Tensor]:
    """Cuts a batch into blocks of rows of similar length, each trimmed to its longest row.

    Rows that share a long prompt follow one another, since a scorer reads it once for all of them.

    Args:
        batch: N rows.
        tokens: the most sequences times positions in a block. Rows that share a prompt of at least
            32 tokens are one sequence, as long as it has at most 512. A single sequence of more
            than `tokens` is a block of its own.

    Returns:
        The blocks, and `order` [N] int64: ``batch.rows(order)`` is the blocks one after another,
        padding aside. `join` takes it to restore the rows' order.

    Raises:
        ValueError: `tokens` is below 1.

    >>> batch = collate([[5], [5], [5]], [[1, 2, 3, 4], [1], [1, 2]])
    >>> blocks, order = by_length(batch, tokens=6)
    >>> [tuple(block.tokens.shape) for block in blocks], order.tolist()
    ([(1, 5), (2, 3)], [0, 2, 1])
    """
    blocks, order = batch.cut(tokens)
    return [trim(block) for block in blocks], order


def sequences(prompt: list[int], steps: list[int], same: list[bool]) -> tuple[list[int], list[int]]:
    """Puts rows into sequences: a prompt, then the responses to it one after another.

    Args:
        prompt, steps: the length of each row's prompt and response, in tokens.
        same: whether a row may join the sequence of the row before.

    Returns:
        Each row's sequence, and where in it the row's response starts.
    """
    sequence: list[int] = []
    start: list[int] = []
    end = 0
    for p, t, joins in zip(prompt, steps, same, strict=True):
        if sequence and joins and end + t <= _SEQUENCE:
            sequence.append(sequence[-1])
        else:
            sequence.append(sequence[-1] + 1 if sequence else 0)
            end = p
        start.append(end)
        end += max(t - 1, 0)  # The last token of a response predicts nothing.
    return sequence, start


def trim(batch: Batch) -> Batch:
    """Drops the positions and response slots that no row of the batch uses (at least one stays)."""
    width = max(int(batch.attention.sum(1).max()), 1)
    steps = max(int(batch.response.sum(1).max()), 1)
    return batch._replace(
        tokens=batch.tokens[:, :width],
        attention=batch.attention[:, :width],
        **{
            name: getattr(batch, name)[:, :steps]
            for name in ("position", "response", "weight", "old_logp", "ref_logp")
        },
    )


def targets(batch: Batch) -> Tensor:
    """The response tokens themselves, [N, R] int64, aligned on `position`; arbitrary past T_i."""
    last = batch.tokens.shape[1] - 1
    return batch.tokens.gather(1, (batch.position + 1).clamp(max=last))


def lengths(batch: Batch) -> Tensor:
    """Response lengths T_i, [N] int64."""
    return batch.response.sum(1)


def _cut(batch: Batch, tokens: int) -> list[Tensor]:
    """The rows of each block: those of one prompt together, sequences of like length together."""
    prompt, steps = (batch.position[:, 0] + 1).tolist(), batch.response.sum(1).tolist()
    rows = zip(batch.tokens.cpu().numpy(), prompt, strict=True)
    names = [row[:length].tobytes() for row, length in rows]
    ids = {name: i for i, name in enumerate(dict.fromkeys(names))}
    order = sorted(range(len(names)), key=lambda i: ids[names[i]])
    same = [
        k > 0 and prompt[i] >= SHARED
        for _, group in groupby(order, key=lambda i: names[i])
        for k, i in enumerate(group)
    ]
    sequence, start = sequences([prompt[i] for i in order], [steps[i] for i in order], same)
    members: dict[int, list[int]] = {}
    length: dict[int, int] = {}
    for i, where, begins in zip(order, sequence, start, strict=True):
        members.setdefault(where, []).append(i)
        length[where] = begins + steps[i]
    blocks = _blocks(length, tokens)
    return [torch.tensor([i for where in block for i in members[where]]) for block in blocks]


def _blocks(length: dict[int, int], tokens: int) -> list[list[int]]:
    """Sequences, the longest first, in blocks that hold at most `tokens` when padded."""
    blocks: list[list[int]] = []
    longest = 0
    for sequence in sorted(length, key=length.__getitem__, reverse=True):
        if not blocks or (len(blocks[-1]) + 1) * longest > tokens:
            blocks.append([])
            longest = length[sequence]
        blocks[-1].append(sequence)
    return blocks


def _mix(x: Tensor) -> Tensor:
    """Scatters int64 one to one: the finaliser of SplitMix64 (Steele et al. 2014).

    Multiplications wrap around. The shifts are logical: what an arithmetic one fills is masked.
    """
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))


def unknown_rows(batch: Batch, name: str) -> Tensor:
    """Which rows lack a floating field, [N] bool.

    A row lacks a field [N] that is nan, and a field [N, R] that is nan at any response token.
    """
    value = getattr(batch, name)
    return (value.isnan() & batch.response).any(1) if value.ndim == 2 else value.isnan()


def _known_fields(batch: Batch) -> str:
    """The floating fields by what is known of them, for printing."""
    known, unknown = [], []
    for name in batch._fields:
        value = getattr(batch, name)
        if value.is_floating_point():
            count = int(batch.response.any(1).sum()) if value.ndim == 2 else batch.n
            missing = int(unknown_rows(batch, name).sum())
            if missing < count:
                known.append(f"{name} in {count - missing} rows" if missing else name)
            else:
                unknown.append(name)
    return f"known: {', '.join(known) or 'none'}, unknown: {', '.join(unknown) or 'none'}"


def _check_lists(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
    n = len(prompts)
    _same_length("responses", responses, n)
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(
            f"collate: every prompt must hold at least one token, but rows {empty[:5]} are empty. "
            "The first response token has nothing that predicts it. Prepend the BOS token."
        )
    if not any(len(response) for response in responses):
        raise ValueError(
            f"collate: at least one response token was expected, but all {n} responses are empty. "
            "Check where the prompt ends and that a sampled EOS is kept."
        )


def _same_length(name: str, values: Sized, n: int) -> None:
    if len(values) != n:
        raise ValueError(
            f"collate: as many {name} as prompts were expected, {len(values)} came for {n} prompts."
        )


def _column(
    name: str, values: Sequence[float] | Tensor | None, n: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    if values is None:
        return torch.full((n,), torch.nan, dtype=dtype)
    _same_length(name, values, n)
    return torch.as_tensor(values, dtype=dtype).clone()


def _ragged(
    name: str, values: Sequence[Sequence[float]] | Tensor | None, response: Tensor
) -> Tensor:
    out = torch.full(response.shape, torch.nan, dtype=torch.float64)
    if values is None:
        return out
    _same_length(name, values, len(response))
    padded = isinstance(values, Tensor)
    for i, (row, length) in enumerate(zip(values, response.sum(1).tolist(), strict=True)):
        if len(row) < length or (len(row) > length and not padded):
            raise ValueError(
                f"collate: {name} of row {i} has {len(row)} values for {length} response tokens. "
                "A sampled EOS counts as one."
            )
        out[i, :length] = torch.as_tensor(row, dtype=torch.float64)[:length]
    return out


def _groups(prompts: Sequence[Sequence[int]]) -> Tensor:
    ids: dict[tuple[int, ...], int] = {}
    return torch.tensor([ids.setdefault(tuple(prompt), len(ids)) for prompt in prompts])
