"""A function along ``params + eta * v``: vmap over stacked deltas, the base beside them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import cut, fitting, keep_pages
from .interpolation import EVALUATED, check_nodes, interpolate
from .precision import exact
from .taylor import taylor
from .transforms.increment import increment
from .tree import (
    Params,
    check_direction,
    check_nan,
    concatenate,
    leaves,
    merge,
    size,
    tree_map,
)

_LANES = 8
_ROUNDING = {"tf32": 2**-7, "bfloat16": 2**-4}  # of changes by such products, relative


class Sweep(NamedTuple):
    """A function's values along a line of parameters, kept as differences from the base."""

    etas: Tensor  # [K] float64
    base: Any  # fn's output at params, leaves [N, ...], computed in the same blocks as the rest
    change: Any  # leaves [K, N, ...]: value at eta less base
    bound: Tensor  # [K] float64, error bound where interpolated, 0 where evaluated
    source: Tensor  # [K] int8: EVALUATED, INTERPOLATED, or LAW (zero at eta = 0)
    fallbacks: tuple[str, ...] = ()  # operations whose increments were subtractions
    shrunk: tuple[str, ...] = ()  # blocks that memory forced into smaller ones


def changes(
    fn: Callable,
    params: Params,
    deltas: Params,
    batch,
    *,
    change: str = "direct",
    matmul: str | None = None,
    rules: dict | None = None,
    rows: int | None = None,
    lanes: int | None = None,
) -> tuple[Any, Any]:
    """``fn(params + delta_k) - fn(params)`` for K stacked deltas, by `vmap`, the base unbatched.

    The base is one lane of each block and blocks have a fixed number of lanes, so that a delta of
    zero gives exactly zero.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        deltas: exactly the names of `params`, every leaf with leading K (see `stack`).
        batch: a tree of tensors with leading N.
        change: "direct" subtracts two values, and rounds like it; "increment" computes the change
            itself, at full relative precision however small (see `increment`).
        matmul: for "increment", the precision of the changes' matrix products; see `increment`.
        rules: for "increment", a rule table instead of `RULES`.
        rows: rows per block; the default follows from the shapes and `lanes`.
        lanes: parameter points per block, of "direct" the base among them; 1 is the plain loop.
            The default shares them out over turns of at most 8; in float64 a block of odd size
            takes up to 3 more.
            Memory grows with ``rows * lanes``, not with K.

    Returns:
        ``(base, change)``: fn's output at `params`, and the changes with leading K.

    Raises:
        ValueError: names or shapes that do not fit, non-finite deltas, nan in the output.
    """
    k = {len(delta) for delta in deltas.values()}
    if len(k) > 1:
        raise ValueError(f"changes: every delta must lead with the same K, found {sorted(k)}.")
    k = k.pop() if k else 0
    if k == 0:
        raise ValueError("changes: one or more deltas were expected, there are none.")
    expanded = {name: p.expand(k, *p.shape) for name, p in params.items()}
    check_direction("changes", deltas, expanded)

    def filled(start: int, before: int, lanes: int) -> Params:
        return {
            name: _fill(d[start : start + lanes - before].to(params[name]), before, lanes)
            for name, d in deltas.items()
        }

    options = dict(change=change, matmul=matmul, rules=rules, rows=rows, lanes=lanes)
    return _changes(fn, params, filled, k, batch, options)[:2]


def sweep(
    fn: Callable,
    params: Params,
    v: Params,
    etas: Sequence[float] | Tensor,
    batch,
    *,
    change: str = "direct",
    nodes: int | str | None = None,
    tol: float = 1e-6,
    matmul: str | None = None,
    rules: dict | None = None,
    rows: int | None = None,
    lanes: int | None = None,
) -> Sweep:
    """`fn` along ``params + eta * v`` for K learning rates; `params` never changes.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        v: a direction with exactly their names and shapes.
        etas: K learning rates, of any sign, in the unit that v is relative to.
        batch: a tree of tensors with leading N.
        nodes: None evaluates every eta. A degree, or "auto", interpolates change / eta between
            that many nodes in the range of etas and 0, and its derivative at 0: a curve
            of any length for four evaluations or more, of each row as many as `tol` needs.
            `bound` is in the unit of the output.
        tol: the error that "auto" allows, relative to a block's largest change / eta; what
            rounding leaves (8e-6 in float32, 0.8% with products in tf32, 6% in bfloat16) if more.
        change, matmul, rules, rows, lanes: as in `changes`.

    Raises:
        ValueError: names or shapes that do not fit, non-finite v or etas, nan in the output, a
            curve that "auto" cannot interpolate to `tol`, a bad `nodes` or `tol`.
    """
    options = dict(change=change, nodes=nodes, tol=tol, matmul=matmul, rules=rules)
    return next(sweep_blocks(fn, params, v, etas, [batch], **options, rows=rows, lanes=lanes))


