"""Each function of (params, batch), plain and transformed: they agree, and mutate nothing."""

import cases
import pytest
import torch
from torch.func import grad, jvp, vmap

import funcprobe as fp

TIGHT = dict(rtol=1e-11, atol=1e-12)
K = 3
READOUTS = (
    fp.readouts.top_probability,
    fp.readouts.margin,
    fp.readouts.collision_probability,
    fp.readouts.tail_mass(4),
    fp.readouts.eos_probability(cases.EOS),
)


def functions(family):
    case = cases.case(family)
    score = fp.scorer(case.model, case.base)
    narrow = fp.scorer(
        case.model, case.base, sampling=fp.Sampling(1.3, 0.9999), support=case.params
    )
    return {
        "logits": lambda p, b: torch.where(
            b.response.unsqueeze(-1), fp.logits(case.model, p, case.base, b), 0.0
        ),
        "score": lambda p, b: tuple(score(p, b)),
        "chunked": lambda p, b: tuple(fp.scorer(case.model, case.base, chunk=5)(p, b)),
        "nucleus": lambda p, b: narrow(p, b).entropy,
        "readouts": lambda p, b: tuple(
            fp.scorer(case.model, case.base, readout=r)(p, b).value for r in READOUTS
        ),
        "kl": lambda p, b: (
            fp.scorer(
                case.model, case.base, readout=fp.readouts.expected_kl, reference=case.params
            )(p, b).value
        ),
        "reward": lambda p, b: tuple(fp.with_value(score, lambda b: b.reward)(p, b)),
        "reinforce": fp.objective(score, "reinforce"),
        "grpo": fp.objective(score, fp.Recipe(scale="group", beta=0.1, aggregate="sequence_mean")),
        "rloo": fp.objective(score, "rloo"),
    }


def prepared(family, name):
    case, batch = cases.case(family), cases.batch()
    if name not in ("reinforce", "grpo", "rloo"):
        return batch
    score = fp.scorer(case.model, case.base)
    old = score(fp.shift(case.params, cases.direction(case.params, seed=9), 0.02), batch).logp
    recipe = fp.Recipe(scale="group", beta=0.1) if name == "grpo" else name
    return fp.prepare(batch, recipe, old_logp=old, ref_logp=old - 0.1)


NAMES = [
    "logits", "score", "chunked", "nucleus", "readouts", "kl", "reward",
    "reinforce", "grpo", "rloo",
]  # fmt: skip
TABLE = pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in cases.SOME for name in NAMES]
)


def setting(family, name):
    case = cases.case(family)
    points = [fp.shift(case.params, cases.direction(case.params, seed=s), 0.05) for s in range(K)]
    return functions(family)[name], case.params, points, prepared(family, name)


def leaves(tree):
    return list(tree) if isinstance(tree, tuple) else [tree]


