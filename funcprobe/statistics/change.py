"""The change of entropy along a line by importance sampling, its derivatives, and their errors."""

import math
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import grad, jvp

from .estimators import Estimator, Per, Rows, Weights, base_sums
from .inputs import Inputs, Scored, Swept, read
from .results import Diagnostics, Estimate, Series, polynomial
from .tails import skewness
from .uncertainty import by_group
from .weights import (
    effective_sample_size,
    kl,
    largest_share,
    log_weights,
    mean_weight,
    mean_weight_z,
    pareto_khat,
    pareto_smooth,
)

# How many numbers of a sweep are taken at a time: a few hundred MB with all that is made of them.
_BLOCK = 2**19

_ONE_THREAD = RLock()  # in torch, forward mode belongs to the process: jvps in two threads collide

S = TypeVar("S", bound=Scored)
Derivable = Callable[[Tensor], tuple[Tensor, Tensor]]


def entropy_change(
    sweep: Swept,
    batch: Rows,
    *,
    weights: Weights = "sequence",
    per: Per = "token",
    behaviour: Tensor | None = None,
    control: Tensor | None = None,
    clip: float | None = None,
    smooth: bool = False,
) -> Estimate:
    r"""The change of entropy at each eta from rows drawn at the base policy.

    It is estimated by self-normalised importance sampling (SNIS). Let l be the change of a token's
    log-probability and ``w = 1 + e`` the weight of a row, with ``e_i = expm1(sum_k l_ik)``; h and T
    are a row's summed entropy and its length, and dh is the change of h. Then

    .. math:: \Delta H = \frac{\sum w \, dh + \sum e (h - R T)}{\sum w T}, \quad
              R = \sum h / \sum T,

    per token; per sequence it is the same with T = 1. This is the self-normalised ratio at eta less
    that at 0, formed from differences, so that nothing cancels at small eta. The ratio has a bias
    of O(eta / N); the entropy of each token is exact given its prefix. All sums are in float64.

    Prefix weights weight each token by its prefix alone, which decides both its entropy and whether
    the row reaches it: ``omega_ik = exp(sum_{j<k} l_ij)``, which stays as it is after the row's
    end, over its mean at position k over all rows. With ``r = omega / mean(omega) - 1``, a = 1
    while the row lives, and H and dH a token's entropy and its change,

    .. math:: \Delta H = \frac{\sum a (1 + r) \, dH + \sum a r (H - R)}{\sum T + \sum a r},
              \quad \text{per sequence } \frac{1}{N} \sum a [(1 + r) \, dH + r H].

    Prefix weights usually have the smaller error; `compare` shows both on your own batch.
    "prefix_raw" has ``r = omega - 1``, which is unbiased per sequence. The diagnostics, ESS and
    k-hat among them, are always those of the sequence weights; only the skewness is that of the
    estimate's own influence values (`skewness`), and tends to the slope's as eta goes to 0.

    Any quantity can take the place of the entropy: scores with a field `value` instead of `entropy`
    give its change, on the same terms. Prefix weights need it to depend on the prefix alone. A
    quantity with one number a response, such as a reward, stands in any one position, with
    ``per="sequence"``. ``weights="none"`` sets w = 1 and gives the change of a plain mean over a
    fixed set, such as its log-probability.

    Errors come from influence values (linearisation), are clustered by prompt, and are conditional
    on the direction v. Owen, Monte Carlo theory (2013), 9.3; ESS is Kish's.

    Args:
        sweep: of a scorer over `batch`: base [N, R] and change [K, N, R] of logp and entropy.
        batch: gives response [N, R] and group [N].
        weights: "sequence" (plain SNIS), "prefix" (position-normalised), "prefix_raw" or "none".
        per: "token" (ratio of sums) or "sequence" (mean of sums), in nats.
        behaviour: [N, R] nats, log-probabilities under the policy that sampled the rows, where that
            is not the scored one. Each row gets the base weight ``exp(sum logp - behaviour)``,
            self-normalised, in the base value, the change, the errors and all diagnostics.
        control: [N, R] nats, a control variate b for prefix weights. ``sum_k b_k (omega_{k+1} -
            omega_k)``, whose mean is 0 if b_k is a function of the prefix alone, is subtracted from
            the sum of entropies. The best b_k is a guess of the entropy still to come after k.
        clip: sequence weights are cut to at most this. The estimate is then that of the policy
            ``~ min(w, clip) pi_0`` and pulled towards the base: `clipped` gives the fraction of
            rows, and `adjusted` the change of the estimate, which estimates the bias. Ionides
            (2008).
        smooth: the largest sequence weights are replaced by a fitted Pareto's quantiles; see
            `pareto_smooth`. Errors take the smoothed weights as given.

    Returns:
        The changes with their influence values, errors and diagnostics, on the CPU.

    Raises:
        ValueError: the batch is not that of the sweep or holds a token of probability 0,
            `behaviour` lacks a response token, or an option does not go with the weights.

    >>> import torch, types
    >>> score = lambda l, h: types.SimpleNamespace(logp=torch.tensor(l), entropy=torch.tensor(h))
    >>> sweep = types.SimpleNamespace(etas=torch.tensor([0.1]), base=score([[-1.0], [-1.0]],
    ...     [[0.5], [0.7]]), change=score([[[0.0], [0.0]]], [[[0.1], [0.1]]]))
    >>> rows = types.SimpleNamespace(response=torch.ones(2, 1, dtype=bool), group=torch.arange(2))
    >>> print(entropy_change(sweep, rows))
    dH = +1.000e-01 +- 0.0e+00 nats/token at eta = 0.1, ESS 2/2
    """
    estimator = Estimator(weights, per, behaviour, control)
    _check_moderation(weights, clip, smooth)
    inputs = read("entropy_change", sweep.base, batch, estimator, sweep)
    changes = _changes(sweep, inputs, _adjustment(inputs.logb, clip, smooth))
    base = base_sums(inputs.ground)
    return Estimate(
        etas=sweep.etas.cpu(),
        base=(inputs.ground.level + base.value()).cpu(),
        value=changes.value,
        psi=changes.psi,
        base_psi=by_group(base.influence(), inputs.group).cpu(),
        diagnostics=_diagnostics(sweep, inputs, clip, changes),
        rows=len(inputs.group),
        estimator=estimator,
        quantity=inputs.quantity,
    )


