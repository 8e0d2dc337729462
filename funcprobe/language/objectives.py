"""Policy-gradient objectives by recipe: fixed on the whole batch, then summed over its rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .advantages import advantages
from .batch import Batch, lengths, unknown_rows
from .model.split import Params
from .recipes import RECIPES as RECIPES
from .recipes import Recipe as Recipe
from .recipes import as_recipe
from .score import Score
from .tracing import concrete

Loss = Callable[[Params, Batch], Tensor]


def prepare(
    batch: Batch,
    recipe: str | Recipe,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    max_length: int | None = None,
) -> Batch:
    """Fixes advantages and token weights on the whole batch, before it is cut into rows.

    The rows' losses then sum to the batch loss whatever the micro-batches are. Advantages are made
    from the rewards; a batch without rewards uses the advantages that it brings.

    Args:
        batch: N rows, complete groups.
        recipe: a name in `RECIPES`, or a `Recipe`.
        old_logp: [N, R] nats under the behaviour policy; what the batch holds if not given.
        ref_logp: [N, R] nats under the KL reference; needed if the recipe has ``beta > 0``.
        max_length: the constant divisor of "constant" aggregation, in tokens; R if not given.

    Returns:
        The batch with advantage, weight, old_logp and ref_logp filled.

    Raises:
        ValueError: an unknown recipe, a max_length below 1, a field that the recipe needs and that
            is unknown (nan), log-probabilities of another shape, or advantages in the batch that
            differ from those the recipe makes of its rewards.

    >>> from funcprobe import collate
    >>> batch = collate([[5], [5]], [[1, 2], [3, 4]], reward=[1.0, 0.0])
    >>> prepare(batch, "rloo", old_logp=torch.zeros(2, 2)).advantage.tolist()
    [1.0, -1.0]
    """
    recipe = as_recipe(recipe)
    if max_length is not None and max_length < 1:
        raise ValueError(
            f"prepare: max_length must be a positive number of tokens, not {max_length}: the loss "
            "is divided by it. Pass the longest completion that the run allowed."
        )
    if old_logp is not None:
        batch = batch._replace(old_logp=_like_response("old_logp", old_logp, batch))
    if ref_logp is not None:
        batch = batch._replace(ref_logp=_like_response("ref_logp", ref_logp, batch))
    if recipe.ratio != "none":
        _require(batch, "old_logp", "Pass old_logp=evaluate(score, params, batch).logp.")
    if recipe.beta:
        _require(batch, "ref_logp", "Pass ref_logp=, or use a recipe with beta=0.")
    return batch._replace(
        advantage=_advantage(batch, recipe), weight=_weights(batch, recipe, max_length)
    )


def objective(score: Score, recipe: str | Recipe) -> Loss:
    """The loss of a prepared batch as a function, token by token.

    Row i depends on row i of the batch alone: `prepare` has put what couples rows into the batch.

    Args:
        score: a scorer.
        recipe: the one the batch was prepared with.

    Returns:
        ``fn(params, batch) -> [N, R]``. The sum of these numbers is the loss.

    Raises:
        ValueError: an unknown recipe. The function itself raises it for a batch that was not
            prepared.
    """
    return _Loss(score, as_recipe(recipe))


@dataclass(frozen=True, eq=False)
class _Loss:
    """What `objective` returns."""

    score: Score
    recipe: Recipe

    @property
    def separable(self) -> bool:
        """Whether the rows are known not to depend on each other, as the scorer's are."""
        return getattr(self.score, "separable", False)

    @property
    def false_derivative(self) -> str:
        """How its derivative differs from that of its values; "" if it does not."""
        return getattr(self.score, "false_derivative", "")

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """The loss of each response token, [N, R]."""
        _check_prepared(batch)
        logp = self.score(params, batch).logp
        advantage = batch.advantage.to(logp.dtype).unsqueeze(-1)
        token = _surrogate(self.recipe, logp, advantage, batch)
        if self.recipe.beta:
            ref = torch.where(batch.response, batch.ref_logp.to(logp.dtype), 0.0)
            token = token + self.recipe.beta * (torch.expm1(ref - logp) - (ref - logp))
        return token * batch.weight.to(logp.dtype)