def sweep_blocks(
    fn: Callable,
    params: Params,
    v: Params,
    etas: Sequence[float] | Tensor,
    parts: Iterable,
    *,
    change: str = "direct",
    nodes: int | str | None = None,
    tol: float = 1e-6,
    matmul: str | None = None,
    rules: dict | None = None,
    rows: int | None = None,
    lanes: int | None = None,
) -> Iterator[Sweep]:
    """One `Sweep` per block of rows, as it is ready: for ragged batches, progress bars, resuming.

    Takes what `sweep` takes, with blocks of rows for its batch.

    >>> blocks, order = by_length(batch, tokens=4096)                        # doctest: +SKIP
    >>> result = join(sweep_blocks(fn, params, v, etas, blocks), order)      # doctest: +SKIP
    """
    check_direction("sweep", v, params)
    etas = torch.as_tensor(etas, dtype=torch.float64).flatten().cpu()
    if len(etas) == 0 or not etas.isfinite().all():
        raise ValueError(f"sweep: one or more finite etas were expected, not {etas.tolist()[:5]}.")
    check_nodes("sweep", nodes, tol)
    options = dict(change=change, matmul=matmul, rules=rules, rows=rows, lanes=lanes)
    every = _along(v, params, etas)
    for part in parts:
        if nodes is None or not etas.any():
            base, changed, *said = _changes(fn, params, every, len(etas), part, options)
            source = torch.full(etas.shape, EVALUATED, dtype=torch.int8)
            yield Sweep(etas, base, changed, torch.zeros_like(etas), source, *said)
            continue
        yield _dense(fn, params, v, etas, part, options, nodes, tol)


def _dense(fn, params: Params, v: Params, etas: Tensor, part, options: dict, nodes, tol) -> Sweep:
    """The sweep of one block of rows by interpolation."""
    lanes, base, runs = options["lanes"], None, []

    def over(points: Tensor, index: Tensor):
        """Change / eta."""
        some, there, own = part, base, options | {"lanes": lanes and min(lanes, len(points))}
        if len(index) < size(part):
            some, there = (tree_map(lambda leaf: leaf[index], tree) for tree in (part, base))
        runs.append(_changes(fn, params, _along(v, params, points), len(points), some, own, there))
        return tree_map(lambda c: c / points.to(c).view(-1, *[1] * (c.ndim - 1)), runs[-1][1])

    def at(points: Tensor, index: Tensor):
        """The same, at 0 the derivative."""
        nonlocal base
        if points[0] != 0:
            return over(points, index)
        if options["change"] == "direct":
            base, slope = taylor(fn, params, v, part, rows=options["rows"])
            return tree_map(lambda s, g: torch.cat([s[None], g]), slope, over(points[1:], index))
        # A rounding away from 0 an increment is as exact as the derivative there, and cheaper. One
        # that is a subtraction would drown.
        finest = min(torch.finfo(p.dtype).eps for p in params.values())
        g = over(points.where(points != 0, finest * etas.abs().max()), index)
        base = runs[-1][0]
        if runs[-1][2]:
            slope = taylor(fn, params, v, part, rows=options["rows"])[1]
            g = tree_map(lambda s, g: torch.cat([s[None], g[1:]]), slope, g)
        return g

    degree, coarse = None if nodes == "auto" else nodes, _ROUNDING.get(options["matmul"], 0.0)
    changed, bound, source = interpolate(at, size(part), etas, degree, tol, coarse)
    fallbacks = tuple(sorted({name for run in runs for name in run[2]}))
    shrunk = tuple(note for run in runs for note in run[3])
    return Sweep(etas, base, changed, bound, source, fallbacks, shrunk)


def _along(v: Params, params: Params, etas: Tensor) -> Callable[[int, int, int], Params]:
    """``eta * v`` for a block of lanes, from `start` on, with zeros before and after."""

    held: dict[tuple[int, int, int], Params] = {}  # one, which blocks of rows share

    def deltas(start: int, before: int, lanes: int) -> Params:
        if (start, before, lanes) not in held:
            held.clear()
            points = _fill(etas[start : start + lanes - before], before, lanes)
            held[start, before, lanes] = {
                name: (points.to(d.device).view(-1, *[1] * d.ndim) * d).to(params[name])
                for name, d in v.items()
            }
        return held[start, before, lanes]

    return deltas


def join(sweeps: Iterable[Sweep], order: Tensor | None = None) -> Sweep:
    """The sweeps of several blocks as the sweep of all rows, in the rows' original order.

    Args:
        sweeps: of the same etas, over disjoint rows.
        order: [N] the original row of each row of the blocks, as `by_length` gives it; None keeps
            the blocks' order. Leaves of ragged width are padded with zeros to the widest.

    Raises:
        ValueError: no sweeps, sweeps of different etas, an order of another number of rows.
    """
    sweeps = list(sweeps)
    if not sweeps:
        raise ValueError("join: one or more sweeps were expected, there are none.")
    first = sweeps[0]
    if any(not torch.equal(first.etas, other.etas) for other in sweeps[1:]):
        raise ValueError("join: the sweeps must share their etas; these are of different ones.")
    return first._replace(
        base=merge([s.base for s in sweeps], order),
        change=merge([s.change for s in sweeps], order, dim=1),
        bound=torch.stack([s.bound for s in sweeps]).amax(0),
        source=torch.stack([s.source for s in sweeps]).amax(0),
        fallbacks=tuple(sorted({name for s in sweeps for name in s.fallbacks})),
        shrunk=tuple(note for s in sweeps for note in s.shrunk),
    )


