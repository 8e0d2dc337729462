"""What the package says of a cell, a family with an adapter, and how far that is from the truth."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from time import perf_counter
from typing import Any

import pytest
import torch
import truth
import zoo
from torch import Tensor, nn
from truth import Numbers

import funcprobe as fp

ETA = 1.0  # at which `direction` moves the scores by a tenth of a nat or so
STEP = 1e-4  # of the differences, as part of ETA
SIZE = 0.03  # of the direction, as part of each tensor


@cache
def batch(longest: int | None = None) -> fp.Batch:
    """Eight ragged rows: a prompt of 56 tokens with three responses, one row of 160 tokens.

    Its weights, random numbers, are those of `_loss`: `weight` on logp, `ref_logp` on entropy. With
    `longest`, the rows up to so many tokens.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, zoo.VOCABULARY, (n,), generator=generator).tolist()

    prompts = {56: tokens(56), 1: tokens(1), 150: tokens(150), 20: tokens(20)}
    rows = [(1, 5), (56, 6), (56, 3), (56, 7), (150, 10), (20, 12), (1, 0), (20, 1)]
    out = fp.collate([prompts[p] for p, _ in rows], [tokens(r) for _, r in rows], pad_id=0)
    weights = torch.randn(2, *out.response.shape, generator=generator, dtype=torch.float64)
    out = out._replace(weight=weights[0], ref_logp=weights[1])
    return out if longest is None else out.rows(out.attention.sum(1) <= longest)


SHORT = 64  # tokens of a row: beside longer ones no band allows a prompt to be shared


def direction(params: dict[str, Tensor], *, seed: int = 1) -> dict[str, Tensor]:
    """A random direction, each tensor of it a small part of its parameter's own size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (SIZE * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p)
        * float(p.double().square().mean().sqrt())
        for name, p in params.items()
    }


@dataclass
class Findings:
    """A cell's split and errors.

    An error is the largest one relative to the largest true number; where the package refused, or
    failed, it is the message.
    """

    split: str = ""  # "", or the exception
    seconds: float = 0.0
    false_derivative: str = ""
    longest: int | None = None
    shares: int = 0
    fallbacks: tuple[str, ...] = ()
    looped: tuple[str, ...] = ()
    errors: dict[str, float | str] = field(default_factory=dict)


ALL = (
    "scores", "shared", "moved", "direct", "lanes", "gradient", "rows", "derivative", "increments",
)  # fmt: skip


def examine(
    module: nn.Module,
    *,
    dtype: torch.dtype | None = torch.float64,
    checks: Sequence[str] = ALL,
    longest: int | None = None,
) -> Findings:
    """Splits a live module and holds what the package gives against `truth`.

    Args:
        module: a float32 module.
        dtype: as of `split`.
        checks: the names of the checks, in an order in which none needs a later one.
        longest: only the rows of `batch` up to so many tokens are scored.
    """
    findings = Findings()
    start = perf_counter()
    try:
        model, params, base = fp.split(module, dtype=dtype)
    except Exception as error:
        findings.split = describe(error)
        return findings
    finally:
        findings.seconds = perf_counter() - start
    findings.false_derivative = model.false_derivative
    findings.longest, findings.shares = model.longest, model.shares
    _Examination(findings, module, model, params, base, batch(longest)).run(checks)
    return findings


FEW = ("scores", "shared", "moved", "gradient")


def right(module, *, checks=FEW, longest=None):
    """Asserts that a module splits and that its numbers are right."""
    findings = examine(module, checks=checks, longest=longest)
    assert findings.split == "", findings.split
    wrong = {n: e for n, e in findings.errors.items() if isinstance(e, str) or not e < 1e-6}
    assert not wrong, wrong
    return findings


def refused(module, message):
    """Asserts that `split` says why it refuses a module, in any precision."""
    for dtype in (None, torch.float64):
        with pytest.raises(ValueError, match=f"(?s)split: .*{message}"):
            fp.split(module, dtype=dtype)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Examination:
    """The checks of one cell, each a method that gives (what we say, the truth)."""

    def __init__(self, findings, module, model, params, base, batch):
        self.findings, self.params, self.batch = findings, params, batch
        self.score = fp.scorer(model, base)
        self.v = direction(params)
        self.live = truth.widen(module)
        v = {name: d.double() for name, d in self.v.items()}
        at = truth.along(self.live, v, [0.0, ETA, -STEP, STEP], batch)
        self.here, self.there, self.below, self.above = (torch.stack(x) for x in at)

    def run(self, checks: Sequence[str]) -> None:
        for check in checks:
            try:
                got, want = getattr(self, check)()
                error: float | str = _error(got.double(), want)
            except Exception as problem:
                error = describe(problem)
            self.findings.errors[check] = error

    def scores(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self.score(self.params, self.batch)), self.here

    def shared(self) -> tuple[Tensor, Tensor]:
        short = self.batch.attention.sum(1) <= SHORT
        got = self.score(self.params, self.batch.rows(short))
        return torch.stack(got), self.here[:, short]

    def moved(self) -> tuple[Tensor, Tensor]:
        there = fp.shift(self.params, self.v, ETA)
        return torch.stack(self.score(there, self.batch)), self.there

    def direct(self, **options) -> tuple[Tensor, Tensor]:
        etas = [ETA, -0.5 * ETA]
        got = fp.sweep(self.score, self.params, self.v, etas, self.batch, **options)
        self.findings.looped += got.looped
        return torch.stack(got.change)[:, 0], self.there - self.here

    def lanes(self) -> tuple[Tensor, Tensor]:
        return self.direct(lanes=1)

    def gradient(self) -> tuple[Tensor, Tensor]:
        weights = Numbers(self.batch.weight, self.batch.ref_logp)
        want = truth.gradient(self.live, self.batch, weights)
        self.grads = fp.gradient(_loss(self.score), self.params, self.batch)
        assert self.grads.keys() == want.keys()
        # Each tensor by its own size, so that none hides behind a larger one.
        scales = [want[n].abs().max().clamp(min=1e-8) for n in want]
        got = [self.grads[n].double() / s for n, s in zip(want, scales, strict=True)]
        return _flat(got), _flat([g / s for g, s in zip(want.values(), scales, strict=True)])

    def rows(self) -> tuple[Tensor, Tensor]:
        rows = fp.row_gradients(_loss(self.score), self.params, self.batch)
        return _flat([rows[n].double().sum(0) for n in self.grads]), _flat(
            [g.double() for g in self.grads.values()]
        )

    def derivative(self) -> tuple[Tensor, Tensor]:
        want = (self.above - self.below) / (2 * STEP)
        return torch.stack(fp.taylor(self.score, self.params, self.v, self.batch)[1]), want

    def increments(self) -> tuple[Tensor, Tensor]:
        got = fp.sweep(self.score, self.params, self.v, [ETA], self.batch, change="increment")
        self.findings.fallbacks = tuple(sorted(got.fallbacks))
        return torch.stack(got.change)[:, 0], self.there - self.here


def _loss(score: Any) -> Any:
    """A function of both scores with a weight of its own for each token."""

    def loss(params: Any, rows: fp.Batch) -> Tensor:
        got = score(params, rows)
        return torch.where(rows.response, got.logp * rows.weight + got.entropy * rows.ref_logp, 0.0)

    return loss


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])
