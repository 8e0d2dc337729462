r"""Dense curves from a few evaluations: polynomial interpolation of change / eta.

A change vanishes at eta = 0, so g(eta) = change / eta is as smooth as the change and its value at 0
is the derivative. Interpolating g keeps full relative accuracy for tiny eta.

The nodes are Leja points: each lies where the product of distances to those before it, and so the
error of their interpolant, is largest. So each new node first measures the curve without it where
that is worst, and none is wasted on a test. These errors fall at a rate that each row's nearest
singularity sets, and each row gets the nodes it needs. Trefethen, Approximation Theory and
Approximation Practice (2013), chapters 5 and 8; Reichel, BIT 30 (1990), 332-346.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .tree import leaves, tree_map

EVALUATED, INTERPOLATED, LAW = 0, 1, 2  # in Sweep.source

FIRST, _MOST = 4, 33  # evaluations at first, and at most


def interpolate(
    at: Callable[[Tensor, Tensor], object],
    count: int,
    etas: Tensor,
    degree: int | None,
    tol: float,
    rounding: float,
) -> tuple[object, Tensor, Tensor]:
    """Changes at many etas from their values at few.

    Args:
        at: ``(etas [n], rows [M]) -> tree`` of change / eta of those rows, leaves [n, M, ...]; the
            derivative at 0, which is the first eta of the first call. The expensive half.
        count: of rows, N.
        etas: [K] float64 where the changes are wanted; not all 0.
        degree: of the polynomial in change / eta; None adds nodes, to the rows that need them,
            until every element's error is below `tol` times the largest change / eta.
        tol: see `degree`; `rounding` if it is less.
        rounding: the changes' own error, relative, if more than their dtype's: more nodes mend none
            below it.

    Returns:
        The changes at `etas`, leading K; a bound [K] on the interpolation's error in any element,
        four times what the errors at the nodes let expect; and the source [K] of each.

    Raises:
        ValueError: the tolerance is not met with 33 nodes; an infinite value.
    """
    low, high = min(float(etas.min()), 0.0), max(float(etas.max()), 0.0)
    source = torch.full(etas.shape, INTERPOLATED, dtype=torch.int8)
    source[etas == 0] = LAW
    nodes = _leja(low, high, degree or _MOST)
    rows, more = torch.arange(count), degree or FIRST
    known = nodes[: 1 + more]
    g = at(known, rows)
    curve = tree_map(lambda leaf: leaf.new_zeros(len(etas), *leaf.shape[1:]), g)
    source[torch.isin(etas, known[1:])] = EVALUATED
    rounding = max(rounding, *(64 * torch.finfo(leaf.dtype).eps for leaf in leaves(g)))
    tol = max(tol, rounding)
    errors = [_held_out(known, g, n) for n in range(1, len(known))]
    left, largest = torch.zeros(count, dtype=torch.float64), 0.0
    while True:
        error, rate = _tail(torch.stack(errors))
        largest = max(largest, *(float(leaf.abs().max()) for leaf in leaves(g)))
        if not math.isfinite(largest):
            raise ValueError(
                f"sweep: the function is infinite somewhere on [{low:.3g}, {high:.3g}], and "
                "nothing can be interpolated there. Narrow the range, or leave nodes out."
            )
        done = (error <= tol * largest) | (degree is not None or largest == 0)
        if len(known) > _MOST and not done.all():
            raise ValueError(
                f"sweep: the curve over [{low:.3g}, {high:.3g}] is not smooth enough for "
                f"nodes='auto': with {_MOST} nodes its relative error is "
                f"{float(error.max()) / largest:.1e}, {tol:.0e} was asked for. Narrow the range, "
                "raise tol, or leave nodes out. Differences of float32 values are rough "
                "themselves, change='increment' is not."
            )
        for out, leaf in zip(leaves(curve), leaves(g), strict=True):
            out[:, rows[done]] = _times(_apply(known, etas, leaf[:, done]), etas).to(out.dtype)
        left[rows[done]] = error[done]
        if done.all():
            break
        # As many more as the middle row needs at its rate.
        need = ((error / (tol * largest)).log() / -rate.log())[~done].median().ceil()
        new = nodes[len(known) :][: max(int(need), 1)]
        rows, errors = rows[~done], [each[~done] for each in errors]
        g = tree_map(lambda leaf, g, keep=~done: torch.cat([leaf[:, keep], g]), g, at(new, rows))
        errors += [_held_out(nodes, g, len(known) + k) for k in range(len(new))]
        known = nodes[: len(known) + len(new)]
    # An estimate's margin; and rounding in the nodes and in an evaluation to compare with.
    bound = etas.abs() * (4 * float(left.max()) + 2 * rounding * largest)
    return curve, torch.where(source == INTERPOLATED, bound, 0.0), source


def check_nodes(where: str, nodes, tol: float = 0.0) -> None:
    """Raises ValueError unless they say how a curve is to be interpolated, or not at all."""
    if nodes not in (None, "auto") and not (isinstance(nodes, int) and nodes >= 3):
        raise ValueError(f"{where}: nodes must be None, 'auto' or a degree from 3, not {nodes!r}.")
    if not 0 <= tol < math.inf:
        raise ValueError(f"{where}: tol must be finite and not negative, not {tol}.")


def _held_out(nodes: Tensor, values, n: int) -> Tensor:
    """The largest error [M] of the curve through n nodes at the one after them."""
    each = [
        (_apply(nodes[:n], nodes[n : n + 1], leaf[:n])[0] - leaf[n]).abs().flatten(1).amax(1)
        for leaf in (leaf.unsqueeze(-1) for leaf in leaves(values))
    ]
    return torch.stack(each).amax(0).cpu()


def _tail(errors: Tensor) -> tuple[Tensor, Tensor]:
    """The error [M] left with all nodes, and the factor [M] of it that a node leaves.

    Args:
        errors: [n, M] of the curves through 1, ..., n nodes, each at the next; n >= 3.
    """
    # An error can be small by chance: those before it say, at their mean rate, what it may hide.
    errors = errors.clamp(min=torch.finfo(errors.dtype).tiny)
    rate = (errors[-2] / errors[0]).pow(1 / (len(errors) - 2)).clamp(max=0.75)
    ago = torch.arange(len(errors) - 1, -1, -1, dtype=errors.dtype).unsqueeze(1)
    return (errors * rate**ago).amax(0) * (rate / (1 - rate)).clamp(min=0.5), rate


def _leja(low: float, high: float, n: int) -> Tensor:
    """0 and n Leja points after it on [low, high], [n + 1] float64."""
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


def _times(values: Tensor, x: Tensor) -> Tensor:
    return values * x.to(values).view(-1, *[1] * (values.ndim - 1))
