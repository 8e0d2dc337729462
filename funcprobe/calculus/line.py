"""A function along the line ``params + eta * v``: each point is evaluated, or interpolated."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .blocks import RowFn, RowsPerBlock, identify
from .changes import Changes, Deltas, Options, Rules, changes, compute_changes, fill
from .interpolation import EVALUATED, check_nodes, first_nodes, interpolate
from .results import Sweep, join
from .taylor import taylor
from .tree import (
    Params,
    Terms,
    Tree,
    all_concrete,
    check_direction,
    concatenate,
    norm,
    size,
    tree_map,
)

__all__ = ["Sweep", "changes", "join", "sweep", "sweep_blocks"]

_ROUNDING = {"tf32": 2**-7, "bfloat16": 2**-4}  # relative error of changes by such products


def sweep(
    fn: RowFn,
    params: Params,
    v: Params,
    etas: Sequence[float] | Tensor,
    batch: Any,
    *,
    change: str = "direct",
    nodes: int | str | None = None,
    tol: float = 1e-6,
    matmul: str | None = None,
    rules: Rules | None = None,
    rows: RowsPerBlock = None,
    lanes: int | None = None,
) -> Sweep:
    """Evaluates `fn` along ``params + eta * v`` for K learning rates; `params` never changes.

    Args:
        fn: a row-separable function ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        v: a direction with exactly their names and shapes.
        etas: K learning rates, of any sign. v is the change of the parameters per unit of eta.
        batch: a tree of tensors with leading N.
        nodes: None evaluates every eta. A degree of at least 3 interpolates change / eta through
            that many nodes in the range of the etas and 0, and through the derivative at 0. "auto"
            takes 4 to 33 nodes, for each row as many as `tol` needs, however many etas there are.
            The result's `bound` is in the unit of the output.
        tol: the error that "auto" allows, relative to the largest change / eta of any row of the
            batch, or the rounding floor, whichever is larger (8e-6 in float32, 0.8% with products
            in tf32, 6% in bfloat16).
        change, matmul, rules, rows, lanes: see `changes`.

    Returns:
        The base, the changes and where each of them comes from; see `Sweep`.

    Raises:
        ValueError: names or shapes do not fit, v or etas are not finite, there are no etas, the
            output holds nan, "auto" cannot interpolate the curve to `tol`, or an option is none of
            the above.
    """
    options = Options(change, matmul, rules, rows, lanes)
    return _swept(_line(fn, params, v, etas, options, nodes, tol), batch)


def sweep_blocks(
    fn: RowFn,
    params: Params,
    v: Params,
    etas: Sequence[float] | Tensor,
    parts: Iterable[Any],
    *,
    change: str = "direct",
    nodes: int | str | None = None,
    tol: float = 1e-6,
    matmul: str | None = None,
    rules: Rules | None = None,
    rows: RowsPerBlock = None,
    lanes: int | None = None,
) -> Iterator[Sweep]:
    """One `Sweep` per block of rows, each when it is ready.

    This is for ragged rows, progress bars and resuming.

    Args:
        parts: the blocks of rows, each a tree of tensors with its rows leading.
        fn, params, v, etas, change, nodes, tol, matmul, rules, rows, lanes: see `sweep`.

    Returns:
        An iterator over the sweeps, which `join` puts together.

    Raises:
        ValueError: what `sweep` raises. The arguments are checked at once, the values of each block
            when it is swept.

    >>> blocks, order = batch.cut(4096)                                      # doctest: +SKIP
    >>> result = join(sweep_blocks(fn, params, v, etas, blocks), order)      # doctest: +SKIP
    """
    options = Options(change, matmul, rules, rows, lanes)
    line = _line(fn, params, v, etas, options, nodes, tol)
    return (_swept(line, part) for part in parts)


@dataclass(frozen=True)
class _Line:
    """What every block of rows is swept with."""

    fn: RowFn
    params: Params
    v: Params
    etas: Tensor  # [K] float64
    deltas: Deltas  # eta * v
    options: Options
    nodes: int | str | None
    tol: float


def _line(
    fn: RowFn,
    params: Params,
    v: Params,
    etas: Sequence[float] | Tensor,
    options: Options,
    nodes: int | str | None,
    tol: float,
) -> _Line:
    """Checks a sweep's arguments."""
    check_direction("sweep", v, params)
    etas = torch.as_tensor(etas, dtype=torch.float64).flatten().cpu()
    if len(etas) == 0 or not etas.isfinite().all():
        raise ValueError(f"sweep: one or more finite etas were expected, not {etas.tolist()[:5]}.")
    check_nodes("sweep", nodes, tol)
    _check_underflow(v, params, etas)
    return _Line(fn, params, v, etas, _along(v, params, etas), options, nodes, tol)


def _check_underflow(v: Params, params: Params, etas: Tensor) -> None:
    """Refuses learning rates at which the changes of the parameters lose their digits."""
    if not (all_concrete(v) and etas.any()):
        return
    count = sum(d.numel() for d in v.values())
    size = float(norm(v)) / max(count, 1) ** 0.5  # of an entry, root mean square
    tiny = max(torch.finfo(params[name].dtype).tiny for name in v)
    smallest = float(etas[etas != 0].abs().min())
    if 0 < size * smallest < tiny:
        raise ValueError(
            f"sweep: eta = {smallest:.3g} moves the parameters by {size * smallest:.2g}, less than "
            f"the smallest normal number of their dtype, {tiny:.2g}: the change underflows. Use 0, "
            f"or eta of at least {tiny / size:.1e}."
        )


