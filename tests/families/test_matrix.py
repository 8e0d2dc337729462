"""Every family and adapter of the table against the live module in float64; see `examine`."""

import re

import examine
import pytest
import torch
from cells import CELLS, CORE, FRESH, Cell
from page import PAGE, page
from zoo import build

import funcprobe as fp

LIMITS = {  # of the largest error, as part of the largest true number
    "scores": 1e-12,
    "shared": 1e-12,
    "moved": 1e-12,
    "direct": 1e-10,
    "lanes": 1e-10,
    "gradient": 1e-9,
    "rows": 1e-10,
    "derivative": 1e-6,  # of which the differences are good for
    "increments": 1e-9,
}


def marked(cell: Cell, every=CORE):
    slow = () if (cell.family, cell.adapter) in every else pytest.mark.slow
    return pytest.param(cell, id=cell.id, marks=slow)


@pytest.mark.filterwarnings("ignore")  # other libraries' own
@pytest.mark.parametrize("cell", [marked(cell) for cell in CELLS])
def test_a_cell_is_as_the_table_says(cell):
    if cell.raises:
        with pytest.raises(Exception, match=cell.raises):
            fp.split(build(cell.family, cell.adapter), dtype=torch.float64)
        return
    module = build(cell.family, cell.adapter)
    findings = examine.examine(module, longest=cell.longest)
    if cell.refused or findings.split:
        assert cell.refused and re.match(f"ValueError: .*{cell.refused}", findings.split)
        return
    assert bool(cell.false_derivative) == bool(findings.false_derivative)
    assert re.search(cell.false_derivative, findings.false_derivative)
    refused = {"increments": cell.increments, "derivative": cell.false_derivative}
    for check, error in findings.errors.items():
        if refused.get(check):
            assert isinstance(error, str) and re.search(refused[check], error), (check, error)
        else:
            assert isinstance(error, float) and error < LIMITS[check], (check, error)
    assert findings.fallbacks == cell.fallbacks
    assert bool(cell.looped) == bool(findings.looped)
    assert re.search(cell.looped, " ".join(findings.looped))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cell", [marked(c, FRESH) for c in CELLS if not c.raises and not c.refused]
)
def test_a_cell_that_is_right_is_never_refused(cell):
    """Moved, and as PEFT makes the adapter, where some tensors have no gradient yet."""
    for fresh, dtype in [(False, None), (True, None), (True, torch.float64)]:
        model, _, _ = fp.split(build(cell.family, cell.adapter, fresh=fresh), dtype=dtype)
        assert bool(model.false_derivative) == bool(cell.false_derivative)


def test_the_page_says_what_is_tested():
    assert PAGE.read_text() == page(), "run python tests/families/page.py"