@torch.no_grad()
def _changes(
    fn,
    params,
    deltas: Callable[[int, int, int], Params],
    k: int,
    batch,
    options: dict,
    base=None,
):
    """Base, changes, fallbacks and notes; a base that is given is not computed again."""
    kind, lanes, rows = options["change"], options["lanes"], options["rows"]
    if kind not in ("direct", "increment"):
        raise ValueError(f"change must be 'direct' or 'increment', not {kind!r}.")
    if kind == "direct" and options["matmul"] is not None:
        raise ValueError(
            "sweep: matmul= is the precision of increments; a difference of values would drown in "
            "its rounding. Use change='increment', or leave it out."
        )
    # Increments have the base in every lane, so it needs none of its own.
    before = int(kind == "direct" and base is None)
    lanes = lanes or _balanced(k + before)
    float64 = any(p.dtype == torch.float64 for p in params.values())
    fallbacks: set[str] = set()
    how = {"rules": options["rules"], "matmul": options["matmul"]}

    def of_block(part, lanes: int):
        if kind == "direct":
            even = _even(lanes, part) if float64 and not hasattr(part, "cut") else lanes
            return _values(fn, params, deltas, k, part, even, before)
        return _increments(fn, params, deltas, k, part, lanes, how, fallbacks)

    parts, shrunk = [], ()
    keep_pages()
    with exact():
        cuts, order = cut(batch, rows, lanes)
        for part in cuts:
            some, notes = fitting(of_block, part, lanes)
            parts += some
            shrunk += notes
    if kind == "direct":
        values = merge(parts, order, dim=1)
        base = tree_map(lambda x: x[0].clone(), values) if before else base
        change = tree_map(lambda x, b: x[before:] - b, values, base)
    else:
        base = merge([base for base, _ in parts], order) if base is None else base
        change = merge([change for _, change in parts], order, dim=1)
    check_nan("sweep (base)", base)
    check_nan("sweep", change, dim=1)
    return base, change, tuple(sorted(fallbacks)), shrunk


def _balanced(points: int) -> int:
    """As few lanes as take no more turns than the most would."""
    return -(-points // -(-points // _LANES))


def _values(fn, params, deltas, k: int, part, lanes: int, before: int):
    """Values on one block of rows at k points, behind that at the base if `before` is 1."""

    def at(delta: Params):
        return fn({name: params[name] + d for name, d in delta.items()}, part)

    parts = []
    for start in range(0, k + before, lanes):
        first = before if start == 0 else 0
        some = deltas(max(start - before, 0), first, lanes)
        if lanes == 1:
            out = at({name: d[0] for name, d in some.items()})
            parts.append(tree_map(lambda x: x.unsqueeze(0), out))
        else:
            out, count = torch.func.vmap(at)(some), min(lanes, k + before - start)
            parts.append(tree_map(lambda x, count=count: x[:count], out))
        del some  # before there are the next
    return concatenate(parts)


def _even(lanes: int, part) -> int:
    """At least `lanes`, such that their folded matrices have a multiple of four rows."""
    # NOTE [zero is the base]: vmap folds lanes and rows into one matrix, and MKL's dgemm rounds the
    # last rows past a multiple of four differently. A lane there would differ from the base in
    # the last bit at the same parameters. A batch that cuts itself sees to it (`Model.layout`).
    sizes = [leaf.numel() for leaf in leaves(part) if leaf.ndim > 1]
    while lanes > 1 and any(lanes * size % 4 for size in sizes):
        lanes += 1
    return lanes


def _increments(fn, params, deltas, k: int, part, lanes: int, how: dict, fallbacks: set[str]):
    """Exact increments on one block of rows, `lanes` of them at a time over one base."""

    def at(delta):
        changed = increment(fn, params, delta, **how)
        out = changed(part)
        fallbacks.update(changed.fallbacks)
        return out

    base, parts = None, []
    for start in range(0, k, lanes):
        some, count = deltas(start, 0, lanes), min(lanes, k - start)
        if lanes == 1:
            base, change = at({name: d[0] for name, d in some.items()})
            parts.append(tree_map(lambda x: x.unsqueeze(0), change))
        else:
            base, change = torch.func.vmap(at, out_dims=(None, 0))(some)
            parts.append(tree_map(lambda x, count=count: x[:count], change))
        del some
    return base, concatenate(parts)


def _fill(leaf: Tensor, before: int, lanes: int) -> Tensor:
    """Zeros around the leading axis up to `lanes`, so that every block has the same shapes."""
    after = lanes - before - len(leaf)
    zeros = [leaf.new_zeros(n, *leaf.shape[1:]) for n in (before, after)]
    return torch.cat([zeros[0], leaf, zeros[1]])
