r"""Exact finite increments: f(p + d) - f(p) without subtracting two large numbers.

An `Increment` is a tensor x together with a change d; it stands for x and for x + d at once. Every
operation has a rule that gives its change from those of its arguments at full relative precision,
as forward-mode differentiation has a rule for its derivative, but exact for finite d:

.. math:: \Delta(ab) = \Delta a \, b + (a + \Delta a) \Delta b, \qquad
          \Delta e^x = e^x (e^d - 1), \qquad \Delta x^{-1/2} = -d / (s s' (s + s')), \\
          s = \sqrt x, \quad s' = \sqrt{x + d}.

So an unmodified model runs on parameters that are Increments, and its change is right in float32
at any size of d, down to 1e-12 and below, where the difference of two float32 values is noise.
Under `vmap` over d with x unbatched all lanes share one computation of the values.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..blocks import RowFn
from ..precision import products
from ..tree import Params, check_direction, tree_map
from .carrier import Carrier, Operation, Rule, Scope, has_carrier, nested_map, table, value_of
from .elementwise import CHANGES, POWERS, d_gelu, d_logsumexp, d_norm
from .linear import LINEAR, add
from .nested_jvp import layer_norm

# A value and its change. Both are tuples where an operation returns several tensors.
Pair: TypeAlias = tuple[Any, Any]


@dataclass
class Increments(Scope):
    """What the Increments of one evaluation share."""

    matmul: str | None = None  # the precision of the changes' products, None for full


class Increment(Carrier):
    """A tensor `x` and its change `d`, of one shape and dtype: ``Increment(x, d, scope)``."""

    scope: Increments

    @property
    def x(self) -> Tensor:
        """The value."""
        return self.parts[0]

    @property
    def d(self) -> Tensor:
        """The change of the value."""
        (d,) = self.parts[1:]
        return torch.zeros_like(self.x) if d is None else d

    @property
    def moved(self) -> Tensor:
        """x + d."""
        return self.x + self.d

    @classmethod
    def without_rule(cls, func: Operation, *args: Any, **kwargs: Any) -> Pair:
        """Evaluates the operation at both points and subtracts."""
        first = func(*nested_map(value_of, args), **nested_map(value_of, kwargs))
        moved = func(*nested_map(_moved, args), **nested_map(_moved, kwargs))
        if isinstance(first, tuple | list):
            return tuple(first), tuple(m - v for v, m in zip(first, moved, strict=True))
        if not isinstance(first, Tensor):
            cls.refuse(
                f"a tensor was expected of every operation, but {func.__name__} reads a changing "
                f"tensor as {first!r}. Write the function without a decision on a value, or take "
                "the value of a fixed tensor."
            )
        if not first.is_floating_point():
            cls.refuse(
                f"a floating result was expected, but {func.__name__} of a changing tensor gives "
                f"{first.dtype}, and what follows may jump. Give it a rule, or take it of a fixed "
                "tensor."
            )
        return first, moved - first

    @classmethod
    def refuse(cls, reason: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"increment: {reason}")


@dataclass(frozen=True, repr=False)
class Incremented:
    """A function of rows that returns another function's value and its change; see `increment`."""

    fn: RowFn
    params: Params
    delta: Params
    scope: Increments

    @property
    def fallbacks(self) -> Counter[str]:
        """How often the calls so far met each operation without a rule, by name."""
        return self.scope.fallbacks

    def __call__(self, batch: Any) -> Pair:
        """The value at the parameters and its change, two trees like the function's output."""
        moving: Params = {
            name: Increment(p, self.delta[name].to(p), self.scope)
            for name, p in self.params.items()
        }
        out = self.fn(moving, batch)
        return tree_map(value_of, out), tree_map(_change, out)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        return (
            f"Incremented({name}, {len(self.params)} tensors, "
            f"matmul={self.scope.matmul!r}, fallbacks={dict(self.fallbacks)})"
        )


