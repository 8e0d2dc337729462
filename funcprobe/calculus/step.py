"""An optimizer step as an affine map of the gradient: the update direction, and its parts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import REVERSE, cut, fitting
from .precision import exact
from .tree import (
    Params,
    check_direction,
    check_names,
    leaves,
    merge,
    norm,
    size,
    tree_map,
)


class AdamState(NamedTuple):
    """Adam's saved moments by parameter name, before the step."""

    count: Params  # [] steps already taken
    mu: Params  # first moment, shaped like the parameter
    nu: Params  # second moment
    nu_max: Params | None = None  # AMSGrad's running maximum of nu


class Affine(NamedTuple):
    """A step as ``v(g) = momentum + decay + scale * g``, its denominator frozen at the realised g.

    v is the change of the parameters over `lr`.
    """

    momentum: Params
    decay: Params
    scale: Params
    clip: Tensor  # [] the factor by which the gradient norm was clipped, 1 if it was not
    lr: Tensor  # [] float64, the reference rate: the largest group's


def gradient(fn: Callable, params: Params, batch, *, rows: int | None = None) -> Params:
    """The gradient of the sum of ``fn(params, batch)``, accumulated over blocks of rows.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        rows: rows per block; the default follows from the shapes.

    Raises:
        ValueError: the gradient is not finite.
    """
    total = None
    with torch.no_grad(), exact():
        for part in cut(batch, rows, REVERSE)[0]:
            for grads in fitting(lambda part, _: _gradient(fn, params, part), part)[0]:
                total = grads if total is None else tree_map(torch.add, total, grads)
    check_direction("gradient", total, params)
    return total


def row_gradients(fn: Callable, params: Params, batch, *, rows: int | None = None) -> Params:
    """The gradient of each row's sum: the leaves of `params` with leading N.

    Args:
        fn: row-separable ``(params, batch) -> tree`` of tensors with leading N.
        rows: rows differentiated at once by `vmap`; 1 is the plain loop.

    Raises:
        ValueError: a gradient is not finite.
    """

    def of_row(row):
        return _gradient(fn, params, tree_map(lambda leaf: leaf.unsqueeze(0), row))

    def of_rows(part, _):
        if size(part) == 1:
            return tree_map(lambda g: g.unsqueeze(0), _gradient(fn, params, part))
        return torch.func.vmap(of_row)(part)

    parts = []
    with torch.no_grad(), exact():
        cuts, order = cut(batch, rows, REVERSE)
        for part in cuts:
            parts += fitting(of_rows, part)[0]
    out = merge(parts, order)
    check_direction(
        "row_gradients", out, {k: g.expand(len(out[k]), *g.shape) for k, g in params.items()}
    )
    return out


def adamw(
    grads: Params,
    params: Params,
    state: AdamState,
    *,
    lr: float | dict[str, float],
    betas: tuple[float, float] | dict[str, tuple[float, float]],
    eps: float | dict[str, float],
    weight_decay: float | dict[str, float],
    amsgrad: bool = False,
    max_grad_norm: float | None = None,
) -> Affine:
    r"""The AdamW step from a saved state, as an affine map of the gradient; nothing is stepped.

    With g clipped by c, t the new count, rho the parameter's rate over the largest,

    .. math:: m' = b_1 m + (1 - b_1) c g, \quad s' = b_2 s + (1 - b_2) (c g)^2, \quad
              D = \sqrt{s' / (1 - b_2^t)} + eps, \\
              v = \rho \, [-m' / ((1 - b_1^t) D) - wd \, \theta].

    Exact to rounding against ``torch.optim.AdamW``: ``theta' - theta = lr * v``. Loshchilov and
    Hutter, arXiv 1711.05101; AMSGrad (`amsgrad`) divides by the largest s' so far.

    Args:
        grads: the gradient; a name whose value is None does not move, decay included.
        params: the parameters, for decay.
        state: the moments before the step.
        lr, eps, weight_decay: a float, or a dict of floats by parameter name where groups differ.
        betas: the decay rates of the two moments, or a dict of pairs.
        max_grad_norm: clip the norm over all gradients to it, as `clip_grad_norm_` does; None or 0
            is no clipping, as in the Trainer.

    Raises:
        ValueError: names or shapes that do not fit, a non-finite gradient, moment or count, every
            gradient None, every rate 0, a negative `max_grad_norm`.
    """
    moved = {name: g for name, g in grads.items() if g is not None}
    fitting = {name: p for name, p in params.items() if grads.get(name, 0) is not None}
    check_direction("adamw (grads)", moved, fitting)
    if not moved:
        raise ValueError(
            f"adamw: a gradient was expected for at least one parameter, all {len(params)} are "
            "None, so nothing would move. Was the loss made from these parameters, and backward() "
            "called?"
        )
    counts = dict.fromkeys(params, torch.zeros(()))
    check_direction("adamw (state.count)", state.count, counts)
    moments = {"mu": state.mu, "nu": state.nu} | ({"nu_max": state.nu_max} if amsgrad else {})
    for name, moment in moments.items():
        if moment is None:
            raise ValueError(f"adamw: amsgrad needs state.{name}, which the state does not have.")
        check_direction(f"adamw (state.{name})", moment, params)
    rates, reference = _rates("adamw", lr, params)
    clip = _clip("adamw", moved, max_grad_norm)
    momentum, decay, scale = {}, {}, {}
    for name, p in params.items():
        if grads[name] is None:
            momentum[name], decay[name], scale[name] = (torch.zeros_like(p) for _ in range(3))
            continue
        b1, b2 = _of(betas, name)
        count = state.count[name].double() + 1
        g = grads[name].to(p.dtype) * clip.to(p.dtype)
        nu = b2 * state.nu[name].to(p) + (1 - b2) * g * g
        if amsgrad:
            nu = torch.maximum(nu, state.nu_max[name].to(p))
        root = (nu / _scalar(1 - b2**count, p)).sqrt()
        rho = rates[name] / reference
        unit = rho / (_scalar(1 - b1**count, p) * (root + _of(eps, name)))
        momentum[name] = -b1 * unit * state.mu[name].to(p)
        decay[name] = -rho * _of(weight_decay, name) * p
        scale[name] = -(1 - b1) * clip.to(p.dtype) * unit
    return Affine(momentum, decay, scale, clip, torch.tensor(reference, dtype=torch.float64))


