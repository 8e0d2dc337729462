"""Importance weights of sequences drawn at the base policy, and what they say of themselves."""

import math

import torch
from torch import Tensor


def log_weights(change: Tensor, response: Tensor) -> Tensor:
    """Log importance weights ``log pi_eta(y | x) - log pi_0(y | x)``, [..., N] float64 nats.

    Args:
        change: [..., N, R] nats, each response token's change of log-probability.
        response: [N, R] bool.
    """
    return torch.where(response, change.double(), 0.0).sum(-1)


def effective_sample_size(logw: Tensor) -> Tensor:
    """Kish's ``(sum w)^2 / sum w^2``, [...] between 1 and N, from log weights [..., N]."""
    return (2 * logw.logsumexp(-1) - (2 * logw).logsumexp(-1)).exp()


def mean_weight(logw: Tensor) -> Tensor:
    """``mean(w)``, [...]: 1 in expectation if the rows came from the scored policy."""
    return (logw.logsumexp(-1) - math.log(logw.shape[-1])).exp()


def pareto_khat(logw: Tensor) -> Tensor:
    """The shape of a generalised Pareto fitted to the largest weights, [...] from [..., N].

    Above ``min(1 - 1 / log10 N, 0.7)`` the error bars of an importance-sampling mean cannot be
    trusted. The tail is the ``min(N / 5, 3 sqrt N)`` largest weights; nan where it is not defined:
    equal weights (eta = 0) or fewer than 5 in the tail.

    Vehtari, Simpson, Gelman, Yao and Gabry, arXiv 1507.02646; the fit is Zhang and Stephens 2009
    with the prior of the former, as ArviZ computes it.
    """
    flat = logw.double().reshape(-1, logw.shape[-1])
    return torch.stack([_khat(row) for row in flat]).reshape(logw.shape[:-1])


def _khat(logw: Tensor) -> Tensor:
    n = len(logw)
    x = (logw - logw.max()).sort().values
    size = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    undefined = torch.tensor(torch.nan, dtype=torch.float64, device=logw.device)
    if size >= n:
        return undefined
    cutoff = x[-size - 1].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    tail = x[x > cutoff]
    if len(tail) <= 4:
        return undefined
    # e^x - e^cutoff, without cancellation where the weights are nearly equal.
    return _pareto_shape(cutoff.exp() * torch.expm1(tail - cutoff))


def _pareto_shape(x: Tensor) -> Tensor:
    """Zhang and Stephens' estimate of k for ascending exceedances [M], shrunk towards 1/2."""
    n, prior_scale, prior_count = len(x), 3.0, 10.0
    m = 30 + math.isqrt(n)
    grid = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - (m / (grid - 0.5)).sqrt()) / (prior_scale * quartile)
    k = torch.log1p(-b[:, None] * x).mean(-1)
    profile = n * ((-b / k).log() - k - 1)
    weight = profile.softmax(-1)
    weight = torch.where(weight >= 10 * torch.finfo(x.dtype).eps, weight, 0.0)
    mean = (b * weight / weight.sum()).sum()
    shape = torch.log1p(-mean * x).mean()
    return (n * shape + prior_count * 0.5) / (n + prior_count)
