"""The probe: the update that a batch U would cause, and what it would do to the entropy on E."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calculus import precision
from ..calculus.blocks import evaluate
from ..calculus.gradients import gradient
from ..calculus.interpolation import FIRST
from ..calculus.line import secant, sweep
from ..calculus.results import Sweep, join
from ..calculus.step import adamw, direction
from ..calculus.taylor import taylor
from ..calculus.tree import Terms, norm
from ..language.batch import Batch, lengths
from ..language.objectives import objective, prepare
from ..language.recipes import Recipe
from ..language.sampling import Sampling
from ..runtime.distributed import Group
from ..runtime.serialize import checksum
from ..statistics.change import entropy_change, entropy_series
from ..statistics.doubts import doubts
from ..statistics.estimators import Per, Weights
from ..statistics.policy_test import policy_test
from ..training.checkpoint import Checkpoint
from .about import (
    About,
    BatchSummary,
    CheckpointSummary,
    UpdateSummary,
    WeightsUnchanged,
    versions,
)
from .checks import check_arguments, check_inputs, check_settings
from .doubts import policy_doubts, probe_doubts
from .provenance import Explanation, alike, explain, records
from .report import Report
from .roundoff import Recomputed, noise, recompute_sample
from .setup import Plan, Settings, Setup, prepared, read_inputs, slope_eta

MULTIPLES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the learning rate, where no etas are given

Etas = Sequence[float] | Tensor | Callable[[float], Sequence[float]]


def probe(
    checkpoint: Checkpoint | str | Path,
    update: Batch | str | Path,
    evaluation: Batch | str | Path,
    etas: Etas | None = None,
    *,
    recipe: str | Recipe = "dr_grpo",
    weights: Weights = "sequence",
    per: Per = "token",
    off_policy: bool = False,
    change: str = "increment",
    nodes: int | str | None = None,
    tol: float = 1e-6,
    matmul: str | None = None,
    max_length: int | None = None,
    tokens: int | None = None,
    lanes: int = 8,
    resume: str | Path | None = None,
    group: Group = None,
    progress: bool = False,
    update_sampling: Sampling | None = None,
) -> Report | None:
    """What one AdamW step on `update` would do to the entropy of the responses in `evaluation`.

    It composes the pure functions: v from U and the saved state, the sweep of ``params + eta v``
    over E, self-normalised importance sampling, and the slope from the same v on the same rows.
    Nothing is stepped or changed, and a checksum of all weights before and after confirms it.

    Args:
        checkpoint: from `load_checkpoint`, or the path of one.
        update: U, with rewards or advantages, in complete prompt groups; or the path of its JSON
            lines. Without old_logp, U is taken to be sampled at the checkpoint. The temperature in
            those lines is the loss's; see `update_sampling`.
        evaluation: E, the model's own responses at the checkpoint; or the path of its JSON lines.
            The sampling settings in those lines are used if the checkpoint has the default ones.
        etas: learning rates, or a function that returns them for the reference rate; by default 0,
            0.25, 0.5, 1, 2 and 4 times that rate.
        recipe: the objective of the update.
        weights, per: the estimator; see `entropy_change`.
        off_policy: E was sampled elsewhere, with the log-probabilities that it records; its rows
            are weighted by them. Otherwise E is taken to be sampled at the checkpoint, and flagged
            if it was not.
        change: "increment" (exact at any eta, in float32 too) or "direct"; see `changes`.
        nodes, tol: "auto" interpolates many etas from a few evaluations of each block, to `tol`;
            see `sweep`.
        matmul: "tf32" or "bfloat16" for the precision of the increments' matrix products; the error
            is measured and reported.
        max_length: the divisor of recipes with a constant one, in tokens; U's R if not given, which
            is flagged.
        tokens: how many positions a block holds at most: rows times positions times lanes. It
            bounds memory. The default is 1024 on a CPU, and on a CUDA device what its free memory
            allows; the report states it.
        lanes: how many parameter points a block holds at most; see `changes`.
        resume: a folder for finished blocks. The same call goes on from them, and its result is
            bitwise that of a run without interruption; see `resumable`.
        group: of torch.distributed, ``dist.group.WORLD`` for instance. All its ranks make this call
            and share the blocks; see `sharded`.
        progress: whether to show progress bars on standard error.
        update_sampling: the settings that the loss scores U under. TRL's losses divide the logits
            by the temperature and leave top-k, top-p and min-p out; so does the default, at the
            temperature that the lines of U carry, or else at E's.

    Returns:
        The report; None on ranks other than 0, which never hold other ranks' results on E.

    Raises:
        TypeError: an argument is of another type, as when two were swapped.
        ValueError: the batches, rates or state are impossible or do not fit, which is checked
            before anything is computed; see also the functions composed.
    """
    settings = Settings(
        recipe=recipe,
        weights=weights,
        per=per,
        off_policy=off_policy,
        change=change,
        nodes=nodes,
        tol=tol,
        matmul=matmul,
        max_length=max_length,
        tokens=tokens,
        lanes=lanes,
        resume=None if resume is None else Path(resume),
        group=group,
        progress=progress,
    )
    check_settings(settings)
    check_arguments(checkpoint, update, evaluation, etas)
    inputs = read_inputs(checkpoint, update, evaluation, group, update_sampling)
    check_inputs(inputs, settings)
    clock = _Clock()
    setup = prepared(inputs, settings)
    clock.lap("checksum")
    plan = _plan_update(setup, etas)
    clock.lap("update_direction")
    swept = _sweep(setup, plan)
    clock.lap("sweep")
    terms = _slope(setup, plan)
    clock.lap("slope")
    sample = _roundoff(setup, plan)
    clock.lap("rounding")
    explained = explain(setup)
    clock.lap("records")
    if swept is None or terms is None:
        return None
    return _summarise(setup, plan, swept, terms, sample, explained, clock)


class _Clock:
    """Seconds from each lap to the next, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a lap, and gives it a name."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def _plan_update(setup: Setup, etas: Etas | None) -> Plan:
    """The step that U causes from the saved state, as a direction, and the learning rates."""
    recipe, params, stream = setup.settings.recipe, setup.checkpoint.params, setup.stream
    logp = _scored_update(setup)
    update = prepare(_with_old_logp(setup.update, logp), recipe, max_length=setup.divisor)
    loss = objective(setup.loss_score, recipe)
    blocks, _ = stream.cut(update, reverse=True)
    total = stream.total(
        "gradient of U",
        lambda block: gradient(loss, params, block, rows="all"),
        blocks,
        recipe if isinstance(recipe, str) else asdict(recipe),
    )
    grads = {name: total[name].to(p) for name, p in params.items()}
    step = adamw(grads, params, setup.checkpoint.state, **setup.checkpoint.adamw)
    lr = float(step.lr)
    if etas is None:
        etas = [lr * multiple for multiple in MULTIPLES]
    elif callable(etas):
        etas = etas(lr)
    return Plan(
        update=update,
        logp=logp,
        grads=grads,
        step=step,
        v=direction(step, grads),
        etas=torch.as_tensor(etas, dtype=torch.float64).flatten().cpu(),
    )


