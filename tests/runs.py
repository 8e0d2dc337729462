"""Training runs as the Trainer saves them, and what their checkpoints must hold."""

import json
import os
import shutil
import warnings
from types import SimpleNamespace

import cases
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from funcprobe.training.checkpoint import load_checkpoint

BY_RULE = "by order (HF Trainer's decay and no-decay groups; sizes, shapes and step counts agree)"
BY_GROUP = "by order (one group)"
CLIPPING = "clipping at 1.0, the Trainer's default, is assumed: no checkpoint records it"
FROZEN = "base_model.model.lm_head.weight"
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def adapted(base, **settings):
    """An adapter that trains norms too, which in named_parameters() stand between its matrices.

    The Trainer's order, with the decayed ones first, is therefore different. The layers have the
    same shapes.
    """
    settings = dict(target_modules=["q_proj", "v_proj"], modules_to_save=["norm"]) | settings
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return quietly(get_peft_model, module, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))


def quietly(call, *args, **settings):
    """Ignores what PEFT and transformers warn of: each other, and biases."""
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
    parameters = dict(module.named_parameters())
    decays = [0.1, 0.0]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [(n, parameters[n]) if pairs else parameters[n] for n in part],
                "weight_decay": decay,
            }
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


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The usual run, which all tests share; nothing may change it."""
    folder = tmp_path_factory.mktemp("saved")
    cases.live(adapter=False).save_pretrained(folder / "base")
    return train(folder / "checkpoint-3")


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the usual run, to which a test may do anything."""
    shutil.copytree(saved.path.parent, tmp_path / "run")
    return SimpleNamespace(**vars(saved) | {"path": tmp_path / "run" / "checkpoint-3"})


@pytest.fixture
def folder(saved, tmp_path):
    """Where another run can be trained on the same base model."""
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


def entrywise(change):
    def of_all(state):
        for i, entry in state["state"].items():
            state["state"][i] = change(entry)

    return of_all


def in_group(**values):
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


def refused(path, *words, error=ValueError, **options):
    """The refusal is ours, in full sentences, and has these words."""
    with pytest.raises(error) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith("load_checkpoint: ") and " expected" in message
    assert "Likely " in message and message.endswith(".")
    for word in words:
        assert word in message, message
    return message


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
