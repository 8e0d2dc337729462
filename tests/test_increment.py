"""Exact increments: each rule against high-precision arithmetic, whole models against jvp."""

import math

import cases
import mpmath
import pytest
import torch
import torch.nn.functional as F

import funcprobe as fp
from funcprobe import RULES, Increment, increment
from funcprobe.language.head.softmax import logp_and_entropy

mpmath.mp.dps = 60
SIZES = [0.0, *(sign * 10.0**e for e in (-30, -12, -7, -3, -1, 0, 1, 2) for sign in (1, -1))]


def change(op, x, d, **kwargs):
    """op(x + d) - op(x) by the rules, which must not fall back."""
    inc = increment(lambda p, _: op(p["x"], **kwargs), {"x": x}, {"x": d})
    value, out = inc(None)
    assert torch.equal(value, op(x, **kwargs)) and not inc.fallbacks
    return out


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def normal(x):
    return mpmath.erfc(-x / mpmath.sqrt(2)) / 2


def gelu_tanh(x):
    return x * sigmoid(2 * mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3))


def gate(exact, x):
    return exact(x) / x if x else mpmath.mpf(0.5)


# Operation, its high-precision twin, where it is defined, and the points at which its derivative
# vanishes between terms of opposite sign (there only the terms' size can be asked for).
ELEMENTWISE = {
    "exp": (torch.exp, mpmath.exp, lambda x: abs(x) < 80, None),
    "expm1": (torch.expm1, mpmath.expm1, lambda x: abs(x) < 80, None),
    "log": (torch.log, mpmath.log, lambda x: x > 0, None),
    "log1p": (torch.log1p, mpmath.log1p, lambda x: x > -0.9, None),
    "sqrt": (torch.sqrt, mpmath.sqrt, lambda x: x > 0, None),
    "rsqrt": (torch.rsqrt, lambda x: 1 / mpmath.sqrt(x), lambda x: x > 0, None),
    "reciprocal": (torch.reciprocal, lambda x: 1 / x, lambda x: abs(x) > 1e-20, None),
    "sigmoid": (torch.sigmoid, sigmoid, lambda x: abs(x) < 80, None),
    "tanh": (torch.tanh, mpmath.tanh, lambda x: abs(x) < 40, None),
    "relu": (torch.relu, lambda x: max(x, mpmath.mpf(0)), lambda x: True, None),
    "sin": (torch.sin, mpmath.sin, lambda x: abs(x) < 2, None),
    "cos": (torch.cos, mpmath.cos, lambda x: 0.01 < abs(x) < 2, "cos"),
    "square": (torch.square, lambda x: x * x, lambda x: True, "square"),
    "pow 3": (lambda x: x.pow(3), lambda x: x**3, lambda x: True, "square"),
    "silu": (F.silu, lambda x: x * sigmoid(x), lambda x: abs(x) < 80, "gate"),
    "gelu": (F.gelu, lambda x: x * normal(x), lambda x: abs(x) < 8, "gate"),
    "gelu tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        gelu_tanh,
        lambda x: abs(x) < 3,
        "gate",
    ),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_elementwise_rules_at_every_size_and_sign(name, dtype):
    op, exact, defined, floor = ELEMENTWISE[name]
    x, d = (
        t.flatten() for t in torch.meshgrid(*[torch.tensor(SIZES, dtype=dtype)] * 2, indexing="ij")
    )
    keep = [i for i in range(len(x)) if defined(float(x[i])) and defined(float(x[i]) + float(d[i]))]
    x, d = x[keep], d[keep]
    got = change(op, x, d)
    rounding, least = 2e-14 if dtype == torch.float64 else 1e-5, torch.finfo(dtype).tiny
    for a, b, c in zip(x.tolist(), d.tolist(), got.tolist(), strict=True):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        want = exact(a + b) - exact(a)
        size = abs(want)
        if floor == "gate":  # d f(x + d) / (x + d) and x times the gate's change
            size = abs(b * gate(exact, a + b)) + abs(a * (gate(exact, a + b) - gate(exact, a)))
        elif floor == "square":
            size = abs(b) * (abs(a) + abs(b)) ** (1 if name == "square" else 2)
        elif floor == "cos":
            size = 2 * abs(mpmath.sin(b / 2))
        assert abs(c - want) <= rounding * size + 4 * least, (float(a), float(b), c, float(want))


