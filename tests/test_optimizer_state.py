"""A saved AdamW by name: how entries are matched, which settings hold, what is refused."""

import cases
import pytest
import torch
from runs import (
    BY_GROUP,
    BY_RULE,
    CLIPPING,
    FROZEN,
    Touch,
    assert_loaded,
    edit,
    entrywise,
    halves,
    in_group,
    one,
    quietly,
    refused,
    train,
    trained,
)
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import get_parameter_names

from funcprobe.training.checkpoint import load_checkpoint
from funcprobe.training.optimizer_state import NO_DECAY


def test_plain_lora_leaves_the_second_group_empty(folder):
    run = train(folder, adapter={"modules_to_save": None})
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [8, 0]
    checkpoint = load_checkpoint(folder)
    assert_loaded(checkpoint, run)
    assert checkpoint.match == BY_RULE
    assert checkpoint.adamw["weight_decay"] == 0.1


def test_biases_of_the_adapter_are_not_decayed(folder):
    run = train(folder, adapter={"lora_bias": True, "modules_to_save": None})
    assert len(halves(run.module)[1]) == 4
    assert_loaded(load_checkpoint(folder), run)


NAMED = ["rmsnorm", "pre_layernorm", "norm", "q_norm", "normal", "bias_net", "plain"]


@pytest.mark.parametrize("family", [*cases.FAMILIES, "names", "layer norms"])
def test_the_rule_for_decay_is_the_trainers(family):
    if family == "names":
        module = nn.ModuleDict({name: nn.Linear(2, 2) for name in NAMED})
    elif family == "layer norms":
        module = nn.ModuleDict({"plain": nn.LayerNorm(2), "other": nn.Linear(2, 2)})
    else:
        module = quietly(cases.live, family, lora_bias=True)
    ours = get_parameter_names(module, [nn.LayerNorm], NO_DECAY)
    assert ours == Trainer.get_decay_parameter_names(None, module)
    assert len(ours) < len(list(module.parameters()))


def test_one_group_lists_the_trained_parameters_in_order(folder):
    run = train(folder, one)
    checkpoint = load_checkpoint(folder)
    assert_loaded(checkpoint, run)
    assert checkpoint.match == BY_GROUP
    assert checkpoint.adamw["weight_decay"] == 0.1


def test_one_group_may_number_frozen_parameters_too(folder):
    run = train(folder, lambda module: [[name for name, _ in module.named_parameters()]])
    checkpoint = load_checkpoint(folder)
    assert_loaded(checkpoint, run)
    assert checkpoint.match == BY_GROUP
    names = [name for name, _ in run.module.named_parameters()]
    assert_loaded(load_checkpoint(folder, names=names), run)
    misspelt = ["head" if name == FROZEN else name for name in names]
    refused(folder, "unknown: head; missing: none", names=misspelt)
    moment = {"step": 3, "exp_avg": torch.ones(64, 16), "exp_avg_sq": torch.ones(64, 16)}
    edit(folder, lambda state: state["state"].update({names.index(FROZEN): moment}))
    refused(folder, f"1 belong to frozen or unlisted parameters: {FROZEN}")


def shuffled(module):
    """Two groups of the right sizes and, entry by entry, the right shapes; layers exchanged."""
    swap = str.maketrans({"0": "1", "1": "0"})
    decayed, free = halves(module)
    return [name.translate(swap) for name in decayed], free


def test_names_given_are_used_and_order_alone_cannot_tell(folder):
    run = train(folder, shuffled)
    wrong = load_checkpoint(folder)
    with pytest.raises(AssertionError):
        assert_loaded(wrong, run)
    assert "by order" in wrong.match
    right = load_checkpoint(folder, names=sum(shuffled(run.module), []))
    assert_loaded(right, run)
    assert right.match == "by the names given"


def test_saved_param_names_are_used(folder):
    run = train(folder, shuffled, pairs=True)
    checkpoint = load_checkpoint(folder)
    assert_loaded(checkpoint, run)
    assert checkpoint.match == "by name"


