"""The truth that the matrix is held against: the live module in float64, its weights in place.

It is run one row at a time, without padding, and shares no code with the package. The module runs
within `Wide`, which turns every cast to a lower precision into one to float64.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_LOWER = (torch.float32, torch.float16, torch.bfloat16)


class Wide(TorchDispatchMode):
    """Every operation that asks for a lower floating-point precision is given float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wide = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **wide)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value


class Numbers(NamedTuple):
    """A log-probability and an entropy of each response token, [N, R]; 0 off the response."""

    logp: Tensor
    entropy: Tensor


def widen(module: nn.Module) -> nn.Module:
    """A float64 copy of a module; its rotary frequencies are computed again, in float64."""
    wide = copy.deepcopy(module).double()
    for part in wide.modules():
        tables = dict(part.named_buffers(recurse=False))
        if not any("inv_freq" in name for name in tables):
            continue
        with Wide():
            exact = dict(type(part)(part.config).named_buffers(recurse=False))
        for name, table in tables.items():
            assert torch.allclose(table, exact[name].double(), rtol=1e-5)
            table.copy_(exact[name])
    return wide


def scores(module: nn.Module, batch: Any) -> Numbers:
    """The scores of a batch's responses by a float64 module, with a graph where one is on."""
    out = [_row(module, batch, i) for i in range(len(batch.tokens))]
    return Numbers(*(torch.stack(x) for x in zip(*out, strict=True)))


def _row(module: nn.Module, batch: Any, i: int) -> Numbers:
    """The scores of one row, [R]."""
    width, t = batch.response.shape[1], int(batch.response[i].sum())
    ids = batch.tokens[i][batch.attention[i]]
    if t == 0:
        return Numbers(*torch.zeros(2, width, dtype=torch.float64))
    with Wide():
        logits = module(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, -t - 1 : -1]
    assert logits.dtype == torch.float64
    lp = torch.log_softmax(logits, -1)
    both = lp.gather(-1, ids[-t:, None]).squeeze(-1), -(lp.exp() * lp).sum(-1)
    return Numbers(*(nn.functional.pad(x, (0, width - t)) for x in both))


@torch.no_grad()
def along(
    module: nn.Module, v: dict[str, Tensor], etas: Sequence[float], batch: Any
) -> list[Numbers]:
    """The scores at each ``params + eta v``, by writing the module's weights in place."""
    weights = dict(module.named_parameters())
    start = {name: weights[name].clone() for name in v}
    out = []
    for eta in etas:
        for name in v:
            weights[name].copy_(start[name] + eta * v[name])
        out.append(scores(module, batch))
    for name in v:
        weights[name].copy_(start[name])
    return out


def gradient(module: nn.Module, batch: Any, weights: Numbers) -> dict[str, Tensor]:
    """The gradient of the scores' sum under `weights`, by the module's own backward."""
    here = {name: p for name, p in module.named_parameters() if p.requires_grad}
    got = scores(module, batch)
    total = (got.logp * weights.logp + got.entropy * weights.entropy).sum()
    grads = torch.autograd.grad(total, list(here.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(here.items(), grads, strict=True)
    }
