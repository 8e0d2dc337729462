"""The settings that E and the loss are scored under: what the lines state, and what is assumed."""

import dataclasses
import warnings

import pytest
import reference
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import funcprobe as fp
from funcprobe.study.setup import read_inputs

COLD = fp.Sampling(0.5)


@pytest.fixture(scope="module")
def live(checkpoint):
    """The bundled model as PEFT itself loads it, in float64."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint.path.parent / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers the old way
        module = PeftModel.from_pretrained(base, checkpoint.path, is_trainable=True)
    module = module.eval().double()
    with reference.float64(module):
        yield module


@pytest.fixture(scope="module")
def few(small):
    """Rows of two prompts, for the loss and for the entropy; U without log-probabilities."""
    update, evaluation = (batch.rows(batch.group < 2) for batch in small)
    return update._replace(old_logp=torch.full_like(update.old_logp, torch.nan)), evaluation


def files(folder, few, *, u=None, e=None):
    """U and E as files, whose lines state these settings."""
    paths = [folder / "u.jsonl", folder / "e.jsonl"]
    for path, batch, sampling in zip(paths, few, (u, e), strict=True):
        fp.write_batch(path, batch, sampling=sampling)
    return paths


def gradient(live, checkpoint, update, *, sampling, old=None):
    """That of GRPO's clipped loss, by autograd on the live module; `old` if it is not on policy."""
    weights = dict(live.named_parameters())

    def warp(row):
        z = row.clone()
        if sampling.top_k:
            z[z < z.topk(sampling.top_k).values[-1]] = -torch.inf
        return z

    logp, _ = reference.scores(live, update, temperature=sampling.temperature, warp=warp)
    loss = reference.loss(
        "grpo",
        logp,
        update.response,
        update.reward,
        update.group,
        old=logp.detach() if old is None else old,
    )
    names = list(checkpoint.params)
    grads = torch.autograd.grad(loss, [weights[name] for name in names])
    return dict(zip(names, grads, strict=True))


def assert_step(report, checkpoint, grads):
    """The report's direction is that of these gradients."""
    step = fp.adamw(grads, checkpoint.params, checkpoint.state, **checkpoint.adamw)
    v = fp.direction(step, grads)
    norm = report.about.update.gradient_norm
    assert norm == pytest.approx(float(fp.norm(grads)), rel=1e-6)
    for name, d in v.items():
        torch.testing.assert_close(report.direction[name], d, rtol=1e-5, atol=1e-8)


def probed(checkpoint, update, evaluation, **options):
    return fp.probe(checkpoint, update, evaluation, [0.0, 1e-5], recipe="grpo", **options)


def test_the_loss_is_scored_at_the_temperature_of_us_lines(checkpoint, few, live, tmp_path):
    paths = files(tmp_path, few, u=COLD, e=fp.Sampling(1.0))
    report = probed(checkpoint, *paths)
    assert report.about.update.sampling == COLD
    assert report.about.checkpoint.sampling == fp.Sampling()
    assert not any("assumed" in note and "U" in note for note in report.about.checkpoint.notes)
    cold = gradient(live, checkpoint, few[0], sampling=COLD)
    assert_step(report, checkpoint, cold)
    warm = gradient(live, checkpoint, few[0], sampling=fp.Sampling())
    assert abs(float(fp.norm(cold) / fp.norm(warm)) - 1) > 0.1
    plain = probed(checkpoint, *few)
    assert_step(plain, checkpoint, warm)
    assert torch.equal(report.change.base, plain.change.base)  # E's own settings


def test_recorded_log_probabilities_are_compared_at_the_losss_temperature(checkpoint, few, live):
    with torch.no_grad():
        logp, _ = reference.scores(live, few[0], temperature=0.5)
    old = logp - 0.2 * torch.rand(logp.shape, generator=torch.Generator().manual_seed(0)).double()
    update = few[0]._replace(old_logp=torch.where(few[0].response, old, torch.nan))
    report = probed(checkpoint, update, few[1], update_sampling=COLD)
    assert_step(report, checkpoint, gradient(live, checkpoint, update, sampling=COLD, old=old))


def test_us_temperature_is_es_where_u_states_none(checkpoint, few, live):
    tuned = dataclasses.replace(checkpoint, sampling=fp.Sampling(0.5, top_k=3))
    rows = fp.rollout(tuned, ["3+4=", "8+8+1="], samples=2, max_new_tokens=8, seed=0)
    report = probed(tuned, few[0], rows)
    assert report.about.update.sampling == COLD  # as TRL's losses, which leave top-k out
    assert report.about.checkpoint.sampling == fp.Sampling(0.5, top_k=3)
    assert_step(report, checkpoint, gradient(live, checkpoint, few[0], sampling=COLD))
    (note,) = (n for n in report.about.checkpoint.notes if "temperature" in n)
    assert note.startswith("the loss is assumed to score U at the temperature of E, 0.5")


