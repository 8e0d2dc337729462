"""Derivatives along a line by nested forward mode: torch's own rules, order upon order."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.overrides import TorchFunctionMode

from ..tree import concrete


def nested(fn: Callable, at, v, order: int) -> list:
    """``fn`` at a tree of tensors, and its derivatives to `order` along `v`, each a tree like it.

    Each order costs twice the one before or more.
    """

    def terms(p):
        return [fn(p)]

    # In `at` itself, not in a t of at + t v: torch would carry zero tangents of every constant
    # that t meets.
    for _ in range(order):
        terms = _one_more(terms, v)
    with Nestable():
        return terms(at)


def _one_more(terms: Callable, v) -> Callable:
    """From a function that gives f to its m-th derivative along v, the same to the next."""

    def longer(p) -> list:
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


def layer_norm(x: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """F.layer_norm written out in plain operations, which every transform knows."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(dims, keepdim=True) + eps)
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
    F.layer_norm: layer_norm,
    F.silu: _silu,
    torch.mul: _times,
    Tensor.mul: _times,
    Tensor.__mul__: _times,
    Tensor.__rmul__: _times,
}
