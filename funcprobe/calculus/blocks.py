"""A function of parameters and rows, evaluated block by block of rows."""

import warnings
from collections.abc import Callable, Iterable
from typing import (
    Any,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    runtime_checkable,
)

import torch
from torch import Tensor

from .precision import exact
from .separable import checked, out_of_memory
from .tree import (
    Params,
    Tree,
    all_concrete,
    blocks,
    check_nan,
    leaves,
    merge,
    size,
)

# NOTE [block size]: The rows and lanes of a block follow from shapes alone, so that results repeat.
# A block holds about this many elements of the batch's widest leaf, all lanes counted: on a CPU as
# many as its caches hold, on another device as many as keep it busy.
_BLOCK = {"cpu": 1024}
_BLOCK_ELSEWHERE = 16384

# Reverse mode keeps what every layer computed, so it counts as this many lanes.
REVERSE = 2

# Rows per block: a number of rows in the batch's own order, or "all" for a single block. None cuts
# the batch into blocks of the default size.
RowsPerBlock: TypeAlias = int | Literal["all"] | None

B = TypeVar("B")
R = TypeVar("R")


class RowFn(Protocol):
    """A function ``(params, batch) -> tree`` that treats the rows of its batch independently.

    Every leaf of the batch and of the result leads with the same N rows, and row i of the result
    depends on row i of the batch alone.
    """

    def __call__(self, params: Params, batch: Any, /) -> Any:
        """The function's value at `params` on the rows of `batch`."""
        ...


@runtime_checkable
class Cuttable(Protocol):
    """A batch that knows how to divide itself into blocks without wasting work.

    A function of such a batch also arranges its own matrices: see the note [zero is the base] in
    `changes`.
    """

    def cut(self, elements: int, /) -> tuple[list[Self], Tensor]:
        """Divides the rows into blocks of at most `elements` elements, as the batch counts them.

        The blocks' leaves are as wide as the batch's. A single row may exceed the limit.

        Returns:
            The blocks, and the original row of each of their rows, [N] int64.
        """
        ...


@runtime_checkable
class Identified(Protocol):
    """A batch whose rows can be told apart, so that results can be checked against it."""

    def row_hashes(self) -> Tensor:
        """[N] int64, a hash of each row that does not depend on padding or on other rows."""
        ...


class Blockwise(NamedTuple, Generic[R]):
    """The results of a function on the blocks of a batch."""

    results: list[R]
    order: Tensor | None  # [N] the original row of each of their rows; None if it is unchanged
    notes: tuple[str, ...]  # one for each time that memory ran out


def block_size(device: torch.device) -> int:
    """How many elements of its widest leaf a block holds by default."""
    return _BLOCK.get(device.type, _BLOCK_ELSEWHERE)