def entropy_series(
    terms: Sequence[Scored],
    batch: Rows,
    *,
    weights: Weights = "sequence",
    per: Per = "token",
    behaviour: Tensor | None = None,
    control: Tensor | None = None,
) -> Series:
    r"""Derivatives at eta = 0 of the estimator of `entropy_change`, on the same rows, by jvp.

    The first order per token is ``(1 / sum T) sum_i [dh_i + (h_i - R T_i) S_i]``, with S a row's
    summed derivative of log-probability. It is the limit of ``Delta H(eta) / eta``, noise included.
    With prefix weights it is ``(1 / sum T) sum a [dH + (H - R) (c - mean c)]``, with c the
    derivative of log-probability summed over the tokens before, and mean c its mean over all rows.
    Like `entropy_change`, it takes any quantity that the scores hold as `value`.

    Args:
        terms: from `taylor`: the scores and their derivatives, orders 0..M.
        batch: gives response [N, R] and group [N].
        weights, per, behaviour, control: those of the estimator. Clipping and smoothing do not
            change derivatives at 0.

    Returns:
        The derivatives of orders 1..M with their influence values, on the CPU.

    Raises:
        ValueError: the batch is not that of the terms or holds a token of probability 0, or an
            option is not one that `entropy_change` takes.
    """
    base, *derivatives = terms
    estimator = Estimator(weights, per, behaviour, control)
    inputs = read("entropy_series", base, batch, estimator, terms)
    logp = torch.stack([d.logp.double() for d in derivatives])
    x = torch.stack([getattr(d, inputs.quantity).double() for d in derivatives])

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        sums = inputs.sums(polynomial(logp, t), polynomial(x, t))
        return sums.value(), sums.influence()

    orders = _nested(at, len(derivatives), logp.new_zeros(()))
    return Series(
        value=torch.stack([value for value, _ in orders]).cpu(),
        psi=torch.stack([by_group(psi, inputs.group) for _, psi in orders]).cpu(),
        skew=torch.stack([skewness(psi, inputs.group) for _, psi in orders]).cpu(),
        estimator=estimator,
        quantity=inputs.quantity,
    )


def entropy_covector(
    scores: S,
    batch: Rows,
    *,
    weights: Weights = "sequence",
    per: Per = "token",
    behaviour: Tensor | None = None,
    control: Tensor | None = None,
) -> S:
    r"""The gradient of the estimate in the scores at eta = 0: ``slope = <covector, d scores>``.

    Per token with sequence weights it is ``1 / sum T`` for the entropy and
    ``(h_i - R T_i) / sum T`` for each log-probability. With prefix weights the latter is the
    entropy still to come, centred over rows. Pulled back through the scorer, the covector is the
    gradient of the entropy in the parameters, which includes the change of the sampling
    distribution. Like `entropy_change`, it takes any quantity that the scores hold as `value`.

    Args:
        scores: from `evaluate` at the base policy, arrays [N, R].
        batch, weights, per, behaviour, control: as for `entropy_series`.

    Returns:
        The same type as `scores`, arrays [N, R] of its dtype, on its device; 0 off the response.

    Raises:
        ValueError: the batch is not that of the scores or holds a token of probability 0, or an
            option is not one that `entropy_change` takes.
    """
    estimator = Estimator(weights, per, behaviour, control)
    inputs = read("entropy_covector", scores, batch, estimator, scores)

    def estimate(changes: tuple[Tensor, Tensor]) -> Tensor:
        return inputs.sums(*changes).value()

    zero = torch.zeros_like(scores.logp, dtype=torch.float64)
    slopes = (slope.to(scores.logp.dtype) for slope in grad(estimate)((zero, zero)))
    made: Any = type(scores)
    return made(**dict(zip(("logp", inputs.quantity), slopes, strict=True)))