def _scored_update(setup: Setup) -> Tensor:
    """The log-probability of U's tokens at the checkpoint, [N, R] float64."""
    blocks, order = setup.stream.cut(setup.update)
    scores = setup.stream.map(
        "log-probabilities of U",
        lambda block: evaluate(setup.loss_score, setup.checkpoint.params, block, rows="all"),
        blocks,
    )
    return join(scores, order).logp.double()


def _with_old_logp(update: Batch, logp: Tensor) -> Batch:
    """U with its log-probabilities at the checkpoint where none are recorded."""
    return update._replace(old_logp=torch.where(update.old_logp.isnan(), logp, update.old_logp))


def _sweep(setup: Setup, plan: Plan) -> Sweep | None:
    """E's scores at every learning rate; None on ranks other than 0."""
    settings, params = setup.settings, setup.checkpoint.params
    # Blocks get no more lanes than there are points: every eta, and the base where values are
    # subtracted; with nodes, as many as a first evaluation has.
    points = FIRST
    if settings.nodes is None:
        points = len(plan.etas) + (settings.change == "direct")
    lanes = max(min(settings.lanes, points), 1)

    def at_every_eta(block: Batch) -> Sweep:
        return sweep(
            setup.score,
            params,
            plan.v,
            plan.etas,
            block,
            change=settings.change,
            nodes=settings.nodes,
            tol=settings.tol,
            matmul=settings.matmul,
            rows="all",
            lanes=lanes,
        )

    how = (settings.change, settings.nodes, settings.tol, settings.matmul, lanes)
    blocks, order = setup.stream.cut(setup.evaluation, lanes)
    parts = setup.stream.map("sweep over E", at_every_eta, blocks, plan.v, plan.etas, how, to=0)
    return join(parts, order) if parts else None