def increment(
    fn: RowFn,
    params: Params,
    delta: Params,
    *,
    rules: dict[Operation, Rule] | None = None,
    matmul: str | None = None,
) -> Incremented:
    """Transforms `fn` into a function of a batch that returns fn's value and its exact change.

    It is ``batch -> (fn(params, batch), fn(params + delta, batch) - fn(params, batch))``.

    The change is exact in the sense that it has full relative precision, whatever its size,
    wherever every operation has a rule. An operation without one is evaluated at both points and
    subtracted, which is right but rounds as a difference does. The attribute ``fallbacks`` of the
    returned function counts those operations by name.

    Unlike `sweep` and `taylor`, this takes no batch. It is a transform, as those of `torch.func`
    are: the function it returns can be called on several batches or transformed again, and its
    `fallbacks` can be read afterwards. To evaluate one batch, use
    ``sweep(..., change="increment")``, which also computes in blocks of rows.

    Args:
        fn: ``(params, batch) -> tree`` of tensors.
        params: the parameters.
        delta: their change, of the same names and shapes.
        rules: a table that replaces `RULES`; extend that by ``RULES | {op: rule}``. A rule gets
            the operation and its arguments, at least one of which is an Increment, and returns
            (value, change).
        matmul: "tf32" or "bfloat16" runs the matrix products of the changes, not of the values, in
            that precision: each change is then good to about 1e-3 or 1e-2 of itself. Hardware
            without TF32 computes in full.

    Returns:
        A function of a batch.

    Raises:
        ValueError: names or shapes do not fit, or `matmul` is another precision. Calling the
            returned function also raises it if an operation's result may jump (a comparison), if
            an operation reads a changing tensor as a number, if a change is written into a fixed
            tensor, or if dropout is on.

    >>> square = increment(lambda p, x: x * p["a"] ** 2, {"a": torch.ones(())},
    ...                    {"a": torch.tensor(1e-20)})
    >>> [float(term) for term in square(torch.tensor(3.0))]  # 3 and 6e-20
    [3.0, 5.999999809593135e-20]
    """
    check_direction("increment", delta, params)
    if matmul not in (None, "tf32", "bfloat16"):
        raise ValueError(
            f"increment: matmul was expected to be None, 'tf32' or 'bfloat16', not {matmul!r}."
        )
    scope = Increments(RULES if rules is None else rules, matmul=matmul)
    return Incremented(fn, params, delta, scope)


def _change(leaf: Tensor) -> Tensor:
    return leaf.d if isinstance(leaf, Increment) else torch.zeros_like(leaf)


def _moved(leaf: Any) -> Any:
    return leaf.moved if isinstance(leaf, Increment) else leaf


# The rules of operations that are not linear. Each takes the operation and its arguments, at least
# one of which is an Increment, and returns (value, change), or NotImplemented where it does not
# apply.


