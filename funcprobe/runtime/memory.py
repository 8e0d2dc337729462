"""How many positions a block may hold, given the memory that a device has free."""

from typing import Any, NamedTuple

import torch

from ..calculus.blocks import REVERSE, block_size
from ..calculus.tree import Params

_SHARE = 0.5  # of the free memory, since the estimate of what a position takes is a rough one


class Room(NamedTuple):
    """How many positions a block may hold at most: rows times length times lanes."""

    forward: int  # for values, increments and derivatives
    reverse: int  # for gradients, which keep the intermediate results of every layer
    free: int | None  # bytes that were free at the time; None where nothing was estimated from them


def room(config: Any, params: Params, length: int) -> Room:
    """What `positions` estimates from a CUDA device's free memory; elsewhere the defaults.

    Args:
        config: the model's, as transformers has it.
        params: the trainable parameters, whose device and dtype count.
        length: positions of the longest row.
    """
    first = next(iter(params.values()))
    device, itemsize = first.device, first.dtype.itemsize
    if device.type != "cuda":
        return Room(block_size(device), max(block_size(device) // REVERSE, 1), None)
    free, _ = torch.cuda.mem_get_info(device)
    return positions(config, free, itemsize, length, most=block_size(device))


def positions(config: Any, free: int, itemsize: int, length: int, *, most: int) -> Room:
    r"""An estimate from the model's sizes, rounded down to a power of two so that it repeats.

    Let D be the hidden size, F the feed-forward size, A the number of heads, Y the number of
    layers, L the positions of a row and b the bytes of a number. A position takes about

    .. math:: 3 b (8 D + 4 F + 2 A L) \ \text{forward}, \qquad
              2 b Y (8 D + 4 F + 2 A L) \ \text{in reverse}

    bytes. Increments and derivatives carry three numbers for each of the model's. A gradient keeps
    every layer's numbers, and needs as much again on the way back. The head is not counted, since
    it works in slices of bounded size.

    Args:
        config: the model's, as transformers has it.
        free: bytes, of which half is used.
        itemsize: bytes of a number.
        length: positions of the longest row.
        most: a number of positions that keeps the device busy; more would not be faster.

    >>> from types import SimpleNamespace as Config
    >>> small = Config(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    ...                num_attention_heads=9)
    >>> positions(small, 2**33, 4, 512, most=16384)[:2]
    (16384, 512)
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = _size(text, "hidden_size", 4096)
    wide = _size(text, "intermediate_size", 4 * hidden)
    heads, layers = _size(text, "num_attention_heads", 32), _size(text, "num_hidden_layers", 32)
    layer = itemsize * (8 * hidden + 4 * wide + 2 * heads * length)
    forward, reverse = (int(_SHARE * free) // (times * layer) for times in (3, 2 * layers))
    return Room(_power(min(forward, most)), _power(min(reverse, most)), free)


def _size(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default


def _power(count: int) -> int:
    """The largest power of two that is at most `count`, and at least 1."""
    return 1 << (max(count, 1).bit_length() - 1)
