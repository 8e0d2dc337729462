"""What all stages of a probe share: settings, inputs, and the blocks they are computed in."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..calculus.blocks import REVERSE, RowFn
from ..calculus.step import Affine
from ..calculus.tree import Params
from ..language.batch import Batch, trim
from ..language.recipes import Recipe
from ..language.sampling import Sampling
from ..language.score import Score, scorer
from ..rollouts.lines import read_rows
from ..rollouts.records import read_batch, read_sampling
from ..runtime.distributed import Group, agree, rank, share
from ..runtime.memory import Room, room
from ..runtime.serialize import checksum, fingerprint
from ..runtime.stream import Stream
from ..statistics.estimators import Per, Weights
from ..training.checkpoint import Checkpoint, as_checkpoint
from .about import Source, sources


@dataclass(frozen=True)
class Settings:
    """The arguments of `probe` that say what is computed and how; it explains them."""

    recipe: str | Recipe
    weights: Weights
    per: Per
    off_policy: bool
    change: str
    nodes: int | str | None
    tol: float
    matmul: str | None
    max_length: int | None
    tokens: int | None
    lanes: int
    resume: Path | None
    group: Group
    progress: bool


SECANT = 1e-3  # of the smallest learning rate, where the slope is taken from increments

_ASSUMED = "temperature 1 without top-p, top-k and min-p is assumed for E: it states no settings"


class Inputs(NamedTuple):
    """What the arguments of `probe` stand for, and the files that they came from."""

    checkpoint: Checkpoint
    update: Batch  # as wide as it came
    evaluation: Batch
    loss_sampling: Sampling  # the settings that the loss scores U under
    update_truncated: bool  # whether U's lines state top-k, top-p or min-p
    notes: tuple[str, ...]  # what was assumed about how U and E were drawn
    sources: tuple[Source, ...]  # on rank 0; empty elsewhere


class Setup(NamedTuple):
    """All that the stages share."""

    settings: Settings
    checkpoint: Checkpoint
    update: Batch  # U, on the CPU and trimmed
    evaluation: Batch  # E, likewise
    divisor: int  # of recipes with a constant one, in tokens
    score: RowFn  # of E
    loss_sampling: Sampling
    loss_score: RowFn  # of U: what the loss, and old_logp where it is unknown, are made of
    update_truncated: bool
    stream: Stream
    weights_sha256: str  # before anything was computed
    notes: tuple[str, ...]
    sources: tuple[Source, ...]


class Plan(NamedTuple):
    """The update that U causes."""

    update: Batch  # U, prepared
    logp: Tensor  # [N, R] float64, of U's tokens at the checkpoint
    grads: Params
    step: Affine
    v: Params
    etas: Tensor  # [K] float64


def read_inputs(
    checkpoint: Checkpoint | str | Path,
    update: Batch | str | Path,
    evaluation: Batch | str | Path,
    group: Group,
    update_sampling: Sampling | None = None,
) -> Inputs:
    """Loads what was given as paths, and hashes the files.

    A checkpoint with the default sampling settings takes those that a file of E's lines carries.
    The loss is scored under `update_sampling`; if that is not given, under the temperature that a
    file of U's lines carries, or else under E's, without top-p, top-k and min-p.
    """
    paths = {
        name: Path(given)
        for name, given in (("update", update), ("evaluation", evaluation))
        if isinstance(given, str | Path)
    }
    if isinstance(checkpoint, str | Path):
        for path in paths.values():
            read_rows("read_batch", path)  # refuses bad lines before a model is loaded
    checkpoint, notes = as_checkpoint(checkpoint), []
    if checkpoint.sampling == Sampling():
        sampling = read_sampling(paths["evaluation"]) if "evaluation" in paths else None
        checkpoint = replace(checkpoint, sampling=sampling or checkpoint.sampling)
        notes += [] if sampling else [_ASSUMED]
    drawn = read_sampling(paths["update"], strict=False) if "update" in paths else None
    loss_sampling, note = _loss_sampling(checkpoint.sampling, drawn, update_sampling)
    if isinstance(update, str | Path):
        update = read_batch(update, checkpoint.tokenizer)
    if isinstance(evaluation, str | Path):
        evaluation = read_batch(evaluation, checkpoint.tokenizer)
    files = sources(checkpoint.path, **paths) if rank(group) == 0 else ()
    return Inputs(
        checkpoint,
        update,
        evaluation,
        loss_sampling,
        drawn is not None and drawn.truncates,
        (*notes, *note),
        files,
    )


def _loss_sampling(
    sampling: Sampling, drawn: Sampling | None, given: Sampling | None
) -> tuple[Sampling, tuple[str, ...]]:
    """The settings that the loss scores U under, and what was assumed about them."""
    if given is not None:
        return given, ()
    if drawn is not None:
        return Sampling(drawn.temperature), ()
    return Sampling(sampling.temperature), (
        f"the loss is assumed to score U at the temperature of E, {sampling.temperature}: U does "
        "not state its own",
    )


def prepared(inputs: Inputs, settings: Settings) -> Setup:
    """Decides in which blocks everything is computed."""
    checkpoint, params, base = inputs.checkpoint, inputs.checkpoint.params, inputs.checkpoint.base
    update, evaluation = (trim(batch).to("cpu") for batch in (inputs.update, inputs.evaluation))
    before = checksum(base | params)
    drawn, lost = asdict(checkpoint.sampling), asdict(inputs.loss_sampling)
    key = fingerprint(before, list(params), checkpoint.model, drawn, lost)
    agree("weights and batches", fingerprint(key, update, evaluation), settings.group)
    stream = Stream(
        device=next(iter(params.values())).device,
        room=_room(checkpoint, settings, max(b.tokens.shape[1] for b in (update, evaluation))),
        key=key,
        folder=settings.resume,
        group=settings.group,
        progress=settings.progress,
    )
    return Setup(
        settings=settings,
        checkpoint=checkpoint,
        update=update,
        evaluation=evaluation,
        divisor=_divisor(settings, inputs.update),
        score=scored_under(checkpoint, checkpoint.sampling),
        loss_sampling=inputs.loss_sampling,
        loss_score=scored_under(checkpoint, inputs.loss_sampling),
        update_truncated=inputs.update_truncated,
        stream=stream,
        weights_sha256=before,
        notes=inputs.notes,
        sources=inputs.sources,
    )


def scored_under(checkpoint: Checkpoint, sampling: Sampling) -> Score:
    """A scorer under these settings, whose possible tokens are those at the checkpoint."""
    model, base, params = checkpoint.model, checkpoint.base, checkpoint.params
    return scorer(model, base, sampling=sampling, support=params)


def slope_eta(setup: Setup, plan: Plan) -> float | None:
    """The eta at which the slope is a secant of exact increments; None where it is a derivative.

    Its relative error is of the order of the squared change of the scores at it. A thousandth of
    the smallest learning rate makes that a millionth of what it is there, and leaves increments of
    operations without a rule three digits fewer.
    """
    if not setup.checkpoint.model.false_derivative:
        return None
    sizes = [abs(eta) for eta in plan.etas.tolist() if eta] or [float(plan.step.lr)]
    return SECANT * (min(sizes) or 1e-6)


def evenly(n: int, most: int) -> Tensor:
    """At most `most` indices of n rows, evenly spread from the first to the last, int64."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def _divisor(settings: Settings, update: Batch) -> int:
    return update.response.shape[1] if settings.max_length is None else settings.max_length


def _room(checkpoint: Checkpoint, settings: Settings, length: int) -> Room:
    """What a block may hold, for rows of up to `length` positions."""
    tokens = settings.tokens
    if tokens is None:
        most = room(checkpoint.model.skeleton.config, checkpoint.params, length)
    else:
        most = Room(tokens, max(tokens // REVERSE, 1), None)
    return Room(*share(tuple(most), settings.group))  # blocks must be the same on every rank
