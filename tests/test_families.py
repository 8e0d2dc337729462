"""Every family under every transform, against finite differences of float64 values.

`python tests/test_families.py` writes the table of measured errors to docs/families.md.
"""

from functools import cache
from pathlib import Path

import cases
import pytest
import reference
import torch

import funcprobe as fp

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
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


def test_the_table_lists_what_is_tested():
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    names = [row.split("|")[1].strip() for row in rows[1:]]
    assert names == cases.FAMILIES
    assert [cell.strip() for cell in rows[0].split("|")[2:-1]] == list(TRANSFORMS)


def table() -> str:
    lines = [
        "# Families and transforms",
        "",
        "Relative error, in float64 / float32, of tiny random models with LoRA on all linear",
        "layers, against float64 differences of a live module whose weights are written in place,",
        "one row at a time. `python tests/test_families.py` writes this table; the tests refuse",
        "more than 1e-6 (1e-5 in second derivatives, where the differences round) and 1e-3.",
        "DoRA is refused by `split`: PEFT detaches its weight norm, so that its derivative is not",
        "that of its values.",
        "",
        "| family | " + " | ".join(TRANSFORMS) + " |",
        "|---" * (len(TRANSFORMS) + 1) + "|",
    ]
    for family in cases.FAMILIES:
        cells = [
            " / ".join(f"{error(family, transform, dtype):.0e}" for dtype in DTYPES)
            for transform in TRANSFORMS
        ]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
