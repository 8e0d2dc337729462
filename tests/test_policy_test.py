"""Whether E was drawn from the scored policy: the test by hand, and what a probe says of such E."""

import dataclasses
import json
import math
from types import SimpleNamespace

import cases
import pytest
import torch
from enumerated import SEQUENCES, log_probability, setting

import funcprobe as fp
from funcprobe.statistics.policy_test import PolicyTest, least_variance
from funcprobe.statistics.uncertainty import t_pvalue, t_quantile

# Student's p-value


def test_students_p_is_the_closed_form():
    for t in (0.0, 1e-6, 0.3, 2.0, 40.0, 1e6):
        one = 1 - 2 / math.pi * math.atan(t) if t < 1 else 2 / math.pi * math.atan(1 / t)
        assert t_pvalue(t, 1) == pytest.approx(one, rel=1e-12)
        root = math.sqrt(2 + t * t)
        assert t_pvalue(-t, 2) == pytest.approx(2 / (root * (root + t)), rel=1e-12)
    assert t_pvalue(5.0, 10**7) == pytest.approx(math.erfc(5 / math.sqrt(2)), rel=1e-4)
    assert t_pvalue(math.inf, 3) == 0 and math.isnan(t_pvalue(math.nan, 3))
    assert math.isnan(t_pvalue(1.0, 0))


@pytest.mark.parametrize("df", [1, 2, 3, 7, 64, 999])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.995])
def test_students_p_inverts_the_quantile(level, df):
    assert t_pvalue(t_quantile(level, df), df) == pytest.approx(1 - level, rel=1e-9)


def test_students_p_is_the_integral_of_its_density():
    df, t = 5, 3.0
    x = torch.linspace(t, 4000, 4_000_001, dtype=torch.float64)
    constant = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(math.pi * df)
    tail = torch.trapezoid(constant * (1 + x * x / df) ** (-(df + 1) / 2), x)
    assert t_pvalue(t, df) == pytest.approx(2 * float(tail), rel=1e-5)


# The test itself


def rows(logp, entropy, group, response=None):
    """Scores and rows as the test reads them."""
    logp, entropy = torch.tensor(logp), torch.tensor(entropy)
    response = torch.ones(logp.shape, dtype=bool) if response is None else torch.tensor(response)
    scores = SimpleNamespace(logp=logp, entropy=entropy)
    return scores, SimpleNamespace(response=response, group=torch.tensor(group))


def test_the_test_by_hand():
    # Off the response anything may stand; prompt 7 has two rows.
    logp = [[-3.0, -1.0], [-1.5, 9.0], [-0.5, -2.0], [-2.5, -1.0]]
    entropy = [[1.0, 1.0], [1.0, 5.0], [1.0, 1.0], [1.0, 1.0]]
    response = [[True, True], [True, False], [True, True], [True, True]]
    got = fp.policy_test(*rows(logp, entropy, [7, 3, 7, 5], response))
    sums = [2.0 + 0.5, 0.5, 1.5]
    mean = sum(sums) / 3
    error = math.sqrt(3 / 2 * sum((x - mean) ** 2 for x in sums))
    assert got.t == pytest.approx(sum(sums) / error, rel=1e-12) and got.df == 2
    assert got.p == t_pvalue(got.t, 2) and got.nats == pytest.approx(sum(sums) / 7)
    assert str(got) == repr(got) and "may be draws" in str(got) and "With 3 prompts" in str(got)


def test_equal_sums_do_not_make_a_certain_alarm():
    """Responses of a nearly certain policy that all lack its rare token have no spread at all."""
    h = -(0.99 * math.log(0.99) + 0.01 * math.log(0.01))
    scores, batch = rows([[math.log(0.99)] * 5] * 32, [[h] * 5] * 32, list(range(32)))
    got = fp.policy_test(scores, batch)
    want = 160 * (-math.log(0.99) - h) / math.sqrt(160 * 0.0099 * math.log(99) ** 2)
    assert got.t == pytest.approx(want, rel=1e-5) and not got.rejects


