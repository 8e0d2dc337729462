"""What `split` relies on, checked for the module at hand on a few tokens.

A check is a function of a module's `Forward`, params and base. It raises a ValueError that says
what is wrong and what to do, or returns what it measured for `split` to act upon; it changes
nothing. To add one, write such a function and call it in `split`.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from ..batch import Batch, collate
from ..head.softmax import WIDTH, head_slices
from ..packing import Layout, by_row, pack
from . import masks
from .forward import Forward, Params
from .positions import are_angles, positions
from .skeleton import causal_model

_SHORT, _LONG = 7, 24  # tokens in the rows that a module must read alike; blocks divide no prime
_FAR = 2**24  # a position beyond every rotary table


class Trial(NamedTuple):
    """What body and head give of a short row."""

    hidden: Tensor  # [1, R, D]
    logits: Tensor  # [1, R, V]


@torch.no_grad()
def check_head(forward: Forward, params: Params, base: Params, trial: Trial) -> Tensor:
    """The head after the body gives the module's own logits.

    Returns:
        The module's own logits of a short row, for `attends_alike`.

    Raises:
        ValueError: it does not.
    """
    batch = _one_row(params)
    inputs = {"input_ids": batch.tokens, "use_cache": False}
    with forward.borrowed() as halves, forward.precision():
        out = functional_call(halves.whole, base | params, (), inputs, strict=True)
    whole = torch.take_along_dim(out.logits, batch.position.unsqueeze(-1), 1)
    error, scale = float((trial.logits - whole).abs().max()), float(whole.abs().max())
    if not error <= 1e-3 * scale:
        raise ValueError(
            f"split: head(hidden) was expected to be the module's own logits, it differs by "
            f"{error:.1e} of {scale:.1e}. {_name(forward)} computes something "
            "between its decoder and head that this library does not see. Please report the "
            "architecture."
        )
    return whole


@torch.no_grad()
def attends_alike(forward: Forward, params: Params, base: Params, whole: Tensor) -> bool:
    """Whether our attention gives the module's own logits (of `check_head`) up to rounding."""
    ours = _logits(forward, params, base, _one_row(params))
    atol = 1e2 * rounding((params | base).values()) * float(whole.abs().max())
    return torch.allclose(ours, whole, rtol=0.0, atol=atol)


@torch.no_grad()
def check_runs(forward: Forward, params: Params, base: Params) -> Trial:
    """The module's own forward runs on a row of tokens, its head included.

    Returns:
        What it gives, for `check_head` and `slices_alike`.

    Raises:
        ValueError: it raises something else than that memory ran out.
    """
    try:
        hidden = _hidden(forward, params, base, _one_row(params))
        return Trial(hidden, forward.head(params, base, hidden))
    except Exception as error:
        if "memory" in str(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"split: the forward pass of {_name(forward)} was expected to run on a row of tokens "
            f"in eval mode, it raised {type(error).__name__}: {first} Likely cause: a part that "
            "lacks the dtype (mixtures of experts have no float64), or an architecture that is not "
            "supported. Try dtype=None, or another architecture."
        ) from error


@torch.no_grad()
def check_state(forward: Forward, params: Params, base: Params) -> None:
    """A module that has run gives what a new copy gives: equal inputs give equal bits on a CPU.

    The copy runs a short row, a long one, one at positions beyond every rotary table, and the short
    and the long row again.

    Raises:
        ValueError: a result depends on what has run before.
    """
    device = next(iter(params.values())).device
    short, long = (_row(length, device) for length in (_SHORT, _long(forward)))
    new = replace(forward)
    before = forward.states(params, base, short)
    forward.states(params, base, long)
    # Learned positions are a table: an index beyond it raises on a CPU, and elsewhere it would end
    # the process, so that there only rotary embeddings go so far.
    if device.type == "cpu" or are_angles(forward.skeleton):
        with suppress(Exception):
            forward.states(params, base, _far(short))
    pairs = (
        (forward.states(params, base, short), before),
        (forward.states(params, base, long), new.states(params, base, long)),
    )
    # Off the CPU some kernels add in no fixed order, so that equal inputs may differ by rounding.
    exact = device.type == "cpu"
    same = (torch.equal(a, b) if exact else _alike(a, b, params | base) for a, b in pairs)
    if not all(same):
        raise ValueError(
            f"split: a forward pass that depends on its inputs alone was expected, that of "
            f"{_name(forward)} gives another result after other rows: its forward keeps state "
            "between calls, as a table that grows with the longest row does. Load the module with "
            "a fixed table (a rope type other than dynamic), or take the cache out of its forward."
        )


@torch.no_grad()
def check_causal(forward: Forward, params: Params, base: Params) -> None:
    """Neither later tokens, nor padding, nor other rows change the hidden states of a row.

    Raises:
        ValueError: they do.
    """
    device = next(iter(params.values())).device
    alone = _row(_SHORT, device)
    tokens = _row(_long(forward), device).tokens.repeat(2, 1)
    tokens[1] = _other(tokens[1])  # another row beside
    want = forward.states(params, base, alone)
    longer = forward.states(params, base, _plain(tokens))[:_SHORT]
    error = float((longer - want).norm() / want.norm())
    if not error < rounding((params | base).values()) ** 0.5:
        raise ValueError(
            f"split: a causal language model was expected, in {_name(forward)} later tokens or "
            f"other rows change hidden states (by {error:.1e} of their size). Likely cause: "
            "attention in both directions (use_bidirectional_attention, is_causal or is_decoder "
            "in its config). Load it as a causal decoder."
        )


