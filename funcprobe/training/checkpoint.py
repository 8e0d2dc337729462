"""A checkpoint folder of the Hugging Face Trainer, or of TRL, as named pytrees."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..calculus.step import AdamState
from ..calculus.tree import Params
from ..language.model.split import Model, split
from ..language.score import Sampling
from .folder import explained, find, read_json, refusal, some
from .optimizer import DEFAULTS, adam_state, adamw_settings, match_names, read_optimizer

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A policy in training: what `split` makes of it, and the optimizer's state by name."""

    path: Path
    step: int | None  # optimizer steps taken, says trainer_state.json
    match: str  # how the optimizer's entries were matched to names, and how sure that is
    notes: tuple[str, ...]  # what was assumed
    sampling: Sampling
    adamw: dict = field(repr=False)  # keywords of `adamw`
    model: Model = field(repr=False)
    params: Params = field(repr=False)
    base: Params = field(repr=False)
    state: AdamState = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)


def load_checkpoint(
    path: str | Path,
    *,
    base_model: str | Path | nn.Module | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
    names: Sequence[str] | None = None,
    max_grad_norm: float | None = 1.0,
    optimizer: str = "saved",
    lr: float | None = None,
) -> Checkpoint:
    """Loads a policy, its AdamW state and the settings of its next step; runs no saved code.

    ``optimizer.pt`` usually numbers its entries without naming them. They are matched by name where
    names are saved (FSDP's full state, ``param_names``), else by rebuilding the Trainer's order,
    which sizes, shapes and step counts can refute but not prove; `Checkpoint.match` says which.

    Args:
        path: holds adapter_config.json and adapter_model.safetensors, or a whole model (then every
            parameter is trained), and optimizer.pt or optimizer.bin.
        base_model: a folder, a hub id, a .gguf file, or a module, which is left as it is and shares
            its weights; None takes what adapter_config.json names, first as a path from `path`.
        dtype: of every floating tensor, float32 or float64; None keeps those of a given module.
        device: of every tensor; None leaves them on the CPU, or where a given module has them.
        names: the parameters in the optimizer's order, its groups one after another.
        max_grad_norm: clipping of the run, which no checkpoint records; None or 0 is none.
        optimizer: "saved", or "fresh": zero moments, with `lr` and AdamW's betas (0.9, 0.999), eps
            1e-8 and weight decay 0.
        lr: replaces all saved rates.

    Raises:
        FileNotFoundError: no such folder, or it lacks the weights or the optimizer.
        ValueError: files that cannot be read, are sharded or quantised, are not AdamW's, or do not
            fit the model or each other; what `split` refuses.
    """
    folder, notes = Path(path), []
    if dtype not in (None, torch.float32, torch.float64):
        raise refusal(
            f"dtype float32, float64 or None was expected, not {dtype}",
            "it was meant to save memory, but it rounds updates away",
            "Use float32.",
        )
    if optimizer not in ("saved", "fresh") or (optimizer == "fresh" and lr is None):
        raise refusal(
            f"optimizer='saved', or 'fresh' with lr=, was expected, not {optimizer!r} and lr={lr}",
            "the rate was left out",
            "Pass lr= the rate you ask about.",
        )
    saved = read_optimizer(folder) if optimizer == "saved" else None
    module, source = _load_module(folder, base_model, dtype)
    model, params, base = split(module if device is None else module.to(device), dtype=dtype)
    if saved is None:
        groups, entries = [DEFAULTS | {"lr": lr, "params": list(params)}], {}
        order, match = list(params), "fresh optimizer"
    else:
        groups, entries = saved["param_groups"], saved["state"]
        order, match = match_names(groups, model.skeleton, list(params), names)
    adamw = adamw_settings(groups, order, params, lr, notes) | {
        "max_grad_norm": max_grad_norm or None
    }
    state = adam_state(groups, entries, order, params, match, adamw["amsgrad"])
    idle = sorted(name for name in params if state.count[name] == 0)
    if idle and saved is not None:
        notes.append(f"never stepped, so their moments are 0: {some(idle)}")
    if max_grad_norm == 1:
        notes.append("clipping at 1.0 assumed: the Trainer's default is not saved")
    tokenizer = _load_tokenizer(folder, source)
    if tokenizer is None:
        notes.append("no tokenizer found")
    progress = folder / "trainer_state.json"
    step = read_json(progress).get("global_step") if progress.is_file() else None
    rest = (Sampling(), adamw, model, params, base, state, tokenizer)
    return Checkpoint(folder, step, match, tuple(notes), *rest)


