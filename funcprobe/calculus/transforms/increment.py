r"""Exact finite increments: f(p + d) - f(p) without subtracting two large numbers.

An `Increment` is a tensor x together with a change d; it stands for x and for x + d at once. Every
operation has a rule that gives its own change from those of its arguments at full relative
precision, as forward-mode differentiation has a rule for its derivative, but exact for finite d:

.. math:: \Delta(ab) = \Delta a \, b + (a + \Delta a) \Delta b, \qquad
          \Delta e^x = e^x (e^d - 1), \qquad \Delta x^{-1/2} = -d / (s s' (s + s')), \ s = \sqrt x.

So an unmodified model runs on parameters that are Increments, and its change comes out right in
float32 at any size of d, down to 1e-12 and below, where the difference of two float32 values is
noise. Under `vmap` over d with x unbatched all lanes share one computation of the values.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import products
from ..tree import Params, check_direction, tree_map
from .carrier import Carrier, Scope, find, nested_map, table, value_of
from .elementwise import CHANGES, d_logsumexp, d_normal, d_reciprocal, d_rsqrt, d_sigmoid, d_sqrt
from .linear import LINEAR
from .nested_jvp import layer_norm


@dataclass
class Increments(Scope):
    """What the Increments of one evaluation share."""

    matmul: str | None = None  # the precision of the changes' products, None for full


class Increment(Carrier):
    """A tensor `x` and its change `d`, of one shape and dtype: ``Increment(x, d, scope)``."""

    @property
    def x(self) -> Tensor:
        """The value."""
        return self.parts[0]

    @property
    def d(self) -> Tensor:
        """Its change."""
        return self.parts[1] if self.parts[1] is not None else torch.zeros_like(self.x)

    @property
    def moved(self) -> Tensor:
        """x + d."""
        return self.x + self.d

    @classmethod
    def without_rule(cls, func, *args, **kwargs):
        """Evaluates twice and subtracts."""
        first = func(*nested_map(value_of, args), **nested_map(value_of, kwargs))
        moved = func(*nested_map(_moved, args), **nested_map(_moved, kwargs))
        if isinstance(first, tuple | list):
            return tuple(first), tuple(m - v for v, m in zip(first, moved, strict=True))
        if not isinstance(first, Tensor):
            cls.refuse(f"{func.__name__} reads a changing tensor as {first!r}.")
        if not first.is_floating_point():
            cls.refuse(
                f"{func.__name__} of a changing tensor gives {first.dtype}, and what follows "
                "may jump. Give it a rule, or take it of a fixed tensor."
            )
        return first, moved - first

    @classmethod
    def refuse(cls, reason: str):
        """Raises ValueError."""
        raise ValueError(f"increment: {reason}")


def increment(
    fn: Callable,
    params: Params,
    delta: Params,
    *,
    rules: dict | None = None,
    matmul: str | None = None,
) -> Callable:
    """The transform: ``fn'(batch) -> (fn(params, batch), fn(params + delta, batch) - same)``.

    Exact in the sense that the change has full relative precision, whatever its size, wherever
    every operation has a rule; one without falls back to a subtraction, which is right but rounds
    like one. The returned function's attribute ``fallbacks`` counts those, by name.

    Args:
        fn: ``(params, batch) -> tree`` of tensors.
        params: the parameters.
        delta: their change, of the same names and shapes.
        rules: a table instead of `RULES`; extend it by ``RULES | {op: rule}``. A rule gets the
            operation and its arguments, some of them Increments, and returns (value, change).
        matmul: "tf32" or "bfloat16" runs the matrix products of the changes, not of the values, in
            that precision: each change is then good to some 1e-3 or 1e-2 of itself. Hardware
            without TF32 computes in full.

    Raises:
        ValueError: names or shapes that do not fit, another `matmul`; where the function is called,
            an operation whose result may jump (a comparison), or that writes a change into a fixed
            tensor.
    """
    check_direction("increment", delta, params)
    if matmul not in (None, "tf32", "bfloat16"):
        raise ValueError(f"increment: matmul must be None, 'tf32' or 'bfloat16', not {matmul!r}.")
    scope = Increments(RULES if rules is None else rules, matmul=matmul)

    def changed(batch):
        moving = {name: Increment(p, delta[name].to(p), scope) for name, p in params.items()}
        out = fn(moving, batch)
        return tree_map(value_of, out), tree_map(_change, out)

    changed.fallbacks = scope.fallbacks
    return changed


def _change(leaf: Tensor) -> Tensor:
    return leaf.d if isinstance(leaf, Increment) else torch.zeros_like(leaf)


def _moved(leaf):
    return leaf.moved if isinstance(leaf, Increment) else leaf


# Rules of what is not linear. Each takes the operation and its arguments and returns
# (value, change).


def _dropout(op, a, p=0.5, training=True, inplace=False):
    if training and p > 0:
        Increment.refuse("dropout is on, so the function is random. Call eval().")
    return a.x, a.d


def _elementwise(change: Callable):
    """A rule from ``change(y, x, d)``, with y = op(x)."""

    def rule(op, a, *args, **kwargs):
        kwargs.pop("inplace", None)
        y = op(a.x, *args, **kwargs)
        return y, change(y, a.x, a.d)

    return rule


def _product(op, a, b, *args, **kwargs):
    """Whatever is linear in either of its two arguments."""
    x, y = value_of(a), value_of(b)
    value = op(x, y, *args, **kwargs)
    if not isinstance(b, Increment):
        return value, op(a.d, y, *args, **kwargs)
    if not isinstance(a, Increment):
        return value, op(x, b.d, *args, **kwargs)
    return value, op(a.d, y, *args, **kwargs) + op(a.moved, b.d, *args, **kwargs)


def _matmul(op, a, b):
    """A product of matrices, whose change may be computed in lower precision."""
    scope, x, y = find((a, b)).scope, value_of(a), value_of(b)
    terms = []
    if isinstance(a, Increment):
        terms.append((a.d, y))
    if isinstance(b, Increment):
        terms.append((_moved(a), b.d))
    if scope.matmul == "bfloat16":
        parts = [op(p.bfloat16(), q.bfloat16()).to(x.dtype) for p, q in terms]
    else:
        with products(scope.matmul) if scope.matmul else nullcontext():
            parts = [op(p, q) for p, q in terms]
    return op(x, y), parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _linear(op, x, weight, bias=None):
    value, change = (
        _matmul(op, x, weight) if find((x, weight)) is not None else (op(x, weight), None)
    )
    if bias is None:
        return value, change
    if isinstance(bias, Increment):
        change = bias.d.expand(value.shape) if change is None else change + bias.d
    return value + value_of(bias), change


def _addmm(op, bias, a, b, *, beta=1, alpha=1):
    return _linear(torch.mm, a, b, bias) if beta == alpha == 1 else NotImplemented


def _divide(op, a, other, *, rounding_mode=None):
    if rounding_mode is not None:
        return NotImplemented
    b = other
    x, y = value_of(a), value_of(b)
    q = op(x, y)
    if not isinstance(b, Increment):
        return q, op(a.d, y)
    numerator = -q * b.d if not isinstance(a, Increment) else a.d - q * b.d
    return q, numerator / b.moved


def _divided(op, a, other):
    return _divide(lambda x, y: op(y, x), other, a)


def _power(op, a, exponent):
    n = exponent
    if isinstance(a, Increment) and not isinstance(n, Tensor):
        x, d, y = a.x, a.d, op(value_of(a), n)
        if n == 2:
            return y, d * (2 * x + d)
        if n == 3:
            return y, d * (3 * x * (x + d) + d * d)
        if n == 0.5:
            return y, d_sqrt(y, x, d)
        if n == -0.5:
            return y, d_rsqrt(y, x, d)
        if n == -1:
            return y, d_reciprocal(y, x, d)
    return NotImplemented


def _clamp(op, a, min=None, max=None):
    if find((min, max)) is not None:
        return NotImplemented
    x, d = a.x, a.d
    y, moved = op(x, min=min, max=max), op(x + d, min=min, max=max)
    return y, torch.where((y == x) & (moved == x + d), d, moved - y)


def _amax(op, a, dim=(), keepdim=False):
    """The maximum moves with the element that becomes the largest."""
    if not isinstance(dim, int):
        return NotImplemented
    largest = a.x.amax(dim, keepdim=True)
    index = a.moved.argmax(dim, keepdim=True)
    change = a.d.gather(dim, index) + (a.x.gather(dim, index) - largest)
    if not keepdim:
        largest, change = largest.squeeze(dim), change.squeeze(dim)
    return largest, change


def _maximum(op, a, b):
    x, y = value_of(a), value_of(b)
    value = torch.maximum(x, y)
    da, db = (t.d if isinstance(t, Increment) else torch.zeros_like(value) for t in (a, b))
    return value, torch.where(x + da >= y + db, da + (x - value), db + (y - value))


def _topk(op, a, k, dim=-1, largest=True, sorted=True):
    """Order statistics move with the elements that come to take their places."""
    value, index = op(a.x, k, dim, largest, True)
    there = op(a.moved, k, dim, largest, True).indices
    change = a.d.gather(dim, there) + (a.x.gather(dim, there) - value)
    out = torch.return_types.topk
    return out((value, index)), out((change, there - index))


def _softmax(op, a, dim=None, _stacklevel=3, dtype=None):
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype
    x, d = (a.x, a.d) if dtype is None else (a.x.to(dtype), a.d.to(dtype))
    p = x.softmax(dim)
    return p, p * torch.expm1(d - d_logsumexp(p, d, dim))


def _log_softmax(op, a, dim=None, _stacklevel=3, dtype=None):
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype
    x, d = (a.x, a.d) if dtype is None else (a.x.to(dtype), a.d.to(dtype))
    y = x.log_softmax(dim)
    return y, d - d_logsumexp(y.exp(), d, dim)


def _logsumexp(op, a, dim, keepdim=False):
    if not isinstance(dim, int):
        return NotImplemented
    change = d_logsumexp(a.x.softmax(dim), a.d, dim)
    return op(a.x, dim, keepdim=keepdim), change if keepdim else change.squeeze(dim)


def _layer_norm(op, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Derived: in the arithmetic of Increments themselves."""
    change = layer_norm(x, normalized_shape, weight, bias, eps).d
    x, weight, bias = (value_of(t) for t in (x, weight, bias))
    return op(x, normalized_shape, weight, bias, eps), change