def _advantage(batch: Batch, recipe: Recipe) -> Tensor:
    """The advantages that the batch brings, or those that the recipe makes of its rewards, [N]."""
    brought = not batch.advantage.isnan().any()
    if recipe.baseline == "given" or (brought and batch.reward.isnan().any()):
        _require(batch, "advantage", "Give an advantage for every row, or another baseline.")
        return batch.advantage
    _require(batch, "reward", "Give rewards, or advantages for every row.")
    made = advantages(batch.reward, batch.group, recipe)
    if brought and not torch.allclose(batch.advantage, made, rtol=1e-6, atol=1e-9):
        raise ValueError(
            "prepare: the batch brings advantages that differ from those the recipe makes of its "
            "rewards. Leave one of the two out, or in Python, keep the advantages by a recipe with "
            "baseline='given'."
        )
    return made


def clipped(logp: Tensor, batch: Batch, recipe: str | Recipe) -> Tensor:
    """The response tokens whose surrogate is clipped, so that it has no gradient, [N, R] bool.

    Args:
        logp: [N, R] nats at the parameters in question.
        batch: a prepared batch.
        recipe: the one it was prepared with.
    """
    recipe = as_recipe(recipe)
    if recipe.ratio == "none":
        return torch.zeros_like(batch.response)
    ratio, advantage = _log_ratio(recipe, logp, batch).exp(), batch.advantage.unsqueeze(-1)
    above = (ratio > 1 + recipe.clip_high) & (advantage > 0)
    below = (ratio < 1 - recipe.clip_low) & (advantage < 0)
    return (above | below) & batch.response


def _log_ratio(recipe: Recipe, logp: Tensor, batch: Batch) -> Tensor:
    """The log of the ratio that each token's loss has, [N, R]."""
    log_ratio = logp - torch.where(batch.response, batch.old_logp.to(logp.dtype), 0.0)
    if recipe.ratio == "sequence":
        # Every token carries the loss of its whole sequence, and the weights divide it among them.
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(logp)
    return log_ratio


def _surrogate(recipe: Recipe, logp: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    """``-min(r A, clip(r) A)`` of each token, [N, R]; ``-A logp`` without a ratio."""
    if recipe.ratio == "none":
        return -advantage * logp
    ratio = _log_ratio(recipe, logp, batch).exp()
    clipped = ratio.clamp(1 - recipe.clip_low, 1 + recipe.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def _weights(batch: Batch, recipe: Recipe, max_length: int | None) -> Tensor:
    """What each token's loss counts in the batch loss, [N, R], 0 off the response."""
    n, steps = batch.response.shape
    length = lengths(batch).clamp(min=1).unsqueeze(-1).double()
    one = torch.ones_like(length)
    weights = {
        "sequence_sum": 1 / length / n if recipe.ratio == "sequence" else one / n,
        "sequence_mean": 1 / length / n,
        "token_mean": one / batch.response.sum(),
        "constant": one / (n * (max_length or steps)),
    }[recipe.aggregate]
    return weights * batch.response


def _require(batch: Batch, name: str, remedy: str) -> None:
    """Raises ValueError, with the remedy, if a field is unknown in some row."""
    rows = unknown_rows(batch, name).nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"prepare: {name} is unknown in {len(rows)} rows, {rows[:5]}. {remedy}")


def _like_response(name: str, values: Tensor, batch: Batch) -> Tensor:
    """The values [N, R] in the batch's dtype and on its device, without a graph."""
    if values.shape != batch.response.shape:
        raise ValueError(
            f"prepare: {name} must be {list(batch.response.shape)} like the batch's responses, not "
            f"{list(values.shape)}. Score the same batch, not a trimmed or a wider one."
        )
    return values.detach().double().to(batch.response.device)


def _check_prepared(batch: Batch) -> None:
    if concrete(batch.weight) and batch.weight.isnan().any():
        raise ValueError(
            "objective: a prepared batch was expected, but this one was not prepared: its token "
            "weights are unknown (nan). Call prepare(batch, recipe) on the whole batch first."
        )
