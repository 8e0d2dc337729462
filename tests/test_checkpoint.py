"""load_checkpoint: what a training run saved, by name; and a clear refusal of what it cannot be."""

import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_parameter_names

import funcprobe as fp
from funcprobe.training.checkpoint import load_checkpoint
from funcprobe.training.optimizer import NO_DECAY

BY_RULE = "by order (HF Trainer's decay and no-decay groups; sizes, shapes and step counts agree)"
BY_GROUP = "by order (one group)"
CLIPPING = "clipping at 1.0 assumed: the Trainer's default is not saved"
FROZEN = "base_model.model.lm_head.weight"
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


# Training runs


def adapted(base, **settings):
    """An adapter that trains norms too, which in named_parameters() lie between its matrices.

    So the Trainer's order, decayed ones first, is another; and the layers have the same shapes.
    """
    settings = dict(target_modules=["q_proj", "v_proj"], modules_to_save=["norm"]) | settings
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return quietly(get_peft_model, module, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))


def quietly(call, *args, **settings):
    """What PEFT and transformers warn of each other, and of biases, is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **settings)


def trained(module):
    return [name for name, p in module.named_parameters() if p.requires_grad]


def halves(module):
    free = [name for name in trained(module) if "norm" in name or "bias" in name]
    return [name for name in trained(module) if name not in free], free


def one(module):
    return [trained(module)]


def train(path, groups=halves, *, save=True, pairs=False, adapter=None, **settings):
    """Three steps of AdamW on an adapter of ``path/../base``, saved as the Trainer would."""
    torch.manual_seed(0)
    module = adapted(path.parent / "base", **(adapter or {}))
    own = dict(module.named_parameters())
    decays = [0.1, 0.0]
    optimizer = torch.optim.AdamW(
        [
            {"params": [(n, own[n]) if pairs else own[n] for n in part], "weight_decay": decay}
            for part, decay in zip(groups(module), decays, strict=False)
        ],
        **dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6) | settings,
    )
    for _ in range(3):
        module(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    module.peft_config["default"].base_model_name_or_path = "../base"
    quietly(module.save_pretrained, path, save_embedding_layers=False)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    return SimpleNamespace(path=path, module=module, optimizer=optimizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The usual run; nothing may change it."""
    folder = tmp_path_factory.mktemp("saved")
    cases.live(adapter=False).save_pretrained(folder / "base")
    return train(folder / "checkpoint-3")


@pytest.fixture
def run(saved, tmp_path):
    """The usual run in a folder of its own, to do anything to."""
    shutil.copytree(saved.path.parent, tmp_path / "run")
    return SimpleNamespace(**vars(saved) | {"path": tmp_path / "run" / "checkpoint-3"})


@pytest.fixture
def folder(saved, tmp_path):
    """Where another run can be trained on the same base."""
    shutil.copytree(saved.path.parent / "base", tmp_path / "base")
    return tmp_path / "checkpoint-3"


@pytest.fixture
def base(saved):
    return AutoModelForCausalLM.from_pretrained(saved.path.parent / "base", dtype=torch.float32)


def edit(path, change, file="optimizer.pt"):
    """Rewrites the optimizer's file by ``change(state_dict)``, in place or by what it returns."""
    state = torch.load(path / "optimizer.pt", weights_only=True)
    state = change(state) or state
    torch.save(state, path / file)


def each(change):
    def of_all(state):
        for i, entry in state["state"].items():
            state["state"][i] = change(entry)

    return of_all


def group(**values):
    return lambda state: state["param_groups"][0].update(values)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "a": 1})), eos_token="<eos>"
    )


def assert_loaded(checkpoint, run):
    """Weights and moments are the live run's, by name and bit for bit."""
    live = {name: p for name, p in run.module.named_parameters() if p.requires_grad}
    state = run.optimizer.state
    assert list(checkpoint.params) == list(live)
    for name, p in live.items():
        assert torch.equal(checkpoint.params[name], p)
        assert torch.equal(checkpoint.state.mu[name], state[p]["exp_avg"])
        assert torch.equal(checkpoint.state.nu[name], state[p]["exp_avg_sq"])
        assert checkpoint.state.count[name] == float(state[p]["step"])


