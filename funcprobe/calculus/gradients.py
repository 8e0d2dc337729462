"""Gradients of a function of parameters and rows: of all rows together, or row by row."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .blocks import REVERSE, RowFn, RowsPerBlock, blockwise, cut, fitting
from .precision import exact
from .separable import check_separable, checked
from .tree import Params, check_direction, leaves, merge, size, tree_map


def gradient(fn: RowFn, params: Params, batch: Any, *, rows: RowsPerBlock = None) -> Params:
    r"""The gradient of the sum of ``fn(params, batch)`` over all rows and outputs.

    It is accumulated over blocks of rows, so that the memory of one block suffices.

    Args:
        fn: a row-separable function ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        batch: a tree of tensors with leading N.
        rows: rows per block, "all" for one block, or None for the default (see `cut`).

    Returns:
        A tensor for each parameter, of its shape.

    Raises:
        ValueError: the batch has no rows, the gradient is not finite, or there are several blocks
            and rows depend on each other.

    >>> cube = lambda p, x: x * p["a"] ** 3
    >>> gradient(cube, {"a": torch.tensor(2.0)}, torch.tensor([1.0, 3.0]))
    {'a': tensor(48.)}
    """
    _check_rows("gradient", batch)
    total: Params = {}
    with torch.no_grad(), exact():
        for part in checked(cut(batch, rows, REVERSE)[0], fn, params):
            for grads in fitting(lambda block, _: _gradient(fn, params, block), part)[0]:
                total = tree_map(torch.add, total, grads) if total else grads
    check_direction("gradient", total, params)
    return total


def row_gradients(fn: RowFn, params: Params, batch: Any, *, rows: RowsPerBlock = None) -> Params:
    """The gradient of each row's sum of outputs; over the rows these add up to `gradient`.

    Args:
        fn: a row-separable function ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        batch: a tree of tensors with leading N.
        rows: how many rows `vmap` differentiates at once, "all" for all of them, or None for the
            default (see `cut`). 1 is a plain loop.

    Returns:
        A tensor for each parameter, of its shape behind a leading N.

    Raises:
        ValueError: the batch has no rows, a gradient is not finite, or rows depend on each other.
    """

    def of_row(row: Any) -> Params:
        return _gradient(fn, params, tree_map(lambda leaf: leaf.unsqueeze(0), row))

    def of_rows(block: Any, _: int) -> Params:
        if size(block) == 1:
            return tree_map(lambda g: g.unsqueeze(0), _gradient(fn, params, block))
        check_separable(fn, params, block)
        return torch.func.vmap(of_row)(block)

    _check_rows("row_gradients", batch)
    with torch.no_grad(), exact():
        parts = blockwise(of_rows, batch, rows, of=(fn, params), reverse=True)
    out = merge(parts.results, parts.order)
    expected = {name: p.expand(len(out[name]), *p.shape) for name, p in params.items()}
    check_direction("row_gradients", out, expected)
    return out


def _gradient(fn: RowFn, params: Params, block: Any) -> Params:
    """The gradient of fn's sum, for which `torch.func.grad` would also keep a backward graph."""

    def total(p: Params) -> Tensor:
        return reduce(torch.add, (leaf.sum() for leaf in leaves(fn(p, block))))

    out, pull = torch.func.vjp(total, params)[:2]
    return pull(torch.ones_like(out), retain_graph=False, create_graph=False)[0]


def _check_rows(where: str, batch: Any) -> None:
    if size(batch) == 0:
        raise ValueError(
            f"{where}: a batch of at least one row was expected, this one has none. Were all rows "
            "filtered out?"
        )
