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

    `t_pvalue` inverted by bisection; from 1,000 degrees of freedom on Abramowitz and Stegun (1964),
    26.7.5. It is computed here because no package that this one requires offers the quantile.

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
        outside = t_pvalue(math.sqrt(df) * math.tan(middle), df)
        low, high = (middle, high) if 1 - outside < level else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def t_pvalue(t: float, df: int) -> float:
    r"""The probability that Student's \|t\| is larger than this one's; nan for df < 1 or t = nan.

    It is the regularised incomplete beta function ``I_x(df / 2, 1 / 2)`` at ``x = df / (df + t^2)``
    as a continued fraction, so that small values keep their relative precision. Abramowitz and
    Stegun (1964), 26.7.1 and 26.5.8.

    >>> round(t_pvalue(2.262157, 9), 6), round(t_pvalue(-1.0, 1), 6)
    (0.05, 0.5)
    """
    if df < 1 or math.isnan(t):
        return math.nan
    if math.isinf(t):
        return 0.0
    x, y = df / (df + t * t), t * t / (df + t * t)
    a, b = df / 2, 0.5
    # The fraction converges quickly only below the distribution's mean.
    if x < (a + 1) / (a + b + 2):
        return _incomplete_beta(a, b, x, y)
    return 1 - _incomplete_beta(b, a, y, x)


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """``I_x(a, b)`` for ``y = 1 - x``, by Lentz's method for its continued fraction."""
    if x == 0:
        return 0.0
    log_front = a * math.log(x) + b * math.log(y)
    log_front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return math.exp(log_front) * fraction / a
