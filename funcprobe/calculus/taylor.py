"""Derivatives of a function of parameters along a direction, by nested forward mode."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.overrides import TorchFunctionMode

from .precision import exact
from .rows import default_rows, keep_pages
from .tree import Params, blocks, check_direction, check_nan, concatenate, concrete


def taylor(
    fn: Callable, params: Params, v: Params, batch, *, order: int = 1, rows: int | None = None
) -> tuple:
    r"""``f, f', f'', ...``: derivatives of `fn` along ``params + t v`` at t = 0, by nested jvp.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        v: a direction with exactly their names and shapes.
        batch: a tree of tensors with leading N.
        order: the highest derivative; each costs about twice the one before.
        rows: rows per block; the default follows from the shapes.

    Returns:
        One tree like fn's output for each order 0..`order`.

    Raises:
        ValueError: names or shapes that do not fit, non-finite v, nan in a derivative.

    >>> square = lambda p, x: x * p["a"] ** 3
    >>> at, along = {"a": torch.tensor(2.0)}, {"a": torch.tensor(1.0)}
    >>> [float(term) for term in taylor(square, at, along, torch.ones(1), order=2)]
    [8.0, 12.0, 12.0]
    """
    if order < 1:
        raise ValueError(f"taylor: order must be at least 1, not {order}.")
    check_direction("taylor", v, params)
    v = {name: v[name].to(p) for name, p in params.items()}
    parts = []
    keep_pages()
    with torch.no_grad(), exact(), Nestable():
        for part in blocks(batch, rows or default_rows(batch)):
            parts.append(_derivatives(fn, params, v, part, order))
    terms = tuple(concatenate(list(term)) for term in zip(*parts, strict=True))
    for term in terms:
        check_nan("taylor", term)
    return terms


def _derivatives(fn, params: Params, v: Params, part, order: int) -> list:
    def terms(p: Params):
        return [fn(p, part)]

    # In the parameters themselves, not in a t of params + t v: torch would carry zero tangents of
    # every constant that t meets.
    for _ in range(order):
        terms = _one_more(terms, v)
    return terms(params)


def _one_more(terms: Callable, v: Params) -> Callable:
    """From a function that gives f to its m-th derivative along v, the same to the next."""

    def longer(p: Params) -> list:
        values, slopes = jvp(terms, (p,), (v,))
        return [*values, slopes[-1]]

    return longer


class Nestable(TorchFunctionMode):
    """Within this mode nested forward mode is right, and a frozen linear costs what it should.

    torch's fused layer norm has a wrong second derivative under nested jvp, and its silu none in
    some paths; both are written out in plain operations. A linear map with a frozen weight would
    multiply that weight's zero tangent.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replaces an operation on tensors that a transform tracks."""
        kwargs = kwargs or {}
        replacement = _REPLACED.get(func)
        if replacement is None or not args or concrete(args[0]):
            return func(*args, **kwargs)
        return replacement(*args, **kwargs)


class _FrozenLinear(torch.autograd.Function):
    """x W^T. Linear in x, so its jvp is itself, which nests to any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(inputs[1])
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def jvp(ctx, dx: Tensor, _) -> Tensor:
        return _FrozenLinear.apply(dx, ctx.saved_tensors[0])

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.saved_tensors[0], None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not concrete(weight):
        return F.linear(x, weight, bias)
    y = _FrozenLinear.apply(x, weight)
    return y if bias is None else y + bias


def _layer_norm(x: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.sigmoid(x)


def _times(x: Tensor, other) -> Tensor:
    # By a number as such: as a tensor of one element it would carry a zero tangent.
    if isinstance(other, int | float):
        return torch.ops.aten.mul.Scalar(x, other)
    return torch.mul(x, other)


_REPLACED = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.silu: _silu,
    torch.mul: _times,
    Tensor.mul: _times,
    Tensor.__mul__: _times,
    Tensor.__rmul__: _times,
}