def refused(path, *words, kind=ValueError, **options):
    """The refusal is ours, in full sentences, and has these words."""
    with pytest.raises(kind) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith("load_checkpoint: ") and " expected" in message
    assert "Likely " in message and message.endswith(".")
    for word in words:
        assert word in message, message
    return message


# Matching


def test_the_trainers_groups_are_matched_by_name_bit_for_bit(saved):
    names = trained(saved.module)
    assert sum(halves(saved.module), []) != names, "the trap: positions are not names"
    checkpoint = load_checkpoint(saved.path)
    assert_loaded(checkpoint, saved)
    assert checkpoint.match == BY_RULE
    assert checkpoint.state.nu_max is None
    assert checkpoint.notes == (CLIPPING, "no tokenizer found")
    assert (checkpoint.step, checkpoint.path) == (3, saved.path)
    assert checkpoint.sampling == fp.Sampling(temperature=1.0, top_p=1.0)
    decay = {name: 0.0 if "norm" in name else 0.1 for name in names}
    assert checkpoint.adamw == dict(
        lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay, amsgrad=False, max_grad_norm=1.0
    )
    assert len(repr(checkpoint)) < 1000, "no tensors in the repr"


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


def test_loading_draws_no_random_numbers(saved, base):
    before = torch.get_rng_state()
    load_checkpoint(saved.path)
    load_checkpoint(saved.path, base_model=base)
    assert torch.equal(torch.get_rng_state(), before)


def test_same_shaped_layers_have_different_moments(saved):
    """Or the test above could not tell them apart."""
    mu = load_checkpoint(saved.path).state.mu
    first, second = (n for n in mu if "q_proj.lora_A" in n)
    assert not torch.allclose(mu[first], mu[second])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_the_next_step_is_torchs(folder, amsgrad, max_grad_norm):
    run = train(folder, amsgrad=amsgrad)
    checkpoint = load_checkpoint(folder, dtype=torch.float64, max_grad_norm=max_grad_norm)
    assert all(t.dtype == torch.float64 for t in checkpoint.state.mu.values())
    grads = cases.direction(checkpoint.params)
    step = fp.adamw(grads, checkpoint.params, checkpoint.state, **checkpoint.adamw)
    v = fp.direction(step, grads)

    live = {n: nn.Parameter(p.clone()) for n, p in checkpoint.params.items()}
    parts = [[live[name] for name in part] for part in halves(run.module)]
    optimizer = torch.optim.AdamW([{"params": part} for part in parts], lr=1.0)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    for name, p in live.items():
        p.grad = grads[name].clone()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(live.values(), max_grad_norm)
    optimizer.step()
    assert optimizer.param_groups[0]["amsgrad"] == amsgrad
    for name, p in live.items():
        torch.testing.assert_close(
            checkpoint.params[name] + step.lr * v[name], p.detach(), rtol=1e-14, atol=1e-15
        )


def test_a_real_trainers_checkpoint(saved, tmp_path):
    class Ended(TrainerCallback):
        def on_save(self, args, state, control, optimizer=None, **_):
            self.optimizer = getattr(optimizer, "optimizer", optimizer)

    module = adapted(saved.path.parent / "base", bias="lora_only")
    ended = Ended()
    trainer = Trainer(
        model=module,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=8,
            weight_decay=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS.tolist()],
        callbacks=[ended],
    )
    quietly(trainer.train)
    run = SimpleNamespace(module=module, optimizer=ended.optimizer)
    checkpoint = load_checkpoint(tmp_path / "checkpoint-2")
    assert_loaded(checkpoint, run)
    assert (checkpoint.match, checkpoint.step) == (BY_RULE, 2)
    assert checkpoint.adamw["lr"] == pytest.approx(1e-3 * 2 / 8), "the next step's rate"
    assert set(checkpoint.adamw["weight_decay"].values()) == {0.0, 0.1}


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


def test_one_group_is_the_trained_in_order(folder):
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
    refused(saved.path, *words, "Pass names=", names=names(sum(halves(saved.module), [])))


def test_groups_of_another_rule_are_refused(folder):
    run = train(folder, lambda module: [trained(module)[:5], trained(module)[5:]])
    refused(folder, "found groups of [5, 8]", "8 with decay and 5 without", "Pass names=")
    assert_loaded(load_checkpoint(folder, names=trained(run.module)), run)


