"""Identities for any input: affine steps, shifts that add up, rows that do not know each other."""

from functools import cache

import cases
import pytest
import torch
from arrays import SEEDS
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe as fp

NUMBERS = st.floats(-4, 4, allow_nan=False)
SHAPES = {"a": (3, 2), "b": (4,), "c": ()}


def tree(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: size * torch.randn(shape, generator=generator, dtype=torch.float64)
        for n, shape in SHAPES.items()
    }


def combine(*terms):
    return {n: sum(scale * t[n] for scale, t in terms) for n in SHAPES}


def assert_trees(a, b, **tolerance):
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(a[n], b[n], **(tolerance or dict(rtol=1e-11, atol=1e-11)))


# Shifts


@given(SEEDS, NUMBERS, NUMBERS)
def test_shifts_add_up(seed, a, b):
    p, v = tree(seed), tree(seed + 1)
    assert_trees(fp.shift(fp.shift(p, v, a), v, b), fp.shift(p, v, a + b))
    assert_trees(fp.shift(fp.shift(p, v, a), v, -a), p)
    assert_trees(fp.shift(p, v, 0.0), p, rtol=0, atol=0)


@given(SEEDS, NUMBERS)
def test_shifts_of_two_directions_commute_and_scale(seed, a):
    p, v, w = tree(seed), tree(seed + 1), tree(seed + 2)
    both = combine((1.0, v), (a, w))
    assert_trees(fp.shift(fp.shift(p, v, 1.0), w, a), fp.shift(p, both, 1.0))
    assert_trees(fp.shift(p, combine((a, v)), 1.0), fp.shift(p, v, a))


@given(SEEDS, NUMBERS)
def test_the_inner_product_is_one(seed, a):
    u, v, w = tree(seed), tree(seed + 1), tree(seed + 2)
    left = fp.dot(combine((1.0, u), (a, v)), w)
    torch.testing.assert_close(left, fp.dot(u, w) + a * fp.dot(v, w), rtol=1e-10, atol=1e-10)
    assert fp.dot(u, v) == fp.dot(v, u)
    assert fp.norm(u) >= 0 and fp.dot(u, v).abs() <= fp.norm(u) * fp.norm(v) * (1 + 1e-12)


# Steps


def steps(seed):
    params, grads, count = tree(seed), tree(seed + 1), float(seed % 5)
    zero = {n: torch.tensor(count) for n in SHAPES}
    nu = {n: x**2 for n, x in tree(seed + 3).items()}
    state = fp.AdamState(zero, tree(seed + 2), nu)
    shared = dict(lr=0.1, weight_decay=0.3, max_grad_norm=1.0)
    adam = fp.adamw(grads, params, state, betas=(0.9, 0.99), eps=1e-8, **shared)
    return grads, [
        adam,
        fp.sgd(grads, params, tree(seed + 2), momentum=0.9, nesterov=True, **shared),
    ]


@given(SEEDS, NUMBERS, NUMBERS)
def test_a_frozen_step_is_affine_in_the_gradient(seed, a, b):
    grads, made = steps(seed)
    g, h = tree(seed + 7), tree(seed + 8)
    none = {n: torch.zeros_like(x) for n, x in g.items()}
    for step in made:
        rest = fp.direction(step, none)
        assert_trees(rest, combine((1.0, step.momentum), (1.0, step.decay)))
        linear = [
            combine((1.0, fp.direction(step, x)), (-1.0, rest))
            for x in (g, h, combine((a, g), (b, h)))
        ]
        assert_trees(linear[2], combine((a, linear[0]), (b, linear[1])), rtol=1e-9, atol=1e-9)


@given(SEEDS, st.lists(NUMBERS, min_size=1, max_size=5))
def test_any_split_of_the_gradient_adds_up(seed, shares):
    grads, made = steps(seed)
    parts = [combine((x, tree(seed + 20 + i))) for i, x in enumerate(shares)]
    parts.append(combine((1.0, grads), *((-1.0, p) for p in parts)))
    for step in made:
        momentum, decay, rows = fp.decompose(step, fp.stack(parts))
        total = {n: momentum[n] + decay[n] + rows[n].sum(0) for n in SHAPES}
        assert_trees(total, fp.direction(step, grads), rtol=1e-9, atol=1e-9)


