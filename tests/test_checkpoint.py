"""load_checkpoint: what a training run saved, by name; and a clear refusal of what it cannot be."""

from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
from runs import (
    BY_RULE,
    CLIPPING,
    TOKENS,
    adapted,
    assert_loaded,
    halves,
    quietly,
    refused,
    train,
    trained,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import funcprobe as fp
from funcprobe.training.checkpoint import as_checkpoint, load_checkpoint


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


@pytest.mark.parametrize("given, used", [(None, None), (0, None), (0.5, 0.5)])
def test_the_caller_decides_the_clipping(saved, given, used):
    checkpoint = load_checkpoint(saved.path, max_grad_norm=given)
    assert checkpoint.adamw["max_grad_norm"] == used
    assert CLIPPING not in checkpoint.notes


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


def test_a_whole_model_trains_every_parameter(saved, base, tmp_path):
    parameters = dict(base.named_parameters())
    parts = [[parameters[name] for name in part] for part in halves(base)]
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
def test_everything_is_loaded_in_the_dtype_asked_for(saved, dtype):
    checkpoint = load_checkpoint(saved.path, dtype=dtype)
    trees = (checkpoint.params, checkpoint.state.mu, checkpoint.state.nu)
    dtypes = {t.dtype for tree in trees for t in tree.values()}
    assert dtypes == {dtype or torch.float32}
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
    folders = sorted(data.glob("checkpoint-*"))
    checkpoint = load_checkpoint(folders[0])
    assert checkpoint.match == BY_RULE
    assert checkpoint.step == int(folders[0].name.split("-")[1])
    assert all(count == checkpoint.step for count in checkpoint.state.count.values())
    assert checkpoint.tokenizer is not None and checkpoint.notes == (CLIPPING,)


def test_what_is_no_path_is_passed_through(checkpoint):
    assert as_checkpoint(checkpoint) is checkpoint
    own = object()
    assert as_checkpoint(own) is own
    with pytest.raises(FileNotFoundError, match="no such folder"):
        as_checkpoint("nowhere")