def _slope(setup: Setup, plan: Plan) -> Terms | None:
    """E's scores and their derivatives along v; None on ranks other than 0."""
    params = setup.checkpoint.params
    eta = slope_eta(setup, plan)

    def along_v(block: Batch) -> tuple[Any, ...]:
        if eta is None:
            return taylor(setup.score, params, plan.v, block, rows="all")
        return secant(setup.score, params, plan.v, block, eta, rows="all")

    blocks, order = setup.stream.cut(setup.evaluation)
    parts = setup.stream.map("slope on E", along_v, blocks, plan.v, eta, to=0)
    return join(parts, order) if parts else None


def _roundoff(setup: Setup, plan: Plan) -> Recomputed | None:
    """A sample of the changes on E, computed in another way."""
    return recompute_sample(
        setup.stream,
        setup.score,
        setup.checkpoint.params,
        plan.v,
        plan.etas,
        setup.evaluation,
        middle=setup.settings.nodes is not None,
    )


def _summarise(
    setup: Setup,
    plan: Plan,
    swept: Sweep,
    terms: Terms,
    sample: Recomputed | None,
    explained: Explanation | None,
    clock: _Clock,
) -> Report:
    """The statistics, what is doubtful about them, and what they are about."""
    settings, evaluation = setup.settings, setup.evaluation
    behaviour = evaluation.old_logp if settings.off_policy else None
    change = entropy_change(
        swept, evaluation, weights=settings.weights, per=settings.per, behaviour=behaviour
    )
    series = entropy_series(
        terms, evaluation, weights=settings.weights, per=settings.per, behaviour=behaviour
    )
    proportional = settings.nodes is not None or settings.change == "increment"
    rounded = sample and noise(swept, sample, evaluation, series, proportional=proportional)
    same = alike(evaluation, swept)
    # E that is weighted by records of another policy is no sample of the scored one.
    policy = policy_test(swept.base, evaluation) if same or not settings.off_policy else None
    recorded = records(setup, swept, terms, explained)
    suspicions = policy_doubts(change, policy, recorded, alike=same)
    clock.lap("statistics")
    after = checksum(setup.checkpoint.base | setup.checkpoint.params)
    clock.lap("checksum_after")
    return Report(
        change=change,
        series=series,
        lr=float(plan.step.lr),
        rounding=rounded,
        about=_about(setup, plan, swept, after, clock.seconds),
        flags=(
            # The worst first: what is wrong with the inputs, then what that may have caused.
            *suspicions,
            *probe_doubts(setup, plan, swept, rounded, drawn=not suspicions),
            *doubts(change, series),
        ),
        policy=policy,
        records=recorded,
        arrays={
            "base.logp": swept.base.logp,
            "base.entropy": swept.base.entropy,
            "change.logp": swept.change.logp,
            "change.entropy": swept.change.entropy,
            "slope.logp": terms[1].logp,
            "slope.entropy": terms[1].entropy,
            "response": evaluation.response,
            "group": evaluation.group,
        },
        direction=plan.v,
    )


def _about(setup: Setup, plan: Plan, swept: Sweep, after: str, seconds: dict[str, float]) -> About:
    checkpoint, settings = setup.checkpoint, setup.settings
    with precision.exact():
        effective = precision.settings()
    return About(
        checkpoint=CheckpointSummary(
            step=checkpoint.step,
            optimizer_state=checkpoint.match,
            notes=(*checkpoint.notes, *setup.notes),
            dtype=str(next(iter(checkpoint.params.values())).dtype).removeprefix("torch."),
            trainable_parameters=sum(p.numel() for p in checkpoint.params.values()),
            sampling=checkpoint.sampling,
        ),
        update=UpdateSummary(
            **_sizes(plan.update),
            recipe=settings.recipe,
            sampling=setup.loss_sampling,
            max_length=setup.divisor,
            gradient_norm=float(norm(plan.grads)),
            clip=float(plan.step.clip),
            v_norm=float(norm(plan.v)),
            v_norm_momentum=float(norm(plan.step.momentum)),
            v_norm_decay=float(norm(plan.step.decay)),
        ),
        evaluation=BatchSummary(**_sizes(setup.evaluation)),
        change=settings.change,
        matmul=settings.matmul or "full",
        nodes=settings.nodes or "every learning rate",
        interpolation_bound=float(swept.bound.max()),
        importance_weights=settings.weights,
        off_policy=settings.off_policy,
        weights=WeightsUnchanged(setup.weights_sha256, after, setup.weights_sha256 == after),
        precision={name.replace(" ", "_"): value for name, value in effective.items()},
        block_positions=setup.stream.room,
        seconds=seconds,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        inputs=setup.sources,
    )


def _sizes(batch: Batch) -> dict[str, int]:
    return {
        "prompts": len(batch.group.unique()),
        "responses": len(batch.group),
        "response_tokens": int(lengths(batch).sum()),
    }
