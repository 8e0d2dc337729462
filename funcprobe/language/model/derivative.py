"""Whether a module's own derivative is that of its values, along every trainable tensor."""

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from ..batch import Batch, collate
from ..packing import by_row
from .checks import generic
from .float64 import Promoted
from .forward import Forward, Params

_STEPS = (1e-5, 1e-4, 1e-6, 1e-7)  # of central differences, as part of each tensor's size
_LIMIT = 1e-5  # how far a derivative that is right may be off, as part of itself
_FLOOR = 1e-9  # the rounding of differences, as part of the logits
_FURTHEST = 1e3  # how many times further than others a tensor is moved that matters little
_STACKED = 2**28  # bytes of parameters that differences are taken at together

Logits = Callable[[Params], Tensor]


# NOTE [each tensor by itself]: A tensor that matters little must not hide behind others. So one
# direction moves each tensor as far as gives all of them equal parts in the slope, which the
# gradient of a random combination of the logits tells beforehand; tensors that it would have to
# move too far get a second direction to themselves. These two test all tensors at once. Each kind
# of tensor (its name without the indices of layers) is tested by itself only where that fails, as
# it may where a direction meets a kink of the function.


@torch.no_grad()
def check_derivative(forward: Forward, params: Params, base: Params) -> str:
    """Compares the derivative of the logits, in both modes, with central differences of them.

    They are computed in float64 at a generic point near `params`: a tensor that is 0, as the B of a
    fresh LoRA is, would hide what it is multiplied by.

    Returns:
        A sentence that names the layers and the cause if some derivative is not that of the values,
        or if forward mode cannot pass; "" if all is right.

    Raises:
        ValueError: `torch.func` cannot take the gradient.
    """
    point = generic({name: p.double() for name, p in params.items()})
    for batch in _rows(forward, params):

        def logits(p: Params, batch: Batch = batch) -> Tensor:
            with Promoted():
                hidden = forward.states(p, base, by_row(batch))
                return forward.head(p, base, hidden.unsqueeze(0)).double()

        test = _test(logits, point, forward)
        reason = _reason(test, forward)
        if reason or all(test.part.values()):  # every tensor acts on these tokens
            return reason
    return ""


@dataclass(frozen=True)
class _Test:
    """What is known of the logits at a point."""

    logits: Logits
    point: Params
    size: float  # the norm of the logits
    cotangent: Tensor  # the combination of the logits whose gradient is known
    grads: Params
    v: Params  # moves each tensor as far as gives all equal parts in the slope, if it can
    part: dict[str, float]  # of each tensor in the slope along v

    def error(self, names: Collection[str]) -> float:
        """How far the derivative along these tensors is off, at the step where that is least.

        It is taken in both modes, and along the weak ones among them in reverse mode alone.

        Raises:
            RuntimeError: forward mode cannot pass.
        """
        directions = [self._along(names), *self._along_weak(names)]
        slope: Tensor = jvp(self.logits, (self.point,), (directions[0],))[1]
        errors = [math.inf] * len(directions)
        for step in _STEPS:
            for i, difference in enumerate(self._differences(directions, step)):
                claimed = sum(
                    float((self.grads[name] * d).sum()) for name, d in directions[i].items()
                )
                off = abs(claimed - float((self.cotangent * difference).sum()))
                if i == 0:
                    off = max(float((slope - difference).norm()), off)
                scale = float(difference.norm()) + self.size * _FLOOR / _LIMIT
                errors[i] = min(errors[i], off / scale)  # in this order a nan is not taken
            if max(errors) <= _LIMIT:
                break
        return max(errors)

    def _along(self, names: Collection[str]) -> Params:
        """v for these tensors and 0 for the others."""
        return {n: d if n in names else torch.zeros_like(d) for n, d in self.v.items()}

    def _along_weak(self, names: Collection[str]) -> list[Params]:
        """A direction for those of the tensors that cannot have an equal part in the slope."""
        most = max(self.part[name] for name in names)
        part = {name: self.part[name] for name in names if 0 < self.part[name] < 0.5 * most}
        least = min(part.values(), default=0.0)
        scaled = {n: d * (least / part[n] if n in part else 0.0) for n, d in self.v.items()}
        return [scaled] if part else []

    def _differences(self, directions: list[Params], step: float) -> list[Tensor]:
        """Central differences along each direction."""
        steps = [step, -step]
        points = [(v, h) for v in directions for h in steps]

        def at(lanes: list[tuple[Params, float]]) -> Params:
            return {
                name: torch.stack([p + h * v[name] for v, h in lanes])
                for name, p in self.point.items()
            }

        if sum(p.nbytes for p in self.point.values()) * len(points) <= _STACKED:
            try:
                values = vmap(self.logits)(at(points))
                return list((values[::2] - values[1::2]) / (2 * step))
            except RuntimeError as error:  # an operation that writes in place, above all
                _reraise_memory(error)
        alone = [self.logits({n: x[0] for n, x in at([point]).items()}) for point in points]
        return [(a - b) / (2 * step) for a, b in zip(alone[::2], alone[1::2], strict=True)]