def _gelu(op, a, approximate="none"):
    x, d, y = a.x, a.d, op(a.x, approximate=approximate)
    if approximate == "tanh":
        # x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
        c = 2 * math.sqrt(2 / math.pi)
        u, v = c * (x + 0.044715 * x**3), x + d
        du = c * d * (1 + 0.044715 * (x * x + x * v + v * v))
        return y, d * torch.sigmoid(u + du) + x * d_sigmoid(None, u, du)
    normal = torch.special.ndtr(x + d)
    return y, d * normal + x * d_normal(x, d)


RULES: dict[Callable, Callable] = table(
    LINEAR
    | {name: _elementwise(change) for name, change in CHANGES.items()}
    | {
        "detach": LINEAR["linear"],  # the change is that of the values
        "mul": _product,
        "matmul": _matmul,
        "rmatmul": lambda op, a, b: _matmul(torch.matmul, b, a),
        "affine": _linear,
        "addmm": _addmm,
        "div": _divide,
        "rdiv": _divided,
        "pow": _power,
        "dropout": _dropout,
        "clamp": _clamp,
        "amax": _amax,
        "maximum": _maximum,
        "topk": _topk,
        "softmax": _softmax,
        "log_softmax": _log_softmax,
        "logsumexp": _logsumexp,
        "layer_norm": _layer_norm,
        "gelu": _gelu,
    }
)
