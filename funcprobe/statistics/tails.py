"""Whether a few responses carry an estimate or its error, so that its interval misses too often."""

import torch
from torch import Tensor

from .uncertainty import by_group
from .weights import khat_limit

# From here on a 95% interval misses on one side twice as often as it says; see `skewness`.
SKEW_LIMIT = 0.3

# The skewness of fewer numbers than these is mostly noise.
_FEW = 20

# Weights move by less than their k-hat could harm where this share of the rows is effective.
_NEARLY_EQUAL = 0.9


def skewness(psi: Tensor, group: Tensor) -> Tensor:
    """How far influence values lean to one side, [...] from those of rows, [..., N].

    It is ``sum psi^3 / (sum psi^2)^(3/2)``, the skewness over the root of their number, of rows or
    of prompts, whichever is larger in size. A tail of the values can do harm through it alone: to
    first order a 95% interval misses with probability ``0.025 + 0.085 skewness`` above and
    ``0.025 - 0.085 skewness`` below (Edgeworth's expansion of Student's t). At 0.3 one side misses
    twice as often as it says; Cochran's rule ``N > 25 skewness^2`` is 0.2. Where it is positive,
    the truth lies above the interval too often. A sample understates the skewness of a heavy tail,
    which it has not seen.

    Args:
        psi: influence values by row, which sum to 0; their scale does not matter.
        group: [N] the prompt of each row.

    Returns:
        [...] float64; nan with fewer than 20 rows, or where all values are 0. Fewer than 20
        prompts do not count.

    Hall, The bootstrap and Edgeworth expansion (1992), 2.6; Cochran, Sampling techniques (1977),
    2.15.
    """
    by_row, by_prompt = _leaning(psi), _leaning(by_group(psi, group))
    return torch.where(by_prompt.abs() > by_row.abs(), by_prompt, by_row)


def _leaning(psi: Tensor) -> Tensor:
    """The third power's sum over that of the squares to 3/2; nan for few values, or all 0."""
    psi = psi.double() / psi.double().abs().amax(-1, keepdim=True)  # small values do not underflow
    leaning = (psi**3).sum(-1) / (psi**2).sum(-1) ** 1.5
    return leaning if psi.shape[-1] >= _FEW else torch.full_like(leaning, torch.nan)


def lopsided(skew: Tensor) -> Tensor:
    """Where an error hangs on few responses, [...] bool: ``|skewness|`` above 0.3."""
    return skew.abs() > SKEW_LIMIT


def heavy_weights(khat: Tensor, ess: Tensor, rows: int) -> Tensor:
    """Where a few weights carry an estimate, [...] bool.

    k-hat is above its limit, and the weights differ enough to matter: fewer than nine tenths of the
    rows are effective. k-hat alone does not tell, since it is the same at any scale of the log
    weights: at eta = 1e-30 it is that of the slope's scores, whose tail `skewness` judges by what
    it does to the error. A single weight that dominates hides itself from influence values, and
    only k-hat sees it.
    """
    return (khat > khat_limit(rows)) & (ess < _NEARLY_EQUAL * rows)
