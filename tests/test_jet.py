"""Taylor arithmetic: each rule against high-precision series, whole models against nested jvp."""

import math

import cases
import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap

import funcprobe as fp
from funcprobe.calculus.transforms import jet
from funcprobe.calculus.transforms.carrier import Scope
from funcprobe.calculus.transforms.jet import RULES, Bypassed, Jet, derivatives
from funcprobe.calculus.transforms.nested_jvp import nested

mpmath.mp.dps = 60  # as in test_increment: it is global
ORDER = 4
# Which coefficients of the argument are zero: params + t v has two, what follows has all.
SHAPES = [(0, 1, 2, 3, 4), (0, 1), (0, 2), (0, 1, 3), (0, 4)]


def series(shape, *size, positive=False, seed=0):
    """Random coefficients [ORDER + 1] of the given size, None where not in `shape`."""
    generator = torch.Generator().manual_seed(seed)
    out = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(ORDER + 1)]
    if positive:
        out[0] = out[0].abs() + 0.2
    return [c if k in shape else None for k, c in enumerate(out)]


def run(op, *arguments):
    """The coefficients of ``op(*arguments)`` by rules alone, zeros filled in."""
    scope = Scope(RULES)
    out = op(*(Jet(*a, scope) if isinstance(a, list) else a for a in arguments))
    assert isinstance(out, Jet) and not scope.fallbacks
    assert torch.equal(out.parts[0], op(*(a[0] if isinstance(a, list) else a for a in arguments)))
    assert all(p is None or p.shape == out.shape for p in out.parts)
    assert all(p is None or p.dtype == out.dtype for p in out.parts)
    return torch.stack([torch.zeros_like(out.parts[0]) if p is None else p for p in out.parts])


def by_nested_jvp(op, *arguments):
    """The same by torch's own forward mode in t."""

    def along(t):
        return op(*(horner(a, t) if isinstance(a, list) else a for a in arguments))

    one = torch.ones((), dtype=torch.float64)
    terms = nested(along, torch.zeros_like(one), one, ORDER)
    return torch.stack([term / math.factorial(k) for k, term in enumerate(terms)])


def horner(coefficients, t):
    out = 0.0
    for c in reversed(coefficients):
        out = out * t + (0.0 if c is None else c)
    return out


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def gelu_tanh(x):
    u = mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
    return x * (1 + mpmath.tanh(u)) / 2


