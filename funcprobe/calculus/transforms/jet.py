r"""Taylor arithmetic: a function's expansion along a line, in one run through an unmodified model.

A `Jet` is a truncated power series :math:`x(t) = x_0 + x_1 t + \dots + x_M t^M`. Linear operations
act on every coefficient; products and elementwise functions by recurrences (see `series`):

.. math:: (ab)_k = \sum_{i=0}^k a_i b_{k-i}, \qquad
          y = e^x: \; y_k = \frac 1 k \sum_{j=1}^k j \, x_j \, y_{k-j}.

To order M a product of two series costs (M + 1)(M + 2) / 2 products and one with a frozen weight
M + 1, where nested forward mode costs 2^M or more. A coefficient that is zero is None and costs
nothing. An operation without a rule is expanded by nested jvp through it alone.

Griewank and Walther, Evaluating Derivatives, chapter 13; Bettencourt, Johnson and Duvenaud 2019,
Taylor-mode automatic differentiation for higher-order derivatives in JAX.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..tree import Params, tree_map
from .carrier import Carrier, Scope, find, nested_map, parts_of, table, value_of
from .linear import LINEAR
from .nested_jvp import layer_norm, nested
from .power_series import EXPANSIONS, Series, chain, partition, power, quotient, total


class Bypassed(RuntimeError):
    """The function does with a jet what no rule can meet, such as a transform of its own."""


class Jet(Carrier):
    """The coefficients of a tensor's power series: ``Jet(x_0, x_1, ..., x_M, scope)``."""

    @classmethod
    def without_rule(cls, func, *args, **kwargs):
        """By nested jvp; what is no floating tensor is that of the value."""
        order = len(find(args, kwargs).parts) - 1
        first = func(*nested_map(value_of, args), **nested_map(value_of, kwargs))
        leaves = _listed(first)
        smooth = [i for i, leaf in enumerate(leaves) if _moves(leaf)]
        if any(not isinstance(leaf, Tensor | bool | int | float | list) for leaf in leaves):
            cls.refuse(f"{func.__name__} reads a changing tensor as {type(first).__name__}.")
        if not smooth:
            return (first,)

        def along(t: Tensor) -> list[Tensor]:
            a, k = (nested_map(lambda leaf: _horner(leaf, t), tree) for tree in (args, kwargs))
            out = _listed(func(*a, **k))
            return [out[i] for i in smooth]

        zero = leaves[smooth[0]].new_zeros(())
        columns = [leaves]
        for k, term in enumerate(nested(along, zero, torch.ones_like(zero), order)[1:], 1):
            column = dict(zip(smooth, term, strict=True))
            columns.append(
                [column[i] / math.factorial(k) if i in column else None for i in range(len(leaves))]
            )
        return [column[0] for column in columns] if leaves[0] is first else (first, *columns[1:])

    @classmethod
    def refuse(cls, reason: str):
        """Raises `Bypassed`."""
        raise Bypassed(f"taylor: {reason}")


def derivatives(fn: Callable, params: Params, v: Params, order: int) -> list:
    """`fn` at the parameters, and its derivatives to `order` along `v`, each a tree like it.

    Raises:
        Bypassed: the function transforms its parameters, or writes them into a fixed tensor.
    """
    if find(params) is not None:
        Jet.refuse("these parameters are jets already.")
    scope, none = Scope(RULES), [None] * (order - 1)
    out = fn({name: Jet(p, v[name], *none, scope) for name, p in params.items()})

    def derivative(k: int):
        def of(leaf):
            part = parts_of(leaf, order + 1)[k]
            return torch.zeros_like(value_of(leaf)) if part is None else math.factorial(k) * part

        return of

    return [tree_map(value_of, out), *(tree_map(derivative(k), out) for k in range(1, order + 1))]


def _listed(out) -> list:
    return list(out) if isinstance(out, tuple | list) else [out]


def _moves(leaf) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _horner(leaf, t: Tensor):
    """The series at t."""
    if not isinstance(leaf, Jet):
        return leaf
    out = leaf.parts[-1]
    for part in leaf.parts[-2::-1]:
        out = part if out is None else out * t if part is None else out * t + part
    return out


# Rules. Each takes the operation and its arguments and returns the coefficients of the result.


def _product(op, a, b):
    count = len(find((a, b)).parts)
    a, b = parts_of(a, count), parts_of(b, count)
    products = (total((1, a[i], b[k - i]) for i in range(k + 1)) for k in range(1, count))
    return op(a[0], b[0]), *products


def _matrices(op, a: Series, b: Series, k: int, inner: int) -> Tensor | None:
    """The k-th coefficient of a product of matrices, whose `inner` axis of b is summed over."""
    pairs = [(a[i], b[k - i]) for i in range(k + 1)]
    pairs = [(p, q) for p, q in pairs if p is not None and q is not None]
    if len(pairs) < 2:
        return op(*pairs[0]) if pairs else None
    p, q = a[0], b[0]
    if p.ndim > 1 and q.ndim > 1 and q.shape[inner] < q.shape[-3 - inner]:
        # Where the factors are thinner than their product, as LoRA's: one product of all of them.
        left, right = zip(*pairs, strict=True)
        return op(torch.cat(left, -1), torch.cat(right, inner))
    return sum((op(p, q) for p, q in pairs[1:]), start=op(*pairs[0]))


