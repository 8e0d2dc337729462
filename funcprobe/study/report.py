"""Results for people and programs: a table, JSON beside safetensors, and plots."""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..runtime.files import write_atomically
from ..statistics.linearity import Linearity, linearity
from ..statistics.results import Estimate, Series
from ..statistics.rounding import Rounding
from ..statistics.tables import text_table
from ..statistics.uncertainty import t_quantile

WITHIN = 0.1  # the line "holds" while the change is within a tenth of it
LOOSELY = 0.25  # and loosely while within a quarter


@dataclass(frozen=True)
class Report:
    """What a probe measured. Prints as a table; `save` writes JSON, safetensors and a plot."""

    change: Estimate
    series: Series
    lr: float  # the reference learning rate that v is relative to
    rounding: Rounding | None  # of the change; None if it was not measured
    about: dict[str, Any]  # checkpoint, batches, update, precision, checksums, seconds
    flags: tuple[str, ...] = ()  # statistical doubts, each with its remedy
    arrays: dict[str, Tensor] = field(default_factory=dict, repr=False)  # per-token results

    @cached_property
    def linearity(self) -> Linearity:
        """How far the line holds, within 10%."""
        return self.holds_within(WITHIN)

    def holds_within(self, tolerance: float) -> Linearity:
        """How far the line holds within another tolerance; points below rounding are left out."""
        floor = None if self.rounding is None else self.rounding.floor
        return linearity(self.change, self.series, tolerance=tolerance, floor=floor)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as plain numbers and strings; nan becomes None."""
        change, law = self.change, self.linearity
        interval, slope = change.interval().tolist(), self.series.interval()[0].tolist()
        nothing = torch.full_like(change.etas, torch.nan)
        rounded = nothing if self.rounding is None else self.rounding.at(change.etas)
        rows = [
            {
                "eta": float(change.etas[k]),
                "learning_rates": float(change.etas[k]) / self.lr,
                "entropy": float(change.base + change.value[k]),
                "change": float(change.value[k]),
                "change_stderr": float(change.stderr[k]),
                "change_interval": interval[k],
                "change_rounding": float(rounded[k]),
                "predicted": float(self.series.predict(change.etas)[k]),
                "over_line": float(law.ratio[k]),
                "over_line_stderr": float(law.stderr[k]),
                "over_line_band": [float(law.low[k]), float(law.high[k])],
                "line": law.verdicts[k],
                "excluded": law.excluded[k],
                "ess": float(change.ess[k]),
                "khat": float(change.khat[k]),
                "mean_weight": float(change.mean_weight[k]),
                "mean_weight_z": float(change.mean_weight_z[k]),
                "kl": float(change.kl[k]),
                "least_weight": float(change.weight_range[k, 0]),
                "largest_weight": float(change.weight_range[k, 1]),
                "largest_share": float(change.largest_share[k]),
            }
            for k in range(len(change.etas))
        ]
        return _plain(
            {
                "unit": change.unit,
                "quantity": change.quantity,
                "weights": change.weights,
                "entropy": float(change.base),
                "entropy_stderr": float(change.base_stderr),
                "slope": float(self.series.value[0]),
                "slope_stderr": float(self.series.stderr[0]),
                "slope_interval": slope,
                "lr": self.lr,
                "linearity": [
                    {
                        "tolerance": each.tolerance,
                        "level": each.level,
                        "holds": each.holds,
                        "fails": each.fails,
                        "verdict": each.verdict,
                    }
                    for each in (law, self.holds_within(LOOSELY))
                ],
                "rounding": None if self.rounding is None else self.rounding._asdict(),
                "etas": rows,
                "flags": list(self.flags),
                "about": self.about,
            }
        )

    def save(self, folder) -> list[Path]:
        """Writes report.json, report.safetensors and, with matplotlib, report.png into `folder`."""
        folder = Path(folder)
        tensors = {f"change.{n}": x for n, x in self.change.tensors().items()}
        tensors |= {f"series.{n}": x for n, x in self.series.tensors().items()}
        tensors |= self.arrays
        written = [folder / "report.safetensors", folder / "report.json"]
        write_atomically(
            written[0], save_tensors({n: x.detach().cpu().contiguous() for n, x in tensors.items()})
        )
        write_atomically(written[1], (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        try:
            import matplotlib.figure
        except ImportError:
            return written
        figure = matplotlib.figure.Figure(figsize=(10, 4), dpi=150, layout="constrained")
        self.plot(figure.subplots(1, 2))
        part = folder / "report.png.part"
        figure.savefig(part, format="png")
        part.replace(folder / "report.png")
        return [*written, folder / "report.png"]

    def plot(self, axes) -> None:
        """Draws the change with its line, and the change over the line, on two Axes."""
        left, right = axes
        plot(self.change, self.series, self.linearity, ax=left, unit=self.lr)
        plot_ratio(self.change, self.series, self.linearity, ax=right, unit=self.lr)

    def __str__(self) -> str:
        data = self.to_dict()
        unit = data["unit"]
        head = (
            f"H = {data['entropy']:.4f} +- {_short(data['entropy_stderr'])} {unit}    "
            f"slope = {data['slope']:.4g} +- {_short(data['slope_stderr'])} {unit} per unit of eta"
            f"    lr = {self.lr:.3g}"
        )
        columns = ("eta/lr", "eta", "dH", "+-", "line", "dH/line-1", "+-", "ESS", "k-hat", "mean w")
        lines = [
            (
                f"{row['learning_rates']:.4g}",
                f"{row['eta']:.3g}",
                f"{row['change']:+.3e}",
                _short(row["change_stderr"]),
                f"{row['predicted']:+.3e}",
                _percent(row["over_line"]),
                _percent(row["over_line_stderr"], sign=False),
                f"{row['ess']:.0f}/{self.change.rows}",
                "-" if row["khat"] is None else f"{row['khat']:.2f}",
                f"{row['mean_weight']:.4f}",
            )
            for row in data["etas"]
        ]
        out = [head, "", *text_table(columns, lines), "", self.verdict()]
        out += [] if self.rounding is None else [str(self.rounding)]
        out += [f"! {flag}" for flag in self.flags]
        return "\n".join(out)

    def verdict(self) -> str:
        """Up to which eta the line holds, loosely and strictly, and what was left out."""
        loose = self.holds_within(LOOSELY).describe(self.lr, " lr", excluded=False)
        return f"{loose}\n{self.linearity.describe(self.lr, ' lr')}"


def plot(
    change: Estimate,
    series: Series | None = None,
    linearity: Linearity | None = None,
    *,
    ax=None,
    unit: float | None = None,
):
    """Draws the entropy change against eta with 95% intervals, and the predicted line through it.

    Args:
        change: from `entropy_change`.
        series: from `entropy_series`; its polynomial is drawn with a 95% interval.
        linearity: from `linearity`; what it left out as not to be trusted is hatched.
        ax: matplotlib Axes; a new figure's if not given.
        unit: the learning rate that etas are shown in; absolute if not given.

    Returns:
        The Axes.
    """
    ax = _axes(ax)
    scale = unit or 1.0
    x = change.etas / scale
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    if series is not None:
        span = torch.linspace(
            min(float(change.etas.min()), 0), max(float(change.etas.max()), 0), 101
        )
        span = span.double()
        line, error = series.predict(span), _half(series.psi) * series.predict_stderr(span)
        ax.plot(span / scale, line, color="C1", label=_name(series))
        ax.fill_between(span / scale, line - error, line + error, color="C1", alpha=0.15, lw=0)
    _measured(ax, x, change.value, _half(change.psi) * change.stderr)
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
    ax=None,
    unit: float | None = None,
):
    """Draws the change over its line, less 1: joint 95% intervals, and the band for all at once.

    Args:
        change, series: from `entropy_change` and `entropy_series`.
        law: from `linearity`; computed if not given. What it left out is hatched.
        ax, unit: as for `plot`.

    Returns:
        The Axes.
    """
    ax = _axes(ax)
    law = linearity(change, series, tolerance=WITHIN) if law is None else law
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
    shown = law.etas != 0
    error = 100 * _half(law.psi) * law.stderr
    _measured(ax, (law.etas / scale)[shown], 100 * law.ratio[shown], error[shown])
    _hatch(ax, law, scale)
    ax.set_xlabel("learning rate" if unit is None else f"learning rate / {unit:.3g}")
    ax.set_ylabel("measured over predicted, less 1 [%]")
    ax.legend(frameon=False)
    return ax


def _half(psi: Tensor) -> float:
    """Half a 95% interval in standard errors, Student's."""
    return t_quantile(0.95, psi.shape[-1] - 1)


