"""Whether the rows of a function are independent, so that it may be computed block by block."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .precision import exact
from .tree import (
    Params,
    Tree,
    all_concrete,
    blocks,
    concatenate,
    describe,
    leaves,
    merge,
    size,
    tree_map,
)

B = TypeVar("B")


def checked(parts: Iterable[B], fn: Callable[..., Any], params: Params) -> Iterator[B]:
    """The blocks, after `check_separable` on the first if there are several."""
    before: list[B] = []
    for number, block in enumerate(parts):
        if number == 1:
            first = before.pop()
            pair = [first] if size(first) > 1 else [first, block]
            check_separable(fn, params, concatenate(pair))
            yield first
        if number == 0:
            before.append(block)
        else:
            yield block
    yield from before


def check_separable(fn: Callable[..., Any], params: Params, block: Tree) -> None:
    """Refuses a function whose rows depend on each other: it cannot be computed block by block.

    The even and the odd rows are evaluated by themselves and compared with all of them. A function
    with the attribute ``separable = True`` is not checked, and neither is one inside a transform.

    Raises:
        ValueError: the function's output does not lead with the rows, or rows differ by more than
            a function's rounding explains.
    """
    n = size(block)
    if is_separable(fn) or n < 2 or not all_concrete(params, block):
        return
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)])
    try:
        with torch.no_grad(), exact():
            whole = fn(params, block)
            halves = [fn(params, tree_map(lambda leaf, k=k: leaf[k::2], block)) for k in (0, 1)]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        whole = None
    if whole is None:  # fewer rows tell as much
        check_separable(fn, params, next(blocks(block, n // 2)))
        return
    sizes = [[len(leaf) if leaf.ndim else 0 for leaf in leaves(out)] for out in (whole, *halves)]
    expected = (n, n - n // 2, n // 2)
    if any(set(counts) - {rows} for counts, rows in zip(sizes, expected, strict=True)):
        raise ValueError(
            f"{_name(fn)}: one entry a row was expected of a function that is computed in blocks "
            f"of rows, but on {n} rows it gives {describe(whole)}. Likely it reduces over its "
            "rows. Return each row's own part, or compute all rows at once with rows='all'."
        )
    pairs = zip(leaves(whole), leaves(merge(halves, order)), strict=True)
    off = [(_distance(a, b), a.dtype) for a, b in pairs]
    if any(distance > _rounding(dtype) for distance, dtype in off):
        raise ValueError(
            f"{_name(fn)}: a function whose rows do not depend on each other was expected, but "
            f"{n} rows computed in two parts differ from all at once by up to "
            f"{max(distance for distance, _ in off):.2g} of the largest value. Likely it divides "
            "by a number of rows, normalises over its batch, or is random. Fix such "
            "numbers on the whole batch first, or compute all rows at once with rows='all'."
        )


def is_separable(fn: object) -> bool:
    """Whether a function says that its rows do not depend on each other."""
    return getattr(fn, "separable", False) is True


def _name(fn: object) -> str:
    inner = getattr(fn, "fn", fn)
    return getattr(inner, "__qualname__", type(inner).__qualname__)


def _rounding(dtype: torch.dtype) -> float:
    """How far a row may move where others are computed with it, relative to the largest value.

    What the row is computed from may be in lower precision than its result, so this is generous.
    """
    return float(torch.finfo(dtype).eps ** 0.25) if dtype.is_floating_point else 1e-4


def _distance(whole: Tensor, parts: Tensor) -> float:
    """The largest difference of two results, relative to the largest value."""
    if whole.shape != parts.shape:
        return math.inf
    if not whole.numel():
        return 0.0
    a, b = whole.double(), parts.double()
    off = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0)
    largest = a.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=torch.finfo(a.dtype).tiny)
    return float((off / largest).max())


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out."""
    phrases = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(p in str(error) for p in phrases)
