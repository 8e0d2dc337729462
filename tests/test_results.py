"""Results of blocks joined into those of all rows, which rows they are, and how they print."""

from typing import NamedTuple

import cases
import pytest
import torch

import funcprobe as fp
from funcprobe.calculus.tree import Terms, leaves, tree_map

ETAS = [0.0, 1e-3, 0.1]
PARAMS = {"a": torch.ones((), dtype=torch.float64)}


class Named(NamedTuple):
    """Rows with hashes, to be swept by `product`."""

    x: torch.Tensor
    name: torch.Tensor

    def row_hashes(self):
        return self.name * 10


def named(*names):
    return Named(torch.tensor(names).double(), torch.tensor(names))


def product(params, batch):
    return {"y": torch.exp(params["a"]) * batch.x, "wide": batch.x[:, None] * params["a"]}


def swept(batch, **options):
    return fp.sweep(product, PARAMS, PARAMS, ETAS, batch, **options)


def assert_same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"change": "increment"}, {"nodes": "auto"}, {"nodes": 3, "rows": 1}]
)
def test_a_sweep_and_terms_know_their_rows(options):
    batch = named(3, 1, 2)
    assert swept(batch, **options).row_hashes.tolist() == [30, 10, 20]
    terms = fp.taylor(product, PARAMS, PARAMS, batch, rows=2)
    assert isinstance(terms, Terms) and terms.row_hashes.tolist() == [30, 10, 20]


def test_the_bundled_types_hashes_are_the_batchs():
    case, batch = cases.case(), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    out = fp.sweep(score, case.params, v, ETAS, batch)
    assert torch.equal(out.row_hashes, batch.row_hashes())
    assert torch.equal(fp.taylor(score, case.params, v, batch).row_hashes, batch.row_hashes())


def test_rows_without_hashes_are_unknown():
    batch = torch.arange(3.0).double()
    out = fp.sweep(lambda p, b: p["a"] * b, PARAMS, PARAMS, ETAS, batch)
    terms = fp.taylor(lambda p, b: p["a"] * b, PARAMS, PARAMS, batch)
    assert out.row_hashes is None and terms.row_hashes is None


def test_join_permutes_what_identifies_the_rows():
    order = torch.tensor([2, 0, 1])
    parts = named(30, 10), named(20)
    whole = named(10, 20, 30)
    assert_same(fp.join([swept(part) for part in parts], order), swept(whole))
    terms = [fp.taylor(product, PARAMS, PARAMS, part) for part in parts]
    joined = fp.join(terms, order)
    assert isinstance(joined, Terms)
    assert_same(joined, fp.taylor(product, PARAMS, PARAMS, whole))
    assert joined.row_hashes.tolist() == [100, 200, 300]


def test_join_forgets_the_hashes_that_not_every_part_has():
    sweeps = [swept(named(1)), swept(named(2))._replace(row_hashes=None)]
    assert fp.join(sweeps).row_hashes is None
    terms = [fp.taylor(product, PARAMS, PARAMS, named(i)) for i in (1, 2)]
    joined = fp.join([terms[0], Terms(terms[1])])
    assert joined.row_hashes is None and joined[1]["y"].shape == (2,)


