"""What `split` relies on, checked for the module at hand on a few tokens.

A check is a function of a module's `Forward`, params and base. It raises a ValueError that says
what is wrong and what to do, or returns what it measured for `split` to act upon; it changes
nothing. To add one, write such a function and call it in `split`.
"""

import math
import sys

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ..batch import Batch, collate
from ..packing import by_row, pack
from .forward import Forward, Params

_STEPS = (1e-2, 1e-3)  # of central differences, as part of the largest parameter
_COARSE_STEPS = (3e-2, 1e-2, 3e-3)  # the same where a base in lower precision rounds them


@torch.no_grad()
def check_head(forward: Forward, params: Params, base: Params) -> None:
    """The head after the body gives the module's own logits.

    Raises:
        ValueError: it does not.
    """
    batch = _one_row(params)
    ours = _logits(forward, params, base, batch)
    inputs = {"input_ids": batch.tokens, "use_cache": False}
    with forward.borrowed() as halves, forward.precision():
        out = functional_call(halves.whole, base | params, (), inputs, strict=True)
    whole = torch.take_along_dim(out.logits, batch.position.unsqueeze(-1), 1)
    error, scale = float((ours - whole).abs().max()), float(whole.abs().max())
    if not error <= 1e-3 * scale:
        raise ValueError(
            f"split: head(hidden) was expected to be the module's own logits, it differs by "
            f"{error:.1e} of {scale:.1e}. {type(forward.skeleton).__name__} computes something "
            "between its decoder and head that this library does not see. Please report the "
            "architecture."
        )


@torch.no_grad()
def attends_alike(ours: Forward, eager: Forward, params: Params, base: Params) -> bool:
    """Whether our attention gives the logits of the module's own up to rounding."""
    batch = _one_row(params)
    a, b = (_logits(forward, params, base, batch) for forward in (ours, eager))
    atol = 1e2 * _rounding(base) * float(b.abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=atol)


@torch.no_grad()
def longest_shared(forward: Forward, params: Params, base: Params) -> int:
    """The longest rows whose prompts can be shared: up to the shortest attention window.

    It is 0 where the positions and the mask of shared prompts do not give what the rows give by
    themselves.
    """
    device = next(iter(params.values())).device
    batch = collate([[1, 2, 3]] * 2, [[2, 1], [3, 3, 1]]).to(device)
    apart = forward.states(params, base, pack(batch, least=math.inf))
    try:
        together = forward.states(params, base, pack(batch, least=1))
    except Exception:  # an architecture without position_ids or such a mask may raise anything
        return 0
    if not (together - apart).norm() < _rounding(base) ** 0.5 * apart.norm():
        return 0
    return min(_windows(forward.skeleton), default=sys.maxsize)


@torch.no_grad()
def check_derivative(forward: Forward, params: Params, base: Params) -> None:
    """The derivative of the hidden states is that of their values: it meets central differences.

    Raises:
        ValueError: it does not, as in DoRA layers, whose weight norm PEFT detaches.
    """
    coarse = any(t.is_floating_point() and t.dtype.itemsize < 4 for t in base.values())
    steps, limit = (_COARSE_STEPS, 0.3) if coarse else (_STEPS, 0.05)
    error = _derivative_error(forward, params, base, steps)
    layers = list(forward.skeleton.modules())
    dora = any(getattr(layer, "lora_magnitude_vector", None) for layer in layers)
    # A base in lower precision rounds the differences too much for them to show what DoRA does.
    if error < limit and not (coarse and dora):
        return
    name, cause, cure = (
        ("DoRA", "PEFT's DoRA detaches the weight norm", "Use plain LoRA.")
        if dora
        else (type(forward.skeleton).__name__, "a part is detached", "Please report the layers.")
    )
    adapted = sorted({type(layer).__name__ for layer in layers if hasattr(layer, "lora_A")})
    raise ValueError(
        f"split: derivatives that are those of the values were expected, those of {name} layers "
        f"{adapted} are not (relative error {error:.2g}). Likely cause: {cause}. {cure}"
    )


def _derivative_error(
    forward: Forward, params: Params, base: Params, steps: tuple[float, ...]
) -> float:
    """The relative error of the jvp along a random direction, at the step where it is least."""
    generator = torch.Generator().manual_seed(0)
    size = max(float(p.abs().max()) for p in params.values()) or 1.0
    v = {
        name: size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in params.items()
    }
    batch = _one_row(params)
    zero = next(iter(params.values())).new_zeros(())

    def along(t: Tensor) -> Tensor:
        return _hidden(forward, {name: p + t * v[name] for name, p in params.items()}, base, batch)

    slope: Tensor = jvp(along, (zero,), (torch.ones_like(zero),))[1]

    def error(step: float) -> float:
        difference = (along(zero + step) - along(zero - step)) / (2 * step)
        return float((slope - difference).norm() / slope.norm())

    return min(error(step) for step in steps)


def _one_row(params: Params) -> Batch:
    """A row of three prompt and three response tokens, where the parameters are."""
    return collate([[1, 2, 3]], [[2, 1, 3]]).to(next(iter(params.values())).device)


def _hidden(forward: Forward, params: Params, base: Params, batch: Batch) -> Tensor:
    return forward.states(params, base, by_row(batch)).unflatten(0, batch.position.shape)


def _logits(forward: Forward, params: Params, base: Params, batch: Batch) -> Tensor:
    return forward.head(params, base, _hidden(forward, params, base, batch))


def _rounding(base: Params) -> float:
    """The coarsest precision among the base's tensors."""
    return max(torch.finfo(t.dtype).eps for t in base.values() if t.is_floating_point())


def _windows(skeleton: nn.Module) -> list[int]:
    """The lengths of all attention windows in the module's configurations."""
    configs = [getattr(part, "config", None) for part in skeleton.modules()]
    lengths = [
        getattr(config, name, None)
        for config in configs
        for name in ("sliding_window", "attention_chunk_size")
    ]
    return [length for length in lengths if isinstance(length, int) and length > 0]
