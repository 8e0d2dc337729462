"""Causal attention in plain operations, which every transform passes through."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "funcprobe"

_QUERIES = {"cpu": 64}  # in a block, at least: its scores stay in a CPU's cache
_QUERIES_ELSEWHERE = 512
_BLOCKS = 8  # at most: every further one saves less


def register() -> None:
    """Makes `attend` known to transformers by the name `NAME`, with the mask of "eager".

    This changes the process: transformers keeps its implementations in global tables. Doing it
    again changes nothing.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)


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
