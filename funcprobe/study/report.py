"""What a probe measured: printed as a table, saved as JSON beside safetensors, loaded again."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..calculus.tree import Params
from ..runtime.files import write_atomically
from ..statistics.estimators import Estimator
from ..statistics.linearity import Linearity, linearity
from ..statistics.policy_test import PolicyTest
from ..statistics.results import Estimate, Series
from ..statistics.rounding import Rounding
from ..statistics.tables import html_table, shortened, text_table
from .about import About, plain
from .plots import check_formats, plot, plot_ratio, rendered
from .provenance import Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = 3  # of report.json; files without a schema are of the first
WITHIN = 0.1  # the line "holds" while the change is within a tenth of it
LOOSELY = 0.25  # and loosely while within a quarter

_COLUMNS = (
    "eta/lr",
    "eta",
    "dH",
    "+-",
    "line",
    "dH/line-1",
    "+-",
    "ESS",
    "k-hat",
    "skew",
    "mean w",
)
_GAP = ("...",) * len(_COLUMNS)


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What a probe measured. It prints as a table; `save` writes JSON, safetensors and figures.

    ``pandas.DataFrame(report.rows())`` is a table with a row for each learning rate.
    """

    change: Estimate
    series: Series
    lr: float  # the reference learning rate that v is relative to
    rounding: Rounding | None  # of the change; None if it was not measured
    about: About  # checkpoint, batches, update, settings, inputs, versions
    flags: tuple[str, ...] = ()  # statistical doubts, each with its remedy
    policy: PolicyTest | None = None  # of E; None where E is weighted by what it records
    records: Records | None = None  # of E; None where they are the checkpoint's, or used
    arrays: dict[str, Tensor] = field(default_factory=dict)  # per-token results
    direction: Params | None = None  # v; None if the report was loaded and v had not been saved

    @cached_property
    def linearity(self) -> Linearity:
        """How far the line holds, within 10%."""
        return self.holds_within(WITHIN)

    @cached_property
    def loose_linearity(self) -> Linearity:
        """How far the line holds, within 25%."""
        return self.holds_within(LOOSELY)

    def holds_within(self, tolerance: float) -> Linearity:
        """How far the line holds within another tolerance; points below rounding are excluded."""
        floor = None if self.rounding is None else self.rounding.floor
        return linearity(self.change, self.series, tolerance=tolerance, floor=floor)

    def to_dict(self) -> dict[str, Any]:
        """All that report.json holds: plain numbers and strings, None for nan and inf."""
        change, series = self.change, self.series
        columns = self._columns()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        laws = (self.linearity, self.loose_linearity)
        names = ("tolerance", "level", "holds", "fails", "verdict")
        data = {
            "schema": SCHEMA,
            "unit": change.unit,
            "per": change.per,
            "quantity": change.quantity,
            "weights": change.weights,
            "responses": change.rows,
            "entropy": float(change.base),
            "entropy_stderr": float(change.base_stderr),
            "slope": float(series.value[0]),
            "slope_stderr": float(series.stderr[0]),
            "slope_interval": series.interval()[0].tolist(),
            "slope_skew": float(series.skew[0]),
            "lr": self.lr,
            "linearity": [{name: getattr(law, name) for name in names} for law in laws],
            "rounding": self.rounding,
            "policy_test": self.policy,
            "records": self.records,
            "etas": rows,
            "flags": self.flags,
            "about": self.about,
        }
        return dict(plain(data))

    def rows(self) -> list[dict[str, float | str]]:
        """A row for each learning rate, with scalar columns, as ``pandas.DataFrame`` takes them.

        The columns are those of ``etas`` in report.json. An interval becomes two columns that end
        in ``_low`` and ``_high``. A number that is not defined is nan.
        """
        columns: dict[str, Sequence[float | str]] = {}
        for name, values in self._columns().items():
            if name.endswith(("_interval", "_band")):
                stem = name.rpartition("_")[0]
                columns[f"{stem}_low"] = [low for low, _ in values]
                columns[f"{stem}_high"] = [high for _, high in values]
            else:
                columns[name] = values
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _columns(self) -> dict[str, Sequence[Any]]:
        """What is known of each learning rate, [K] values a column."""
        change, law, etas = self.change, self.linearity, self.change.etas
        unknown = torch.full_like(etas, torch.nan)
        return {
            "eta": etas.tolist(),
            "learning_rates": [eta / self.lr for eta in etas.tolist()],
            "entropy": (change.base + change.value).tolist(),
            "change": change.value.tolist(),
            "change_stderr": change.stderr.tolist(),
            "change_interval": change.interval().tolist(),
            "change_rounding": (
                unknown if self.rounding is None else self.rounding.at(etas)
            ).tolist(),
            "predicted": self.series.predict(etas).tolist(),
            "over_line": law.ratio.tolist(),
            "over_line_stderr": law.stderr.tolist(),
            "over_line_band": torch.stack([law.low, law.high], -1).tolist(),
            "line": law.verdicts,
            "excluded": law.excluded,
            "ess": change.ess.tolist(),
            "khat": change.khat.tolist(),
            "skew": change.skew.tolist(),
            "mean_weight": change.mean_weight.tolist(),
            "mean_weight_z": change.mean_weight_z.tolist(),
            "kl": change.kl.tolist(),
            "least_weight": change.weight_range[:, 0].tolist(),
            "largest_weight": change.weight_range[:, 1].tolist(),
            "largest_share": change.largest_share.tolist(),
        }

    def save(
        self,
        folder: str | Path,
        *,
        formats: Collection[str] = ("png",),
        direction: bool = False,
    ) -> list[Path]:
        """Writes report.json, report.safetensors and the figure into `folder`.

        Each file appears whole or not at all. Without matplotlib there is no figure.

        Args:
            folder: made if it does not exist.
            formats: of the figure, any of "png", "pdf" and "svg".
            direction: whether report.safetensors also holds v, under keys ``v.NAME``.

        Returns:
            The files written.

        Raises:
            ValueError: an unknown format, or v is wanted and this report does not have it.
        """
        folder = Path(folder)
        check_formats(formats)
        tensors = {n: x.detach().cpu().contiguous() for n, x in self._tensors(direction).items()}
        files = {
            "safetensors": save_tensors(tensors),
            "json": (json.dumps(self.to_dict(), indent=1) + "\n").encode(),
            **rendered(self.plot, formats),
        }
        for ending, content in files.items():
            write_atomically(folder / f"report.{ending}", content)
        return [folder / f"report.{ending}" for ending in files]

    def _tensors(self, direction: bool) -> dict[str, Tensor]:
        """What report.safetensors holds; behaviour and control only if the estimator has them."""
        tensors = {f"change.{name}": x for name, x in self.change.tensors().items()}
        tensors |= {f"series.{name}": x for name, x in self.series.tensors().items()}
        tensors |= self.arrays
        for name in ("behaviour", "control"):
            of_estimator = getattr(self.change.estimator, name)
            if of_estimator is not None:
                tensors[f"estimator.{name}"] = of_estimator
        if direction and self.direction is None:
            raise ValueError(
                "Report.save: direction=True needs a report with its direction v, but this one has "
                "none. Likely it was loaded from a folder where v had not been saved. Leave "
                "direction= out, or probe again."
            )
        if direction and self.direction is not None:
            tensors |= {f"v.{name}": x for name, x in self.direction.items()}
        return tensors

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The report that `save` wrote into `folder`. It prints as it did, and saves as it did.

        Raises:
            ValueError: the folder has no report, an older one, or one that is damaged.
        """
        folder = Path(folder)
        data, tensors = _read(folder)
        try:
            report = cls(**_fields(data, tensors))
            columns = report._columns()
            saved = [[row[name] for row in data["etas"]] for name in ("eta", "change")]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unreadable(
                f"the one in {folder} does not hold what it should ({error!r})",
                "a file was edited or cut short",
            ) from error
        if saved != [plain(columns[name]) for name in ("eta", "change")]:
            raise _unreadable(
                f"the two files in {folder} hold different numbers", "they were written by two runs"
            )
        return report

    def plot(self, axes: Sequence["Axes"]) -> None:
        """Draws the change with its line, and the change over the line, on two Axes."""
        left, right = axes
        plot(self.change, self.series, self.linearity, ax=left, unit=self.lr)
        plot_ratio(self.change, self.series, self.linearity, ax=right, unit=self.lr)

    def verdict(self) -> str:
        """Up to which eta the line holds, loosely and strictly, and what was left out."""
        loose = self.loose_linearity.describe(self.lr, " lr", excluded=False)
        strict = self.linearity.describe(self.lr, " lr")
        return "\n".join(dict.fromkeys((loose, strict)))

    def _head(self) -> str:
        slope, error, unit = self.series.value[0], self.series.stderr[0], self.change.unit
        return (
            f"H = {float(self.change.base):.4f} +- {_short(float(self.change.base_stderr))} {unit}"
            f"    slope = {float(slope):.4g} +- {_short(float(error))} {unit} per unit of eta"
            f"    lr = {self.lr:.3g}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        """The table, as text."""
        return [
            (
                f"{row['learning_rates']:.4g}",
                f"{row['eta']:.3g}",
                f"{row['change']:+.3e}",
                _short(row["change_stderr"]),
                f"{row['predicted']:+.3e}",
                _percent(row["over_line"]),
                _percent(row["over_line_stderr"]).removeprefix("+"),
                f"{row['ess']:.0f}/{self.change.rows}",
                f"{row['khat']:.2f}" if math.isfinite(row["khat"]) else "-",
                f"{row['skew']:+.2f}" if math.isfinite(row["skew"]) else "-",
                f"{row['mean_weight']:.{'4f' if row['mean_weight'] < 1e3 else '1e'}}",
            )
            for row in (dict[str, Any](row) for row in self.rows())
        ]

    def _remarks(self) -> list[str]:
        """The verdict, the rounding error, whose draws E is, and the flags, a line each."""
        notes = [str(note) for note in (self.rounding, self.policy) if note is not None]
        if self.records is not None and self.records.cause == "rounding":
            notes.append(str(self.records))
        return [*self.verdict().splitlines(), *notes, *(f"! {flag}" for flag in self.flags)]

    def _text(self, cells: list[tuple[str, ...]]) -> str:
        return "\n".join([self._head(), "", *text_table(_COLUMNS, cells), "", *self._remarks()])

    def __str__(self) -> str:
        return self._text(self._cells())

    def __repr__(self) -> str:
        return self._text(shortened(self._cells(), _GAP))

    def _repr_html_(self) -> str:
        remarks = "<br>".join(map(escape, self._remarks()))
        return (
            f"<p>{escape(self._head())}</p>"
            f"{html_table(_COLUMNS, shortened(self._cells(), _GAP))}"
            f"<p>{remarks}</p>"
            f"<details><summary>About this report</summary>{self.about._repr_html_()}</details>"
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of a report's two files."""
    try:
        data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        tensors = load_tensors((folder / "report.safetensors").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(
            f"{folder} has none that can be read ({error})",
            "the path is not a report's folder, or a file was cut short",
        ) from error
    schema = data.get("schema", 1) if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise _unreadable(
            f"the report in {folder} has schema {schema}", "it is of another version of funcprobe"
        )
    return data, tensors


def _unreadable(arrived: str, cause: str) -> ValueError:
    return ValueError(
        "Report.load: a folder with a report.json and a report.safetensors of schema "
        f"{SCHEMA} was expected, but {arrived}. Likely {cause}. Probe again, and save the report."
    )


def _fields(data: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of the report that was saved as these."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}

    of_estimator = under("estimator.")
    estimator = Estimator(
        weights=data["weights"],
        per=data["per"],
        behaviour=of_estimator.get("behaviour"),
        control=of_estimator.get("control"),
    )
    change = Estimate.from_tensors(
        under("change."),
        rows=data["responses"],
        estimator=estimator,
        quantity=data["quantity"],
    )
    series = Series(**under("series."), estimator=estimator, quantity=data["quantity"])
    # JSON has no infinity. In a rounding error, which is never nan, None stands for it.
    rounding: dict[str, Any] | None = data["rounding"]
    if rounding is not None:
        rounding = {name: math.inf if x is None else x for name, x in rounding.items()}
    policy: dict[str, Any] | None = data["policy_test"]
    if policy is not None:
        policy = {name: math.nan if x is None else x for name, x in policy.items()}
    taken = {f"change.{name}" for name in change.tensors()}
    arrays = {
        name: x
        for name, x in tensors.items()
        if name not in taken and not name.startswith(("series.", "estimator.", "v."))
    }
    return {
        "change": change,
        "series": series,
        "lr": data["lr"],
        "rounding": None if rounding is None else Rounding(**rounding),
        "about": About.from_dict(data["about"]),
        "flags": tuple(data["flags"]),
        "policy": None if policy is None else PolicyTest(**policy),
        "records": data["records"] and Records.from_dict(data["records"]),
        "arrays": arrays,
        "direction": under("v.") or None,
    }


def _short(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    return f"{100 * value:+.2f}%" if math.isfinite(value) else "-"