def sgd(
    grads: Params,
    params: Params,
    buffer: Params | None = None,
    *,
    lr: float | dict[str, float],
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | dict[str, float] = 0.0,
    max_grad_norm: float | None = None,
) -> Affine:
    r"""The step of ``torch.optim.SGD`` as an affine map of the gradient; nothing is stepped.

    .. math:: d = c g + wd \, \theta, \quad b' = \mu b + (1 - \tau) d
              \ (\text{first step: } b' = d), \quad v = -\rho \, b'
              \ (\text{Nesterov: } -\rho \, (d + \mu b')).

    Args:
        grads: the gradient, of all names.
        params: the parameters, for decay.
        buffer: the momentum buffer before the step; None at the first.
        lr, weight_decay: a float, or a dict of floats by parameter name.
        max_grad_norm: clip the norm over all gradients to it; None or 0 is no clipping.

    Raises:
        ValueError: names or shapes that do not fit, a non-finite value, every rate 0, a negative
            `max_grad_norm`.
    """
    check_direction("sgd (grads)", grads, params)
    if buffer is not None:
        check_direction("sgd (buffer)", buffer, params)
    rates, reference = _rates("sgd", lr, params)
    clip = _clip("sgd", grads, max_grad_norm)
    keep, fresh = momentum, (1 - dampening if buffer is not None else 1.0)
    if momentum == 0:
        keep, fresh = 0.0, 1.0
    elif nesterov:
        keep, fresh = momentum * keep, 1 + momentum * fresh
    parts = Affine({}, {}, {}, clip, torch.tensor(reference, dtype=torch.float64))
    for name, p in params.items():
        rho = rates[name] / reference
        old = torch.zeros_like(p) if buffer is None else buffer[name].to(p)
        parts.momentum[name] = -rho * keep * old
        parts.decay[name] = -rho * fresh * _of(weight_decay, name) * p
        parts.scale[name] = (-rho * fresh * clip).to(p.dtype).expand_as(p)
    return parts


def direction(step: Affine, grads: Params) -> Params:
    """The update direction ``v = momentum + decay + scale * g``: parameter change over ``step.lr``.

    Args:
        step: from `adamw` or `sgd`.
        grads: the gradient that the step was made from, unclipped.

    Raises:
        ValueError: names or shapes that are not the step's.
    """
    moved = {name: g for name, g in grads.items() if g is not None}
    fitting = {name: s for name, s in step.scale.items() if grads.get(name, 0) is not None}
    check_names("direction", moved, fitting)
    return {
        name: step.momentum[name]
        + step.decay[name]
        + (0 if grads[name] is None else scale * grads[name].to(scale.dtype))
        for name, scale in step.scale.items()
    }


def decompose(step: Affine, row_grads: Params) -> tuple[Params, Params, Params]:
    """Splits v among momentum, weight decay and the update's rows, exactly.

    ``v = momentum + decay + sum_i rows[i]``, the denominator frozen at the realised gradient.
    Leaving a row out and recomputing the denominator is another quantity.

    Args:
        step: from `adamw` or `sgd`.
        row_grads: from `row_gradients`, leaves with leading N.

    Returns:
        ``(momentum, decay, rows)``, the last with leading N.

    Raises:
        ValueError: names or shapes that are not the step's.
    """
    check_names("decompose", {name: g[0] for name, g in row_grads.items()}, step.scale)
    rows = {name: scale * row_grads[name].to(scale.dtype) for name, scale in step.scale.items()}
    return step.momentum, step.decay, rows


def _gradient(fn: Callable, params: Params, part) -> Params:
    """Of the sum of fn. `torch.func.grad` would also keep a graph of its backward pass."""
    out, back = torch.func.vjp(lambda p: sum(leaf.sum() for leaf in leaves(fn(p, part))), params)
    return back(torch.ones_like(out), retain_graph=False, create_graph=False)[0]


def _clip(where: str, grads: Params, max_grad_norm: float | None) -> Tensor:
    total = norm(grads)
    if not max_grad_norm:
        return torch.ones_like(total)
    if not max_grad_norm > 0:
        raise ValueError(
            f"{where}: max_grad_norm must be positive, or None or 0 for no clipping, not "
            f"{max_grad_norm}."
        )
    return (max_grad_norm / (total + 1e-6)).clamp(max=1.0)


def _rates(
    where: str, lr: float | dict[str, float], params: Params
) -> tuple[dict[str, float], float]:
    rates = {name: float(_of(lr, name)) for name in params}
    reference = max(rates.values())
    if not reference > 0:
        raise ValueError(
            f"{where}: at least one learning rate must be positive, the largest is {reference}. A "
            "finished schedule saves 0: pass lr= the rate you ask about."
        )
    return rates, reference


def _of(value, name: str):
    if not isinstance(value, dict):
        return value
    if name not in value:
        raise ValueError(f"a value for every parameter name was expected, {name!r} has none.")
    return value[name]


def _scalar(value: Tensor, like: Tensor) -> Tensor:
    return value.to(device=like.device, dtype=like.dtype)
