"""A checkpoint folder of the Hugging Face Trainer, or of TRL, as named pytrees."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..calculus.step import AdamState
from ..calculus.tree import Params
from ..language.model.split import Model, split
from ..language.sampling import Sampling
from .adapter import Source, load_adapter
from .folder import read_json
from .optimizer_state import (
    AdamwSettings,
    Match,
    adam_state,
    adamw_settings,
    fresh_optimizer,
    match_names,
    read_optimizer,
)
from .pretrained import load_pretrained, load_tokenizer
from .refusal import listed, refusal

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A policy in training: what `split` makes of it, and the optimizer's state by name."""

    path: Path
    step: int | None  # optimizer steps taken, according to trainer_state.json
    match: str  # how the optimizer's entries were matched to names, and how sure that is
    notes: tuple[str, ...]  # what was assumed
    sampling: Sampling
    adamw: AdamwSettings = field(repr=False)  # keywords of `adamw`
    model: Model = field(repr=False)
    params: Params = field(repr=False)
    base: Params = field(repr=False)
    state: AdamState = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)


def load_checkpoint(
    path: str | Path,
    *,
    base_model: Source | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
    names: Sequence[str] | None = None,
    max_grad_norm: float | None = 1.0,
    optimizer: str = "saved",
    lr: float | None = None,
) -> Checkpoint:
    """Loads a policy, its AdamW state and the settings of its next step; runs no saved code.

    ``optimizer.pt`` usually numbers its entries without naming them. They are matched by name where
    names are saved (FSDP's full state, ``param_names``). Otherwise the Trainer's order is rebuilt,
    which sizes, shapes and step counts can refute but not prove. `Checkpoint.match` says which.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors (or .bin), or with a
            whole model (then every parameter is trained), and with optimizer.pt or optimizer.bin.
        base_model: a folder, a hub id, a .gguf file, or a module, which is left as it is and shares
            its weights. If None, it is the one that adapter_config.json names, which is first tried
            as a path from `path`.
        dtype: of every floating tensor, float32 or float64; None keeps those of a given module.
        device: of every tensor; None leaves them on the CPU, or where a given module has them.
        names: the parameters in the optimizer's order, its groups one after another; if None, they
            are matched as above.
        max_grad_norm: the run's gradient clipping, which no checkpoint records; None or 0 is none.
        optimizer: "saved", or "fresh": zero moments, with `lr` and AdamW's betas (0.9, 0.999), eps
            1e-8 and weight decay 0.
        lr: replaces all saved rates.

    Returns:
        The checkpoint, whose notes say what was assumed.

    Raises:
        FileNotFoundError: the folder does not exist, or it lacks the weights or the optimizer.
        ValueError: an unknown option; files that cannot be read, are sharded or quantised, are not
            AdamW's, or do not fit the model or each other; or a module that `split` refuses.
    """
    folder, fresh = Path(path), optimizer == "fresh"
    _check_options(dtype, optimizer, lr, max_grad_norm)
    saved = None if fresh else read_optimizer(folder)
    module, source = _load_module(folder, base_model, dtype)
    model, params, base = split(module if device is None else module.to(device), dtype=dtype)
    if saved is None:
        saved, match = fresh_optimizer(params, lr), Match(list(params), "fresh optimizer")
    else:
        match = match_names(saved, model.skeleton, list(params), names)
    adamw, notes = adamw_settings(saved, match.order, params, lr)
    state = adam_state(saved, match, params, adamw["amsgrad"])
    tokenizer = load_tokenizer(folder, *([] if source is None else [source]))
    idle = [name for name in params if state.count[name] == 0]
    if idle and not fresh:
        notes += (f"never stepped, so their moments are 0: {listed(idle)}",)
    if max_grad_norm == 1:
        notes += ("clipping at 1.0, the Trainer's default, is assumed: no checkpoint records it",)
    if tokenizer is None:
        notes += ("no tokenizer found",)
    return Checkpoint(
        path=folder,
        step=_step(folder),
        match=match.how,
        notes=notes,
        sampling=Sampling(),
        adamw=AdamwSettings(**adamw | {"max_grad_norm": max_grad_norm or None}),
        model=model,
        params=params,
        base=base,
        state=state,
        tokenizer=tokenizer,
    )


def as_checkpoint(checkpoint: Loaded | str | Path) -> Loaded | Checkpoint:
    """The checkpoint at a path, loaded with the defaults; anything else is returned as it is."""
    return load_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint


def _check_options(
    dtype: torch.dtype | None, optimizer: str, lr: float | None, max_grad_norm: float | None
) -> None:
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
            "Pass lr=, the rate you ask about.",
        )
    if lr is not None and not 0 < lr < math.inf:
        raise refusal(
            f"a positive and finite lr was expected, not {lr}",
            "it was computed from a schedule that has ended",
            "Pass lr=, the rate you ask about, or leave it out for the saved one.",
        )
    if max_grad_norm is not None and not 0 <= max_grad_norm < math.inf:
        raise refusal(
            f"a max_grad_norm of at least 0 was expected, not {max_grad_norm}",
            "it was meant to turn clipping off",
            "Pass max_grad_norm=0 for no clipping.",
        )


def _load_module(
    folder: Path, base_model: Source | None, dtype: torch.dtype | None
) -> tuple[nn.Module, str | Path | None]:
    """The module to split, and where its tokenizer may be besides the folder."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    whole = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    if not whole:
        return load_adapter(folder, base_model, wide)
    if base_model is not None:
        raise refusal(
            f"an adapter for base_model was expected, but {folder} holds a whole model",
            "it was fully fine-tuned",
            "Leave base_model out.",
        )
    return load_pretrained(folder, wide), None


def _step(folder: Path) -> int | None:
    progress = folder / "trainer_state.json"
    return read_json(progress).get("global_step") if progress.is_file() else None
