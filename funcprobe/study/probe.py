"""The mixed probe: the update a batch U would cause, and what it does to the entropy on E."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..calculus.blocks import REVERSE, evaluate
from ..calculus.interpolation import FIRST, check_nodes
from ..calculus.line import join, sweep
from ..calculus.precision import exact, settings
from ..calculus.step import adamw, direction, gradient
from ..calculus.taylor import taylor
from ..calculus.tree import merge, norm
from ..language.batch import Batch, lengths, trim
from ..language.objectives import RECIPES, Recipe, objective, prepare
from ..language.score import scorer
from ..runtime.distributed import agree, rank, share
from ..runtime.memory import Room, room
from ..runtime.serialize import checksum, fingerprint
from ..runtime.stream import Stream
from ..statistics.change import entropy_change, entropy_series
from ..statistics.flags import doubts
from ..statistics.rounding import Rounding
from .report import Report
from .roundoff import noise, recompute

MULTIPLES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the learning rate, where no etas are given


def probe(
    checkpoint,
    update: Batch,
    evaluation: Batch,
    etas: Sequence[float] | Tensor | Callable[[float], Sequence[float]] | None = None,
    *,
    recipe: str | Recipe = "dr_grpo",
    weights: str = "sequence",
    per: str = "token",
    off_policy: bool = False,
    change: str = "increment",
    nodes: int | str | None = None,
    tol: float = 1e-6,
    matmul: str | None = None,
    max_length: int | None = None,
    tokens: int | None = None,
    lanes: int = 8,
    resume: str | Path | None = None,
    group=None,
    progress: bool = False,
) -> Report | None:
    """What one AdamW step on `update` would do to the entropy of the responses in `evaluation`.

    Composes the pure functions: v from U and the saved state, the sweep of ``params + eta v`` over
    E, SNIS, and the slope from the same v on the same rows. Nothing is stepped or changed; a
    checksum of all weights before and after says so.

    Args:
        checkpoint: from `load_checkpoint`.
        update: U, with rewards or advantages, complete prompt groups. Without old_logp it is taken
            to be sampled at the checkpoint.
        evaluation: E, the model's own responses at the checkpoint.
        etas: learning rates; a function gets the reference rate and returns them; the default is
            0, 0.25, 0.5, 1, 2 and 4 times that rate.
        recipe: the objective of the update.
        weights, per: the estimator; see `entropy_change`.
        off_policy: E was sampled elsewhere, with the log-probabilities it records: weigh its rows
            by them. Without, E is taken to be sampled at the checkpoint, and flagged if it was not.
        change: "increment" (exact at any eta, in float32 too) or "direct"; see `changes`.
        nodes, tol: "auto" interpolates many etas from a few evaluations of each block, to `tol`;
            see `sweep`.
        matmul: "tf32" or "bfloat16", the precision of the increments' matrix products; its error is
            measured and reported.
        max_length: the divisor of recipes with a constant one, in tokens.
        tokens: rows times positions times lanes of a block, at most. It bounds memory; the default
            is 1024 on a CPU, on a CUDA device what its free memory allows; the report has it.
        lanes: parameter points per block, at most; see `changes`.
        resume: a folder for finished blocks. The same call goes on from them, and its result is
            bitwise that of a run without interruption; see `resumable`.
        group: of torch.distributed, ``dist.group.WORLD`` for instance, whose ranks all make this
            call and share the blocks; see `sharded`.
        progress: show bars on standard error.

    Returns:
        The report; on ranks other than 0, which never hold other ranks' rows of E, None.

    Raises:
        ValueError: batches, rates or state that do not fit; see the functions composed.
    """
    params, base = checkpoint.params, checkpoint.base
    device = next(iter(params.values())).device
    divisor = max_length or update.response.shape[1]
    update, evaluation = trim(update).to("cpu"), trim(evaluation).to("cpu")
    _check(checkpoint, update, evaluation)
    check_nodes("probe", nodes, tol)
    support = params if checkpoint.sampling.top_p < 1 else None
    score = scorer(checkpoint.model, base, sampling=checkpoint.sampling, support=support)
    loss = objective(score, recipe)
    clock = _Clock()
    before = checksum(base | params)
    key = fingerprint(before, list(params), checkpoint.model, asdict(checkpoint.sampling))
    agree("weights and batches", fingerprint(key, update, evaluation), group)
    folder = None if resume is None else Path(resume)
    longest = max(update.tokens.shape[1], evaluation.tokens.shape[1])
    if tokens is None:
        most = room(checkpoint.model.skeleton.config, params, longest)
    else:
        most = Room(tokens, max(tokens // REVERSE, 1), None)
    most = Room(*share(tuple(most), group))  # blocks must be the same on every rank
    stream = Stream(device, most, key, folder, group, progress)
    clock("checksum")

    unknown = update.old_logp.isnan()
    if (unknown & update.response).any():
        blocks, order = stream.cut(update)
        scores = stream.map(
            "log-probabilities of U", lambda b: evaluate(score, params, b, rows=_all(b)), blocks
        )
        here = merge(scores, order).logp.double()
        update = update._replace(old_logp=torch.where(unknown, here, update.old_logp))
    update = prepare(update, recipe, max_length=divisor)
    blocks, _ = stream.cut(update, reverse=True)
    total = stream.total(
        "gradient of U",
        lambda b: gradient(loss, params, b, rows=_all(b)),
        blocks,
        recipe if isinstance(recipe, str) else asdict(recipe),
    )
    grads = {name: total[name].to(p) for name, p in params.items()}
    step = adamw(grads, params, checkpoint.state, **checkpoint.adamw)
    v = direction(step, grads)
    clock("update direction")

    lr = float(step.lr)
    etas = [lr * m for m in MULTIPLES] if etas is None else etas(lr) if callable(etas) else etas
    etas = torch.as_tensor(etas, dtype=torch.float64).flatten().cpu()
    points = len(etas) + (change == "direct") if nodes is None else FIRST
    lanes = max(min(lanes, points), 1)
    same = {"change": change, "nodes": nodes, "tol": tol, "matmul": matmul, "lanes": lanes}
    blocks, order = stream.cut(evaluation, lanes)
    swept = stream.map(
        "sweep over E",
        lambda b: sweep(score, params, v, etas, b, rows=_all(b), **same),
        blocks,
        (v, etas, same),
        to=0,
    )
    swept = join(swept, order) if swept else None
    clock("sweep")
    blocks, order = stream.cut(evaluation)
    terms = stream.map(
        "slope on E", lambda b: taylor(score, params, v, b, rows=_all(b)), blocks, v, to=0
    )
    clock("slope")
    dense = nodes is not None
    again = recompute(stream, score, params, v, etas, evaluation, middle=dense)
    clock("rounding")
    if rank(group):
        return None
    terms = merge(terms, order)

    kind = {"weights": weights, "per": per}
    kind["behaviour"] = evaluation.old_logp if off_policy else None
    estimate = entropy_change(swept, evaluation, **kind)
    series = entropy_series(terms, evaluation, **kind)
    proportional = dense or change == "increment"
    rounded = again and noise(
        swept, again, evaluation, series, kind["behaviour"], proportional=proportional
    )
    clock("statistics")
    after = checksum(base | params)
    clock("checksum after")
    with exact():
        precision = settings()
    return Report(
        change=estimate,
        series=series,
        lr=lr,
        rounding=rounded,
        about={
            "checkpoint": {
                "step": checkpoint.step,
                "optimizer state": checkpoint.match,
                "notes": list(checkpoint.notes),
                "dtype": str(next(iter(params.values())).dtype).removeprefix("torch."),
                "trainable parameters": sum(p.numel() for p in params.values()),
                "sampling": asdict(checkpoint.sampling),
            },
            "update": _sizes(update)
            | {
                "recipe": recipe if isinstance(recipe, str) else asdict(recipe),
                "max length": divisor,
                "gradient norm": float(norm(grads)),
                "clip": float(step.clip),
                "norm of v": float(norm(v)),
                "norm of v from momentum": float(norm(step.momentum)),
                "norm of v from decay": float(norm(step.decay)),
            },
            "evaluation": _sizes(evaluation),
            "change": change,
            "matmul": matmul or "full",
            "nodes": nodes or "every learning rate",
            "interpolation's error of a token, nats, at most": float(swept.bound.max()),
            "importance weights": weights,
            "off policy": off_policy,
            "weights": {"sha256 before": before, "sha256 after": after, "same": before == after},
            "precision": precision,
            "positions of a block": most._asdict(),
            "seconds": clock.seconds,
        },
        flags=(
            *doubts(estimate),
            *_doubts(swept, evaluation, rounded, off_policy),
            *_guesses(recipe, max_length, divisor),
        ),
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
    )


class _Clock:
    """Seconds between calls, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def _all(block: Batch) -> int:
    """All of a block's rows: one call a block."""
    return len(block.tokens)


