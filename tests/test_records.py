"""Batches as JSON lines: what is written is read back, and bad lines are named."""

import json

import pytest
import torch

import funcprobe as fp
from funcprobe.records import read_sampling


def same(a: fp.Batch, b: fp.Batch) -> bool:
    return all(
        torch.equal(x.nan_to_num(nan=-7.0), y.nan_to_num(nan=-7.0))
        for x, y in zip(a, b, strict=True)
    )


def lines(path, *records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_a_batch_survives_the_round_trip(tmp_path, checkpoint, evaluation):
    path = tmp_path / "deep" / "batch.jsonl"
    some = evaluation.rows(slice(0, 20))
    fp.write_batch(path, some, tokenizer=checkpoint.tokenizer, sampling=fp.Sampling(0.7, 0.9))
    again = fp.read_batch(path)
    length = some.response.sum(1).max()
    assert torch.equal(again.old_logp[again.response], some.old_logp[some.response])
    assert torch.equal(again.response, some.response[:, :length])
    assert same(again, fp.read_batch(path, checkpoint.tokenizer))
    assert read_sampling(path) == fp.Sampling(0.7, 0.9)
    assert [p.name for p in path.parent.iterdir()] == ["batch.jsonl"]


def test_a_field_known_in_some_rows_only(tmp_path):
    nan = float("nan")
    some = fp.collate([[1], [2]], [[3, 4], [5]], reward=[nan, 2.0], old_logp=[[-1, -2], [nan]])
    fp.write_batch(tmp_path / "b.jsonl", some)
    assert same(fp.read_batch(tmp_path / "b.jsonl"), some)


def test_unknown_fields_stay_unknown(tmp_path):
    fp.write_batch(tmp_path / "b.jsonl", fp.collate([[1, 2], [3]], [[4], []][::-1]))
    again = fp.read_batch(tmp_path / "b.jsonl")
    assert again.reward.isnan().all() and again.old_logp.isnan().all()
    assert again.response.sum(1).tolist() == [0, 1]
    assert read_sampling(tmp_path / "b.jsonl") is None


def test_texts_are_tokenised_and_end_with_eos(tmp_path, checkpoint):
    tokenizer = checkpoint.tokenizer
    row = {"prompt": "3+4=", "completion": "7"}
    path = lines(tmp_path / "t.jsonl", row, row | {"truncated": True})
    batch = fp.read_batch(path, tokenizer)
    (seven,) = tokenizer("7", add_special_tokens=False).input_ids
    assert batch.tokens[0, batch.attention[0]].tolist() == [
        *tokenizer("3+4=").input_ids,
        seven,
        tokenizer.eos_token_id,
    ]
    assert batch.response.sum(1).tolist() == [2, 1]
    assert batch.group.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no rows"),
        ('{"prompt_ids": [1], "completion_ids": [2]}\n{oops', "line 2 is not JSON"),
        ("[1]", "line 1: an object"),
        ('{"completion_ids": [2]}', "neither prompt_ids nor prompt"),
        ('{"prompt": "hi", "completion_ids": [2]}', "needs a tokenizer"),
        ('{"prompt_ids": [1], "completion": "x"}', "needs completion_ids"),
        ('{"prompt_ids": [1], "completion_ids": []}', "at least one response token"),
        (
            '{"prompt_ids": [1], "completion_ids": [2], "reward": 1}\n'
            '{"prompt_ids": [1], "completion_ids": [2]}',
            "reward must stand in every line or in none, row 1",
        ),
        ('{"prompt_ids": [1], "completion_ids": [2, 3], "old_logp": [-1.0]}', "1 values for 2"),
        ('{"prompt_ids": [1], "completion_ids": ["a"]}', "read_batch"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, complaint):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        fp.read_batch(tmp_path / "bad.jsonl")


def test_mixed_sampling_settings_are_refused(tmp_path):
    row = {"prompt_ids": [1], "completion_ids": [2]}
    path = lines(tmp_path / "m.jsonl", row | {"sampling": {"temperature": 1.0}}, row)
    with pytest.raises(ValueError, match="one sampling setting"):
        read_sampling(path)
    path = lines(tmp_path / "k.jsonl", row | {"sampling": {"top_k": 50}})
    with pytest.raises(ValueError, match="may hold temperature and top_p"):
        read_sampling(path)
