"""The masks of a module's attention layers: which tokens they hide, and in how long rows."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

APART = "funcprobe_apart"  # attention that mixes no tokens, with which `split` looks for mixing

_LENGTHS = 2**17  # up to which each length is tried; beyond it powers of two are
_FARTHEST = 2**40


def register() -> None:
    """Makes `apart` known to transformers by the name `APART`, with eager's mask, which is noted.

    This changes the process as `attention.register` does.
    """
    AttentionInterface.register(APART, apart)
    AttentionMaskInterface.register(APART, _noted_mask)


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
