"""Changes of a function of parameters at several deltas, computed by vmap in turns of lanes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .blocks import Cuttable, RowFn, RowsPerBlock, blockwise, keep_pages
from .precision import exact
from .transforms.increment import increment
from .tree import (
    Params,
    Tree,
    all_concrete,
    check_direction,
    check_nan,
    concatenate,
    leaves,
    merge,
    tree_map,
)

Rules: TypeAlias = dict[Callable[..., Any], Callable[..., Any]]

_LANES = 8
_OUT_DIMS: Any = (None, 0)  # torch declares a narrower type than it takes
# What vmap says where it cannot stack lanes, above all of a write in place. Of random numbers each
# lane would have its own.
_REFUSALS = re.compile(r"(?i)(?!.*random)(.*vmap|.*batching rule|.*match the broadcast shape)")


@dataclass(frozen=True)
class Options:
    """How changes are computed; see `changes`."""

    change: str = "direct"
    matmul: str | None = None
    rules: Rules | None = None
    rows: RowsPerBlock = None
    lanes: int | None = None

    def __post_init__(self) -> None:
        if self.change not in ("direct", "increment"):
            raise ValueError(f"change must be 'direct' or 'increment', not {self.change!r}.")
        if self.change == "direct" and self.matmul is not None:
            raise ValueError(
                "matmul= is the precision of increments; a difference of values would drown in the "
                "rounding of such products. Use change='increment', or leave matmul= out."
            )
        if self.lanes is not None and self.lanes < 1:
            raise ValueError(f"lanes must be a positive number or None, not {self.lanes}.")


class Changes(NamedTuple):
    """A function's changes at some points, and what happened while they were computed."""

    base: Tree  # the values at params, leaves [N, ...]
    change: Tree  # leaves [K, N, ...]
    fallbacks: tuple[str, ...] = ()  # operations whose increments were subtractions
    shrunk: tuple[str, ...] = ()  # blocks that memory forced into smaller ones
    looped: tuple[str, ...] = ()  # why vmap could not stack lanes, which then ran one by one


def changes(
    fn: RowFn,
    params: Params,
    deltas: Params,
    batch: Any,
    *,
    change: str = "direct",
    matmul: str | None = None,
    rules: Rules | None = None,
    rows: RowsPerBlock = None,
    lanes: int | None = None,
) -> tuple[Any, Any]:
    """``fn(params + delta_k) - fn(params)`` for K stacked deltas, by `vmap` over the deltas alone.

    A delta of zero gives exactly zero. For that, "direct" computes the base as one of the lanes,
    and every turn has the same number of lanes.

    Args:
        fn: a row-separable function ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        deltas: tensors with exactly the names of `params`, each with leading K (see `stack`).
        batch: a tree of tensors with leading N.
        change: "direct" subtracts two values, and rounds accordingly. "increment" computes the
            change itself, at full relative precision however small it is (see `increment`).
        matmul: for "increment", the precision of the changes' matrix products; see `increment`.
        rules: for "increment", a rule table instead of `RULES`.
        rows: rows per block; "all" makes one block. The default follows from the shapes and
            `lanes`.
        lanes: parameter points per block; for "direct" the base is one of them. 1 is the plain
            loop. By default the points are spread evenly over turns of at most 8. In float64
            "direct" may add up to 3, for the reason in the note [zero is the base]. Memory grows
            with ``rows * lanes``, not with K. Where `vmap` cannot pass, as it cannot where `fn`
            writes a lane in place, the plain loop is used.

    Returns:
        ``(base, change)``: fn's output at `params`, leaves [N, ...], and the changes, leaves
        [K, N, ...].

    Raises:
        ValueError: names or shapes do not fit, there are no deltas or they are not finite, the
            output holds nan, or an option is none of the above.
    """
    counts = {len(delta) for delta in deltas.values()}
    if len(counts) > 1:
        raise ValueError(f"changes: every delta must lead with the same K, found {sorted(counts)}.")
    k = counts.pop() if counts else 0
    if k == 0:
        raise ValueError("changes: one or more deltas were expected, there are none.")
    check_direction("changes", deltas, {name: p.expand(k, *p.shape) for name, p in params.items()})
    options = Options(change, matmul, rules, rows, lanes)
    run = compute_changes(fn, params, Deltas(k, _stacked(deltas, params)), batch, options)
    return run.base, run.change


