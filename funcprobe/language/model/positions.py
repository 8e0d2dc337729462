"""How many positions a model was made for, and whether they are a table that ends there."""

from typing import Any

from torch import nn

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def positions(skeleton: nn.Module) -> int | None:
    """How many positions the configuration says that the model was made for, if it does."""
    config: Any = skeleton.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def has_table(skeleton: nn.Module) -> bool:
    """Whether positions are rows of a table (GPT-2, OPT, GPT-J), which ends somewhere."""
    tensors = (*skeleton.named_parameters(), *skeleton.named_buffers())
    return any(part in _TABLES for name, _ in tensors for part in name.split("."))


def are_angles(skeleton: nn.Module) -> bool:
    """Whether positions are angles of a rotary embedding, which no table bounds."""
    return any("inv_freq" in name for name, _ in skeleton.named_buffers())