def assert_trees(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


def total(fn):
    return lambda params, batch: sum(x.sum() for x in leaves(fn(params, batch)))


def unchanged(*trees):
    """Snapshot of the tensors a call is given, to be compared after it."""
    tensors = [t for tree in trees for t in (tree.values() if isinstance(tree, dict) else tree)]
    return [(t, t._version, t.clone()) for t in tensors]


def assert_unchanged(snapshot):
    for t, version, value in snapshot:
        assert t._version == version
        torch.testing.assert_close(t, value, rtol=0, atol=0, equal_nan=True)


@TABLE
def test_vmap_over_parameters_is_the_loop(family, name):
    fn, params, points, batch = setting(family, name)
    before = unchanged(params, batch, cases.case(family).base)
    loop = [leaves(fn(p, batch)) for p in points]
    stacked = vmap(fn, in_dims=(0, None))(fp.stack(points), batch)
    for i, x in enumerate(leaves(stacked)):
        torch.testing.assert_close(x, torch.stack([out[i] for out in loop]), **TIGHT)
    assert_unchanged(before)


@TABLE
def test_vmap_over_rows_is_the_batch(family, name):
    fn, params, _, batch = setting(family, name)

    def of_row(row):
        return tuple(x[0] for x in leaves(fn(params, fp.Batch(*(x.unsqueeze(0) for x in row)))))

    assert_trees(vmap(of_row)(batch), tuple(leaves(fn(params, batch))))


@TABLE
def test_jvp_is_the_derivative_and_composes_with_vmap(family, name):
    fn, params, points, batch = setting(family, name)
    before = unchanged(params, batch)
    tangents = [cases.direction(params, seed=s + 20) for s in range(K)]

    def push(p, t):
        return jvp(lambda q: fn(q, batch), (p,), (t,))

    loop = [push(p, t) for p, t in zip(points, tangents, strict=True)]
    stacked = vmap(push)(fp.stack(points), fp.stack(tangents))
    for order in (0, 1):
        for i, x in enumerate(leaves(stacked[order])):
            torch.testing.assert_close(
                x, torch.stack([leaves(out[order])[i] for out in loop]), rtol=1e-10, atol=1e-11
            )
    for i, x in enumerate(leaves(loop[0][1])):
        beside = [fp.shift(points[0], tangents[0], h) for h in (1e-6, -1e-6)]
        ahead, behind = (leaves(fn(point, batch))[i] for point in beside)
        slope = (ahead - behind) / 2e-6
        torch.testing.assert_close(x, slope, rtol=1e-5, atol=1e-6 * float(slope.abs().max()))
    assert_unchanged(before)


@TABLE
def test_grad_is_backwards_and_composes_with_vmap(family, name):
    fn, params, points, batch = setting(family, name)
    before = unchanged(params, batch)
    loop = [grad(total(fn))(p, batch) for p in points]
    stacked = vmap(grad(total(fn)), in_dims=(0, None))(fp.stack(points), batch)
    live = {n: p.clone().requires_grad_() for n, p in points[0].items()}
    total(fn)(live, batch).backward()
    scale = max(float(p.grad.abs().max()) for p in live.values())
    for n in params:
        near = dict(rtol=1e-9, atol=1e-12 * max(scale, 1.0))
        torch.testing.assert_close(stacked[n], torch.stack([g[n] for g in loop]), **near)
        torch.testing.assert_close(loop[0][n], live[n].grad, **near)
    tangent = cases.direction(params, seed=30)
    _, slope = jvp(lambda q: total(fn)(q, batch), (points[0],), (tangent,))
    torch.testing.assert_close(slope, fp.dot(loop[0], tangent), rtol=1e-9, atol=1e-9)
    assert_unchanged(before)


@TABLE
def test_the_verbs_agree_with_the_transforms(family, name):
    fn, params, _, batch = setting(family, name)
    v = cases.direction(params)
    before = unchanged(params, v, batch)
    plain = fn(params, batch)
    assert_trees(fp.evaluate(fn, params, batch, rows=3), plain)
    value, slope = fp.taylor(fn, params, v, batch, rows=5)
    assert_trees(value, plain)
    swept = fp.sweep(fn, params, v, [0.0, 1e-3], batch, lanes=2, rows=3)
    assert_trees(swept.base, plain)
    for x, moved, still in zip(
        leaves(swept.change), leaves(fn(fp.shift(params, v, 1e-3), batch)), leaves(plain),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(x[1], moved - still, **TIGHT)
    grads = fp.gradient(fn, params, batch, rows=3)
    rows = fp.row_gradients(fn, params, batch, rows=3)
    for n, g in grads.items():
        torch.testing.assert_close(g, rows[n].sum(0), rtol=1e-9, atol=1e-11)
    total_slope = sum(x.sum() for x in leaves(slope))
    torch.testing.assert_close(total_slope, fp.dot(grads, v), rtol=1e-9, atol=1e-9)
    assert_unchanged(before)
