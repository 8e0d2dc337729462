"""Draws results with matplotlib, which is optional and imported when something is drawn."""

from collections.abc import Callable, Collection
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..statistics.linearity import Linearity, linearity
from ..statistics.results import Estimate, Series
from ..statistics.uncertainty import t_quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "pdf", "svg")

_MANY = 20  # points: more are drawn as a curve with a band, not as dots with bars


def plot(
    change: Estimate,
    series: Series | None = None,
    linearity: Linearity | None = None,
    *,
    ax: "Axes | None" = None,
    unit: float | None = None,
) -> "Axes":
    """Draws a change against eta with 95% intervals, and the line predicted for it.

    Args:
        change: from `entropy_change`.
        series: from `entropy_series`; its polynomial is drawn with a 95% interval.
        linearity: from `linearity`; the learning rates that it excludes are hatched.
        ax: matplotlib Axes; those of a new figure if not given.
        unit: the learning rate that etas are shown in multiples of; absolute etas if not given.

    Returns:
        The Axes.
    """
    ax = _axes(ax)
    scale = unit or 1.0
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    if series is not None:
        _predicted(ax, series, change.etas, scale)
    _measured(ax, change.etas / scale, change.value, _half(change.psi) * change.stderr)
    if linearity is not None:
        _hatch(ax, linearity, scale)
    ax.set_xlabel("learning rate" if unit is None else f"learning rate / {unit:.3g}")
    ax.set_ylabel(f"{change.quantity} change [{change.unit}]")
    ax.ticklabel_format(axis="y", scilimits=(-3, 3))
    ax.legend(frameon=False)
    return ax


def plot_ratio(
    change: Estimate,
    series: Series,
    law: Linearity | None = None,
    *,
    ax: "Axes | None" = None,
    unit: float | None = None,
) -> "Axes":
    """Draws the change over its line, less 1, with joint 95% intervals and the simultaneous band.

    Args:
        change, series: from `entropy_change` and `entropy_series`.
        law: from `linearity`, which is called if it is not given. The learning rates that it
            excludes are hatched.
        ax, unit: as for `plot`.

    Returns:
        The Axes.
    """
    ax = _axes(ax)
    law = linearity(change, series) if law is None else law
    scale = unit or 1.0
    ax.axhspan(
        -100 * law.tolerance,
        100 * law.tolerance,
        color="C1",
        alpha=0.15,
        lw=0,
        label=f"within {law.tolerance:.0%} of the line",
    )
    ax.axhline(0, color="C1")
    used = torch.tensor([not reason for reason in law.excluded])
    x, order = (law.etas / scale)[used].sort()
    low, high = (100 * end[used][order] for end in (law.low, law.high))
    ax.fill_between(x, low, high, color="C0", alpha=0.2, lw=0, label=f"{law.level:.0%} band")
    moved = law.etas != 0
    error = 100 * _half(law.psi) * law.stderr
    _measured(ax, (law.etas / scale)[moved], 100 * law.ratio[moved], error[moved])
    _hatch(ax, law, scale)
    ax.set_xlabel("learning rate" if unit is None else f"learning rate / {unit:.3g}")
    ax.set_ylabel("measured over predicted, less 1 [%]")
    ax.legend(frameon=False)
    return ax


def check_formats(formats: Collection[str]) -> None:
    """Refuses a format of figures that `rendered` cannot make."""
    unknown = [name for name in formats if name not in FORMATS]
    if isinstance(formats, str) or unknown:
        raise ValueError(
            f"formats: a tuple of {', '.join(FORMATS)} was expected, not {formats!r}. For one "
            'format, pass ("png",).'
        )


def rendered(draw: Callable[[list["Axes"]], None], formats: Collection[str]) -> dict[str, bytes]:
    """A figure of two Axes side by side, as the content of a file in each format.

    Args:
        draw: draws on the two Axes.
        formats: any of `FORMATS`.

    Returns:
        The files' content by format; nothing where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    draw(list(figure.subplots(1, 2)))
    files = {}
    for name in formats:
        buffer = BytesIO()
        figure.savefig(buffer, format=name)
        files[name] = buffer.getvalue()
    return files


def _half(psi: Tensor) -> float:
    """Half the width of a 95% interval, in standard errors (Student's t)."""
    return t_quantile(0.95, psi.shape[-1] - 1)


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5, 4), layout="constrained")[1]


def _predicted(ax: "Axes", series: Series, etas: Tensor, scale: float) -> None:
    """Draws the Taylor polynomial from 0 to the outermost etas, with its interval."""
    first, last = min(float(etas.min()), 0.0), max(float(etas.max()), 0.0)
    span = torch.linspace(first, last, 101).double()
    line, error = series.predict(span), _half(series.psi) * series.predict_stderr(span)
    orders = len(series.value)
    label = "predicted" if orders == 1 else f"predicted, order {orders}"
    ax.plot(span / scale, line, color="C1", label=label)
    ax.fill_between(span / scale, line - error, line + error, color="C1", alpha=0.15, lw=0)


def _measured(ax: "Axes", x: Tensor, y: Tensor, error: Tensor) -> None:
    """Draws dots with error bars, or a curve with a band if there are many points."""
    if len(x) <= _MANY:
        ax.errorbar(x, y, error, fmt="o", ms=4, capsize=3, color="C0", label="measured")
        return
    x, order = x.sort()
    y, error = y[order], error[order]
    ax.plot(x, y, color="C0", label="measured")
    ax.fill_between(x, y - error, y + error, color="C0", alpha=0.15, lw=0)


def _hatch(ax: "Axes", law: Linearity, scale: float) -> None:
    """Hatches each learning rate that was excluded, halfway to its neighbours on both sides."""
    order = law.etas.argsort().tolist()
    x = (law.etas[order] / scale).tolist()
    edges = [x[0], *((a + b) / 2 for a, b in zip(x[:-1], x[1:], strict=True)), x[-1]]
    hatched = [i for i, k in enumerate(order) if law.excluded[k] and law.etas[k] != 0]
    for i in hatched:
        ax.axvspan(
            edges[i],
            edges[i + 1],
            facecolor="none",
            edgecolor="0.7",
            hatch="///",
            lw=0,
            zorder=0,
            label="not trusted" if i == hatched[0] else None,
        )
