"""A PEFT model split once into pure functions and two dicts: frozen `base`, trainable `params`."""

import copy
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..batch import Batch, collate
from ..packing import SHARED, Layout, by_row, pack, visible
from . import attention
from .float64 import Float64, rotary_frequencies
from .skeleton import make_skeleton, refuse, restore_forward, set_attention, unwrap

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Model:
    """The pure half of a language model: it holds no weight (its tensors are all meta).

    `split` makes it. ``logits = head(params, base, hidden(params, base, batch))``.
    """

    skeleton: nn.Module  # the whole unwrapped module, on meta, in eval mode, without hooks
    implementation: str | None  # of attention, that the caller's module ran with
    float64: bool  # computes in float64 throughout
    vocabulary: int  # V
    shares: int  # the longest rows whose prompt it reads once for several responses; 0: never
    _body: nn.Module
    _head: nn.Module
    _names: frozenset[str]  # of params and base together
    _aliases: dict[str, str]  # a tied tensor's other name in the body -> its name
    _head_names: dict[str, str]  # the head's own name of a tensor -> its name in params or base

    def hidden(self, params: Params, base: Params, batch: Batch) -> Tensor:
        """The final hidden states that predict the response tokens, [N, R, D], row by row."""
        return self.states(params, base, by_row(batch)).unflatten(0, batch.position.shape)

    def layout(self, batch: Batch) -> Layout:
        """How this model reads a batch at least cost: by `pack` where the tokens can be seen."""
        if torch.func.debug_unwrap(batch.tokens, recurse=False) is not batch.tokens:
            return by_row(batch)
        # NOTE [fours]: vmap folds lanes and tokens into one matrix, and MKL's dgemm rounds the rows
        # past a multiple of four differently; so every lane of the same parameters is the same.
        least = SHARED if int(batch.attention.sum(1).max()) <= self.shares else math.inf
        return pack(batch, least=least, multiple=4 if self.float64 else 1)

    def states(self, params: Params, base: Params, layout: Layout) -> Tensor:
        """The final hidden states at the places that a layout reads, [T, D].

        Right padding lies in every token's future, so the causal mask alone is exact.
        """
        tensors = base | params
        self._check(tensors)
        whole = {f"whole.{name}": tensor for name, tensor in tensors.items()}
        whole |= {f"whole.{other}": tensors[name] for other, name in self._aliases.items()}
        inputs = {"input_ids": layout.tokens, "use_cache": False}
        if layout.segment is not None:
            dtype = next(t.dtype for t in base.values() if t.is_floating_point())
            inputs["attention_mask"] = visible(layout.segment, dtype)
            inputs["position_ids"] = layout.place
        with self.precision():
            states = _call(self._body, whole, inputs).last_hidden_state
            return states.flatten(0, 1).index_select(0, layout.read)

    def head(self, params: Params, base: Params, hidden: Tensor) -> Tensor:
        """Logits [..., T, V] of hidden states [..., T, D]: the module's own head and scalings.

        Of a slice of the vocabulary, where each tensor that leads with V is given in that slice.
        """
        tensors = {
            own: params[name] if name in params else base[name]
            for own, name in self._head_names.items()
        }
        with self.precision():
            return _call(self._head, tensors, {"inputs_embeds": hidden, "use_cache": False}).logits

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names in params and base of the tensors that `head` uses."""
        return tuple(dict.fromkeys(self._head_names.values()))

    def _check(self, tensors: Params) -> None:
        if tensors.keys() != self._names:
            unknown, missing = (
                sorted(tensors.keys() - self._names),
                sorted(self._names - tensors.keys()),
            )
            raise ValueError(
                f"model: exactly the {len(self._names)} names of params and base were expected; "
                f"{len(missing)} are missing {missing[:5]}, {len(unknown)} are unknown "
                f"{unknown[:5]}. Pass the params and base that split() gave with this model."
            )

    def precision(self):
        """The scope its functions compute in: float64 throughout, or nothing."""
        return Float64() if self.float64 else nullcontext()


def split(module: nn.Module, *, dtype: torch.dtype | None = None) -> tuple[Model, Params, Params]:
    """Splits a module into a pure model, its trainable parameters and its frozen tensors.

    Args:
        module: a Hugging Face causal language model, usually with a PEFT adapter; DDP and
            `torch.compile` wrappers are taken off. It is not touched, nor held.
        dtype: cast every floating tensor to it; float64 computes in float64 throughout, norms,
            rotary embedding and softmax included. None keeps each as it is, but trainable
            parameters are at least float32, since lower precision would round ``eta * v`` away.

    Returns:
        ``(model, params, base)``. Names are those of ``named_parameters()`` and ``named_buffers()``
        of the unwrapped module (tied weights once). Without a cast the tensors are the module's
        own, detached and not copied: a later training step of it moves them.

    Raises:
        ValueError: nothing is trainable, an adapter is merged, a layer is sharded, quantised or
            patched, or the module's derivative is not the derivative of its values (DoRA).
    """
    module = unwrap(module)
    refuse(module)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    skeleton, twins = make_skeleton(module)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors = {
        name: _cast(tensor.detach(), dtype, name in trainable) for name, tensor in own.items()
    }
    float64 = all(t.dtype == torch.float64 for t in tensors.values() if t.is_floating_point())
    if float64:
        tensors |= rotary_frequencies(module)
    params = {name: tensor for name, tensor in tensors.items() if name in trainable}
    base = {name: tensor for name, tensor in tensors.items() if name not in trainable}
    model = _model(skeleton, twins, getattr(module.config, "_attn_implementation", None), float64)
    _self_check(model, params, base)
    return replace(model, shares=_shares(model, params, base)), params, base


def assemble(model: Model, params: Params, base: Params) -> nn.Module:
    """The inverse of `split`: a module in eval mode that shares storage with `params` and `base`.

    For whatever needs a module, `generate` above all. Changing its weights in place changes them.
    """
    memo = {}
    tensors = base | params
    for name, twin in model.skeleton.named_parameters():
        memo[id(twin)] = nn.Parameter(tensors[name].detach(), requires_grad=name in params)
    for name, twin in model.skeleton.named_buffers():
        memo[id(twin)] = tensors[name].detach()
    module = copy.deepcopy(model.skeleton, memo)
    restore_forward(module)
    set_attention(module, model.implementation)
    return module


def logits(model: Model, params: Params, base: Params, batch: Batch) -> Tensor:
    """The logits that predict each response token, [N, R, V], all at once; a scorer streams."""
    return model.head(params, base, model.hidden(params, base, batch))


class _Body(nn.Module):
    """Runs the decoder inside the whole module, so that the names are the whole module's."""

    def __init__(self, whole: nn.Module, decoder: nn.Module):
        super().__init__()
        self.whole = whole
        self._decoder = (decoder,)

    def forward(self, **kwargs):
        return self._decoder[0](**kwargs)