def _check(checkpoint, update: Batch, evaluation: Batch) -> None:
    """Refuses batches of another tokenizer before anything is computed."""
    for name, batch in (("U", update), ("E", evaluation)):
        tokens = batch.tokens[batch.attention]
        if not 0 <= tokens.min() <= tokens.max() < checkpoint.model.vocabulary:
            raise ValueError(
                f"probe: token ids from 0 to {checkpoint.model.vocabulary - 1} were expected, "
                f"{name} has {int(tokens.min())} to {int(tokens.max())}. It was tokenised for "
                "another model."
            )


def _sizes(batch: Batch) -> dict[str, int]:
    return {
        "prompts": len(batch.group.unique()),
        "responses": len(batch.group),
        "response tokens": int(lengths(batch).sum()),
    }


def _doubts(swept, evaluation: Batch, rounded: Rounding | None, off_policy: bool) -> list[str]:
    """What only the probe can see: E from another policy, changes below rounding."""
    found = []
    off = (swept.base.logp.double() - evaluation.old_logp).abs()[evaluation.response]
    if (off > 0.05).any() and not off_policy:
        found.append(
            f"E's recorded log-probabilities differ from the checkpoint's by up to "
            f"{float(off[~off.isnan()].max()):.2g} nats a token: E was not sampled from this "
            "policy, or the base model, its precision or the sampling settings differ. Sample E "
            "from this checkpoint, or weigh it by what it records with off_policy=True."
        )
    if rounded is not None and rounded.floor > min(e for e in swept.etas.abs().tolist() if e):
        found.append(
            f"rounding drowns the change below eta = {rounded.floor:.2g}. Use change='increment' "
            "in full precision, or load the checkpoint in float64."
        )
    if swept.shrunk:
        found.append(
            f"memory ran out {len(swept.shrunk)} times in the sweep, first: {swept.shrunk[0]}. The "
            "results are as good; pass a smaller tokens= to save the time."
        )
    if swept.fallbacks:
        found.append(
            f"no increment rule for {', '.join(swept.fallbacks)}: subtracted there, with rounding. "
            "Give sweep a rule for them, or load the checkpoint in float64."
        )
    return found


def _guesses(recipe: str | Recipe, max_length: int | None, divisor: int) -> list[str]:
    """What the caller left open that changes the update."""
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    if recipe.aggregate != "constant" or max_length is not None:
        return []
    return [
        f"U's longest response, {divisor} tokens, was taken as the constant that the loss is "
        "divided by. The saved moments are in the run's own unit: pass max_length= its longest "
        "allowed completion."
    ]
