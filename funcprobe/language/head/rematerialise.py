"""Reverse mode that keeps a function's inputs and computes the function again."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Tensors = tuple[Tensor, ...]
Needed = tuple[bool, ...]


def recompute(fn: Callable[..., Tensors], *inputs: Tensor, pull: Callable | None = None) -> Tensors:
    """``fn(*inputs)``, of which reverse mode keeps the inputs alone, to any order.

    What `fn` holds while it runs is never held for a backward pass, which computes it again. The
    backward pass is recomputed likewise where it is itself differentiated. Forward mode and
    Increments run `fn` as it is written, also where reverse mode is nested within or around them:
    a Function's own jvp would be wrong when nested.

    Args:
        fn: ``(*inputs) -> tuple`` of tensors, in plain operations. It must depend on its inputs
            alone: a derivative in anything else would be lost. See `closed`.
        inputs: tensors.
        pull: ``(needed, inputs, outputs, cotangents) -> cotangents of the inputs``, in operations
            that have derivatives, None where not needed; the outputs are then kept too. The default
            differentiates `fn`.

    >>> x = torch.tensor(3.0)
    >>> cube = lambda x: recompute(lambda x: (x**3,), x)[0]
    >>> float(torch.func.grad(cube)(x)), float(torch.func.grad(torch.func.grad(cube))(x))
    (27.0, 18.0)
    """
    plain = all(type(x) is Tensor or isinstance(x, nn.Parameter) for x in inputs)
    if not (plain and torch.is_grad_enabled()) or _forward_mode() or not _followed(inputs):
        return fn(*inputs)
    return _Recomputed.apply(fn, pull, *inputs)


def pull_back(
    fn: Callable[..., Tensor | Tensors], needed: Needed, inputs: Tensors, cotangent: Callable
) -> Tensors:
    """The cotangents of the inputs that are needed, from ``cotangent(fn(*inputs))``."""

    def of(*moving: Tensor) -> Tensor | Tensors:
        left = iter(moving)
        return fn(*(next(left) if some else x for x, some in zip(inputs, needed, strict=True)))

    moving = (x for x, some in zip(inputs, needed, strict=True) if some)
    out, back = torch.func.vjp(of, *moving)
    return back(cotangent(out), retain_graph=torch.is_grad_enabled())


def closed(fn: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether `fn` depends on its inputs alone, as far as any transform around it can tell.

    `inputs` are any that no transform follows; what comes of them is followed only if `fn` holds
    something that is.
    """
    out = fn(*inputs)
    return torch.func.debug_unwrap(out) is out and not out.requires_grad


def _forward_mode() -> bool:
    """Whether forward mode is on, by torch.func or torch.autograd, around or within reverse."""
    return forward_ad._current_level >= 0


def _followed(tensors: Tensors) -> bool:
    """Whether reverse mode follows one of them, at any level of the transforms around."""
    for x in tensors:
        while not x.requires_grad:
            below = torch.func.debug_unwrap(x, recurse=False)
            if below is x:
                break
            x = below
        else:
            return True
    return False


class _Recomputed(torch.autograd.Function):
    """See `recompute`, which alone calls it, never within forward mode."""

    @staticmethod
    def forward(fn: Callable, pull: Callable, *inputs: Tensor) -> Tensors:
        return tuple(fn(*inputs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn, ctx.pull, *tensors = inputs
        ctx.split = len(tensors)
        ctx.save_for_backward(*tensors, *(() if ctx.pull is None else output))

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        saved, needed = ctx.saved_tensors, tuple(ctx.needs_input_grad[2:])
        inputs, outputs = saved[: ctx.split], saved[ctx.split :]
        if ctx.pull is None:
            return None, None, *_pull(ctx.fn, needed, inputs, cotangents)
        return None, None, *ctx.pull(needed, inputs, outputs, cotangents)

    @staticmethod
    def vmap(info, in_dims, fn: Callable, pull: Callable, *inputs: Tensor):
        dims = tuple(None if d is None else 0 for d in in_dims[2:])
        inputs = [
            x if d is None else x.movedim(d, 0) for x, d in zip(inputs, in_dims[2:], strict=True)
        ]
        lanes = None if pull is None else partial(_pull_lanes, pull, dims)
        return _Recomputed.apply(torch.func.vmap(fn, in_dims=dims), lanes, *inputs), 0


def _pull(fn: Callable, needed: Needed, inputs: Tensors, cotangents: Tensors):
    """The cotangents of the inputs of `fn`, by differentiating it."""
    n = len(inputs)

    def pulled(*tensors: Tensor) -> Tensors:
        return pull_back(fn, needed, tensors[:n], lambda out: tensors[n:])

    return _spread(needed, recompute(pulled, *inputs, *cotangents))


def _pull_lanes(
    pull: Callable, dims: tuple, needed: Needed, inputs: Tensors, outputs: Tensors, cotangents
):
    """`pull` for each lane; what all lanes share gets the sum of theirs."""
    n, m = len(inputs), len(outputs)

    def of_lane(*tensors: Tensor) -> Tensors:
        grads = pull(needed, tensors[:n], tensors[n : n + m], tensors[n + m :])
        return tuple(g for g in grads if g is not None)

    every = torch.func.vmap(of_lane, in_dims=(*dims, *[0] * (m + len(cotangents))))
    grads = _spread(needed, every(*inputs, *outputs, *cotangents))
    return tuple(
        g.sum(0) if g is not None and d is None else g for g, d in zip(grads, dims, strict=True)
    )


def _spread(needed: Needed, given: Tensors) -> tuple[Tensor | None, ...]:
    left = iter(given)
    return tuple(next(left) if some else None for some in needed)