def test_a_second_group_with_decay_is_not_the_trainers(run):
    edit(run.path, lambda state: state["param_groups"][1].update(weight_decay=0.1))
    refused(run.path, "groups of [8, 5]")


def test_another_models_optimizer_is_refused(run):
    def reversed_shapes(state):
        entries = state["state"]
        state["state"] = {i: entries[len(entries) - 1 - i] for i in entries}

    edit(run.path, reversed_shapes)
    message = refused(run.path, "other shapes: ", "[2, 16]", "...", "Pass names=")
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


# Settings


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
    edit(run.path, group(lr=0.0, initial_lr=0.5))
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
    assert "lr is 0 at the end of the schedule: initial_lr used" in checkpoint.notes
    assert load_checkpoint(run.path, lr=0.3).notes == (CLIPPING, "no tokenizer found")


def test_a_rate_of_zero_without_an_initial_one_is_refused(run):
    edit(run.path, lambda state: [g.update(lr=0.0) for g in state["param_groups"]] and None)
    refused(run.path, "a positive learning rate", "Pass lr=")


@pytest.mark.parametrize("given, used", [(None, None), (0, None), (0.5, 0.5)])
def test_clipping_is_the_callers(saved, given, used):
    checkpoint = load_checkpoint(saved.path, max_grad_norm=given)
    assert checkpoint.adamw["max_grad_norm"] == used
    assert CLIPPING not in checkpoint.notes


def test_amsgrads_maximum_is_read(folder):
    run = train(folder, amsgrad=True)
    edit(folder, lambda state: [e["max_exp_avg_sq"].mul_(2) for e in state["state"].values()][:0])
    checkpoint = load_checkpoint(folder)
    assert checkpoint.adamw["amsgrad"] is True
    for name, p in run.module.named_parameters():
        if p.requires_grad:
            own = run.optimizer.state[p]["max_exp_avg_sq"]
            assert torch.equal(checkpoint.state.nu_max[name], 2 * own)


def test_a_fresh_optimizer_needs_only_a_rate(run):
    (run.path / "optimizer.pt").unlink()
    refused(run.path, "lr=None", optimizer="fresh")
    refused(run.path, "'newest'", optimizer="newest", lr=1e-3)
    checkpoint = load_checkpoint(run.path, optimizer="fresh", lr=1e-3)
    assert checkpoint.match == "fresh optimizer"
    assert checkpoint.notes == (CLIPPING, "no tokenizer found")
    assert checkpoint.adamw == dict(
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        max_grad_norm=1.0,
    )
    for tree in checkpoint.state[:3]:
        assert list(tree) == list(checkpoint.params) and not any(t.any() for t in tree.values())


# The optimizer's file


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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
        each(lambda e: dict(step=3, state1=e["exp_avg"].byte(), qmap1=torch.ones(256))),
        "qmap1, state1, step (bitsandbytes, 8-bit or paged)",
    ),
    "paged": (each(lambda e: dict(step=3, state1=e["exp_avg"])), "bitsandbytes"),
    "wrapped 8-bit": (
        each(lambda e: dict(step=3, __bnb_optimizer_quant_state__={"state1": e["exp_avg"]})),
        "bitsandbytes",
    ),
    "adafactor": (each(lambda e: dict(step=3, exp_avg_sq_row=e["exp_avg"])), "exp_avg_sq_row"),
    "lion": (each(lambda e: dict(exp_avg=e["exp_avg"])), "another optimizer"),
    "sgd": (each(lambda e: dict(momentum_buffer=e["exp_avg"])), "momentum_buffer"),
    "galore": (each(lambda e: e | dict(projector=e["exp_avg"])), "projector"),
    "no step": (each(lambda e: {k: v for k, v in e.items() if k != "step"}), "exp_avg"),
    "empty": (lambda state: state["state"].clear(), "no moments"),
    "radam": (lambda state: state["param_groups"][1].pop("amsgrad") and None, "amsgrad"),
    "adam": (group(decoupled_weight_decay=False), "decay inside the gradient"),
    "maximize": (group(maximize=True), "maximize=True"),
    "amsgrad": (group(amsgrad=True), "amsgrad without max_exp_avg_sq"),
}


@pytest.mark.parametrize("change, words", FOREIGN.values(), ids=FOREIGN)
def test_another_optimizers_state_is_refused(run, change, words):
    edit(run.path, change)
    refused(run.path, words, "torch.optim.AdamW", "optimizer='fresh'")


