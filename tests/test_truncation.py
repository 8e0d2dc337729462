"""Top-k, top-p and min-p are Hugging Face's, and what they keep is fixed within derivatives."""

import cases
import pytest
import reference
import torch
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import funcprobe as fp
from funcprobe.language.sampling import nucleus

EXACT = dict(rtol=1e-10, atol=1e-10)
SETTINGS = [
    fp.Sampling(0.7, 0.9),
    fp.Sampling(1.3, top_k=5),
    fp.Sampling(1.0, min_p=0.1),
    fp.Sampling(1.7, 0.8, 20, 0.02),
    fp.Sampling(0.9, 0.95, 12, 0.05),
]


def warped(sampling, logits):
    """Logits [T, V] after the warpers that `generate` itself would make of these settings."""
    module = cases.module64().get_base_model()
    config = GenerationConfig(
        do_sample=True,
        temperature=float(sampling.temperature),
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    return module._get_logits_processor(config)(None, logits)


# Which tokens are possible


def random_logits(rows=400):
    """Rows of which half hold many ties, of whole numbers; float32, as the sampler has them."""
    logits = 2 * torch.randn(rows, 40, generator=torch.Generator().manual_seed(0))
    return torch.cat([logits, logits.round()])


@pytest.mark.parametrize("top_k", [0, 1, 3, 39, 40, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5, 1.0])
def test_the_possible_tokens_are_those_of_generate(top_k, top_p, min_p):
    logits = random_logits()
    for temperature in (1.0, 0.6, 2.0):
        sampling = fp.Sampling(temperature, top_p, top_k, min_p)
        want = ~warped(sampling, logits).isneginf()
        kept = sampling.possible(logits / temperature)
        assert torch.equal(kept, want) and kept.any(-1).all()
        assert sampling.truncates or kept.all()


def test_the_order_is_that_of_generate_where_it_matters():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    some = fp.Sampling(top_p=0.75, min_p=0.6).possible(logits)
    assert some.tolist() == [[True, True, False, False]]
    both = fp.Sampling(top_p=0.55, min_p=0.6)  # min-p first would leave 4/7 to the first: enough
    assert both.possible(logits).tolist() == [[True, True, False, False]]
    first = MinPLogitsWarper(0.6)(None, logits)
    assert TopPLogitsWarper(0.55)(None, first).isneginf().tolist() == [[False, True, True, True]]
    assert torch.equal(both.possible(logits), ~warped(both, logits).isneginf())


def test_ties_with_the_last_of_the_likeliest_stay():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert fp.Sampling(top_k=2).possible(logits).sum() == 4
    assert (~TopKLogitsWarper(2)(None, logits).isneginf()).sum() == 4


def test_the_nucleus_is_hugging_faces_on_random_logits():
    logits = 3 * torch.randn(500, 40, generator=torch.Generator().manual_seed(0)).double()
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        kept = ~TopPLogitsWarper(top_p)(None, logits).isneginf()
        assert torch.equal(nucleus(logits, top_p), kept)
        assert kept.any(-1).all()


# Scores


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_scores_are_those_of_generates_logits(sampling):
    case, batch = cases.case(), cases.batch(rows=cases.FULL)
    with torch.no_grad(), reference.float64(cases.module64()) as module:
        warp = lambda row: warped(sampling, row.unsqueeze(0))[0]  # noqa: E731
        want = reference.scores(module, batch, warp=warp)
    score = fp.scorer(case.model, case.base, sampling=sampling, support=case.params)
    ours = fp.evaluate(score, case.params, batch)
    assert want[0].isneginf().any()
    for mine, other in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def test_the_possible_tokens_are_held_fixed_where_support_is():
    case, batch = cases.case(), cases.batch(rows=cases.FULL)
    moved = fp.shift(case.params, cases.direction(case.params), 0.3)
    for sampling in (fp.Sampling(top_p=0.5), fp.Sampling(top_k=9), fp.Sampling(min_p=0.2)):
        score = fp.scorer(case.model, case.base, sampling=sampling, support=case.params)
        here = score(case.params, batch).logp.isneginf()
        assert torch.equal(here, score(moved, batch).logp.isneginf())
        other = fp.scorer(case.model, case.base, sampling=sampling, support=moved)
        assert not torch.equal(here, other(moved, batch).logp.isneginf())


def test_a_change_of_an_impossible_token_is_explained():
    case, batch = cases.case(), cases.batch(rows=cases.FULL)
    sampling = fp.Sampling(top_k=5)
    score = fp.scorer(case.model, case.base, sampling=sampling, support=case.params)
    assert fp.evaluate(score, case.params, batch).logp.isneginf().any()
    with pytest.raises(ValueError, match=r"sweep: .* nan at eta = 0.1 in . rows.*min-p excludes"):
        fp.sweep(score, case.params, cases.direction(case.params), [0.1], batch)


@pytest.mark.parametrize("narrow", [dict(top_p=0.9), dict(top_k=3), dict(min_p=0.1)])
def test_truncation_needs_its_support(narrow):
    case = cases.case()
    (name, value), *_ = narrow.items()
    with pytest.raises(ValueError, match=rf"scorer: Sampling.*{name}={value}.* needs support="):
        fp.scorer(case.model, case.base, sampling=fp.Sampling(**narrow))


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=0),
        dict(temperature=-1.0),
        dict(temperature="0.7"),
        dict(temperature=None),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_k=-1),
        dict(top_k=2.5),
        dict(top_k=True),
        dict(min_p=-0.1),
        dict(min_p=1.5),
        dict(min_p=float("nan")),
    ],
)
def test_impossible_sampling_is_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"Sampling: {name} must "):
        fp.Sampling(**bad)