def _load_module(folder: Path, base_model, dtype) -> tuple[nn.Module, str | Path | None]:
    """The module to split, and where its tokenizer may lie besides the folder."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        if base_model is not None:
            raise refusal(
                f"an adapter for base_model was expected, {folder} holds a whole model",
                "it was fully fine-tuned",
                "Leave base_model out.",
            )
        return _pretrained(folder, wide), None
    find(folder, "adapter_config.json")
    find(folder, "adapter_model.safetensors", "adapter_model.bin")
    config = read_json(folder / "adapter_config.json")
    source, revision = base_model, None
    if source is None:
        source, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not source:
            raise refusal(
                "a base model was expected, adapter_config.json names none",
                "it was a module in memory",
                "Pass base_model= the folder, hub id or module the adapter was trained on.",
            )
        source = folder / source if (folder / source).exists() else source
    fits = partial(
        explained,
        f"an adapter that fits the base model was expected in {folder}",
        "the base model is not the one it was trained on, or a file is damaged",
        "Pass base_model=.",
    )
    with fits():
        weights = load_peft_weights(str(folder), device="cpu")
    if isinstance(source, nn.Module):
        module, source = _twin(source, weights, config.get("init_lora_weights")), None
    else:
        module = _pretrained(source, wide, revision)
    with fits(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what PEFT only warns of, _check_landed refuses
        module = PeftModel.from_pretrained(
            module, str(folder), is_trainable=True, torch_device="cpu"
        )
    _check_landed(module, weights, wide)
    return module, source


def _pretrained(source: str | Path, wide: torch.dtype, revision: str | None = None) -> nn.Module:
    where, gguf = _gguf(source)
    if gguf and hasattr(transformers, "GgufConfig"):  # else it may stay packed, and is marked so
        gguf["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with explained(
        f"a causal language model was expected at {source}",
        "it has moved, is damaged or is no such model",
        "Pass base_model= a folder, hub id, .gguf file or module.",
    ):
        module, info = AutoModelForCausalLM.from_pretrained(
            where, dtype=wide, revision=revision or "main", output_loading_info=True, **gguf
        )
    lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lost:
        raise refusal(
            f"every weight was expected at {source}, {len(lost)} do not load: {some(lost)}",
            "the save was cut short",
            "Use another copy.",
        )
    return module


def _load_tokenizer(folder: Path, source: str | Path | None) -> PreTrainedTokenizerBase | None:
    for place in (folder,) if source is None else (folder, source):
        where, gguf = _gguf(place)
        on_disk = not gguf and Path(where).is_dir()
        if not on_disk or any((Path(where) / name).is_file() for name in _TOKENIZER):
            return AutoTokenizer.from_pretrained(where, **gguf)
    return None


def _gguf(source: str | Path) -> tuple[str, dict]:
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return str(source), {}


def _twin(module: nn.Module, weights: Params, init) -> nn.Module:
    """The module's structure again over the same weights, for PEFT to inject an adapter into.

    What PEFT may write into is copied: what was saved by the same name, such as trained biases, or
    everything if the adapter's initialisation changes the base (OLoRA).
    """
    if any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        raise refusal(
            "a base_model without adapters was expected, it has adapter layers",
            "it went through get_peft_model, which changes it in place",
            "Load it afresh.",
        )
    written = {
        name.removeprefix("base_model.model.").replace(".base_layer", "") for name in weights
    }
    memo = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        copied = name in written or init not in (None, True, False, "gaussian")
        if copied or id(tensor) not in memo:
            data = tensor.detach().clone() if copied else tensor.detach()
            memo[id(tensor)] = nn.Parameter(data, requires_grad=False)
    memo |= {id(buffer): buffer.detach() for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def _check_landed(module: PeftModel, weights: Params, wide: torch.dtype) -> None:
    """Every saved tensor is in the module, equal, and every trainable one was saved."""
    held = module.state_dict()
    held |= get_peft_model_state_dict(module, held, save_embedding_layers=False)
    lost = [
        name
        for name, saved in weights.items()
        if name not in held or not torch.equal(held[name].cpu().to(wide), saved.to(wide))
    ]
    landed = {held[name].data_ptr() for name in weights if name in held}
    bare = [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and p.data_ptr() not in landed
    ]
    if lost or bare:
        raise refusal(
            "the saved adapter tensors and the trained parameters were expected to be the same, "
            f"{len(lost)} tensors did not load as saved: {some(lost)}; {len(bare)} parameters "
            f"have none: {some(bare)}",
            "adapter_config.json or the base model (its layers, its dtype) is not the run's",
            "Pass base_model=.",
        )
