"""A checkpoint folder of the Hugging Face Trainer, or of TRL, as named pytrees."""

import copy
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_parameter_names

from .calculus.step import AdamState
from .calculus.tree import Params
from .language.model import Model, split
from .language.score import Sampling

# What the Trainer leaves out of weight decay, besides the parameters of nn.LayerNorm.
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")

_BY_RULE = "by order (HF Trainer's decay and no-decay groups; sizes, shapes and step counts agree)"
_MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "max_exp_avg_sq": "nu_max"}
_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
_SHARDS = ("global_step*", "optimizer_*", "pytorch_model_fsdp_*", "rank*-of-*", "optimizer.pt_*")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_WRAPPERS = re.compile(
    r"^module\.|\b_orig_mod\.|\b_fsdp_wrapped_module\.|\b_checkpoint_wrapped_module\."
    r"|\.modules_to_save\.default\b|\.default\b"
)
_FRESH = "Or start AdamW from zero moments: optimizer='fresh', lr=."


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
        raise _error(
            f"dtype float32, float64 or None was expected, not {dtype}",
            "it was meant to save memory, but it rounds updates away",
            "Use float32.",
        )
    if optimizer not in ("saved", "fresh") or (optimizer == "fresh" and lr is None):
        raise _error(
            f"optimizer='saved', or 'fresh' with lr=, was expected, not {optimizer!r} and lr={lr}",
            "the rate was left out",
            "Pass lr= the rate you ask about.",
        )
    saved = _read_optimizer(folder) if optimizer == "saved" else None
    module, source = _load_module(folder, base_model, dtype)
    model, params, base = split(module if device is None else module.to(device), dtype=dtype)
    if saved is None:
        groups, entries = [_DEFAULTS | {"lr": lr, "params": list(params)}], {}
        order, match = list(params), "fresh optimizer"
    else:
        groups, entries = saved["param_groups"], saved["state"]
        order, match = _match(groups, model.skeleton, list(params), names)
    adamw = _settings(groups, order, params, lr, notes) | {"max_grad_norm": max_grad_norm or None}
    state = _state(groups, entries, order, params, match, adamw["amsgrad"])
    idle = sorted(name for name in params if state.count[name] == 0)
    if idle and saved is not None:
        notes.append(f"never stepped, so their moments are 0: {_some(idle)}")
    if max_grad_norm == 1:
        notes.append("clipping at 1.0 assumed: the Trainer's default is not saved")
    tokenizer = _load_tokenizer(folder, source)
    if tokenizer is None:
        notes.append("no tokenizer found")
    progress = folder / "trainer_state.json"
    step = _read_json(progress).get("global_step") if progress.is_file() else None
    rest = (Sampling(), adamw, model, params, base, state, tokenizer)
    return Checkpoint(folder, step, match, tuple(notes), *rest)


def _load_module(folder: Path, base_model, dtype) -> tuple[nn.Module, str | Path | None]:
    """The module to split, and where its tokenizer may lie besides the folder."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        if base_model is not None:
            raise _error(
                f"an adapter for base_model was expected, {folder} holds a whole model",
                "it was fully fine-tuned",
                "Leave base_model out.",
            )
        return _pretrained(folder, wide), None
    _find(folder, "adapter_config.json")
    _find(folder, "adapter_model.safetensors", "adapter_model.bin")
    config = _read_json(folder / "adapter_config.json")
    source, revision = base_model, None
    if source is None:
        source, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not source:
            raise _error(
                "a base model was expected, adapter_config.json names none",
                "it was a module in memory",
                "Pass base_model= the folder, hub id or module the adapter was trained on.",
            )
        source = folder / source if (folder / source).exists() else source
    fits = partial(
        _explained,
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
    with _explained(
        f"a causal language model was expected at {source}",
        "it has moved, is damaged or is no such model",
        "Pass base_model= a folder, hub id, .gguf file or module.",
    ):
        module, info = AutoModelForCausalLM.from_pretrained(
            where, dtype=wide, revision=revision or "main", output_loading_info=True, **gguf
        )
    lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lost:
        raise _error(
            f"every weight was expected at {source}, {len(lost)} do not load: {_some(lost)}",
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
        raise _error(
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
        raise _error(
            "the saved adapter tensors and the trained parameters were expected to be the same, "
            f"{len(lost)} tensors did not load as saved: {_some(lost)}; {len(bare)} parameters "
            f"have none: {_some(bare)}",
            "adapter_config.json or the base model (its layers, its dtype) is not the run's",
            "Pass base_model=.",
        )


def _read_optimizer(folder: Path) -> dict:
    """The saved dict, known to be AdamW's."""
    file = _find(folder, "optimizer.pt", "optimizer.bin")
    with _explained(
        f"an optimizer state of plain tensors was expected in {file}",
        "it is damaged, sharded or not an optimizer's",
        _FRESH,
    ):
        saved = torch.load(file, weights_only=True, map_location="cpu")
        foreign = _foreign(saved["param_groups"], saved["state"])
    if foreign:
        raise _error(
            "the whole state of torch.optim.AdamW (step, exp_avg, exp_avg_sq) was expected in "
            f"{file}, found {foreign}",
            "the run used another optimizer or a sharded one",
            f"Train with optim='adamw_torch'. {_FRESH}",
        )
    return saved