def test_impossible_draws_of_a_certain_policy_are_certain():
    scores, batch = rows([[-1.0], [-1.0]], [[0.0], [0.0]], [0, 1])
    got = fp.policy_test(scores, batch)
    assert got.t == math.inf and got.p == 0 and got.rejects
    assert fp.policy_test(*rows([[0.0], [0.0]], [[0.0], [0.0]], [0, 1])).p == 1


def test_the_least_variance_is_below_that_of_every_distribution():
    generator = torch.Generator().manual_seed(0)
    for tokens in (2, 3, 4, 7, 12):
        for scale in (0.5, 2.0, 6.0):
            z = scale * torch.randn(2000, tokens, generator=generator, dtype=torch.float64)
            logp = z.log_softmax(-1)
            h = -(logp.exp() * logp).sum(-1)
            variance = (logp.exp() * (logp + h[:, None]) ** 2).sum(-1)
            assert (least_variance(h) <= variance * (1 + 1e-9) + 1e-12).all()
    p = torch.tensor([0.48, 0.48, 0.04], dtype=torch.float64)
    h = -(p * p.log()).sum()
    assert float(least_variance(h)) == pytest.approx(float((p * (p.log() + h) ** 2).sum()))
    edges = least_variance(torch.tensor([0.0, math.log(2), math.log(5), 1e-9]))
    assert edges.isfinite().all() and edges[0] == 0 and edges[1] < 1e-6


def test_the_sums_have_mean_zero_on_the_enumerated_policy():
    """Exactly, prompt by prompt, although responses end where they like."""
    params, _, prompts = setting()
    for prompt in prompts:
        batch = cases.toy_batch(SEQUENCES, [prompt] * len(SEQUENCES))
        scores = cases.toy_score(params, batch)
        p = torch.tensor([math.exp(log_probability(params, prompt, s)) for s in SEQUENCES])
        surplus = (-scores.logp - scores.entropy).sum(-1)
        assert abs(float((p.double() * surplus).sum())) < 1e-7
        assert surplus.abs().max() > 0.1


def test_one_prompt_has_no_p_and_says_why():
    got = fp.policy_test(*rows([[-3.0], [-1.0]], [[1.0], [1.5]], [4, 4]))
    assert math.isnan(got.t) and math.isnan(got.p) and got.df == 0 and got.nats == 0.75
    assert "all rows share one prompt" in str(got) and not got.rejects


def test_what_the_test_refuses():
    scores, batch = rows([[-1.0], [-math.inf]], [[1.0], [1.0]], [0, 1])
    with pytest.raises(ValueError, match="policy_test: the scored policy cannot produce"):
        fp.policy_test(scores, batch)
    readings = SimpleNamespace(logp=torch.zeros(2, 1), value=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="scores with an entropy were expected"):
        fp.policy_test(readings, batch)


def test_a_sentence_says_what_was_seen():
    assert "are not draws" in str(PolicyTest(-8.0, 31, 1e-9, -0.1))
    assert "With" not in str(PolicyTest(1.0, 7, 0.4, 0.01))
    assert "evaluate on 8 or more" in str(PolicyTest(1.0, 6, 0.4, 0.01))


# What a probe says


PROMPTS = 16


@pytest.fixture(scope="module")
def prompts(evaluation):
    out = []
    for g in evaluation.group.unique()[:PROMPTS]:
        i = int((evaluation.group == g).nonzero()[0])
        row = evaluation.tokens[i, evaluation.attention[i]].tolist()
        out.append(row[: len(row) - int(evaluation.response[i].sum())])
    return out


def unrecorded(batch):
    """The rows as a file without log-probabilities holds them."""
    return batch._replace(old_logp=torch.full_like(batch.old_logp, torch.nan))


@pytest.fixture(scope="module")
def drawn(checkpoint, prompts):
    """Rows without recorded log-probabilities, drawn with these settings or parameters."""

    def draw(sampling=None, *, many=PROMPTS, samples=8, params=None, seed=1):
        settings = {"samples": samples, "max_new_tokens": 24, "seed": seed, "params": params}
        return unrecorded(fp.rollout(checkpoint, prompts[:many], sampling=sampling, **settings))

    return draw


