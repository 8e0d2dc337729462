"""A module's structure without its weights: a copy on meta that every transform passes through."""

import copy
import math
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

from . import rotary

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
_UNCHANGED = (  # by any call of a module without hooks
    *_HOOKS,
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unwrap(module: nn.Module) -> nn.Module:
    """The module below DDP and `torch.compile` wrappers."""
    while True:
        inner: Any = module
        if hasattr(module, "_orig_mod"):
            module = inner._orig_mod
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = inner.module
        else:
            return module


def causal_model(module: nn.Module) -> nn.Module:
    """The language model below PEFT's wrapper, or the module itself where there is no wrapper."""
    return module.get_base_model() if isinstance(module, PeftModel) else module


def refuse(module: nn.Module) -> None:
    """Raises ValueError if the module cannot be split, and says what to do."""
    for name, part in module.named_modules():
        _refuse_part(name, part)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        _refuse_tensor(name, tensor)
    _refuse_whole(module)


def make_skeleton(module: nn.Module) -> tuple[nn.Module, dict[int, str]]:
    """A copy of the module on meta, in eval mode, without hooks.

    Its layers compute what the module's do, in operations that have a derivative and a rule.

    Returns:
        The skeleton, and the name of each of its tensors by the tensor's id.
    """
    memo: dict[int, Any] = {}
    names = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        twin: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=False)
        memo[id(tensor)] = twin
        names[id(twin)] = name
    for part in module.modules():
        memo |= {id(getattr(part, hooks)): OrderedDict() for hooks in _HOOKS}
        patches = (part.__dict__.get(name) for name in ("forward", "_original_forward"))
        memo |= {id(patch): None for patch in patches if patch is not None}
    skeleton = copy.deepcopy(module, memo)
    for part in skeleton.modules():
        _make_pure(part)
    return skeleton.eval(), names


def duplicate(skeleton: nn.Module) -> nn.Module:
    """A copy of a skeleton, with modules of its own, the same tensors and no hooks either.

    It computes nothing, so it may be made within any transform.
    """
    parts = list(skeleton.modules())
    twins = [type(part).__new__(type(part)) for part in parts]
    memo: dict[int, Any] = {id(part): twin for part, twin in zip(parts, twins, strict=True)}
    for part in parts:
        tensors = (*part._parameters.values(), *part._buffers.values(), *vars(part).values())
        memo |= {id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor)}
        memo |= {id(getattr(part, name)): getattr(part, name) for name in _UNCHANGED}
    for part, twin in zip(parts, twins, strict=True):
        # Nearly all values are plain, and `deepcopy` takes long to see that.
        twin.__dict__ = {
            name: value if type(value) in _PLAIN else copy.deepcopy(value, memo)
            for name, value in vars(part).items()
        }
    return twins[0]


def fill(skeleton: nn.Module, params: dict[str, Tensor], base: dict[str, Tensor]) -> nn.Module:
    """A module with these tensors that runs the code of its classes."""
    memo: dict[int, Tensor] = {}
    tensors = base | params
    for name, parameter in skeleton.named_parameters():
        trainable = name in params
        memo[id(parameter)] = nn.Parameter(tensors[name].detach(), requires_grad=trainable)
    for name, buffer in skeleton.named_buffers():
        memo[id(buffer)] = tensors[name].detach()
    module = copy.deepcopy(skeleton, memo)
    for part in module.modules():
        part.__dict__.pop("forward", None)
    return module


def set_attention(module: nn.Module, implementation: str | None) -> None:
    """Makes every part of the module use this attention implementation; None changes nothing."""
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        if implementation is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = implementation


