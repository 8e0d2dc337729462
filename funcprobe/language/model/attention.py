"""Causal attention in plain operations, which every transform passes through."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "funcprobe"
APART = "funcprobe_apart"  # attention that mixes no tokens, with which `split` looks for mixing

_QUERIES = {"cpu": 64}  # in a block, at least: its scores stay in a CPU's cache
_QUERIES_ELSEWHERE = 512
_BLOCKS = 8  # at most: every further one saves less


def register() -> None:
    """Makes `attend` known to transformers as `NAME` and `apart` as `APART`, with eager's mask.

    This changes the process: transformers keeps its implementations in global tables. Doing it
    again changes nothing.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    AttentionInterface.register(APART, apart)
    AttentionMaskInterface.register(APART, _noted_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``softmax(scaling q k' + mask) v``, query block by query block, each with the keys up to it.

    It stands in for fused kernels, which all lack forward mode and of which some lack vmap, and for
    the eager implementation, which repeats keys and values for every query head of a group and
    computes the scores that the mask then hides.

    Args:
        module: the attention layer; an error names its class.
        query: [B, heads, L, size].
        key, value: [B, heads of keys, L, size]; several query heads may share one. The size of a
            value may be another than that of a key.
        attention_mask: additive and causal, [B or 1, 1, L, L]; None masks nothing.
        scaling: ``1 / sqrt(size)`` if None.
        dropout: must be 0.
        softcap: scores become ``softcap tanh(scores / softcap)``.
        options: whatever else the model passes, which is not used; attention sinks (``s_aux``) are
            refused.

    Returns:
        ``([B, L, heads, size of a value], None)``.

    Raises:
        ValueError: dropout is on, or the model has attention sinks.
    """
    if dropout or options.get("s_aux") is not None:
        raise ValueError(
            f"attention: neither dropout nor attention sinks are supported, but "
            f"{type(module).__name__} asks for one of them. Use a model without attention sinks, "
            "in eval mode."
        )
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    query = query * (size**-0.5 if scaling is None else scaling)
    key = key.transpose(2, 3)
    out = []
    for start, stop in _blocks(length, query.device.type, attention_mask is not None):
        seen = slice(stop if attention_mask is not None else length)
        rows = query[:, :, start:stop].reshape(batch, groups, -1, size)
        scores = (rows @ key[..., seen]).view(batch, heads, stop - start, -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, start:stop, seen]
        at_least = torch.promote_types(scores.dtype, torch.float32)
        p = scores.softmax(-1, dtype=at_least).to(value.dtype)
        mixed = p.view(batch, groups, -1, p.shape[-1]) @ value[:, :, seen]
        out.append(mixed.view(batch, heads, stop - start, value.shape[-1]))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def _blocks(length: int, device: str, causal: bool) -> list[tuple[int, int]]:
    """Where each block of queries starts and stops; without a causal mask there is one."""
    queries = _QUERIES.get(device, _QUERIES_ELSEWHERE)
    step = -(-length // max(min(length // queries, _BLOCKS), 1)) if causal else length
    return [(start, min(start + step, length)) for start in range(0, length, max(step, 1))]


class Masks(NamedTuple):
    """The masks that a module made in one pass, and those that its attention layers were given."""

    made: list[tuple[Tensor, Callable[..., Tensor]]]  # with the function (b, h, q, k) -> seen
    given: list[Tensor | None]

    def longest_causal(self) -> int:
        """The longest rows in which every layer's mask hides no earlier token from a later one.

        It is 0 where a layer was given a mask that was not made here, and `sys.maxsize` where no
        mask has a band.
        """
        longest = {id(mask): _longest(sees, mask.device) for mask, sees in self.made}
        return min((self._of_layer(given, longest) for given in self.given), default=0)

    def _of_layer(self, given: Tensor | None, longest: dict[int, int]) -> int:
        parts = (longest[id(mask)] for mask, _ in self.made if _is_part(given, mask))
        return next(parts, 0)


_masks: ContextVar[Masks | None] = ContextVar("_masks", default=None)


@contextmanager
def noted() -> Iterator[Masks]:
    """The masks that are made and given within the scope, by modules whose attention is `apart`."""
    masks = Masks([], [])
    token = _masks.set(masks)
    try:
        yield masks
    finally:
        _masks.reset(token)


def apart(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *_: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in which each token sees itself alone: its value for each query head.

    With it a token's hidden state depends on another token only where a layer mixes tokens without
    the attention interface. Arguments and results are those of `attend`.
    """
    if masks := _masks.get():
        masks.given.append(attention_mask)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return value.transpose(1, 2).contiguous(), None


def _noted_mask(**options: Any) -> Tensor:
    mask: Tensor = eager_mask(**options)
    if masks := _masks.get():
        masks.made.append((mask, options["mask_function"]))
    return mask


_LENGTHS = 2**17  # up to which each length is tried; beyond it powers of two are
_FARTHEST = 2**40


def _longest(sees: Callable[..., Tensor], device: torch.device) -> int:
    """The longest rows whose tokens all see every earlier token; `sys.maxsize` if rows of any do.

    Bands and chunks hide the first tokens first, or those after a few that are always seen. The
    columns that are tried are therefore few; that the answer's last token sees all is checked.
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)
    near = torch.arange(_LENGTHS, device=device)
    far = 2 ** torch.arange(_LENGTHS.bit_length() - 1, _FARTHEST.bit_length(), device=device)
    queries = torch.cat([near, far]).unsqueeze(1)
    keys = torch.tensor([0, 1, 2, 4, 8, 16, 64, 256], device=device)
    hidden = ((keys <= queries) & ~sees(zero, zero, queries, keys)).any(1)
    longest = min(int(hidden.int().argmax()), _LENGTHS) if hidden.any() else sys.maxsize
    last = min(longest, _LENGTHS) - 1
    return longest if bool(sees(zero, zero, zero + last, near[: last + 1]).all()) else 0


def _is_part(given: Tensor | None, mask: Tensor) -> bool:
    """Whether a mask is another, or a view of it."""
    if given is None:
        return False
    return given.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
