r"""Dense curves from a few evaluations: polynomial interpolation of change / eta.

A change vanishes at eta = 0, so g(eta) = change / eta is as smooth as the change and its value at 0
is the derivative. Interpolating g keeps full relative accuracy for tiny eta.

The nodes are Leja points: each lies where the product of distances to those before it, and so the
error of their interpolant, is largest. So new nodes first test the curve without them where that
is worst, and none is wasted on a test. Trefethen, Approximation Theory and Approximation Practice
(2013), chapter 5; Reichel, BIT 30 (1990), 332-346.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .tree import leaves, tree_map

EVALUATED, INTERPOLATED, LAW = 0, 1, 2  # in Sweep.source

_FIRST, _MORE, _MOST = 5, 2, 33  # evaluations at first, at a time after that, and at most
_ROUNDINGS = 64  # of the values' precision: more nodes mend no error below that


def interpolate(
    at: Callable[[Tensor], object], slope, etas: Tensor, degree: int | None, tol: float
) -> tuple[object, Tensor, Tensor]:
    """Changes at many etas from their values at few.

    Args:
        at: ``etas [n] -> tree`` of changes with leading n; the expensive half.
        slope: the tree of derivatives at 0.
        etas: [K] float64 where the changes are wanted.
        degree: of the polynomial in change / eta; None adds nodes until the error of every element
            of the curve without the last two is below `tol` times the largest change.
        tol: see `degree`; 64 roundings of the values' precision if it is less.

    Returns:
        The changes at `etas`, leading K; a bound [K] on the interpolation's error in any element,
        which the last two nodes measured; and the source [K] of each.

    Raises:
        ValueError: the tolerance is not met with 33 nodes.
    """
    low, high = min(float(etas.min()), 0.0), max(float(etas.max()), 0.0)
    if low == high:
        zero = tree_map(lambda s: s.new_zeros(len(etas), *s.shape), slope)
        return zero, torch.zeros_like(etas), torch.full(etas.shape, LAW, dtype=torch.int8)
    nodes = _leja(low, high, _MOST if degree is None else degree)
    g = tree_map(lambda s: s.double().unsqueeze(0), slope)
    precision = max(torch.finfo(s.dtype).eps for s in leaves(slope))
    tol = max(tol, _ROUNDINGS * precision)
    while True:
        have = len(leaves(g)[0])
        stop = have + (_FIRST if have == 1 else _MORE) if degree is None else degree + 1
        new = nodes[have:stop]
        changed = at(new)
        g = tree_map(lambda old, c, x=new: torch.cat([old, _over(c.double(), x)]), g, changed)
        known = nodes[: len(leaves(g)[0])]
        # The curve without the last two nodes, at both: one alone can lie beside the error's peak.
        error = max(
            float((_apply(known[:-2], known[-2:], leaf[:-2]) - leaf[-2:]).abs().max())
            for leaf in leaves(g)
        )
        size = max(float(leaf.abs().max()) for leaf in leaves(g))
        if degree is not None or error <= tol * size:
            break
        if len(known) > _MOST:
            raise ValueError(
                f"sweep: the curve over [{low:.3g}, {high:.3g}] is not smooth enough for "
                f"nodes='auto': with {_MOST} nodes its relative error is {error / size:.1e}, "
                f"{tol:.0e} was asked for. Narrow the range, raise tol, or leave nodes out. "
                "Differences of float32 values are rough themselves, change='increment' is not."
            )
    curve = tree_map(lambda leaf, s: _times(_apply(known, etas, leaf), etas).to(s.dtype), g, slope)
    source = torch.full(etas.shape, INTERPOLATED, dtype=torch.int8)
    source[torch.isin(etas, known)] = EVALUATED
    source[etas == 0] = LAW
    # The evaluations' own rounding is not in it, the interpolation's is.
    rounding = 16 * precision * size
    bound = torch.where(source == INTERPOLATED, etas.abs() * (error + rounding), 0.0)
    return curve, bound, source


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
    apart = apart / apart.abs().max() + torch.eye(len(nodes), dtype=torch.float64)
    gap = x[:, None] - nodes
    hit = gap == 0
    matrix = 1 / apart.prod(1) / torch.where(hit, 1.0, gap)
    matrix = matrix / matrix.sum(1, keepdim=True)
    matrix = torch.where(hit.any(1, keepdim=True), hit.double(), matrix).to(values)
    return torch.einsum("kn,n...->k...", matrix, values)


def _times(values: Tensor, x: Tensor) -> Tensor:
    return values * x.to(values).view(-1, *[1] * (values.ndim - 1))


def _over(values: Tensor, x: Tensor) -> Tensor:
    return values / x.to(values).view(-1, *[1] * (values.ndim - 1))