def test_adam_without_decay_is_adamw(folder):
    train(folder, one)
    edit(folder, group(decoupled_weight_decay=False, weight_decay=0.0))
    assert load_checkpoint(folder).match == BY_GROUP


def test_sharded_tensors_are_refused(run):
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        edit(run.path, each(lambda e: e | {"exp_avg": distribute_tensor(e["exp_avg"], mesh)}))
        refused(run.path, "DTensor", "sharded")
    finally:
        distributed.destroy_process_group()


# Folders


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no such folder", "hub id", kind=FileNotFoundError)


def test_a_runs_folder_lists_its_checkpoints(run):
    shutil.copytree(run.path, run.path.parent / "checkpoint-4")
    refused(
        run.path.parent, "checkpoint-3, checkpoint-4", "Pass one of these", kind=FileNotFoundError
    )


@pytest.mark.parametrize(
    "shards, words",
    [
        ([], "save_only_model"),
        (["global_step3", "zero_to_fp32.py"], "found global_step3"),
        (["optimizer_0", "pytorch_model_fsdp_0"], "optimizer_0, pytorch_model_fsdp_0"),
        (["rank0-of-8-optimizer.pt"], "rank0-of-8-optimizer.pt"),
    ],
)
def test_a_missing_optimizer_is_refused(run, shards, words):
    (run.path / "optimizer.pt").unlink()
    for name in shards:
        (run.path / name).mkdir()
    if shards:
        words = (words, "DeepSpeed or FSDP")
    else:
        words = (words, "optimizer.pt or optimizer.bin was expected")
    refused(run.path, *words, "optimizer='fresh', lr=", kind=FileNotFoundError)
    assert load_checkpoint(run.path, optimizer="fresh", lr=1e-3).step == 3


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_weights_are_refused_without_asking_the_hub(run, file):
    (run.path / file).unlink()
    refused(run.path, file, "found none", kind=FileNotFoundError)


# The adapter


def edit_adapter(path, change):
    file = path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(change(weights) or weights, file)


def first(weights):
    return next(name for name in sorted(weights) if "lora_A" in name)


def without_first(weights):
    return {name: t for name, t in weights.items() if name != first(weights)}


BROKEN = {
    "one too many": (
        lambda w: w | {first(w).replace("layers.0", "layers.7"): w[first(w)].clone()},
        ["1 tensors did not load", "layers.7"],
    ),
    "one too few": (without_first, ["1 parameters have none", "layers.0", "lora_A.default.weight"]),
    "another rank": (lambda w: w | {first(w): torch.ones(3, 16)}, ["PEFT", "RuntimeError"]),
}


@pytest.mark.parametrize("change, words", BROKEN.values(), ids=BROKEN)
def test_an_adapter_that_does_not_land_whole_is_refused(run, change, words):
    edit_adapter(run.path, change)
    words = [word for word in words if word != "PEFT"]
    refused(run.path, *words, "base_model=")


def test_a_truncated_adapter_is_refused(run):
    file = run.path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(run.path, "an adapter that fits", "damaged")


def test_an_adapter_may_be_a_pickle_but_not_run(run, tmp_path):
    weights = load_file(run.path / "adapter_model.safetensors")
    (run.path / "adapter_model.safetensors").unlink()
    torch.save(weights, run.path / "adapter_model.bin")
    assert_loaded(load_checkpoint(run.path), run)
    torch.save(weights | {"extra": Touch(tmp_path / "was here")}, run.path / "adapter_model.bin")
    refused(run.path, "adapter")
    assert not (tmp_path / "was here").exists()


def test_a_base_that_would_round_saved_weights_is_refused(saved, base):
    refused(saved.path, "did not load as saved", "norm", base_model=base.bfloat16(), dtype=None)


def test_a_bfloat16_base_may_be_passed(folder, base):
    run = train(folder, adapter={"modules_to_save": None})
    checkpoint = load_checkpoint(folder, base_model=base.bfloat16())
    assert_loaded(checkpoint, run)
    assert {t.dtype for t in checkpoint.base.values()} == {torch.float32}
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    checkpoint = load_checkpoint(folder, base_model=base, dtype=None)
    assert_loaded(checkpoint, run)
    assert {t.dtype for t in checkpoint.params.values()} == {torch.float32}
    assert torch.bfloat16 in {t.dtype for t in checkpoint.base.values()}


