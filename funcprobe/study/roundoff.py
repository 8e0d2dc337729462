"""The rounding error of a change, measured by computing a sample of rows in a second way."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calculus.blocks import RowFn
from ..calculus.line import sweep
from ..calculus.results import Sweep, join
from ..calculus.tree import Params, tree_map
from ..language.batch import Batch, by_length
from ..runtime.stream import Stream
from ..statistics.results import Series
from ..statistics.rounding import Rounding, rounding
from .setup import evenly

SAMPLED = 16  # rows of E whose changes are computed twice


class Recomputed(NamedTuple):
    """The changes of a sample of E's rows at one eta, computed a second time."""

    k: int  # the index of that eta
    rows: Tensor  # [n] int64, which rows of E
    change: Any  # scores with leading [1, n]; None on ranks other than 0


def recompute_sample(
    stream: Stream,
    score: RowFn,
    params: Params,
    v: Params,
    etas: Tensor,
    evaluation: Batch,
    *,
    middle: bool = False,
) -> Recomputed | None:
    """Computes the changes of a sample of rows again at one eta, by increments in full precision.

    They start from parameters that are one rounding away, because the same parameters might round
    in the same way.

    Args:
        stream: where and how blocks are computed.
        score, params, v, etas, evaluation: those of the sweep.
        middle: whether to take the middle of the etas that are not 0, by size, instead of the
            smallest. An interpolated curve needs that, since it has the exact slope at 0.

    Returns:
        The changes; None if there are fewer than two rows, or if no eta moves the parameters.
    """
    n, size = len(evaluation.group), etas.abs()
    if n < 2 or not (size > 0).any():
        return None
    moved = size.argsort()[(size == 0).sum() :]
    k = int(moved[len(moved) // 2 if middle else 0])
    rows = evenly(n, SAMPLED)
    blocks, order = by_length(evaluation.rows(rows), tokens=1)
    near = {name: torch.nextafter(p, torch.full_like(p, torch.inf)) for name, p in params.items()}

    def changes(block: Batch) -> Sweep:
        return sweep(score, near, v, etas[k : k + 1], block, change="increment", lanes=1)

    parts = stream.map("rounding", changes, blocks, v, etas[k], to=0)
    return Recomputed(k, rows, join(parts, order).change if parts else None)


def noise(
    swept: Sweep,
    sample: Recomputed,
    evaluation: Batch,
    series: Series,
    *,
    proportional: bool,
) -> Rounding:
    """The rounding error of the sweep's change, from how far a sample of its rows is off.

    Args:
        swept: over E.
        sample: from `recompute_sample`, of the same E, v and etas.
        evaluation: E.
        series: from `entropy_series`, of the estimator whose change it is.
        proportional: whether the error grows with eta, as that of increments and of interpolated
            curves does; it is the same at every eta where values are subtracted.
    """
    first = tree_map(lambda leaf: leaf[sample.k, sample.rows], swept.change)
    again = tree_map(lambda leaf: leaf[0], sample.change)
    width = min(first[0].shape[-1], again[0].shape[-1])  # both hold the sample's longest response
    off = tree_map(lambda a, b: a[..., :width] - b[..., :width], first, again)
    return rounding(
        swept.base,
        off,
        index=sample.rows,
        batch=evaluation,
        series=series,
        eta=float(swept.etas[sample.k]),
        proportional=proportional,
        behaviour=series.estimator.behaviour,
    )
