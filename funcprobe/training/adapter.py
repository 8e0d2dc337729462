"""A saved adapter put on its base model, which is not changed."""

import copy
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..calculus.tree import Params
from .folder import find_file, read_json
from .pretrained import load_pretrained
from .refusal import explained, listed, refusal

Source = str | Path | nn.Module  # of a base model: a folder, hub id or .gguf file, or a module


def load_adapter(
    folder: Path, base_model: Source | None, dtype: torch.dtype
) -> tuple[nn.Module, str | Path | None]:
    """The base model with the adapter of a folder, and where the base was loaded from.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors or adapter_model.bin.
        base_model: the base, or where it is. If None, it is the one that adapter_config.json names,
            which is first tried as a path from `folder`.
        dtype: the dtype of a base that is loaded, in which saved tensors are compared.

    Returns:
        The PEFT model, and the base's folder or hub id; None if it was given as a module.

    Raises:
        FileNotFoundError: the folder lacks one of the adapter's files.
        ValueError: there is no base, or the adapter does not fit it.
    """
    find_file(folder, "adapter_config.json")
    find_file(folder, "adapter_model.safetensors", "adapter_model.bin")
    config = read_json(folder / "adapter_config.json")
    fits = partial(
        explained,
        f"an adapter that fits the base model was expected in {folder}",
        "the base model is not the one it was trained on, or a file is damaged",
        "Pass base_model=.",
    )
    with fits():
        weights = load_peft_weights(str(folder), device="cpu")
    origin: str | Path | None = None
    if isinstance(base_model, nn.Module):
        base = _twin(base_model, weights, config.get("init_lora_weights"))
    else:
        origin, revision = (base_model, None) if base_model is not None else _named(folder, config)
        base = load_pretrained(origin, dtype, revision)
    with fits(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # _check_landed refuses what PEFT only warns of
        module = PeftModel.from_pretrained(base, str(folder), is_trainable=True, torch_device="cpu")
    _check_landed(module, weights, dtype)
    _check_scaling(module, folder)
    return module, origin


def _named(folder: Path, config: dict[str, Any]) -> tuple[str | Path, str | None]:
    """The base model that adapter_config.json names, and its revision."""
    name = config.get("base_model_name_or_path")
    if not name:
        raise refusal(
            "a base model was expected, but adapter_config.json names none",
            "it was a module in memory",
            "Pass base_model=, the folder, hub id or module that the adapter was trained on.",
        )
    return folder / name if (folder / name).exists() else name, config.get("revision")


def _twin(module: nn.Module, weights: Params, init: Any) -> nn.Module:
    """A copy of the module's structure over the same weights, for PEFT to inject an adapter into.

    The tensors that PEFT may write into are copied. These are the ones that were saved by the same
    name, such as trained biases, or all of them if the adapter's initialisation changes the base
    (OLoRA).
    """
    if any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        raise refusal(
            "a base_model without adapters was expected, but it has adapter layers",
            "it went through get_peft_model, which changes it in place",
            "Load it afresh.",
        )
    saved = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in weights}
    copy_all = init not in (None, True, False, "gaussian")
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in module.buffers()}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        copied = copy_all or name in saved
        if copied or id(tensor) not in memo:
            data = tensor.detach().clone() if copied else tensor.detach()
            memo[id(tensor)] = nn.Parameter(data, requires_grad=False)
    return copy.deepcopy(module, memo)


def _check_landed(module: PeftModel, weights: Params, dtype: torch.dtype) -> None:
    """Refuses unless the saved tensors are in the module, equal, and are all that it trains."""
    held = module.state_dict()
    held |= get_peft_model_state_dict(module, held, save_embedding_layers=False)
    lost = [name for name in weights if not _equal(held.get(name), weights[name], dtype)]
    landed = {held[name].data_ptr() for name in weights if name in held}
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    bare = [name for name, p in trained if p.data_ptr() not in landed]
    if lost or bare:
        raise refusal(
            "the saved adapter tensors and the trained parameters were expected to be the same, "
            f"but {len(lost)} tensors did not load as saved: {listed(lost)}; {len(bare)} "
            f"parameters have none: {listed(bare)}",
            "adapter_config.json or the base model (its layers, its dtype) is not the run's",
            "Pass base_model=.",
        )


def _check_scaling(module: PeftModel, folder: Path) -> None:
    """Refuses an adapter that is multiplied by 0, so that its update changes nothing."""
    idle = [
        name
        for name, part in module.named_modules()
        if isinstance(part, BaseTunerLayer)
        for scale in (getattr(part, "scaling", None) or {}).values()
        if isinstance(scale, int | float) and not (scale and math.isfinite(scale))
    ]
    if idle:
        raise refusal(
            f"adapters with a finite scaling other than 0 were expected in {folder}, found "
            f"{len(idle)} without: {listed(idle)}",
            "lora_alpha in adapter_config.json is 0 or not a number, so they change nothing",
            "Write the run's own lora_alpha.",
        )


def _equal(held: torch.Tensor | None, saved: torch.Tensor, dtype: torch.dtype) -> bool:
    return held is not None and torch.equal(held.cpu().to(dtype), saved.to(dtype))