def _foreign(groups: list[dict], state: dict) -> str | None:
    """What keeps a state from being torch.optim.AdamW's, whole and in full floats."""
    entries = [entry for entry in state.values() if entry]
    keys = {key for entry in entries for key in entry}
    kinds = {type(v).__name__ for entry in entries for v in entry.values()}
    if not entries:
        return "no moments"
    if any(key in ("state1", "qmap1") or "bnb" in key for key in keys):
        return f"{_some(keys)} (bitsandbytes, 8-bit or paged)"
    if kinds - {"Tensor", "int", "float"}:
        return f"{_some(kinds)} (sharded or quantised)"
    if keys - {"step", *_MOMENTS} or any(len(entry) < 3 for entry in entries):
        return f"{_some(keys)} (another optimizer, such as Adafactor, Lion or SGD)"
    for group in groups:
        lacking = {"lr", "betas", "eps", "weight_decay", "amsgrad"} - set(group)
        if lacking:
            return f"a group without {_some(lacking)} (another optimizer, such as RAdam)"
        if group.get("maximize"):
            return "maximize=True"
        if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
            return "weight decay inside the gradient (Adam)"
        own = [entry for entry in map(state.get, group["params"]) if entry]
        if group["amsgrad"] and not all("max_exp_avg_sq" in entry for entry in own):
            return "amsgrad without max_exp_avg_sq"
    return None


def _match(groups: list[dict], skeleton: nn.Module, trained: list[str], names):
    """The name of each of the optimizer's entries in turn, and how it was found."""
    every = [name for name, _ in skeleton.named_parameters()]
    listed = [entry for group in groups for entry in group["params"]]
    if names is not None:
        order, match = list(names), "by the names given"
    elif all(isinstance(entry, str) for entry in listed):
        order, match = listed, "by name"
    elif all("param_names" in group for group in groups):
        order, match = [name for group in groups for name in group["param_names"]], "by name"
    else:
        order, match = _by_order(groups, skeleton, trained, every)
    known = {_WRAPPERS.sub("", name): name for name in every} | {name: name for name in every}
    order = [known.get(name) or known.get(_WRAPPERS.sub("", name), name) for name in order]
    unknown, missing = set(order) - set(every), set(trained) - set(order)
    if unknown or missing or not len(set(order)) == len(order) == len(listed):
        raise _error(
            f"one name for each of the optimizer's {len(listed)} entries was expected, the "
            f"{len(trained)} trained among them, found {len(set(order))} names for {len(order)}; "
            f"unknown: {_some(unknown)}; missing: {_some(missing)}",
            "the optimizer is another model's",
            f"Pass names= its parameters in order. {_FRESH}",
        )
    return order, match


def _by_order(groups, skeleton, trained: list[str], every: list[str]) -> tuple[list[str], str]:
    sizes = [len(group["params"]) for group in groups]
    decay = set(get_parameter_names(skeleton, [nn.LayerNorm], NO_DECAY))
    halves = [n for n in trained if n in decay], [n for n in trained if n not in decay]
    if sizes == [len(trained)]:
        return trained, "by order (one group)"
    if sizes == [len(every)]:  # AdamW(model.parameters()): frozen ones are numbered too
        return every, "by order (one group)"
    if sizes == [len(half) for half in halves] and groups[1]["weight_decay"] == 0:
        return halves[0] + halves[1], _BY_RULE
    raise _error(
        f"one group of {len(trained)} parameters, or the Trainer's {len(halves[0])} with decay and "
        f"{len(halves[1])} without, were expected, found groups of {sizes}",
        "the optimizer was grouped otherwise, or is another model's",
        f"Pass names= its parameters in order. {_FRESH}",
    )


