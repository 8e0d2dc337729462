"""Jackknife and bootstrap of the estimators over prompts, by reweighting sums: no forward passes.

The rows of one prompt are correlated, so whole prompts are left out and drawn. With a single prompt
every error is nan.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .estimators import Estimator, Per, Rows, Sums, Weights
from .inputs import Swept, read
from .tables import formatted, html_table, shortened
from .uncertainty import ONE_PROMPT, by_group, standard_error


class Jackknife(NamedTuple):
    """Errors and biases from leaving out one prompt at a time; on the CPU."""

    etas: Tensor  # [K]
    value: Tensor  # [K] the change
    bias: Tensor  # [K] the estimated bias; value - bias is the corrected change
    stderr: Tensor  # [K]
    note: str = ""  # why there is no error, if there is none

    def _rows(self) -> list[tuple[str, ...]]:
        """For each eta the change, its error and its bias, as text."""
        columns = (self.etas, self.value, self.stderr, self.bias)
        return formatted([x.tolist() for x in columns], (".3g", "+.3e", ".1e", "+.1e"))

    def _lines(self) -> list[str]:
        lines = [
            f"{value} +- {error} (bias {bias}) at eta = {eta}"
            for eta, value, error, bias in self._rows()
        ]
        return [*lines, self.note] if self.note else lines

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return "\n".join(shortened(self._lines(), "..."))

    def _repr_html_(self) -> str:
        columns = ("eta", "change", "+-", "bias")
        return html_table(columns, shortened(self._rows(), ("...",) * len(columns)), self.note)


class Bootstrap(NamedTuple):
    """Errors from resampling prompts; on the CPU."""

    etas: Tensor  # [K]
    value: Tensor  # [K] the change
    stderr: Tensor  # [K] standard deviation of the draws
    low: Tensor  # [K] the lower end of the interval at `level`
    high: Tensor  # [K] its upper end
    draws: Tensor  # [B, K] the change in each draw
    level: float
    note: str = ""  # why there is no error, or what to mind

    def _rows(self) -> list[tuple[str, ...]]:
        """For each eta the change and the ends of its interval, as text."""
        columns = (self.etas, self.value, self.low, self.high)
        return formatted([x.tolist() for x in columns], (".3g", "+.3e", "+.3e", "+.3e"))

    def _lines(self) -> list[str]:
        lines = [
            f"{value}, {self.level:.0%} in [{low}, {high}] at eta = {eta}"
            for eta, value, low, high in self._rows()
        ]
        return [*lines, self.note] if self.note else lines

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return "\n".join(shortened(self._lines(), "..."))

    def _repr_html_(self) -> str:
        columns = ("eta", "change", f"{self.level:.0%} from", "to")
        return html_table(columns, shortened(self._rows(), ("...",) * len(columns)), self.note)


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
    is off by O(1 / G^2). The estimator is evaluated again exactly, without linearisation. Efron and
    Stein (1981).

    Args:
        sweep, batch, weights, per, behaviour: as for `entropy_change`.

    Raises:
        ValueError: what `entropy_change` raises.
    """
    estimator = Estimator(weights, per, behaviour)
    columns = [_left_out(sums) for sums in _by_prompt("jackknife", sweep, batch, estimator)]
    value, bias, stderr = (torch.stack(column).cpu() for column in zip(*columns, strict=True))
    note = "" if _prompts(batch) > 1 else ONE_PROMPT
    return Jackknife(sweep.etas.cpu(), value, bias, stderr, note)


