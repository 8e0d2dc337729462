"""A module's structure without its weights: a copy on meta that every transform passes through."""

import copy
import math
from collections import OrderedDict
from functools import partial

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

from . import attention

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


def unwrap(module: nn.Module) -> nn.Module:
    """The module below DDP and `torch.compile` wrappers."""
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        else:
            return module


def refuse(module: nn.Module) -> None:
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
                "may hold the live weights. Remove the patch (accelerate: load without device_map, "
                "or remove_hook_from_module)."
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


def make_skeleton(module: nn.Module) -> tuple[nn.Module, dict[int, str]]:
    """A copy on meta without hooks, and the name behind each of its tensors' ids.

    It attends by `attend`, whose every operation has a derivative and a rule.
    """
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
        if _is_plain(part):
            part.forward = partial(_low_rank, part)
    attention.register()
    set_attention(skeleton, attention.NAME)
    return skeleton.eval(), twins


def set_attention(module: nn.Module, implementation: str | None) -> None:
    """Makes every part of the module use this attention implementation; None changes nothing."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if implementation is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = implementation


def restore_forward(module: nn.Module) -> None:
    """Gives a copy of a skeleton the forwards of its classes again."""
    for part in module.modules():
        part.__dict__.pop("forward", None)


def _is_plain(layer: nn.Module) -> bool:
    """A LoRA layer whose scaling commutes with B to the last bit: a power of two, no bias."""
    if type(layer) is not lora.Linear or layer.lora_variant or layer.disable_adapters:
        return False
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    return all(
        math.frexp(layer.scaling[name])[0] == 0.5 and layer.lora_B[name].bias is None
        for name in adapters
    )


def _low_rank(layer: nn.Module, x: Tensor) -> Tensor:
    """``W x + B (s A x)``: what the layer computes, but scaled where it is narrow."""
    out = layer.base_layer(x)
    dtype = out.dtype
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name], layer.lora_B[name]
            out = out + b(a(x.to(a.weight.dtype)) * layer.scaling[name])
    return out.to(dtype)


def _say_nothing(*_) -> None:
    pass
