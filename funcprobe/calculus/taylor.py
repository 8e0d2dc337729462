"""Derivatives of a function of parameters along a direction, by Taylor arithmetic."""

from typing import Any

import torch

from .blocks import RowFn, RowsPerBlock, blockwise, identify, keep_pages
from .derivatives import check_derivative
from .precision import exact
from .transforms.jet import Bypassed, derivatives
from .transforms.nested_jvp import nested
from .tree import Params, Terms, Tree, all_concrete, check_direction, check_nan, merge


def taylor(
    fn: RowFn,
    params: Params,
    v: Params,
    batch: Any,
    *,
    order: int = 1,
    rows: RowsPerBlock = None,
) -> tuple[Any, ...]:
    r"""``f, f', f'', ...``: derivatives of `fn` along ``params + t v`` at t = 0, in one run of fn.

    They are exact in the sense of forward-mode differentiation: if fn branches or selects, they are
    those of the branch that it took, and what it detaches or reads as a number is constant. An fn
    that transforms its parameters itself (`torch.func`) is differentiated by nested jvp.

    Args:
        fn: a row-separable function ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        v: a direction with exactly their names and shapes.
        batch: a tree of tensors with leading N.
        order: the highest derivative, at least 1. Where most weights are frozen, order M costs
            little over M + 1 evaluations of fn.
        rows: rows per block; "all" makes one block. The default follows from the shapes.

    Returns:
        `Terms`: one tree like fn's output for each order 0..`order`, with the rows' hashes if the
        batch has them. Inside another transform, which knows no `Terms`, it is a plain tuple.

    Raises:
        ValueError: names or shapes do not fit, v is not finite, a derivative holds nan, `order` is
            below 1, an operation of fn has no derivative in forward mode, or fn says in
            ``false_derivative`` that its derivative is not that of its values.

    >>> cube = lambda p, x: x * p["a"] ** 3
    >>> at, along = {"a": torch.tensor(2.0)}, {"a": torch.tensor(1.0)}
    >>> [float(term) for term in taylor(cube, at, along, torch.ones(1), order=2)]
    [8.0, 12.0, 12.0]
    """
    if order < 1:
        raise ValueError(f"taylor: order must be at least 1, not {order}.")
    check_derivative("taylor", fn)
    check_direction("taylor", v, params)
    v = {name: v[name].to(p) for name, p in params.items()}
    keep_pages()
    with torch.no_grad(), exact():
        run = blockwise(
            lambda block, _: _derivatives(fn, params, v, block, order),
            batch,
            rows,
            of=(fn, params),
        )
    terms = tuple(merge(term, run.order) for term in zip(*run.results, strict=True))
    for term in terms:
        check_nan("taylor", fn, term)
    return Terms(terms, identify(batch)) if all_concrete(terms) else terms


def _derivatives(fn: RowFn, params: Params, v: Params, block: Any, order: int) -> list[Tree]:
    try:
        return derivatives(lambda p: fn(p, block), params, v, order)
    except Bypassed:
        pass
    except NotImplementedError as error:
        raise _without_rule(error) from error
    try:
        return nested(lambda p: fn(p, block), params, v, order)
    except NotImplementedError as error:
        raise _without_rule(error) from error


def _without_rule(error: NotImplementedError) -> ValueError:
    reason = (str(error).splitlines() or [""])[0]
    return ValueError(
        "taylor: a function of operations that have a derivative in forward mode was expected, but "
        f"torch says: {reason} Write that operation in others, or take the slope from "
        "sweep(..., change='direct') at small etas of both signs."
    )
