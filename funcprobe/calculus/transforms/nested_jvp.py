"""Derivatives along a line by nested forward mode: torch's own rules, order upon order."""

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.overrides import TorchFunctionMode

from ..tree import concrete

_ONE_THREAD = RLock()  # in torch, forward mode belongs to the process: jvps in two threads collide


def nested(fn: Callable[[Any], Any], at: Any, v: Any, order: int) -> list[Any]:
    """`fn` at a tree of tensors, and its derivatives to `order` along `v`, each a tree like it.

    Every order costs at least twice the one before.
    """
    with _ONE_THREAD, Nestable():
        return _expanded(fn, v, order)(at)


def _expanded(fn: Callable[[Any], Any], v: Any, order: int) -> Callable[[Any], list[Any]]:
    """A function of the point that returns `fn` there and its derivatives to `order` along v."""
    if order == 0:
        return lambda point: [fn(point)]
    lower = _expanded(fn, v, order - 1)

    def terms(point: Any) -> list[Any]:
        # Differentiate with respect to the point directly. A scalar t, as in at + t v, would attach
        # zero tangents to every constant that it meets.
        values, slopes = jvp(lower, (point,), (v,))[:2]
        return [*values, slopes[-1]]

    return terms


class Nestable(TorchFunctionMode):
    """A mode in which nested forward mode is right, and a frozen linear map costs no more than due.

    Under nested jvp, torch's fused layer norm has a wrong second derivative, and its silu has none
    in some paths. Both are written out in plain operations here. A linear map with a frozen weight
    would multiply that weight's zero tangent, and so would a product with a number. Both are
    replaced too.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replaces an operation on tensors that a transform tracks."""
        kwargs = kwargs or {}
        replacement = _REPLACED.get(func)
        if replacement is None or not args or concrete(args[0]):
            return func(*args, **kwargs)
        return replacement(*args, **kwargs)


class _FrozenLinear(torch.autograd.Function):
    """x W^T. It is linear in x, so its jvp is the map itself, which nests to any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_forward(inputs[1])
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: Any) -> Tensor:
        return _FrozenLinear.apply(dx, ctx.saved_tensors[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.saved_tensors[0], None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not concrete(weight):
        return F.linear(x, weight, bias)
    y = _FrozenLinear.apply(x, weight)
    return y if bias is None else y + bias


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.layer_norm written out in plain operations, which every transform knows."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """F.silu written out in plain operations, and never in place."""
    return x * torch.sigmoid(x)


def _times(x: Tensor, other: Any) -> Tensor:
    # A number is passed on as a number: as a tensor of one element it would carry a zero tangent.
    if isinstance(other, int | float):
        return torch.ops.aten.mul.Scalar(x, other)
    return torch.mul(x, other)


_REPLACED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    F.layer_norm: layer_norm,
    F.silu: silu,
    torch.mul: _times,
    Tensor.mul: _times,
    Tensor.__mul__: _times,
    Tensor.__rmul__: _times,
}
