"""How a batch is divided into blocks: by rows, as a whole, or as it divides itself."""

from typing import NamedTuple

import cases
import pytest
import torch

import funcprobe as fp
from funcprobe.calculus.blocks import Cuttable, Identified, cut

PARAMS = {"a": torch.tensor(2.0, dtype=torch.float64)}


class Backwards(NamedTuple):
    """Rows that divide themselves into pairs, from the last to the first."""

    x: torch.Tensor

    def cut(self, elements):
        order = torch.arange(len(self.x)).flip(0)
        return [Backwards(self.x[rows]) for rows in order.split(2)], order


def product(params, batch):
    return params["a"] * batch.x


def sizes(verb):
    """The numbers of rows that a function is called on."""
    seen = []

    def fn(params, batch):
        seen.append(batch.x.shape[0])
        return product(params, batch)

    verb(fn)
    return seen


VERBS = {
    "evaluate": lambda fn, batch, **rows: fp.evaluate(fn, PARAMS, batch, **rows),
    "taylor": lambda fn, batch, **rows: fp.taylor(fn, PARAMS, PARAMS, batch, **rows),
    "gradient": lambda fn, batch, **rows: fp.gradient(fn, PARAMS, batch, **rows),
    "sweep": lambda fn, batch, **rows: fp.sweep(fn, PARAMS, PARAMS, [1.0], batch, **rows),
    "changes": lambda fn, batch, **rows: fp.changes(fn, PARAMS, fp.stack([PARAMS]), batch, **rows),
}


@pytest.mark.parametrize("verb", VERBS)
def test_all_rows_make_one_block_even_of_a_batch_that_divides_itself(verb):
    call, batch = VERBS[verb], Backwards(torch.arange(5.0).double())
    assert set(sizes(lambda fn: call(fn, batch, rows="all"))) == {5}
    assert set(sizes(lambda fn: call(fn, batch))) == {2, 1}
    assert set(sizes(lambda fn: call(fn, batch, rows=4))) == {4, 1}


@pytest.mark.parametrize("rows", [None, "all", 1, 3, 100])
def test_results_come_in_the_rows_own_order(rows):
    batch = Backwards(torch.arange(5.0).double())
    assert fp.evaluate(product, PARAMS, batch, rows=rows).tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    grads = fp.row_gradients(product, PARAMS, batch, rows=rows)
    assert grads["a"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("rows", [0, -1, 2.5, "some"])
def test_other_rows_are_refused(rows):
    batch = Backwards(torch.arange(5.0).double())
    with pytest.raises(ValueError, match="rows must be a positive number.*'all' or None, not"):
        fp.evaluate(product, PARAMS, batch, rows=rows)


def test_lanes_below_one_are_refused():
    batch = Backwards(torch.arange(5.0).double())
    with pytest.raises(ValueError, match="lanes must be a positive number or None, not 0"):
        fp.sweep(product, PARAMS, PARAMS, [1.0], batch, lanes=0)


def test_lanes_make_the_default_block_smaller():
    batch = torch.zeros(1024, 4)
    assert len(next(iter(cut(batch, None)[0]))) == 256
    assert len(next(iter(cut(batch, None, lanes=8)[0]))) == 32


def test_batches_of_the_package_divide_and_identify_themselves():
    assert isinstance(cases.batch(), Cuttable) and isinstance(cases.batch(), Identified)
    assert not isinstance(torch.zeros(2), Cuttable) and not isinstance({}, Identified)
