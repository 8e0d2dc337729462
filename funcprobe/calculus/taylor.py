"""Derivatives of a function of parameters along a direction, by nested forward mode."""

from collections.abc import Callable

import torch
from torch.func import jvp

from .precision import exact
from .rows import default_rows
from .tree import Params, blocks, check_direction, check_nan, concatenate


def taylor(
    fn: Callable, params: Params, v: Params, batch, *, order: int = 1, rows: int | None = None
) -> tuple:
    """``f, f'``: the value of `fn` and its derivative along ``params + t v`` at t = 0, by jvp.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        v: a direction with exactly their names and shapes.
        batch: a tree of tensors with leading N.
        order: 1; a higher one is refused, since torch's nested forward mode is silently wrong in
            some operations (layer_norm, any autograd.Function with an ordinary jvp).
        rows: rows per block; the default follows from the shapes.

    Returns:
        One tree like fn's output for each order 0..`order`.

    Raises:
        ValueError: names or shapes that do not fit, non-finite v, nan in a derivative.
    """
    if order != 1:
        raise ValueError(f"taylor: order must be 1, not {order}.")
    check_direction("taylor", v, params)
    parts = []
    with torch.no_grad(), exact():
        for part in blocks(batch, rows or default_rows(batch)):
            parts.append(_derivatives(fn, params, v, part))
    terms = tuple(concatenate(list(term)) for term in zip(*parts, strict=True))
    for term in terms:
        check_nan("taylor", term)
    return terms


def _derivatives(fn, params: Params, v: Params, part) -> tuple:
    tangents = {name: d.to(params[name].dtype) for name, d in v.items()}
    return jvp(lambda p: fn(p, part), (params,), (tangents,))
