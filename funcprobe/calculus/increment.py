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
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import CHANGES, d_logsumexp, d_normal, d_reciprocal, d_rsqrt, d_sigmoid, d_sqrt
from .precision import products
from .tree import Params, check_direction, tree_map


@dataclass
class Scope:
    """What the Increments of one evaluation share."""

    rules: dict[Callable, Callable]
    matmul: str | None = None  # the precision of the changes' products, None for full
    fallbacks: Counter = field(default_factory=Counter)  # operations without a rule, by name


class Increment(Tensor):
    """A tensor `x` and its change `d`, of one shape and dtype."""

    x: Tensor
    d: Tensor
    scope: Scope

    @staticmethod
    def __new__(cls, x: Tensor, d: Tensor, scope: Scope):
        """Wraps a value and its change; `scope` is that of the arguments they came from."""
        self = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)
        self.x, self.d, self.scope = x, d, scope
        return self

    @property
    def moved(self) -> Tensor:
        """x + d."""
        return self.x + self.d

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Applies the operation's rule; without one it subtracts, and counts that."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if "input" in kwargs and not args:
            args = (kwargs.pop("input"),)
        scope = _scope(args, kwargs)
        if _writes(func) and func not in scope.rules:
            return _in_place(func.__name__, *args, **kwargs)
        rule = scope.rules.get(func)
        out = NotImplemented if rule is None else rule(func, *args, **kwargs)
        if out is NotImplemented:
            out = _subtract(func, *args, **kwargs)
            scope.fallbacks[getattr(func, "__name__", str(func))] += 1
        return _wrap(*out, scope)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Is never reached: every operation is met in `__torch_function__`."""
        raise TypeError(f"increment: {func} bypassed the rules, so its change is unknown.")


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
    scope = Scope(RULES if rules is None else rules, matmul)

    def changed(batch):
        moving = {name: Increment(p, delta[name].to(p), scope) for name, p in params.items()}
        out = fn(moving, batch)
        return tree_map(_value, out), tree_map(_change, out)

    changed.fallbacks = scope.fallbacks
    return changed


def _value(leaf):
    return leaf.x if isinstance(leaf, Increment) else leaf


def _change(leaf: Tensor) -> Tensor:
    return leaf.d if isinstance(leaf, Increment) else torch.zeros_like(leaf)


def _moved(leaf):
    return leaf.moved if isinstance(leaf, Increment) else leaf


def _scope(*trees) -> Scope | None:
    """The scope of the first Increment found in nested arguments."""
    for tree in trees:
        if isinstance(tree, Increment):
            return tree.scope
        if isinstance(tree, dict):
            tree = tuple(tree.values())
        if isinstance(tree, tuple | list) and (scope := _scope(*tree)):
            return scope
    return None


def _map(fn: Callable, tree):
    """`fn` on the leaves of nested tuples, lists and dicts, as operations take them."""
    if isinstance(tree, dict):
        return {key: _map(fn, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_map(fn, value) for value in tree)
    return fn(tree)


def _wrap(value, change, scope: Scope):
    if isinstance(value, tuple | list):
        return type(value)(_wrap(v, c, scope) for v, c in zip(value, change, strict=True))
    return value if change is None else Increment(value, change, scope)


# Rules. Each takes the operation and its arguments and returns (value, change).


def _subtract(op, *args, **kwargs):
    """The fallback: evaluate twice."""
    value = op(*_map(_value, args), **_map(_value, kwargs))
    moved = op(*_map(_moved, args), **_map(_moved, kwargs))
    if isinstance(value, tuple | list):
        return tuple(value), tuple(m - v for v, m in zip(value, moved, strict=True))
    if not isinstance(value, Tensor):
        raise ValueError(f"increment: {op.__name__} reads a changing tensor as {value!r}.")
    if not value.is_floating_point():
        raise ValueError(
            f"increment: {op.__name__} of a changing tensor gives {value.dtype}, and what follows "
            "may jump. Give it a rule, or take it of a fixed tensor."
        )
    return value, moved - value


def _linear_of_first(op, a, *args, **kwargs):
    """Views, sums, gathers: the change of the result is the operation on the change."""
    if _scope(args, kwargs):
        return NotImplemented
    value = op(a.x, *args, **kwargs)
    if isinstance(value, Tensor) and not value.is_floating_point():
        return NotImplemented  # a cast to integers jumps
    return value, op(a.d, *args, **kwargs)


def _writes(op) -> bool:
    """Whether an operation is named as one in place: add_, __setitem__, ..."""
    name = getattr(op, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _in_place(name, a, *args, **kwargs):
    """The operation out of place, and the Increment rebound; a fixed tensor cannot hold one."""
    functional = getattr(Tensor, name.rstrip("_"), None)
    if not isinstance(a, Increment) or functional is None:
        raise ValueError(
            f"increment: {name} writes a changing tensor into another, which has no rule. "
            "Write the function without it (torch.where, torch.cat)."
        )
    out = functional(a, *args, **kwargs)
    a.x, a.d = out.x, out.d
    return a


def _dropout(op, a, p=0.5, training=True, inplace=False):
    if training and p > 0:
        raise ValueError("increment: dropout is on, so the function is random. Call eval().")
    return a.x, a.d


def _embedding(op, ids, weight, *args, **kwargs):
    return op(ids, weight.x, *args, **kwargs), op(ids, weight.d, *args, **kwargs)


def _like(op, a, other):
    """Views and casts that take their shape or dtype from another tensor."""
    if not isinstance(a, Increment):
        return op(a, other.x), None
    other = _value(other)
    return op(a.x, other), op(a.d, other)


def _linear_of_list(op, tensors, *args, **kwargs):
    """cat and stack, where some of the tensors may be fixed."""
    changes = [t.d if isinstance(t, Increment) else torch.zeros_like(t) for t in tensors]
    return op([_value(t) for t in tensors], *args, **kwargs), op(changes, *args, **kwargs)


def _fixed(op, a, *args, **kwargs):
    """Operations that only look at shape and dtype."""
    return op(a.x, *args, **kwargs), None


def _elementwise(change: Callable):
    """A rule from ``change(y, x, d)``, with y = op(x)."""

    def rule(op, a, *args, **kwargs):
        kwargs.pop("inplace", None)
        y = op(a.x, *args, **kwargs)
        return y, change(y, a.x, a.d)

    return rule


def _add(sign: float, reverse: bool = False):
    def rule(op, a, other, *, alpha=1):
        b, s = other, sign * alpha
        da, db = getattr(a, "d", None), getattr(b, "d", None)
        value = op(_value(a), _value(b), **({} if alpha == 1 else {"alpha": alpha}))
        if reverse:
            da, db = db, da
        if db is None:
            change = da
        else:
            db = db if s == 1 else -db if s == -1 else s * db
            change = db if da is None else da + db
        # Broadcasting is the value's: a narrower change is expanded to it.
        return value, change.expand(value.shape).to(value.dtype)

    return rule


def _product(op, a, b, *args, **kwargs):
    """Whatever is linear in either of its two arguments."""
    x, y = _value(a), _value(b)
    value = op(x, y, *args, **kwargs)
    if not isinstance(b, Increment):
        return value, op(a.d, y, *args, **kwargs)
    if not isinstance(a, Increment):
        return value, op(x, b.d, *args, **kwargs)
    return value, op(a.d, y, *args, **kwargs) + op(a.moved, b.d, *args, **kwargs)


def _matmul(op, a, b):
    """A product of matrices, whose change may be computed in lower precision."""
    scope, x, y = _scope((a, b)), _value(a), _value(b)
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
    value, change = _matmul(op, x, weight) if _scope((x, weight)) else (op(x, weight), None)
    if bias is None:
        return value, change
    if isinstance(bias, Increment):
        change = bias.d.expand(value.shape) if change is None else change + bias.d
    return value + _value(bias), change


def _addmm(op, bias, a, b, *, beta=1, alpha=1):
    return _linear(torch.mm, a, b, bias) if beta == alpha == 1 else NotImplemented


def _divide(op, a, other, *, rounding_mode=None):
    if rounding_mode is not None:
        return NotImplemented
    b = other
    x, y = _value(a), _value(b)
    q = op(x, y)
    if not isinstance(b, Increment):
        return q, op(a.d, y)
    numerator = -q * b.d if not isinstance(a, Increment) else a.d - q * b.d
    return q, numerator / b.moved


def _power(op, a, exponent):
    n = exponent
    if isinstance(a, Increment) and not isinstance(n, Tensor):
        x, d, y = a.x, a.d, op(_value(a), n)
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


def _where(op, condition, input, other):
    if op is Tensor.where:
        condition, input = input, condition
    value = torch.where(condition, _value(input), _value(other))
    da, db = (t.d if isinstance(t, Increment) else value.new_zeros(()) for t in (input, other))
    return value, torch.where(condition, da, db).expand(value.shape)


def _masked_fill(op, a, mask, value):
    if not isinstance(a, Increment) or isinstance(value, Increment):
        return _where(torch.where, mask, value, a)
    return op(a.x, mask, value), a.d.masked_fill(mask, 0.0)


def _clamp(op, a, min=None, max=None):
    if _scope((min, max)):
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
    x, y = _value(a), _value(b)
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
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.pow(2).mean(dims, keepdim=True) + eps)
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    fixed = (_value(t) if t is not None else None for t in (x, weight, bias))
    x, weight, bias = fixed
    return op(x, normalized_shape, weight, bias, eps), out.d


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


def _table() -> dict[Callable, Callable]:
    """Every spelling of an operation to its rule."""
    rules: dict[Callable, Callable] = {}

    def give(rule: Callable, *names: str) -> None:
        for name in names:
            for home in (torch, Tensor, F):
                if hasattr(home, name):
                    rules[getattr(home, name)] = rule

    give(_linear_of_first, "reshape", "view", "flatten", "unflatten", "ravel")
    give(_linear_of_first, "transpose", "permute", "swapaxes", "movedim", "t", "contiguous")
    give(_linear_of_first, "unsqueeze", "squeeze", "expand", "repeat", "tile")
    give(_linear_of_first, "repeat_interleave", "narrow", "select", "index_select", "flip", "roll")
    give(_linear_of_first, "__getitem__", "chunk", "split", "unbind", "tensor_split")
    give(_linear_of_first, "gather", "take_along_dim", "sum", "mean", "cumsum", "neg", "__neg__")
    give(_linear_of_first, "clone", "detach", "to", "type", "float", "double", "tril", "triu")
    give(_linear_of_first, "half", "bfloat16", "cpu", "cuda")
    give(_linear_of_first, "diagonal", "broadcast_to", "requires_grad_")
    give(_like, "view_as", "expand_as", "type_as")
    give(_linear_of_list, "cat", "concat", "stack", "hstack", "vstack")
    give(_fixed, "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
    give(_fixed, "zeros_like", "ones_like", "full_like", "empty_like")
    give(_add(1.0), "add", "__add__", "__radd__")
    give(_add(-1.0), "sub", "subtract", "__sub__")
    give(_add(-1.0, reverse=True), "rsub", "__rsub__")
    give(_product, "mul", "multiply", "__mul__", "__rmul__")
    give(_matmul, "matmul", "__matmul__", "__rmatmul__", "bmm", "mm")
    give(_linear, "linear")
    give(_addmm, "addmm")
    give(_divide, "div", "divide", "true_divide", "__truediv__", "__div__")
    give(_power, "pow", "__pow__")
    give(_dropout, "dropout")
    give(_embedding, "embedding")
    give(_where, "where")
    give(_masked_fill, "masked_fill")
    give(_clamp, "clamp", "clip")
    give(_amax, "amax")
    give(_maximum, "maximum")
    give(_topk, "topk")
    give(_softmax, "softmax")
    give(_log_softmax, "log_softmax")
    give(_logsumexp, "logsumexp")
    give(_layer_norm, "layer_norm")
    give(_gelu, "gelu")
    for name, change in CHANGES.items():
        give(_elementwise(change), name)
    for view in (Tensor.T, Tensor.mT):
        rules[view.__get__] = _linear_of_first
    return rules


_METADATA = {
    *(getattr(torch, name) for name in ("is_floating_point", "is_complex", "numel")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
    ),
    *(
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex")
    ),
    *(getattr(Tensor, name) for name in ("__len__", "is_contiguous", "stride", "element_size")),
    Tensor.ndimension,
    Tensor.get_device,
}

RULES: dict[Callable, Callable] = _table()
