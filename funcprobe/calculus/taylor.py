"""Derivatives of a function of parameters along a direction, by Taylor arithmetic."""

from collections.abc import Callable

import torch

from .blocks import cut, fitting, keep_pages
from .precision import exact
from .transforms.jet import Bypassed, derivatives
from .transforms.nested_jvp import nested
from .tree import Params, check_direction, check_nan, merge


def taylor(
    fn: Callable, params: Params, v: Params, batch, *, order: int = 1, rows: int | None = None
) -> tuple:
    r"""``f, f', f'', ...``: derivatives of `fn` along ``params + t v`` at t = 0, in one run of fn.

    Exact, as forward-mode differentiation is: where fn branches or selects, of what it took. What
    it detaches, or reads as a number, is constant. An fn that transforms its parameters itself
    (`torch.func`) is differentiated by nested jvp.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        v: a direction with exactly their names and shapes.
        batch: a tree of tensors with leading N.
        order: the highest derivative; order M costs little over M + 1 evaluations of fn.
        rows: rows per block; the default follows from the shapes.

    Returns:
        One tree like fn's output for each order 0..`order`.

    Raises:
        ValueError: names or shapes that do not fit, non-finite v, nan in a derivative.

    >>> square = lambda p, x: x * p["a"] ** 3
    >>> at, along = {"a": torch.tensor(2.0)}, {"a": torch.tensor(1.0)}
    >>> [float(term) for term in taylor(square, at, along, torch.ones(1), order=2)]
    [8.0, 12.0, 12.0]
    """
    if order < 1:
        raise ValueError(f"taylor: order must be at least 1, not {order}.")
    check_direction("taylor", v, params)
    v = {name: v[name].to(p) for name, p in params.items()}
    parts = []
    keep_pages()
    with torch.no_grad(), exact():
        cuts, order_of_rows = cut(batch, rows)
        for part in cuts:
            parts += fitting(lambda part, _: _derivatives(fn, params, v, part, order), part)[0]
    terms = tuple(merge(list(term), order_of_rows) for term in zip(*parts, strict=True))
    for term in terms:
        check_nan("taylor", term)
    return terms


def _derivatives(fn: Callable, params: Params, v: Params, part, order: int) -> list:
    try:
        return derivatives(lambda p: fn(p, part), params, v, order)
    except Bypassed:
        return nested(lambda p: fn(p, part), params, v, order)
