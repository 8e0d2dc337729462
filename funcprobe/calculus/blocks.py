"""A function of parameters and rows, evaluated block by block of rows."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from .precision import exact
from .tree import Params, blocks, check_nan, leaves, merge, size

# NOTE [block size]: rows and lanes follow from shapes alone, so that results repeat. A block holds
# about this many elements of the batch's widest leaf, all lanes counted: on a CPU what its caches
# hold, elsewhere what keeps the device busy.
_BLOCK = {"cpu": 1024}
_BLOCK_ELSEWHERE = 16384

# Reverse mode keeps what every layer computed; it counts as this many lanes.
REVERSE = 2


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
    """A batch that knows how to divide itself into blocks."""

    def cut(self, positions: int, /) -> tuple[list[Self], Tensor]:
        """Blocks of at most `positions` positions, and the original row [N] of each of theirs."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A batch whose rows can be told apart, so that results can be checked against it."""

    def row_hashes(self) -> Tensor:
        """[N] int64, a hash of each row that does not depend on padding or on other rows."""
        ...


def block_size(device: torch.device) -> int:
    """How many positions a block holds when the caller does not say."""
    return _BLOCK.get(device.type, _BLOCK_ELSEWHERE)


def default_rows(batch, lanes: int = 1) -> int:
    """How many rows make a block when the caller does not say."""
    n, tensors = max(size(batch), 1), leaves(batch)
    width = max(leaf.numel() // n for leaf in tensors)
    return max(block_size(tensors[0].device) // (max(width, 1) * lanes), 1)


def cut(batch, rows: int | None, lanes: int = 1) -> tuple[Iterable, Tensor | None]:
    """The blocks a batch is computed in, and the original row of each of theirs; None: as it was.

    Args:
        batch: a tree of tensors with leading N. Where it has a method ``cut(positions)`` that gives
            blocks and order, that decides, as `Batch` does to waste no token.
        rows: rows per block in the batch's own order, whatever the batch; None is the default.
        lanes: parameter points that are computed at once.
    """
    if rows is None and isinstance(batch, Cuttable):
        return batch.cut(max(block_size(leaves(batch)[0].device) // lanes, 1))
    return blocks(batch, rows or default_rows(batch, lanes)), None


def fitting(run: Callable, part, lanes: int = 1) -> tuple[list, tuple[str, ...]]:
    """``[run(part, lanes)]``, or where memory runs out the same in halves: of rows, then of lanes.

    Each half is one call, so whatever `run` computes together (the base and every learning rate)
    it computes in the same blocks still: a change of zero stays exactly zero.

    Args:
        run: ``(part, lanes) -> result``, row-separable, free of effects.
        part: a tree of tensors with leading N.
        lanes: parameter points at a time.

    Returns:
        The results in the rows' order, and one line for each time memory ran out; warned of too.

    Raises:
        MemoryError: one row and one lane do not fit.
    """
    try:
        return [run(part, lanes)], ()
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        why = str(error).splitlines()[0]
    # Outside the handler, whose traceback holds what the call had made.
    n = size(part)
    if n == lanes == 1:
        raise MemoryError(
            f"one row at one parameter point does not fit into memory ({why}). Use shorter rows, a "
            "base in lower precision, or a device with more memory."
        )
    if n > 1:
        halves, fewer, now = list(blocks(part, -(-n // 2))), lanes, f"{-(-n // 2)} x {lanes}"
    else:
        halves, fewer, now = [part], lanes // 2, f"1 x {lanes // 2}"
    note = f"out of memory at {n} x {lanes} (rows x lanes), computed again at {now}"
    warnings.warn(f"{note}: {why}", stacklevel=2)
    results, notes = [], (note,)
    for half in halves:
        some, more = fitting(run, half, fewer)
        results += some
        notes += more
    return results, notes


def _out_of_memory(error: RuntimeError) -> bool:
    says = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in says)


def keep_pages() -> None:
    """Makes malloc keep the pages of large blocks that are freed: some 6% of a sweep on a CPU."""
    # NOTE [page faults]: glibc returns freed memory to the system, to fault it in again a moment
    # later, until it has once seen a block of up to 32 MiB freed. This one is never touched.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


@torch.no_grad()
def evaluate(fn: Callable, params: Params, batch, *, rows: int | None = None):
    """``fn(params, batch)`` in blocks of rows, without a graph.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        batch: a tree of tensors with leading N.
        rows: rows per block; the default follows from the shapes (see `cut`).

    Returns:
        fn's output for all N rows.

    Raises:
        ValueError: the output holds nan; the rows are named.
    """
    keep_pages()
    parts = []
    with exact():
        cuts, order = cut(batch, rows)
        for part in cuts:
            parts += fitting(lambda part, _: fn(params, part), part)[0]
    out = merge(parts, order)
    check_nan("evaluate", out)
    return out