class Deltas:
    """Stacked deltas by turns of lanes. The last turn is kept, since blocks of rows share it.

    ``make(start, before, lanes)`` gives the deltas from point `start` on, behind `before` zeros,
    and with zeros after them so that there are `lanes`. The points' names are for errors.
    """

    def __init__(
        self, count: int, make: Callable[[int, int, int], Params], points: Sequence[str] = ()
    ) -> None:
        self.count = count
        self.points = points
        self._make = make
        self._turn: tuple[int, int, int] | None = None
        self._held: Params = {}

    def __call__(self, start: int, before: int, lanes: int) -> Params:
        """The deltas of one turn."""
        turn = (start, before, lanes)
        if turn != self._turn:
            self._turn, self._held = None, {}  # so that these are freed before the next are made
            self._held = self._make(*turn)
            self._turn = turn
        return self._held


def _stacked(deltas: Params, params: Params) -> Callable[[int, int, int], Params]:
    def make(start: int, before: int, lanes: int) -> Params:
        return {
            name: fill(d[start : start + lanes - before].to(params[name]), before, lanes)
            for name, d in deltas.items()
        }

    return make


@torch.no_grad()
def compute_changes(
    fn: RowFn,
    params: Params,
    deltas: Deltas,
    batch: Any,
    options: Options,
    base: Tree = None,
) -> Changes:
    """The changes at all deltas; a base that is given is not computed again."""
    method = _direct if options.change == "direct" else _increments
    keep_pages()
    with exact(alone=options.matmul == "tf32"):
        run = method(fn, params, deltas, batch, options, base)
    check_nan("sweep (base)", fn, run.base)
    check_nan("sweep", fn, run.change, dim=1, points=deltas.points)
    return run


def _direct(
    fn: RowFn, params: Params, deltas: Deltas, batch: Any, options: Options, base: Tree
) -> Changes:
    """Differences of values. Without a base, it is one of the lanes."""
    before = int(base is None)
    float64 = any(p.dtype == torch.float64 for p in params.values())
    padded = float64 and not isinstance(batch, Cuttable)
    turns = _Turns(deltas, before)

    def of_block(block: Any, lanes: int) -> Tree:
        def at(delta: Params) -> tuple[tuple[()], Tree]:
            return (), fn({name: params[name] + d for name, d in delta.items()}, block)

        return turns(at, _even(lanes, block) if padded else lanes)[1]

    lanes = options.lanes or _balanced(deltas.count + before)
    run = blockwise(of_block, batch, options.rows, of=(fn, params), lanes=lanes)
    values = merge(run.results, run.order, dim=1)
    if base is None:
        base = tree_map(lambda x: x[0].clone(), values)
    change = tree_map(lambda x, b: x[before:] - b, values, base)
    return Changes(base, change, (), run.notes, turns.looped)


def _increments(
    fn: RowFn, params: Params, deltas: Deltas, batch: Any, options: Options, base: Tree
) -> Changes:
    """Exact increments. They carry the base in every lane, so it needs none of its own."""
    turns = _Turns(deltas)

    def of_block(block: Any, lanes: int) -> Changes:
        at = _Increment(fn, params, block, options)
        fixed, change = turns(at, lanes)
        return Changes(fixed, change, tuple(at.fallbacks))

    lanes = options.lanes or _balanced(deltas.count)
    run = blockwise(of_block, batch, options.rows, of=(fn, params), lanes=lanes)
    if base is None:
        base = merge([result.base for result in run.results], run.order)
    change = merge([result.change for result in run.results], run.order, dim=1)
    fallbacks = sorted({name for result in run.results for name in result.fallbacks})
    return Changes(base, change, tuple(fallbacks), run.notes, turns.looped)


