"""The entropy change by self-normalised importance sampling, its derivative, and their errors."""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import jvp

from .importance import effective_sample_size, log_weights, mean_weight, pareto_khat
from .uncertainty import by_group, standard_error

Per = Literal["token", "sequence"]
Weights = Literal["sequence", "prefix"]


class Scores(Protocol):
    """Log-probability and entropy of response tokens, [..., N, R] nats."""

    logp: Tensor
    entropy: Tensor


class Swept(Protocol):
    """What `entropy_change` reads of a sweep."""

    etas: Tensor
    base: Scores
    change: Scores


class Rows(Protocol):
    """What the estimators read of a batch."""

    response: Tensor
    group: Tensor


class Estimate(NamedTuple):
    """Changes of the entropy along a line, with influence values from which errors follow.

    On the CPU, in float64.
    """

    etas: Tensor  # [K] float64
    base: Tensor  # [] the entropy at params, nats per token or per sequence
    value: Tensor  # [K] its change, in the same unit
    psi: Tensor  # [K, G] influence values of the change by prompt; they sum to 0
    base_psi: Tensor  # [G] influence values of the base
    ess: Tensor  # [K] effective sample size of the sequence weights, 1..N
    khat: Tensor  # [K] Pareto k-hat, nan where undefined (eta = 0)
    mean_weight: Tensor  # [K] 1 in expectation if the rows came from the scored policy
    weight_range: Tensor  # [K, 2] least and largest sequence weight
    rows: int  # N
    per: str  # "token" | "sequence"

    @property
    def stderr(self) -> Tensor:
        """[K] standard errors of `value`, clustered by prompt; nan with a single prompt."""
        return standard_error(self.psi)

    @property
    def base_stderr(self) -> Tensor:
        """[] standard error of `base`."""
        return standard_error(self.base_psi)

    def __str__(self) -> str:
        lines = [
            f"dH = {float(value):+.3e} +- {float(error):.1e} nats/{self.per} at eta = "
            f"{float(eta):.3g}, ESS {float(ess):.0f}/{self.rows}"
            for eta, value, error, ess in zip(
                self.etas, self.value, self.stderr, self.ess, strict=True
            )
        ]
        if self.psi.shape[-1] < 2:
            lines.append("no standard error: all rows share one prompt, the unit of resampling")
        return "\n".join(lines)


class Series(NamedTuple):
    """Derivatives in eta at 0 of the very estimator that `entropy_change` computes; on the CPU."""

    value: Tensor  # [M] orders 1..M, nats per token or per sequence, per unit of eta^m
    psi: Tensor  # [M, G] their influence values by prompt

    @property
    def stderr(self) -> Tensor:
        """[M] standard errors, clustered by prompt."""
        return standard_error(self.psi)

    def predict(self, etas: Tensor) -> Tensor:
        """The Taylor polynomial of the change at `etas`, [K]."""
        return _taylor(self.value, etas)

    def predict_stderr(self, etas: Tensor) -> Tensor:
        """[K] standard errors of `predict`, the orders' correlation included."""
        return standard_error(_taylor(self.psi, etas))

    def __str__(self) -> str:
        return "\n".join(
            f"d^{m}H/d eta^{m} = {float(value):+.4e} +- {float(error):.1e}"
            for m, (value, error) in enumerate(zip(self.value, self.stderr, strict=True), start=1)
        )


