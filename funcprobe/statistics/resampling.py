"""Jackknife and bootstrap of the estimators over prompts, by reweighting sums: no forwards.

The rows of one prompt are correlated, so prompts are what is left out and drawn. With a single
prompt every error is nan.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .estimators import Estimator, Per, Rows, Sums, Weights
from .inputs import Swept, read
from .uncertainty import ONE_PROMPT, by_group, standard_error


class Jackknife(NamedTuple):
    """Errors and biases from leaving out one prompt at a time; on the CPU."""

    etas: Tensor  # [K]
    value: Tensor  # [K] the change
    bias: Tensor  # [K] estimated; value - bias is corrected
    stderr: Tensor  # [K]
    note: str = ""  # why there is no error, if there is none

    def __str__(self) -> str:
        rows = zip(self.etas, self.value, self.bias, self.stderr, strict=True)
        lines = [
            f"{float(v):+.3e} +- {float(e):.1e} (bias {float(b):+.1e}) at eta = {float(eta):.3g}"
            for eta, v, b, e in rows
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


class Bootstrap(NamedTuple):
    """Errors from resampling prompts; on the CPU."""

    etas: Tensor  # [K]
    value: Tensor  # [K] the change
    stderr: Tensor  # [K] standard deviation of the draws
    low: Tensor  # [K] ends of the interval at `level`
    high: Tensor  # [K]
    draws: Tensor  # [B, K] the change in each draw
    level: float
    note: str = ""  # why there is no error, or what to mind

    def __str__(self) -> str:
        rows = zip(self.etas, self.value, self.low, self.high, strict=True)
        lines = [
            f"{float(v):+.3e}, {self.level:.0%} in [{float(low):+.3e}, {float(high):+.3e}] at "
            f"eta = {float(eta):.3g}"
            for eta, v, low, high in rows
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


def jackknife(
    sweep: Swept,
    batch: Rows,
    *,
    weights: Weights = "sequence",
    per: Per = "token",
    behaviour: Tensor | None = None,
) -> Jackknife:
    r"""Delete-one-prompt jackknife of `entropy_change`: its error and its bias.

    With ``T_g`` the estimate without prompt g,
    ``stderr^2 = (G - 1) / G sum (T_g - mean T_g)^2`` and ``bias = (G - 1) (mean T_g - T)``, which
    is off by O(1 / G^2). Exact re-evaluation, no linearisation. Efron and Stein (1981).

    Args:
        sweep, batch, weights, per, behaviour: as for `entropy_change`.
    """
    etas, values, biases, errors = sweep.etas.cpu(), [], [], []
    for sums in _by_prompt("jackknife", sweep, batch, Estimator(weights, per, behaviour)):
        total = sums.terms.sum(0)
        value, g = sums.combine(total), len(sums.terms)
        without = sums.combine(total - sums.terms)
        values.append(value)
        biases.append((g - 1) * (without - value).mean() if g > 1 else value * torch.nan)
        errors.append(((g - 1) * (without - without.mean()).square().mean()).sqrt())
        errors[-1] = errors[-1] if g > 1 else value * torch.nan
    columns = (torch.stack(column).cpu() for column in (values, biases, errors))
    return Jackknife(etas, *columns, "" if g > 1 else ONE_PROMPT)


def bootstrap(
    sweep: Swept,
    batch: Rows,
    *,
    weights: Weights = "sequence",
    per: Per = "token",
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    studentised: bool = False,
    bayesian: bool = False,
    behaviour: Tensor | None = None,
) -> Bootstrap:
    r"""Prompt bootstrap of `entropy_change`, without a forward.

    Each draw weights the prompts by how often they are drawn, with replacement, and re-evaluates
    the estimator. The interval is between percentiles of the draws or, studentised, the
    bootstrap-t ``[T - q_high stderr, T - q_low stderr]``, q quantiles of (T* - T) / stderr*: the
    better one below about 30 prompts. Efron and Tibshirani (1993), chapters 12 and 13.

    Args:
        sweep, batch, weights, per, behaviour: as for `entropy_change`.
        draws: resamples B.
        level: of the intervals.
        seed: of the draws.
        studentised: bootstrap-t instead of percentiles.
        bayesian: Dirichlet weights instead of counts, so that no draw drops a prompt (Rubin 1981).

    Raises:
        ValueError: studentised and bayesian at once; what `entropy_change` raises.
    """
    if studentised and bayesian:
        raise ValueError("bootstrap: studentised needs counts of prompts; leave bayesian= out.")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    times, g = None, 0
    values, spread, ends, all_draws = [], [], [], []
    for sums in _by_prompt("bootstrap", sweep, batch, Estimator(weights, per, behaviour)):
        if times is None:
            g = len(sums.terms)
            times = _multiplicities(draws, g, seed, bayesian).to(sums.terms)
        value, drawn = sums.value(), times @ sums.terms
        there = sums.combine(drawn)
        low_high = there.quantile(tails.to(there))
        if studentised:
            psi = _influences(sums, drawn)
            error = (g / max(g - 1, 1) * (times * psi * psi).sum(-1)).sqrt()
            own = standard_error(sums.influence())
            # A draw of one prompt alone has no spread, and says nothing of t.
            t = torch.where(error > 1e-9 * own, (there - value) / error, torch.nan)
            low_high = value - (own * t.nanquantile(tails.to(t)).flip(0)).nan_to_num(0.0)
        values.append(value)
        spread.append(there.std() if g > 1 else value * torch.nan)
        ends.append(low_high if g > 1 else low_high * torch.nan)
        all_draws.append(there)
    low, high = torch.stack(ends, -1).cpu()
    note = "" if g > 1 else ONE_PROMPT
    if 1 < g < 30 and not studentised:
        note = f"only {g} prompts: percentile intervals are too narrow. Use studentised=True."
    stacked = (torch.stack(values).cpu(), torch.stack(spread).cpu(), low, high)
    return Bootstrap(sweep.etas.cpu(), *stacked, torch.stack(all_draws, -1).cpu(), level, note)


def _by_prompt(function: str, sweep: Swept, batch: Rows, estimator: Estimator) -> Iterator[Sums]:
    """The change at each eta as sums over prompts, terms [G, F]."""
    inputs = read(function, sweep.base, batch, estimator, sweep)
    for k in range(len(sweep.etas)):
        sums = inputs.sums(sweep.change.logp[k], getattr(sweep.change, inputs.quantity)[k])
        yield sums._replace(terms=by_group(sums.terms.mT, inputs.group).mT)


def _influences(sums: Sums, at: Tensor) -> Tensor:
    """Influence values [B, G] of prompts whose sums [B, F] are those of B draws."""
    slope = torch.func.grad(lambda s: sums.combine(s).sum())(at)
    return slope @ sums.terms.mT


def _multiplicities(draws: int, g: int, seed: int, bayesian: bool) -> Tensor:
    """How much of each prompt is in each draw, [B, G], rows summing to G."""
    generator = torch.Generator().manual_seed(seed)
    if bayesian:
        share = -torch.rand(draws, g, generator=generator, dtype=torch.float64).log()
        return g * share / share.sum(-1, keepdim=True)
    index = torch.randint(g, (draws, g), generator=generator)
    ones = torch.ones(draws, g, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add(-1, index, ones)
