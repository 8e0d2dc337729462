"""The state of a saved AdamW by parameter name, and the settings of its next step."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_parameter_names

from ..calculus.step import AdamState
from ..calculus.tree import Params
from .folder import find_file
from .refusal import FRESH, explained, listed, refusal

_NAMES = "In Python, pass names=, its parameters in order."

# What the Trainer leaves out of weight decay, besides the parameters of nn.LayerNorm.
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")

_BY_RULE = "by order (HF Trainer's decay and no-decay groups; sizes, shapes and step counts agree)"
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_BITSANDBYTES = re.compile(r"^state1$|^qmap1$|bnb")
_SETTINGS = {"lr", "betas", "eps", "weight_decay", "amsgrad"}
_WRAPPERS = re.compile(
    r"^module\.|\b_orig_mod\.|\b_fsdp_wrapped_module\.|\b_checkpoint_wrapped_module\."
    r"|\.modules_to_save\.default\b|\.default\b"
)

Value = TypeVar("Value")
Group = dict[str, Any]  # settings, and under "params" the keys of its parameters
Entry = dict[str, Any]  # the moments and the step count of one parameter


class SavedOptimizer(NamedTuple):
    """A state_dict of torch.optim.AdamW: groups list the keys of entries, numbers or names."""

    groups: list[Group]
    entries: dict[int | str, Entry]

    @property
    def keys(self) -> list[int | str]:
        """The keys of the parameters, group after group."""
        return [key for group in self.groups for key in group["params"]]


class Match(NamedTuple):
    """The parameters' names in the optimizer's order, and how they were matched."""

    order: list[str]
    how: str


class AdamwSettings(TypedDict):
    """The keywords of `adamw`: one value, or a dict by parameter name where groups differ."""

    lr: float | dict[str, float]
    betas: tuple[float, float] | dict[str, tuple[float, float]]
    eps: float | dict[str, float]
    weight_decay: float | dict[str, float]
    amsgrad: bool
    max_grad_norm: float | None


def read_optimizer(folder: Path) -> SavedOptimizer:
    """The optimizer that a folder holds, if it is a complete AdamW that is not quantised.

    Raises:
        FileNotFoundError: there is no optimizer.pt or optimizer.bin.
        ValueError: the file cannot be read without running code, or is not AdamW's.
    """
    file = find_file(folder, "optimizer.pt", "optimizer.bin")
    with explained(
        f"an optimizer state of plain tensors was expected in {file}",
        "it is damaged, sharded or not an optimizer's",
        FRESH,
    ):
        content = torch.load(file, weights_only=True, map_location="cpu")
        saved = SavedOptimizer(content["param_groups"], content["state"])
        flaw = _flaw(saved)
        setting = _unusable_setting(saved)
    if setting:
        raise refusal(
            f"AdamW's settings were expected in {file}, found {setting}",
            "the file was edited or damaged",
            FRESH,
        )
    if flaw:
        raise refusal(
            "the whole state of torch.optim.AdamW (step, exp_avg, exp_avg_sq) was expected in "
            f"{file}, found {flaw}",
            "the run used another optimizer or a sharded one",
            f"Train with optim='adamw_torch'. {FRESH}",
        )
    return saved


def fresh_optimizer(params: Params, lr: float | None) -> SavedOptimizer:
    """AdamW before its first step, with its default settings but no weight decay."""
    settings = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    return SavedOptimizer([settings | {"amsgrad": False, "params": list(params)}], {})


def _flaw(saved: SavedOptimizer) -> str | None:
    """Why this is not a complete AdamW state, or None."""
    of_groups = (_flaw_of_group(group, saved.entries) for group in saved.groups)
    return _flaw_of_entries(saved.entries) or next(filter(None, of_groups), None)


def _flaw_of_entries(entries: dict[int | str, Entry]) -> str | None:
    filled = [entry for entry in entries.values() if entry]
    keys = set(chain.from_iterable(filled))
    types = {type(value).__name__ for entry in filled for value in entry.values()}
    if not filled:
        return "no moments"
    if any(map(_BITSANDBYTES.search, keys)):
        return f"{listed(keys)} (bitsandbytes, 8-bit or paged)"
    if types - {"Tensor", "int", "float"}:
        return f"{listed(types)} (sharded or quantised)"
    if keys - {"step", *_MOMENTS} or min(map(len, filled)) < 3:
        return f"{listed(keys)} (another optimizer, such as Adafactor, Lion or SGD)"
    return None


def _flaw_of_group(group: Group, entries: dict[int | str, Entry]) -> str | None:
    lacking = _SETTINGS - set(group)
    if lacking:
        return f"a group without {listed(lacking)} (another optimizer, such as RAdam)"
    if group.get("maximize"):
        return "maximize=True"
    if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
        return "weight decay inside the gradient (Adam)"
    filled = [entry for entry in map(entries.get, group["params"]) if entry]
    if group["amsgrad"] and not all("max_exp_avg_sq" in entry for entry in filled):
        return "amsgrad without max_exp_avg_sq"
    return None


def _unusable_setting(saved: SavedOptimizer) -> str | None:
    """A setting with which AdamW makes no step, or None."""
    for group in saved.groups:
        for name in sorted(_SETTINGS - {"amsgrad"} & set(group)):
            values = group[name] if name == "betas" else [group[name]]
            if name == "betas" and not (isinstance(values, list | tuple) and len(values) == 2):
                return f"betas = {values}, which should be two"
            if not all(_usable(name, value) for value in values):
                return f"{name} = {group[name]}"
    return None


def _usable(name: str, value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    most = 1.0 if name == "betas" else math.inf
    return isinstance(value, int | float) and 0 <= value < most


def match_names(
    saved: SavedOptimizer, skeleton: nn.Module, trained: list[str], names: Sequence[str] | None
) -> Match:
    """The name of each of the optimizer's entries.

    Args:
        saved: the optimizer.
        skeleton: the whole module.
        trained: the names of its trainable parameters, in its order.
        names: the parameters in the optimizer's order; None takes what the layout says.

    Raises:
        ValueError: the layout is unknown, or the names are not the model's.
    """
    if names is not None:
        match = Match(list(names), "by the names given")
    else:
        layouts = (layout(saved, skeleton, trained) for layout in _LAYOUTS)
        match = next(filter(None, layouts), None) or _refuse_groups(saved, skeleton, trained)
    every = [name for name, _ in skeleton.named_parameters()]
    known = {_WRAPPERS.sub("", name): name for name in every} | {name: name for name in every}
    order = [known.get(name) or known.get(_WRAPPERS.sub("", name), name) for name in match.order]
    unknown, missing = set(order) - set(every), set(trained) - set(order)
    if unknown or missing or not len(set(order)) == len(order) == len(saved.keys):
        raise refusal(
            f"one name for each of the optimizer's {len(saved.keys)} entries was expected, the "
            f"{len(trained)} trained among them, found {len(set(order))} names for {len(order)}; "
            f"unknown: {listed(unknown)}; missing: {listed(missing)}",
            "the optimizer is another model's",
            f"{_NAMES} {FRESH}",
        )
    return Match(order, match.how)


# There is a reader for each layout. It gives the names in the optimizer's order, or None if the
# layout is another one.


def _keyed_by_name(saved: SavedOptimizer, module: nn.Module, trained: list[str]) -> Match | None:
    """FSDP's full state: the keys are the names."""
    names = [key for key in saved.keys if isinstance(key, str)]
    return Match(names, "by name") if len(names) == len(saved.keys) else None


