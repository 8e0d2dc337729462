"""Some rows of a sweep computed another way: what rounding leaves of the change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calculus.line import Sweep, join, sweep
from ..calculus.tree import Params
from ..language.batch import Batch, by_length
from ..runtime.stream import Stream
from ..statistics.results import Series
from ..statistics.rounding import Rounding, rounding

SAMPLED = 16  # rows of E whose changes are computed twice


class Recomputed(NamedTuple):
    """Changes of some rows of E at one eta; None on ranks other than 0."""

    k: int  # of the eta
    index: Tensor  # of the rows
    change: Any


def recompute(
    stream: Stream,
    score: Callable,
    params: Params,
    v: Params,
    etas: Tensor,
    evaluation: Batch,
    *,
    middle: bool = False,
) -> Recomputed | None:
    """Full increments of some rows at the smallest eta; None where there is nothing to measure.

    With `middle` at the middle one, since an interpolated curve has the exact slope at 0.

    They start from parameters one rounding away, since the same ones might round the same way.
    """
    n, away = len(evaluation.tokens), etas.abs()
    if n < 2 or not (away > 0).any():
        return None
    moved = away.argsort()[(away == 0).sum() :]
    k = int(moved[len(moved) // 2 if middle else 0])
    index = torch.linspace(0, n - 1, min(n, SAMPLED)).round().long()
    blocks, order = by_length(evaluation.rows(index), tokens=1)
    near = {name: torch.nextafter(p, torch.full_like(p, torch.inf)) for name, p in params.items()}

    def changes(block: Batch) -> Sweep:
        return sweep(score, near, v, etas[k : k + 1], block, change="increment", lanes=1)

    swept = stream.map("rounding", changes, blocks, v, etas[k], to=0)
    return Recomputed(k, index, join(swept, order).change if swept else None)


def noise(
    swept: Sweep,
    again: Recomputed,
    evaluation: Batch,
    series: Series,
    behaviour,
    *,
    proportional: bool,
) -> Rounding:
    """The sweep's rounding error, as far as `again` differs; `proportional` to eta or constant."""
    there = [leaf[again.k, again.index] for leaf in swept.change]
    width = min(again.change[0].shape[-1], there[0].shape[-1])
    off = type(again.change)(
        *(a[..., :width] - b[0][..., :width] for a, b in zip(there, again.change, strict=True))
    )
    return rounding(
        swept.base,
        off,
        index=again.index,
        batch=evaluation,
        series=series,
        eta=float(swept.etas[again.k]),
        proportional=proportional,
        behaviour=behaviour,
    )
