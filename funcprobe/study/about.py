"""What a report is about: checkpoint, update, evaluation, settings, inputs and versions."""

import hashlib
import math
import platform
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers

from .. import __version__
from ..language.recipes import Recipe
from ..language.sampling import Sampling
from ..runtime.memory import Room
from ..statistics.tables import html_table

# What is printed in place of a field's name, where the name itself does not say enough.
LABELS = {
    "step": "optimizer steps taken",
    "max_length": "divisor of the loss in tokens",
    "v_norm": "norm of v",
    "v_norm_momentum": "of its part from momentum",
    "v_norm_decay": "of its part from decay",
    "change": "changes computed by",
    "matmul": "precision of increments' products",
    "interpolation_bound": "interpolation's error of a token, nats, at most",
    "block_positions": "positions of a block",
    "same": "unchanged",
}


@dataclass(frozen=True)
class Source:
    """A file that the report was computed from, as it was when it was read."""

    role: Literal["checkpoint", "update", "evaluation"]
    path: str  # as it was passed, so it may be relative
    sha256: str


@dataclass(frozen=True)
class CheckpointSummary:
    """The policy and its optimizer."""

    step: int | None  # optimizer steps taken; None if the checkpoint does not say
    optimizer_state: str  # how it was matched to the parameters
    notes: tuple[str, ...]  # what was assumed on loading
    dtype: str  # of the trainable parameters
    trainable_parameters: int
    sampling: Sampling


@dataclass(frozen=True)
class BatchSummary:
    """The sizes of a batch."""

    prompts: int
    responses: int
    response_tokens: int


@dataclass(frozen=True)
class UpdateSummary(BatchSummary):
    """The batch of the update, and the step that it causes."""

    recipe: str | Recipe
    sampling: Sampling  # the settings that the loss scored it under
    max_length: int  # the divisor of recipes with a constant one, in tokens
    gradient_norm: float  # before clipping
    clip: float  # the factor that clipping multiplied the gradient by
    v_norm: float
    v_norm_momentum: float  # of the part of v that the saved moments cause
    v_norm_decay: float  # of the part of v that weight decay causes


@dataclass(frozen=True)
class WeightsUnchanged:
    """Checksums of all weights before and after the probe, which changes none."""

    sha256_before: str
    sha256_after: str
    same: bool


@dataclass(frozen=True, repr=False)
class About:
    """What a report is about. It prints as labelled lines; `to_dict` has field names as keys."""

    checkpoint: CheckpointSummary
    update: UpdateSummary
    evaluation: BatchSummary
    change: str  # "increment" | "direct"
    matmul: str  # "full", or the reduced precision of the increments' matrix products
    nodes: int | str  # of interpolation, or "every learning rate"
    interpolation_bound: float  # of any token's error, in nats
    importance_weights: str
    off_policy: bool  # whether E was weighted by its recorded log-probabilities
    weights: WeightsUnchanged
    precision: dict[str, str]  # the effective settings of torch
    block_positions: Room
    seconds: dict[str, float]  # by stage
    date: str  # UTC, ISO 8601
    versions: dict[str, str]  # of funcprobe, Python, torch, transformers and peft
    inputs: tuple[Source, ...]  # files; what was passed in memory is not listed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become None."""
        return dict(plain(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "About":
        """The object of which `to_dict` made this dict.

        Raises:
            KeyError, TypeError, ValueError: `data` is something else.
        """
        checkpoint, update = data["checkpoint"], data["update"]
        recipe = update["recipe"]
        return cls(
            **data
            | {
                "checkpoint": CheckpointSummary(
                    **checkpoint
                    | {
                        "notes": tuple(checkpoint["notes"]),
                        "sampling": Sampling(**checkpoint["sampling"]),
                    }
                ),
                "update": UpdateSummary(
                    **update
                    | {
                        "recipe": Recipe(**recipe) if isinstance(recipe, dict) else recipe,
                        "sampling": Sampling(**update["sampling"]),
                    }
                ),
                "evaluation": BatchSummary(**data["evaluation"]),
                "weights": WeightsUnchanged(**data["weights"]),
                "block_positions": Room(**data["block_positions"]),
                "inputs": tuple(Source(**source) for source in data["inputs"]),
            }
        )

    def labelled(self) -> list[tuple[str, str]]:
        """A label and a text for each field, and for each input file."""
        data = self.to_dict()
        files = data.pop("inputs")
        lines = [(_label(name), _text(value)) for name, value in data.items()]
        return [
            *lines,
            *(
                (f"{file['role']} file", f"{file['path']}, SHA-256 {file['sha256']}")
                for file in files
            ),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{label}: {value}" for label, value in self.labelled())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(("about", ""), self.labelled())


def versions() -> dict[str, str]:
    """The versions of the software that computes a report."""
    return {
        "funcprobe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def sources(
    checkpoint: Path, update: Path | None = None, evaluation: Path | None = None
) -> tuple[Source, ...]:
    """The files of a checkpoint's folder, sub-folders left out, and those of U and E, hashed."""
    folder = checkpoint.iterdir() if checkpoint.is_dir() else ()
    files = sorted(path for path in folder if path.is_file())
    return (
        *(_source("checkpoint", path) for path in files),
        *(() if update is None else [_source("update", update)]),
        *(() if evaluation is None else [_source("evaluation", evaluation)]),
    )


def _source(role: Literal["checkpoint", "update", "evaluation"], path: Path) -> Source:
    with path.open("rb") as file:
        return Source(role, str(path), hashlib.file_digest(file, "sha256").hexdigest())


def plain(value: Any) -> Any:
    """A value as JSON has it: objects for dataclasses and named tuples, None for nan and inf."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_label(name)} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
