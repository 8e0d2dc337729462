"""What explains E's recorded log-probabilities, what they do to the estimates, and what is said."""

import dataclasses
from types import SimpleNamespace

import cases
import pytest
import torch
from enumerated import SEQUENCES, exact

import funcprobe as fp
from funcprobe.study.provenance import explanation, records

# Settings that explain records, on plain logits


TOKENS, VOCABULARY = 400, 300


def model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2.5 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)


def of_model(z, drawn_with):
    """Tokens drawn from these logits under settings, and their log-probabilities under others."""

    def under(sampling, logits=z):
        logits = logits / sampling.temperature
        return logits.masked_fill(~sampling.possible(logits), -torch.inf).log_softmax(-1)

    generator = torch.Generator().manual_seed(1)
    token = torch.multinomial(under(drawn_with).exp(), 1, generator=generator)
    return lambda sampling, logits=z: under(sampling, logits).gather(-1, token)[:, 0]


@pytest.mark.parametrize(
    ("drawn", "scored"),
    [
        (fp.Sampling(0.7), fp.Sampling()),
        (fp.Sampling(1.37), fp.Sampling()),
        (fp.Sampling(1.0), fp.Sampling(0.6)),
        (fp.Sampling(1.0, 0.9), fp.Sampling()),
        (fp.Sampling(1.0, top_k=20), fp.Sampling()),
        (fp.Sampling(1.0, min_p=0.05), fp.Sampling()),
        (fp.Sampling(0.8, 0.95), fp.Sampling()),
        (fp.Sampling(0.7), fp.Sampling(1.0, 0.5)),
    ],
)
def test_settings_are_found_from_what_they_record(drawn, scored):
    at = of_model(model(), drawn)
    noise = 1e-3 * torch.randn(TOKENS, generator=torch.Generator().manual_seed(2))
    best = explanation(at, at(drawn) + noise, scored)
    assert best.explains and best.residual < 1.2e-3
    assert best.sampling.temperature == pytest.approx(drawn.temperature, rel=1e-3)
    assert dataclasses.replace(best.sampling, temperature=drawn.temperature) == drawn


def test_rounding_and_other_models_are_explained_by_no_settings():
    z = model()
    at = of_model(z, fp.Sampling())
    for other in ((z + 12).bfloat16().double(), z + 0.5 * model(seed=5)):
        best = explanation(at, at(fp.Sampling(), other), fp.Sampling())
        assert not best.explains


# The bias of taking an engine for the policy, on a policy that can be enumerated


BATCHES = 150


def engine(params):
    """The policy as an engine computes it whose logits, around 12, are rounded to bfloat16."""
    return {name: (table + 12).bfloat16().double() for name, table in params.items()}


def test_an_engines_rounding_is_named_and_its_bias_is_the_enumerated_one():
    kinds, prompts, copies = 5, 60, 8
    params = cases.toy_params(prompts=kinds, seed=3, counts=False)
    v, eta, every = cases.direction(params, seed=4), 1e-4, len(SEQUENCES)
    whole = cases.toy_batch(SEQUENCES * kinds, [k for k in range(kinds) for _ in SEQUENCES])
    drawn_from = cases.toy_score(engine(params), whole).logp
    q = drawn_from.sum(-1).exp().view(kinds, every)

    def as_if_on_policy(eta):
        """The limit of the estimator that takes the engine's draws for the policy's."""
        scores = cases.toy_score(fp.shift(params, v, eta), whole)
        moved = (scores.logp - cases.toy_score(params, whole).logp).sum(-1).exp() * q.flatten()
        return float(
            (moved * scores.entropy.sum(-1)).sum() / (moved * whole.response.sum(-1)).sum()
        )

    def true(eta):
        return exact(fp.shift(params, v, eta), range(kinds), "token")

    bias = as_if_on_policy(0.0) - true(0.0)
    slopes = [(f(eta) - f(-eta)) / (2 * eta) for f in (as_if_on_policy, true)]
    sweep = fp.sweep(cases.toy_score, params, v, [0.1], whole)
    terms = fp.taylor(cases.toy_score, params, v, whole)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(BATCHES):
        kind = torch.randint(kinds, (prompts,), generator=generator)
        index = torch.multinomial(q[kind], copies, True, generator=generator)
        index = (kind[:, None] * every + index).flatten()
        rows = whole.rows(index)._replace(
            old_logp=drawn_from[index], group=torch.arange(prompts).repeat_interleave(copies)
        )
        setup = SimpleNamespace(
            evaluation=rows,
            settings=SimpleNamespace(weights="sequence", per="token", off_policy=False),
            checkpoint=SimpleNamespace(sampling=fp.Sampling()),
        )
        swept = sweep._replace(
            base=fp.Scores(*(x[index] for x in sweep.base)),
            change=fp.Scores(*(x[:, index] for x in sweep.change)),
            row_hashes=None,
        )
        chosen = [fp.Scores(*(x[index] for x in term)) for term in terms]
        got = records(setup, swept, chosen, None)
        assert got.cause == "rounding" and 0.003 < got.scatter < 0.05
        seen.append(got[-4:])
    h, h_error, slope, slope_error = torch.tensor(seen).double().T
    for value, error, want in ((h, h_error, bias), (slope, slope_error, slopes[0] - slopes[1])):
        assert abs(float(value.mean()) - want) < 4 * float(value.std()) / BATCHES**0.5 + 1e-6
        assert float(error.square().mean().sqrt() / value.std()) == pytest.approx(1, abs=0.15)
    assert abs(bias) > 10 * float(h.std()) / BATCHES**0.5  # the bias is there to be seen