def test_join_takes_the_blocks_of_any_function():
    case, batch = cases.case(), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    blocks, order = fp.by_length(batch, tokens=20)
    assert len(blocks) > 2
    for verb in (
        lambda b: fp.evaluate(score, case.params, b),
        lambda b: fp.taylor(score, case.params, v, b, order=2),
        lambda b: fp.row_gradients(lambda p, b: score(p, b).logp, case.params, b),
    ):
        joined, whole = fp.join(map(verb, blocks), order), verb(batch)
        assert type(joined) is type(whole)
        for x, y in zip(leaves(joined), leaves(whole), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def test_join_refuses_results_of_different_types():
    with pytest.raises(ValueError, match="must all be of one type; these are Sweep, Terms"):
        fp.join([swept(named(1)), fp.taylor(product, PARAMS, PARAMS, named(2))])


def test_terms_are_a_tuple_that_maps_and_copies():
    import copy
    import pickle

    terms = fp.taylor(product, PARAMS, PARAMS, named(1, 2))
    value, slope = terms
    assert value is terms[0] and slope is terms[1] and len(terms) == 2
    for other in (
        tree_map(lambda leaf: leaf, terms),
        pickle.loads(pickle.dumps(terms)),
        copy.deepcopy(terms),
    ):
        assert isinstance(other, Terms)
        assert_same(other, terms)
        assert other.row_hashes.tolist() == [10, 20]


# Within transforms


def test_within_jvp_results_are_tensors_only():
    """torch's transforms take tuples of tensors: no `Terms`, no None."""
    x = torch.arange(3.0).double()

    def fn(params, batch):
        return torch.sin(params["a"] * batch)

    terms, slopes = torch.func.jvp(lambda p: fp.taylor(fn, p, PARAMS, x), (PARAMS,), (PARAMS,))
    assert type(terms) is tuple
    torch.testing.assert_close(slopes[0], terms[1])
    sweep, moved = torch.func.jvp(lambda p: fp.sweep(fn, p, PARAMS, [0.5], x), (PARAMS,), (PARAMS,))
    assert sweep.row_hashes == ()
    torch.testing.assert_close(moved.change[0], x * (torch.cos(1.5 * x) - torch.cos(x)))


def test_hashes_are_not_asked_for_where_a_transform_hides_the_rows():
    class Watched(Named):
        def row_hashes(self):
            assert not asked
            asked.append(1)
            return self.name

    asked = [1]
    batch = Watched(*named(1, 2))

    def at(x):
        out = fp.sweep(product, PARAMS, PARAMS, ETAS, batch._replace(x=x))
        return out.change["y"], fp.taylor(product, PARAMS, PARAMS, batch._replace(x=x))[1]["y"]

    (change, slope), moved = torch.func.jvp(at, (batch.x,), (batch.x,))
    torch.testing.assert_close(moved[0], change)  # it is linear in x
    torch.testing.assert_close(moved[1], slope)
    asked.clear()
    swept(batch)
    assert asked == [1]


# What they print


def test_a_sweep_prints_a_summary():
    out = swept(named(*range(1, 301)), nodes="auto")
    text = repr(out)
    assert text.splitlines() == [
        "Sweep: 3 etas from 0 to 0.1, 300 rows",
        "  base    ['wide'] [300, 1] float64, ['y'] [300] float64",
        "  change  ['wide'] [3, 300, 1] float64, ['y'] [3, 300] float64",
        "  source  1 evaluated, 1 interpolated, 1 zero at eta = 0",
        f"  bound   {float(out.bound.max()):.2g} at most",
    ]
    assert out._repr_html_() == f"<pre>{text}</pre>".replace("'", "&#x27;")
    plain = repr(swept(named(1)))
    assert "source" not in plain and "bound" not in plain


def test_a_sweep_prints_what_went_wrong():
    out = swept(named(1))._replace(fallbacks=("erf",), shrunk=("out of memory at 8 x 4",) * 2)
    assert "subtracted, for want of a rule: erf" in repr(out)
    assert "memory ran out 2 times, first out of memory at 8 x 4" in repr(out)
    repr(out._replace(bound=None, source=None))


def test_terms_print_a_summary():
    terms = fp.taylor(product, PARAMS, PARAMS, named(*range(99)), order=2)
    assert repr(terms) == (
        "Terms: orders 0 to 2, each of ['wide'] [99, 1] float64, ['y'] [99] float64; "
        "rows identified"
    )
    assert "&#x27;" in terms._repr_html_()


def test_a_tree_of_many_leaves_prints_the_first_few():
    many = {f"p{i:02d}": torch.zeros(2) for i in range(30)}
    text = repr(Terms([many, many]))
    assert "['p07'] [2] float32, ... (30 leaves); rows unknown" in text and "p08" not in text