def _param_names(saved: SavedOptimizer, module: nn.Module, trained: list[str]) -> Match | None:
    """torch's own layout where the parameters were given with their names."""
    if not all("param_names" in group for group in saved.groups):
        return None
    return Match([name for group in saved.groups for name in group["param_names"]], "by name")


def _one_group(saved: SavedOptimizer, module: nn.Module, trained: list[str]) -> Match | None:
    """One group of the trained parameters, or of all, since AdamW numbers frozen ones too."""
    every = [name for name, _ in module.named_parameters()]
    for names in (trained, every):
        if _sizes(saved) == [len(names)]:
            return Match(names, "by order (one group)")
    return None


def _trainers_groups(saved: SavedOptimizer, module: nn.Module, trained: list[str]) -> Match | None:
    """The Trainer's two groups: with weight decay, then without."""
    decayed, free = _halves(module, trained)
    if _sizes(saved) == [len(decayed), len(free)] and saved.groups[1]["weight_decay"] == 0:
        return Match(decayed + free, _BY_RULE)
    return None


_Layout = Callable[[SavedOptimizer, nn.Module, list[str]], Match | None]
_LAYOUTS: tuple[_Layout, ...] = (_keyed_by_name, _param_names, _one_group, _trainers_groups)


def _sizes(saved: SavedOptimizer) -> list[int]:
    return [len(group["params"]) for group in saved.groups]


def _halves(module: nn.Module, trained: list[str]) -> tuple[list[str], list[str]]:
    """The trained parameters that the Trainer decays, and those that it does not."""
    decay = set(get_parameter_names(module, [nn.LayerNorm], list(NO_DECAY)))
    return [n for n in trained if n in decay], [n for n in trained if n not in decay]


def _refuse_groups(saved: SavedOptimizer, module: nn.Module, trained: list[str]) -> NoReturn:
    decayed, free = _halves(module, trained)
    raise refusal(
        f"one group of {len(trained)} parameters, or the Trainer's {len(decayed)} with decay and "
        f"{len(free)} without, were expected, found groups of {_sizes(saved)}",
        "the optimizer was grouped otherwise, or is another model's",
        f"{_NAMES} {FRESH}",
    )