def high(op, x, d):
    """A whole-row operation's change in 60 digits."""
    rows = []
    for a, b in zip(x.tolist(), d.tolist(), strict=True):
        moved = op([mpmath.mpf(p) + mpmath.mpf(q) for p, q in zip(a, b, strict=True)])
        still = op([mpmath.mpf(p) for p in a])
        rows.append([float(p - q) for p, q in zip(moved, still, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def softmax(row):
    e = [mpmath.exp(t) for t in row]
    return [t / mpmath.fsum(e) for t in e]


def standardise(row):
    mean = mpmath.fsum(row) / len(row)
    var = mpmath.fsum((t - mean) ** 2 for t in row) / len(row)
    return [(t - mean) / mpmath.sqrt(var + mpmath.mpf(1e-5)) for t in row]


ROWS = {
    "softmax": (lambda x: x.softmax(-1), softmax),
    "log_softmax": (lambda x: x.log_softmax(-1), lambda r: [mpmath.log(p) for p in softmax(r)]),
    "logsumexp": (
        lambda x: x.logsumexp(-1, keepdim=True),
        lambda r: [mpmath.log(mpmath.fsum(mpmath.exp(t) for t in r))],
    ),
    "layer_norm": (lambda x: F.layer_norm(x, (x.shape[-1],)), standardise),
    "amax": (lambda x: x.amax(-1, keepdim=True), lambda r: [max(r)]),
    "topk": (lambda x: x.topk(4).values, lambda r: sorted(r, reverse=True)[:4]),
    "topk least": (lambda x: torch.topk(x, 3, 1, False)[0], lambda r: sorted(r)[:3]),
    "division": (
        lambda x: x[:, :2] / (2 + x[:, 2:4].tanh()),
        lambda r: [r[i] / (2 + mpmath.tanh(r[i + 2])) for i in (0, 1)],
    ),
    "product": (lambda x: x[:, :3] * x[:, 3:], lambda r: [r[i] * r[i + 3] for i in range(3)]),
    "matmul": (
        lambda x: (x[:, :3].unsqueeze(1) @ x[:, 3:].unsqueeze(2)).squeeze(2),
        lambda r: [mpmath.fsum(r[i] * r[i + 3] for i in range(3))],
    ),
    "clamp": (
        lambda x: x.clamp(-0.5, 1.0),
        lambda r: [min(max(t, mpmath.mpf(-0.5)), mpmath.mpf(1)) for t in r],
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-3, 1.0, 10.0])
def test_row_rules_at_every_size(name, dtype, size):
    op, exact = ROWS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)
    d = (size * torch.randn(8, 6, generator=generator, dtype=torch.float64)).to(dtype)
    want, got = high(exact, x, d), change(op, x, d).double()
    rounding = 1e-13 if dtype == torch.float64 else 1e-5
    if size > 1:
        rounding *= 1e3  # probabilities near 0 and 1: the remainder of log1p cancels
    assert (got - want).abs().amax() <= rounding * want.abs().amax()


def test_the_indices_of_order_statistics_move_too():
    x, d = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[0.0, 1.5, 0.0]]).double()

    def fn(params, _):
        index = params["x"].topk(2).indices
        return torch.tensor([[10.0, 20.0, 30.0]]).double().gather(-1, index)

    inc = increment(fn, {"x": x}, {"x": d})
    value, out = inc(None)
    assert value.tolist() == [[30.0, 20.0]] and out.tolist() == [[-10.0, 10.0]]


