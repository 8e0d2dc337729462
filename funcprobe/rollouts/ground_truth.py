"""Samples of the shifted policy: an independent check of an estimate along a line."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..calculus.blocks import RowFn, evaluate
from ..calculus.tree import Params, shift
from ..language.batch import Batch, lengths
from ..language.score import scorer
from ..statistics.results import Estimate
from ..statistics.tables import html_table
from ..statistics.uncertainty import by_group, standard_error
from .policy import Policy
from .sample import rollout

UNITS = ("token", "sequence")  # the leading axis of a ground truth's arrays


class Agreement(NamedTuple):
    """A sampled change beside an estimated one, in the score's unit: nats for the entropy."""

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

    def _repr_html_(self) -> str:
        columns = [f"eta = {self.eta:.3g}, per {self.per}", "sampled", "estimated", "z"]
        sampled = f"{self.sampled:+.3e} +- {self.sampled_stderr:.1e}"
        estimated = f"{self.estimated:+.3e} +- {self.estimated_stderr:.1e}"
        return html_table(columns, [["", sampled, estimated, f"{self.z:+.1f}"]])


class GroundTruth(NamedTuple):
    """Plain means over responses that each policy sampled itself, [2] per token and per sequence.

    The arrays are on the CPU, in float64 and in the score's unit: nats for the entropy.
    """

    eta: float
    base: Tensor  # [2] the mean at params
    value: Tensor  # [2] the mean at params + eta v, less `base`
    base_psi: Tensor  # [2, G] influence values by prompt
    psi: Tensor  # [2, G] those of the change
    rows: int  # responses of each policy

    @property
    def base_stderr(self) -> Tensor:
        """[2] standard errors of `base`, clustered by prompt."""
        return standard_error(self.base_psi)

    @property
    def stderr(self) -> Tensor:
        """[2] standard errors of `value`, in which the spread that both share by prompt cancels."""
        return standard_error(self.psi)

    def against(self, estimate: Estimate) -> Agreement:
        """How far an estimate from other rows is from the samples, in joint standard errors.

        Errors are combined prompt by prompt, which is right both for the same prompts and for
        different ones. Where the numbers of prompts differ, the errors are taken as independent.

        Args:
            estimate: of the same quantity and direction, at this eta among others.

        Raises:
            ValueError: the estimate does not hold this eta.
        """
        at = (estimate.etas - self.eta).abs() <= 1e-9 * abs(self.eta)
        if not at.any():
            raise ValueError(
                f"ground_truth: the estimate was expected to hold eta = {self.eta:.9g}, but it "
                f"holds {estimate.etas.tolist()[:5]}. Sweep over that eta too."
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
        changes = [f"{change} per {unit}" for unit, _, change in self._cells()]
        return f"at eta = {self.eta:.3g} sampled {', '.join(changes)}, {self.rows} rows each"

    def __repr__(self) -> str:
        return f"GroundTruth: {self}"

    def _repr_html_(self) -> str:
        columns = ["", f"at eta = 0, {self.rows} rows", f"change at eta = {self.eta:.3g}"]
        rows = [[f"per {unit}", base, change] for unit, base, change in self._cells()]
        return html_table(columns, rows)

    def _cells(self) -> list[tuple[str, str, str]]:
        """For each unit its name, the base and the change, both with their standard errors."""
        return [
            (unit, f"{base:.4f} +- {base_error:.1e}", f"{value:+.3e} +- {error:.1e}")
            for unit, base, base_error, value, error in zip(
                UNITS,
                self.base.tolist(),
                self.base_stderr.tolist(),
                self.value.tolist(),
                self.stderr.tolist(),
                strict=True,
            )
        ]


def ground_truth(
    policy: Policy,
    v: Params,
    eta: float,
    batch: Batch,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    score: RowFn | None = None,
    rows: int = 64,
) -> GroundTruth:
    r"""Samples the policies at ``params`` and ``params + eta v``, and compares mean entropies.

    .. math:: \Delta H = \frac{\sum_{i \in \eta} h_i}{\sum_{i \in \eta} T_i}
                       - \frac{\sum_{i \in 0} h_i}{\sum_{i \in 0} T_i},

    and per sequence the same with T = 1. This uses neither weights nor a linearisation. It does
    have sampling error, so it only shows a change that is large beside its `stderr`. Both policies
    answer the same prompts with different seeds.

    Args:
        policy: a `Checkpoint`, or any `Policy`; `funcprobe.ground_truth` also takes a
            checkpoint's path. Its temperature is used; top-p, top-k and min-p must be off.
        v: a direction with the names and shapes of the policy's params.
        eta: learning rate.
        batch: gives the prompts and their groups, usually E. A prompt counts once for each of its
            rows.
        samples: responses per row of the batch, of each policy.
        max_new_tokens: the longest response, as when the batch was sampled.
        seed: of the sampler. The shifted policy is sampled with the next one.
        score: ``(params, batch) -> Scores`` or `Readings`, whose second array is averaged; the
            policy's entropies if not given.
        rows: responses generated and scored at once.

    Returns:
        The base, the change, and their influence values by prompt.

    Raises:
        ValueError: top-p, top-k or min-p is on (the sampler's possible tokens move with the policy,
            an estimate's are held fixed), names or shapes do not fit, or `rollout` refuses.
    """
    if policy.sampling.truncates:
        raise ValueError(
            f"ground_truth: sampling without top-p, top-k and min-p was expected, not "
            f"{policy.sampling}. The sampler's possible tokens would move with the policy, but "
            "an estimate's are held fixed, so they would be different policies. Switch them off."
        )
    score = score or scorer(policy.model, policy.base, sampling=policy.sampling)
    prompts, group = _prompts(batch), batch.group.cpu().repeat_interleave(samples)

    def sample(params: Params, seed: int) -> _Means:
        drawn = rollout(
            policy,
            prompts,
            samples=samples,
            max_new_tokens=max_new_tokens,
            seed=seed,
            params=params,
            rows=rows,
        )
        value = evaluate(score, params, drawn, rows=rows)[1]
        h = torch.where(drawn.response, value.double(), 0.0).sum(1).cpu()
        return _means(h, lengths(drawn).cpu().double(), group)

    here = sample(policy.params, seed)
    moved = sample(shift(policy.params, v, eta), seed + 1)
    change, psi = moved.mean - here.mean, moved.psi - here.psi
    return GroundTruth(float(eta), here.mean, change, here.psi, psi, len(group))


class _Means(NamedTuple):
    """Means per token and per sequence, and their influence values by prompt."""

    mean: Tensor  # [2]
    psi: Tensor  # [2, G]


def _means(h: Tensor, length: Tensor, group: Tensor) -> _Means:
    """The means of row sums h [N] over lengths [N], and over rows."""
    size = torch.stack([length, torch.ones_like(length)])
    total = size.sum(1, keepdim=True)
    mean = h.sum() / total
    return _Means(mean.squeeze(1), by_group((h - mean * size) / total, group))


def _prompts(batch: Batch) -> Sequence[list[int]]:
    """The token ids of each row's prompt."""
    length = batch.attention.sum(1) - lengths(batch)
    return [row[:n].tolist() for row, n in zip(batch.tokens, length.tolist(), strict=True)]