# What a probe says


ETAS = [0.0, 1e-5]


@pytest.fixture(scope="module")
def prompts(evaluation):
    out = []
    for g in evaluation.group.unique()[:16]:
        i = int((evaluation.group == g).nonzero()[0])
        row = evaluation.tokens[i, evaluation.attention[i]].tolist()
        out.append(row[: len(row) - int(evaluation.response[i].sum())])
    return out


def draw(checkpoint, prompts, sampling=None, **options):
    options = {"samples": 8, "max_new_tokens": 24, "seed": 1} | options
    return fp.rollout(checkpoint, prompts, sampling=sampling, **options)


def about_e(report):
    return [flag for flag in report.flags if "E was not" in flag]


@pytest.mark.parametrize(
    ("sampling", "cause", "remedy"),
    [
        (fp.Sampling(0.7), "temperature 0.70 (residual", '"sampling": {"temperature": 0.7}'),
        (fp.Sampling(1.0, 0.9), "top_p 0.9 (residual", '{"top_p": 0.9, "temperature": 1.0}'),
    ],
)
def test_the_cause_is_said_once_with_its_remedy(
    checkpoint, small, prompts, tmp_path, sampling, cause, remedy
):
    rows = draw(checkpoint, prompts, sampling)
    result = fp.probe(checkpoint, small[0], rows, ETAS)
    (flag,) = about_e(result)
    assert f"best explained by {cause}" in flag and remedy in flag and "off_policy=True" in flag
    assert not any("mean weight" in flag for flag in result.flags)
    result.save(tmp_path, formats=())
    loaded = fp.Report.load(tmp_path)
    assert loaded.records == result.records and str(loaded) == str(result)
    assert result.to_dict()["records"]["cause"] == "sampling"
    right = fp.probe(dataclasses.replace(checkpoint, sampling=sampling), small[0], rows, ETAS)
    assert not about_e(right) and right.records is None


def test_another_models_records_are_explained_by_nothing(checkpoint, small, prompts):
    unadapted = {n: 0 * p if "lora_B" in n else p for n, p in checkpoint.params.items()}
    rows = draw(checkpoint, prompts, params=unadapted)
    (flag,) = about_e(fp.probe(checkpoint, small[0], rows, ETAS))
    assert "another model or checkpoint" in flag and "biases H by" in flag


def test_an_engine_in_bfloat16_is_a_note_and_no_alarm(small, prompts):
    checkpoint = fp.load_checkpoint(fp.cli.bundled()[0])
    rows = draw(checkpoint, prompts)
    module = fp.assemble(
        checkpoint.model,
        *({n: t.bfloat16() for n, t in x.items()} for x in (checkpoint.params, checkpoint.base)),
    )
    with torch.no_grad():
        logp = module(input_ids=rows.tokens).logits.float().log_softmax(-1)
    at = rows.position.clamp(min=0)
    target = rows.tokens.gather(1, (at + 1).clamp(max=rows.tokens.shape[1] - 1))
    recorded = logp[torch.arange(rows.n)[:, None], at, target].double()
    rows = rows._replace(old_logp=torch.where(rows.response, recorded, torch.nan))
    result = fp.probe(checkpoint, small[0], rows, ETAS)
    assert not about_e(result) and result.records.cause == "rounding"
    assert "best explained by rounding" in str(result) and "as those of an engine" in str(result)
    assert "best explained by rounding" in result._repr_html_()
    weighed = fp.probe(checkpoint, small[0], rows, ETAS, off_policy=True)
    assert weighed.records is None
    bias = float(result.change.base - weighed.change.base)
    assert result.records.entropy_bias == pytest.approx(bias, rel=1e-9)
    slopes = [float(r.series.value[0]) for r in (result, weighed)]
    assert result.records.slope_bias == pytest.approx(slopes[0] - slopes[1], rel=1e-9)


def test_records_from_before_the_temperature_do_not_hide_it(checkpoint, small, prompts):
    """An engine that samples at 0.7 and records the log-probabilities at 1."""
    rows = draw(checkpoint, prompts, fp.Sampling(0.7))
    score = fp.scorer(checkpoint.model, checkpoint.base)
    raw = fp.evaluate(score, checkpoint.params, rows).logp
    rows = rows._replace(old_logp=torch.where(rows.response, raw, torch.nan))
    for off_policy in (False, True):
        result = fp.probe(checkpoint, small[0], rows, ETAS, off_policy=off_policy)
        (flag,) = about_e(result)
        assert "lower temperature" in flag and "off_policy=True does not help" in flag
    right = dataclasses.replace(checkpoint, sampling=fp.Sampling(0.7))
    (flag,) = about_e(fp.probe(right, small[0], rows, ETAS))
    assert "best explained by temperature 1.00" in flag and "E is right as it is" in flag
