"""The mixed probe against a plain in-place loop with a real optimizer, and what it reports."""

import copy
import dataclasses
import hashlib
import json
import math

import pytest
import torch

import funcprobe as fp
from funcprobe.runtime.serialize import checksum


def in_place(checkpoint, update, evaluation, multiple: float) -> tuple[float, float]:
    """Entropy and its change by writing a real AdamW step into a live module, row by row."""
    module = fp.assemble(checkpoint.model, checkpoint.params, checkpoint.base)
    module = copy.deepcopy(module)
    own = {name: p for name, p in module.named_parameters() if name in checkpoint.params}
    reward = update.reward
    for i in range(len(reward)):
        same = update.group == update.group[i]
        advantage = reward[i] - reward[same].mean()
        logp, _ = score_row(module, update, i)
        loss = -(advantage * logp).sum() / (len(reward) * update.response.shape[1])
        loss.backward()
    settings = dict(checkpoint.adamw)
    torch.nn.utils.clip_grad_norm_(list(own.values()), settings.pop("max_grad_norm"))
    settings["lr"] *= multiple
    optimizer = torch.optim.AdamW(own.values(), **settings)
    state = checkpoint.state
    for name, p in own.items():
        optimizer.state[p] = {
            "step": state.count[name].clone(),
            "exp_avg": state.mu[name].clone(),
            "exp_avg_sq": state.nu[name].clone(),
        }
    rows = range(len(evaluation.group))
    with torch.no_grad():
        old = [score_row(module, evaluation, i) for i in rows]
        optimizer.step()
        new = [score_row(module, evaluation, i) for i in rows]
    weight = [float((b[0].sum() - a[0].sum()).exp()) for a, b in zip(old, new, strict=True)]
    length = [len(a[0]) for a in old]
    before = sum(float(a[1].sum()) for a in old) / sum(length)
    total = sum(w * float(b[1].sum()) for w, b in zip(weight, new, strict=True))
    return before, total / sum(w * t for w, t in zip(weight, length, strict=True)) - before


