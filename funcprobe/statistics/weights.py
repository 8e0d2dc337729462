"""Importance weights of sequences drawn at the base policy, and how far they can be trusted."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .uncertainty import by_group, standard_error


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


def mean_weight_z(logw: Tensor, group: Tensor) -> Tensor:
    r"""``(mean(w) - 1) / stderr``, [...], the error clustered by prompt; nan where all w are 1.

    If the rows came from the scored policy, the prompts' sums of w - 1 are independent with mean 0,
    and it is Student's t with G - 1 degrees of freedom: with 2 prompts it exceeds 100 in 0.6% of
    correct batches. It holds at small changes only, because weights are skewed: where the log
    weights spread by 0.3, 1, 2 and 3, \|z\| > 4 in 0.07%, 1.1%, 14% and 46% of correct batches
    of 48.
    """
    sums = by_group(torch.expm1(logw.clamp(max=30)), group)
    return sums.sum(-1) / standard_error(sums - sums.mean(-1, keepdim=True))


def largest_share(logw: Tensor) -> Tensor:
    """The largest weight over the sum of all, [...] between 1 / N and 1."""
    return (logw.amax(-1) - logw.logsumexp(-1)).exp()


def kl(logw: Tensor, logb: Tensor | None = None) -> Tensor:
    """``KL(pi_0 || pi_eta)`` per sequence, [...] nats, from log weights [..., N].

    It is ``log mean(w) - mean(log w)``: the mean of ``-log w``, or of ``w - 1 - log w``, with each
    w divided by the mean of all. It is never negative, and biased downwards by O(1 / N).

    Args:
        logw: log weights of the shifted policy over the base.
        logb: [N] log base weights, of the base policy over the one that sampled the rows.
    """
    share = torch.full_like(logw[..., :1], 1 / logw.shape[-1])
    share = share.expand_as(logw) if logb is None else logb.softmax(-1).expand_as(logw)
    centred = logw - (share * logw).sum(-1, keepdim=True)
    # expm1 keeps small changes exact. The mean of the centred values, left out, is only rounding.
    small = torch.log1p((share * torch.expm1(centred.clamp(max=30))).sum(-1))
    large = (centred + share.log()).logsumexp(-1)
    return torch.where(centred.amax(-1) > 30, large, small)


def khat_limit(rows: int) -> float:
    """The k-hat above which an estimate is not to be trusted; nan for N <= 10.

    ``min(1 - 1 / log10 N, 0.7)``. Vehtari et al., arXiv 1507.02646.
    """
    return min(1 - 1 / math.log10(rows), 0.7) if rows > 10 else math.nan


def pareto_khat(logw: Tensor) -> Tensor:
    """The shape of a generalised Pareto fitted to the largest weights, [...] from [..., N].

    Above ``min(1 - 1 / log10 N, 0.7)`` the error bars of an importance-sampling mean cannot be
    trusted. The tail holds the ``min(N / 5, 3 sqrt N)`` largest weights, rounded down. k-hat is nan
    where it is not defined: where all weights are equal (eta = 0), or fewer than 5 are in the tail.

    Vehtari, Simpson, Gelman, Yao and Gabry, arXiv 1507.02646. The fit is that of Zhang and Stephens
    (2009) with the prior of Vehtari et al., as ArviZ (arviz_stats 0.8) computes it.
    """
    return _by_row(lambda x: _fit(x)[0], logw)


def pareto_smooth(logw: Tensor) -> Tensor:
    """Log weights [..., N] whose largest are replaced by the fitted Pareto's expected quantiles.

    The j-th smallest of the M weights in the tail becomes the Pareto's quantile at
    ``(j - 1/2) / M``, but at most the largest weight as it was. This buys a smaller variance with a
    bias that vanishes with N where k-hat < 0.7. Where the fit is undefined, the weights stay as
    they are. Vehtari et al., arXiv 1507.02646, section 2.
    """
    return _by_row(_smooth, logw)


def _by_row(fn: Callable[[Tensor], Tensor], logw: Tensor) -> Tensor:
    """A function of [N] applied to each of the leading axes of [..., N]."""
    flat = logw.double().reshape(-1, logw.shape[-1])
    out = torch.stack([fn(row) for row in flat])
    return out.reshape((*logw.shape[:-1], *out.shape[1:]))


def _fit(logw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The generalised Pareto that is fitted to the largest weights, from log weights [N].

    Returns:
        k-hat; the scale over the cutoff's weight; the log cutoff less the largest log weight; and
        the rows of the tail, ascending by weight. k-hat is nan where nothing can be fitted.
    """
    n = len(logw)
    x = logw - logw.max()
    ordered, order = x.sort()
    size = math.floor(min(n / 5, 3 * math.sqrt(n)))
    undefined = torch.tensor(torch.nan, dtype=torch.float64, device=logw.device)
    cutoff = ordered[-size - 1].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    tail = order[-size:] if size else order[:0]
    # Draws equal to the cutoff stay in the tail, unless so many are that the scale would be 0.
    if len(tail) and ordered[-size + int(size / 4 + 0.5) - 1] <= cutoff:
        tail = order[ordered > cutoff]
    if len(tail) <= 4:
        return undefined, undefined, cutoff, tail
    # e^x / e^cutoff - 1, without cancellation where the weights are nearly equal.
    k, scale = _pareto(torch.expm1(x[tail] - cutoff).clamp(min=0))
    return k, scale, cutoff, tail


def _smooth(logw: Tensor) -> Tensor:
    """Log weights [N] smoothed by the fitted Pareto; see `pareto_smooth`."""
    k, scale, cutoff, tail = _fit(logw)
    if not k.isfinite():
        return logw
    p = (torch.arange(len(tail), dtype=logw.dtype, device=logw.device) + 0.5) / len(tail)
    quantile = scale * torch.expm1(-k * torch.log1p(-p)) / k
    smoothed = (cutoff + torch.log1p(quantile)).clamp(max=0)
    return logw.index_copy(0, tail, smoothed + logw.max())


def _pareto(x: Tensor) -> tuple[Tensor, Tensor]:
    """Zhang and Stephens' k and scale for ascending exceedances [M], k shrunk towards 1/2."""
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
    return (n * shape + prior_count * 0.5) / (n + prior_count), -shape / mean
