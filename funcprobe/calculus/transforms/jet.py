r"""Taylor arithmetic: a function's expansion along a line, in one run through an unmodified model.

A `Jet` is a truncated power series :math:`x(t) = x_0 + x_1 t + \dots + x_M t^M`. A linear operation
acts on every coefficient; products and elementwise functions follow recurrences (`power_series`):

.. math:: (ab)_k = \sum_{i=0}^k a_i b_{k-i}, \qquad
          y = e^x: \; y_k = \frac 1 k \sum_{j=1}^k j \, x_j \, y_{k-j}.

To order M a product of two series costs (M + 1)(M + 2) / 2 products and one with a frozen weight
M + 1, where nested forward mode costs 2^M or more. A coefficient that is zero is None and costs
nothing. An operation without a rule is expanded by nested jvp through it alone.

Griewank and Walther, Evaluating Derivatives, chapter 13; Bettencourt, Johnson and Duvenaud 2019,
Taylor-mode automatic differentiation for higher-order derivatives in JAX.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..tree import Params, tree_map
from .carrier import (
    Carrier,
    Operation,
    Rule,
    Scope,
    aligned,
    first_carrier,
    has_carrier,
    nested_map,
    parts_of,
    table,
    value_of,
)
from .linear import LINEAR, add, subtract
from .nested_jvp import layer_norm, nested, silu
from .power_series import (
    EXPANSIONS,
    Coefficients,
    Expansion,
    chain,
    partition,
    power,
    quotient,
    total,
)


class Bypassed(RuntimeError):
    """The function does something with a jet that no rule covers, such as a transform."""


class Jet(Carrier):
    """The coefficients of a tensor's power series: ``Jet(x_0, x_1, ..., x_M, scope)``."""

    @classmethod
    def without_rule(cls, func: Operation, *args: Any, **kwargs: Any) -> Any:
        """Expands the operation by nested jvp.

        Non-floating outputs are computed from the value alone.
        """
        order = len(first_carrier(args, kwargs).parts) - 1
        first = func(*nested_map(value_of, args), **nested_map(value_of, kwargs))
        outputs = _listed(first)
        if any(not isinstance(leaf, Tensor | bool | int | float | list) for leaf in outputs):
            cls.refuse(
                f"a tensor was expected of every operation, but {func.__name__} reads a changing "
                f"tensor as {type(first).__name__}. Write the function in torch's operations."
            )
        smooth = [i for i, leaf in enumerate(outputs) if _is_smooth(leaf)]
        if not smooth:
            return (first,)

        def along(t: Tensor) -> list[Tensor]:
            a, k = (nested_map(lambda leaf: _horner(leaf, t), tree) for tree in (args, kwargs))
            out = _listed(func(*a, **k))
            return [out[i] for i in smooth]

        zero = outputs[smooth[0]].new_zeros(())
        terms = nested(along, zero, torch.ones_like(zero), order)[1:]
        columns = [
            _spread([d / math.factorial(k) for d in term], smooth, len(outputs))
            for k, term in enumerate(terms, 1)
        ]
        single = outputs[0] is first
        return (first, *(column[0] if single else column for column in columns))

    @classmethod
    def refuse(cls, reason: str) -> NoReturn:
        """Raises `Bypassed`."""
        raise Bypassed(f"taylor: {reason}")


def derivatives(fn: Callable[[Params], Any], params: Params, v: Params, order: int) -> list[Any]:
    """`fn` at the parameters, and its derivatives to `order` along `v`, each a tree like it.

    Raises:
        Bypassed: the function transforms its parameters, writes them into a fixed tensor, or does
            something else with them that no rule covers.
    """
    if has_carrier(params):
        Jet.refuse(
            "parameters of fixed tensors were expected, these are jets already: the function that "
            "is expanded calls taylor itself."
        )
    scope, zeros = Scope(RULES), [None] * (order - 1)
    out = fn({name: Jet(p, v[name], *zeros, scope) for name, p in params.items()})

    def derivative(k: int) -> Callable[[Any], Tensor]:
        def of(leaf: Any) -> Tensor:
            part = parts_of(leaf, order + 1)[k]
            return torch.zeros_like(value_of(leaf)) if part is None else math.factorial(k) * part

        return of

    return [tree_map(value_of, out), *(tree_map(derivative(k), out) for k in range(1, order + 1))]


