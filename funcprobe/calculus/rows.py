"""A function of parameters and rows, evaluated block by block of rows."""

from collections.abc import Callable

import torch

from .precision import exact
from .tree import Params, blocks, check_nan, concatenate, leaves, size

# NOTE [block size]: rows and lanes follow from shapes alone, so that results repeat. A block holds
# about this many elements of the batch's widest leaf, all lanes counted.
_BLOCK = 4096

# Reverse mode keeps what every layer computed; it counts as this many lanes.
REVERSE = 8


def default_rows(batch, lanes: int = 1) -> int:
    """How many rows make a block when the caller does not say."""
    n = max(size(batch), 1)
    width = max(leaf.numel() // n for leaf in leaves(batch))
    return max(_BLOCK // (max(width, 1) * lanes), 1)


@torch.no_grad()
def evaluate(fn: Callable, params: Params, batch, *, rows: int | None = None):
    """``fn(params, batch)`` in blocks of rows, without a graph.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        batch: a tree of tensors with leading N.
        rows: rows per block; the default follows from the shapes.

    Returns:
        fn's output for all N rows.

    Raises:
        ValueError: the output holds nan; the rows are named.
    """
    with exact():
        out = concatenate([fn(params, part) for part in blocks(batch, rows or default_rows(batch))])
    check_nan("evaluate", out)
    return out
