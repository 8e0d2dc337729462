"""A saved adapter lands whole on its base model, which is not changed."""

import cases
import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import Touch, assert_loaded, edit_json, halves, quietly, refused, train
from safetensors.torch import load_file, save_file

from funcprobe.training.checkpoint import load_checkpoint


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
