"""Functions whose derivative is known not to be that of their values, and one that is mended."""

from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def check_derivative(where: str, fn: object) -> None:
    """Raises ValueError if the derivative of `fn` is not that of its values, as far as is known.

    A function says so in an attribute ``false_derivative``, a sentence, which is "" where all is
    right. Here it is also found in what another function is made of: its closure, the global names
    that it reads, its partial arguments and the object that it is a method of.
    """
    reason = _false_derivative(fn, set())
    if reason:
        raise ValueError(
            f"{where}: a function was expected whose derivative is that of its values, but "
            f"{reason}. Measure it by sweep(..., change='increment') at small etas of both signs, "
            "or use an adapter whose layers detach nothing, such as plain LoRA. The gradient is "
            "what the trainer takes, and is not affected."
        )


class WholeEmbeddings(TorchFunctionMode):
    """A mode in which the backward pass of `F.embedding` is the derivative of its values.

    Otherwise torch gives the row `padding_idx` no gradient, as a trainer wants it, and with
    `scale_grad_by_freq` it divides by how often a row occurs. The values do not change.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls an operation; an embedding without the two options."""
        return (_embedding if func is F.embedding else func)(*args, **kwargs or {})


def _embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return F.embedding(ids, weight, None, max_norm, norm_type, False, sparse)


def _false_derivative(fn: object, seen: set[int]) -> str:
    if id(fn) in seen or isinstance(fn, Tensor | type | ModuleType):
        return ""
    seen.add(id(fn))
    reason = getattr(fn, "false_derivative", "")
    if isinstance(reason, str) and reason:
        return reason
    return next(filter(None, (_false_derivative(part, seen) for part in _parts(fn))), "")


def _parts(fn: object) -> list[object]:
    """What a function or callable object is made of."""
    if isinstance(fn, partial):
        return [fn.func, *fn.args, *fn.keywords.values()]
    if isinstance(fn, MethodType):
        return [fn.__self__, fn.__func__]
    if isinstance(fn, list | tuple):
        return list(fn)
    if isinstance(fn, dict):
        return list(fn.values())
    if isinstance(fn, FunctionType):
        names, globals_ = fn.__code__.co_names, fn.__globals__
        read = [globals_[name] for name in names if name in globals_]
        near = [x for x in read if getattr(x, "__globals__", globals_) is globals_]  # no libraries
        cells = [value for cell in fn.__closure__ or () for value in _contents(cell)]
        return [*cells, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values(), *near]
    return list(vars(fn).values()) if callable(fn) and hasattr(fn, "__dict__") else []


def _contents(cell: CellType) -> list[object]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty as long as its variable is
        return []