def _settings(groups, order: list[str], params: Params, lr, notes: list[str]) -> dict:
    """The keywords of `adamw`: one value, or a dict by name where groups differ."""
    owner = dict(zip(order, (g for g in groups for _ in g["params"]), strict=True))
    groups = {name: owner[name] for name in params}
    rate = "lr"
    if lr is None and not any(group["lr"] for group in groups.values()):
        rate = "initial_lr"
        if not all(group.get(rate) for group in groups.values()):
            raise _error(
                "a positive learning rate was expected, all are 0",
                "the schedule had ended",
                "Pass lr= the rate you ask about.",
            )
        notes.append("lr is 0 at the end of the schedule: initial_lr used")

    def value(key: str, read):
        values = {name: read(group[key]) for name, group in groups.items()}
        first = next(iter(values.values()))
        return first if all(other == first for other in values.values()) else values

    return {
        "lr": value(rate, float) if lr is None else float(lr),
        "betas": value("betas", lambda pair: tuple(map(float, pair))),
        "eps": value("eps", float),
        "weight_decay": value("weight_decay", float),
        "amsgrad": any(group["amsgrad"] for group in groups.values()),
    }


def _state(groups, entries, order: list[str], params: Params, match: str, amsgrad) -> AdamState:
    """The moments by name, in dtype and on device of the parameters; 0 where none were saved."""
    listed = [entry for group in groups for entry in group["params"]]
    found = {name: entries.get(i) or {} for name, i in zip(order, listed, strict=True)}
    stray = {str(i) for i in set(entries) - set(listed)}
    stray |= {name for name in found if found[name] and name not in params}
    wrong = {
        f"{name} {list(found[name][key].shape)} for {list(p.shape)}"
        for name, p in params.items()
        for key in _MOMENTS
        if key in found[name] and found[name][key].shape != p.shape
    }
    count = {name: float(found[name].get("step", 0)) for name in params}
    steps = sorted(set(count.values()) - {0.0})
    uneven = match.startswith("by order") and len(steps) > 1
    if stray or wrong or uneven:
        raise _error(
            "moments shaped like the trained parameters, and one step count if matched by order, "
            f"were expected. {len(wrong)} have other shapes: {_some(wrong)}; {len(stray)} belong "
            f"to frozen or unlisted parameters: {_some(stray)}; step counts: {steps[:5]}",
            "the optimizer numbers its parameters in another order, or is another model's",
            f"Pass names= its parameters in order. {_FRESH}",
        )

    def read(key: str) -> Params:
        return {
            name: found[name][key].to(p) if key in found[name] else torch.zeros_like(p)
            for name, p in params.items()
        }

    # Where only some groups use AMSGrad, a running maximum of 0 makes no difference to the others.
    nu_max = read("max_exp_avg_sq") if amsgrad else None
    count = {name: torch.tensor(count[name], device=p.device) for name, p in params.items()}
    return AdamState(count, read("exp_avg"), read("exp_avg_sq"), nu_max)


def _find(folder: Path, *names: str) -> Path:
    """The first of these files that the folder has."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    inner = [path.name for path in folder.glob("checkpoint-*")]
    shards = [path.name for pattern in _SHARDS for path in folder.glob(pattern)]
    fresh = f" {_FRESH}" if "optimizer.pt" in names else ""
    if not folder.is_dir():
        found, cause, cure = "no such folder", "it is misspelt or a hub id", "Pass a local folder."
    elif inner:
        found, cause, cure = _some(inner), "this is the run's folder", "Pass one of these." + fresh
    elif shards:
        found, cause = _some(shards), "DeepSpeed or FSDP saved it sharded, which is not supported"
        cure = "Save the full state." + fresh
    else:
        found, cause = "none", "the run saved without it" + " (save_only_model)" * bool(fresh)
        cure = "Save it." + fresh
    claim = f"{' or '.join(names)} was expected in {folder}, found {found}"
    raise _error(claim, cause, cure, FileNotFoundError)


def _error(claim: str, cause: str, cure: str, kind: type = ValueError) -> Exception:
    return kind(f"load_checkpoint: {claim}. Likely {cause}. {cure}")


@contextmanager
def _explained(claim: str, cause: str, cure: str):
    """Turns whatever a library raises within it into an error of ours."""
    try:
        yield
    except Exception as error:
        raise _error(f"{claim}, found {_brief(error)}", cause, cure) from error


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _brief(error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:  # torch would go on to advise weights_only=False
        return f"a reference to {code[1]}, which was not followed"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"


def _some(names: Iterable) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"
