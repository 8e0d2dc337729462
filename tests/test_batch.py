"""Batches: how lists become arrays, how rows are cut, counted, told apart and printed."""

import cases
import pytest
import torch
from torch.nn.functional import pad

import funcprobe as fp
from funcprobe.language.batch import targets, trim


def test_targets_are_the_response_tokens():
    batch = cases.batch()
    got = [row[keep].tolist() for row, keep in zip(targets(batch), batch.response, strict=True)]
    assert got[0] == [14, 15, 16, 17, 18, cases.EOS]
    assert got[2] == [] and got[6] == [30, 31]


def test_collate_aligns_on_the_response():
    batch = cases.batch(advantage=range(8))
    assert batch.group.tolist() == [0, 1, 2, 0, 2, 1, 3, 0]
    assert batch.attention.sum(1).tolist() == [9, 8, 1, 8, 2, 9, 4, 9]
    assert batch.response.sum(1).tolist() == [6, 3, 0, 5, 1, 4, 2, 6]
    assert batch.position[1, :3].tolist() == [4, 5, 6]
    assert batch.tokens.dtype == batch.position.dtype == batch.group.dtype == torch.int64
    assert batch.reward.dtype == batch.advantage.dtype == torch.float64
    assert batch.weight.isnan().all() and batch.old_logp.isnan().all()


def test_collate_takes_ragged_or_padded_old_logp():
    lists = [[-1.0, -2.0], [-3.0]]
    padded = torch.tensor([[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0]])
    made = [fp.collate([[1], [2]], [[3, 4], [5]], old_logp=x).old_logp for x in (lists, padded)]
    assert made[0][0].tolist() == [-1.0, -2.0] and made[0][1, 0] == -3.0
    assert made[0][1, 1].isnan()
    torch.testing.assert_close(made[0], made[1], equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[[1], []], responses=[[1], [1]]), r"rows \[1\] are empty.*BOS"),
        (dict(prompts=[[1], [1]], responses=[[], []]), "all 2 responses are empty"),
        (dict(prompts=[[1], [1]], responses=[[1]]), "1 came for 2 prompts"),
        (dict(prompts=[[1]], responses=[[1]], reward=[1, 2]), "reward as prompts.*2 came for 1"),
        (dict(prompts=[[1]], responses=[[1]], group=[]), "group as prompts.*0 came for 1"),
        (dict(prompts=[[1]], responses=[[1, 2]], old_logp=[[0.0]]), "1 values for 2.*EOS"),
    ],
)
def test_collate_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"(?s)collate: .*{message}"):
        fp.collate(**arguments)


@pytest.mark.parametrize("tokens", [1, 10, 18, 30, 1000])
def test_blocks_by_length_are_trimmed_and_in_their_order(tokens):
    batch = cases.batch()
    blocks, order = fp.by_length(batch, tokens=tokens)
    assert sorted(order.tolist()) == list(range(8))
    start = 0
    for block in blocks:
        n, width = block.tokens.shape
        assert n == 1 or n * width <= tokens
        assert width == int(block.attention.sum(1).max())
        assert block.response.shape[1] == max(int(block.response.sum(1).max()), 1)
        same = batch.rows(order[start : start + n])
        assert torch.equal(block.tokens, same.tokens[:, :width])
        assert torch.equal(block.group, same.group)
        start += n
    assert start == 8
    longest = [int(block.attention.sum(1).max()) for block in blocks]
    assert longest == sorted(longest, reverse=True)


def test_by_length_refuses_no_tokens():
    with pytest.raises(ValueError, match="by_length: tokens must be at least 1"):
        fp.by_length(cases.batch(), tokens=0)


def test_rows_and_devices_keep_every_field():
    batch = cases.batch()
    half = batch.rows(torch.tensor([True, False] * 4))
    assert all(len(leaf) == 4 for leaf in half)
    assert torch.equal(batch.to("cpu").tokens, batch.tokens)


# Rows told apart


def test_the_number_of_rows_is_not_the_number_of_fields():
    batch = cases.batch()
    assert batch.n == 8 and len(batch) == len(fp.Batch._fields)


def test_equal_rows_have_equal_hashes_and_others_do_not():
    prompts = [[5, 6], [5], [5, 6], [6, 5], [5, 6], [5, 6, 0], [5, 6]]
    responses = [[7, 8], [6, 7, 8], [7, 8], [7, 8], [7, 8, 0], [7, 8], [7]]
    hashes = fp.collate(prompts, responses).row_hashes()
    assert hashes.shape == (7,) and hashes.dtype == torch.int64
    assert hashes[0] == hashes[2]  # the others: boundary, order, a zero more at the end or between
    assert len(set(hashes.tolist())) == 6


def test_padding_order_and_other_fields_do_not_enter_a_rows_hash():
    batch = cases.batch()
    want = batch.row_hashes()
    wide = batch._replace(
        tokens=pad(batch.tokens, (0, 9), value=7),
        attention=pad(batch.attention, (0, 9)),
        position=pad(batch.position, (0, 2)),
        response=pad(batch.response, (0, 2)),
    )
    told = batch._replace(reward=batch.reward + 1, group=batch.group + 1, old_logp=batch.weight + 1)
    for other in (wide, told, cases.batch(pad_id=63), batch.to("cpu")):
        assert torch.equal(other.row_hashes(), want)
    order = torch.tensor([3, 7, 0, 6, 2, 5, 1, 4])
    assert torch.equal(batch.rows(order).row_hashes(), want[order])
    for i in range(batch.n):
        assert torch.equal(trim(batch.rows(slice(i, i + 1))).row_hashes(), want[i : i + 1])


def test_hashes_of_many_similar_rows_are_distinct():
    rows = [[a, b, c] for a in range(20) for b in range(20) for c in range(20)]
    hashes = fp.collate([row[:1] for row in rows], [row[1:] for row in rows]).row_hashes()
    assert len(hashes.unique()) == len(rows)
    bits = (hashes.unsqueeze(1) >> torch.arange(64)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.03  # every bit is used


# Printing


def test_a_batch_prints_its_sizes_and_what_is_known_of_it():
    reward = [1.0, 0.0, torch.nan, 1.0, 0.0, 1.0, 0.0, 1.0]
    batch = cases.batch(reward=reward, advantage=range(8))
    text = repr(batch)
    assert text.startswith("Batch(8 rows of 4 prompts, L=9, R=6, 27 response tokens,\n")
    assert "known: reward in 7 rows, advantage, unknown: weight, old_logp, ref_logp)" in text
    assert "tensor" not in text and len(text.splitlines()) == 2


def test_a_batch_prints_inside_transforms_and_when_mapped():
    texts = []

    def total(batch):
        texts.append(repr(batch))
        return batch.reward

    torch.func.vmap(total)(cases.batch())
    assert texts[0].startswith("Batch(tokens [9] int64, attention [9] bool, position [6] int64")
    assert repr(fp.Batch(*[0] * len(fp.Batch._fields))).startswith("Batch(tokens 0, attention 0")
    assert "tokens [8, 9] int64 meta" in repr(cases.batch().to("meta"))
