"""Rules of linear operations, which act on each part of a carrier alike.

The rules are the same for finite increments and for derivatives. A rule takes the operation and its
arguments and returns the parts of the result, or NotImplemented where it does not apply.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .carrier import Carrier, Operation, Parts, Rule, aligned, has_carrier, parts_of, value_of


def add(p: Tensor | None, q: Tensor | None) -> Tensor | None:
    """``p + q``, where None is zero."""
    if p is None:
        return q
    return p if q is None else p + q


def subtract(p: Tensor | None, q: Tensor | None) -> Tensor | None:
    """``p - q``, where None is zero."""
    if q is None:
        return p
    return -q if p is None else p - q


def _linear(op: Operation, a: Any, *args: Any, **kwargs: Any) -> Parts:
    """Views, sums, gathers: the operation acts on every part."""
    if not isinstance(a, Carrier) or has_carrier(args, kwargs):
        return NotImplemented
    first = op(a.parts[0], *args, **kwargs)
    if isinstance(first, Tensor) and not first.is_floating_point():
        return NotImplemented  # a cast to integers jumps
    return first, *(None if p is None else op(p, *args, **kwargs) for p in a.parts[1:])


def _like(op: Operation, a: Any, other: Any) -> tuple[Any, ...]:
    """Views and casts that take their shape or dtype from another tensor."""
    other = value_of(other)
    return tuple(None if p is None else op(p, other) for p in parts_of(a, 1))


def _list(op: Operation, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Parts:
    """Concatenations, where a part that is zero in some tensors is filled in there."""
    values = [value_of(t) for t in tensors]
    first = op(values, *args, **kwargs)
    columns = list(zip(*aligned(*tensors), strict=True))[1:]
    return first, *(
        None if all(p is None for p in column) else op(_filled(column, values), *args, **kwargs)
        for column in columns
    )


def _filled(column: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor]:
    """A part of several tensors, with zeros written out."""
    pairs = zip(column, values, strict=True)
    return [torch.zeros_like(value) if p is None else p for p, value in pairs]


def _fixed(op: Operation, a: Any, *args: Any, **kwargs: Any) -> Parts:
    """Operations that read nothing but shape and dtype: their result does not move."""
    return (op(value_of(a), *args, **kwargs),)


def _add(op: Operation, a: Any, other: Any, *, alpha: float = 1) -> Parts:
    """``a + alpha b``."""
    return _combined(_sum_of_values(op, a, other, alpha), a, other, alpha)


def _subtract(op: Operation, a: Any, other: Any, *, alpha: float = 1) -> Parts:
    """``a - alpha b``."""
    return _combined(_sum_of_values(op, a, other, alpha), a, other, -alpha)


def _subtract_from(op: Operation, a: Any, other: Any, *, alpha: float = 1) -> Parts:
    """``b - alpha a``."""
    return _combined(_sum_of_values(op, a, other, alpha), other, a, -alpha)


def _sum_of_values(op: Operation, a: Any, b: Any, alpha: float) -> Tensor:
    # Operators such as __add__ take no alpha.
    kwargs = {} if alpha == 1 else {"alpha": alpha}
    return op(value_of(a), value_of(b), **kwargs)


def _combined(first: Tensor, a: Any, b: Any, scale: float) -> Parts:
    """The parts of ``a + scale b``, whose value `first` is known."""

    def combined(p: Tensor | None, q: Tensor | None) -> Tensor | None:
        if scale == -1:
            part = subtract(p, q)
        else:
            part = add(p, q if q is None or scale == 1 else scale * q)
        # A part may be narrower than the value, which is broadcast over both arguments.
        return part if part is None else part.expand(first.shape).to(first.dtype)

    pairs = list(zip(*aligned(a, b), strict=True))[1:]
    return first, *(combined(p, q) for p, q in pairs)


def _where(op: Operation, condition: Any, input: Any, other: Any) -> Parts:
    """Chooses among the parts as among the values."""
    if op is Tensor.where:
        condition, input = input, condition
    if isinstance(condition, Carrier):
        return NotImplemented
    first = torch.where(condition, value_of(input), value_of(other))
    zero = first.new_zeros(())

    def chosen(p: Tensor | None, q: Tensor | None) -> Tensor | None:
        if p is None and q is None:
            return None
        p, q = zero if p is None else p, zero if q is None else q
        return torch.where(condition, p, q).expand(first.shape)

    pairs = list(zip(*aligned(input, other), strict=True))[1:]
    return first, *(chosen(p, q) for p, q in pairs)


def _masked_fill(op: Operation, a: Any, mask: Tensor, value: Any) -> Parts:
    """Fixes the masked elements; a carrier as the fill is a choice between two tensors."""
    if not isinstance(a, Carrier) or isinstance(value, Carrier):
        return _where(torch.where, mask, value, a)
    filled = (None if p is None else p.masked_fill(mask, 0.0) for p in a.parts[1:])
    return op(a.parts[0], mask, value), *filled


def _embedding(op: Operation, ids: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Looks the rows up in every part of the table."""
    if not isinstance(weight, Carrier):
        return NotImplemented
    return tuple(None if p is None else op(ids, p, *args, **kwargs) for p in weight.parts)


LINEAR: dict[str, Rule] = {
    "linear": _linear,
    "like": _like,
    "list": _list,
    "fixed": _fixed,
    "add": _add,
    "sub": _subtract,
    "rsub": _subtract_from,
    "where": _where,
    "masked_fill": _masked_fill,
    "embedding": _embedding,
}