@given(SEEDS, st.floats(0.1, 10))
def test_only_ratios_of_rates_matter_to_v(seed, factor):
    params, grads = tree(seed), tree(seed + 1)
    rates = {"a": 0.3, "b": 0.1, "c": 0.2}
    slow = fp.sgd(grads, params, lr=rates, weight_decay=0.1)
    fast = fp.sgd(grads, params, lr={n: factor * r for n, r in rates.items()}, weight_decay=0.1)
    assert_trees(fp.direction(slow, grads), fp.direction(fast, grads))
    torch.testing.assert_close(fast.lr, factor * slow.lr)


# Rows know nothing of each other


READOUTS = {
    "top": fp.readouts.top_probability,
    "margin": fp.readouts.margin,
    "collision": fp.readouts.collision_probability,
    "tail": fp.readouts.tail_mass(4),
    "eos": fp.readouts.eos_probability(cases.EOS),
}
FUNCTIONS = sorted(["score", "to reference", "reward", "kl", *READOUTS, *fp.RECIPES])


@cache
def row_function(name):
    """A function of rows of the llama case, and the batch it takes."""
    case, batch = cases.case("llama"), cases.batch()
    score = fp.scorer(case.model, case.base)
    reference = fp.shift(case.params, cases.direction(case.params, seed=3), 0.05)
    if name == "score":
        return score, batch
    if name == "reward":
        return fp.with_value(score, lambda b: b.reward), batch
    if name == "to reference":
        kl = fp.readouts.expected_kl
        return fp.scorer(case.model, case.base, readout=kl, reference=reference), batch
    if name in READOUTS:
        return fp.scorer(case.model, case.base, readout=READOUTS[name]), batch
    recipe = fp.Recipe(beta=0.2, scale="batch") if name == "kl" else name
    old = score(reference, batch).logp
    loss = fp.objective(score, recipe)
    ready = fp.prepare(batch, recipe, old_logp=old, ref_logp=old)
    return (lambda params, b: (loss(params, b),)), ready


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=8)
@given(index=st.lists(st.integers(0, 7), min_size=1, max_size=9))
def test_every_function_commutes_with_taking_rows(name, index):
    (fn, batch), params = row_function(name), cases.case().params
    index = torch.tensor(index)
    for a, b in zip(fn(params, batch.rows(index)), fn(params, batch), strict=True):
        torch.testing.assert_close(a, b[index], rtol=1e-11, atol=1e-12)


@settings(max_examples=8)
@given(st.permutations(range(8)), st.integers(9, 60))
def test_blocks_join_into_the_whole_in_any_order(order, tokens):
    (score, batch), params = row_function("score"), cases.case().params
    shuffled = batch.rows(torch.tensor(order))
    blocks, back = fp.by_length(shuffled, tokens=tokens)
    v = cases.direction(params)
    joined = fp.join(fp.sweep_blocks(score, params, v, [0.1], blocks), back)
    for a, b in zip(joined.base, score(params, batch), strict=True):
        torch.testing.assert_close(a, b[list(order)], rtol=1e-11, atol=1e-12)


# Purity


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_given_is_changed(name):
    fn, batch = row_function(name)
    params, base = cases.case().params, cases.case().base
    v = cases.direction(params)
    tensors = [*params.values(), *base.values(), *v.values(), *batch]
    before = [(t._version, t.clone()) for t in tensors]
    keys = list(params)
    for _ in range(2):
        fn(params, batch)
        fp.evaluate(fn, params, batch)
        fp.sweep(fn, params, v, [0.0, 0.3], batch)
        fp.changes(fn, params, fp.stack([v, v]), batch, lanes=1)
        fp.gradient(fn, params, batch)
        fp.row_gradients(fn, params, batch)
        fp.taylor(fn, params, v, batch)
        fp.shift(params, v, 0.1)
        fp.by_length(batch, tokens=20)
    for t, (version, value) in zip(tensors, before, strict=True):
        assert t._version == version
        torch.testing.assert_close(t, value, rtol=0, atol=0, equal_nan=True)
    assert list(params) == keys


@given(SEEDS)
def test_entropy_lies_between_0_and_the_log_of_the_vocabulary(seed):
    params = cases.toy_params(seed=seed, counts=False)
    batch = cases.toy_batch(cases.toy_sequences())
    scores = cases.toy_score(params, batch)
    assert (scores.entropy >= 0).all()
    assert (scores.entropy <= torch.tensor(3.0).double().log() + 1e-12).all()
    assert abs(float(scores.logp.sum(-1).exp().sum()) - 1) < 1e-12