class _Increment:
    """``delta -> (base, change)`` on one block of rows. It notes the operations without a rule."""

    def __init__(self, fn: RowFn, params: Params, block: Any, options: Options) -> None:
        self.fn, self.params, self.block, self.options = fn, params, block, options
        self.fallbacks: set[str] = set()

    def __call__(self, delta: Params) -> tuple[Tree, Tree]:
        rules, matmul = self.options.rules, self.options.matmul
        changed = increment(self.fn, self.params, delta, rules=rules, matmul=matmul)
        out = changed(self.block)
        self.fallbacks.update(changed.fallbacks)
        return out


class _Turns:
    """Applies functions to all deltas in turns of lanes, or one by one where `vmap` refuses it."""

    def __init__(self, deltas: Deltas, before: int = 0) -> None:
        self.deltas, self.before = deltas, before
        self.looped: tuple[str, ...] = ()  # why lanes ran one by one, once they did

    def __call__(self, at: Callable[[Params], tuple[Tree, Tree]], lanes: int) -> tuple[Tree, Tree]:
        """See `_in_turns`.

        Raises:
            RuntimeError: vmap refuses the function, and one by one the first point does not give
                the same bits again: it is no function of its arguments.
        """
        if self.looped or lanes == 1:
            return _in_turns(at, self.deltas, 1, self.before)
        try:
            return _in_turns(at, self.deltas, lanes, self.before)
        except RuntimeError as error:
            if not _REFUSALS.match(str(error).replace("\n", " ")):
                raise
            refusal = error.with_traceback(None)  # which holds what the lanes had allocated
        fixed, moving = _in_turns(at, self.deltas, 1, self.before)
        again = at({name: d[0] for name, d in self.deltas(0, self.before, 1).items()})[1]
        for a, b in zip(leaves(moving), leaves(again), strict=True):
            if all_concrete(a) and not torch.allclose(a[0], b, 0.0, 0.0, equal_nan=True):
                raise refusal
        self.looped = (str(refusal).splitlines()[0],)
        return fixed, moving


def _in_turns(
    at: Callable[[Params], tuple[Tree, Tree]], deltas: Deltas, lanes: int, before: int = 0
) -> tuple[Tree, Tree]:
    """Applies `at` to all deltas, behind zeros if `before` is 1, `lanes` of them at a time.

    Args:
        at: ``delta -> (fixed, moving)``, of which `fixed` does not depend on delta.

    Returns:
        `fixed`, and `moving` with the points as the leading axis.
    """
    fixed: Tree = None
    parts, points = [], deltas.count + before
    for start in range(0, points, lanes):
        turn = deltas(max(start - before, 0), before if start == 0 else 0, lanes)
        if lanes == 1:
            fixed, moving = at({name: d[0] for name, d in turn.items()})
            parts.append(tree_map(lambda x: x.unsqueeze(0), moving))
        else:
            fixed, moving = torch.func.vmap(at, out_dims=_OUT_DIMS)(turn)
            count = min(lanes, points - start)
            parts.append(tree_map(lambda x, count=count: x[:count], moving))
        del turn  # so that these deltas are freed before the next are made
    return fixed, concatenate(parts)


def _balanced(points: int) -> int:
    """The fewest lanes that need no more turns than the most lanes would."""
    return -(-points // -(-points // _LANES))


def _even(lanes: int, block: Tree) -> int:
    """At least `lanes`, such that their folded matrices have a multiple of four rows."""
    # NOTE [zero is the base]: vmap folds lanes and rows into one matrix, and MKL's dgemm rounds the
    # last rows past a multiple of four differently. A lane there would differ from the base in
    # the last bit at the same parameters. The function of a `Cuttable` batch arranges this itself.
    sizes = [leaf.numel() for leaf in leaves(block) if leaf.ndim > 1]
    while lanes > 1 and any(lanes * count % 4 for count in sizes):
        lanes += 1
    return lanes


def fill(leaf: Tensor, before: int, lanes: int) -> Tensor:
    """Puts zeros around the leading axis up to `lanes`, so that all turns have the same shapes."""
    after = lanes - before - len(leaf)
    zeros = [leaf.new_zeros(n, *leaf.shape[1:]) for n in (before, after)]
    return torch.cat([zeros[0], leaf, zeros[1]])
