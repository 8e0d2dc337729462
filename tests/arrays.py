"""Random scores of random rows: all that the statistics read, without a model."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from funcprobe import Scores

SEEDS = st.integers(0, 10_000)

N, R = 9, 5


def arrays(size: float = 0.3, seed: int = 0):
    """Random scores of nine ragged rows of three prompts, and their first two derivatives."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor([5, 1, 3, 2, 4, 5, 1, 2, 3])
    response = torch.arange(R) < length[:, None]

    def draw(scale):
        return torch.where(
            response, scale * torch.randn(N, R, generator=generator, dtype=torch.float64), 0.0
        )

    terms = (
        Scores(draw(1.0), draw(1.0).abs()),
        Scores(draw(size), draw(size)),
        Scores(draw(size), draw(size)),
    )
    return terms, SimpleNamespace(response=response, group=torch.arange(N) // 3)


def swept(terms, etas):
    etas = torch.as_tensor(etas, dtype=torch.float64)
    t = etas.view(-1, 1, 1)
    change = [t * a + t * t / 2 * b for a, b in zip(terms[1], terms[2], strict=True)]
    return SimpleNamespace(etas=etas, base=terms[0], change=Scores(*change))


class Readings(NamedTuple):
    logp: torch.Tensor
    value: torch.Tensor


def drawn(seed, *, n=None, width=None, size=0.5):
    """A sweep of one eta over ragged rows, at least one token each."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    n, width = n or number(6, 40), width or number(1, 6)
    length = torch.randint(1, width + 1, (n, 1), generator=generator)
    response = torch.arange(width) < length
    group = torch.randint(0, max(n // 3, 2), (n,), generator=generator)
    group[:2] = torch.arange(2)

    def draw(scale):
        x = scale * torch.randn(n, width, generator=generator, dtype=torch.float64)
        return torch.where(response, x, 0.0)

    base, change = Scores(draw(1.0), draw(1.0)), Scores(draw(size)[None], draw(size)[None])
    etas = torch.ones(1, dtype=torch.float64)
    sweep = SimpleNamespace(etas=etas, base=base, change=change)
    return sweep, SimpleNamespace(response=response, group=group)


def taken(sweep, rows, index):
    """The sweep and rows of `index`, a row twice where it stands twice."""
    index = torch.as_tensor(index)
    chosen = SimpleNamespace(
        etas=sweep.etas,
        base=Scores(*(x[index] for x in sweep.base)),
        change=Scores(*(x[:, index] for x in sweep.change)),
    )
    return chosen, SimpleNamespace(response=rows.response[index], group=rows.group[index])