def doubts_about_e(report):
    return [flag for flag in report.flags if "E was not" in flag]


ETAS = [0.0, 1e-5]


def test_true_draws_raise_no_doubt(checkpoint, small, report, drawn):
    assert not doubts_about_e(report) and not report.policy.rejects
    assert (
        f"Policy test: the rows may be draws of the scored policy ({report.policy.nats:+.2g}"
        in (str(report))
    )
    assert "may be draws" in report._repr_html_()
    assert not doubts_about_e(fp.probe(checkpoint, small[0], drawn(), ETAS))


def other_adapter(checkpoint):
    generator = torch.Generator().manual_seed(0)
    return {
        n: p + 2 * p.std() * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in checkpoint.params.items()
    }


@pytest.mark.parametrize(
    ("sampling", "how"),
    [
        (fp.Sampling(0.7), "likelier than its draws, as at a lower temperature"),
        (fp.Sampling(0.5), "likelier than its draws, as at a lower temperature"),
        (fp.Sampling(1.0, 0.9), "likelier than its draws, as at a lower temperature, with top-p"),
        (fp.Sampling(1.5), "less likely than its draws, as at a higher temperature"),
        (fp.Sampling(0.7, 0.9), "likelier than its draws"),
    ],
)
def test_other_settings_are_seen_without_log_probabilities(checkpoint, small, drawn, sampling, how):
    result = fp.probe(checkpoint, small[0], drawn(sampling), ETAS)
    (doubt,) = doubts_about_e(result)
    assert how in doubt and "off_policy=True" in doubt and "the key sampling" in doubt
    assert result.policy.rejects and math.copysign(1, result.policy.nats) == (
        -1 if how.startswith("likelier") else 1
    )
    right = dataclasses.replace(checkpoint, sampling=sampling)
    assert not doubts_about_e(fp.probe(right, small[0], drawn(sampling), ETAS))


def test_another_model_is_seen(checkpoint, small, drawn):
    """Drawn without the adapter, or with another one."""
    unadapted = {n: 0 * p if "lora_B" in n else p for n, p in checkpoint.params.items()}
    for params in (unadapted, other_adapter(checkpoint)):
        result = fp.probe(checkpoint, small[0], drawn(params=params), ETAS)
        (doubt,) = doubts_about_e(result)
        assert "less likely than its draws" in doubt


def test_one_invented_completion_for_all_prompts_is_seen(checkpoint, small, prompts):
    responses = [[9, 13, 9, 14, 3, 13, 7, 2]] * 16
    group = [g for g in range(8) for _ in range(2)]
    invented = fp.collate([prompts[g] for g in group], responses, group=group)
    result = fp.probe(checkpoint, small[0], invented, ETAS)
    (doubt,) = doubts_about_e(result)
    assert "less likely than its draws" in doubt and result.policy.nats > 1


def test_few_prompts_are_said_to_have_little_power(checkpoint, small, drawn):
    result = fp.probe(checkpoint, small[0], drawn(fp.Sampling(0.5), many=2), ETAS)
    assert "With 2 prompts only gross differences are seen" in str(result)


def test_rows_weighted_by_records_of_another_policy_are_not_tested(checkpoint, small, prompts):
    rows = fp.rollout(
        checkpoint, prompts, samples=2, max_new_tokens=24, seed=0, sampling=fp.Sampling(0.7)
    )
    result = fp.probe(checkpoint, small[0], rows, ETAS, off_policy=True)
    assert result.policy is None and "Policy test" not in str(result)
    assert result.to_dict()["policy_test"] is None and not doubts_about_e(result)


def test_the_report_keeps_the_test(checkpoint, small, report, tmp_path):
    report.save(tmp_path / "many", formats=())
    data = json.loads((tmp_path / "many" / "report.json").read_text())
    assert data["policy_test"] == report.policy._asdict()
    one = small[1].rows(small[1].group == small[1].group[0])
    alone = fp.probe(checkpoint, small[0], one, ETAS)
    alone.save(tmp_path / "one", formats=())
    loaded = fp.Report.load(tmp_path / "one")
    assert str(loaded) == str(alone) and math.isnan(loaded.policy.p)
