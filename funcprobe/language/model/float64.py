"""Float64 throughout: undoes the casts to lower precision inside a Hugging Face model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_FACTORIES: frozenset[Any] = frozenset(
    {torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.arange, torch.linspace}
    | {torch.tensor, torch.rand, torch.randn}
)
_METADATA = frozenset(
    {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride}
)


class Float64(TorchFunctionMode):
    """Within this mode whatever asks for a lower floating-point dtype gets float64.

    A model's norms, rotary embedding and eager softmax cast to float32 inside, so that a model "in
    float64" is not a float64 model. The mode passes through `vmap`, `jvp` and `grad`, and holds in
    the thread that entered it alone.

    >>> with Float64():
    ...     torch.ones(2, dtype=torch.float64).to(torch.float32).dtype
    torch.float64
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls an operation with float64 in the place of a lower dtype."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # most calls read a shape or a device
            return func(*args, **kwargs)
        if func in _CASTS:
            return args[0].double()
        args = tuple(_raise(value) for value in args)
        out = func(*args, **{name: _raise(value) for name, value in kwargs.items()})
        return out.double() if func in _FACTORIES and _is_lower(out) else out


class Promoted(Float64):
    """Like `Float64`, and tensors of a lower floating-point dtype are used as float64 too.

    So a model in any precision computes in float64, one weight at a time, without a copy of it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls an operation with float64 tensors and dtypes in the place of lower ones."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func is F.embedding:  # a table is long, what is looked up is not
            return _promote(func(*args, **kwargs))
        if func is F.linear and len(args) > 1 and _is_lower(args[1]):
            x, weight, *bias = args
            out, _ = _Linear.apply(_promote(x), weight)
            bias = bias or [kwargs.get("bias")]
            return out if bias[0] is None else out + _promote(bias[0])
        writes = name.endswith("_") and not name.endswith("__") or name == "__setitem__"
        first = args[:1] if writes else ()
        args = first + _promote(args[len(first) :])
        return super().__torch_function__(func, types, args, _promote(kwargs))


class _Linear(torch.autograd.Function):
    """``x W'`` in float64, and W in float64, which forward mode uses again.

    For reverse mode, W is kept in its own precision.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        raised = weight.double()
        return F.linear(x, raised), raised

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.save_for_forward(output[1])
        ctx.save_for_backward(inputs[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        return None if dx is None else F.linear(dx, ctx.saved_tensors[0]), None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        return None if dy is None else dy @ ctx.saved_tensors[0].double(), None


def rotary_frequencies(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of the module's rotary embeddings, computed again in float64.

    A table cast from float32 carries its rounding into every position. A table that differs from
    the class's own by more than rounding was put there on purpose, and is left out.

    Returns:
        The tables by the buffer's qualified name, float64.
    """
    tables = {}
    for prefix, part in module.named_modules():
        buffers = dict(part.named_buffers(recurse=False))
        if not any("inv_freq" in name for name in buffers):
            continue
        embedding: Any = type(part)
        with Float64():
            fresh = dict(embedding(part.config).named_buffers(recurse=False))
        for name, table in buffers.items():
            computed = fresh.get(name)
            if computed is not None and computed.shape == table.shape:
                computed = computed.to(device=table.device, dtype=torch.float64)
                if torch.allclose(computed, table.double(), rtol=1e-5, atol=0.0):
                    tables[f"{prefix}.{name}"] = computed
    return tables


def _raise(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value


def _is_lower(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _LOWER


def _promote(value: Any) -> Any:
    """Tensors of lower precision as float64, in tuples, lists and dicts too."""
    if _is_lower(value):
        return value.double()
    if type(value) in (tuple, list):
        return type(value)(_promote(leaf) for leaf in value)
    if type(value) is dict:
        return {key: _promote(leaf) for key, leaf in value.items()}
    return value