def _left_out(sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """The estimate from sums over prompts, its bias and its standard error; nan for one prompt."""
    g, total = len(sums.terms), sums.terms.sum(0)
    value = sums.combine(total)
    if g < 2:
        nothing = torch.full_like(value, torch.nan)
        return value, nothing, nothing
    without = sums.combine(total - sums.terms)
    bias = (g - 1) * (without - value).mean()
    stderr = ((g - 1) * (without - without.mean()).square().mean()).sqrt()
    return value, bias, stderr


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
    r"""Prompt bootstrap of `entropy_change`, without a forward pass.

    Each draw weights the prompts by how often they are drawn, with replacement, and evaluates the
    estimator again. The interval is between percentiles of the draws or, studentised, the
    bootstrap-t ``[T - q_high stderr, T - q_low stderr]``, with q the quantiles of
    ``(T* - T) / stderr*``, which is the better one below about 30 prompts. Efron and Tibshirani
    (1993), chapters 12 and 13.

    Args:
        sweep, batch, weights, per, behaviour: as for `entropy_change`.
        draws: the number B of resamples.
        level: of the intervals.
        seed: of the draws.
        studentised: whether to take bootstrap-t instead of percentiles.
        bayesian: whether to draw Dirichlet weights instead of counts, so that no draw drops a
            prompt (Rubin 1981).

    Raises:
        ValueError: both `studentised` and `bayesian` are set, or `entropy_change` raises.
    """
    if studentised and bayesian:
        raise ValueError(
            "bootstrap: studentised or bayesian was expected, not both. Studentised intervals need "
            "counts of prompts: leave bayesian= out."
        )
    g = _prompts(batch)
    times = _multiplicities(draws, g, seed, bayesian)
    estimator = Estimator(weights, per, behaviour)
    columns = [
        _resampled(sums, times, level, studentised)
        for sums in _by_prompt("bootstrap", sweep, batch, estimator)
    ]
    value, stderr, ends, drawn = (
        torch.stack(column, -1).cpu() for column in zip(*columns, strict=True)
    )
    note = "" if g > 1 else ONE_PROMPT
    if 1 < g < 30 and not studentised:
        remedy = "Use studentised=True" + (" in the place of bayesian=True." if bayesian else ".")
        note = f"only {g} prompts: percentile intervals are too narrow. {remedy}"
    return Bootstrap(sweep.etas.cpu(), value, stderr, ends[0], ends[1], drawn, level, note)


class _Resampled(NamedTuple):
    """The bootstrap of one change."""

    value: Tensor  # []
    stderr: Tensor  # []
    ends: Tensor  # [2] of the interval
    drawn: Tensor  # [B] the change in each draw


def _resampled(sums: Sums, times: Tensor, level: float, studentised: bool) -> _Resampled:
    """The change from sums over prompts, and from those of the draws; nan errors for one prompt."""
    times = times.to(sums.terms)
    value, totals = sums.value(), times @ sums.terms
    drawn = sums.combine(totals)
    tails = drawn.new_tensor([(1 - level) / 2, (1 + level) / 2])
    if len(sums.terms) < 2:
        nothing = torch.full_like(value, torch.nan)
        return _Resampled(value, nothing, torch.full_like(tails, torch.nan), drawn)
    if studentised:
        ends = _bootstrap_t(sums, times, totals, drawn - value, tails)
    else:
        ends = drawn.quantile(tails)
    return _Resampled(value, drawn.std(), ends, drawn)


def _bootstrap_t(sums: Sums, times: Tensor, totals: Tensor, moved: Tensor, tails: Tensor) -> Tensor:
    """The ends [2] of the bootstrap-t interval.

    Args:
        sums: over prompts.
        times: [B, G] how often each prompt is in each draw.
        totals: [B, F] the sums of the draws.
        moved: [B] how far the draws are from the estimate.
        tails: [2] the probabilities at the interval's ends.
    """
    g = len(sums.terms)
    psi = _influences(sums, totals)
    error = (g / (g - 1) * (times * psi * psi).sum(-1)).sqrt()
    stderr = standard_error(sums.influence())
    # A draw of one prompt alone has no spread, and says nothing of t.
    t = torch.where(error > 1e-9 * stderr, moved / error, torch.nan)
    return sums.value() - (stderr * t.nanquantile(tails).flip(0)).nan_to_num(0.0)


def _prompts(batch: Rows) -> int:
    return len(batch.group.unique())


def _by_prompt(function: str, sweep: Swept, batch: Rows, estimator: Estimator) -> Iterator[Sums]:
    """The change at each eta as sums over prompts, terms [G, F]."""
    inputs = read(function, sweep.base, batch, estimator, sweep)
    for k in range(len(sweep.etas)):
        sums = inputs.sums(sweep.change.logp[k], getattr(sweep.change, inputs.quantity)[k])
        yield sums._replace(terms=by_group(sums.terms.mT, inputs.group).mT)


def _influences(sums: Sums, at: Tensor) -> Tensor:
    """The prompts' influence values [B, G], with T's gradient at the sums [B, F] of each draw."""
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
