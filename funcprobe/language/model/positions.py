"""How many positions a model was made for, and how long the rows may be that it is right for."""

from typing import Any, NamedTuple

from torch import nn

from . import rotary

# What transformers calls the tables that positions are read from.
_TABLES = ["wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed"]


class Limit(NamedTuple):
    """The longest rows that a model is right for, and why."""

    longest: int  # tokens in a row
    cause: str  # a sentence


def limit(skeleton: nn.Module) -> Limit | None:
    """The least limit of a model's positions, None if it reads rows of any length."""
    limits = []
    if (rope := rotary.limit(skeleton)) is not None:
        cause = (
            f"Beyond them a rotary embedding of type {rope.rope_type!r} uses other frequencies, "
            "which depend on the longest row."
        )
        limits.append(Limit(rope.longest, cause))
    longest = positions(skeleton)
    if longest is not None and _has_table(skeleton):
        limits.append(Limit(longest, "The model's table of positions holds no more."))
    return min(limits, default=None)


def positions(skeleton: nn.Module) -> int | None:
    """How many positions the configuration says that the model was made for, if it does."""
    config: Any = skeleton.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _has_table(skeleton: nn.Module) -> bool:
    """Whether positions are rows of a table (GPT-2, OPT, GPT-J), which ends somewhere."""
    tensors = (*skeleton.named_parameters(), *skeleton.named_buffers())
    return any(part in _TABLES for name, _ in tensors for part in name.split("."))


def are_angles(skeleton: nn.Module) -> bool:
    """Whether positions are angles of a rotary embedding, which no table bounds."""
    return any("inv_freq" in name for name, _ in skeleton.named_buffers())
