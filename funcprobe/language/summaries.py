"""What a named tuple of tensors prints as: names, shapes and types, never a tensor's values."""

from typing import Any


def summary(fields: Any) -> str:
    """One line for a NamedTuple: its name, and each field's shape and dtype.

    Where a transform maps the fields, they may hold something else than tensors: that is printed as
    it is if it is short, and by its type otherwise.

    >>> import torch
    >>> from funcprobe.language.score import Scores
    >>> summary(Scores(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)))
    'Scores(logp [2, 3] float32, entropy [2, 3] float64)'
    """
    described = (f"{name} {_shape(value)}" for name, value in fields._asdict().items())
    return f"{type(fields).__name__}({', '.join(described)})"


def _shape(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        device = getattr(value, "device", None)
        where = f" {device}" if device is not None and device.type != "cpu" else ""
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{where}"
    text = repr(value)
    return text if len(text) <= 40 else f"({type(value).__name__})"