class _Passed(nn.Module):
    """Stands in for the decoder: hands the hidden states through to the module's own head."""

    def forward(self, input_ids=None, *, inputs_embeds: Tensor, **_):
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def _model(
    skeleton: nn.Module, twins: dict[int, str], implementation: str | None, float64: bool
) -> Model:
    causal = skeleton.get_base_model() if isinstance(skeleton, PeftModel) else skeleton
    prefix = getattr(causal, "base_model_prefix", "")
    decoder = getattr(causal, prefix, None) if prefix else None
    if decoder is None or causal.get_output_embeddings() is None:
        raise ValueError(
            f"split: a Hugging Face decoder-only causal language model was expected, "
            f"{type(causal).__name__} has no decoder below a language-model head."
        )
    head = copy.copy(causal)
    head._modules = dict(causal._modules) | {prefix: _Passed()}
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    names = _tensor_names(skeleton, twins)
    return Model(
        skeleton,
        implementation,
        float64,
        vocabulary,
        0,
        _Body(skeleton, decoder),
        head,
        frozenset(names.values()),
        {own: name for own, name in names.items() if own != name},
        _tensor_names(head, twins),
    )


def _tensor_names(module: nn.Module, twins: dict[int, str]) -> dict[str, str]:
    """The name in params or base behind each of a module's own names, tied ones included."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {own: twins[id(t)] for own, t in [*parameters, *buffers]}


def _call(module: nn.Module, tensors: dict[str, Tensor], inputs: dict):
    """`functional_call` with every name given, ties too: strict, without a walk for each call."""
    return functional_call(module, tensors, (), inputs, tie_weights=False)


def _cast(tensor: Tensor, dtype: torch.dtype | None, trainable: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if dtype is None:
        dtype = torch.promote_types(tensor.dtype, torch.float32) if trainable else tensor.dtype
    return tensor.to(dtype)


def _self_check(model: Model, params: Params, base: Params) -> None:
    """Head after body is the whole module, and its jvp is the derivative of its values."""
    device = next(iter(params.values())).device
    batch = collate([[1, 2, 3]], [[2, 1, 3]]).to(device)
    with torch.no_grad():
        attends = logits(model, params, base, batch)
        set_attention(model.skeleton, "eager")
        ours = logits(model, params, base, batch)
        with model.precision():
            whole = functional_call(
                model.skeleton,
                base | params,
                (),
                {"input_ids": batch.tokens, "use_cache": False},
                strict=True,
            ).logits[:, 2:5]
        scale = whole.abs().max()
        if not torch.allclose(ours, whole, rtol=0.0, atol=1e-3 * float(scale)):
            raise ValueError(
                f"split: head(hidden) differs from the module's own logits by "
                f"{float((ours - whole).abs().max()):.1e} of {float(scale):.1e}: "
                f"{type(model.skeleton).__name__} computes something between its decoder and head "
                "that this library does not see. Please report the architecture."
            )
        # `attend` where it is the model's own attention, else that.
        rounding = max(torch.finfo(t.dtype).eps for t in base.values() if t.is_floating_point())
        if torch.allclose(attends, ours, rtol=0.0, atol=1e2 * rounding * float(scale)):
            set_attention(model.skeleton, attention.NAME)
        _check_derivative(model, params, base, batch)


@torch.no_grad()
def _shares(model: Model, params: Params, base: Params) -> int:
    """The longest rows whose prompts the model can share: where no attention window binds.

    0 where positions and a mask of our own do not give what the rows by themselves give.
    """
    device = next(iter(params.values())).device
    batch = collate([[1, 2, 3]] * 2, [[2, 1], [3, 3, 1]]).to(device)
    apart = model.states(params, base, pack(batch, least=math.inf))
    try:
        together = model.states(params, base, pack(batch, least=1))
    except Exception:  # whatever an architecture raises that takes no positions, or no such mask
        return 0
    rounding = max(torch.finfo(t.dtype).eps for t in base.values() if t.is_floating_point())
    if not (together - apart).norm() < rounding**0.5 * apart.norm():
        return 0
    configs = [getattr(m, "config", None) for m in model.skeleton.modules()]
    windows = [
        getattr(config, name, None)
        for config in configs
        for name in ("sliding_window", "attention_chunk_size")
    ]
    return min((w for w in windows if isinstance(w, int) and w > 0), default=sys.maxsize)


def _check_derivative(model: Model, params: Params, base: Params, batch: Batch) -> None:
    generator = torch.Generator().manual_seed(0)
    size = max(float(p.abs().max()) for p in params.values()) or 1.0
    v = {
        name: size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in params.items()
    }

    def along(t):
        return model.hidden({name: p + t * v[name] for name, p in params.items()}, base, batch)

    def off(step: float) -> float:
        zero = torch.zeros((), dtype=params[next(iter(params))].dtype, device=batch.tokens.device)
        _, slope = jvp(along, (zero,), (torch.ones_like(zero),))
        change = (along(zero + step) - along(zero - step)) / (2 * step)
        return float((slope - change).norm() / slope.norm())

    # A base in lower precision rounds the increment, so the check is coarse; DoRA goes by name.
    coarse = any(t.is_floating_point() and t.dtype.itemsize < 4 for t in base.values())
    errors = [off(step) for step in ((3e-2, 1e-2, 3e-3) if coarse else (1e-2, 1e-3))]
    dora = any(getattr(m, "lora_magnitude_vector", None) for m in model.skeleton.modules())
    if (coarse and dora) or not min(errors) < (0.3 if coarse else 0.05):
        layers = sorted(
            {type(m).__name__ for m in model.skeleton.modules() if hasattr(m, "lora_A")}
        )
        raise ValueError(
            f"split: the derivative of {'DoRA' if dora else type(model.skeleton).__name__} layers "
            f"{layers} is not the derivative of their values (relative error {min(errors):.2g})"
            + (": PEFT's DoRA detaches the weight norm. Use plain LoRA." if dora else ".")
        )