def _test(logits: Logits, point: Params, forward: Forward) -> _Test:
    """Takes the gradient of a random combination of the logits."""
    generator = torch.Generator().manual_seed(0)
    try:
        value, pull = vjp(logits, point)[:2]
        cotangent = _normal(value, generator)
        (grads,) = pull(cotangent, retain_graph=False, create_graph=False)
    except (NotImplementedError, RuntimeError) as error:
        _reraise_memory(error)
        raise ValueError(
            f"split: a module whose gradient torch.func can take was expected, that of "
            f"{_layers(forward)} fails: {str(error).splitlines()[0]} Likely cause: a part with a "
            "backward of its own that torch.func cannot call. Use another adapter or architecture."
        ) from error
    v = {n: _normal(p, generator) * p.square().mean().sqrt() for n, p in point.items()}
    part = {name: float((grads[name] * v[name]).norm()) for name in point}
    most = max(part.values())
    for name, d in v.items():
        reach = min(most / part[name], _FURTHEST) if part[name] else _FURTHEST
        d *= reach
        part[name] *= reach
    return _Test(logits, point, float(value.norm()), cotangent, grads, v, part)


def _reason(test: _Test, forward: Forward) -> str:
    """The sentence on the first kind of tensor whose derivative is not right, or ""."""
    try:
        if test.error(test.point) <= _LIMIT:
            return ""
        kinds: dict[str, list[str]] = {}
        for name in test.point:
            kinds.setdefault(re.sub(r"\.\d+(?=\.)", "", name), []).append(name)
        for pattern, names in kinds.items():
            error = test.error(names)
            if error > _LIMIT:
                return _sentence(pattern, names, error, forward)
    except (NotImplementedError, RuntimeError) as error:
        _reraise_memory(error)
        return f"forward mode cannot pass {_layers(forward)}: {str(error).splitlines()[0]}"
    return ""


def _reraise_memory(error: RuntimeError) -> None:
    if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
        raise error


def _sentence(pattern: str, names: list[str], error: float, forward: Forward) -> str:
    layer = _layer(forward.skeleton, names[0])
    title = type(layer).__name__
    cause = "a part of the forward pass is detached, or its backward pass is that of another"
    if getattr(layer, "lora_magnitude_vector", None):
        title, cause = f"DoRA {title}", "PEFT's DoRA detaches the weight norm"
    return (
        f"the derivative of the logits along {pattern!r} ({title} layers, {len(names)} tensors) is "
        f"off by {error:.2g} of that of their values ({cause})"
    )


def _layer(module: nn.Module, name: str) -> nn.Module:
    """The adapter's layer that holds a tensor, or else the module that does."""
    layer = module
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        layer = module if isinstance(module, BaseTunerLayer) else layer
    return layer if isinstance(layer, BaseTunerLayer) else module


def _layers(forward: Forward) -> str:
    """The classes of a module and of its adapter's layers."""
    parts = forward.skeleton.modules()
    layers = sorted({type(part).__name__ for part in parts if isinstance(part, BaseTunerLayer)})
    return f"{type(forward.skeleton).__name__} {layers}"


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _rows(forward: Forward, params: Params) -> Iterator[Batch]:
    """Rows of one response each: of tokens that an adapter trains, if any, and of others."""
    device = next(iter(params.values())).device
    layers: list[Any] = list(forward.skeleton.modules())
    chosen = [getattr(layer, "token_indices", None) or {} for layer in layers]
    trained = {int(token) for by in chosen for ids in by.values() for token in ids}
    # torch gives the embedding of the padding token no gradient, by design: it must not occur.
    padding = {getattr(layer, "padding_idx", None) for layer in layers}
    special = sorted(trained - padding)
    a, b, c, d, *more = [token for token in range(1, 12) if token not in padding]
    yield collate([[*special[:2], a, b, c, *special[-2:]]], [[b, a, c]]).to(device)
    yield collate([[d, *more, b]], [[a, d, c, b]]).to(device)
