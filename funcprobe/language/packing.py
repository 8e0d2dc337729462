"""How the model reads a batch: a prompt once for its responses, and no place that is not scored."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batch import SHARED, Batch, sequences, targets


class Layout(NamedTuple):
    """M sequences of L tokens, and the T places among them that predict a response token.

    A sequence is a prompt and the responses to it, each of which sees the prompt and itself only.
    """

    tokens: Tensor  # [M, L] int64
    place: Tensor | None  # [M, L] int64, position in its own row; None is 0, 1, ..., L - 1
    segment: Tensor | None  # [M, L] int64, 0 on prompts, else the response; None: one response each
    read: Tensor  # [T] int64, index into the M L tokens: the one that predicts
    target: Tensor  # [T] int64, the response token there
    slot: Tensor  # [N, R] int64, index into T; arbitrary off the response


def by_row(batch: Batch) -> Layout:
    """Every row as it is with all its response slots: passes through `vmap` over rows."""
    (n, steps), width = batch.position.shape, batch.tokens.shape[1]
    first = torch.arange(n, device=batch.tokens.device).unsqueeze(1) * width
    slot = torch.arange(n * steps, device=batch.tokens.device).view(n, steps)
    read = (first + batch.position).flatten()
    return Layout(batch.tokens, None, None, read, targets(batch).flatten(), slot)


def pack(batch: Batch, *, least: float = SHARED, multiple: int = 1) -> Layout:
    """Consecutive rows of one prompt behind one copy of it, and no place that is not scored.

    Args:
        batch: N rows; their tokens are looked at, so no transform may have wrapped them.
        least: tokens of a prompt that is shared, at least.
        multiple: M L and T are filled up to multiples of it.
    """
    device, (n, width) = batch.tokens.device, batch.tokens.shape
    steps, prompt = batch.response.sum(1), batch.position[:, 0] + 1
    ahead = torch.arange(width, device=device)
    equal = (batch.tokens[1:] == batch.tokens[:-1]) | (ahead >= prompt[1:].unsqueeze(1))
    same = torch.cat([prompt.new_zeros(1, dtype=torch.bool), equal.all(1)])
    same[1:] &= prompt[1:] == prompt[:-1]
    sizes = torch.stack([prompt, steps, same & (prompt >= least)]).tolist()
    sequence, start = (torch.tensor(x, device=device) for x in sequences(*sizes))
    first = sequence.diff(prepend=sequence.new_full((1,), -1)) > 0
    length = max(int((start + steps).max()) - 1, 1)
    length += -length % multiple

    k = torch.arange(batch.response.shape[1], device=device)
    own = torch.where(k == 0, prompt.unsqueeze(1) - 1, start.unsqueeze(1) + k - 1)
    at = sequence.unsqueeze(1) * length + own
    inner = batch.response & (k > 0)  # a response token that predicts the next
    lead = pad(batch.tokens[first], (0, max(length - width, 0)))[:, :length]
    ahead = torch.arange(length, device=device)
    tokens = torch.where(ahead < prompt[first].unsqueeze(1), lead, 0)
    tokens.view(-1)[at[inner]] = batch.tokens.gather(1, batch.position)[inner]
    place = segment = None
    if len(tokens) < n:
        place, segment = ahead.repeat(len(tokens), 1), torch.zeros_like(tokens)
        place.view(-1)[at[inner]] = batch.position[inner]
        segment.view(-1)[at[inner]] = torch.arange(1, n + 1, device=device).repeat_interleave(
            inner.sum(1)
        )
    count = int(steps.sum())
    spare = max(1 - count, 0) + -max(count, 1) % multiple
    read, target = (pad(x[batch.response], (0, spare)) for x in (at, targets(batch)))
    slot = (batch.response.flatten().cumsum(0) - 1).clamp(min=0).view_as(batch.response)
    return Layout(tokens, place, segment, read, target, slot)


def visible(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of sequences of shared prompts, [M, 1, L, L]."""
    ahead = torch.arange(segment.shape[1], device=segment.device)
    keys = segment.unsqueeze(1)
    seen = ((keys == 0) | (keys == segment.unsqueeze(2))) & (ahead <= ahead.unsqueeze(1))
    hidden = torch.zeros(seen.shape, dtype=dtype, device=segment.device)
    return hidden.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
