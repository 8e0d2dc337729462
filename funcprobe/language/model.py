"""A PEFT model split once into pure functions and two dicts: frozen `base`, trainable `params`."""

import copy
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .batch import Batch, collate
from .float64 import Float64, rotary_frequencies

Params = dict[str, Tensor]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


@dataclass(frozen=True, eq=False)
class Model:
    """The pure half of a language model: it holds no weight (its tensors are all meta).

    `split` makes it. ``logits = head(params, base, hidden(params, base, batch))``.
    """

    skeleton: nn.Module  # the whole unwrapped module, on meta, in eval mode, without hooks
    attention: str | None  # the attention implementation the caller's module ran with
    float64: bool  # computes in float64 throughout
    vocabulary: int  # V
    _body: nn.Module
    _head: nn.Module
    _head_names: dict[str, str]  # the head's own name of a tensor -> its name in params or base

    def hidden(self, params: Params, base: Params, batch: Batch) -> Tensor:
        """The final hidden states that predict the response tokens, [N, R, D].

        Right padding lies in every token's future, so the causal mask alone is exact.
        """
        tensors = {f"whole.{name}": tensor for name, tensor in (base | params).items()}
        with self.precision():
            states = functional_call(
                self._body,
                tensors,
                (),
                {"input_ids": batch.tokens, "use_cache": False},
                strict=True,
            ).last_hidden_state
            return torch.take_along_dim(states, batch.position.unsqueeze(-1), dim=1)

    def head(self, params: Params, base: Params, hidden: Tensor) -> Tensor:
        """Logits [..., T, V] of hidden states [..., T, D]: the module's own head and scalings."""
        tensors = {
            own: params[name] if name in params else base[name]
            for own, name in self._head_names.items()
        }
        with self.precision():
            return functional_call(
                self._head, tensors, (), {"inputs_embeds": hidden, "use_cache": False}, strict=True
            ).logits

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
    module = _unwrap(module)
    _refuse(module)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    skeleton, twins = _skeleton(module)
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
    return model, params, base


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
    _set_attention(module, model.attention)
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


def _unwrap(module: nn.Module) -> nn.Module:
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        else:
            return module


def _refuse(module: nn.Module) -> None:
    """Raises ValueError for what cannot be split, saying what to do."""
    for name, part in module.named_modules():
        kind = type(part).__name__
        if kind.startswith("FSDP") or kind == "FullyShardedDataParallel":
            raise ValueError(
                f"split: whole tensors were expected, {name!r} is sharded ({kind}). "
                "Gather the full state into an unwrapped model and split that."
            )
        if getattr(part, "merged", False) is True:
            raise ValueError(
                f"split: the adapter must be separate, {name!r} has it merged into the base. "
                "Call unmerge_adapter() first."
            )
        forward = part.__dict__.get("forward")
        if forward is not None and not hasattr(part, "_original_forward"):
            raise ValueError(
                f"split: {name or 'the module'!r} has its forward replaced on the instance, which "
                "may hold the live weights. Remove the patch (accelerate: remove_hook_from_module)."
            )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                f"split: whole tensors were expected, {name!r} is a DTensor shard. "
                "Gather the full state into an unwrapped model and split that."
            )
        if tensor.is_meta:
            raise ValueError(f"split: {name!r} has no data (meta). Load the weights first.")
    quantised = [
        name
        for name, p in module.named_parameters()
        if p.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ]
    if quantised:
        raise ValueError(
            f"split: a floating-point base was expected, {len(quantised)} weights are quantised "
            f"({quantised[0]!r} is {module.get_parameter(quantised[0]).dtype}), which is not "
            "supported. Load the base model without quantization_config."
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            "split: no parameter is trainable, so there is nothing to move. Load the adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or set requires_grad."
        )
    if isinstance(module, PeftModel) and any(
        c.is_prompt_learning for c in module.peft_config.values()
    ):
        raise ValueError(
            "split: prompt-learning adapters change the tokens, not the weights, and are not "
            "supported. Use a weight adapter such as LoRA."
        )


def _skeleton(module: nn.Module) -> tuple[nn.Module, dict[int, str]]:
    """A copy on meta without hooks, and the name behind each of its tensors' ids."""
    memo, twins = {}, {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        twin = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=False)
        memo[id(tensor)] = twin
        twins[id(twin)] = name
    for part in module.modules():
        for name in _HOOKS:
            memo[id(getattr(part, name))] = OrderedDict()
        for name in ("forward", "_original_forward"):
            if name in part.__dict__:
                memo[id(part.__dict__[name])] = None
    skeleton = copy.deepcopy(module, memo)
    for part in skeleton.modules():
        for name in ("forward", "_original_forward", "_gradient_checkpointing_func"):
            part.__dict__.pop(name, None)
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False
        if hasattr(part, "warn_if_padding_and_no_attention_mask"):
            # It branches on the tokens, which vmap over rows cannot; right padding needs no mask.
            part.warn_if_padding_and_no_attention_mask = _say_nothing
    _set_attention(skeleton, "eager")
    return skeleton.eval(), twins


def _say_nothing(*_) -> None:
    pass


def _set_attention(module: nn.Module, implementation: str | None) -> None:
    for part in module.modules():
        config = getattr(part, "config", None)
        if implementation is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = implementation


def _model(
    skeleton: nn.Module, twins: dict[int, str], attention: str | None, float64: bool
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
    names = {own: twins[id(t)] for own, t in [*head.named_parameters(), *head.named_buffers()]}
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    return Model(skeleton, attention, float64, vocabulary, _Body(skeleton, decoder), head, names)


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
        _check_derivative(model, params, base, batch)


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
