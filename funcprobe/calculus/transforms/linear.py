"""Rules of linear operations: part by part, the same for finite increments and for derivatives.

A rule takes the operation and its arguments and returns the parts of the result, or
NotImplemented.
"""

import torch
from torch import Tensor

from .carrier import Carrier, find, parts_of, value_of


def _linear(op, a, *args, **kwargs):
    """Views, sums, gathers: the operation on every part."""
    if not isinstance(a, Carrier) or find(args, kwargs) is not None:
        return NotImplemented
    first = op(a.parts[0], *args, **kwargs)
    if isinstance(first, Tensor) and not first.is_floating_point():
        return NotImplemented  # a cast to integers jumps
    return first, *(None if p is None else op(p, *args, **kwargs) for p in a.parts[1:])


def _like(op, a, other):
    """Views and casts that take their shape or dtype from another tensor."""
    other = value_of(other)
    return tuple(None if p is None else op(p, other) for p in parts_of(a, 1))


def _list(op, tensors, *args, **kwargs):
    """cat and stack, where some of the tensors may be fixed."""
    count = len(find(tensors).parts)
    columns = zip(*(parts_of(t, count) for t in tensors), strict=True)
    first = op([value_of(t) for t in tensors], *args, **kwargs)
    out = []
    for column in list(columns)[1:]:
        if all(p is None for p in column):
            out.append(None)
            continue
        filled = [
            torch.zeros_like(value_of(t)) if p is None else p
            for t, p in zip(tensors, column, strict=True)
        ]
        out.append(op(filled, *args, **kwargs))
    return first, *out


def _fixed(op, a, *args, **kwargs):
    """Operations that only look at shape and dtype."""
    return (op(value_of(a), *args, **kwargs),)


def _add(sign: float, reverse: bool = False):
    """``a + sign alpha b``, or with the roles of a and b exchanged."""

    def rule(op, a, other, *, alpha=1):
        b, scale = other, sign * alpha
        count = len(find((a, b)).parts)
        first = op(value_of(a), value_of(b), **({} if alpha == 1 else {"alpha": alpha}))
        a, b = (b, a) if reverse else (a, b)

        def combined(p, q):
            if q is not None:
                q = q if scale == 1 else -q if scale == -1 else scale * q
                p = q if p is None else p + q
            # Broadcasting is the value's: a narrower part is expanded to it.
            return p if p is None else p.expand(first.shape).to(first.dtype)

        pairs = list(zip(parts_of(a, count), parts_of(b, count), strict=True))
        return first, *(combined(p, q) for p, q in pairs[1:])

    return rule


def _where(op, condition, input, other):
    """Chooses among the parts as among the values."""
    if op is Tensor.where:
        condition, input = input, condition
    if isinstance(condition, Carrier):
        return NotImplemented
    count = len(find((input, other)).parts)
    first = torch.where(condition, value_of(input), value_of(other))
    zero = first.new_zeros(())

    def chosen(p, q):
        if p is None and q is None:
            return None
        p, q = zero if p is None else p, zero if q is None else q
        return torch.where(condition, p, q).expand(first.shape)

    pairs = list(zip(parts_of(input, count), parts_of(other, count), strict=True))
    return first, *(chosen(p, q) for p, q in pairs[1:])


def _masked_fill(op, a, mask, value):
    if not isinstance(a, Carrier) or isinstance(value, Carrier):
        return _where(torch.where, mask, value, a)
    filled = (None if p is None else p.masked_fill(mask, 0.0) for p in a.parts[1:])
    return op(a.parts[0], mask, value), *filled


def _embedding(op, ids, weight, *args, **kwargs):
    if not isinstance(weight, Carrier):
        return NotImplemented
    return tuple(None if p is None else op(ids, p, *args, **kwargs) for p in weight.parts)


LINEAR = {
    "linear": _linear,
    "like": _like,
    "list": _list,
    "fixed": _fixed,
    "add": _add(1.0),
    "sub": _add(-1.0),
    "rsub": _add(-1.0, reverse=True),
    "where": _where,
    "masked_fill": _masked_fill,
    "embedding": _embedding,
}
