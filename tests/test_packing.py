"""How batches are laid out and cut: prompts read once, no position that is not scored."""

import cases
import pytest
import reference
import torch

import funcprobe as fp
from funcprobe.language.packing import SHARED, by_row, pack

LONG, OTHER, SHORT = list(range(3, 3 + SHARED + 1)), [7] * SHARED, [5, 9, 11]
ROWS = [  # interleaved prompts, one of them too short to be shared; ragged, one empty, one of EOS
    (LONG, [14, 15, 16, 17, 18, 2]),
    (SHORT, [20, 21]),
    (OTHER, [22, 23, 24]),
    (LONG, [2]),
    (LONG, []),
    (SHORT, [27, 28, 29, 2]),
    (OTHER, [30, 31]),
    (LONG, [14, 33, 34, 35]),
]
WINDOWS = {"mistral", "gemma2", "gemma3"}  # of 4 tokens, which the rows exceed


def batch():
    return fp.collate([prompt for prompt, _ in ROWS], [response for _, response in ROWS])


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_shared_prompts_change_no_score(family):
    case, whole = cases.case(family), batch()
    v = cases.direction(case.params, size=0.01)
    module = cases.module64(family)
    with torch.no_grad(), reference.float64(module):
        base, change = reference.sweep(module, v, [1.0], whole)
    got = fp.sweep(fp.scorer(case.model, case.base), case.params, v, [0.0, 1.0], whole)
    assert torch.equal(got.change.logp[0], torch.zeros_like(got.base.logp))
    for ours, theirs in zip(got.base + got.change, base + change, strict=True):
        torch.testing.assert_close(
            ours[-1:] if ours.ndim == 3 else ours, theirs, rtol=0, atol=1e-10
        )
    shared = {len(case.model.layout(part).tokens) < len(part.tokens) for part in whole.cut(90)[0]}
    assert (True in shared) == (family not in WINDOWS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_derivatives_and_gradients_through_shared_prompts(family):
    case, whole = cases.case(family), batch()
    score, v = fp.scorer(case.model, case.base), cases.direction(case.params)
    apart = {"rows": 1}
    for term, alone in zip(
        fp.taylor(score, case.params, v, whole, order=2),
        fp.taylor(score, case.params, v, whole, order=2, **apart),
        strict=True,
    ):
        torch.testing.assert_close(term, alone, rtol=1e-9, atol=1e-10)
    for change in ("direct", "increment"):
        got = fp.sweep(score, case.params, v, [1e-2], whole, change=change)
        alone = fp.sweep(score, case.params, v, [1e-2], whole, change=change, **apart)
        torch.testing.assert_close(got.change, alone.change, rtol=1e-9, atol=1e-10)
    together = fp.gradient(score, case.params, whole)
    for name, alone in fp.gradient(score, case.params, whole, **apart).items():
        torch.testing.assert_close(together[name], alone, rtol=1e-9, atol=1e-10)
    for name, rows in fp.row_gradients(score, case.params, whole).items():
        torch.testing.assert_close(rows.sum(0), together[name], rtol=1e-9, atol=1e-10)


def test_a_long_window_shares_up_to_its_length():
    module = cases.live("mistral")
    module.base_model.model.config.sliding_window = len(LONG) + 4
    model, _, _ = fp.split(module)
    assert model.shares == len(LONG) + 4
    for rows, sequences in (([3, 7], 1), ([0, 3, 7], 3)):  # the first row has 39 tokens
        few = batch().rows(torch.tensor(rows))
        assert len(model.layout(few).tokens) == sequences


def test_a_model_without_positions_of_its_own_never_shares(monkeypatch):
    module = cases.live("llama")
    decoder = type(module.base_model.model.model)
    original = decoder.forward

    def forward(self, *args, position_ids=None, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(decoder, "forward", forward)
    model, params, base = fp.split(module)
    assert model.shares == 0
    assert len(model.layout(batch()).tokens) == len(ROWS)


def test_the_layout_is_the_one_drawn_by_hand():
    three = fp.collate([[1, 2, 3], [1, 2, 3], [4, 5]], [[7, 8], [6, 5, 4], [9]])
    got = pack(three, least=3)
    assert got.tokens.tolist() == [[1, 2, 3, 7, 6, 5], [4, 5, 0, 0, 0, 0]]
    assert got.place[0].tolist() == [0, 1, 2, 3, 3, 4]
    assert got.segment[0].tolist() == [0, 0, 0, 1, 2, 2]
    assert got.read.tolist() == [2, 3, 2, 4, 5, 7]
    assert got.target.tolist() == [7, 8, 6, 5, 4, 9]
    assert got.slot[0, :2].tolist() == [0, 1] and got.slot[1].tolist() == [2, 3, 4]
    assert got.slot[2, 0] == 5


@pytest.mark.parametrize("least", [1, 3, 10**9])
@pytest.mark.parametrize("multiple", [1, 4])
def test_layouts_read_the_same_tokens(least, multiple):
    whole = batch()
    got, plain = pack(whole, least=least, multiple=multiple), by_row(whole)
    for a, b in (
        (got.target, plain.target),
        (got.tokens.flatten()[got.read], plain.tokens.flatten()[plain.read]),
    ):
        assert torch.equal(a[got.slot][whole.response], b[plain.slot][whole.response])
    assert got.tokens.numel() % multiple == 0 and len(got.read) % multiple == 0


def test_sizes_are_filled_up():
    odd = fp.collate([[1, 2], [4, 5, 6]], [[7], [6, 5, 4]])
    assert pack(odd).tokens.shape == (2, 5)
    full = pack(odd, multiple=4)
    assert full.tokens.shape == (2, 8) and len(full.read) == len(full.target) == 4
    lone = odd.rows(slice(1, 2))
    assert cases.case(dtype=torch.float32).model.layout(lone).tokens.shape == (1, 5)
    assert cases.case().model.layout(lone).tokens.shape == (1, 8)


def test_only_equal_prompts_are_shared():
    longer, other = [*LONG, 9], [*LONG[:-1], 50]
    whole = fp.collate([LONG, longer, other, LONG, LONG], [[9, 8], [8], [7], [6], [5]])
    assert len(pack(whole).tokens) == 4
    assert torch.equal(pack(whole).tokens[0, : len(LONG)], torch.tensor(LONG))
    parts, order = whole.cut(1)
    assert [len(part.tokens) for part in parts].count(3) == 1 and len(parts) == 3


def test_a_block_without_any_response_scores_zero():
    whole = batch()
    case = cases.case()
    empty = whole.rows(torch.tensor([4, 4]))
    scores = fp.evaluate(fp.scorer(case.model, case.base), case.params, empty)
    assert all(torch.equal(s, torch.zeros_like(s)) for s in scores)


@pytest.mark.parametrize("tokens", [1, 50, 90, 10**6])
def test_cut_keeps_every_row_once_and_prompts_together(tokens):
    whole = batch()
    parts, order = whole.cut(tokens)
    assert sorted(order.tolist()) == list(range(len(ROWS)))
    at = 0
    for part in parts:
        rows = whole.rows(order[at : at + len(part.tokens)])
        assert all(torch.equal(a, b) for a, b in zip(part[:5], rows[:5], strict=True))
        laid = pack(part).tokens
        assert laid.numel() <= tokens or len(laid) == 1
        at += len(rows.tokens)
    places = [order.tolist().index(i) for i in (0, 3, 7)]
    assert max(places) - min(places) == 2  # the long prompt's rows, the empty one apart


def test_a_sequence_stays_short_enough():
    prompts = [[*range(3, 60), *range(3, 60)]] * 12
    many = fp.collate(prompts, [[i] * 100 for i in range(3, 15)])
    lengths = [pack(part).tokens.shape for part in many.cut(1)[0]]
    assert all(m == 1 and length <= 512 for m, length in lengths)
    assert len(lengths) < 12
