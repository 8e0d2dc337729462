"""Seconds and peak memory of the statistics of a large sweep: 2,048 rows, 64 etas, 1,000 draws.

    python tests/benchmarks/estimates.py

Arrays as a float32 sweep gives them, 256 prompts of 8 responses of up to 64 tokens; the peak is of
this process, the arrays (67 MB) and torch included.
"""

import json
import resource
import time
from types import SimpleNamespace

import torch

import funcprobe as fp

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


def main():
    """Prints one line of JSON for each kind of weights."""
    torch.set_num_threads(2)
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
