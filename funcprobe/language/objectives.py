"""Policy-gradient objectives: a table of recipes, fixed on the whole batch, then summed by rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from .batch import Batch, lengths
from .recipes import RECIPES as RECIPES
from .recipes import Recipe as Recipe
from .recipes import as_recipe
from .score import Scores


def prepare(
    batch: Batch,
    recipe: str | Recipe,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    max_length: int | None = None,
) -> Batch:
    """Fixes advantages and token weights on the whole batch, before it is cut into rows.

    So the rows' losses sum to the batch loss whatever the micro-batches. Advantages are made from
    the rewards; a batch without rewards uses the advantages it brings.

    Args:
        batch: N rows, complete groups.
        recipe: a name in `RECIPES`, or a `Recipe`.
        old_logp: [N, R] nats under the behaviour policy; the batch's own if not given.
        ref_logp: [N, R] nats under the KL reference; needed if the recipe has ``beta > 0``.
        max_length: the constant divisor of "constant" aggregation, in tokens; R if not given.

    Returns:
        The batch with advantage, weight, old_logp and ref_logp filled.

    Raises:
        ValueError: an unknown recipe, a field it needs that is unknown (nan), or advantages in
            the batch that differ from those the recipe makes of its rewards.
    """
    recipe = as_recipe(recipe)
    if old_logp is not None:
        batch = batch._replace(old_logp=_like(batch, old_logp))
    if ref_logp is not None:
        batch = batch._replace(ref_logp=_like(batch, ref_logp))
    if recipe.ratio != "none":
        _known(batch, "old_logp", "Pass old_logp=evaluate(score, params, batch).logp.")
    if recipe.beta:
        _known(batch, "ref_logp", "Pass ref_logp=, or use a recipe with beta=0.")
    return batch._replace(
        advantage=_advantage(batch, recipe), weight=_weights(batch, recipe, max_length)
    )


def objective(
    score: Callable[[object, Batch], Scores], recipe: str | Recipe
) -> Callable[[object, Batch], Tensor]:
    """The loss of a prepared batch by token: ``fn(params, batch) -> [N, R]``, its sum the loss.

    Row-separable: `prepare` has put what couples rows into the batch.

    Args:
        score: a scorer.
        recipe: the one the batch was prepared with.

    Raises:
        ValueError: an unknown recipe; where the function is called, a batch that was not prepared.
    """
    recipe = as_recipe(recipe)

    def loss(params, batch: Batch) -> Tensor:
        _prepared(batch)
        logp = score(params, batch).logp
        advantage = batch.advantage.to(logp.dtype).unsqueeze(-1)
        token = _surrogate(recipe, logp, advantage, batch)
        if recipe.beta:
            ref = torch.where(batch.response, batch.ref_logp.to(logp.dtype), 0.0)
            token = token + recipe.beta * (torch.expm1(ref - logp) - (ref - logp))
        return token * batch.weight.to(logp.dtype)

    return loss


def advantages(reward: Tensor, group: Tensor, recipe: Recipe) -> Tensor:
    """Rewards less their baseline, over their scale: [N] from [N] rewards and prompt ids.

    A group of one has mean and leave-one-out baseline equal to its reward and 0, and standard
    deviation 0.
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


def _advantage(batch: Batch, recipe: Recipe) -> Tensor:
    brought = not batch.advantage.isnan().any()
    if recipe.baseline == "given" or (brought and batch.reward.isnan().any()):
        _known(batch, "advantage", "Give an advantage for every row, or another baseline.")
        return batch.advantage
    _known(batch, "reward", "Give rewards, or advantages for every row.")
    made = advantages(batch.reward, batch.group, recipe)
    if brought and not torch.allclose(batch.advantage, made, rtol=1e-6, atol=1e-9):
        raise ValueError(
            "prepare: the batch brings advantages that differ from those the recipe makes of its "
            "rewards. Use a recipe with baseline='given' to keep them, or clear them: "
            "batch._replace(advantage=torch.full_like(batch.advantage, torch.nan))."
        )
    return made


def _surrogate(recipe: Recipe, logp: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    if recipe.ratio == "none":
        return -advantage * logp
    log_ratio = logp - torch.where(batch.response, batch.old_logp.to(logp.dtype), 0.0)
    if recipe.ratio == "sequence":
        # Every token carries its sequence's loss; the weights share it out.
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(logp)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - recipe.clip_low, 1 + recipe.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def _weights(batch: Batch, recipe: Recipe, max_length: int | None) -> Tensor:
    n, steps = batch.response.shape
    length = lengths(batch).clamp(min=1).unsqueeze(-1).double()
    each = {
        "sequence_sum": 1 / length / n
        if recipe.ratio == "sequence"
        else torch.ones_like(length) / n,
        "sequence_mean": 1 / length / n,
        "token_mean": torch.ones_like(length) / batch.response.sum(),
        "constant": torch.ones_like(length) / (n * (max_length or steps)),
    }[recipe.aggregate]
    return each * batch.response


def _known(batch: Batch, name: str, remedy: str) -> None:
    value = getattr(batch, name)
    unknown = value.isnan() & batch.response if value.ndim == 2 else value.isnan()
    if unknown.any():
        rows = unknown.nonzero()[:, 0].unique().tolist()
        raise ValueError(f"prepare: {name} is unknown in {len(rows)} rows, {rows[:5]}. {remedy}")


def _like(batch: Batch, values: Tensor) -> Tensor:
    if values.shape != batch.response.shape:
        raise ValueError(
            f"prepare: per-token values must be {list(batch.response.shape)} like the batch's "
            f"responses, not {list(values.shape)}."
        )
    return values.detach().double().to(batch.response.device)


def _prepared(batch: Batch) -> None:
    weight = batch.weight
    readable = torch.func.debug_unwrap(weight, recurse=False) is weight
    if readable and weight.isnan().any():
        raise ValueError(
            "objective: the batch was not prepared, its token weights are unknown (nan). "
            "Call prepare(batch, recipe) on the whole batch first."
        )