# A policy whose responses can all be enumerated: what top-k, top-p and min-p leave of a real model

PROMPT, STEPS, ETAS = [5, 9, 11], 3, [0.0, 1e-3, -0.05, 0.3]
ENUMERATED = [fp.Sampling(0.8, top_k=3), fp.Sampling(1.2, 0.6, 4, 0.2), fp.Sampling(1.5, min_p=0.4)]


def enumerate_policy(module, sampling):
    """All responses of `STEPS` tokens that can be drawn at the module's present weights."""
    prefixes = [[]]
    for _ in range(STEPS):
        longer = []
        for prefix in prefixes:
            logits = module(torch.tensor([PROMPT + prefix])).logits[0, -1:]
            tokens = (~warped(sampling, logits).isneginf()[0]).nonzero().flatten().tolist()
            longer += [[*prefix, token] for token in tokens]
        prefixes = longer
    return prefixes


def exact_entropy(module, sampling, responses):
    """-sum p log p over whole responses, over their length; only the prefixes given are possible.

    The probability of each token is that of the softmax over the tokens that follow its prefix in
    one of the responses.
    """
    logits = {}
    tree = {tuple(r[:k]): set() for r in responses for k in range(STEPS)}
    for response in responses:
        for k in range(STEPS):
            tree[tuple(response[:k])].add(response[k])
    for prefix, tokens in tree.items():
        z = module(torch.tensor([PROMPT + list(prefix)])).logits[0, -1] / sampling.temperature
        order = sorted(tokens)
        logits[prefix] = dict(zip(order, z[order].log_softmax(-1), strict=True))
    steps = [[logits[tuple(r[:k])][r[k]] for k in range(STEPS)] for r in responses]
    logp = torch.stack([torch.stack(row).sum() for row in steps])
    return logp, -(logp.exp() * logp).sum() / STEPS


@pytest.mark.parametrize("sampling", ENUMERATED, ids=str)
def test_estimates_are_exact_when_enumerated(sampling):
    """Each response once, weighed by its probability: an expectation, not a sample.

    The truth is that of the live module, by autograd and by weights that are moved in place, with
    the responses that are possible before the move.
    """
    case, v = cases.case(), cases.direction(cases.case().params, size=0.1)
    with reference.float64(cases.live().double()) as module:
        with torch.no_grad():
            responses = enumerate_policy(module, sampling)
        logp, entropy = exact_entropy(module, sampling, responses)
        weights = dict(module.named_parameters())
        grads = torch.autograd.grad(entropy, [weights[name] for name in v])
        slope = sum((g * d).sum() for g, d in zip(grads, v.values(), strict=True))
        moved = []
        for eta in ETAS:
            with torch.no_grad(), reference.moved(module, v, eta):
                moved.append(exact_entropy(module, sampling, responses)[1])
    logp, entropy, slope = logp.detach(), entropy.detach(), slope.detach()
    assert len(responses) >= 8 and float(logp.exp().sum()) == pytest.approx(1.0)
    batch = fp.collate([PROMPT] * len(responses), responses)
    # As if each response had been drawn equally often, which the weights then undo.
    evenly = torch.full_like(batch.old_logp, -torch.tensor(float(len(responses))).log() / STEPS)
    score = fp.scorer(case.model, case.base, sampling=sampling, support=case.params)
    swept = fp.sweep(score, case.params, v, ETAS, batch)
    terms = fp.taylor(score, case.params, v, batch)
    torch.testing.assert_close(swept.base.logp.sum(1), logp, **EXACT)
    change = fp.entropy_change(swept, batch, behaviour=evenly)
    series = fp.entropy_series(terms, batch, behaviour=evenly)
    torch.testing.assert_close(change.base, entropy, **EXACT)
    torch.testing.assert_close(change.value, torch.stack(moved) - moved[0], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(series.value[0], slope, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("readout", [None, fp.readouts.margin], ids=["entropy", "margin"])
@pytest.mark.parametrize("sampling", [fp.Sampling(1.3, 0.99, 50, 1e-3), fp.Sampling(0.9, top_k=9)])
def test_reverse_mode_is_forward_mode_within_the_possible_tokens(sampling, readout):
    case, batch = cases.case(), cases.batch(rows=cases.FULL)
    score = fp.scorer(
        case.model, case.base, sampling=sampling, support=case.params, readout=readout
    )
    possible = ~score(case.params, batch).logp.isneginf()

    def total(params):
        logp, value = score(params, batch)
        return torch.where(possible, logp + 0.3 * value, 0.0).sum()

    v, h = cases.direction(case.params), 1e-5
    _, along = torch.func.jvp(total, (case.params,), (v,))
    grads = torch.func.grad(total)(case.params)
    torch.testing.assert_close(fp.dot(grads, v), along, rtol=1e-10, atol=1e-10)
    there, back = (total(fp.shift(case.params, v, sign * h)) for sign in (1, -1))
    torch.testing.assert_close((there - back) / (2 * h), along, rtol=1e-6, atol=1e-6)