def adamw_settings(
    saved: SavedOptimizer, order: list[str], params: Params, lr: float | None
) -> tuple[AdamwSettings, tuple[str, ...]]:
    """The keywords of `adamw`, without clipping, and what was assumed.

    Args:
        saved: the optimizer.
        order: the parameters' names in its order.
        params: the trainable parameters.
        lr: replaces all saved rates, if given.

    Raises:
        ValueError: all rates are 0, without an initial one to use instead.
    """
    owner = dict(zip(order, (g for g in saved.groups for _ in g["params"]), strict=True))
    groups = {name: owner[name] for name in params}
    rate = _rate(groups) if lr is None else "lr"
    settings = AdamwSettings(
        lr=_common(groups, rate, float) if lr is None else float(lr),
        betas=_common(groups, "betas", _pair),
        eps=_common(groups, "eps", float),
        weight_decay=_common(groups, "weight_decay", float),
        amsgrad=any(group["amsgrad"] for group in groups.values()),
        max_grad_norm=None,
    )
    ended = rate == "initial_lr"
    return settings, ("lr is 0 at the end of the schedule, so initial_lr is used",) * ended


def _rate(groups: dict[str, Group]) -> str:
    """The key of the learning rate: "lr", or "initial_lr" where a schedule has ended at 0."""
    if any(group["lr"] for group in groups.values()):
        return "lr"
    if all(group.get("initial_lr") for group in groups.values()):
        return "initial_lr"
    raise refusal(
        "a positive learning rate was expected, but all are 0",
        "the schedule had ended",
        "Pass lr=, the rate you ask about.",
    )


def _common(
    groups: dict[str, Group], key: str, read: Callable[[Any], Value]
) -> Value | dict[str, Value]:
    """The setting that all parameters share, or the settings by name."""
    values = {name: read(group[key]) for name, group in groups.items()}
    first = next(iter(values.values()))
    return first if all(other == first for other in values.values()) else values


def _pair(betas: Sequence[Any]) -> tuple[float, float]:
    first, second = betas
    return float(first), float(second)


def adam_state(saved: SavedOptimizer, match: Match, params: Params, amsgrad: bool) -> AdamState:
    """The moments by name, in the parameters' dtype and on their device; 0 where none were saved.

    Raises:
        ValueError: moments of another shape, or of other parameters than the trained ones; or step
            counts that differ where the match is by order alone.
    """
    entries = {
        name: saved.entries.get(key) or {}
        for name, key in zip(match.order, saved.keys, strict=True)
    }
    _check_entries(saved, match, entries, params)
    _check_values(entries, params)

    def moments(key: str) -> Params:
        return {
            name: entries[name][key].to(p) if key in entries[name] else torch.zeros_like(p)
            for name, p in params.items()
        }

    count = {
        name: torch.tensor(_steps(entries[name]), device=p.device) for name, p in params.items()
    }
    # Where only some groups use AMSGrad, a running maximum of 0 makes no difference to the others.
    nu_max = moments("max_exp_avg_sq") if amsgrad else None
    return AdamState(count, moments("exp_avg"), moments("exp_avg_sq"), nu_max)


def _check_entries(
    saved: SavedOptimizer, match: Match, entries: dict[str, Entry], params: Params
) -> None:
    stray = {str(key) for key in set(saved.entries) - set(saved.keys)}
    stray |= {name for name, entry in entries.items() if entry and name not in params}
    wrong = [shapes for name, p in params.items() for shapes in _misfits(name, entries[name], p)]
    steps = sorted({_steps(entries[name]) for name in params} - {0.0})
    uneven = match.how.startswith("by order") and len(steps) > 1
    if stray or wrong or uneven:
        raise refusal(
            "moments shaped like the trained parameters, and one step count if matched by order, "
            f"were expected. {len(wrong)} have other shapes: {listed(wrong)}; {len(stray)} belong "
            f"to frozen or unlisted parameters: {listed(stray)}; step counts: {steps[:5]}",
            "the optimizer numbers its parameters in another order, or is another model's",
            f"{_NAMES} {FRESH}",
        )


def _check_values(entries: dict[str, Entry], params: Params) -> None:
    """Refuses moments that no gradients leave behind."""
    wrong = [
        f"{key} of {name}"
        for name in params
        for key in _MOMENTS
        if key in entries[name] and not _possible(key, entries[name][key])
    ]
    wrong += [f"step 0 of {name}" for name in params if _moved_before(entries[name])]
    if wrong:
        raise refusal(
            "finite moments, the second ones not negative and all 0 at step 0, were expected in "
            f"the optimizer's state, found others in {len(wrong)}: {listed(wrong)}",
            "the run had diverged, or the file was edited or damaged",
            f"Use an earlier checkpoint. {FRESH}",
        )


def _possible(key: str, moment: Tensor) -> bool:
    return bool(moment.isfinite().all()) and (key == "exp_avg" or not bool((moment < 0).any()))


def _moved_before(entry: Entry) -> bool:
    """Whether there are moments before a first step."""
    moved = any(bool(entry[key].any()) for key in _MOMENTS if key in entry)
    return moved and _steps(entry) == 0


def _misfits(name: str, entry: Entry, p: Tensor) -> set[str]:
    """The shapes of a parameter's moments that are not the parameter's."""
    shapes = {tuple(entry[key].shape) for key in _MOMENTS if key in entry}
    return {f"{name} {list(shape)} for {list(p.shape)}" for shape in shapes - {tuple(p.shape)}}


def _steps(entry: Entry) -> float:
    return float(entry.get("step", 0))
