"""A PEFT model split once into pure functions and two dicts: frozen `base`, trainable `params`."""

import math
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import SHARED, Batch
from ..packing import Layout, by_row, pack
from ..tracing import concrete, levels
from . import attention, checks, masks, positions
from .derivative import check_derivative
from .float64 import rotary_frequencies
from .forward import Forward, Params, forward_of
from .hooks import check_hooks
from .skeleton import (
    causal_model,
    duplicate,
    fill,
    make_skeleton,
    refuse,
    set_attention,
    unwrap,
)

__all__ = ["Model", "Params", "assemble", "logits", "split"]


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """The pure half of a language model: it holds no weight (its tensors are all meta).

    `split` makes it. ``logits = head(params, base, hidden(params, base, batch))``. Several threads
    may call it at once; each call gives the bits that it would give alone.
    """

    forward: Forward
    implementation: str | None  # of attention, that the caller's module ran with
    vocabulary: int  # V
    sliced: bool  # whether the head may be read in slices of the vocabulary
    shares: int  # the longest rows whose prompt it reads once for several responses; 0: never
    longest: int | None  # the longest rows that it is right for; None: of any length
    trainable: int  # how many of its tensors `split` gave as params
    false_derivative: str  # how its derivative differs from that of its values; "" if it does not

    @property
    def skeleton(self) -> nn.Module:
        """The whole unwrapped module, on meta, in eval mode, without hooks; it is never run."""
        return self.forward.skeleton

    @property
    def float64(self) -> bool:
        """Whether it computes in float64 throughout."""
        return self.forward.float64

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names in params and base of the tensors that `head` uses."""
        return self.forward.head_names

    def hidden(self, params: Params, base: Params, batch: Batch) -> Tensor:
        """The final hidden states that predict the response tokens, [N, R, D], row by row."""
        self._check_length(batch)
        return self.states(params, base, by_row(batch)).unflatten(0, batch.position.shape)

    def layout(self, batch: Batch) -> Layout:
        """How this model reads a batch at least cost: by `pack` where the tokens can be seen.

        Raises:
            ValueError: a row is longer than the model is right for.
        """
        self._check_length(batch)
        if not concrete(batch.tokens):
            return by_row(batch)
        # `vmap` folds lanes and tokens into one matrix, and MKL's dgemm rounds the rows past a
        # multiple of four differently. In float64 the layout is therefore filled up to multiples of
        # four, so that lanes of equal parameters give equal bits and a change of zero is exactly 0.
        least = SHARED if int(batch.attention.sum(1).max()) <= self.shares else math.inf
        return pack(batch, least=least, multiple=4 if self.float64 else 1)

    def states(self, params: Params, base: Params, layout: Layout) -> Tensor:
        """The final hidden states at the T places that a layout reads, [T, D]."""
        return self.forward.states(params, base, layout)

    def head(self, params: Params, base: Params, hidden: Tensor) -> Tensor:
        """Logits [..., T, V] of hidden states [..., T, D]: the module's own head and scalings.

        If every tensor that leads with V is given as the same slice of the vocabulary, the logits
        are of that slice.
        """
        return self.forward.head(params, base, hidden)

    def precision(self) -> AbstractContextManager[Any]:
        """The scope its functions compute in: float64 throughout, or nothing."""
        return self.forward.precision()

    def _check_length(self, batch: Batch) -> None:
        if self.longest is None:
            return
        *_, attention = levels(batch.attention)  # of all rows, whichever transform runs
        longest = int(attention.sum(-1).max())
        if longest > self.longest:
            limit = positions.limit(self.skeleton)
            raise ValueError(
                f"model: rows of at most {self.longest} tokens were expected, one has {longest}. "
                f"{limit.cause if limit else ''} Leave the longer rows out, or cut them."
            )

    def __repr__(self) -> str:
        module: Any = self.skeleton
        adapters = getattr(module, "peft_config", {}).values()
        names = sorted({str(getattr(a.peft_type, "value", a.peft_type)) for a in adapters})
        frozen = len(self.forward.names) - self.trainable
        attends = repr(getattr(module.config, "_attn_implementation", None))
        if repr(self.implementation) != attends:
            attends += f" for {self.implementation!r}"
        shared = "rows of any length" if self.shares == sys.maxsize else f"rows up to {self.shares}"
        longest = "any length" if self.longest is None else f"at most {self.longest} tokens"
        return (
            f"Model({type(causal_model(module)).__name__}, adapter {' and '.join(names) or None},\n"
            f"      {self.trainable} tensors of params and {frozen} of base, "
            f"vocabulary {self.vocabulary},\n"
            f"      {'float64 throughout' if self.float64 else 'in the precision of its tensors'}, "
            f"attention {attends},\n"
            f"      rows of {longest}, prompts shared in {shared if self.shares else 'no rows'},\n"
            f"      head read {'in slices' if self.sliced else 'whole'}"
            f"{self.false_derivative and f',{chr(10)}      {self.false_derivative}'})"
        )


def split(module: nn.Module, *, dtype: torch.dtype | None = None) -> tuple[Model, Params, Params]:
    """Splits a module into a pure model, its trainable parameters and its frozen tensors.

    The module is neither touched nor held. The process changes in one respect: transformers learns
    one attention implementation, by the name "funcprobe". What the model relies on is checked on a
    few tokens (see `checks`); one of the checks uses forward mode, which in torch belongs to the
    whole process, so no other thread may use `torch.func.jvp` meanwhile.

    Args:
        module: a Hugging Face causal language model, usually with a PEFT adapter; DDP and
            `torch.compile` wrappers are taken off.
        dtype: every floating tensor is cast to it; float64 computes in float64 throughout, norms,
            rotary embedding and softmax included. None keeps the dtypes, but makes trainable
            parameters float32 at least, since lower precision would round ``eta * v`` away.

    Returns:
        ``(model, params, base)``. Names are those of ``named_parameters()`` and ``named_buffers()``
        of the unwrapped module (tied weights once). Without a cast the tensors are the module's
        own, detached and not copied: a later training step of it moves them.

    Raises:
        ValueError: nothing is trainable, an adapter is merged, a layer is sharded, quantised or
            patched, or its gradient cannot be taken. A module whose derivative is not that of its
            values (DoRA) is split, and the model says so in `false_derivative`.
    """
    module = unwrap(module)
    refuse(module)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    tensors = _tensors(module, dtype, trainable)
    params = {name: tensor for name, tensor in tensors.items() if name in trainable}
    base = {name: tensor for name, tensor in tensors.items() if name not in trainable}

    skeleton, names = make_skeleton(module)
    float64 = _all_float64(tensors)
    ours, eager, apart = (forward_of(x, names, float64=float64) for x in _attending(skeleton))
    point = checks.generic(params)  # where a fresh adapter does what it will do when it has moved
    trial = checks.check_runs(eager, point, base)
    checks.check_state(eager, point, base)  # first: what keeps state differs from itself
    check_hooks(module, eager, params, base)
    checks.check_causal(eager, point, base)
    whole = checks.check_head(eager, point, base, trial)
    forward = ours if checks.attends_alike(ours, point, base, whole) else eager
    causal: Any = causal_model(skeleton)
    limit = positions.limit(skeleton)
    model = Model(
        forward=forward,
        implementation=getattr(module.config, "_attn_implementation", None),
        vocabulary=causal.get_output_embeddings().weight.shape[0],
        sliced=checks.slices_alike(forward, point, base, trial),
        shares=checks.longest_shared(forward, apart, point, base),
        longest=limit and limit.longest,
        trainable=len(params),
        false_derivative=check_derivative(forward, params, base),
    )
    return model, params, base


def assemble(model: Model, params: Params, base: Params) -> nn.Module:
    """The inverse of `split`: a module in eval mode that shares storage with `params` and `base`.

    It is for whatever needs a module, above all for `generate`. Changing its weights in place
    changes `params` and `base`.
    """
    module = fill(model.skeleton, params, base)
    set_attention(module, model.implementation)
    return module


def logits(model: Model, params: Params, base: Params, batch: Batch) -> Tensor:
    """The logits that predict each response token, [N, R, V], all at once; a scorer streams."""
    return model.head(params, base, model.hidden(params, base, batch))


def _tensors(module: nn.Module, dtype: torch.dtype | None, trainable: set[str]) -> Params:
    """All tensors of the module by name, detached and cast."""
    live = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors = {
        name: _cast(tensor.detach(), dtype, name in trainable) for name, tensor in live.items()
    }
    return tensors | rotary_frequencies(module) if _all_float64(tensors) else tensors


def _cast(tensor: Tensor, dtype: torch.dtype | None, trainable: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if dtype is None:
        dtype = torch.promote_types(tensor.dtype, torch.float32) if trainable else tensor.dtype
    return tensor.to(dtype)


def _all_float64(tensors: Params) -> bool:
    return all(t.dtype == torch.float64 for t in tensors.values() if t.is_floating_point())


def _attending(skeleton: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The skeleton with our attention, and copies with the one called "eager" and with `apart`."""
    attention.register()
    masks.register()
    eager, apart = duplicate(skeleton), duplicate(skeleton)
    set_attention(eager, "eager")
    set_attention(apart, masks.APART)
    set_attention(skeleton, attention.NAME)
    return skeleton, eager, apart