@pytest.mark.parametrize(
    "rename",
    [
        str,
        lambda name: "module." + name,
        lambda name: name.replace("layers.", "layers._fsdp_wrapped_module.").replace(
            "base_model.", "base_model._orig_mod."
        ),
        lambda name: name.replace(".modules_to_save.default", "").replace(".default", ""),
    ],
    ids=["plain", "ddp", "wrapped", "without the adapter's name"],
)
def test_a_state_keyed_by_name_is_matched_by_name(run, rename):
    names = sum(halves(run.module), [])

    def by_name(state):
        state["state"] = {rename(names[i]): entry for i, entry in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = [rename(names[i]) for i in group["params"]][::-1]

    edit(run.path, by_name)
    (run.path / "optimizer.pt").rename(run.path / "optimizer.bin")
    checkpoint = load_checkpoint(run.path)
    assert_loaded(checkpoint, run)
    assert checkpoint.match == "by name"


def test_a_parameter_that_never_stepped_has_zero_moments(run):
    names = halves(run.module)[0]
    edit(run.path, lambda state: state["state"].pop(1) and None)
    checkpoint = load_checkpoint(run.path)
    for tree in (checkpoint.state.mu, checkpoint.state.nu, checkpoint.state.count):
        assert not tree[names[1]].any() and tree[names[0]].any()
    assert f"never stepped, so their moments are 0: {names[1]}" in checkpoint.notes


def test_steps_may_be_integers_and_moments_bfloat16(run):
    def change(state):
        for entry in state["state"].values():
            entry["step"] = int(entry["step"])
            entry["exp_avg"] = entry["exp_avg"].bfloat16()

    edit(run.path, change)
    state = load_checkpoint(run.path).state
    assert all(count == 3 for count in state.count.values())
    assert all(t.dtype == torch.float32 for t in state.mu.values())


@pytest.mark.parametrize(
    "names, words",
    [
        (lambda names: names[:-1], ["12 names for 12", "missing: base_model.model.model.norm."]),
        (lambda names: [*names[:-1], names[0]], ["12 names for 13", "missing: base_model"]),
        (lambda names: [*names[:-1], "misspelt"], ["unknown: misspelt", "missing: base_model"]),
        (lambda names: [*names, FROZEN], ["14 names for 14", "unknown: none; missing: none"]),
        (lambda names: [*names, names[0]], ["13 names for 14", "unknown: none; missing: none"]),
        (lambda names: [*names[:-1], FROZEN], ["unknown: none; missing: base_model"]),
    ],
)
def test_names_that_do_not_fit_are_refused(saved, names, words):
    refused(saved.path, *words, "pass names=", names=names(sum(halves(saved.module), [])))


def test_groups_of_another_rule_are_refused(folder):
    run = train(folder, lambda module: [trained(module)[:5], trained(module)[5:]])
    refused(folder, "found groups of [5, 8]", "8 with decay and 5 without", "pass names=")
    assert_loaded(load_checkpoint(folder, names=trained(run.module)), run)


def test_a_second_group_with_decay_is_not_the_trainers(run):
    edit(run.path, lambda state: state["param_groups"][1].update(weight_decay=0.1))
    refused(run.path, "groups of [8, 5]")


def test_another_models_optimizer_is_refused(run):
    def reversed_shapes(state):
        entries = state["state"]
        state["state"] = {i: entries[len(entries) - 1 - i] for i in entries}

    edit(run.path, reversed_shapes)
    message = refused(run.path, "other shapes: ", "[2, 16]", "...", "pass names=")
    named = message.partition("other shapes: ")[2].partition(", ...;")[0].split(", base")
    assert len(named) == 5 and named[1:] == sorted(named[1:])


def test_uneven_step_counts_are_refused_only_when_matched_by_order(run):
    edit(run.path, lambda state: state["state"][0].update(step=torch.tensor(2.0)))
    refused(run.path, "step counts: [2.0, 3.0]")
    checkpoint = load_checkpoint(run.path, names=sum(halves(run.module), []))
    assert sorted({float(count) for count in checkpoint.state.count.values()}) == [2.0, 3.0]


def test_moments_of_frozen_or_unlisted_parameters_are_refused(run):
    edit(run.path, lambda state: state["state"].update({77: state["state"][0]}))
    refused(run.path, "1 belong to frozen or unlisted parameters: 77")


def test_the_rates_of_groups_are_by_name_only_where_they_differ(run):
    def change(state):
        state["param_groups"][0].update(lr=torch.tensor(0.5), betas=[0.7, 0.9])

    edit(run.path, change)
    adamw = load_checkpoint(run.path).adamw
    free = halves(run.module)[1]
    assert adamw["lr"] == {n: 1e-2 if n in free else 0.5 for n in trained(run.module)}
    assert adamw["betas"][free[0]] == (0.8, 0.95) and adamw["eps"] == 1e-6
    assert load_checkpoint(run.path, lr=0.3).adamw["lr"] == 0.3


def test_one_group_at_rate_zero_stays_so(run):
    edit(run.path, in_group(lr=0.0, initial_lr=0.5))
    checkpoint = load_checkpoint(run.path)
    assert set(checkpoint.adamw["lr"].values()) == {0.0, 1e-2}
    assert "initial_lr" not in str(checkpoint.notes)


def test_a_finished_schedule_gives_its_initial_rate_and_says_so(run):
    def change(state):
        for group in state["param_groups"]:
            group.update(lr=0.0, initial_lr=0.25)

    edit(run.path, change)
    checkpoint = load_checkpoint(run.path)
    assert checkpoint.adamw["lr"] == 0.25
    assert "lr is 0 at the end of the schedule, so initial_lr is used" in checkpoint.notes
    assert load_checkpoint(run.path, lr=0.3).notes == (CLIPPING, "no tokenizer found")


def test_a_rate_of_zero_without_an_initial_one_is_refused(run):
    edit(run.path, lambda state: [g.update(lr=0.0) for g in state["param_groups"]] and None)
    refused(run.path, "a positive learning rate", "Pass lr=")


def test_amsgrads_maximum_is_read(folder):
    run = train(folder, amsgrad=True)
    edit(folder, lambda state: [e["max_exp_avg_sq"].mul_(2) for e in state["state"].values()][:0])
    checkpoint = load_checkpoint(folder)
    assert checkpoint.adamw["amsgrad"] is True
    for name, p in run.module.named_parameters():
        if p.requires_grad:
            largest = run.optimizer.state[p]["max_exp_avg_sq"]
            assert torch.equal(checkpoint.state.nu_max[name], 2 * largest)


def test_code_in_the_file_is_refused_and_not_run(run, tmp_path):
    target = tmp_path / "was here"
    edit(run.path, lambda state: state | {"extra": Touch(target)})
    refused(run.path, "posix.mkdir, which was not followed", "optimizer='fresh'")
    assert not target.exists()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(run, keep):
    file = run.path / "optimizer.pt"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refused(run.path, "optimizer.pt", "damaged", "optimizer='fresh'")


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, {"param_groups": []}, torch.ones(2)])
def test_another_file_is_refused(run, content):
    torch.save(content, run.path / "optimizer.pt")
    refused(run.path, "an optimizer state of plain tensors", "not an optimizer's")


