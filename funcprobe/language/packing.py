"""How the model reads a batch: each prompt once, and hidden states only where they are scored."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batch import SHARED as SHARED
from .batch import Batch, sequences, targets
from .summaries import summary


class Layout(NamedTuple):
    """M sequences of L tokens, and the T places among them that predict a response token.

    A sequence is a prompt and the responses to it. Each response sees the prompt and itself only.
    """

    tokens: Tensor  # [M, L] int64
    place: Tensor | None  # [M, L] int64, position in its own row; None is 0, 1, ..., L - 1
    segment: Tensor | None  # [M, L] int64, 0 on prompts, else the response; None: one response each
    read: Tensor  # [T] int64, index into the M L tokens: the one that predicts
    target: Tensor  # [T] int64, the response token there
    slot: Tensor  # [N, R] int64, index into T; arbitrary off the response

    def __repr__(self) -> str:
        return summary(self)


def by_row(batch: Batch) -> Layout:
    """The layout of the rows as they are, with all response slots: it works in `vmap` over rows."""
    (n, steps), width = batch.position.shape, batch.tokens.shape[1]
    first = torch.arange(n, device=batch.tokens.device).unsqueeze(1) * width
    slot = torch.arange(n * steps, device=batch.tokens.device).view(n, steps)
    read = (first + batch.position).flatten()
    return Layout(batch.tokens, None, None, read, targets(batch).flatten(), slot)


def pack(batch: Batch, *, least: float = SHARED, multiple: int = 1) -> Layout:
    """Reads each prompt once and drops unscored positions.

    Consecutive rows of one prompt follow one copy of it. The last token of a response predicts
    nothing and is left out. With prompts of at least ``least=3`` tokens shared::

        row 0    1 2 3 | 7 8            tokens   1 2 3 7 6 5    place    0 1 2 3 3 4
        row 1    1 2 3 | 6 5 4                   4 5 0 0 0 0             0 1 2 3 4 5
        row 2    4 5 | 9
                                        segment  0 0 0 1 2 2    (7 is of response 1, 6 5 of 2)
                                                 0 0 0 0 0 0

        read     2 3   2 4 5   7        indices into the 2 x 6 tokens: 3 7, 3 6 5, 5
        target   7 8   6 5 4   9        the response tokens that they predict
        slot     0 1   2 3 4   5        where in `read` each response token is

    Args:
        batch: N rows. Their tokens are looked at, so no transform may have wrapped them.
        least: a prompt of at least this many tokens is shared.
        multiple: M L and T are filled up to multiples of it.

    Returns:
        The layout. `place` and `segment` are None if no prompt is shared.
    """
    rows = _arrange(batch, least, multiple)
    index = _predicting(batch, rows)
    tokens, place, segment = _fill(batch, rows, index)
    count = int(batch.response.sum())
    spare = max(1 - count, 0) + -max(count, 1) % multiple
    read, target = (pad(x[batch.response], (0, spare)) for x in (index, targets(batch)))
    slot = (batch.response.flatten().cumsum(0) - 1).clamp(min=0).view_as(batch.response)
    return Layout(tokens, place, segment, read, target, slot)


class _Rows(NamedTuple):
    """Where each of the N rows lies in the sequences."""

    prompt: Tensor  # [N] int64, tokens of its prompt
    sequence: Tensor  # [N] int64, the sequence that it is in
    start: Tensor  # [N] int64, where its response starts in that sequence
    first: Tensor  # [N] bool, whether it is its sequence's first row
    length: int  # L, of every sequence


def _arrange(batch: Batch, least: float, multiple: int) -> _Rows:
    """Decides which rows share a sequence, and how long the sequences are."""
    device, width = batch.tokens.device, batch.tokens.shape[1]
    steps, prompt = batch.response.sum(1), batch.position[:, 0] + 1
    after = torch.arange(width, device=device) >= prompt[1:].unsqueeze(1)
    equal = (batch.tokens[1:] == batch.tokens[:-1]) | after
    same = torch.cat([prompt.new_zeros(1, dtype=torch.bool), equal.all(1)])
    same[1:] &= prompt[1:] == prompt[:-1]
    sizes = torch.stack([prompt, steps, same & (prompt >= least)]).tolist()
    sequence, start = (torch.tensor(x, device=device) for x in sequences(*sizes))
    first = sequence.diff(prepend=sequence.new_full((1,), -1)) > 0
    length = max(int((start + steps).max()) - 1, 1)
    return _Rows(prompt, sequence, start, first, length + -length % multiple)


def _predicting(batch: Batch, rows: _Rows) -> Tensor:
    """Indices [N, R] into the M L tokens, of the token that predicts each response token.

    That is the prompt's last token for the first response token, else the response token before.
    """
    k = torch.arange(batch.response.shape[1], device=batch.response.device)
    place = torch.where(k == 0, rows.prompt.unsqueeze(1) - 1, rows.start.unsqueeze(1) + k - 1)
    return rows.sequence.unsqueeze(1) * rows.length + place


def _fill(batch: Batch, rows: _Rows, index: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens, places and segments [M, L]: fills in the prompts, then the responses' read tokens."""
    (n, width), device = batch.tokens.shape, batch.tokens.device
    # The first response token is predicted by the prompt, every later one by the token before it.
    read = batch.response & (torch.arange(batch.response.shape[1], device=device) > 0)
    index, ahead = index[read], torch.arange(rows.length, device=device)
    prompts = pad(batch.tokens[rows.first], (0, max(rows.length - width, 0)))[:, : rows.length]
    tokens = torch.where(ahead < rows.prompt[rows.first].unsqueeze(1), prompts, 0)
    tokens.view(-1)[index] = batch.tokens.gather(1, batch.position)[read]
    if len(tokens) == n:
        return tokens, None, None
    place, segment = ahead.repeat(len(tokens), 1), torch.zeros_like(tokens)
    place.view(-1)[index] = batch.position[read]
    response = torch.arange(1, n + 1, device=device)
    segment.view(-1)[index] = response.repeat_interleave(read.sum(1))
    return tokens, place, segment


def visible(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of sequences whose prompts are shared, [M, 1, L, L].

    A token sees the prompt and its own response, up to itself.

    Args:
        segment: [M, L], as in `Layout`.
        dtype: of the mask, in which a hidden key has the least finite number.
    """
    ahead = torch.arange(segment.shape[1], device=segment.device)
    keys = segment.unsqueeze(1)
    seen = ((keys == 0) | (keys == segment.unsqueeze(2))) & (ahead <= ahead.unsqueeze(1))
    hidden = torch.zeros(seen.shape, dtype=dtype, device=segment.device)
    return hidden.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