def _dropout(
    op: Operation, a: Increment, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Pair:
    if training and p > 0:
        Increment.refuse(
            "a function that repeats was expected, but dropout is on, so it is random. Call eval()."
        )
    return a.x, a.d


def _elementwise(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rule:
    """A rule from ``change(y, x, d)``, with y = op(x)."""

    def rule(op: Operation, a: Increment, *args: Any, **kwargs: Any) -> Pair:
        kwargs.pop("inplace", None)
        y = op(a.x, *args, **kwargs)
        return y, change(y, a.x, a.d)

    return rule


def _product(op: Operation, a: Any, b: Any, *args: Any, **kwargs: Any) -> Pair:
    """The rule of an operation that is linear in each of its two arguments."""
    x, y = value_of(a), value_of(b)
    value = op(x, y, *args, **kwargs)
    if not isinstance(b, Increment):
        return value, op(a.d, y, *args, **kwargs)
    if not isinstance(a, Increment):
        return value, op(x, b.d, *args, **kwargs)
    return value, op(a.d, y, *args, **kwargs) + op(a.moved, b.d, *args, **kwargs)


def _matmul(op: Operation, a: Any, b: Any) -> Pair:
    """A product of matrices, whose change may be computed in lower precision."""
    x, y = value_of(a), value_of(b)
    precision = (a if isinstance(a, Increment) else b).scope.matmul
    terms = []
    if isinstance(a, Increment):
        terms.append((a.d, y))
    if isinstance(b, Increment):
        terms.append((_moved(a), b.d))
    if precision == "bfloat16":
        changes = [op(p.bfloat16(), q.bfloat16()).to(x.dtype) for p, q in terms]
    else:
        with products(precision) if precision else nullcontext():
            changes = [op(p, q) for p, q in terms]
    return op(x, y), changes[0] if len(changes) == 1 else changes[0] + changes[1]


def _affine(op: Operation, x: Any, weight: Any, bias: Any = None) -> Pair:
    """``x W' + b``, where any of the three may move."""
    moving = has_carrier(x, weight)
    value, change = _matmul(op, x, weight) if moving else (op(x, weight), None)
    if bias is None:
        return value, change
    if isinstance(bias, Increment):
        change = add(change, bias.d.expand(value.shape))
    return value + value_of(bias), change


def _addmm(op: Operation, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Pair:
    return _affine(torch.mm, a, b, bias) if beta == alpha == 1 else NotImplemented


def _divide(op: Operation, a: Any, other: Any, *, rounding_mode: str | None = None) -> Pair:
    r""":math:`\Delta (a / b) = (\Delta a - q \Delta b) / (b + \Delta b)`, with q = a / b."""
    if rounding_mode is not None:
        return NotImplemented
    x, y = value_of(a), value_of(other)
    q = op(x, y)
    if not isinstance(other, Increment):
        return q, op(a.d, y)
    numerator = a.d - q * other.d if isinstance(a, Increment) else -q * other.d
    return q, numerator / other.moved


def _divided(op: Operation, a: Any, other: Any) -> Pair:
    """Division with its arguments exchanged, as in ``__rtruediv__``."""
    return _divide(lambda x, y: op(y, x), other, a)


def _power(op: Operation, a: Any, exponent: Any) -> Pair:
    if not isinstance(a, Increment) or isinstance(exponent, Tensor):
        return NotImplemented
    change = POWERS.get(exponent)
    if change is None:
        return NotImplemented
    y = op(a.x, exponent)
    return y, change(y, a.x, a.d)


def _norm(
    op: Operation, a: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Pair:
    p = kwargs.pop("ord", p)
    if p not in (None, 2, "fro") or not isinstance(dim, int) or kwargs:
        return NotImplemented
    y = torch.linalg.vector_norm(a.x, 2, dim, keepdim)
    return y, d_norm(y, a.x, a.d, dim, keepdim)


def _clamp(op: Operation, a: Any, min: Any = None, max: Any = None) -> Pair:
    """The change is d itself where neither value is clamped."""
    if has_carrier(min, max):
        return NotImplemented
    x, d = a.x, a.d
    y, moved = op(x, min=min, max=max), op(x + d, min=min, max=max)
    return y, torch.where((y == x) & (moved == x + d), d, moved - y)


def _amax(op: Operation, a: Increment, dim: Any = (), keepdim: bool = False) -> Pair:
    """The maximum moves with the element that becomes the largest."""
    if not isinstance(dim, int):
        return NotImplemented
    largest = a.x.amax(dim, keepdim=True)
    index = a.moved.argmax(dim, keepdim=True)
    change = a.d.gather(dim, index) + (a.x.gather(dim, index) - largest)
    if not keepdim:
        largest, change = largest.squeeze(dim), change.squeeze(dim)
    return largest, change


def _maximum(op: Operation, a: Any, b: Any) -> Pair:
    """The larger of two values moves with the one that becomes the larger."""
    x, y = value_of(a), value_of(b)
    value = torch.maximum(x, y)
    da, db = (t.d if isinstance(t, Increment) else torch.zeros_like(value) for t in (a, b))
    return value, torch.where(x + da >= y + db, da + (x - value), db + (y - value))


def _topk(
    op: Operation, a: Increment, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Pair:
    """Order statistics move with the elements that come to take their places."""
    value, index = op(a.x, k, dim, largest, True)
    moved_index = op(a.moved, k, dim, largest, True).indices
    change = a.d.gather(dim, moved_index) + (a.x.gather(dim, moved_index) - value)
    out = torch.return_types.topk
    return out((value, index)), out((change, moved_index - index))


def _cast(a: Increment, stacklevel: Any, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """x and d in the dtype that a softmax was given; torch's method takes it as third argument."""
    dtype = stacklevel if isinstance(stacklevel, torch.dtype) else dtype
    return (a.x, a.d) if dtype is None else (a.x.to(dtype), a.d.to(dtype))


def _softmax(
    op: Operation, a: Increment, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None
) -> Pair:
    """``p (e^(d - c) - 1)``, with c the change of the logsumexp."""
    x, d = _cast(a, _stacklevel, dtype)
    p = x.softmax(dim)
    return p, p * torch.expm1(d - d_logsumexp(p, d, dim))


def _log_softmax(
    op: Operation, a: Increment, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None
) -> Pair:
    """``d - c``, with c the change of the logsumexp."""
    x, d = _cast(a, _stacklevel, dtype)
    y = x.log_softmax(dim)
    return y, d - d_logsumexp(y.exp(), d, dim)


def _logsumexp(op: Operation, a: Increment, dim: Any, keepdim: bool = False) -> Pair:
    if not isinstance(dim, int):
        return NotImplemented
    change = d_logsumexp(a.x.softmax(dim), a.d, dim)
    return op(a.x, dim, keepdim=keepdim), change if keepdim else change.squeeze(dim)


def _layer_norm(op: Operation, *args: Any, **kwargs: Any) -> Pair:
    """The change follows from the operation written out in the arithmetic of Increments."""
    written: Any = layer_norm(*args, **kwargs)
    return op(*nested_map(value_of, args), **nested_map(value_of, kwargs)), written.d


def _gelu(op: Operation, a: Increment, approximate: str = "none") -> Pair:
    return op(a.x, approximate=approximate), d_gelu(a.x, a.d, approximate)


RULES: dict[Operation, Rule] = table(
    LINEAR
    | {name: _elementwise(change) for name, change in CHANGES.items()}
    | {
        "detach": LINEAR["linear"],  # detaching stops derivatives alone, not changes
        "mul": _product,
        "matmul": _matmul,
        "rmatmul": lambda op, a, b: _matmul(torch.matmul, b, a),
        "affine": _affine,
        "addmm": _addmm,
        "div": _divide,
        "rdiv": _divided,
        "pow": _power,
        "dropout": _dropout,
        "clamp": _clamp,
        "norm": _norm,
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
