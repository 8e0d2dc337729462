"""The shifted policy sampled: what an estimate along a line is to be held against."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..calculus.blocks import evaluate
from ..calculus.tree import Params, shift
from ..language.batch import Batch, lengths
from ..language.score import scorer
from ..statistics.change import Estimate
from ..statistics.uncertainty import by_group, standard_error
from .sample import rollout

UNITS = ("token", "sequence")  # the leading axis of what follows


class Agreement(NamedTuple):
    """A sampled change beside an estimated one."""

    eta: float
    sampled: float
    sampled_stderr: float
    estimated: float
    estimated_stderr: float
    z: float  # their difference over its standard error; nan with a single prompt
    per: str  # "token" | "sequence"

    def __str__(self) -> str:
        return (
            f"at eta = {self.eta:.3g} sampled {self.sampled:+.3e} +- {self.sampled_stderr:.1e}, "
            f"estimated {self.estimated:+.3e} +- {self.estimated_stderr:.1e} per {self.per}: "
            f"z = {self.z:+.1f}"
        )


class GroundTruth(NamedTuple):
    """Plain means over responses that each policy sampled itself, [2] per token and per sequence.

    On the CPU, in float64.
    """

    eta: float
    base: Tensor  # [2] the mean at params, nats
    value: Tensor  # [2] the mean at params + eta v, less it
    base_psi: Tensor  # [2, G] influence values by prompt
    psi: Tensor  # [2, G] those of the change
    rows: int  # responses of each policy

    @property
    def base_stderr(self) -> Tensor:
        """[2] standard errors of `base`, clustered by prompt."""
        return standard_error(self.base_psi)

    @property
    def stderr(self) -> Tensor:
        """[2] standard errors of `value`; the spread of the prompts, which both share, cancels."""
        return standard_error(self.psi)

    def against(self, estimate: Estimate) -> Agreement:
        """How far an estimate of other rows is from the samples, in joint standard errors.

        Errors are joined prompt by prompt, which is right for the same prompts and for others;
        with another number of prompts they are taken as independent.

        Args:
            estimate: of the same quantity and direction, at this eta among others.

        Raises:
            ValueError: the estimate has no such eta.
        """
        at = (estimate.etas - self.eta).abs() <= 1e-9 * abs(self.eta)
        if not at.any():
            raise ValueError(
                f"ground_truth: the estimate was expected to hold eta = {self.eta:.9g}, it holds "
                f"{estimate.etas.tolist()[:5]}. Sweep over it too."
            )
        k, unit = int(at.nonzero()[0]), UNITS.index(estimate.per)
        mine, psi = self.psi[unit], estimate.psi[k]
        if len(mine) == len(psi):
            error = standard_error(mine - psi)
        else:
            error = standard_error(mine).hypot(standard_error(psi))
        gap = self.value[unit] - estimate.value[k]
        return Agreement(
            self.eta,
            float(self.value[unit]),
            float(self.stderr[unit]),
            float(estimate.value[k]),
            float(estimate.stderr[k]),
            float(gap / error),
            estimate.per,
        )

    def __str__(self) -> str:
        each = [
            f"{value:+.3e} +- {error:.1e} per {unit}"
            for value, error, unit in zip(
                self.value.tolist(), self.stderr.tolist(), UNITS, strict=True
            )
        ]
        return f"at eta = {self.eta:.3g} sampled {', '.join(each)}, {self.rows} rows each"


def ground_truth(
    checkpoint,
    v: Params,
    eta: float,
    batch: Batch,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    score: Callable | None = None,
    rows: int = 64,
) -> GroundTruth:
    r"""Samples the policies at ``params`` and ``params + eta v``, and compares mean entropies.

    .. math:: \Delta H = \frac{\sum_{i \in \eta} h_i}{\sum_{i \in \eta} T_i}
                       - \frac{\sum_{i \in 0} h_i}{\sum_{i \in 0} T_i},

    per sequence the same with T = 1. No weights and no linearisation: what it has is sampling
    error, so that it can only see a change that its `stderr` leaves visible. Both policies answer
    the same prompts with different seeds.

    Args:
        checkpoint: from `load_checkpoint`; its sampling settings hold, top-p 1 among them.
        v: a direction with the names and shapes of the checkpoint's params.
        eta: learning rate.
        batch: gives the prompts and their groups: E, with each prompt as often as it has rows.
        samples: responses per row of the batch, of each policy.
        max_new_tokens: the longest response, as when the batch was sampled.
        seed: of the sampler; the shifted policy has the next one.
        score: ``(params, batch) -> Scores`` or `Readings`, whose second array is averaged; the
            checkpoint's entropies if not given.
        rows: responses generated and scored at once.

    Raises:
        ValueError: top-p is below 1 (the sampler's nucleus moves with the policy, an estimate's is
            held fixed), names or shapes that do not fit; what `rollout` refuses.
    """
    if checkpoint.sampling.top_p < 1:
        raise ValueError(
            f"ground_truth: top_p = 1 was expected, not {checkpoint.sampling.top_p}. The sampler's "
            "nucleus would move with the policy, an estimate's is held fixed: they are different "
            "policies."
        )
    score = score or scorer(checkpoint.model, checkpoint.base, sampling=checkpoint.sampling)
    length = batch.attention.sum(1) - lengths(batch)
    prompts = [row[:n].tolist() for row, n in zip(batch.tokens, length.tolist(), strict=True)]
    group = batch.group.cpu().repeat_interleave(samples)
    means = []
    for params, own_seed in (
        (checkpoint.params, seed),
        (shift(checkpoint.params, v, eta), seed + 1),
    ):
        drawn = rollout(
            checkpoint,
            prompts,
            samples=samples,
            max_new_tokens=max_new_tokens,
            seed=own_seed,
            params=params,
            rows=rows,
        )
        value = evaluate(score, params, drawn, rows=rows)[1]
        h = torch.where(drawn.response, value.double(), 0.0).sum(1).cpu()
        means.append(_means(h, lengths(drawn).cpu().double(), group))
    (base, base_psi), (moved, psi) = means
    return GroundTruth(float(eta), base, moved - base, base_psi, psi - base_psi, len(group))


def _means(h: Tensor, length: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Per token and per sequence: means [2], and their influence values by prompt [2, G]."""
    size = torch.stack([length, torch.ones_like(length)])
    total = size.sum(1, keepdim=True)
    mean = h.sum() / total
    return mean.squeeze(1), by_group((h - mean * size) / total, group)
