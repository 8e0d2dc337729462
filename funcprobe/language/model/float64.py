"""Float64 throughout: undoes the casts to lower precision inside a Hugging Face model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


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
        if func in _CASTS:
            return args[0].double()
        args = tuple(_raise(value) for value in args)
        return func(*args, **{name: _raise(value) for name, value in kwargs.items()})


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
