"""Reverse mode that keeps a function's inputs and computes the function again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from ..tracing import concrete, levels

Tensors = tuple[Tensor, ...]
Needed = tuple[bool, ...]  # whether the cotangent of each input is needed
Cotangents = tuple[Tensor | None, ...]  # of each input, None where it is not needed
Pull = Callable[[Needed, Tensors, Tensors, Tensors], Cotangents]


def rematerialise(fn: Callable[..., Tensors], *inputs: Tensor, pull: Pull | None = None) -> Tensors:
    """``fn(*inputs)``. Reverse mode saves only the inputs and recomputes, to any order.

    Like `torch.utils.checkpoint`, but under the transforms of torch.func: what `fn` holds while it
    runs is not kept for the backward pass, which computes it again, and a backward pass that is
    itself differentiated is recomputed in the same way. Values and derivatives are those of `fn`.

    In forward mode and with Increments `fn` runs as it is written, also where reverse mode is
    nested inside or around them: the jvp of a `torch.autograd.Function` would be wrong there.

    Args:
        fn: ``(*inputs) -> tuple`` of tensors, in plain operations. It must depend on its inputs
            alone: a derivative with respect to anything else would be lost. See `closed`.
        inputs: tensors.
        pull: ``(needed, inputs, outputs, cotangents) -> cotangents of the inputs``, None where they
            are not needed, in operations that have derivatives; the outputs are then kept as well.
            Without it `fn` is differentiated.

    Returns:
        The outputs of `fn`.

    >>> x = torch.tensor(3.0)
    >>> cube = lambda x: rematerialise(lambda x: (x**3,), x)[0]
    >>> float(torch.func.grad(cube)(x)), float(torch.func.grad(torch.func.grad(cube))(x))
    (27.0, 18.0)
    """
    plain = all(type(x) is Tensor or isinstance(x, nn.Parameter) for x in inputs)
    reverse = plain and torch.is_grad_enabled() and _reverse_mode(inputs)
    if not reverse or _forward_mode(inputs):
        return fn(*inputs)
    outputs: Tensors = _Rematerialised.apply(fn, pull, *inputs)
    return outputs


def pull_back(
    fn: Callable[..., Any],
    needed: Needed,
    inputs: Tensors,
    cotangent: Callable[[Any], Tensor | Tensors],
) -> Tensors:
    """The needed inputs' cotangents, by differentiating `fn`.

    Args:
        fn: ``(*inputs) -> outputs``.
        needed: which inputs' cotangents are returned.
        inputs: where `fn` is differentiated.
        cotangent: the outputs' cotangents as a function of the outputs.
    """

    def of_moving(*moving: Tensor) -> Any:
        rest = iter(moving)
        return fn(*(next(rest) if needs else x for x, needs in zip(inputs, needed, strict=True)))

    moving = (x for x, needs in zip(inputs, needed, strict=True) if needs)
    outputs, back, *_ = torch.func.vjp(of_moving, *moving)
    return back(cotangent(outputs), retain_graph=torch.is_grad_enabled())


def closed(fn: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether `fn` depends on its inputs alone, as far as the transforms around it can tell.

    Args:
        fn: a function of tensors that may hold other tensors.
        inputs: tensors that no transform follows. Then a transform follows the output only if `fn`
            holds a tensor that it follows.
    """
    output = fn(*inputs)
    return concrete(output) and not output.requires_grad


def _forward_mode(inputs: Tensors) -> bool:
    """Whether forward mode of torch.func or torch.autograd is on, inside or around reverse mode.

    All threads share the levels that forward mode opens. The stack of torch.func's transforms
    belongs to one thread, and a tangent to its tensor; so another thread's forward mode does not
    count.
    """
    stack = functorch.get_interpreter_stack() or []
    if any(transform.key() == functorch.TransformType.Jvp for transform in stack):
        return True
    if forward_ad._current_level < 0:
        return False
    tensors = (level for x in inputs if x.is_floating_point() for level in levels(x))
    return any(forward_ad.unpack_dual(x, level=0).tangent is not None for x in tensors)


def _reverse_mode(tensors: Tensors) -> bool:
    """Whether reverse mode follows one of the tensors, at any level of the transforms around."""
    return any(level.requires_grad for x in tensors for level in levels(x))


class _Rematerialised(torch.autograd.Function):
    """See `rematerialise`, which alone calls it, never within forward mode."""

    @staticmethod
    def forward(fn: Callable[..., Tensors], pull: Pull | None, *inputs: Tensor) -> Tensors:
        return tuple(fn(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensors) -> None:
        ctx.fn, ctx.pull, *tensors = inputs
        ctx.split = len(tensors)
        ctx.save_for_backward(*tensors, *(() if ctx.pull is None else output))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Cotangents:
        saved, needed = ctx.saved_tensors, tuple(ctx.needs_input_grad[2:])
        inputs, outputs = saved[: ctx.split], saved[ctx.split :]
        if ctx.pull is None:
            return None, None, *_differentiate(ctx.fn, needed, inputs, cotangents)
        return None, None, *ctx.pull(needed, inputs, outputs, cotangents)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        fn: Callable[..., Tensors],
        pull: Pull | None,
        *inputs: Tensor,
    ) -> tuple[Tensors, int]:
        given = in_dims[2:]
        lanes = [x if d is None else x.movedim(d, 0) for x, d in zip(inputs, given, strict=True)]
        shared = tuple(d is None for d in given)
        pull_lanes = None if pull is None else partial(_pull_lanes, pull, shared)
        of_lanes = torch.func.vmap(fn, in_dims=_dims(shared))
        return _Rematerialised.apply(of_lanes, pull_lanes, *lanes), 0


def _differentiate(
    fn: Callable[..., Tensors], needed: Needed, inputs: Tensors, cotangents: Tensors
) -> Cotangents:
    """The cotangents of the inputs of `fn`, by differentiating it in a way that recomputes too."""
    n = len(inputs)

    def pulled(*tensors: Tensor) -> Tensors:
        return pull_back(fn, needed, tensors[:n], lambda _: tensors[n:])

    return _spread(needed, rematerialise(pulled, *inputs, *cotangents))


def _pull_lanes(
    pull: Pull,
    shared: tuple[bool, ...],
    needed: Needed,
    inputs: Tensors,
    outputs: Tensors,
    cotangents: Tensors,
) -> Cotangents:
    """`pull` in every lane. An input that all lanes share gets the sum of its lanes' cotangents."""
    n, m = len(inputs), len(outputs)

    def of_lane(*tensors: Tensor) -> Tensors:
        grads = pull(needed, tensors[:n], tensors[n : n + m], tensors[n + m :])
        return tuple(grad for grad in grads if grad is not None)

    dims = (*_dims(shared), *[0] * (m + len(cotangents)))
    lanes = torch.func.vmap(of_lane, in_dims=dims)(*inputs, *outputs, *cotangents)
    return tuple(
        grad.sum(0) if grad is not None and is_shared else grad
        for grad, is_shared in zip(_spread(needed, lanes), shared, strict=True)
    )


def _dims(shared: tuple[bool, ...]) -> tuple[int | None, ...]:
    return tuple(None if is_shared else 0 for is_shared in shared)


def _spread(needed: Needed, grads: Tensors) -> Cotangents:
    """The needed inputs' cotangents in the places of their inputs, None elsewhere."""
    rest = iter(grads)
    return tuple(next(rest) if needs else None for needs in needed)
