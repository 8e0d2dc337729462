"""How many positions a block may hold, from what memory a device has free."""

from typing import Any, NamedTuple

import torch

from ..calculus.blocks import REVERSE, block_size
from ..calculus.tree import Params

_SHARE = 0.5  # of the free memory that a block may take: the estimate is no better than that


class Room(NamedTuple):
    """Positions of a block, rows times length times lanes, at most."""

    forward: int  # values, increments, derivatives
    reverse: int  # gradients, which keep what every layer computed
    free: int | None  # bytes free when it was measured; None where the default is taken


def room(config, params: Params, length: int) -> Room:
    """The defaults on a CPU; on a CUDA device what `positions` estimates from its free memory."""
    one = next(iter(params.values()))
    device, itemsize = one.device, one.dtype.itemsize
    if device.type != "cuda":
        return Room(block_size(device), max(block_size(device) // REVERSE, 1), None)
    free, _ = torch.cuda.mem_get_info(device)
    return positions(config, free, itemsize, length, most=block_size(device))


def positions(config, free: int, itemsize: int, length: int, *, most: int) -> Room:
    r"""An estimate from the model's sizes, rounded down to a power of two so that it repeats.

    With D the hidden size, F the feed-forward's, A heads, L layers and T positions of a row, a
    position takes about

    .. math:: 3 b (8 D + 4 F + 2 A T) \ \text{forward}, \qquad
              2 b L (8 D + 4 F + 2 A T) \ \text{in reverse}

    bytes, b a number's: increments and derivatives carry three of each, a gradient keeps every
    layer's and as much again while it goes back. The head works in slices of its own size.

    Args:
        config: the model's, as transformers has it.
        free: bytes, of which half is taken.
        itemsize: bytes of a number.
        length: positions of the longest row.
        most: positions that keep the device busy; more would gain nothing.

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
    one = itemsize * (8 * hidden + 4 * wide + 2 * heads * length)
    forward, reverse = (int(_SHARE * free) // (times * one) for times in (3, 2 * layers))
    return Room(_power(min(forward, most)), _power(min(reverse, most)), free)


def _size(config, name: str, default: int) -> Any:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default


def _power(count: int) -> int:
    return 1 << (max(count, 1).bit_length() - 1)