FOREIGN = {
    "8-bit": (
        entrywise(lambda e: dict(step=3, state1=e["exp_avg"].byte(), qmap1=torch.ones(256))),
        "qmap1, state1, step (bitsandbytes, 8-bit or paged)",
    ),
    "paged": (entrywise(lambda e: dict(step=3, state1=e["exp_avg"])), "bitsandbytes"),
    "wrapped 8-bit": (
        entrywise(lambda e: dict(step=3, __bnb_optimizer_quant_state__={"state1": e["exp_avg"]})),
        "bitsandbytes",
    ),
    "adafactor": (
        entrywise(lambda e: dict(step=3, exp_avg_sq_row=e["exp_avg"])),
        "exp_avg_sq_row",
    ),
    "lion": (entrywise(lambda e: dict(exp_avg=e["exp_avg"])), "another optimizer"),
    "sgd": (entrywise(lambda e: dict(momentum_buffer=e["exp_avg"])), "momentum_buffer"),
    "galore": (entrywise(lambda e: e | dict(projector=e["exp_avg"])), "projector"),
    "no step": (entrywise(lambda e: {k: v for k, v in e.items() if k != "step"}), "exp_avg"),
    "empty": (lambda state: state["state"].clear(), "no moments"),
    "radam": (lambda state: state["param_groups"][1].pop("amsgrad") and None, "amsgrad"),
    "adam": (in_group(decoupled_weight_decay=False), "decay inside the gradient"),
    "maximize": (in_group(maximize=True), "maximize=True"),
    "amsgrad": (in_group(amsgrad=True), "amsgrad without max_exp_avg_sq"),
}


@pytest.mark.parametrize("change, words", FOREIGN.values(), ids=FOREIGN)
def test_another_optimizers_state_is_refused(run, change, words):
    edit(run.path, change)
    refused(run.path, words, "torch.optim.AdamW", "optimizer='fresh'")


def test_adam_without_decay_is_adamw(folder):
    train(folder, one)
    edit(folder, in_group(decoupled_weight_decay=False, weight_decay=0.0))
    assert load_checkpoint(folder).match == BY_GROUP


def test_sharded_tensors_are_refused(run):
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        edit(run.path, entrywise(lambda e: e | {"exp_avg": distribute_tensor(e["exp_avg"], mesh)}))
        refused(run.path, "DTensor", "sharded")
    finally:
        distributed.destroy_process_group()
