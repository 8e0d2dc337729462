"""The statistics of a large sweep, timed; and what prefix weights gain on SmolLM2's stored sweep.

    python tests/benchmarks/estimates.py

2,048 rows, 64 etas, 1,000 draws: arrays as a float32 sweep gives them, 256 prompts of 8 responses
of up to 64 tokens; the peak is of this process, the arrays (67 MB) and torch included. The gain is
the ratio of the variances by influence values, with a 95% interval from prompts drawn again.
"""

import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import funcprobe as fp

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
PROMPTS, COPIES, WIDTH, POINTS, DRAWS = 256, 8, 64, 64, 1000


def arrays():
    """A batch and a sweep of random scores."""
    generator = torch.Generator().manual_seed(0)
    n = PROMPTS * COPIES
    length = torch.randint(1, WIDTH + 1, (n, 1), generator=generator)
    response = torch.arange(WIDTH) < length
    rows = SimpleNamespace(response=response, group=torch.arange(n) // COPIES)

    def draw(scale):
        return torch.where(response, scale * torch.randn(n, WIDTH, generator=generator), 0.0)

    etas = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    base, slope = fp.Scores(-draw(1).abs(), draw(1).abs()), fp.Scores(draw(0.1), draw(0.1).abs())
    change = fp.Scores(*(etas.float().view(-1, 1, 1) * x for x in slope))
    return SimpleNamespace(etas=etas, base=base, change=change), (base, slope), rows


def gain():
    """Variance with prefix weights over that with sequence weights, at each eta."""
    stored = load_file(EXAMPLE / "report.safetensors")
    rows = SimpleNamespace(response=stored["response"], group=stored["group"])
    etas = stored["change.etas"]

    def scores(name):
        return fp.Scores(stored[f"{name}.logp"], stored[f"{name}.entropy"])

    sweep = SimpleNamespace(etas=etas, base=scores("base"), change=scores("change"))
    square = [fp.entropy_change(sweep, rows, weights=w).psi ** 2 for w in ("prefix", "sequence")]
    generator = torch.Generator().manual_seed(0)
    prompts = square[0].shape[1]
    drawn = torch.randint(prompts, (10_000, prompts), generator=generator)
    for k in range(1, len(etas)):
        top, bottom = (x[k] for x in square)
        again = top[drawn].sum(-1) / bottom[drawn].sum(-1)
        low, high = again.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        figures = {
            "eta": float(etas[k]),
            "variance, prefix over sequence": float(top.sum() / bottom.sum()),
        }
        print(json.dumps(figures | {"95%": [round(low, 3), round(high, 3)]}))


def main():
    """Prints one line of JSON for each kind of weights."""
    torch.set_num_threads(2)
    gain()
    sweep, terms, rows = arrays()
    for weights in ("sequence", "prefix"):
        seconds, last = {}, time.perf_counter()

        def clock(name, seconds=seconds):
            nonlocal last
            now = time.perf_counter()
            seconds[name], last = round(now - last, 2), now

        change = fp.entropy_change(sweep, rows, weights=weights)
        clock("change")
        series = fp.entropy_series(terms, rows, weights=weights)
        clock("series")
        fp.linearity(change, series)
        clock("linearity")
        fp.jackknife(sweep, rows, weights=weights)
        clock("jackknife")
        fp.bootstrap(sweep, rows, weights=weights, draws=DRAWS)
        clock("bootstrap")
        total = round(sum(seconds.values()), 2)
        fp.bootstrap(sweep, rows, weights=weights, draws=DRAWS, studentised=True)
        clock("bootstrap-t")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"weights": weights, "seconds": seconds,
                          "without bootstrap-t": total, "peak GiB": round(peak, 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
