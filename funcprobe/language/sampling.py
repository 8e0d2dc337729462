"""How tokens are drawn from logits: the temperature, and which tokens are possible at all."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn, and so which policy is scored.

    The logits are divided by the temperature. Then top-k, top-p and min-p, in this order, each take
    tokens away, and the probabilities of those that remain are normalised again. This is what
    `generate` of Hugging Face does, ties included. vLLM takes min-p first. That is another policy
    only where top-p and min-p are both on: its top-p then counts what min-p has left, and may keep
    fewer tokens.

    Args:
        temperature: what the logits are divided by. A tensor [] may be differentiated.
        top_p: the least probability of the nucleus from which tokens are drawn; 1 is off.
        top_k: how many of the likeliest tokens are possible, and those that tie with the last of
            them; 0 is off.
        min_p: the least probability of a possible token, over that of the likeliest; 0 is off.

    Raises:
        ValueError: a temperature that is not positive and finite, top_p outside (0, 1], top_k that
            is not a whole number from 0 on, or min_p outside [0, 1].
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
                raise ValueError(f"Sampling: {name} must be a number, not {value!r}.")
        if not 0 < self.temperature < torch.inf:
            raise ValueError(
                f"Sampling: temperature must be positive and finite, not {self.temperature}. "
                "Greedy decoding has no entropy and no gradient."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must lie in (0, 1], not {self.top_p}. 1 is off.")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(
                f"Sampling: top_k must be a whole number, not {self.top_k!r}. 0 is off."
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling: min_p must lie in [0, 1], not {self.min_p}. 0 is off.")

    @property
    def truncates(self) -> bool:
        """Whether some tokens may be impossible."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def possible(self, logits: Tensor) -> Tensor:
        """The tokens that can be drawn, [..., V] bool.

        Args:
            logits: [..., V], over the temperature.

        >>> logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
        >>> Sampling(top_k=2).possible(logits).tolist()
        [True, True, False, False]
        >>> Sampling(top_p=0.8, min_p=0.4).possible(logits).tolist()
        [True, True, False, False]
        """
        kept = torch.ones_like(logits, dtype=torch.bool)
        if self.top_k > 0:
            kept = likeliest(logits, self.top_k)
        if self.top_p < 1:
            kept = kept & nucleus(logits.masked_fill(~kept, -torch.inf), self.top_p)
        if self.min_p > 0:
            kept = kept & near_likeliest(logits.masked_fill(~kept, -torch.inf), self.min_p)
        return kept


def likeliest(logits: Tensor, top_k: int) -> Tensor:
    """The `top_k` likeliest tokens, and those that tie with the last of them, [..., V] bool."""
    least = logits.topk(min(top_k, logits.shape[-1]), -1).values[..., -1:]
    return ~(logits < least)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens with probability at least `top_p`, [..., V] bool.

    Tokens are dropped, the least likely first, while their cumulative probability is at most
    ``1 - top_p``. The likeliest token always stays.
    """
    ascending, index = logits.sort(-1)
    keep = ascending.softmax(-1).cumsum(-1) > 1 - top_p
    keep[..., -1] = True
    return torch.zeros_like(keep).scatter(-1, index, keep)


def near_likeliest(logits: Tensor, min_p: float) -> Tensor:
    """The tokens with at least `min_p` times the largest probability, [..., V] bool."""
    p = logits.softmax(-1)
    return ~(p < min_p * p.amax(-1, keepdim=True))
