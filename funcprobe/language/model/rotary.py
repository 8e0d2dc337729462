"""Rotary embeddings whose tables change with the length of the rows, as they are in short rows."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

_UPDATES = "transformers.modeling_rope_utils"  # the module of the decorator that changes tables


class Limit(NamedTuple):
    """Up to which length the tables of short rows are a rotary embedding's."""

    rope_type: str
    longest: int  # tokens in a row


def limit(skeleton: nn.Module) -> Limit | None:
    """The least limit among a module's rotary embeddings, or None if no table changes."""
    limits = [item for part in skeleton.modules() for item in _limits(part).values()]
    return min(limits, key=lambda item: item.longest, default=None)


def varies(part: nn.Module) -> bool:
    """Whether a part is a rotary embedding that changes its tables as it runs."""
    return bool(_limits(part))


def short_rows(part: Any, *args: Any, **options: Any) -> Any:
    """What a rotary embedding gives for rows up to its limit, without a change of its tables.

    With rope type "dynamic" or "longrope" transformers' decorator writes other frequencies into the
    module when a longer row arrives, so that the same call can give other numbers afterwards. Here
    the forward below the decorator runs with the frequencies that rows up to the limit have.
    """
    twin = copy.copy(part)
    twin._buffers = dict(part._buffers)
    for prefix, (rope_type, _) in _limits(part).items():
        reached = getattr(part, f"{prefix}max_seq_len_cached", part.max_seq_len_cached)
        original = part._buffers.get(f"{prefix}original_inv_freq")
        if original is not None and (
            "longrope" in rope_type or reached > part.original_max_seq_len
        ):
            twin._buffers[f"{prefix}inv_freq"] = original
    forward: Any = _below_update(type(part))
    return forward(twin, *args, **options)


def _limits(part: Any) -> dict[str, Limit]:
    """The limits of a rotary embedding by the prefix of its tables' names; empty of other parts."""
    types = getattr(part, "rope_type", None)
    if types is None or _below_update(type(part)) is None:
        return {}
    settings = part.config.rope_parameters
    by_prefix = (
        {f"{layer}_": (rope_type, settings[layer]) for layer, rope_type in types.items()}
        if isinstance(types, dict)
        else {"": (types, settings)}
    )
    limits = {}
    for prefix, (rope_type, values) in by_prefix.items():
        if "dynamic" in rope_type:
            limits[prefix] = Limit(rope_type, part.original_max_seq_len)
        elif rope_type == "longrope":
            limits[prefix] = Limit(rope_type, values["original_max_position_embeddings"])
    return limits


def _below_update(layer: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The forward of a class below transformers' decorator that changes tables, None without it."""
    forward = layer.forward
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        if getattr(forward, "__globals__", {}).get("__name__") == _UPDATES:
            return inner
        forward = inner
    return None