def _listed(out: Any) -> list[Any]:
    return list(out) if isinstance(out, tuple | list) else [out]


def _is_smooth(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _spread(column: Sequence[Tensor], places: Sequence[int], count: int) -> list[Tensor | None]:
    """A list of `count` that holds the column at its places and None elsewhere."""
    by_place = dict(zip(places, column, strict=True))
    return [by_place.get(i) for i in range(count)]


def _horner(leaf: Any, t: Tensor) -> Any:
    """The series at t, by Horner's rule."""
    if not isinstance(leaf, Jet):
        return leaf
    value, *others = leaf.parts
    out: Tensor | None = None
    for part in (*reversed(others), value):
        out = add(None if out is None else out * t, part)
    return out


# The rules of operations that are not linear. Each takes the operation and its arguments, at least
# one of which is a Jet, and returns the coefficients of the result, or NotImplemented where it does
# not apply.


def _product(op: Operation, a: Any, b: Any) -> Coefficients:
    a, b = aligned(a, b)
    products = (total((1, a[i], b[k - i]) for i in range(k + 1)) for k in range(1, len(a)))
    return op(a[0], b[0]), *products


def _matrices(op: Operation, a: Coefficients, b: Coefficients, k: int, inner: int) -> Tensor | None:
    """The k-th coefficient of a product of matrices, which sums over the `inner` axis of b."""
    factors = ((a[i], b[k - i]) for i in range(k + 1))
    pairs = [(p, q) for p, q in factors if p is not None and q is not None]
    if not pairs:
        return None
    if len(pairs) > 1 and _is_thin(a[0], b[0], inner):
        left, right = zip(*pairs, strict=True)
        return op(torch.cat(left, -1), torch.cat(right, inner))
    out = op(*pairs[0])
    for p, q in pairs[1:]:
        out = out + op(p, q)
    return out


def _is_thin(p: Tensor, q: Tensor, inner: int) -> bool:
    """Whether matrices are thinner than their product, as LoRA's are.

    The terms of a coefficient are then one product of all the matrices side by side.
    """
    return p.ndim > 1 and q.ndim > 1 and q.shape[inner] < q.shape[-3 - inner]


def _matmul(op: Operation, a: Any, b: Any) -> Coefficients:
    a, b = aligned(a, b)
    return op(a[0], b[0]), *(_matrices(op, a, b, k, -2) for k in range(1, len(a)))


def _affine(op: Operation, x: Any, weight: Any, bias: Any = None, inner: int = -1) -> Coefficients:
    """``x W' + b``, where any of the three may move."""
    x, weight, bias = aligned(x, weight, bias)
    first = op(x[0], weight[0], bias[0])

    def coefficient(k: int) -> Tensor | None:
        shift = None if bias[k] is None else bias[k].expand(first.shape)
        return add(_matrices(op, x, weight, k, inner), shift)

    return first, *(coefficient(k) for k in range(1, len(x)))


def _addmm(
    op: Operation, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1
) -> Coefficients:
    if not beta == alpha == 1:
        return NotImplemented
    return _affine(lambda x, w, c=None: x @ w if c is None else op(c, x, w), a, b, bias, inner=-2)


def _divide(op: Operation, a: Any, other: Any, *, rounding_mode: str | None = None) -> Coefficients:
    if rounding_mode is not None:
        return NotImplemented
    a, b = aligned(a, other)
    return quotient(a, b, op(a[0], b[0]))


def _divided(op: Operation, a: Any, other: Any) -> Coefficients:
    """Division with its arguments exchanged, as in ``__rtruediv__``."""
    return _divide(lambda x, y: op(y, x), other, a)


def _elementwise(expand: Expansion) -> Rule:
    return lambda op, a: expand(op(a.parts[0]), a.parts)


def _power(op: Operation, a: Any, n: Any) -> Coefficients:
    if not isinstance(a, Jet) or not isinstance(n, int | float):
        return NotImplemented
    return power(n, op(a.parts[0], n), a.parts)


def _derived(written: Callable[..., Any]) -> Rule:
    """A rule from the operation written out in other operations.

    The value is still the operation's, to the last bit.
    """

    def rule(op: Operation, *args: Any, **kwargs: Any) -> Coefficients:
        kwargs.pop("inplace", None)
        first = op(*nested_map(value_of, args), **nested_map(value_of, kwargs))
        return first, *written(*args, **kwargs).parts[1:]

    return rule


def _gelu(a: Any, approximate: str = "none") -> Tensor:
    """x times the normal distribution function, or its approximation by tanh."""
    if approximate == "tanh":
        return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    written: Any = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    x, density = a.parts, written.parts
    below = [chain(x, density, k) for k in range(1, len(x))]
    return a * Jet(torch.special.ndtr(x[0]), *below, a.scope)


def _chosen(inside: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """A rule for an operation that is the identity where ``inside(y, x)``, else constant."""

    def rule(op: Operation, a: Any, *args: Any, **kwargs: Any) -> Coefficients:
        if has_carrier(args, kwargs):
            return NotImplemented
        kwargs.pop("inplace", None)
        x, *others = a.parts
        y = op(x, *args, **kwargs)
        keep = inside(y, x)
        return y, *(None if c is None else torch.where(keep, c, 0.0) for c in others)

    return rule


def _amax(op: Operation, a: Jet, dim: Any = (), keepdim: bool = False) -> Coefficients:
    """The maximum has the derivatives of the element that is the largest."""
    if not isinstance(dim, int):
        return NotImplemented
    first, index = a.parts[0].max(dim, keepdim=True)
    others = [None if c is None else c.gather(dim, index) for c in a.parts[1:]]
    return (first, *others) if keepdim else (first.squeeze(dim), *_squeezed(others, dim))


def _squeezed(parts: Sequence[Tensor | None], dim: int) -> list[Tensor | None]:
    return [None if c is None else c.squeeze(dim) for c in parts]


def _dropout(
    op: Operation, a: Jet, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    return a * op(torch.ones_like(a.parts[0]), p, training) if training and p > 0 else a.parts


def _cast(a: Jet, stacklevel: Any, dtype: torch.dtype | None) -> Coefficients:
    """Coefficients in the dtype that a softmax was given; torch's method takes it third."""
    dtype = stacklevel if isinstance(stacklevel, torch.dtype) else dtype
    if dtype is None:
        return a.parts
    return a.parts[0].to(dtype), *(None if c is None else c.to(dtype) for c in a.parts[1:])


def _softmax(
    op: Operation, a: Jet, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None
) -> Coefficients:
    x = _cast(a, _stacklevel, dtype)
    return partition(x[0].softmax(dim), x, dim)[0]


def _log_softmax(
    op: Operation, a: Jet, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None
) -> Coefficients:
    """``x - L``, with L the logsumexp."""
    x = _cast(a, _stacklevel, dtype)
    y = x[0].log_softmax(dim)
    log = [None if c is None else c.expand(y.shape) for c in partition(y.exp(), x, dim)[1]]
    return y, *(subtract(x[k], log[k]) for k in range(1, len(x)))


def _logsumexp(op: Operation, a: Jet, dim: Any, keepdim: bool = False) -> Coefficients:
    if not isinstance(dim, int):
        return NotImplemented
    log = partition(a.parts[0].softmax(dim), a.parts, dim)[1]
    log = log if keepdim else _squeezed(log, dim)
    return op(a.parts[0], dim, keepdim=keepdim), *log[1:]


RULES: dict[Operation, Rule] = table(
    LINEAR
    | {name: _elementwise(expand) for name, expand in EXPANSIONS.items()}
    | {
        "detach": lambda op, a: (a.parts[0],),
        "mul": _product,
        "matmul": _matmul,
        "rmatmul": lambda op, a, b: _matmul(torch.matmul, b, a),
        "affine": _affine,
        "addmm": _addmm,
        "div": _divide,
        "rdiv": _divided,
        "pow": _power,
        "silu": _derived(silu),
        "gelu": _derived(_gelu),
        "relu": _chosen(lambda y, x: x > 0),
        "clamp": _chosen(lambda y, x: y == x),
        "amax": _amax,
        "dropout": _dropout,
        "softmax": _softmax,
        "log_softmax": _log_softmax,
        "logsumexp": _logsumexp,
        "layer_norm": _derived(layer_norm),
        "_make_dual": lambda *args, **kwargs: Jet.refuse(
            "a function without transforms was expected, this one calls jvp itself."
        ),
    }
)