def _check_moderation(weights: Weights, clip: float | None, smooth: bool) -> None:
    """Refuses clipping and smoothing that do not go with the weights or with one another."""
    if clip is None and not smooth:
        return
    if weights != "sequence":
        raise ValueError(
            f"entropy_change: clip and smooth act on sequence weights, these are {weights!r}. "
            "Use weights='sequence', or leave clip= and smooth= out."
        )
    if clip is not None and (smooth or not clip > 0):
        raise ValueError(
            f"entropy_change: a positive weight was expected as clip=, without smooth, not "
            f"clip={clip}, smooth={smooth}. Pass clip= above 0 or smooth=True, one of the two."
        )


def _adjustment(
    logb: Tensor, clip: float | None, smooth: bool
) -> Callable[[Tensor], Tensor] | None:
    """What clipping or smoothing makes of log weights [..., N]; None if they stay as they are.

    Both act on the product with the base weights, whose logarithm is `logb` [N].
    """
    if smooth:
        return lambda logw: pareto_smooth(logw + logb) - logb
    if clip is not None:
        top = math.log(clip)
        return lambda logw: (logw + logb).clamp(max=top) - logb
    return None


class _Changes(NamedTuple):
    """Changes of the estimate at each eta, on the CPU."""

    value: Tensor  # [K]
    psi: Tensor  # [K, G]
    skew: Tensor  # [K]
    adjusted: Tensor  # [K] how far clipping or smoothing moved the value


def _changes(sweep: Swept, inputs: Inputs, adjust: Callable[[Tensor], Tensor] | None) -> _Changes:
    """The changes, a few etas at a time so that memory stays bounded."""
    blocks = []
    etas = max(_BLOCK // inputs.ground.response.numel(), 1)
    for block in torch.arange(len(sweep.etas)).split(etas):
        arrays = sweep.change.logp[block], getattr(sweep.change, inputs.quantity)[block]
        plain = inputs.sums(*arrays)
        sums = inputs.sums(*arrays, adjust=adjust) if adjust else plain
        value, psi = sums.value(), sums.influence()
        by_prompt, skew = by_group(psi, inputs.group), skewness(psi, inputs.group)
        blocks.append(_Changes(value, by_prompt, skew, value - plain.value()))
    return _Changes(*(torch.cat(column).cpu() for column in zip(*blocks, strict=True)))


def _diagnostics(
    sweep: Swept, inputs: Inputs, clip: float | None, changes: _Changes
) -> Diagnostics:
    """What the sequence weights of all rows say, at each eta."""
    shift = log_weights(sweep.change.logp, inputs.ground.response)
    if inputs.estimator.weights == "none":
        shift = torch.zeros_like(shift)
    logw = shift + inputs.logb
    top = math.inf if clip is None else math.log(clip)
    return Diagnostics(
        ess=effective_sample_size(logw).cpu(),
        khat=pareto_khat(logw.cpu()),
        skew=changes.skew,
        mean_weight=mean_weight(logw).cpu(),
        weight_range=torch.stack([logw.amin(-1), logw.amax(-1)], -1).exp().cpu(),
        mean_weight_z=mean_weight_z(logw, inputs.group).cpu(),
        spread=logw.std(-1, correction=0).cpu(),
        largest_share=largest_share(logw).cpu(),
        kl=kl(shift, inputs.logb).cpu(),
        clipped=(logw > top).double().mean(-1).cpu(),
        adjusted=changes.adjusted,
    )


def _nested(fn: Derivable, order: int, t: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The derivatives of `fn` at t, orders 1..`order`, by nested jvp."""
    out = []
    with _ONE_THREAD:
        for _ in range(order):
            fn = _derivative(fn)
            out.append(fn(t))
    return out


def _derivative(fn: Derivable) -> Derivable:
    return lambda t: jvp(fn, (t,), (torch.ones_like(t),))[1]