def test_a_loss_within_the_possible_tokens_can_be_asked_for(checkpoint, few, live):
    narrow = fp.Sampling(2.0, top_k=3)
    update = fp.rollout(
        checkpoint,
        ["3+4=", "8+8+1="],
        samples=4,
        max_new_tokens=8,
        seed=0,
        sampling=narrow,
        reward=lambda _, text: float(sum(map(ord, text)) % 5),
    )
    report = probed(checkpoint, update, few[1], update_sampling=narrow)
    assert report.about.update.sampling == narrow
    grads = gradient(live, checkpoint, update, sampling=narrow)
    assert_step(report, checkpoint, grads)
    whole = gradient(live, checkpoint, update, sampling=fp.Sampling(2.0))
    assert abs(float(fp.norm(grads) / fp.norm(whole)) - 1) > 0.01


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_log_probabilities_within_the_possible_tokens_are_flagged(checkpoint, few, tmp_path, noise):
    narrow = fp.Sampling(2.0, 0.9)
    prompts, options = ["3+4=", "8+8+1="], dict(samples=16, max_new_tokens=8, seed=0)
    reward = lambda _, text: float(sum(map(ord, text)) % 5)  # noqa: E731
    update = fp.rollout(checkpoint, prompts, sampling=narrow, reward=reward, **options)
    engine = noise * torch.randn(update.old_logp.shape, generator=torch.Generator().manual_seed(0))
    update = update._replace(old_logp=(update.old_logp + engine).clamp(max=0.0))
    path, e = files(tmp_path, (update, few[1]), u=narrow, e=fp.Sampling())
    (flag,) = (f for f in probed(checkpoint, path, e).flags if "U's recorded" in f)
    assert "as those are that are normalised within top-k, top-p or min-p" in flag
    for fine in (update, path):
        flags = probed(checkpoint, fine, e, update_sampling=narrow).flags
        assert not any("U's recorded" in flag for flag in flags)
    whole = fp.scorer(checkpoint.model, checkpoint.base, sampling=fp.Sampling(2.0))
    logp = fp.evaluate(whole, checkpoint.params, update).logp + engine  # over all tokens
    fp.write_batch(path, update._replace(old_logp=logp.clamp(max=0.0)), sampling=narrow)
    assert not any("U's recorded" in flag for flag in probed(checkpoint, path, e).flags)


def test_what_is_assumed_is_said(checkpoint, few, tmp_path):
    def notes(*rows, **options):
        return read_inputs(checkpoint, *rows, None, **options).notes

    silent, stated = files(tmp_path / "a", few), files(tmp_path / "b", few, u=COLD, e=COLD)
    assert [n.split(" is ")[0] for n in notes(*silent)] == [
        "temperature 1 without top-p, top-k and min-p",
        "the loss",
    ]
    assert len(notes(*few)) == 2 and not notes(*stated)
    assert [n[:8] for n in notes(silent[0], stated[1])] == ["the loss"]
    assert [n[:11] for n in notes(stated[0], silent[1])] == ["temperature"]
    assert [n[:11] for n in notes(*silent, update_sampling=COLD)] == ["temperature"]


def test_other_settings_of_u_are_no_part_of_the_loss(checkpoint, few, tmp_path):
    paths = files(tmp_path, few, u=fp.Sampling(0.5, 0.9, 20, 0.1), e=fp.Sampling(0.8, top_k=30))
    inputs = read_inputs(checkpoint, *paths, None)
    assert inputs.loss_sampling == COLD and inputs.checkpoint.sampling == fp.Sampling(0.8, top_k=30)


def test_blocks_of_another_temperature_are_not_taken_up(checkpoint, few, tmp_path):
    first = probed(checkpoint, *few, update_sampling=COLD, resume=tmp_path)
    other = probed(checkpoint, *few, resume=tmp_path)
    assert other.about.update.gradient_norm != pytest.approx(first.about.update.gradient_norm)


def test_the_settings_of_the_loss_survive_the_round_trip(checkpoint, few, tmp_path):
    report = probed(checkpoint, *few, update_sampling=fp.Sampling(0.5, top_k=12))
    report.save(tmp_path, formats=())
    loaded = fp.Report.load(tmp_path)
    assert loaded.about.update.sampling == fp.Sampling(0.5, top_k=12)
    assert "sampling temperature 0.5, top p 1, top k 12, min p 0" in str(loaded.about)