def score_row(module, batch, i: int):
    tokens = batch.tokens[i, batch.attention[i]]
    steps = int(batch.response[i].sum())
    logp = module(input_ids=tokens[None]).logits[0, -steps - 1 : -1].log_softmax(-1)
    return logp.gather(1, tokens[-steps:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def test_the_probe_is_a_real_step_written_in_place(checkpoint, small, report):
    with checkpoint.model.precision():
        for k, multiple in ((3, 1.0), (5, 4.0)):
            before, change = in_place(checkpoint, *small, multiple)
            assert math.isclose(before, float(report.change.base), rel_tol=1e-10)
            assert math.isclose(change, float(report.change.value[k]), rel_tol=1e-6)


def test_it_is_the_step_that_the_run_itself_took_next(checkpoint, update, evaluation):
    """The bundled run went on: what it logged at its step 21, on this U, from live modules."""
    result = fp.probe(checkpoint, update, evaluation, [0.0], max_length=24)
    assert result.about.update.gradient_norm == pytest.approx(0.07113053649663925, rel=1e-5)
    assert result.lr == pytest.approx(1.3333e-3, rel=1e-4)
    score = fp.scorer(checkpoint.model, checkpoint.base)
    entropy = fp.evaluate(score, checkpoint.params, update).entropy
    mean = float(entropy.sum() / update.response.sum())
    assert mean == pytest.approx(0.3116610316425636, rel=1e-5)
    assert not any("longest response" in flag for flag in result.flags)


def test_a_guessed_divisor_is_said(report):
    assert any("pass max_length=" in flag for flag in report.flags)
    assert report.about.update.max_length == 18


@pytest.mark.parametrize(
    "setting", [{"max_length": -5}, {"max_length": 0}, {"tokens": 0}, {"lanes": 0}]
)
def test_counts_below_one_are_refused(checkpoint, small, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be at least 1"):
        fp.probe(checkpoint, *small, **setting)


def test_batches_of_another_tokenizer_or_wider_than_needed(checkpoint, small):
    alien = small[1]._replace(tokens=small[1].tokens + 1000)
    with pytest.raises(ValueError, match="another model"):
        fp.probe(checkpoint, small[0], alien)
    short = small[1].rows(small[1].response.sum(1) < 8)
    assert fp.probe(checkpoint, small[0], short, [1e-5]).change.value.isfinite().all()


def test_the_probe_composes_the_public_functions(checkpoint, small, report):
    update, evaluation = small
    score = fp.scorer(checkpoint.model, checkpoint.base)
    loss = fp.objective(score, "dr_grpo")
    update = fp.prepare(update, "dr_grpo")
    grads = fp.gradient(loss, checkpoint.params, update)
    step = fp.adamw(grads, checkpoint.params, checkpoint.state, **checkpoint.adamw)
    v = fp.direction(step, grads)
    etas = step.lr * torch.tensor([0, 0.25, 0.5, 1, 2, 4], dtype=torch.float64)
    change = fp.entropy_change(fp.sweep(score, checkpoint.params, v, etas, evaluation), evaluation)
    law = fp.entropy_series(fp.taylor(score, checkpoint.params, v, evaluation), evaluation)
    assert torch.allclose(change.value, report.change.value, rtol=1e-9, atol=1e-14)
    assert torch.allclose(change.stderr, report.change.stderr, rtol=1e-9, atol=1e-14)
    assert torch.allclose(law.value, report.series.value, rtol=1e-9)


def test_blocks_and_lanes_change_nothing(checkpoint, small, report):
    other = fp.probe(checkpoint, *small, tokens=300, lanes=2)
    assert torch.allclose(other.change.value, report.change.value, rtol=1e-9, atol=1e-14)
    assert torch.allclose(other.series.psi, report.series.psi, rtol=1e-8, atol=1e-12)


def test_a_dense_curve_is_what_every_point_gives(checkpoint, small):
    update, evaluation = small[0], small[1].rows(small[1].group < 6)
    etas = checkpoint.adamw["lr"] * torch.linspace(0, 2, 17, dtype=torch.float64)

    def probe(nodes, **options):
        return fp.probe(checkpoint, update, evaluation, etas, nodes=nodes, **options)

    every, curve = probe(None), probe("auto")
    # The bundled checkpoint is float64, where a curve is good to 1e-6 of the largest change.
    largest = float(every.change.value.abs().max())
    assert float((curve.change.value - every.change.value).abs().max()) < 1e-5 * largest
    assert torch.allclose(curve.change.stderr, every.change.stderr, rtol=1e-4, atol=1e-12)
    assert 0 < curve.about.interpolation_bound < 1e-4 and every.about.interpolation_bound == 0
    assert curve.rounding.floor < float(etas[1])
    loose = probe("auto", tol=0.1)
    assert 10 * curve.about.interpolation_bound < loose.about.interpolation_bound
    with pytest.raises(ValueError, match="probe: tol must be"):
        probe("auto", tol=-1.0)


@pytest.mark.parametrize("how", [{"change": "direct"}, {"matmul": "bfloat16"}])
def test_the_rounding_of_a_dense_curve_is_not_that_of_its_slope(checkpoint, small, how):
    """At 1e-9 an interpolated curve is its exact slope, at larger rates it rounds as its nodes."""
    etas = torch.tensor([1e-9, 3e-4, 1e-3, 3e-3], dtype=torch.float64)
    every, curve = (
        fp.probe(checkpoint, *small, etas, nodes=nodes, **how) for nodes in (None, "auto")
    )
    assert curve.rounding.at(etas)[-1] > every.rounding.at(etas)[-1] / 3
    # It is a share of the change at any rate.
    assert torch.allclose(curve.rounding.at(etas) / etas, curve.rounding.at(etas)[0] / etas[0])


def test_nodes_are_refused_before_anything_is_computed(checkpoint, small, tmp_path):
    with pytest.raises(ValueError, match="nodes must be"):
        fp.probe(checkpoint, *small, nodes=2, resume=tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()


def test_the_weights_are_as_before(checkpoint, small, report):
    weights = report.about.weights
    assert weights.same and weights.sha256_before == checksum(checkpoint.base | checkpoint.params)
    name = next(iter(checkpoint.params))
    nudged = checkpoint.params | {name: checkpoint.params[name].clone()}
    nudged[name].view(-1)[0] += 1e-12
    assert checksum(checkpoint.base | nudged) != weights.sha256_before


def test_entropy_falls_and_the_slope_is_the_small_eta_limit(checkpoint, small, report):
    assert report.change.value[3] < 0 and report.series.value[0] < 0
    tiny = fp.probe(checkpoint, *small, lambda lr: [1e-6 * lr])
    assert math.isclose(
        float(tiny.change.value[0] / tiny.change.etas[0]),
        float(report.series.value[0]),
        rel_tol=1e-4,
    )
    assert torch.equal(report.change.value[:1], torch.zeros(1, dtype=torch.float64))
    assert float(report.change.ess[0]) == pytest.approx(report.change.rows)


def test_missing_old_logp_means_on_policy(checkpoint, small, report):
    update = small[0]._replace(old_logp=torch.full_like(small[0].old_logp, torch.nan))
    other = fp.probe(checkpoint, update, small[1])
    assert torch.allclose(other.change.value, report.change.value, rtol=1e-5, atol=1e-12)


def test_the_probe_works_per_sequence_and_with_top_p(checkpoint, small):
    sampling = fp.Sampling(0.8, 0.9)
    tuned = dataclasses.replace(checkpoint, sampling=sampling)
    drawn = fp.rollout(tuned, ["3+4=", "8+8+1="], samples=6, max_new_tokens=24, seed=0)
    update = fp.rollout(tuned, ["3+4=", "8+1="], samples=6, max_new_tokens=24, seed=1)
    update = update._replace(reward=torch.arange(12.0, dtype=torch.float64))
    result = fp.probe(tuned, update, drawn, [0.0, 1e-5], recipe="reinforce", per="sequence")
    assert result.about.checkpoint.sampling == sampling
    assert "nats/sequence" in str(result)
    assert not result.flags


def test_responses_of_another_policy_are_flagged(checkpoint, small):
    hot = fp.rollout(
        checkpoint,
        ["3+4+1=", "8+8+1="],
        samples=4,
        max_new_tokens=24,
        seed=0,
        sampling=fp.Sampling(2.0),
    )
    plain = fp.probe(checkpoint, small[0], hot, [1e-6])
    assert any("not sampled from this policy" in flag for flag in plain.flags)
    weighed = fp.probe(checkpoint, small[0], hot, [1e-6], off_policy=True)
    assert not any("sampled from this policy" in flag for flag in weighed.flags)
    assert weighed.change.off_policy and weighed.about.off_policy
    score = fp.scorer(checkpoint.model, checkpoint.base)
    scores = fp.evaluate(score, checkpoint.params, hot)
    w = torch.where(hot.response, scores.logp - hot.old_logp, 0.0).sum(1).exp()
    mean = (w * scores.entropy.sum(1)).sum() / (w * hot.response.sum(1)).sum()
    assert float(weighed.change.base) == pytest.approx(float(mean), rel=1e-9)
    assert float(plain.change.base) != pytest.approx(float(mean), rel=1e-3)


def test_a_single_prompt_has_no_error_and_says_so(checkpoint, small):
    one = small[1].rows(small[1].group == small[1].group[0])
    result = fp.probe(checkpoint, small[0], one, [0.0, 1e-5])
    assert result.change.stderr.isnan().all()
    assert any("share one prompt" in flag for flag in result.flags)
    assert json.loads(json.dumps(result.to_dict()))["etas"][1]["change_stderr"] is None


@pytest.mark.parametrize(
    ("etas", "complaint"), [([float("nan")], "finite etas"), ([], "finite etas")]
)
def test_bad_etas_are_refused(checkpoint, small, etas, complaint):
    with pytest.raises(ValueError, match=complaint):
        fp.probe(checkpoint, *small, etas)


def test_paths_are_read_hashed_and_named(checkpoint, small, report, tmp_path):
    files = [tmp_path / "u.jsonl", tmp_path / "e.jsonl"]
    for batch, path in zip(small, files, strict=True):
        fp.write_batch(path, batch)
    result = fp.probe(checkpoint.path, str(files[0]), files[1], [1e-5])
    assert result.about.checkpoint.dtype == "float32" and result.change.rows == report.change.rows
    hashed = {source.path: source for source in result.about.inputs}
    for path, role in zip(files, ("update", "evaluation"), strict=True):
        source = hashed.pop(str(path))
        assert source.role == role
        assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(hashed) == {str(path) for path in checkpoint.path.iterdir()}
    assert {source.role for source in hashed.values()} == {"checkpoint"}
    assert {source.role for source in report.about.inputs} == {"checkpoint"}


def test_the_policy_is_the_one_that_sampled_e(checkpoint, small, tmp_path):
    drawn, other = fp.Sampling(0.7), fp.Sampling(1.5)
    fp.write_batch(tmp_path / "e.jsonl", small[1], sampling=drawn)
    fp.write_batch(tmp_path / "u.jsonl", small[0], sampling=other)
    result = fp.probe(checkpoint, tmp_path / "u.jsonl", tmp_path / "e.jsonl", [1e-5])
    assert result.about.checkpoint.sampling == drawn
    chosen = dataclasses.replace(checkpoint, sampling=other)
    result = fp.probe(chosen, tmp_path / "u.jsonl", tmp_path / "e.jsonl", [1e-5])
    assert result.about.checkpoint.sampling == other


def test_an_update_without_rewards_is_refused(checkpoint, small):
    blind = small[0]._replace(reward=torch.full_like(small[0].reward, torch.nan))
    with pytest.raises(ValueError, match="reward is unknown"):
        fp.probe(checkpoint, blind, small[1])


def test_nan_in_the_weights_is_refused(checkpoint, small):
    name = next(iter(checkpoint.params))
    broken = dataclasses.replace(
        checkpoint, params=checkpoint.params | {name: checkpoint.params[name] * torch.nan}
    )
    with pytest.raises(ValueError, match="nan"):
        fp.probe(broken, *small)


@pytest.mark.slow
def test_snis_agrees_with_samples_of_the_shifted_policy(checkpoint, update, evaluation):
    """The independent truth: responses drawn from the shifted policy itself."""
    report = fp.probe(checkpoint, update, evaluation)
    score = fp.scorer(checkpoint.model, checkpoint.base)
    prepared = fp.prepare(update, "dr_grpo")
    grads = fp.gradient(fp.objective(score, "dr_grpo"), checkpoint.params, prepared)
    step = fp.adamw(grads, checkpoint.params, checkpoint.state, **checkpoint.adamw)
    moved = fp.shift(checkpoint.params, fp.direction(step, grads), report.change.etas[5])
    firsts = [int((evaluation.group == g).nonzero()[0]) for g in evaluation.group.unique()]
    prompts = []
    for i in firsts:
        row = evaluation.tokens[i, evaluation.attention[i]].tolist()
        prompts.append(row[: len(row) - int(evaluation.response[i].sum())])
    options = {"samples": 32, "max_new_tokens": 24, "rows": 512}
    here = fp.rollout(checkpoint, prompts, seed=7, **options)
    there = fp.rollout(checkpoint, prompts, seed=8, params=moved, **options)
    means = [
        fp.entropy_change(fp.sweep(score, at, fp.direction(step, grads), [0.0], batch), batch)
        for at, batch in ((checkpoint.params, here), (moved, there))
    ]
    # The same prompts in both, so the prompts' spread is shared: their errors only bound the sum.
    paired = (means[1].base_psi - means[0].base_psi).square().sum().sqrt()
    truth = means[1].base - means[0].base
    z = (report.change.value[5] - truth) / (paired**2 + report.change.stderr[5] ** 2).sqrt()
    assert abs(float(z)) < 4
