"""An optimizer step as an affine map of the gradient: the update direction, and its parts."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from .tree import Params, check_direction, check_names, concrete, norm

# A gradient by parameter name; None for a parameter that the loss does not reach.
Grads: TypeAlias = Mapping[str, Tensor | None]

# One setting for all parameters, or one by name where the optimizer's groups differ.
Setting: TypeAlias = float | dict[str, float]

T = TypeVar("T", float, tuple[float, float])


class AdamState(NamedTuple):
    """Adam's saved moments by parameter name, before the step."""

    count: Params  # type: ignore[assignment]  # [] steps taken so far; hides tuple.count
    mu: Params  # first moment, shaped like the parameter
    nu: Params  # second moment
    nu_max: Params | None = None  # AMSGrad's running maximum of nu

    def __repr__(self) -> str:
        norms = [f"mu {_norm(self.mu)}", f"nu {_norm(self.nu)}"]
        norms += [] if self.nu_max is None else [f"nu_max {_norm(self.nu_max)}"]
        return (
            f"AdamState: {_amount(self.mu)}, {_range(self.count)} steps taken\n"
            f"  norms: {', '.join(norms)}"
        )


class Affine(NamedTuple):
    """A step as ``v(g) = momentum + decay + scale * g``, its denominator frozen at the realised g.

    v is the change of the parameters over `lr`.
    """

    momentum: Params
    decay: Params
    scale: Params
    clip: Tensor  # [] the factor by which the gradient norm was clipped, 1 if it was not
    lr: Tensor  # [] float64, the reference rate: the largest group's

    def __repr__(self) -> str:
        parts = ("momentum", "decay", "scale")
        norms = [f"{name} {_norm(getattr(self, name))}" for name in parts]
        return (
            f"Affine: {_amount(self.scale)}, lr {_figure(self.lr)}, clip {_figure(self.clip)}\n"
            f"  norms: {', '.join(norms)}"
        )


def adamw(
    grads: Grads,
    params: Params,
    state: AdamState,
    *,
    lr: Setting,
    betas: tuple[float, float] | dict[str, tuple[float, float]],
    eps: Setting,
    weight_decay: Setting,
    amsgrad: bool = False,
    max_grad_norm: float | None = None,
) -> Affine:
    r"""The AdamW step from a saved state, as an affine map of the gradient. Nothing is stepped.

    With g clipped by c, t the new count, rho the parameter's rate over the largest,

    .. math:: m' = b_1 m + (1 - b_1) c g, \quad s' = b_2 s + (1 - b_2) (c g)^2, \quad
              D = \sqrt{s' / (1 - b_2^t)} + eps, \\
              v = \rho \, [-m' / ((1 - b_1^t) D) - wd \, \theta].

    It is exact to rounding against ``torch.optim.AdamW``: ``theta' - theta = lr * v``. AMSGrad
    (`amsgrad`) divides by the largest s' so far. Loshchilov and Hutter, arXiv 1711.05101.

    Args:
        grads: the gradient. A parameter whose gradient is None does not move, not even by decay.
        params: the parameters, which decay.
        state: the moments before the step.
        lr, eps, weight_decay: a float, or a dict of floats by parameter name where groups differ.
        betas: the decay rates of the two moments, or a dict of pairs by parameter name.
        amsgrad: whether the optimizer was made with amsgrad=True.
        max_grad_norm: the norm over all gradients is clipped to this, as `clip_grad_norm_` does.
            None or 0 means no clipping, as in the Trainer.

    Returns:
        The step: momentum, decay and scale have the shapes and dtypes of `params`.

    Raises:
        ValueError: names or shapes do not fit; a gradient, moment or count is not finite; every
            gradient is None; no rate is positive; a dict of settings lacks a name; `amsgrad` is set
            and the state has no `nu_max`; or `max_grad_norm` is negative.
    """
    moving = _check_adamw(grads, params, state, amsgrad)
    rates, reference = _rates("adamw", lr, params)
    clip = _clip("adamw", moving, max_grad_norm)
    parts: dict[str, _Parts] = {}
    for name, p in params.items():
        if name not in moving:
            parts[name] = _Parts(*(torch.zeros_like(p) for _ in range(3)))
            continue
        settings = _Settings(
            rates[name] / reference,
            *_of("adamw (betas)", betas, name),
            _of("adamw (eps)", eps, name),
            _of("adamw (weight_decay)", weight_decay, name),
        )
        largest = state.nu_max[name] if amsgrad and state.nu_max is not None else None
        moments = _Moments(state.count[name], state.mu[name], state.nu[name], largest)
        parts[name] = _adamw_parts(moving[name], p, moments, settings, clip)
    return _affine(parts, clip, reference)