def _swept(line: _Line, batch: Any) -> Sweep:
    """The sweep of one block of rows."""
    if line.nodes is None or not line.etas.any():
        run = compute_changes(line.fn, line.params, line.deltas, batch, line.options)
        bound = torch.zeros_like(line.etas)
        source = torch.full(line.etas.shape, EVALUATED, dtype=torch.int8)
    else:
        run, bound, source = _interpolated(line, batch)
    hashes = identify(batch)
    known = hashes is not None or all_concrete(run.base, run.change)
    return Sweep(
        line.etas,
        run.base,
        run.change,
        bound,
        source,
        run.fallbacks,
        run.shrunk,
        hashes if known else (),
        run.looped,
    )


def _interpolated(line: _Line, batch: Any) -> tuple[Changes, Tensor, Tensor]:
    """Changes by interpolation, their bound and their source."""
    degree = None if line.nodes == "auto" else int(line.nodes or 0)
    first = _from_zero(line, first_nodes(line.etas, degree), batch)

    def at(points: Tensor, index: Tensor) -> tuple[Tree, Changes]:
        rows, base = batch, first.base
        if len(index) < size(batch):
            rows, base = (tree_map(lambda leaf: leaf[index], tree) for tree in (batch, base))
        run = _quotients(line, points, rows, base)
        return run.change, run._replace(base=None, change=None)

    rounding = _ROUNDING.get(line.options.matmul or "", 0.0)
    curve = interpolate(first.change, at, line.etas, degree, line.tol, rounding)
    runs = (first, *curve.notes)
    fallbacks = tuple(sorted({name for run in runs for name in run.fallbacks}))
    shrunk = tuple(note for run in runs for note in run.shrunk)
    looped = next((run.looped for run in runs if run.looped), ())
    out = Changes(first.base, curve.change, fallbacks, shrunk, looped)
    return out, curve.bound, curve.source


def _from_zero(line: _Line, points: Tensor, batch: Any) -> Changes:
    """Change / eta at points of which the first is 0, where it is the derivative."""

    def derivative() -> tuple[Tree, Tree]:
        base, slope = taylor(line.fn, line.params, line.v, batch, rows=line.options.rows)
        return base, tree_map(lambda leaf: leaf[None], slope)

    if line.options.change == "direct":
        base, slope = derivative()
        run = _quotients(line, points[1:], batch, base)
        return run._replace(change=concatenate([slope, run.change]))
    # One rounding away from 0 an increment is as exact as the derivative there, and cheaper. If an
    # operation falls back to a subtraction, its change there is nothing but rounding.
    finest = min(torch.finfo(p.dtype).eps for p in line.params.values())
    run = _quotients(line, points.where(points != 0, finest * line.etas.abs().max()), batch)
    if not run.fallbacks:
        return run
    rest = tree_map(lambda leaf: leaf[1:], run.change)
    return run._replace(change=concatenate([derivative()[1], rest]))


def _quotients(line: _Line, points: Tensor, batch: Any, base: Tree = None) -> Changes:
    """Change / eta at points other than 0; a base that is given is not computed again."""
    lanes = line.options.lanes
    options = replace(line.options, lanes=lanes and min(lanes, len(points)))
    deltas = _along(line.v, line.params, points)
    run = compute_changes(line.fn, line.params, deltas, batch, options, base)
    change = tree_map(lambda c: c / points.to(c).view(-1, *[1] * (c.ndim - 1)), run.change)
    return run._replace(change=change)


def _along(v: Params, params: Params, etas: Tensor) -> Deltas:
    """``eta * v`` at each eta."""

    def make(start: int, before: int, lanes: int) -> Params:
        points = fill(etas[start : start + lanes - before], before, lanes)
        return {
            name: (points.to(d.device).view(-1, *[1] * d.ndim) * d).to(params[name])
            for name, d in v.items()
        }

    return Deltas(len(etas), make, [f"eta = {eta:.3g}" for eta in etas.tolist()])


def secant(
    fn: RowFn, params: Params, v: Params, batch: Any, eta: float, *, rows: RowsPerBlock = None
) -> Terms:
    r"""``f, f'`` along v as `taylor` gives them, but from exact increments at two small etas.

    .. math:: f'(0) = \frac{\Delta f(\eta) - \Delta f(-\eta)}{2 \eta}
              - \frac{\eta^2}{6} f^{(3)}(0) + O(\eta^4).

    It needs no derivative of `fn`, so it serves where that is not the derivative of its values. Its
    error is of second order in eta; rounding adds that of increments, which for operations without
    an increment rule grows as 1 / eta.

    Args:
        fn: a row-separable function ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        v: a direction with exactly their names and shapes.
        batch: a tree of tensors with leading N.
        eta: a small learning rate, not 0.
        rows: rows per block; "all" makes one block. The default follows from the shapes.

    Returns:
        `Terms` of orders 0 and 1.

    Raises:
        ValueError: what `sweep` raises.
    """
    swept = sweep(fn, params, v, [eta, -eta], batch, change="increment", rows=rows)
    slope = tree_map(lambda change: (change[0] - change[1]) / (2 * eta), swept.change)
    return Terms([swept.base, slope], identify(batch))
