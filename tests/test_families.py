"""Every family under every transform, against finite differences of float64 values."""

from functools import cache

import cases
import pytest
import reference
import torch

import funcprobe as fp

TRANSFORMS = ("direct", "increment", "jvp", "jvp(jvp)", "grad", "vmap(grad)")
DTYPES = (torch.float64, torch.float32)
LIMIT = {torch.float64: 1e-6, torch.float32: 1e-3}
STEP = 1e-3


def along(family: str, dtype: torch.dtype):
    """The scorer of a family, its parameters, and a direction that moves tokens by about a nat."""
    case = cases.case(family, dtype)
    score = fp.scorer(case.model, case.base)
    v = {n: d.to(dtype) for n, d in cases.direction(case.params, size=0.01).items()}
    return score, case.params, v


@cache
def truth(family: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The change at eta 1 and two derivatives at 0, each [2, N, R].

    They are measured on a live module whose weights are written in place.
    """
    _, _, v = along(family, torch.float64)
    etas = [1.0, *(k * STEP for k in (-2, -1, 1, 2))]
    module = cases.module64(family)
    with torch.no_grad(), reference.float64(module):
        _, change = reference.sweep(module, v, etas, cases.batch())
    end, far, near, on, off = torch.stack(change, 1)
    first = (8 * (on - near) - (off - far)) / (12 * STEP)
    second = (16 * (on + near) - (off + far)) / (12 * STEP**2)
    return end, first, second


def error(family: str, transform: str, dtype: torch.dtype) -> float:
    """The relative error of what a transform gives, against `truth`."""
    score, params, v = along(family, dtype)
    batch = cases.batch()
    end, first, second = truth(family)
    if transform == "direct":
        got, want = fp.sweep(score, params, v, [1.0], batch).change, end
        got = torch.stack(got, 1)[0]
    elif transform == "increment":
        swept = fp.sweep(score, params, v, [1e-9], batch, change="increment")
        assert not swept.fallbacks
        got, want = torch.stack(swept.change, 1)[0].double() / 1e-9, first
    elif transform == "jvp":
        got, want = torch.stack(fp.taylor(score, params, v, batch)[1]), first
    elif transform == "jvp(jvp)":
        got, want = torch.stack(fp.taylor(score, params, v, batch, order=2)[2]), second
    elif transform == "grad":
        got, want = fp.dot(fp.gradient(score, params, batch), v), first.sum()
    else:
        rows = fp.row_gradients(score, params, batch)
        got = sum((rows[n].double() * v[n].double()).flatten(1).sum(1) for n in v)
        want = first.sum((0, 2))
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_transform_is_right(family, transform, dtype):
    rounding = 10 if transform == "jvp(jvp)" and dtype == torch.float64 else 1
    assert error(family, transform, dtype) < rounding * LIMIT[dtype]
