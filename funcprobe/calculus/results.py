"""What a sweep along a line gives, and the results of several blocks of rows as one."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .interpolation import EVALUATED, INTERPOLATED, LAW
from .tree import Terms, describe, html_text, leaves, merge


class Sweep(NamedTuple):
    """A function's values along a line of parameters, kept as differences from the base.

    `row_hashes` tells which rows these are, so that a batch can be checked against them. It is None
    if the batch could not tell; inside a transform, which may only return tensors, it is ``()``.
    """

    etas: Tensor  # [K] float64
    base: Any  # fn's output at params, leaves [N, ...], computed in the same blocks as the rest
    change: Any  # leaves [K, N, ...]: value at eta less base
    bound: Tensor  # [K] float64, error bound where interpolated, 0 where evaluated
    source: Tensor  # [K] int8: EVALUATED, INTERPOLATED, or LAW (zero at eta = 0)
    fallbacks: tuple[str, ...] = ()  # operations whose increments were subtractions
    shrunk: tuple[str, ...] = ()  # blocks that memory forced into smaller ones
    row_hashes: Tensor | tuple[()] | None = None  # [N] int64
    looped: tuple[str, ...] = ()  # why vmap could not stack lanes, which then ran one by one

    def __repr__(self) -> str:
        lines = [
            f"Sweep: {_range(self.etas)}, {_count(leaves(self.base), 0)} rows",
            f"  base    {describe(self.base)}",
            f"  change  {describe(self.change)}",
        ]
        if isinstance(self.source, Tensor) and (self.source != EVALUATED).any():
            lines.append(f"  source  {_sources(self.source)}")
        if isinstance(self.bound, Tensor) and self.bound.numel() and self.bound.any():
            lines.append(f"  bound   {float(self.bound.max()):.2g} at most")
        if self.fallbacks:
            lines.append(f"  subtracted, for want of a rule: {', '.join(self.fallbacks[:8])}")
        if self.shrunk:
            lines.append(f"  memory ran out {len(self.shrunk)} times, first {self.shrunk[0]}")
        if self.looped:
            lines.append(f"  one lane at a time, since vmap refused: {self.looped[0][:60]}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_text(repr(self))


def join(parts: Iterable[Any], order: Tensor | None = None) -> Any:
    """Puts the results of several blocks of rows together, in the rows' original order.

    Leaves of blocks that were trimmed to different widths are padded with zeros to the widest.

    Args:
        parts: the sweeps of the same etas, the `Terms`, or other trees with leading rows, one for
            each block of rows. The blocks have no rows in common.
        order: [N] the original row of each row of the blocks, as it came with them; None keeps the
            blocks' order.

    Returns:
        A sweep, `Terms` or a tree, as the parts are. It has row hashes if every part has.

    Raises:
        ValueError: there are no parts, they are of different types, their etas differ, or the order
            has another number of rows.

    >>> join([torch.tensor([1.0]), torch.tensor([2.0, 3.0])], torch.tensor([1, 0, 2])).tolist()
    [2.0, 1.0, 3.0]
    """
    parts = list(parts)
    if not parts:
        raise ValueError("join: one or more results of blocks were expected, there are none.")
    names = sorted({type(part).__name__ for part in parts})
    if len(names) > 1:
        raise ValueError(
            f"join: the results must all be of one type; these are {', '.join(names)}. Join the "
            "results of one function at a time."
        )
    if isinstance(parts[0], Sweep):
        return _join_sweeps(parts, order)
    if isinstance(parts[0], Terms):
        terms = merge([tuple(part) for part in parts], order)
        return Terms(terms, _join_hashes([part.row_hashes for part in parts], order))
    return merge(parts, order)


def _join_sweeps(sweeps: Sequence[Sweep], order: Tensor | None) -> Sweep:
    first = sweeps[0]
    if any(not torch.equal(first.etas, other.etas) for other in sweeps[1:]):
        raise ValueError(
            "join: the sweeps must share their etas, but theirs are different. Join the blocks of "
            "one sweep at a time."
        )
    return Sweep(
        etas=first.etas,
        base=merge([s.base for s in sweeps], order),
        change=merge([s.change for s in sweeps], order, dim=1),
        bound=torch.stack([s.bound for s in sweeps]).amax(0),
        source=torch.stack([s.source for s in sweeps]).amax(0),
        fallbacks=tuple(sorted({name for s in sweeps for name in s.fallbacks})),
        shrunk=tuple(note for s in sweeps for note in s.shrunk),
        row_hashes=_join_hashes([s.row_hashes for s in sweeps], order),
        looped=next((s.looped for s in sweeps if s.looped), ()),
    )


def _join_hashes(hashes: Sequence[object], order: Tensor | None) -> Tensor | None:
    known = [part for part in hashes if isinstance(part, Tensor)]
    return merge(known, order) if len(known) == len(hashes) else None


def _range(etas: Tensor) -> str:
    ends = f"from {float(etas.min()):.3g} to {float(etas.max()):.3g}" if etas.numel() else ""
    return f"{etas.numel()} etas {ends}".strip()


def _sources(source: Tensor) -> str:
    names = {EVALUATED: "evaluated", INTERPOLATED: "interpolated", LAW: "zero at eta = 0"}
    counts = {name: int((source == value).sum()) for value, name in names.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _count(tensors: Sequence[Tensor], dim: int) -> int:
    return tensors[0].shape[dim] if tensors else 0
