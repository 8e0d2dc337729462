"""Errors from influence values, clustered by prompt: standard errors, intervals, bands."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

ONE_PROMPT = "no standard error: all rows share one prompt, the unit of resampling"


def by_group(psi: Tensor, group: Tensor) -> Tensor:
    """Sums of influence values over the rows of each prompt, [..., G] from [..., N] and [N]."""
    prompts, index = group.unique(return_inverse=True)
    total = psi.new_zeros(*psi.shape[:-1], len(prompts))
    return total.index_add(-1, index, psi)


def standard_error(psi: Tensor) -> Tensor:
    """``sqrt(G / (G - 1) sum_g psi_g^2)``, [...] from [..., G]; nan for a single prompt.

    The rows of one prompt are correlated, so prompts are the units of resampling.
    """
    g = psi.shape[-1]
    if g < 2:
        return torch.full(psi.shape[:-1], torch.nan, dtype=psi.dtype, device=psi.device)
    return (g / (g - 1) * (psi * psi).sum(-1)).sqrt()


def interval(value: Tensor, psi: Tensor, level: float = 0.95) -> Tensor:
    """``value +- t stderr`` [..., 2], Student's t at G - 1 degrees of freedom; nan for G = 1."""
    half = t_quantile(level, psi.shape[-1] - 1) * standard_error(psi)
    return torch.stack([value - half, value + half], -1)


def band(psi: Tensor, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Tensor:
    r"""Half-widths of a band that covers all K values at once.

    They are ``c stderr_k`` with c the `level` quantile of
    ``max_k |sum_g xi_g psi_kg| / (s stderr_k)``, xi standard normal and s^2 an independent
    chi-square over its G - 1 degrees of freedom. This is the Gaussian multiplier bootstrap of the
    maximum, to which s adds the noise of the standard errors. With K = 1 the band is Student's
    interval.

    Args:
        psi: [K, G] influence values by prompt.
        level: the probability that all K values lie within the band.
        draws: the number of draws from which the quantile is read.
        seed: of the draws.

    Returns:
        [K] half-widths in the unit of `psi`; nan for a single prompt.

    Chernozhukov, Chetverikov and Kato, arXiv 1212.6906; Hothorn, Bretz and Westfall,
    arXiv 0803.1706, for the multivariate t.
    """
    error = standard_error(psi)
    g = psi.shape[-1]
    moving = error > 0
    if g < 2 or not moving.any():
        return error
    generator = torch.Generator().manual_seed(seed)
    xi = torch.randn(draws, g, generator=generator, dtype=torch.float64)
    s = torch.randn(draws, g - 1, generator=generator, dtype=torch.float64).square().mean(-1).sqrt()
    unit = psi[moving].cpu() / error[moving, None].cpu() * math.sqrt(g / (g - 1))
    largest = (xi @ unit.T).abs().amax(-1) / s
    return largest.quantile(level).to(error) * error


def t_quantile(level: float, df: int) -> float:
    """The t for which Student's distribution holds `level` within +-t; nan for df < 1.

    Abramowitz and Stegun (1964), 26.7.3 and 26.7.4, inverted by bisection; from 1,000 degrees of
    freedom on 26.7.5. It is computed here because no package that this one requires offers the
    quantile.

    >>> round(t_quantile(0.95, 9), 6)
    2.262157
    """
    if df < 1:
        return math.nan
    if df >= 1000:
        z = NormalDist().inv_cdf((1 + level) / 2)
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df * df)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < level else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def _t_within(angle: float, df: int) -> float:
    """The probability that |t| < sqrt(df) tan(angle), by the finite sums in sine and cosine."""
    s, c = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (c if odd else 1.0), 0.0
    for j in range(1 + odd, df, 2):
        total += term
        term *= c * c * j / (j + 1)
    return (angle + s * total) * 2 / math.pi if odd else s * total