@torch.no_grad()
def slices_alike(forward: Forward, params: Params, base: Params, trial: Trial) -> bool:
    """Whether the head read in slices of the vocabulary gives the slices of the whole logits.

    It does not where an adapter of the head knows the vocabulary's size or its tokens' indices, as
    trained tokens, LoKr, BOFT and others do.
    """
    names = forward.head_names
    tensors = tuple(params[name] if name in params else base[name] for name in names)
    hidden = trial.hidden
    causal: Any = causal_model(forward.skeleton)
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    if any(tensor.shape[:1] != (vocabulary,) for tensor in tensors):
        # An index beyond a slice raises on a CPU, and elsewhere it would end the process.
        hidden, tensors = hidden.cpu(), tuple(tensor.cpu() for tensor in tensors)
    whole = forward.head({}, dict(zip(names, tensors, strict=True)), hidden)
    width = min(WIDTH, -(-vocabulary // 3))
    atol = 8 * rounding((*tensors, whole)) * float(whole.abs().max())
    try:
        for start, here in head_slices(tensors, vocabulary=vocabulary, width=width):
            part = forward.head({}, dict(zip(names, here, strict=True)), hidden)
            if not torch.allclose(part, whole[..., start : start + width], rtol=0.0, atol=atol):
                return False
    except Exception:  # an index beyond the slice, or a shape that does not fit, raises anything
        return False
    return True


@torch.no_grad()
def longest_shared(forward: Forward, apart: Forward, params: Params, base: Params) -> int:
    """The longest rows whose prompts can be shared: up to the shortest attention window.

    A prompt is shared by a mask, so it is 0 where a layer mixes tokens by other means than the
    attention that takes our mask, and where the positions and the mask of shared prompts do not
    give what the rows give by themselves.

    Args:
        forward: with the attention that is used.
        apart: with an attention that mixes no tokens, see `masks.apart`.
        params, base: as of both.
    """
    device = next(iter(params.values())).device
    batch = collate([[1, 2, 3]] * 2, [[2, 1], [3, 3, 1]]).to(device)
    tokens = _row(_long(forward), device).tokens.repeat(2, 1)
    tokens[1, :_SHORT] = _other(tokens[1, :_SHORT])
    try:
        with masks.noted() as noted:
            mixed = apart.states(params, base, _plain(tokens)).unflatten(0, (2, -1))[:, _SHORT:]
        packed = [forward.states(params, base, pack(batch, least=n)) for n in (1, math.inf)]
    except Exception:  # an architecture without position_ids or such a mask may raise anything
        return 0
    alike = (_alike(a, b, params | base) for a, b in (mixed, packed))
    return noted.longest_causal() if all(alike) else 0


def generic(params: Params) -> Params:
    """The parameters with a little noise, at which no part of an adapter is 0 or as it began."""
    generic = {}
    for name, p in params.items():
        generator = torch.Generator(p.device).manual_seed(0)
        size = 0.1 * float(p.pow(2).mean().sqrt()) or 0.02
        generic[name] = p + size * torch.empty_like(p).normal_(generator=generator)
    return generic


def _one_row(params: Params) -> Batch:
    """A row of three prompt and three response tokens, where the parameters are."""
    return collate([[1, 2, 3]], [[2, 1, 3]]).to(next(iter(params.values())).device)


def _row(length: int, device: torch.device) -> Layout:
    """A row of a few different tokens, in an order without a period that a layer could have."""
    place = torch.arange(length, device=device)
    return _plain((1 + (place * place // 3 + place // 7) % 3).unsqueeze(0))


def _long(forward: Forward) -> int:
    """How long the long rows are: no longer than a table of learned positions."""
    longest = positions(forward.skeleton) or _LONG
    return min(_LONG, longest) if longest > _SHORT else _LONG


def _other(tokens: Tensor) -> Tensor:
    """Tokens that all differ from those of `_row` in the same places."""
    return 1 + tokens % 3


def _plain(tokens: Tensor) -> Layout:
    """The layout of rows without padding, [N, L], in which each token is read."""
    read = torch.arange(tokens.numel(), device=tokens.device)
    return Layout(tokens, None, None, read, tokens.flatten(), read.view_as(tokens))


def _far(layout: Layout) -> Layout:
    """The same rows at positions beyond every rotary table."""
    place = torch.arange(layout.tokens.shape[1], device=layout.tokens.device) + _FAR
    shape = layout.tokens.shape
    return layout._replace(place=place.expand(shape), segment=torch.zeros_like(layout.tokens))


def _hidden(forward: Forward, params: Params, base: Params, batch: Batch) -> Tensor:
    return forward.states(params, base, by_row(batch)).unflatten(0, batch.position.shape)


def _logits(forward: Forward, params: Params, base: Params, batch: Batch) -> Tensor:
    return forward.head(params, base, _hidden(forward, params, base, batch))


def _alike(a: Tensor, b: Tensor, tensors: Params) -> bool:
    """Whether hidden states agree to far more than a token's influence."""
    return bool((a - b).norm() < rounding(tensors.values()) ** 0.5 * b.norm())


def _name(forward: Forward) -> str:
    return type(causal_model(forward.skeleton)).__name__


def rounding(tensors: Iterable[Tensor]) -> float:
    """The coarsest precision among tensors; those of integers do not count."""
    return max(torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point())