def test_float64_weights_are_kept_in_float64(run):
    edit_adapter(run.path, lambda w: {name: t.double() + 1e-12 for name, t in w.items()})
    for name, p in load_checkpoint(run.path, dtype=torch.float64).params.items():
        assert torch.equal(p, run.module.get_parameter(name).double() + 1e-12)
    assert_loaded(load_checkpoint(run.path), run)


# The base model


def test_the_callers_module_is_left_as_it_was(saved, base):
    base.train()
    base.model.norm.weight.requires_grad_(False)
    base.register_forward_hook(lambda *_: None)
    before = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in base.named_parameters()}
    values = {name: t.clone() for name, t in base.state_dict().items()}
    parts = [(name, id(part), part.training) for name, part in base.named_modules()]
    config = base.config.to_dict()

    checkpoint = load_checkpoint(saved.path, base_model=base, device="cpu")
    assert_loaded(checkpoint, saved)
    now = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in base.named_parameters()}
    assert now == before
    assert [(name, id(part), part.training) for name, part in base.named_modules()] == parts
    assert all(torch.equal(t, values[name]) for name, t in base.state_dict().items())
    assert len(base._forward_hooks) == 1 and base.config.to_dict() == config
    assert not hasattr(base, "peft_config")

    held = {t.data_ptr() for t in checkpoint.base.values()}
    copied = [name for name, p in base.named_parameters() if p.data_ptr() not in held]
    assert all("norm" in name for name in copied), "no weight is copied but those saved again"
    by_path = load_checkpoint(saved.path)
    assert all(torch.equal(t, by_path.base[name]) for name, t in checkpoint.base.items())


def test_moving_does_not_move_the_callers_module(saved, base):
    load_checkpoint(saved.path, base_model=base, dtype=torch.float64)
    assert {p.dtype for p in base.parameters()} == {torch.float32}


def test_tied_weights_stay_tied(tmp_path):
    base = cases.live("llama_tied", adapter=False)
    base.save_pretrained(tmp_path / "base")
    run = train(tmp_path / "checkpoint-3")
    checkpoint = load_checkpoint(run.path, base_model=base)
    assert_loaded(checkpoint, run)
    assert list(checkpoint.base) == list(load_checkpoint(run.path).base)


def test_an_initialisation_that_writes_the_base_writes_a_copy(folder, base):
    train(folder, adapter={"init_lora_weights": "olora"})
    values = {name: t.clone() for name, t in base.state_dict().items()}
    load_checkpoint(folder, base_model=base)
    assert all(torch.equal(t, values[name]) for name, t in base.state_dict().items())


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_of_the_base_are_loaded_into_a_copy(tmp_path, bias):
    base = cases.live("qwen2", adapter=False)
    base.save_pretrained(tmp_path / "base")
    run = train(tmp_path / "checkpoint-3", adapter={"bias": bias, "modules_to_save": None})
    assert len(halves(run.module)[1]) == {"lora_only": 4, "all": 6}[bias]
    values = {name: t.clone() for name, t in base.state_dict().items()}
    assert_loaded(load_checkpoint(run.path, base_model=base), run)
    assert all(torch.equal(t, values[name]) for name, t in base.state_dict().items())


def test_a_base_that_has_an_adapter_already_is_refused(saved, base):
    quietly(get_peft_model, base, LoraConfig(target_modules=["q_proj"]))
    refused(saved.path, "adapter layers", "get_peft_model", "Load it afresh", base_model=base)


def test_a_base_may_be_a_folder_and_may_be_missing(run, tmp_path):
    moved = (run.path.parent / "base").rename(tmp_path / "moved")
    refused(run.path, "a causal language model was expected at ../base", "Pass base_model=")
    assert_loaded(load_checkpoint(run.path, base_model=moved), run)
    assert_loaded(load_checkpoint(run.path, base_model=str(moved)), run)
    edit_json(run.path / "adapter_config.json", base_model_name_or_path=None)
    refused(run.path, "adapter_config.json names none", "Pass base_model=")


def test_another_base_is_refused(saved, base):
    base.model.layers = base.model.layers[:1]
    refused(saved.path, "tensors did not load as saved", "layers.1", base_model=base)
    wide = cases.live("gpt2", adapter=False)
    refused(saved.path, "an adapter that fits", "Pass base_model=", base_model=wide)


