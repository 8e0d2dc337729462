"""Advantages from rewards: a prompt group's baseline, and a scale of the group or the batch."""

import torch
from torch import Tensor

from .recipes import Recipe


def advantages(reward: Tensor, group: Tensor, recipe: Recipe) -> Tensor:
    """Rewards less their baseline, over their scale.

    In a group of one reward, the mean baseline is that reward, the leave-one-out baseline is 0, and
    the standard deviation is 0.

    Args:
        reward: [N], in the reward's unit.
        group: [N] int64, prompt ids.
        recipe: its baseline (not "given"), its scale and its scale_eps are used.

    Returns:
        The advantages, [N].
    """
    _, index, count = group.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=reward.dtype, device=reward.device)
    total = total.index_add(0, index, reward)
    size = count[index]
    mean = (total / count)[index]
    if recipe.baseline == "none":
        out = reward.clone()
    elif recipe.baseline == "mean":
        out = reward - mean
    else:
        out = reward - torch.where(size > 1, (total[index] - reward) / (size - 1).clamp(min=1), 0.0)
    if recipe.scale == "group":
        square = torch.zeros_like(total).index_add(0, index, (reward - mean) ** 2)
        out = out / ((square / (count - 1).clamp(min=1)).sqrt()[index] + recipe.scale_eps)
    elif recipe.scale == "batch":
        spread = reward.std() if len(reward) > 1 else 0.0
        out = out / (spread + recipe.scale_eps)
    return out