# Operation, its high-precision twin, whether it wants a positive argument.
ELEMENTWISE = {
    "exp": (torch.exp, mpmath.exp, False),
    "expm1": (torch.expm1, mpmath.expm1, False),
    "log": (torch.log, mpmath.log, True),
    "log1p": (torch.log1p, mpmath.log1p, True),
    "sqrt": (torch.sqrt, mpmath.sqrt, True),
    "rsqrt": (torch.rsqrt, lambda x: 1 / mpmath.sqrt(x), True),
    "reciprocal": (torch.reciprocal, lambda x: 1 / x, True),
    "sigmoid": (torch.sigmoid, sigmoid, False),
    "tanh": (torch.tanh, mpmath.tanh, False),
    "sin": (torch.sin, mpmath.sin, False),
    "cos": (torch.cos, mpmath.cos, False),
    "silu": (F.silu, lambda x: x * sigmoid(x), False),
    "gelu": (F.gelu, lambda x: x * mpmath.ncdf(x), False),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh, False),
    "square": (torch.square, lambda x: x**2, False),
    "pow 0": (lambda x: x**0, lambda x: x**0, False),
    "pow 1": (lambda x: x**1, lambda x: x, False),
    "pow 2": (lambda x: x**2, lambda x: x**2, False),
    "pow 3": (lambda x: x.pow(3), lambda x: x**3, False),
    "pow 5": (lambda x: x**5, lambda x: x**5, False),
    "pow 2.5": (lambda x: x**2.5, lambda x: x ** mpmath.mpf(2.5), True),
    "pow -1": (lambda x: x**-1, lambda x: 1 / x, True),
    "x x": (lambda x: x * x, lambda x: x**2, False),
    "1 / x": (lambda x: 1 / x, lambda x: 1 / x, True),
    "x / (1 + x^2)": (lambda x: x / (1 + x * x), lambda x: x / (1 + x * x), False),
    "relu": (F.relu, lambda x: x if x.real > 0 else x * 0, False),
    "clamp": (
        lambda x: x.clamp(-0.5, max=1.0),
        lambda x: x if -0.5 <= x.real <= 1 else mpmath.mpf(-0.5 if x.real < 0 else 1),
        False,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules_against_high_precision(name, shape):
    op, exact, positive = ELEMENTWISE[name]
    x = series(shape, 6, positive=positive)
    if name == "pow 0":
        assert torch.equal(op(Jet(*x, Scope(RULES))), torch.ones(6).double())
        return
    got = run(op, x)
    for i in range(6):
        polynomial = [mpmath.mpf(0 if c is None else float(c[i])) for c in x]
        want = mpmath.taylor(lambda t, p=polynomial: exact(mpmath.polyval(p[::-1], t)), 0, ORDER)
        want = torch.tensor([float(mpmath.re(c)) for c in want], dtype=torch.float64)
        scale = want.abs().amax()
        assert torch.allclose(got[:, i], want, rtol=1e-11, atol=1e-12 * float(scale)), (i, want)


def test_a_power_at_zero_has_its_derivatives():
    got = run(lambda x: x**4, [torch.zeros(1).double(), torch.ones(1).double(), None, None, None])
    assert got.flatten().tolist() == [0, 0, 0, 0, 1]
    got = run(lambda x: x**1.5, [torch.zeros(1).double(), torch.ones(1).double()])
    assert got.flatten().tolist() == [0, 0]


def test_kinks_have_the_derivative_that_torch_gives_them():
    x = [torch.tensor([-0.1, 0.0, 0.1]).double(), torch.ones(3).double()]
    for op in (F.relu, lambda x: x.clamp(0.0), lambda x: x.clamp(max=0.0)):
        torch.testing.assert_close(run(op, x), by_nested_jvp(op, x)[:2], rtol=0, atol=0)


W = torch.randn(3, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
MASK = torch.tensor([True, False, True, True, False, True])
ROWS = {
    "softmax": lambda x: x.softmax(-1),
    "softmax dim 0": lambda x: torch.softmax(x, dim=0),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "logsumexp keepdim": lambda x: torch.logsumexp(x, 0, keepdim=True),
    "masked softmax": lambda x: x.masked_fill(MASK, -torch.inf).softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (6,), W[0], W[1]),
    "linear": lambda x: F.linear(x, W, W[:, 0]),
    "moving weight": lambda x: F.linear(W, x[:3] + 1, x[3, :3]),
    "both": lambda x: F.linear(x[:2], x[2:], x[0, :2]),
    "matmul": lambda x: x[:, :4] @ x[:, 2:],
    "batched": lambda x: x.view(2, 2, 6) @ x.view(2, 6, 2),
    "thin": lambda x: (x[:, :1] @ x[:1]) @ (x[:2].T @ x[2:]) + F.linear(x[:, :2], x.T[:, :2]),
    "thin addmm": lambda x: torch.addmm(x[0], x[:, 2:3], x[1:2]),
    "from the right": lambda x: x[:, :2].__rmatmul__(W[:2, :4]) + x[1:, :2].__rmatmul__(x[:2, :3]),
    "bmm": lambda x: torch.bmm(x.view(2, 2, 6), x.view(2, 6, 2)),
    "vector": lambda x: x @ x[0],
    "addmm": lambda x: torch.addmm(x[0, :4], x, x.t()),
    "fixed addmm": lambda x: torch.addmm(W[0], x[:, :3], W),
    "broadcast product": lambda x: x[:, :1] * x[0],
    "broadcast by fixed": lambda x: x[:, :1] * W[0],
    "broadcast quotient": lambda x: x[:, :1] / (3 + x[0].tanh()),
    "fixed quotient": lambda x: W[0] / (3 + x.tanh()),
    "quotient by fixed": lambda x: x[:, :1] / W[0],
    "sums": lambda x: 2 - x[:, :1] + W[0] - x + torch.rsub(x, W[1], alpha=2),
    "alpha": lambda x: torch.add(x, x * x, alpha=3) - torch.sub(W[0], x, alpha=0.5),
    "where": lambda x: torch.where(MASK, x, W[0]) + x.where(MASK, x * x),
    "fill": lambda x: x.masked_fill(MASK, 0.5) + W[0].masked_fill(MASK, 1.0),
    "cat": lambda x: torch.cat([x, W, x * x]) + torch.stack([x[0], W[0], x[1]]).sum(0),
    "pieces": lambda x: torch.cat([x.chunk(2, -1)[1], x.split(2, -1)[0], x.unbind(1)[0][:, None]]
                                  , -1),
    "gather": lambda x: x.gather(-1, torch.tensor([[1], [0], [5], [2]])) * x.mean(-1, True),
    "amax": lambda x: x.amax(-1, keepdim=True) * x + x.amax(0),
    "embedding": lambda x: F.embedding(torch.tensor([[1, 0], [3, 3]]), x),
    "transposes": lambda x: (x.T @ x).mT.reshape(-1).view(6, 6).flip(0).cumsum(1),
    "pad": lambda x: F.pad(x * x, (1, 2)),
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * W[0],
    "in place": lambda x: (x * 1).mul_(x).add_(W[0]).masked_fill_(MASK, 0.0),
    "dropout off": lambda x: F.dropout(x, 0.5, training=False) * x,
    "casts": lambda x: (x.float().double() * 0 + x).type_as(W).to(torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_rules_against_nested_jvp(name, shape):
    x = series(shape, 4, 6, seed=1)
    torch.testing.assert_close(
        run(ROWS[name], x), by_nested_jvp(ROWS[name], x), rtol=1e-10, atol=1e-11
    )


def test_two_series_of_different_lengths_combine():
    """A product of a short and a full series, both ways round."""
    for first, second in ((SHAPES[1], SHAPES[0]), (SHAPES[0], SHAPES[1]), (SHAPES[2], SHAPES[3])):
        x, y = series(first, 4, 4, seed=2), series(second, 4, 4, seed=3)
        for op in (torch.mul, torch.matmul, torch.add, torch.sub, lambda a, b: a / (b + 5)):
            torch.testing.assert_close(
                run(op, x, y), by_nested_jvp(op, x, y), rtol=1e-10, atol=1e-11
            )


@pytest.mark.parametrize(
    "op",
    [
        torch.special.erf,
        lambda x: torch.topk(x, 2, -1).values,
        lambda x: x.sort(-1)[0][:, :2],
        lambda x: torch.maximum(x, x.flip(0)),
        lambda x: x.std(-1),
        lambda x: 2.0**x,
        lambda x: torch.einsum("ij,kj->ik", x, x),
        lambda x: F.softplus(x),
    ],
)
def test_operations_without_a_rule_are_expanded_by_nested_jvp(op):
    x = series(SHAPES[3], 4, 6, seed=4)
    scope = Scope(RULES)
    out = op(Jet(*x, scope))
    assert scope.fallbacks
    want = by_nested_jvp(op, x)
    for part, term in zip(out.parts, want, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(term) if part is None else part, term, rtol=1e-10, atol=1e-11
        )


def test_indices_are_those_of_the_value():
    x = torch.tensor([[1.0, 3.0, 2.0]]).double()
    top = Jet(x, x, None, Scope(RULES)).topk(2)
    assert type(top) is torch.return_types.topk and top.indices.tolist() == [[1, 2]]
    assert not isinstance(top.indices, Jet) and top.values.parts[1].tolist() == [[3.0, 2.0]]


# Whole models


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_families_have_every_rule_and_agree_with_nested_jvp(family, monkeypatch):
    case, batch = cases.case(family), cases.batch(rows=[0, 1, 4])
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)

    def fn(params):
        return tuple(score(params, batch))

    with torch.no_grad():
        want = nested(fn, case.params, v, 3)
        monkeypatch.setattr(Jet, "without_rule", classmethod(_fail))
        for order in (1, 2, 3):
            got = derivatives(fn, case.params, v, order)
            for k, term in enumerate(got):
                assert k or all(map(torch.equal, term, fn(case.params)))  # to the last bit
                for ours, theirs in zip(term, want[k], strict=True):
                    scale = float(theirs.abs().max())
                    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11 * scale)


def _fail(cls, func, *args, **kwargs):
    raise AssertionError(f"{func} has no rule")


def test_frozen_products_run_once_a_coefficient(monkeypatch):
    """The cost of order M: each frozen linear map M + 1 times, and no more."""
    calls = []
    frozen, moving = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    plain = F.linear

    def fn(params, batch):
        return F.linear(torch.tanh(F.linear(batch, params["a"])), frozen)

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    batch = torch.randn(3, 4).double()
    for order in (1, 2, 3):
        rule = RULES[plain]
        seen = []

        def counted(op, x, weight, bias=None, seen=seen, rule=rule):
            def once(a, b, c=None):
                seen.append(b is frozen)
                return op(a, b, c)

            return rule(once, x, weight, bias)

        monkeypatch.setitem(jet.RULES, plain, counted)
        fp.taylor(fn, {"a": moving}, {"a": moving}, batch, order=order)
        monkeypatch.undo()
        assert sum(seen) == order + 1
        assert len(seen) - sum(seen) == 2  # batch times a_0 and a_1


# What a function may do


ONE = torch.tensor([2.0, -1.0]).double()


def along(fn, order=2):
    return [t.tolist() for t in fp.taylor(lambda p, b: fn(p["x"]) * b, {"x": ONE}, {"x": ONE},
                                          torch.ones(2).double(), order=order)]  # fmt: skip


def test_what_is_detached_or_read_is_constant():
    assert along(lambda x: x * x.detach()) == [[4.0, 1.0], [4.0, 1.0], [0.0, 0.0]]
    assert along(lambda x: x * x.data) == [[4.0, 1.0], [4.0, 1.0], [0.0, 0.0]]
    assert along(lambda x: x * x.sum().item()) == [[2.0, -1.0], [2.0, -1.0], [0.0, 0.0]]
    assert along(lambda x: torch.ones_like(x)) == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert along(lambda x: x.long()) == [[2.0, -1.0], [0.0, 0.0], [0.0, 0.0]]


def test_the_branch_taken_is_differentiated():
    assert along(lambda x: torch.where(x > 0, x * x, x)) == [[4.0, -1.0], [8.0, -1.0], [8.0, 0.0]]
    assert along(lambda x: x * x if x.sum() > 0 else x) == [[4.0, 1.0], [8.0, 2.0], [8.0, 2.0]]


def cube(x):
    return x * x * x


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: vmap(cube)(x),
        lambda x: grad(lambda y: (y**4).sum() / 4)(x),
        lambda x: jvp(lambda y: y**4 / 4, (x,), (torch.ones_like(x),))[1],
        lambda x: write(torch.zeros_like(x), cube(x)),
        lambda x: vmap(lambda i: cube(x) * i, out_dims=1)(torch.ones(3).double())[:, 0],
    ],
)
def test_transforms_and_writes_within_the_function(fn):
    want = [[8.0, -1.0], [24.0, -3.0], [48.0, -6.0], [48.0, -6.0]]
    assert along(fn, 3) == want