def entropy_change(
    sweep: Swept, batch: Rows, *, weights: Weights = "sequence", per: Per = "token"
) -> Estimate:
    r"""The change of entropy at each eta from rows drawn at the base policy, by SNIS.

    With ``e_i = expm1(sum_k l_ik)``, l the change of log-probability, ``w = 1 + e``, h and T a
    row's summed entropy and length, dh its change of entropy,

    .. math:: \Delta H = \frac{\sum w \, dh + \sum e (h - R T)}{\sum w T}, \quad
              R = \sum h / \sum T,

    per token; per sequence the same with T = 1. It is the difference of the self-normalised ratio
    at eta and at 0, but formed from differences, so that nothing cancels at small eta. Float64.
    Bias O(eta / N), of the ratio; the entropy of each token is exact given its prefix.

    With prefix weights each token is weighted by its prefix alone, which is all that its entropy
    and its being there depend on: ``omega_ik = exp(sum_{j<k} l_ij)``, frozen after the row's end,
    over its mean at position k over all rows. With ``r = omega / mean(omega) - 1`` and a = 1 while
    the row lives,

    .. math:: \Delta H = \frac{\sum a (1 + r) \, dH + \sum a r (H - R)}{\sum T + \sum a r},
              \quad \text{per sequence } \frac{1}{N} \sum a [(1 + r) \, dH + r H].

    Usually the smaller error; compare both on your own batch. ESS and k-hat are always those of
    the sequence weights.

    Errors are from influence values (linearisation), clustered by prompt, and are conditional on
    the direction v. Owen, Monte Carlo theory (2013), 9.3; ESS is Kish's.

    Args:
        sweep: of a scorer over `batch`: base [N, R] and change [K, N, R] of logp and entropy.
        batch: gives response [N, R] and group [N].
        weights: "sequence" (plain SNIS) or "prefix" (position-normalised).
        per: "token" (ratio of sums) or "sequence" (mean of sums), in nats.

    Raises:
        ValueError: the batch is not that of the sweep, or holds a token of probability 0.

    >>> import torch, types
    >>> score = lambda l, h: types.SimpleNamespace(logp=torch.tensor(l), entropy=torch.tensor(h))
    >>> sweep = types.SimpleNamespace(etas=torch.tensor([0.1]), base=score([[-1.0], [-1.0]],
    ...     [[0.5], [0.7]]), change=score([[[0.0], [0.0]]], [[[0.1], [0.1]]]))
    >>> rows = types.SimpleNamespace(response=torch.ones(2, 1, dtype=bool), group=torch.arange(2))
    >>> print(entropy_change(sweep, rows))
    dH = +1.000e-01 +- 0.0e+00 nats/token at eta = 0.1, ESS 2/2
    """
    response, group = _rows(batch, sweep.base.logp)
    value, psi = _estimator(weights)(sweep.base, sweep.change, response, per)
    logw = log_weights(sweep.change.logp, response)
    total, centred, size = _base(sweep.base, response, per)
    return Estimate(
        etas=sweep.etas.cpu(),
        base=total.cpu(),
        value=value.cpu(),
        psi=by_group(psi, group).cpu(),
        base_psi=by_group(centred / size.sum(), group).cpu(),
        ess=effective_sample_size(logw).cpu(),
        khat=pareto_khat(logw.cpu()),
        mean_weight=mean_weight(logw).cpu(),
        weight_range=torch.stack([logw.amin(-1), logw.amax(-1)], -1).exp().cpu(),
        rows=len(group),
        per=per,
    )


def entropy_series(
    terms: tuple, batch: Rows, *, weights: Weights = "sequence", per: Per = "token"
) -> Series:
    r"""Derivatives at eta = 0 of the estimator of `entropy_change`, on the same rows, by jvp.

    Of first order per token ``(1 / sum T) sum_i [dh_i + (h_i - R T_i) S_i]``, S a row's summed
    derivative of log-probability: the limit of ``Delta H(eta) / eta``, noise included.

    Args:
        terms: from `taylor`: the scores and their derivatives, orders 0..M.
        batch: gives response [N, R] and group [N].
        weights, per: those of the estimator.

    Raises:
        ValueError: as `entropy_change`.
    """
    estimator = _estimator(weights)
    response, group = _rows(batch, terms[0].logp)
    base, *derivatives = terms
    logp = torch.stack([d.logp.double() for d in derivatives])
    entropy = torch.stack([d.entropy.double() for d in derivatives])

    def at(t: Tensor):
        change = type(base)(_taylor(logp, t), _taylor(entropy, t))
        return estimator(base, change, response, per)

    orders = _nested(at, len(derivatives), logp.new_zeros(()))
    return Series(
        torch.stack([value for value, _ in orders]).cpu(),
        torch.stack([by_group(psi, group) for _, psi in orders]).cpu(),
    )


def _base(base: Scores, response: Tensor, per: Per) -> tuple[Tensor, Tensor, Tensor]:
    """The ratio R [], and by row ``h - R T`` [N] and T [N]."""
    if per not in ("token", "sequence"):
        raise ValueError(f"per must be 'token' or 'sequence', not {per!r}.")
    h = torch.where(response, base.entropy.double(), 0.0).sum(-1)
    size = response.sum(-1).double() if per == "token" else torch.ones_like(h)
    ratio = h.sum() / size.sum()
    return ratio, h - ratio * size, size


def _estimator(weights: Weights):
    if weights not in ("sequence", "prefix"):
        raise ValueError(f"weights must be 'sequence' or 'prefix', not {weights!r}.")
    return _by_sequence if weights == "sequence" else _by_prefix


def _by_sequence(base: Scores, change: Scores, response: Tensor, per: Per) -> tuple[Tensor, Tensor]:
    """The change [...] and its influence values by row [..., N], over n."""
    _, centred, size = _base(base, response, per)
    dh = torch.where(response, change.entropy.double(), 0.0).sum(-1)
    w, e = _scaled_weights(log_weights(change.logp, response))
    norm = (w * size).sum(-1, keepdim=True)
    value = ((w * dh + e * centred).sum(-1, keepdim=True)) / norm
    tilt = (e * size).sum(-1, keepdim=True) / size.sum()
    psi = (e * centred + w * (dh - value * size) - centred * tilt) / norm
    return value.squeeze(-1), psi


