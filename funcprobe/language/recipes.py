"""Recipes of policy-gradient objectives, as plain settings: this file needs no torch."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Recipe:
    """How rewards become advantages, a ratio a loss, and token losses a batch loss.

    A token's loss is ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta * k3`` with
    ``r = exp(logp - old_logp)`` and ``k3 = e^d - d - 1``, ``d = ref_logp - logp``.

    Args:
        baseline: what is subtracted from a reward: nothing, its prompt group's mean, or the mean of
            the group's other rewards ("loo", leave-one-out). "given" takes the advantages that the
            batch brings.
        scale: what an advantage is divided by: nothing, or the unbiased standard deviation of the
            rewards in the prompt group or in the batch, plus `scale_eps`.
        scale_eps: see `scale`, in units of reward.
        ratio: whether r belongs to a token or to a whole sequence. With "none" the loss is
            ``-A logp``, whose gradient is the one at r = 1.
        clip_low, clip_high: r is clipped to ``[1 - clip_low, 1 + clip_high]``.
        beta: the coefficient of the KL penalty k3, per nat.
        aggregate: how token losses become the batch loss: the mean over sequences of their sums or
            of their means, the mean over all tokens, or the sum over all tokens divided by the
            number of sequences and by a constant number of tokens.

    Raises:
        ValueError: a choice that is not one of those listed, or a number that is negative or nan.

    >>> Recipe(baseline="loo").baseline
    'loo'
    """

    baseline: Literal["none", "mean", "loo", "given"] = "mean"
    scale: Literal["none", "group", "batch"] = "none"
    scale_eps: float = 1e-4
    ratio: Literal["none", "token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    aggregate: Literal["sequence_sum", "sequence_mean", "token_mean", "constant"] = "constant"

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self)).items():
            choices, value = get_args(annotation), getattr(self, name)
            if choices and value not in choices:
                raise ValueError(f"Recipe: {name} must be one of {choices}, not {value!r}.")
            if annotation is float and not (isinstance(value, int | float) and value >= 0):
                raise ValueError(f"Recipe: {name} must be a number of at least 0, not {value!r}.")


RECIPES: dict[str, Recipe] = {
    # Williams 1992: sequence sums, no baseline.
    "reinforce": Recipe(baseline="none", ratio="none", aggregate="sequence_sum"),
    # Ahmadian et al. 2024, arXiv 2402.14740: leave-one-out baseline, one ratio a sequence.
    "rloo": Recipe(baseline="loo", ratio="sequence", aggregate="sequence_sum"),
    # Shao et al. 2024, arXiv 2402.03300: mean over sequences of each one's token mean.
    "grpo": Recipe(scale="group", aggregate="sequence_mean"),
    # Liu et al. 2025, arXiv 2503.20783: no length or difficulty bias, a constant divisor.
    "dr_grpo": Recipe(aggregate="constant"),
    # Yu et al. 2025, arXiv 2503.14476: mean over all tokens, clip higher.
    "dapo": Recipe(scale="group", clip_high=0.28, aggregate="token_mean"),
}


def as_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe itself, or the one that `RECIPES` has under that name.

    Raises:
        ValueError: a name that is not in `RECIPES`.

    >>> as_recipe("rloo").baseline
    'loo'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: use one of {sorted(RECIPES)}, or a Recipe.")
    return RECIPES[recipe]