def default_rows(batch: Tree, lanes: int = 1) -> int:
    """How many rows a block has by default (see the note [block size])."""
    n, tensors = max(size(batch), 1), leaves(batch)
    width = max(leaf.numel() // n for leaf in tensors)
    return max(block_size(tensors[0].device) // (max(width, 1) * lanes), 1)


def cut(batch: B, rows: RowsPerBlock, lanes: int = 1) -> tuple[Iterable[B], Tensor | None]:
    """Divides a batch into the blocks that it is computed in.

    Args:
        batch: a tree of tensors with leading N. If it is `Cuttable` and `rows` is None, it divides
            itself; otherwise blocks are consecutive rows.
        rows: rows per block; "all" makes one block of the whole batch; None is the default of the
            note [block size].
        lanes: how many parameter points are computed at once.

    Returns:
        The blocks, and the original row of each of their rows, [N] int64, or None if the order is
        unchanged.

    Raises:
        ValueError: `rows` is none of these.
    """
    if rows == "all":
        return [batch], None
    if rows is None:
        if isinstance(batch, Cuttable):
            return batch.cut(max(block_size(leaves(batch)[0].device) // lanes, 1))
        rows = default_rows(batch, lanes)
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(
            f"rows must be a positive number of rows per block, 'all' or None, not {rows!r}."
        )
    return blocks(batch, rows), None


def fitting(
    run: Callable[[B, int], R], block: B, lanes: int = 1
) -> tuple[list[R], tuple[str, ...]]:
    """``[run(block, lanes)]``; where memory runs out, in halves of the rows, and then of the lanes.

    Each half is one call. So whatever `run` computes together (the base and every learning rate) it
    still computes in the same blocks, and a change of zero stays exactly zero.

    Args:
        run: ``(block, lanes) -> result``, row-separable and free of effects.
        block: a tree of tensors with leading N.
        lanes: how many parameter points are computed at once.

    Returns:
        The results in the rows' order, and one line for each time that memory ran out. Each is a
        warning too.

    Raises:
        MemoryError: one row at one parameter point does not fit.
    """
    try:
        return [run(block, lanes)], ()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    # This stands outside the handler, whose traceback holds what the failed call had allocated.
    halves, fewer = _halve(block, lanes, reason)
    note = (
        f"out of memory at {size(block)} x {lanes} (rows x lanes), computed again at "
        f"{size(halves[0])} x {fewer}"
    )
    warnings.warn(f"{note}: {reason}", stacklevel=2)
    results: list[R] = []
    notes: tuple[str, ...] = (note,)
    for half in halves:
        more, further = fitting(run, half, fewer)
        results += more
        notes += further
    return results, notes


def _halve(block: B, lanes: int, reason: str) -> tuple[list[B], int]:
    """The two halves of the rows with all lanes, or a single row with half the lanes."""
    n = size(block)
    if n > 1:
        return list(blocks(block, -(-n // 2))), lanes
    if lanes > 1:
        return [block], lanes // 2
    raise MemoryError(
        f"one row at one parameter point does not fit into memory ({reason}). Use shorter rows, a "
        "base in lower precision, or a device with more memory."
    )


def blockwise(
    run: Callable[[B, int], R],
    batch: B,
    rows: RowsPerBlock,
    *,
    of: tuple[RowFn, Params],
    lanes: int = 1,
    reverse: bool = False,
) -> Blockwise[R]:
    """Applies `run` to the blocks of a batch, in smaller ones where memory runs out.

    Args:
        run: ``(block, lanes) -> result``; see `fitting`.
        batch, rows: see `cut`.
        of: the function of parameters and rows that `run` evaluates, and the parameters, for
            `separable.checked`.
        lanes: how many parameter points are computed at once.
        reverse: whether `run` differentiates in reverse mode, which takes more memory.

    Raises:
        ValueError: `rows` is none of what `cut` takes, or the rows are not independent.
        MemoryError: one row at one parameter point does not fit.
    """
    parts, order = cut(batch, rows, lanes * (REVERSE if reverse else 1))
    results: list[R] = []
    notes: tuple[str, ...] = ()
    for block in checked(parts, *of):
        more, further = fitting(run, block, lanes)
        results += more
        notes += further
    return Blockwise(results, order, notes)


def identify(batch: Tree) -> Tensor | None:
    """The hashes of a batch's rows, [N] int64.

    None if the batch is not `Identified`, or if a transform has wrapped its values.
    """
    if isinstance(batch, Identified) and all_concrete(batch):
        return batch.row_hashes()
    return None


def keep_pages() -> None:
    """Makes malloc keep large blocks that are freed, which saves some 6% of a sweep on a CPU.

    With glibc this changes malloc's behaviour for the whole process, and nothing restores it: the
    process may then hold some 64 MiB of freed memory that it would have returned to the system.
    """
    # glibc returns large freed blocks to the system and faults them in again a moment later, until
    # it has once seen a block of up to 32 MiB freed. This block is never written to.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


@torch.no_grad()
def evaluate(fn: RowFn, params: Params, batch: Any, *, rows: RowsPerBlock = None) -> Any:
    """``fn(params, batch)`` in blocks of rows, without a graph.

    Args:
        fn: a row-separable function ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        batch: a tree of tensors with leading N.
        rows: rows per block, "all" for one block, or None for the default (see `cut`).

    Returns:
        fn's output for all N rows.

    Raises:
        ValueError: the output holds nan (the error names the rows), `rows` is none of the above, or
            there are several blocks and rows depend on each other.
        MemoryError: a single row does not fit.
    """
    keep_pages()
    with exact():
        parts = blockwise(lambda block, _: fn(params, block), batch, rows, of=(fn, params))
    out = merge(parts.results, parts.order)
    check_nan("evaluate", fn, out)
    return out
