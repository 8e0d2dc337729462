"""The shifted policy sampled: its arithmetic by loops, and importance sampling held against it."""

from dataclasses import replace

import pytest
import reference
import torch

import funcprobe as fp


@pytest.fixture(scope="module")
def swept(checkpoint, evaluation, stepped):
    """The bundled step's change at a visible learning rate, per token and per sequence."""
    step, v = stepped
    eta = float(8 * step.lr)
    score = fp.scorer(checkpoint.model, checkpoint.base)
    sweep = fp.sweep(score, checkpoint.params, v, [0.0, eta], evaluation)
    return v, eta, [fp.entropy_change(sweep, evaluation, per=per) for per in ("token", "sequence")]


def drawn(checkpoint, v, eta, batch, **options):
    options = {"samples": 2, "max_new_tokens": 24, "seed": 11, "rows": 512} | options
    return fp.ground_truth(checkpoint, v, eta, batch, **options)


@pytest.fixture(scope="module")
def truth(checkpoint, evaluation, swept):
    return drawn(checkpoint, *swept[:2], evaluation)


def test_importance_sampling_agrees_with_the_shifted_policy_sampled(truth, swept, evaluation):
    _, _, estimates = swept
    assert truth.rows == 2 * len(evaluation.group)
    for unit, estimate in enumerate(estimates):
        found = truth.against(estimate)
        assert abs(found.z) < 4
        # The change is visible, else agreement would say nothing.
        assert truth.value[unit] < -3 * truth.stderr[unit]
        assert (found.estimated, found.sampled) == (estimate.value[1], truth.value[unit])
        assert f"per {estimate.per}: z = {found.z:+.1f}" in str(found) and "\n" not in str(found)
        here = (truth.base[unit] - estimate.base) / truth.base_stderr[unit].hypot(
            estimate.base_stderr
        )
        assert abs(here) < 4
    assert "\n" not in str(truth) and "1024 rows each" in str(truth)


def test_results_print_in_a_line_and_as_a_table(truth, swept):
    assert repr(truth) == f"GroundTruth: {truth}" and "tensor" not in repr(truth)
    html = truth._repr_html_()
    assert html.count("<tr>") == 3 and f"{float(truth.value[1]):+.3e}" in html
    agreement = truth.against(swept[2][0])
    assert f"{agreement.z:+.1f}" in agreement._repr_html_()


def test_the_opposite_direction_does_not_agree(checkpoint, evaluation, swept):
    v, eta, estimates = swept
    back = drawn(checkpoint, {n: -x for n, x in v.items()}, eta, evaluation, samples=1)
    assert all(abs(back.against(estimate).z) > 4 for estimate in estimates)


def test_means_and_errors_are_those_of_loops(checkpoint, evaluation, swept):
    v, eta, estimates = swept
    some = evaluation.rows(torch.tensor([0, 8, 9, 24]))  # three prompts, one of them twice
    truth = drawn(checkpoint, v, eta, some, samples=3)
    prompts = [
        checkpoint.tokenizer.decode(some.tokens[i, 1 : some.position[i, 0] + 1]) for i in range(4)
    ]
    assert len(set(prompts)) == 3
    score = fp.scorer(checkpoint.model, checkpoint.base)
    group = [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    found = []
    for seed, params in ((11, checkpoint.params), (12, fp.shift(checkpoint.params, v, eta))):
        batch = fp.rollout(
            checkpoint, prompts, samples=3, max_new_tokens=24, seed=seed, rows=512, params=params
        )
        entropy = fp.evaluate(score, params, batch).entropy
        h = [float(entropy[i][batch.response[i]].sum()) for i in range(12)]
        found.append((h, batch.response.sum(1).tolist()))
    for unit in (0, 1):
        sizes = [t if unit == 0 else [1] * 12 for _, t in found]
        mean = [sum(h) / sum(n) for (h, _), n in zip(found, sizes, strict=True)]
        psi = [
            [(h[i] - m * n[i]) / (sum(n) / 12) for i in range(12)]
            for (h, _), n, m in zip(found, sizes, mean, strict=True)
        ]
        both = [b - a for a, b in zip(*psi, strict=True)]
        assert float(truth.base[unit]) == pytest.approx(mean[0], rel=1e-12)
        assert float(truth.value[unit]) == pytest.approx(mean[1] - mean[0], rel=1e-9)
        assert float(truth.base_stderr[unit]) == pytest.approx(reference.stderr(psi[0], group))
        assert float(truth.stderr[unit]) == pytest.approx(reference.stderr(both, group))
        # Other prompts: independent errors.
        estimate = estimates[unit]
        error = (reference.stderr(both, group) ** 2 + float(estimate.stderr[1]) ** 2) ** 0.5
        gap = mean[1] - mean[0] - float(estimate.value[1])
        assert truth.against(estimate).z == pytest.approx(gap / error)


def test_the_same_prompts_join_their_errors_prompt_by_prompt(truth, swept):
    estimate = swept[2][0]
    joint = ((truth.psi[0] - estimate.psi[1]) ** 2).sum() * 64 / 63
    gap = truth.value[0] - estimate.value[1]
    assert truth.against(estimate).z == pytest.approx(float(gap / joint.sqrt()))


def test_any_score_can_be_sampled(checkpoint, evaluation, swept):
    v, eta, _ = swept
    some = evaluation.rows(slice(0, 16))
    options = dict(samples=1, seed=5)
    plain = fp.scorer(checkpoint.model, checkpoint.base)
    length = fp.with_value(plain, lambda batch: batch.response.sum(1))
    truth = drawn(checkpoint, v, eta, some, score=length, **options)
    assert truth.base[0] == pytest.approx(1.0)  # tokens per token
    assert truth.value[0] == pytest.approx(0.0, abs=1e-12) and truth.base[1] > 2
    own = drawn(checkpoint, v, eta, some, **options)
    again = drawn(checkpoint, v, eta, some, score=plain, **options)
    assert torch.equal(own.value, again.value) and torch.equal(own.psi, again.psi)


def test_what_cannot_be_compared_is_refused(checkpoint, evaluation, truth, swept):
    v, eta, estimates = swept
    with pytest.raises(ValueError, match="expected to hold eta = 0.0106666667"):
        truth.against(estimates[0]._replace(etas=torch.tensor([0.0, 1.01 * eta])))
    for settings in (dict(top_p=0.9), dict(top_k=9), dict(min_p=0.1)):
        narrow = replace(checkpoint, sampling=fp.Sampling(**settings))
        with pytest.raises(ValueError, match="without top-p, top-k and min-p was expected"):
            drawn(narrow, v, eta, evaluation)
