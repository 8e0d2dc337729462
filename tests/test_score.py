"""Scores against full logits row by row, and what changes none of them."""

import cases
import pytest
import reference
import torch

import funcprobe as fp
import funcprobe.language.score as score_module
from funcprobe.language.batch import lengths, trim
from funcprobe.language.head.softmax import logp_and_entropy

EXACT = dict(rtol=1e-10, atol=1e-10)


def scored(batch, *, family="llama", **options):
    case = cases.case(family)
    score = fp.scorer(case.model, case.base, **options)
    return fp.evaluate(score, case.params, batch)


def assert_scores(ours, want, **tolerance):
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or EXACT))


# Parity


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
def test_scores_are_those_of_full_logits_row_by_row(family, temperature):
    batch = cases.batch()
    ours = scored(batch, family=family, sampling=fp.Sampling(temperature=temperature))
    with torch.no_grad(), reference.float64(cases.module64(family)) as module:
        want = reference.scores(module, batch, temperature=temperature)
    assert_scores(ours, want, rtol=1e-12, atol=1e-12)


def test_temperature_enters_the_entropy():
    batch = cases.batch()
    cold, warm = (scored(batch, sampling=fp.Sampling(temperature=t)) for t in (0.5, 1.7))
    assert (warm.entropy - cold.entropy)[batch.response].min() > 0.05


# The arithmetic


def test_large_logits_do_not_cancel():
    z = torch.arange(-12, 12).reshape(3, 8) / 8  # exact in float32, offset or not
    target = torch.tensor([0, 3, 7])
    for ours, far in zip(
        logp_and_entropy([z], target), logp_and_entropy([z + 2.0**19], target), strict=True
    ):
        assert torch.equal(ours, far)
    _, entropy = logp_and_entropy([torch.tensor([1e4, 0.0])], torch.tensor(0))
    assert entropy == 0.0
    _, entropy = logp_and_entropy([torch.tensor([0.0, -20.0]).double()], torch.tensor(0))
    p = torch.tensor(-20.0).double().exp()
    exact = (20 * p + (1 + p) * torch.log1p(p)) / (1 + p)
    torch.testing.assert_close(entropy, exact, rtol=0, atol=1e-16)


