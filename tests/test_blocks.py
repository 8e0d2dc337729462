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


class Forwards(NamedTuple):
    """A batch that is cut where it is told."""

    x: torch.Tensor


def product(params, batch):
    return params["a"] * batch.x


def sizes(verb):
    """The numbers of rows that a function is called on."""
    seen = []

    def fn(params, batch):
        seen.append(batch.x.shape[0])
        return product(params, batch)

    fn.separable = True
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


def unseparable(params, batch):
    """A loss that divides by its number of rows, which differs from block to block."""
    return params["a"] * batch.x / len(batch.x)


def of_its_group(params, batch):
    """A loss that subtracts the mean of neighbours, two by two."""
    value = params["a"] * batch.x**2
    return value - value.view(-1, 2).mean(1).repeat_interleave(2) if len(value) % 2 == 0 else value


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def summed(params, batch):
    return (params["a"] * batch.x).sum()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fn", [unseparable, of_its_group, summed], ids=lambda fn: fn.__name__)
def test_a_function_whose_rows_depend_on_each_other_is_refused_in_blocks(verb, fn):
    batch = Forwards(torch.arange(1.0, 9.0))
    complaint = "one entry a row" if fn is summed else "rows do not depend on each other"
    for rows in (1, 4):
        message = refusal(lambda rows=rows: VERBS[verb](fn, batch, rows=rows))
        assert message.startswith(f"{fn.__name__}: ") and complaint in message
    if fn is not summed:
        VERBS[verb](fn, batch, rows="all")
    VERBS[verb](product, batch, rows=1)


def test_where_memory_runs_out_fewer_rows_are_checked():
    calls = []

    def limited(params, batch):
        calls.append(len(batch.x))
        if len(batch.x) > 2:
            raise RuntimeError("out of memory")
        return unseparable(params, batch)

    with pytest.raises(ValueError, match="2 rows computed in two parts differ"):
        fp.evaluate(limited, PARAMS, Forwards(torch.arange(1.0, 9.0)), rows=4)
    assert calls == [4, 2, 1, 1]


def test_a_sum_over_rows_has_no_place_for_them():
    with pytest.raises(ValueError, match="lead with their rows .*reduces over its rows"):
        fp.evaluate(summed, PARAMS, Forwards(torch.arange(1.0, 9.0)), rows="all")


def test_rows_differentiated_one_by_one_are_checked_in_one_block_too():
    with pytest.raises(ValueError, match="rows do not depend on each other"):
        fp.row_gradients(unseparable, PARAMS, Forwards(torch.arange(1.0, 9.0)), rows="all")


def test_scorers_and_their_losses_are_taken_at_their_word():
    case = cases.case("llama")
    score = fp.scorer(case.model, case.base)
    assert score.separable and fp.objective(score, "grpo").separable
    read = fp.scorer(case.model, case.base, readout=lambda logits, target: logits[:, 0])
    assert not read.separable