def test_minus_infinity_and_masks_stay_finite():
    x = torch.tensor([[0.5, -torch.inf, 1.0]], dtype=torch.float64)
    d = torch.tensor([[1e-9, 0.0, -2e-9]], dtype=torch.float64)
    for op in (torch.softmax, torch.log_softmax):
        out = change(lambda z, op=op: op(z, -1), x, d)
        assert out[:, [0, 2]].isfinite().all()
    filled = change(
        lambda z: z.masked_fill(torch.tensor([True, False, False]), -torch.inf), x[:, [0, 2, 2]], d
    )
    assert filled[0, 0] == 0
    logits = torch.tensor([[0.5, 0.1, 1.0]], dtype=torch.float64)

    def score(p, _):
        z = p["x"].masked_fill(torch.tensor([False, True, False]), -torch.inf)
        return torch.stack(logp_and_entropy(z.split(2, -1), torch.tensor([2])))

    _, out = increment(score, {"x": logits}, {"x": d})(None)
    _, slope = torch.func.jvp(lambda z: score({"x": z}, None), (logits,), (d,))
    assert torch.allclose(out, slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_families_have_every_rule_and_agree_with_derivative_and_difference(family):
    for dtype, close in ((torch.float64, 1e-7), (torch.float32, 3e-5)):
        case, batch = cases.case(family, dtype), cases.batch()
        score = fp.scorer(case.model, case.base)
        v = cases.direction(case.params)
        tiny = fp.sweep(score, case.params, v, [1e-12, -1e-10], batch, change="increment")
        assert tiny.fallbacks == ()
        _, slope = fp.taylor(score, case.params, v, batch)
        for got, want in zip(tiny.change, slope, strict=True):
            for k, eta in enumerate((1e-12, -1e-10)):
                assert (got[k] / eta - want).norm() <= close * want.norm()
    case = cases.case(family, torch.float64)
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    exact = fp.sweep(score, case.params, v, [1e-3, 0.1], cases.batch(), change="increment")
    plain = fp.sweep(score, case.params, v, [1e-3, 0.1], cases.batch())
    for got, want in zip(exact.change, plain.change, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_the_value_is_the_plain_function_bit_for_bit():
    case, batch = cases.case("llama", torch.float32), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    with torch.no_grad():
        plain = score(case.params, batch)
        value, _ = increment(score, case.params, v)(batch)
    assert all(torch.equal(a, b) for a, b in zip(value, plain, strict=True))


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
def test_lanes_change_nothing_and_zeros_stay_exact(lanes):
    case, batch = cases.case("gemma2", torch.float64), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    same = {"change": "increment", "rows": 3, "lanes": lanes}
    got = fp.sweep(score, case.params, v, [0.0, 1e-6, 1e-3], batch, **same)
    want = fp.sweep(score, case.params, v, [0.0, 1e-6, 1e-3], batch, change="increment", lanes=3)
    assert torch.allclose(got.change.logp, want.change.logp, rtol=1e-9, atol=1e-18)
    assert (got.change.logp[0] == 0).all() and (got.change.entropy[0] == 0).all()
    still = {name: torch.zeros_like(d) for name, d in v.items()}
    got = fp.sweep(score, case.params, still, [1.0, 2.0], batch, **same)
    assert (got.change.logp == 0).all() and (got.change.entropy == 0).all()


def test_operations_without_a_rule_are_subtracted_and_named():
    x, d = (
        torch.tensor([0.3, 0.4], dtype=torch.float64),
        torch.full((2,), 1e-3, dtype=torch.float64),
    )

    def fn(params, batch):
        return torch.special.erf(params["x"]) * batch

    batch = torch.ones(2, dtype=torch.float64)
    inc = increment(fn, {"x": x}, {"x": d})
    _, out = inc(batch)
    assert (
        torch.allclose(out, torch.erf(x + d) - torch.erf(x), rtol=1e-12) and len(inc.fallbacks) == 1
    )
    result = fp.sweep(fn, {"x": x}, {"x": d}, [1.0], batch, change="increment")
    assert result.fallbacks == tuple(inc.fallbacks)

    def rule(op, a):
        return op(a.x), a.d * 2 / math.sqrt(math.pi) * torch.exp(-((a.x + a.d / 2) ** 2))

    rules = RULES | {torch.special.erf: rule}
    inc = increment(fn, {"x": x}, {"x": d * 1e-9}, rules=rules)
    _, out = inc(batch)
    slope = 2 / math.sqrt(math.pi) * torch.exp(-x * x) * d * 1e-9
    assert not inc.fallbacks and torch.allclose(out, slope, rtol=1e-9, atol=0)


def test_a_jump_is_refused():
    def fn(params, batch):
        return torch.where(params["x"] > 0, params["x"], batch)

    with pytest.raises(ValueError, match="may jump"):
        increment(fn, {"x": torch.ones(2)}, {"x": torch.ones(2)})(torch.zeros(2))


def test_nothing_is_changed():
    case, batch = cases.case("llama", torch.float64), cases.batch()
    v = cases.direction(case.params)
    before = {n: (t._version, t.clone()) for n, t in (case.params | case.base).items()}
    fp.sweep(fp.scorer(case.model, case.base), case.params, v, [1e-3], batch, change="increment")
    for name, tensor in (case.params | case.base).items():
        version, copy = before[name]
        assert tensor._version == version and torch.equal(tensor, copy)
    assert isinstance(Increment(torch.ones(1), torch.ones(1), None), torch.Tensor)


@pytest.fixture(scope="module")
def bundled_sweeps(checkpoint, update, evaluation):
    """Float32 and float64, increments and differences, at learning rates of every size."""
    narrow = fp.load_checkpoint(checkpoint.path, dtype=torch.float32)
    batch = evaluation.rows(slice(0, 96))
    etas = torch.logspace(-12, -3, 10, dtype=torch.float64)
    v = cases.direction(checkpoint.params)
    out = {}
    for name, ckpt in (("float64", checkpoint), ("float32", narrow)):
        score = fp.scorer(ckpt.model, ckpt.base)
        same = {n: d.to(ckpt.params[n].dtype) for n, d in v.items()}
        for mode in ("increment", "direct"):
            out[name, mode] = fp.sweep(score, ckpt.params, same, etas, batch, change=mode)
    terms = fp.taylor(fp.scorer(checkpoint.model, checkpoint.base), checkpoint.params, v, batch)
    return etas, batch, out, terms


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_right_at_any_learning_rate(bundled_sweeps, per):
    etas, batch, sweeps, terms = bundled_sweeps
    change = {key: fp.entropy_change(s, batch, per=per).value for key, s in sweeps.items()}
    exact = change["float64", "increment"]
    large = etas >= 1e-7
    assert torch.allclose(exact[large], change["float64", "direct"][large], rtol=1e-7, atol=0)
    assert torch.allclose(change["float32", "increment"], exact, rtol=1e-3, atol=0)
    rough = (change["float32", "direct"] / exact - 1).abs()
    assert (rough[etas < 1e-6] > 0.05).all()
    slope = fp.entropy_series(terms, batch, per=per).value[0]
    assert abs(float(exact[0] / etas[0] / slope) - 1) < 1e-6
    assert abs(float(change["float32", "increment"][0] / etas[0] / slope) - 1) < 1e-3


def test_operations_in_place_rebind_and_touch_nothing():
    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    d = torch.tensor([1e-9, -1e-9], dtype=torch.float64)
    kept = x.clone()

    def fn(params, _):
        h = params["x"]
        h += 1.0
        h.mul_(params["x"] * 0 + 3.0)
        h.masked_fill_(torch.tensor([False, True]), 0.0)
        return h

    value, out = increment(fn, {"x": x}, {"x": d})(None)
    assert torch.equal(x, kept)
    assert torch.allclose(value, torch.tensor([4.5, 0.0]).double())
    assert torch.allclose(out, torch.tensor([3e-9, 0.0], dtype=torch.float64), rtol=1e-12, atol=0)

    def writes(params, _):
        out = torch.zeros(2, dtype=torch.float64)
        out[0] = params["x"][0]
        return out

    with pytest.raises(ValueError, match="writes a changing tensor"):
        increment(writes, {"x": x}, {"x": d})(None)


@pytest.mark.parametrize(
    ("fn", "want"),
    [
        (lambda x: torch.where(torch.ones(3, 1, dtype=torch.bool), x[:1], 0.0).sum(), 3.0),
        (lambda x: x.where(torch.tensor([True, False]), torch.zeros(2).double()), [1.0, 0.0]),
        (lambda x: torch.where(torch.tensor([True, False]), input=x, other=-x), [1.0, 1.0]),
        (lambda x: torch.sum(input=x), 0.0),
        (lambda x: x.add(other=x), [2.0, -2.0]),
        (lambda x: x.div(other=2.0), [0.5, -0.5]),
        (lambda x: x.pow(exponent=2), [2.0, -4.0]),
        (lambda x: torch.rsub(x, 1.0), [-1.0, 1.0]),
        (lambda x: 1.0 - x, [-1.0, 1.0]),
        (lambda x: 1.0 / x, [-1.0, 0.25]),
        (lambda x: x.float() + torch.zeros(2).double(), [1.0, -1.0]),
        (
            lambda x: F.embedding(torch.tensor([1, 0, 1]), x.unsqueeze(1)).squeeze(1),
            [-1.0, 1.0, -1.0],
        ),
        (lambda x: torch.addmm(x, torch.eye(2).double(), x.diag()), [[2.0, -1.0], [1.0, -2.0]]),
        (lambda x: torch.stack(torch.unbind(x)[::-1]), [-1.0, 1.0]),
        (lambda x: torch.stack(list(x.chunk(2)), 1), [[1.0, -1.0]]),
    ],
)
def test_every_spelling_has_a_rule(fn, want):
    """Derivatives at [1, 2] along [1, -1], by a tiny increment."""
    x, d = torch.tensor([1.0, 2.0]).double(), torch.tensor([1e-9, -1e-9]).double()
    _, out = increment(lambda p, _: fn(p["x"]), {"x": x}, {"x": d})(None)
    assert torch.allclose(out.double() / 1e-9, torch.tensor(want).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "complaint"),
    [
        (lambda x: x.to(torch.int64), "may jump"),
        (lambda x: F.dropout(x, 0.5, training=True), "random"),
        (lambda x: x.sum().item() * x, "reads a changing tensor"),
    ],
)
def test_what_has_no_increment_is_refused(fn, complaint):
    with pytest.raises(ValueError, match=complaint):
        increment(lambda p, _: fn(p["x"]), {"x": torch.ones(2)}, {"x": torch.ones(2)})(None)


def test_names_are_checked():
    with pytest.raises(ValueError, match="typo"):
        increment(
            lambda p, _: p["x"], {"x": torch.ones(2)}, {"x": torch.ones(2), "typo": torch.ones(2)}
        )


def test_a_token_that_becomes_likely_at_once_overflows_nothing():
    """A logit moves by 150 nats in one step: e^150 is beyond float32."""
    x = torch.tensor([[0.0, -120.0, 3.0]])
    d = torch.tensor([[0.0, 150.0, -1.0]])

    def score(p, _):
        return torch.stack(logp_and_entropy(p["x"].split(2, -1), torch.tensor([1])))

    value, change = increment(score, {"x": x}, {"x": d})(None)
    want = score({"x": (x + d).double()}, None) - score({"x": x.double()}, None)
    assert torch.allclose(change.double(), want, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("matmul", ["tf32", "bfloat16"])
def test_products_in_lower_precision_round_the_changes_alone(matmul):
    """The values do not change; the changes by a rounding of that precision and no more."""
    case, batch = cases.case("llama", torch.float32), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    same = {"change": "increment", "lanes": 2}
    full = fp.sweep(score, case.params, v, [1e-9, 1e-4], batch, **same)
    low = fp.sweep(score, case.params, v, [1e-9, 1e-4], batch, matmul=matmul, **same)
    for a, b in zip(low.base, full.base, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(low.change, full.change, strict=True):
        off = float((a - b).norm() / b.norm())
        assert off < (1e-2 if matmul == "tf32" else 5e-2)
        if matmul == "bfloat16":
            assert off > 1e-4


def test_the_precision_of_products_is_the_callers_again():
    before = torch.backends.mkldnn.matmul.fp32_precision
    case, batch = cases.case("llama", torch.float32), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    fp.sweep(score, case.params, v, [1e-4], batch, change="increment", matmul="tf32")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_precision_that_does_not_exist_or_does_not_apply():
    case, batch = cases.case("llama", torch.float32), cases.batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    with pytest.raises(ValueError, match="not 'fp8'"):
        fp.sweep(score, case.params, v, [1e-4], batch, change="increment", matmul="fp8")
    with pytest.raises(ValueError, match="would drown"):
        fp.sweep(score, case.params, v, [1e-4], batch, matmul="bfloat16")


def test_carriers_and_the_transformed_function_print_shapes():
    x = torch.full((2, 3), 0.125, dtype=torch.float64)
    shown = []

    def fn(params, batch):
        shown.append(repr(params["x"]))
        return torch.special.erf(params["x"]) * batch

    inc = increment(fn, {"x": x}, {"x": x}, matmul="tf32")
    inc(torch.ones(2, 3))
    assert shown == ["Increment(shape=[2, 3], dtype=torch.float64, parts=2, zero parts=0)"]
    assert repr(inc) == "Incremented(fn, 1 tensors, matmul='tf32', fallbacks={'special_erf': 1})"


def test_a_transform_within_the_function_is_refused():
    def fn(params, _):
        return torch.func.vmap(torch.sin)(params["x"])

    with pytest.raises(ValueError, match="increment: .* bypassed the rules"):
        increment(fn, {"x": torch.ones(2)}, {"x": torch.ones(2)})(None)