def _hatch(ax, law: Linearity | None, scale: float) -> None:
    """Hatches around each learning rate that was left out, halfway to its neighbours."""
    if law is None:
        return
    order = law.etas.argsort().tolist()
    x = (law.etas[order] / scale).tolist()
    edges = [x[0], *((a + b) / 2 for a, b in zip(x[:-1], x[1:], strict=True)), x[-1]]
    label = "not trusted"
    for i, k in enumerate(order):
        if law.excluded[k] and law.etas[k] != 0:
            style = dict(facecolor="none", edgecolor="0.7", hatch="///", lw=0, zorder=0)
            ax.axvspan(edges[i], edges[i + 1], label=label, **style)
            label = None


def _axes(ax):
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5, 4), layout="constrained")[1]


def _measured(ax, x: Tensor, y: Tensor, error: Tensor) -> None:
    """Points with bars, or a curve with a band where they are many."""
    style = {"color": "C0", "label": "measured"}
    if len(x) <= 20:
        ax.errorbar(x, y, error, fmt="o", ms=4, capsize=3, **style)
        return
    x, order = x.sort()
    y, error = y[order], error[order]
    ax.plot(x, y, **style)
    ax.fill_between(x, y - error, y + error, color="C0", alpha=0.15, lw=0)


def _name(series: Series) -> str:
    return "predicted" if len(series.value) == 1 else f"predicted, order {len(series.value)}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _percent(value: float | None, sign: bool = True) -> str:
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.2f}%"


def _plain(value):
    """JSON has no nan: None stands for it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
