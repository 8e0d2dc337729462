"""The state of a saved AdamW by parameter name, and the settings of its next step."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from ..calculus.step import AdamState
from ..calculus.tree import Params
from .folder import FRESH, explained, find, refusal, some

# What the Trainer leaves out of weight decay, besides the parameters of nn.LayerNorm.
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")

_BY_RULE = "by order (HF Trainer's decay and no-decay groups; sizes, shapes and step counts agree)"
_MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "max_exp_avg_sq": "nu_max"}
DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
_WRAPPERS = re.compile(
    r"^module\.|\b_orig_mod\.|\b_fsdp_wrapped_module\.|\b_checkpoint_wrapped_module\."
    r"|\.modules_to_save\.default\b|\.default\b"
)


def read_optimizer(folder: Path) -> dict:
    """The saved dict, known to be AdamW's."""
    file = find(folder, "optimizer.pt", "optimizer.bin")
    with explained(
        f"an optimizer state of plain tensors was expected in {file}",
        "it is damaged, sharded or not an optimizer's",
        FRESH,
    ):
        saved = torch.load(file, weights_only=True, map_location="cpu")
        foreign = _foreign(saved["param_groups"], saved["state"])
    if foreign:
        raise refusal(
            "the whole state of torch.optim.AdamW (step, exp_avg, exp_avg_sq) was expected in "
            f"{file}, found {foreign}",
            "the run used another optimizer or a sharded one",
            f"Train with optim='adamw_torch'. {FRESH}",
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
        return f"{some(keys)} (bitsandbytes, 8-bit or paged)"
    if kinds - {"Tensor", "int", "float"}:
        return f"{some(kinds)} (sharded or quantised)"
    if keys - {"step", *_MOMENTS} or any(len(entry) < 3 for entry in entries):
        return f"{some(keys)} (another optimizer, such as Adafactor, Lion or SGD)"
    for group in groups:
        lacking = {"lr", "betas", "eps", "weight_decay", "amsgrad"} - set(group)
        if lacking:
            return f"a group without {some(lacking)} (another optimizer, such as RAdam)"
        if group.get("maximize"):
            return "maximize=True"
        if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
            return "weight decay inside the gradient (Adam)"
        own = [entry for entry in map(state.get, group["params"]) if entry]
        if group["amsgrad"] and not all("max_exp_avg_sq" in entry for entry in own):
            return "amsgrad without max_exp_avg_sq"
    return None


def match_names(groups: list[dict], skeleton: nn.Module, trained: list[str], names):
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
        raise refusal(
            f"one name for each of the optimizer's {len(listed)} entries was expected, the "
            f"{len(trained)} trained among them, found {len(set(order))} names for {len(order)}; "
            f"unknown: {some(unknown)}; missing: {some(missing)}",
            "the optimizer is another model's",
            f"Pass names= its parameters in order. {FRESH}",
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
    raise refusal(
        f"one group of {len(trained)} parameters, or the Trainer's {len(halves[0])} with decay and "
        f"{len(halves[1])} without, were expected, found groups of {sizes}",
        "the optimizer was grouped otherwise, or is another model's",
        f"Pass names= its parameters in order. {FRESH}",
    )


def adamw_settings(groups, order: list[str], params: Params, lr, notes: list[str]) -> dict:
    """The keywords of `adamw`: one value, or a dict by name where groups differ."""
    owner = dict(zip(order, (g for g in groups for _ in g["params"]), strict=True))
    groups = {name: owner[name] for name in params}
    rate = "lr"
    if lr is None and not any(group["lr"] for group in groups.values()):
        rate = "initial_lr"
        if not all(group.get(rate) for group in groups.values()):
            raise refusal(
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


def adam_state(groups, entries, order: list[str], params: Params, match: str, amsgrad) -> AdamState:
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
        raise refusal(
            "moments shaped like the trained parameters, and one step count if matched by order, "
            f"were expected. {len(wrong)} have other shapes: {some(wrong)}; {len(stray)} belong "
            f"to frozen or unlisted parameters: {some(stray)}; step counts: {steps[:5]}",
            "the optimizer numbers its parameters in another order, or is another model's",
            f"Pass names= its parameters in order. {FRESH}",
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
