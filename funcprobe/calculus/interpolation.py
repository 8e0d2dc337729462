r"""Dense curves from a few evaluations: polynomial interpolation of change / eta.

A change vanishes at eta = 0, so g(eta) = change / eta is as smooth as the change, and its value at
0 is the derivative. Interpolating g keeps full relative accuracy for tiny eta.

The nodes are Leja points. Each lies where the product of the distances to the nodes before it is
largest, which is about where the error of their interpolant is largest too. So before it is used,
each new node measures that error, and no evaluation is spent on tests alone. These errors fall at a
rate that the nearest singularity of each row sets, and each row gets as many nodes as it needs.
Trefethen, Approximation Theory and Approximation Practice (2013), chapters 5 and 8; Reichel, BIT 30
(1990), 332-346.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tree import Tree, leaves, merge, tree_map

EVALUATED, INTERPOLATED, LAW = 0, 1, 2  # in Sweep.source; by law a change is 0 at eta = 0

FIRST = 4  # the evaluations that "auto" begins with
_MOST = 33  # the evaluations that it makes at most
_HIGHEST = 256  # the highest degree that can be asked for


class Interpolated(NamedTuple):
    """Changes at many etas, and what is known of their error."""

    change: Tree  # leaves [K, N, ...]
    bound: Tensor  # [K] float64, on the interpolation's error in any element
    source: Tensor  # [K] int8: EVALUATED, INTERPOLATED or LAW
    notes: tuple[Any, ...]  # the note of each call of `at`, in their order


class _State(NamedTuple):
    """The rows whose interpolants are not good enough yet. There are M of them."""

    nodes: Tensor  # [n + 1] float64, where the rows were evaluated; the first is 0
    rows: Tensor  # [M] the rows' indices
    values: Tree  # change / eta at the nodes, leaves [n + 1, M, ...]
    errors: Tensor  # [n, M] of the interpolants through 1, ..., n nodes, each at the next node
    largest: float  # the largest |change / eta| so far, of any row


class _Check(NamedTuple):
    """How good the interpolants of the M rows are."""

    error: Tensor  # [M] the estimated error with all nodes
    rate: Tensor  # [M] the factor by which one more node multiplies it
    done: Tensor  # [M] bool


def first_nodes(etas: Tensor, degree: int | None) -> Tensor:
    """The nodes of the first evaluation, of which the first is 0; see `interpolate`."""
    return _leja(etas, degree or _MOST)[: 1 + (degree or FIRST)]


def interpolate(
    start: Tree,
    at: Callable[[Tensor, Tensor], tuple[Tree, Any]],
    etas: Tensor,
    degree: int | None,
    tol: float,
    rounding: float,
) -> Interpolated:
    """Computes changes at many etas from their values at few.

    The bound is four times the error that is expected from the errors at the nodes, plus the
    rounding.

    Args:
        start: change / eta of all N rows at `first_nodes`, leaves [n + 1, N, ...]; at 0 it is the
            derivative.
        at: ``(etas [n], rows [M]) -> (tree, note)``, which evaluates change / eta of these rows,
            leaves [n, M, ...]. This is the expensive part.
        etas: [K] float64, where the changes are wanted; not all are 0.
        degree: the degree of the polynomial in change / eta. None adds nodes, to the rows that need
            them, until every element's error is below `tol` times the largest change / eta.
        tol: see `degree`. If `rounding` is larger, it takes the place of `tol`.
        rounding: the relative error of the changes themselves, if it is more than their dtype's.
            Adding nodes cannot reduce the error below this.

    Raises:
        ValueError: the tolerance is not met with 33 nodes, or a value is infinite.
    """
    nodes = _leja(etas, degree or _MOST)
    state = _begin(nodes, start, 1 + (degree or FIRST))
    rounding = max(rounding, *(64 * torch.finfo(leaf.dtype).eps for leaf in leaves(start)))
    tol = max(tol, rounding)
    source = _source(etas, state.nodes)
    rows: list[Tensor] = []
    curves: list[Tree] = []
    errors, notes = [0.0], []
    while True:
        check = _converged(state, degree, tol)
        _refuse_rough(state, check, etas, tol)
        rows.append(state.rows[check.done])
        curves.append(_curve(state, check.done, etas))
        errors.extend(check.error[check.done].tolist())
        if check.done.all():
            break
        state, note = _refine(state, check, nodes, at, tol)
        notes.append(note)
    # The estimate gets a margin of 4. Rounding enters twice: at the nodes, and in an evaluation
    # that the interpolant is compared with.
    bound = etas.abs() * (4 * max(errors) + 2 * rounding * state.largest)
    bound = torch.where(source == INTERPOLATED, bound, 0.0)
    change = curves[0] if len(curves) == 1 else merge(curves, torch.cat(rows), dim=1)
    return Interpolated(change, bound, source, tuple(notes))


def check_nodes(where: str, nodes: int | str | None, tol: float = 0.0) -> None:
    """Raises ValueError unless `nodes` is None, "auto" or a degree, and `tol` is >= 0."""
    if isinstance(nodes, int) and nodes > _HIGHEST:
        raise ValueError(
            f"{where}: nodes must be a degree of at most {_HIGHEST}, not {nodes}: products of so "
            "many distances overflow. Leave it out to evaluate every point, or pass 'auto'."
        )
    if nodes not in (None, "auto") and not (isinstance(nodes, int) and nodes >= 3):
        raise ValueError(f"{where}: nodes must be None, 'auto' or a degree >= 3, not {nodes!r}.")
    if not 0 <= tol < math.inf:
        raise ValueError(f"{where}: tol must be finite and not negative, not {tol}.")


def _extrapolate(errors: Tensor) -> tuple[Tensor, Tensor]:
    """The error [M] left with all nodes, and the factor [M] by which one more node multiplies it.

    Args:
        errors: [n, M] of the interpolants through 1, ..., n nodes, each at the next; n >= 3.
    """
    # An error can be small by luck. The earlier ones, extrapolated at their mean rate, bound what
    # it may hide.
    errors = errors.clamp(min=torch.finfo(errors.dtype).tiny)
    rate = (errors[-2] / errors[0]).pow(1 / (len(errors) - 2)).clamp(max=0.75)
    ago = torch.arange(len(errors) - 1, -1, -1, dtype=errors.dtype).unsqueeze(1)
    return (errors * rate**ago).amax(0) * (rate / (1 - rate)).clamp(min=0.5), rate


def _begin(nodes: Tensor, values: Tree, count: int) -> _State:
    """All rows, evaluated at the first `count` nodes."""
    known = nodes[:count]
    errors = torch.stack([_held_out(known, values, n) for n in range(1, count)])
    return _State(known, torch.arange(errors.shape[1]), values, errors, _largest(values))


def _refine(
    state: _State,
    check: _Check,
    nodes: Tensor,
    at: Callable[[Tensor, Tensor], tuple[Tree, Any]],
    tol: float,
) -> tuple[_State, Any]:
    """Evaluates the rows that are not done at more nodes: as many as the median row needs."""
    keep, count = ~check.done, len(state.nodes)
    need = ((check.error / (tol * state.largest)).log() / -check.rate.log())[keep].median().ceil()
    new = nodes[count:][: max(int(need), 1)]
    rows = state.rows[keep]
    more, note = at(new, rows)
    values = tree_map(lambda old, added: torch.cat([old[:, keep], added]), state.values, more)
    errors = [_held_out(nodes, values, count + k) for k in range(len(new))]
    refined = _State(
        nodes[: count + len(new)],
        rows,
        values,
        torch.cat([state.errors[:, keep], torch.stack(errors)]),
        max(state.largest, _largest(values)),
    )
    return refined, note


def _converged(state: _State, degree: int | None, tol: float) -> _Check:
    """Which rows need no more nodes: all of them if the degree is fixed or nothing moves."""
    error, rate = _extrapolate(state.errors)
    stop = degree is not None or state.largest == 0
    return _Check(error, rate, (error <= tol * state.largest) | stop)


def _refuse_rough(state: _State, check: _Check, etas: Tensor, tol: float) -> None:
    """Raises ValueError if a value is infinite, or if the most nodes do not reach `tol`."""
    low, high = _range(etas)
    if not math.isfinite(state.largest):
        raise ValueError(
            f"sweep: the function is infinite somewhere on [{low:.3g}, {high:.3g}], and "
            "nothing can be interpolated there. Narrow the range, or leave nodes out."
        )
    if len(state.nodes) > _MOST and not check.done.all():
        raise ValueError(
            f"sweep: the curve over [{low:.3g}, {high:.3g}] is not smooth enough for "
            f"nodes='auto': with {_MOST} nodes its relative error is "
            f"{float(check.error.max()) / state.largest:.1e}, but {tol:.0e} was asked for. Narrow "
            "the range, raise tol, or leave nodes out. Differences of float32 values are rough "
            "themselves; increments (change='increment') are not."
        )


def _curve(state: _State, done: Tensor, etas: Tensor) -> Tree:
    """The changes of the rows that are done, leaves [K, M', ...]."""

    def of_leaf(leaf: Tensor) -> Tensor:
        slope = _apply(state.nodes, etas, leaf[:, done])
        return (slope * etas.to(slope).view(-1, *[1] * (slope.ndim - 1))).to(leaf.dtype)

    return tree_map(of_leaf, state.values)


def _source(etas: Tensor, nodes: Tensor) -> Tensor:
    """Where the change at each eta comes from, [K] int8."""
    source = torch.full(etas.shape, INTERPOLATED, dtype=torch.int8)
    source[etas == 0] = LAW
    source[torch.isin(etas, nodes[1:])] = EVALUATED
    return source


def _largest(values: Tree) -> float:
    return max(0.0, *(float(leaf.abs().max()) for leaf in leaves(values)))


def _held_out(nodes: Tensor, values: Tree, n: int) -> Tensor:
    """The largest error [M] of the interpolant through n nodes at the next node."""
    errors = [
        (_apply(nodes[:n], nodes[n : n + 1], leaf[:n])[0] - leaf[n]).abs().flatten(1).amax(1)
        for leaf in (leaf.unsqueeze(-1) for leaf in leaves(values))
    ]
    return torch.stack(errors).amax(0).cpu()


def _range(etas: Tensor) -> tuple[float, float]:
    """The smallest interval that holds 0 and the etas."""
    return min(float(etas.min()), 0.0), max(float(etas.max()), 0.0)


def _leja(etas: Tensor, n: int) -> Tensor:
    """0 and n Leja points after it on the range of 0 and the etas, [n + 1] float64."""
    low, high = _range(etas)
    grid = (low + high) / 2 - torch.cos(torch.linspace(0, torch.pi, 1001, dtype=torch.float64)) * (
        (high - low) / 2
    )
    grid[0], grid[-1] = low, high
    nodes, distance = [0.0], (grid.abs() / (high - low)).log()
    for _ in range(n):
        nodes.append(float(grid[distance.argmax()]))
        distance = distance + ((grid - nodes[-1]).abs() / (high - low)).log()
    return torch.tensor(nodes, dtype=torch.float64)


def _apply(nodes: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """The interpolant of `values` [n, ...] at x [K], by the barycentric formula."""
    apart = nodes[:, None] - nodes
    apart = apart / (apart.abs().max() or 1) + torch.eye(len(nodes), dtype=torch.float64)
    gap = x[:, None] - nodes
    hit = gap == 0
    matrix = 1 / apart.prod(1) / torch.where(hit, 1.0, gap)
    matrix = matrix / matrix.sum(1, keepdim=True)
    matrix = torch.where(hit.any(1, keepdim=True), hit.double(), matrix).to(values.device)
    return torch.einsum("kn,n...->k...", matrix, values.double())