@pytest.mark.parametrize("width", [1, 3, 5, 8])
def test_slices_of_the_vocabulary_give_what_all_of_it_gives(width):
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(6, 8, generator=generator).double()
    logits[1, :4] = -torch.inf  # slices of nothing but impossible tokens
    logits[2, 4:] = -torch.inf
    target = torch.tensor([0, 7, 3, 2, 5, 4])
    ours = logp_and_entropy(logits.split(width, -1), target)
    p = logits.softmax(-1)
    want = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0], torch.special.entr(p).sum(-1)
    for x, y in zip(ours, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_a_large_vocabulary_is_read_in_slices(monkeypatch):
    case, batch = cases.case("llama", torch.float64), cases.batch()
    want = fp.scorer(case.model, case.base)(case.params, batch)
    monkeypatch.setattr(score_module, "WIDTH", 7)
    for x, y in zip(fp.scorer(case.model, case.base)(case.params, batch), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("width", [3, 8])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_impossible_tokens_are_finite_in_value_tangent_and_gradient(temperature, width):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 8, generator=generator).double()
    out = torch.rand(5, 8, generator=generator) < 0.4
    target = torch.tensor([0, 1, 2, 3, 4])
    out[torch.arange(5), target] = False
    dz = torch.randn(5, 8, generator=generator).double()

    def fn(z):
        masked = z.masked_fill(out, -torch.inf) / temperature
        return logp_and_entropy(masked.split(width, -1), target)

    value, tangent = torch.func.jvp(fn, (logits,), (dz,))
    grad = torch.func.grad(lambda z: sum(x.sum() for x in fn(z)))(logits)
    assert all(x.isfinite().all() for x in (*value, *tangent, grad))
    for i in range(5):  # over the possible tokens alone, by the formulas
        kept = ~out[i]
        lp = (logits[i, kept] / temperature).log_softmax(-1)
        p, d = lp.exp(), dz[i, kept] / temperature
        mean = (p * d).sum()
        j = int(kept[: target[i]].sum())
        torch.testing.assert_close(value[0][i], lp[j], **EXACT)
        torch.testing.assert_close(value[1][i], -(p * lp).sum(), **EXACT)
        torch.testing.assert_close(tangent[0][i], d[j] - mean, **EXACT)
        torch.testing.assert_close(tangent[1][i], -(p * (d - mean) * lp).sum(), **EXACT)
    assert (grad[out] == 0).all()


def test_an_impossible_target_scores_minus_infinity_and_is_named():
    z = torch.tensor([[0.0, -torch.inf]])
    logp, entropy = logp_and_entropy([z], torch.tensor([1]))
    assert logp.item() == -torch.inf and entropy.item() == 0.0


def test_all_of_a_very_large_vocabulary_counts():
    z = torch.zeros(3, 150_000, dtype=torch.float64)
    logp, entropy = logp_and_entropy([z], torch.tensor([0, 5, 149_999]))
    expected = torch.full((3,), 150_000.0, dtype=torch.float64).log()
    torch.testing.assert_close(-logp, expected, **EXACT)
    torch.testing.assert_close(entropy, expected, **EXACT)


# What counts


def test_the_sampled_eos_is_scored_and_counted():
    batch = cases.batch(rows=[0, 4])
    scores = scored(batch)
    assert lengths(batch).tolist() == [6, 1]
    case = cases.case()
    logits = fp.logits(case.model, case.params, case.base, batch).log_softmax(-1)
    torch.testing.assert_close(scores.logp[0, 5], logits[0, 5, cases.EOS], **EXACT)
    torch.testing.assert_close(scores.logp[1, 0], logits[1, 0, cases.EOS], **EXACT)
    assert scores.entropy[1, 0] > 0


def test_scores_are_zero_off_the_response():
    batch = cases.batch()
    for x in scored(batch):
        assert (x[~batch.response] == 0).all()
        assert (x[batch.response] != 0).all()
    assert (scored(batch).logp[2] == 0).all()  # the empty response


# Invariances


@pytest.mark.parametrize("chunk", [1, 3, 7, 48, 1000])
def test_the_chunk_changes_nothing(chunk):
    batch = cases.batch()
    for ours, want in zip(scored(batch, chunk=chunk), scored(batch), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_row_order_company_and_padding_change_nothing(family):
    batch = cases.batch()
    whole = scored(batch, family=family)
    order = torch.tensor([3, 7, 0, 6, 2, 5, 1, 4])
    for ours, want in zip(scored(batch.rows(order), family=family), whole, strict=True):
        torch.testing.assert_close(ours, want[order], **EXACT)
    for i in range(len(batch.tokens)):
        alone = scored(batch.rows(slice(i, i + 1)), family=family)
        for ours, want in zip(alone, whole, strict=True):
            torch.testing.assert_close(ours[0], want[i], **EXACT)
        if batch.response[i].any():
            cut = trim(batch.rows(slice(i, i + 1)))
            assert cut.tokens.shape[1] == int(batch.attention[i].sum())
            t = cut.response.shape[1]
            for ours, want in zip(scored(cut, family=family), whole, strict=True):
                torch.testing.assert_close(ours[0], want[i, :t], **EXACT)


def test_more_padding_changes_nothing():
    batch = cases.batch()
    wide = batch._replace(
        tokens=torch.nn.functional.pad(batch.tokens, (0, 9), value=7),
        attention=torch.nn.functional.pad(batch.attention, (0, 9)),
    )
    assert_scores(scored(wide), scored(batch))


@pytest.mark.parametrize("pad_id", [cases.EOS, 14, 63])
def test_the_pad_id_changes_nothing(pad_id):
    batch, other = cases.batch(), cases.batch(pad_id=pad_id)
    assert not torch.equal(batch.tokens, other.tokens)
    assert torch.equal(batch.response, other.response)
    assert_scores(scored(other), scored(batch))


def test_scores_and_layouts_print_their_shapes():
    case, batch = cases.case(), cases.batch()
    score = fp.scorer(case.model, case.base)
    assert repr(score(case.params, batch)) == "Scores(logp [8, 6] float64, entropy [8, 6] float64)"
    assert repr(score) == f"scorer(entropy, {fp.Sampling()})"
    margin = fp.scorer(case.model, case.base, readout=fp.readouts.margin)
    assert repr(margin).startswith("scorer(margin, ")
    assert repr(margin(case.params, batch)).startswith("Readings(logp [8, 6] float64, value [8, 6]")
    assert "place None" in repr(case.model.layout(batch))