def _refuse_part(name: str, part: nn.Module) -> None:
    layer_type = type(part).__name__
    if layer_type.startswith("FSDP") or layer_type == "FullyShardedDataParallel":
        raise ValueError(
            f"split: whole tensors were expected, {name!r} is sharded ({layer_type}). "
            "Gather the full state into an unwrapped model and split that."
        )
    if getattr(part, "merged", False) is True:
        raise ValueError(
            f"split: an adapter apart from the base was expected, that of {name!r} is merged into "
            "it. Call unmerge_adapter() first."
        )
    forward = part.__dict__.get("forward")
    if forward is not None and not hasattr(part, "_original_forward"):
        raise ValueError(
            f"split: the forward of a class was expected, {name or 'the module'!r} has its forward "
            "replaced on the instance, which may hold the live weights. Remove the patch "
            "(accelerate: load without device_map, or call remove_hook_from_module)."
        )


def _refuse_tensor(name: str, tensor: Tensor) -> None:
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            f"split: whole tensors were expected, {name!r} is a DTensor shard. "
            "Gather the full state into an unwrapped model and split that."
        )
    if tensor.is_meta:
        raise ValueError(
            f"split: loaded weights were expected, {name!r} has no data (it is on meta). "
            "Load the weights first."
        )


def _refuse_whole(module: nn.Module) -> None:
    packed = [(name, p) for name, p in module.named_parameters() if p.dtype not in _FLOATING]
    if packed:
        name, first = packed[0]
        raise ValueError(
            f"split: a floating-point base was expected, {len(packed)} weights are quantised "
            f"({name!r} is {first.dtype}), which is not supported. Load the base model without "
            "quantization_config."
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            "split: trainable parameters were expected, no parameter is trainable, so there is "
            "nothing to move. Load the adapter with PeftModel.from_pretrained(..., "
            "is_trainable=True), or set requires_grad."
        )
    peft: Any = module
    configs = peft.peft_config if isinstance(module, PeftModel) else {}
    if any(config.is_prompt_learning for config in configs.values()):
        raise ValueError(
            "split: a weight adapter such as LoRA was expected, the adapter is one of prompt "
            "learning, which changes the tokens and not the weights. It is not supported."
        )
    invoked = [name for name, c in configs.items() if getattr(c, "alora_invocation_tokens", None)]
    if active := [name for name in invoked if name in peft.active_adapters]:
        raise ValueError(
            f"split: an adapter that acts on every token was expected, {active[0]!r} is an aLoRA: "
            "PEFT finds its alora_invocation_tokens in each row outside the layers, which this "
            "library does not run. Train plain LoRA, without alora_invocation_tokens."
        )


def _make_pure(part: Any) -> None:
    """Takes off a skeleton's part what a trainer left on it, and makes LoRA layers scale early."""
    for name in ("forward", "_original_forward", "_gradient_checkpointing_func"):
        part.__dict__.pop(name, None)
    if getattr(part, "gradient_checkpointing", False):
        part.gradient_checkpointing = False
    if hasattr(part, "warn_if_padding_and_no_attention_mask"):
        # It branches on the tokens, which vmap over rows cannot; right padding needs no mask.
        part.warn_if_padding_and_no_attention_mask = _say_nothing
    if _scales_exactly(part):
        part.forward = partial(_low_rank, part)
    if rotary.varies(part):
        part.forward = partial(rotary.short_rows, part)


def _scales_exactly(layer: nn.Module) -> bool:
    """Whether it is a LoRA layer whose scaling commutes with B to the last bit.

    It does where the scaling is a power of two and B has no bias.
    """
    if type(layer) is not lora.Linear or layer.lora_variant or layer.disable_adapters:
        return False
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    return all(
        math.frexp(layer.scaling[name])[0] == 0.5 and layer.lora_B[name].bias is None
        for name in adapters
    )


def _low_rank(layer: Any, x: Tensor) -> Tensor:
    """``W x + B (s A x)``: what the layer computes, but scaled before B, where x is narrow."""
    out: Tensor = layer.base_layer(x)
    dtype = out.dtype
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name], layer.lora_B[name]
            out = out + b(a(x.to(a.weight.dtype)) * layer.scaling[name])
    return out.to(dtype)


def _say_nothing(*_: object) -> None:
    pass