def test_a_base_that_lacks_weights_is_refused(run):
    file = run.path.parent / "base" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    refused(run.path, "every weight was expected", "model.norm.weight")


def write_gguf(gguf, module, path):
    """The module as llama.cpp stores it: other names, q and k permuted, matrices in blocks."""
    config = module.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(b"t%d" % i for i in range(61))])
    writer.add_token_scores([0.0] * 64)
    writer.add_token_types([2, 3, 3] + [1] * 61)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in module.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, n in heads.items():
            if part in name:
                tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        name, array = names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy()
        if array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_base_may_be_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    base.save_pretrained(tmp_path / "base")
    write_gguf(gguf, base, tmp_path / "tiny.gguf")
    run = train(tmp_path / "checkpoint-3")
    checkpoint = load_checkpoint(run.path, base_model=tmp_path / "tiny.gguf")
    assert_loaded(checkpoint, run)
    whole = load_checkpoint(run.path)
    assert {t.dtype for t in checkpoint.base.values()} == {torch.float32}
    for name, tensor in checkpoint.base.items():
        torch.testing.assert_close(tensor, whole.base[name], rtol=0, atol=1e-3)
    skeleton = checkpoint.model.skeleton.get_base_model()
    assert not getattr(skeleton, "is_quantized", False)
    assert getattr(skeleton.config, "quantization_config", None) is None
    assert len(checkpoint.tokenizer) == 64


# The tokenizer, a whole model, dtypes and devices


def test_the_tokenizer_is_the_checkpoints_else_the_bases(run, base):
    assert load_checkpoint(run.path).tokenizer is None
    tokenizer().save_pretrained(run.path.parent / "base")
    checkpoint = load_checkpoint(run.path)
    assert len(checkpoint.tokenizer) == 2 and "no tokenizer found" not in checkpoint.notes
    assert load_checkpoint(run.path, base_model=base).tokenizer is None
    own = tokenizer()
    own.add_tokens(["b"])
    own.save_pretrained(run.path)
    assert len(load_checkpoint(run.path).tokenizer) == 3
    assert len(load_checkpoint(run.path, base_model=base).tokenizer) == 3


def test_a_whole_model_trains_every_parameter(saved, base, tmp_path):
    own = dict(base.named_parameters())
    parts = [[own[name] for name in part] for part in halves(base)]
    optimizer = torch.optim.AdamW(
        [{"params": part, "weight_decay": w} for part, w in zip(parts, (0.1, 0.0), strict=True)]
    )
    base(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    base.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    checkpoint = load_checkpoint(tmp_path)
    assert_loaded(checkpoint, SimpleNamespace(module=base, optimizer=optimizer))
    assert (checkpoint.match, checkpoint.step) == (BY_RULE, None)
    refused(tmp_path, "a whole model", base_model=base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None])
def test_dtypes(saved, dtype):
    checkpoint = load_checkpoint(saved.path, dtype=dtype)
    trees = (checkpoint.params, checkpoint.state.mu, checkpoint.state.nu)
    found = {t.dtype for tree in trees for t in tree.values()}
    assert found == {dtype or torch.float32}
    assert checkpoint.model.float64 == (dtype == torch.float64)


def test_low_precision_is_refused(saved):
    refused(saved.path, "torch.bfloat16", "Use float32", dtype=torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_everything_moves_to_the_device(saved, base):
    checkpoint = load_checkpoint(saved.path, base_model=base, device="cuda")
    state = [tree for tree in checkpoint.state if tree is not None]
    for tree in (checkpoint.params, checkpoint.base, *state):
        assert {t.device.type for t in tree.values()} == {"cuda"}
    assert {p.device.type for p in base.parameters()} == {"cpu"}


def test_the_bundled_checkpoint_loads():
    data = Path(fp.__file__).parent / "data"
    found = sorted(data.glob("checkpoint-*"))
    checkpoint = load_checkpoint(found[0])
    assert checkpoint.match == BY_RULE
    assert checkpoint.step == int(found[0].name.split("-")[1])
    assert all(count == checkpoint.step for count in checkpoint.state.count.values())
    assert checkpoint.tokenizer is not None and checkpoint.notes == (CLIPPING,)