def write(out, x):
    out[0], out[1] = x[0], x[1]
    return out


def test_a_taylor_within_the_function_is_differentiated():
    """d/dt of f'(x + t v) along v is f'' along v, and so on."""

    def inner(p, b):
        return fp.taylor(lambda q, b: cube(q["x"]) * b, p, {"x": ONE}, b)[1]

    terms = fp.taylor(inner, {"x": ONE}, {"x": ONE}, torch.ones(2).double(), order=2)
    assert [t.tolist() for t in terms] == [[24.0, -3.0], [48.0, -6.0], [48.0, -6.0]]


def test_jvp_of_the_derivatives_and_vmap_over_directions():
    case, batch = cases.case("gpt2"), cases.batch(rows=[0, 1])
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)

    def fn(params):
        return score(params, batch).entropy

    with torch.no_grad():
        want = nested(fn, case.params, v, 2)
        _, outer = jvp(lambda p: derivatives(fn, p, v, 1)[1], (case.params,), (v,))
        torch.testing.assert_close(outer, want[2], rtol=1e-9, atol=1e-10)
        both = fp.stack([v, {name: 2 * d for name, d in v.items()}])
        out = vmap(lambda d: derivatives(fn, case.params, d, 2)[2])(both)
        torch.testing.assert_close(out, torch.stack([want[2], 4 * want[2]]), rtol=1e-9, atol=1e-10)


def test_an_array_cannot_carry_a_derivative():
    with pytest.raises(Bypassed, match="numpy reads a changing tensor as ndarray"):
        derivatives(lambda p: p["x"].numpy(), {"x": ONE}, {"x": ONE}, 1)


def test_nothing_given_is_changed():
    kept = ONE.clone()
    assert along(lambda x: x.add_(1.0)) == [[3.0, 0.0], [2.0, -1.0], [0.0, 0.0]]
    for op in (F.silu, F.relu):
        assert along(lambda x, op=op: op(x, inplace=True)) == along(op)
    assert torch.equal(ONE, kept) and ONE._version == 0
