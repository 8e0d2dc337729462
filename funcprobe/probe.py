"""The mixed probe: the update a batch U would cause, and what it does to the entropy on E."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .calculus.line import join, sweep_blocks
from .calculus.precision import exact, settings
from .calculus.rows import REVERSE, evaluate
from .calculus.step import adamw, direction, gradient
from .calculus.taylor import taylor
from .calculus.tree import Params, add_scaled, merge, norm
from .language.batch import Batch, by_length, lengths, trim
from .language.objectives import RECIPES, Recipe, objective, prepare
from .language.score import scorer
from .memory import Room, room
from .report import Report
from .statistics.change import entropy_change, entropy_series
from .statistics.doubts import doubts
from .statistics.rounding import Rounding, rounding

SAMPLED = 16  # rows of E whose changes are computed twice, to measure rounding
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
    matmul: str | None = None,
    max_length: int | None = None,
    tokens: int | None = None,
    lanes: int = 8,
    progress: bool = False,
) -> Report:
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
        matmul: "tf32" or "bfloat16", the precision of the increments' matrix products; its error is
            measured and reported.
        max_length: the divisor of recipes with a constant one, in tokens.
        tokens: rows times positions times lanes of a block, at most. It bounds memory; the default
            is 1024 on a CPU, on a CUDA device what its free memory allows; the report has it.
        lanes: parameter points per block, at most; see `changes`.
        progress: show bars on standard error.

    Raises:
        ValueError: batches, rates or state that do not fit; see the functions composed.
    """
    params, base = checkpoint.params, checkpoint.base
    device = next(iter(params.values())).device
    divisor = max_length or update.response.shape[1]
    update, evaluation = trim(update).to(device), trim(evaluation).to(device)
    _check(checkpoint, update, evaluation)
    support = params if checkpoint.sampling.top_p < 1 else None
    score = scorer(checkpoint.model, base, sampling=checkpoint.sampling, support=support)
    clock = _Clock()
    before = checksum(base | params)
    clock("checksum")

    longest = max(update.tokens.shape[1], evaluation.tokens.shape[1])
    itemsize = next(iter(params.values())).dtype.itemsize
    most = room(checkpoint.model.skeleton.config, device, itemsize, longest)
    if tokens is not None:
        most = Room(tokens, max(tokens // REVERSE, 1), None)

    def blocks(batch: Batch, name: str, lanes: int = 1, positions: int = most.forward):
        parts, order = by_length(batch, tokens=max(positions // lanes, 1))
        return tqdm(parts, name, disable=not progress), order

    unknown = update.old_logp.isnan()
    if (unknown & update.response).any():
        parts, order = blocks(update, "log-probabilities of U")
        scores = [evaluate(score, params, part, rows=len(part.tokens)) for part in parts]
        here = merge(scores, order).logp.double()
        update = update._replace(old_logp=torch.where(unknown, here, update.old_logp))
    update = prepare(update, recipe, max_length=divisor)
    loss, grads = objective(score, recipe), None
    for part in blocks(update, "gradient of U", positions=most.reverse)[0]:
        some = gradient(loss, params, part, rows=len(part.tokens))
        grads = some if grads is None else add_scaled(grads, some)
    step = adamw(grads, params, checkpoint.state, **checkpoint.adamw)
    v = direction(step, grads)
    clock("update direction")

    lr = float(step.lr)
    etas = [lr * m for m in MULTIPLES] if etas is None else etas(lr) if callable(etas) else etas
    points = len(torch.as_tensor(etas).flatten()) + (change == "direct")
    lanes = max(min(lanes, points), 1)
    parts, order = blocks(evaluation, "sweep over E", lanes)
    # One call a block of rows: rows= takes every row of it at once.
    same = {"change": change, "matmul": matmul, "rows": len(evaluation.tokens), "lanes": lanes}
    swept = join(sweep_blocks(score, params, v, etas, parts, **same), order)
    clock("sweep")
    parts, order = blocks(evaluation, "slope on E")
    terms = merge([taylor(score, params, v, part, rows=len(part.tokens)) for part in parts], order)
    clock("slope")

    kind = {"weights": weights, "per": per}
    kind["behaviour"] = evaluation.old_logp if off_policy else None
    estimate = entropy_change(swept, evaluation, **kind)
    series = entropy_series(terms, evaluation, **kind)
    clock("statistics")
    rounded = _rounding(score, params, v, swept, evaluation, series, same, kind["behaviour"])
    clock("rounding")
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


def _rounding(
    score, params: Params, v: Params, swept, evaluation: Batch, series, same: dict, behaviour
) -> Rounding | None:
    """The sweep's rounding error at its smallest eta, against full increments of some rows.

    These start from parameters one rounding away, since the same ones might round the same way.
    """
    n, away = len(evaluation.tokens), swept.etas.abs()
    if n < 2 or not (away > 0).any():
        return None
    k = int(torch.where(away > 0, away, torch.inf).argmin())
    eta = float(swept.etas[k])
    index = torch.linspace(0, n - 1, min(n, SAMPLED)).round().long()
    rows = evaluation.rows(index.to(evaluation.tokens.device))
    parts, order = by_length(rows, tokens=1)
    near = {name: torch.nextafter(p, torch.full_like(p, torch.inf)) for name, p in params.items()}
    again = join(
        sweep_blocks(score, near, v, [eta], parts, change="increment", lanes=1), order
    ).change
    there = [leaf[k, index.to(leaf.device)] for leaf in swept.change]
    width = min(again[0].shape[-1], there[0].shape[-1])
    off = type(again)(
        *(a[..., :width] - b[0][..., :width] for a, b in zip(there, again, strict=True))
    )
    return rounding(
        swept.base,
        off,
        index,
        evaluation,
        series,
        eta,
        proportional=same["change"] == "increment",
        behaviour=behaviour,
    )


def checksum(tensors: Params) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Clock:
    """Seconds between calls, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


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