def _by_prefix(base: Scores, change: Scores, response: Tensor, per: Per) -> tuple[Tensor, Tensor]:
    """The same with prefix weights; the influence values see their normalisation as estimated."""
    ratio, centred, size = _base(base, response, per)
    per_token = per == "token"
    r, rho = _prefix_weights(torch.where(response, change.logp.double(), 0.0))
    dh = torch.where(response, change.entropy.double(), 0.0)
    u = torch.where(response, base.entropy.double() - (ratio if per_token else 0.0), 0.0)
    moved = torch.where(response, r * u + rho * dh, 0.0)
    tilt = torch.where(response, r, 0.0).sum((-2, -1), keepdim=True) if per_token else 0.0
    norm = size.sum() + tilt  # n per sequence
    value = moved.sum((-2, -1), keepdim=True) / norm
    if per_token:
        moved = moved - torch.where(response, rho * value, 0.0)
    drift = moved - r * u.mean(-2, keepdim=True) - rho * moved.mean(-2, keepdim=True)
    psi = drift.sum(-1, keepdim=True) - centred.unsqueeze(-1) * tilt / size.sum()
    return value.squeeze((-2, -1)), (psi / norm).squeeze(-1)


def _prefix_weights(logp: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised weights of the tokens before each, less 1 and as they are, [..., N, R]."""
    before = logp.cumsum(-1) - logp
    largest = before.amax(-2, keepdim=True).detach()
    rho = (before - largest).exp()
    rho = rho / rho.mean(-2, keepdim=True)
    # expm1 is exact at small changes; far from them nothing cancels.
    far = (largest > 30) | (largest < -1)
    f = torch.expm1(before.clamp(max=30))
    mean = f.mean(-2, keepdim=True)
    r = torch.where(far, rho - 1, (f - mean) / torch.where(far, 1.0, 1 + mean))
    return r, torch.where(far, rho, 1 + r)


def _scaled_weights(logw: Tensor) -> tuple[Tensor, Tensor]:
    """w and w - 1, both over the largest weight if that exceeds 1, so that neither overflows."""
    largest = logw.amax(-1, keepdim=True).detach()
    # Where all are tiny they would underflow: w is scaled up, and the 1 of w - 1 dropped, since a
    # constant in e cancels from the change and from psi.
    tiny = largest < -30
    c = torch.where(tiny, largest, largest.clamp(min=0))
    w = (logw - c).exp()
    one = (-c.clamp(min=0)).exp()
    # expm1 is exact at small changes; where it would overflow the one is below rounding.
    e = torch.where(logw > 30, w - one, one * torch.expm1(logw.clamp(max=30)))
    return w, torch.where(tiny, w, e)


def _rows(batch: Rows, logp: Tensor) -> tuple[Tensor, Tensor]:
    response, width = batch.response, logp.shape[-1]
    if response[:, width:].any() or response[:, :width].shape != logp.shape[-2:]:
        raise ValueError(
            f"the batch has responses {list(batch.response.shape)} but the scores are "
            f"{list(logp.shape)}: they belong to another batch, or join() lacked its order."
        )
    response = response[:, :width].to(logp.device)
    impossible = ((logp == -torch.inf) & response).any(-1).nonzero().flatten().tolist()
    if impossible:
        raise ValueError(
            f"the scored policy cannot produce tokens of {len(impossible)} rows, "
            f"{impossible[:5]}: they lie outside its nucleus. The responses were sampled with "
            "another top_p, temperature or model than they are scored with."
        )
    return response, batch.group.to(logp.device)


def _taylor(derivatives: Tensor, t: Tensor) -> Tensor:
    """``sum_m t^m / m! d_m``, [*t, ...] from d [M, ...], without the constant."""
    t = torch.as_tensor(t, dtype=torch.float64).to(derivatives.device)
    t = t.reshape(*t.shape, *[1] * (derivatives.ndim - 1))
    total, factor = 0.0, 1.0
    for m, d in enumerate(derivatives, start=1):
        factor = factor * t / m
        total = total + factor * d
    return total


def _nested(fn, order: int, t: Tensor) -> list:
    """The derivatives of `fn` at t, orders 1..`order`, by nested jvp."""
    out = []
    for _ in range(order):
        fn = _derivative(fn)
        out.append(fn(t))
    return out


def _derivative(fn):
    return lambda t: jvp(fn, (t,), (torch.ones_like(t),))[1]