def _matmul(op, a, b):
    count = len(find((a, b)).parts)
    a, b = parts_of(a, count), parts_of(b, count)
    return op(a[0], b[0]), *(_matrices(op, a, b, k, -2) for k in range(1, count))


def _affine(op, x, weight, bias=None, inner=-1):
    count = len(find((x, weight, bias)).parts)
    x, weight, bias = (parts_of(t, count) for t in (x, weight, bias))
    first = op(x[0], weight[0], bias[0])
    out = [first]
    for k in range(1, count):
        term, b = _matrices(op, x, weight, k, inner), bias[k]
        if b is not None:
            term = b.expand(first.shape) if term is None else term + b
        out.append(term)
    return out


def _addmm(op, bias, a, b, *, beta=1, alpha=1):
    if not beta == alpha == 1:
        return NotImplemented
    return _affine(lambda x, w, c=None: x @ w if c is None else op(c, x, w), a, b, bias, inner=-2)


def _divide(op, a, other, *, rounding_mode=None):
    if rounding_mode is not None:
        return NotImplemented
    count = len(find((a, other)).parts)
    a, b = parts_of(a, count), parts_of(other, count)
    return quotient(a, b, op(a[0], b[0]))


def _divided(op, a, other):
    return _divide(lambda x, y: op(y, x), other, a)


def _elementwise(expand: Callable[[Tensor, Series], Series]):
    return lambda op, a: expand(op(a.parts[0]), a.parts)


def _power(op, a, n):
    if not isinstance(a, Jet) or not isinstance(n, int | float):
        return NotImplemented
    return power(n, op(a.parts[0], n), a.parts)


def _derived(written: Callable):
    """A rule from the operation written out in others; the value is its own, to the last bit."""

    def rule(op, *args, **kwargs):
        kwargs.pop("inplace", None)
        first = op(*nested_map(value_of, args), **nested_map(value_of, kwargs))
        return first, *written(*args, **kwargs).parts[1:]

    return rule


def _silu(a, inplace=False):
    return a * torch.sigmoid(a)


def _gelu(a, approximate="none"):
    if approximate == "tanh":
        return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    density = (torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)).parts
    x = a.parts
    below = [chain(x, density, k) for k in range(1, len(x))]
    return a * Jet(torch.special.ndtr(x[0]), *below, a.scope)


def _chosen(inside: Callable[[Tensor, Tensor], Tensor]):
    """A rule for what is the identity where ``inside(y, x)``, and elsewhere constant."""

    def rule(op, a, *args, **kwargs):
        if find(args, kwargs) is not None:
            return NotImplemented
        kwargs.pop("inplace", None)
        y = op(a.parts[0], *args, **kwargs)
        keep = inside(y, a.parts[0])
        return y, *(c if c is None else torch.where(keep, c, 0.0) for c in a.parts[1:])

    return rule


def _amax(op, a, dim=(), keepdim=False):
    if not isinstance(dim, int):
        return NotImplemented
    first, index = a.parts[0].max(dim, keepdim=True)
    out = [first, *(c if c is None else c.gather(dim, index) for c in a.parts[1:])]
    return out if keepdim else [c if c is None else c.squeeze(dim) for c in out]


def _dropout(op, a, p=0.5, training=True, inplace=False):
    return a * op(torch.ones_like(a.parts[0]), p, training) if training and p > 0 else a.parts


def _cast(a: Jet, stacklevel, dtype) -> Series:
    dtype = stacklevel if isinstance(stacklevel, torch.dtype) else dtype
    return [c if c is None or dtype is None else c.to(dtype) for c in a.parts]


def _softmax(op, a, dim=None, _stacklevel=3, dtype=None):
    x = _cast(a, _stacklevel, dtype)
    return partition(x[0].softmax(dim), x, dim)[0]


def _log_softmax(op, a, dim=None, _stacklevel=3, dtype=None):
    x = _cast(a, _stacklevel, dtype)
    y = x[0].log_softmax(dim)
    _, log = partition(y.exp(), x, dim)
    pairs = list(zip(x, log, strict=True))[1:]
    return y, *(c if t is None else -t.expand(y.shape) if c is None else c - t for c, t in pairs)


def _logsumexp(op, a, dim, keepdim=False):
    if not isinstance(dim, int):
        return NotImplemented
    _, log = partition(a.parts[0].softmax(dim), a.parts, dim)
    log = [t if t is None or keepdim else t.squeeze(dim) for t in log]
    return op(a.parts[0], dim, keepdim=keepdim), *log[1:]


RULES: dict[Callable, Callable] = table(
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
        "silu": _derived(_silu),
        "gelu": _derived(_gelu),
        "relu": _chosen(lambda y, x: x > 0),
        "clamp": _chosen(lambda y, x: y == x),
        "amax": _amax,
        "dropout": _dropout,
        "softmax": _softmax,
        "log_softmax": _log_softmax,
        "logsumexp": _logsumexp,
        "layer_norm": _derived(layer_norm),
        "_make_dual": lambda *args, **kwargs: Jet.refuse("the function calls jvp itself."),
    }
)
