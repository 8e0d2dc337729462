"""What the rows of a batch show by themselves: whether they can be draws, and independent ones."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..language.batch import Batch, lengths

# Responses that recur by chance more often than this tell nothing about copies.
_RARE = 0.1

# Responses of less than this probability, of which many copies are no chance: see `_often`.
_IMPROBABLE = 0.05
_BY_CHANCE = 1e-4


def prompts_of(batch: Batch) -> list[tuple[int, ...]]:
    """The prompt of each row, as token ids."""
    ends = (batch.attention.sum(1) - lengths(batch)).tolist()
    return [tuple(row[:n].tolist()) for row, n in zip(batch.tokens, ends, strict=True)]


def chance_of_repeat(batch: Batch, logp: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of each row's response among other draws at its prompt, [N].

    A response of probability p is in n draws with probability ``1 - (1 - p)^n``.

    Args:
        batch: the rows.
        logp: [N, R] nats, of their tokens.
        draws: [N] how many other draws there are at the row's prompt.

    Returns:
        The probabilities, and which of them are small enough to tell anything.
    """
    response = batch.response[:, : logp.shape[1]]
    total = torch.where(response, logp.double().cpu(), 0.0).sum(1)
    chance = -torch.expm1(draws * torch.log1p(-total.exp().clamp(max=1.0)))
    return chance, chance < _RARE


def copied_rows(name: str, batch: Batch, logp: Tensor) -> str:
    """Whether rows are repeated more often than chance repeats draws, with the remedy."""
    prompts = prompts_of(batch)
    drawn = Counter(prompts)
    others = torch.tensor([float(drawn[prompt] - 1) for prompt in prompts])
    chance, telling = chance_of_repeat(batch, logp, others)
    _, index, counts = batch.row_hashes().unique(return_inverse=True, return_counts=True)
    further = counts[index] - 1.0
    copies = int((further / counts[index])[telling].sum().round())
    often = _often(further, others, chance) & ~telling
    if copies <= 2 + 3 * float(chance[telling].sum()) and not often.any():
        return ""
    copies += int((further / counts[index])[often].sum().round())
    return (
        f"At least {copies} rows of {name} are copies of others, more than draws repeat each other "
        "by chance: they count as evidence that they are not. Likely files were joined twice, or "
        "rows were drawn with replacement. Leave the copies out."
    )


def _often(further: Tensor, others: Tensor, chance: Tensor) -> Tensor:
    """The rows of improbable responses that recur too often, [N] bool.

    Chernoff's bound of the binomial tail, times the number of rows, is below 1e-4 there. Likelier
    responses are left out: they recur where E was drawn at a lower temperature.
    """
    p = -torch.expm1(torch.log1p(-chance) / others)
    share = further / others
    bound = torch.xlogy(share, share / p) + torch.xlogy(1 - share, (1 - share) / (1 - p))
    surprising = others * bound > math.log(len(further) / _BY_CHANCE)
    return surprising & (share > p) & (p < _IMPROBABLE)


def divided_prompts(evaluation: Batch) -> str:
    """Whether rows of one prompt count as independent, with the remedy."""
    prompts, groups = len(set(prompts_of(evaluation))), len(evaluation.group.unique())
    if groups < 2 * prompts:
        return ""
    return (
        f"E has {groups} groups but {prompts} different prompts: error bars take groups as "
        "independent, which rows of one prompt are not, and are likely too small. Give equal "
        "prompts one group, or leave group out of E's lines."
    )


def no_draws(name: str, batch: Batch, ends: Sequence[int]) -> str:
    """Whether responses end as no sampler ends them, with the remedy.

    Args:
        name: of the batch, "U" or "E".
        batch: its rows.
        ends: the token ids that end a response.
    """
    length = lengths(batch)
    following = (batch.position + 1).clamp(max=batch.tokens.shape[1] - 1)
    end = torch.isin(batch.tokens.gather(1, following), torch.tensor(ends, dtype=torch.int64))
    end &= batch.response
    ended = end.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]
    beyond = ((end.sum(1) - ended.long()) > 0).nonzero().flatten()
    empty = (length == 0).nonzero().flatten()
    keep = "Keep the sampled one in completion_ids."
    if len(beyond):
        return (
            f"{len(beyond)} rows of {name} go on after an end-of-sequence token (id "
            f"{', '.join(map(str, ends))}), the first is row {int(beyond[0])}: the policy draws "
            "nothing there, but it counts in the entropy and in the loss. Likely padding was kept. "
            "Cut completion_ids behind the first one."
        )
    if len(empty):
        return (
            f"{len(empty)} rows of {name} have no response tokens, the first is row "
            f"{int(empty[0])}: a draw has at least its end-of-sequence token. {keep}"
        )
    if ends and not ended.any() and _uneven(batch, length):
        return (
            f"no response of {name} ends with an end-of-sequence token (id "
            f"{', '.join(map(str, ends))}), though those to one prompt differ in length. Likely it "
            f"was cut off, and lacks in the entropy and in the loss. {keep} If a stop string ended "
            "the responses, they are right as they are."
        )
    return ""


def _uneven(batch: Batch, length: Tensor) -> bool:
    """Whether responses to one prompt differ in length, as those cut at a limit do not."""
    seen: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for prompt, n in zip(prompts_of(batch), length.tolist(), strict=True):
        seen[prompt].add(n)
    return any(len(lengths) > 1 for lengths in seen.values())
