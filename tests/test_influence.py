"""Covectors pulled back to the parameters, against the slope they must give along any direction."""

import cases
import pytest
import torch

import funcprobe as fp
from funcprobe.calculus.influence import pullback


def setting(family="llama", dtype=torch.float64):
    case = cases.case(family, dtype)
    return fp.scorer(case.model, case.base), case.params, cases.batch()


def covector(score, params, batch, **options):
    return fp.entropy_covector(fp.evaluate(score, params, batch), batch, **options)


@pytest.mark.parametrize("weights", ["sequence", "prefix"])
@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("family", cases.SOME)
def test_the_pulled_back_covector_gives_the_slope(family, per, weights):
    score, params, batch = setting(family)
    u = pullback(score, params, batch, covector(score, params, batch, per=per, weights=weights))
    for seed in range(2):
        v = cases.direction(params, seed=seed)
        terms = fp.taylor(score, params, v, batch)
        slope = fp.entropy_series(terms, batch, per=per, weights=weights).value[0]
        assert abs(float(slope)) > 1e-3
        torch.testing.assert_close(fp.dot(u, v), slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 3, 8, 50, "all", None])
def test_block_sizes_do_not_matter(rows):
    score, params, batch = setting()
    c = covector(score, params, batch)
    whole = pullback(score, params, batch, c, rows="all")
    for n, u in pullback(score, params, batch, c, rows=rows).items():
        assert u.shape == params[n].shape and u.dtype == params[n].dtype
        torch.testing.assert_close(u, whole[n], rtol=1e-10, atol=1e-13)


def test_rows_meet_their_own_cotangents_where_the_batch_divides_itself(monkeypatch):
    """Blocks by length change the rows' order; each cotangent must follow its row."""
    from funcprobe.calculus import blocks

    monkeypatch.setitem(blocks._BLOCK, "cpu", 40)
    score, params, batch = setting()
    cut, order = batch.cut(20)
    assert len(cut) > 2 and order.tolist() != list(range(8))
    generator = torch.Generator().manual_seed(0)
    c = fp.Scores(*torch.randn(2, *batch.response.shape, generator=generator).double())
    ours, v = pullback(score, params, batch, c), cases.direction(params)
    slope = fp.taylor(score, params, v, batch, rows="all")[1]
    expected = sum((a * b).sum() for a, b in zip(c, slope, strict=True))
    torch.testing.assert_close(fp.dot(ours, v), expected, rtol=1e-10, atol=1e-10)


def test_a_pullback_of_ones_is_the_gradient_bit_for_bit():
    score, params, batch = setting(dtype=None)
    ones = fp.Scores(*(torch.ones(batch.response.shape) for _ in range(2)))
    expected = fp.gradient(score, params, batch, rows=3)
    for n, u in pullback(score, params, batch, ones, rows=3).items():
        assert torch.equal(u, expected[n])


def test_it_is_linear_in_the_cotangent_under_vmap():
    batch = torch.arange(1.0, 5.0).double()
    params = {"a": torch.tensor(0.3).double()}

    def fn(params, batch):
        return torch.sin(params["a"] * batch)

    eye = torch.eye(4).double()
    rows = torch.func.vmap(lambda c: pullback(fn, params, batch, c, rows="all"))(eye)
    torch.testing.assert_close(rows["a"], batch * torch.cos(0.3 * batch))


def test_float32_keeps_its_dtype():
    score, params, batch = setting(dtype=None)
    c = fp.Scores(*(x.double() for x in covector(score, params, batch)))
    assert {u.dtype for u in pullback(score, params, batch, c).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: fp.Scores(*(x[:5] for x in c)), r"8 rows was expected, its leaves have \[5\]"),
        (lambda c: fp.Scores(c.logp, c.entropy[:7]), r"its leaves have \[7, 8\]"),
        (lambda c: fp.Scores(*(x[:, :3] for x in c)), r"output was expected.*\[8, 6\].*\[8, 3\]"),
        (lambda c: c.logp, r"output was expected.*\.entropy \[8, 6\]"),
        (lambda c: {"logp": c.logp, "entropy": c.entropy}, "output was expected"),
        (lambda c: c._replace(logp=c.logp * torch.nan), "must be finite"),
    ],
)
def test_a_cotangent_that_does_not_fit_is_refused(spoil, message):
    score, params, batch = setting()
    c = covector(score, params, batch)
    with pytest.raises(ValueError, match=f"(?s)pullback: .*{message}"):
        pullback(score, params, batch, spoil(c), rows="all")


def test_an_embedding_of_padding_has_the_derivative_of_its_values():
    """torch's backward pass leaves that row out, for the trainer; `gradient` is the trainer's."""
    table = torch.nn.Embedding(5, 3, padding_idx=2, scale_grad_by_freq=True).double()

    def fn(params, tokens):
        return torch.func.functional_call(table, params, (tokens,)).pow(2).sum((1, 2))

    tokens = torch.tensor([[2, 1], [2, 2]])
    params = {"weight": torch.arange(15.0).double().view(5, 3)}
    u = pullback(fn, params, tokens, torch.ones(2, dtype=torch.float64))
    for row in range(5):
        v = {"weight": torch.eye(5, dtype=torch.float64)[:, row : row + 1].expand(5, 3)}
        slope = fp.taylor(fn, params, v, tokens)[1].sum()
        torch.testing.assert_close(fp.dot(u, v), slope)
    grad = fp.gradient(fn, params, tokens)["weight"]
    assert (grad[2] == 0).all() and (u["weight"][2] == 3 * 2 * params["weight"][2]).all()


def test_padding_within_a_row_of_a_trained_embedding():
    module = cases.live(adapter=False)
    assert module.get_input_embeddings().padding_idx == 0
    model, params, base = fp.split(module, dtype=torch.float64)
    score = fp.scorer(model, base)
    batch = fp.collate([[5, 0, 7], [0, 4]], [[9, 0, 3], [4, 4]], pad_id=0)
    c = covector(score, params, batch)
    v = {name: torch.zeros_like(p) for name, p in params.items()}
    v["model.embed_tokens.weight"][0] = 1.0
    slope = fp.entropy_series(fp.taylor(score, params, v, batch), batch).value[0]
    assert abs(float(slope)) > 1e-3
    torch.testing.assert_close(fp.dot(pullback(score, params, batch, c), v), slope)