class _Parts(NamedTuple):
    """The step of one parameter, as an affine map of its gradient."""

    momentum: Tensor
    decay: Tensor
    scale: Tensor


class _Settings(NamedTuple):
    """AdamW's settings for one parameter."""

    rho: float  # the parameter's learning rate over the largest
    b1: float
    b2: float
    eps: float
    weight_decay: float


class _Moments(NamedTuple):
    """Adam's moments of one parameter before the step."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mu: Tensor
    nu: Tensor
    nu_max: Tensor | None  # None without AMSGrad


def _adamw_parts(
    g: Tensor, p: Tensor, moments: _Moments, settings: _Settings, clip: Tensor
) -> _Parts:
    rho, b1, b2, eps, weight_decay = settings
    count = moments.count.double() + 1
    g = g.to(p.dtype) * clip.to(p.dtype)
    nu = b2 * moments.nu.to(p) + (1 - b2) * g * g
    if moments.nu_max is not None:
        nu = torch.maximum(nu, moments.nu_max.to(p))
    root = (nu / _scalar(1 - b2**count, p)).sqrt()
    unit = rho / (_scalar(1 - b1**count, p) * (root + eps))
    return _Parts(
        momentum=-b1 * unit * moments.mu.to(p),
        decay=-rho * weight_decay * p,
        scale=-(1 - b1) * clip.to(p.dtype) * unit,
    )


def _check_adamw(grads: Grads, params: Params, state: AdamState, amsgrad: bool) -> Params:
    """Refuses what does not fit, and returns the gradients that are not None."""
    moving, expected = _moving(grads, params)
    check_direction("adamw (grads)", moving, expected)
    if not moving:
        raise ValueError(
            f"adamw: a gradient was expected for at least one parameter, all {len(params)} are "
            "None, so nothing would move. Was the loss made from these parameters, and backward() "
            "called?"
        )
    check_direction("adamw (state.count)", state.count, dict.fromkeys(params, torch.zeros(())))
    check_direction("adamw (state.mu)", state.mu, params)
    check_direction("adamw (state.nu)", state.nu, params)
    if amsgrad and state.nu_max is None:
        raise ValueError(
            "adamw: amsgrad needs state.nu_max, the running maximum of nu, which the state does "
            "not have. It was probably saved by an optimizer without amsgrad: pass amsgrad=False."
        )
    if amsgrad and state.nu_max is not None:
        check_direction("adamw (state.nu_max)", state.nu_max, params)
    return moving


def sgd(
    grads: Params,
    params: Params,
    buffer: Params | None = None,
    *,
    lr: Setting,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: Setting = 0.0,
    max_grad_norm: float | None = None,
) -> Affine:
    r"""The step of ``torch.optim.SGD`` as an affine map of the gradient. Nothing is stepped.

    .. math:: d = c g + wd \, \theta, \quad b' = \mu b + (1 - \tau) d
              \ (\text{first step: } b' = d), \quad v = -\rho \, b'
              \ (\text{Nesterov: } -\rho \, (d + \mu b')).

    Args:
        grads: the gradient of every parameter.
        params: the parameters, which decay.
        buffer: the momentum buffer before the step; None at the first step.
        lr, weight_decay: a float, or a dict of floats by parameter name.
        momentum, dampening, nesterov: mu, tau and the variant, as ``torch.optim.SGD`` takes them.
        max_grad_norm: the norm over all gradients is clipped to this; None or 0 means no clipping.

    Returns:
        The step: momentum, decay and scale have the shapes and dtypes of `params`.

    Raises:
        ValueError: names or shapes do not fit, a value is not finite, no rate is positive, a dict
            of settings lacks a name, or `max_grad_norm` is negative.
    """
    check_direction("sgd (grads)", grads, params)
    if buffer is not None:
        check_direction("sgd (buffer)", buffer, params)
    rates, reference = _rates("sgd", lr, params)
    clip = _clip("sgd", grads, max_grad_norm)
    keep, fresh = _sgd_factors(momentum, dampening, nesterov, first=buffer is None)
    parts: dict[str, _Parts] = {}
    for name, p in params.items():
        rho = rates[name] / reference
        old = torch.zeros_like(p) if buffer is None else buffer[name].to(p)
        parts[name] = _Parts(
            momentum=-rho * keep * old,
            decay=-rho * fresh * _of("sgd (weight_decay)", weight_decay, name) * p,
            scale=(-rho * fresh * clip).to(p.dtype).expand_as(p),
        )
    return _affine(parts, clip, reference)


def _sgd_factors(
    momentum: float, dampening: float, nesterov: bool, *, first: bool
) -> tuple[float, float]:
    """The factors of the old buffer b and of the fresh gradient d in ``-v / rho``."""
    if momentum == 0:
        return 0.0, 1.0
    fresh = 1.0 if first else 1 - dampening
    return (momentum * momentum, 1 + momentum * fresh) if nesterov else (momentum, fresh)


def direction(step: Affine, grads: Grads) -> Params:
    """The update direction ``v = momentum + decay + scale * g``: parameter change over ``step.lr``.

    Args:
        step: from `adamw` or `sgd`.
        grads: the gradient that the step was made from, unclipped.

    Returns:
        v, with the names, shapes and dtypes of the step's parameters.

    Raises:
        ValueError: names or shapes are not the step's.
    """
    moving, expected = _moving(grads, step.scale)
    check_names("direction", moving, expected)
    v = {}
    for name, scale in step.scale.items():
        push = scale * moving[name].to(scale.dtype) if name in moving else 0
        v[name] = step.momentum[name] + step.decay[name] + push
    return v


def decompose(step: Affine, row_grads: Params) -> tuple[Params, Params, Params]:
    """Splits v among momentum, weight decay and the update's rows, exactly.

    ``v = momentum + decay + sum_i rows[i]``, with the denominator frozen at the realised gradient.
    Leaving a row out and computing the denominator again gives another quantity.

    Args:
        step: from `adamw` or `sgd`.
        row_grads: from `row_gradients`, tensors with leading N.

    Returns:
        ``(momentum, decay, rows)``, the last with leading N.

    Raises:
        ValueError: names or shapes are not the step's.
    """
    check_names("decompose", {name: g[0] for name, g in row_grads.items()}, step.scale)
    rows = {name: scale * row_grads[name].to(scale.dtype) for name, scale in step.scale.items()}
    return step.momentum, step.decay, rows


def _moving(grads: Grads, expected: Params) -> tuple[Params, Params]:
    """The gradients that are not None, and the entries of `expected` that they must match."""
    moving = {name: g for name, g in grads.items() if g is not None}
    still = grads.keys() - moving.keys()
    return moving, {name: x for name, x in expected.items() if name not in still}


def _affine(parts: Mapping[str, _Parts], clip: Tensor, reference: float) -> Affine:
    return Affine(
        momentum={name: part.momentum for name, part in parts.items()},
        decay={name: part.decay for name, part in parts.items()},
        scale={name: part.scale for name, part in parts.items()},
        clip=clip,
        lr=torch.tensor(reference, dtype=torch.float64),
    )


def _clip(where: str, grads: Params, max_grad_norm: float | None) -> Tensor:
    """The factor that brings the norm over all gradients to `max_grad_norm` at most."""
    total = norm(grads)
    if not max_grad_norm:
        return torch.ones_like(total)
    if not max_grad_norm > 0:
        raise ValueError(
            f"{where}: max_grad_norm must be positive, or None or 0 for no clipping, not "
            f"{max_grad_norm}."
        )
    return (max_grad_norm / (total + 1e-6)).clamp(max=1.0)


def _rates(where: str, lr: Setting, params: Params) -> tuple[dict[str, float], float]:
    """The learning rates by name, and the largest of them."""
    rates = {name: float(_of(f"{where} (lr)", lr, name)) for name in params}
    reference = max(rates.values())
    if not reference > 0:
        raise ValueError(
            f"{where}: at least one learning rate must be positive, the largest is {reference}. A "
            "finished schedule saves 0: pass lr= the rate you ask about."
        )
    return rates, reference


def _of(where: str, value: T | dict[str, T], name: str) -> T:
    """The setting of one parameter."""
    if not isinstance(value, dict):
        return value
    if name not in value:
        raise ValueError(
            f"{where}: a value was expected for every parameter name, {name!r} has none. Add it to "
            "the dict, or pass one value for all."
        )
    return value[name]


def _scalar(value: Tensor, like: Tensor) -> Tensor:
    return value.to(device=like.device, dtype=like.dtype)


def _amount(params: Params) -> str:
    return f"{len(params)} tensors, {sum(p.numel() for p in params.values())} parameters"


def _figure(x: Tensor) -> str:
    """A number as text, or a shape if there are several numbers or a transform has wrapped them."""
    return f"{float(x):.4g}" if concrete(x) and x.ndim == 0 else str(list(x.shape))


def _norm(params: Params) -> str:
    readable = all(concrete(p) for p in params.values())
    return _figure(norm(params)) if readable else "unknown"


def _range(counts: Params) -> str:
    """The smallest and the largest count as text, or the one that all share."""
    if not counts or not all(concrete(c) for c in counts.values()):
        return "unknown"
    least, most = (f"{float(f(c.max() for c in counts.values())):g}" for f in (min, max))
    return least if least == most else f"{least} to {most}"
