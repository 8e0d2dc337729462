"""Batches as JSON lines: what is written is read back, and bad lines are named."""

import json
from types import SimpleNamespace

import pytest
import torch

import funcprobe as fp
from funcprobe.language.batch import trim
from funcprobe.rollouts.records import read_sampling


def same(a: fp.Batch, b: fp.Batch) -> bool:
    return all(
        torch.equal(x.nan_to_num(nan=-7.0), y.nan_to_num(nan=-7.0))
        for x, y in zip(a, b, strict=True)
    )


def lines(path, *records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_a_batch_survives_the_round_trip(tmp_path, checkpoint, evaluation):
    path = tmp_path / "very" / "deep" / "batch.jsonl"
    some = evaluation.rows(slice(0, 20))
    fp.write_batch(path, some, tokenizer=checkpoint.tokenizer, sampling=fp.Sampling(0.7, 0.9))
    again = fp.read_batch(path)
    assert same(again, trim(some)) and again.group.tolist() == [0] * 8 + [1] * 8 + [2] * 4
    assert same(again, fp.read_batch(path, checkpoint.tokenizer))
    assert read_sampling(path) == fp.Sampling(0.7, 0.9)
    assert [p.name for p in path.parent.iterdir()] == ["batch.jsonl"]


def test_the_texts_are_the_prompt_and_what_follows(tmp_path, checkpoint, evaluation):
    path = tmp_path / "b.jsonl"
    fp.write_batch(path, evaluation.rows(slice(0, 9)), tokenizer=checkpoint.tokenizer)
    for i, line in enumerate(map(json.loads, path.read_text().splitlines())):
        ids = evaluation.tokens[i][evaluation.attention[i]].tolist()
        text = checkpoint.tokenizer.decode(ids, skip_special_tokens=True)
        assert line["prompt"].endswith("=") and line["prompt"] + line["completion"] in (
            text,
            checkpoint.tokenizer.bos_token + text,
        )
        assert line["prompt_ids"] + line["completion_ids"] == ids


def test_a_field_may_be_known_in_some_rows_only(tmp_path):
    nan = float("nan")
    some = fp.collate(
        [[1], [2]],
        [[3, 4], [5]],
        reward=[nan, 2.0],
        old_logp=[[-1, -2], [nan]],
        advantage=[0.5, nan],
    )
    fp.write_batch(tmp_path / "b.jsonl", some)
    assert "NaN" not in (tmp_path / "b.jsonl").read_text()
    assert same(fp.read_batch(tmp_path / "b.jsonl"), some)
    fp.write_batch(tmp_path / "c.jsonl", some.rows(slice(1, 2)))
    assert "advantage" not in (tmp_path / "c.jsonl").read_text()


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


class Words:
    """A tokenizer of words, with a chat template and a pad id."""

    pad_token_id, eos_token_id = 90, 91

    def __call__(self, text, add_special_tokens=True):
        ids = [len(word) for word in text.split()]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)

    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict):
        ids = [i for m in messages for i in (80, *self(m["content"], False).input_ids)]
        return {"input_ids": ids + [81] * add_generation_prompt}


def test_chats_texts_and_padding_are_read(tmp_path):
    chat = [{"role": "user", "content": "how are you"}]
    path = lines(
        tmp_path / "c.jsonl",
        {"prompt": chat, "completion": "fine"},
        {"prompt": "hello", "completion": "oh hello there", "truncated": True},
        {"prompt": chat, "prompt_ids": [7], "completion": "no", "completion_ids": [8]},
    )
    batch = fp.read_batch(path, Words())
    assert batch.tokens.tolist() == [
        [80, 3, 3, 3, 81, 4, 91],
        [1, 5, 2, 5, 5, 90, 90],
        [7, 8, 90, 90, 90, 90, 90],
    ]
    assert batch.response.sum(1).tolist() == [2, 3, 1]
    with pytest.raises(ValueError, match="row 0: a prompt given as text needs a tokenizer"):
        fp.read_batch(path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="b.bin is not a text file"):
        fp.read_batch(tmp_path / "b.bin")


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
            "reward must stand in every line or in none, but row 1",
        ),
        ('{"prompt_ids": [1], "completion_ids": [2, 3], "old_logp": [-1.0]}', "1 values for 2"),
        (
            '{"prompt_ids": [1], "completion_ids": ["a"]}',
            "row 0: completion_ids must be a list of int",
        ),
        ('{"prompt_ids": [true], "completion_ids": [1]}', "row 0: prompt_ids must be a list of in"),
        ('{"prompt_ids": [1], "completion_ids": [2], "group": 0.5}', "row 0: group must be an int"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, complaint):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        fp.read_batch(tmp_path / "bad.jsonl")


ROW = {"prompt_ids": [1], "completion_ids": [2]}


def test_every_sampling_setting_survives_the_round_trip(tmp_path):
    sampling = fp.Sampling(0.7, 0.9, 50, 0.05)
    fp.write_batch(tmp_path / "b.jsonl", fp.collate([[1]], [[2]]), sampling=sampling)
    assert read_sampling(tmp_path / "b.jsonl") == sampling


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, fp.Sampling()),
        ({"temperature": 0.6}, fp.Sampling(0.6)),
        ({"top_k": 50, "top_p": None, "min_p": None}, fp.Sampling(top_k=50)),
        ({"top_k": -1, "min_p": 0.0, "min_tokens": 0, "presence_penalty": 0.0}, fp.Sampling()),
        ({"temperature": 1, "repetition_penalty": 1.0, "typical_p": 1.0}, fp.Sampling()),
        ({"do_sample": True, "num_beams": 1, "top_h": None}, fp.Sampling()),
    ],
)
def test_settings_that_do_nothing_may_stand_in_a_line(tmp_path, settings, sampling):
    assert read_sampling(lines(tmp_path / "s.jsonl", ROW | {"sampling": settings})) == sampling


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"repetition_penalty": 1.05, "top_p": 0.8}, r"also holds \{'repetition_penalty': 1.05\}"),
        ({"do_sample": False}, r"also holds \{'do_sample': False\}"),
        ({"top_h": 0.4}, r"also holds \{'top_h': 0.4\}"),
        ({"temperature": 0}, "temperature must be positive and finite, not 0"),
        ({"temperature": "0.7"}, "temperature must be a number, not '0.7'"),
        ({"top_k": 2.5}, "top_k must be a whole number, not 2.5"),
        ({"min_p": 2}, r"min_p must lie in \[0, 1\], not 2"),
        ([0.7, 0.9], r"sampling must be an object, not \[0.7, 0.9\]"),
    ],
)
def test_settings_that_cannot_be_scored_are_named(tmp_path, settings, complaint):
    path = lines(tmp_path / "s.jsonl", ROW | {"sampling": settings})
    with pytest.raises(ValueError, match=f"^read_sampling: .*s.jsonl: .*{complaint}"):
        read_sampling(path)


def test_other_settings_are_left_out_on_request(tmp_path):
    path = lines(tmp_path / "u.jsonl", ROW | {"sampling": {"temperature": 0.7, "top_h": 0.4}})
    assert read_sampling(path, strict=False) == fp.Sampling(0.7)
    assert read_sampling(lines(tmp_path / "w.jsonl", ROW), strict=False) is None
    path = lines(tmp_path / "x.jsonl", ROW | {"sampling": {"temperature": -1}})
    with pytest.raises(ValueError, match="^read_sampling: .*temperature must be positive"):
        read_sampling(path, strict=False)


def test_mixed_sampling_settings_are_refused(tmp_path):
    path = lines(tmp_path / "m.jsonl", ROW | {"sampling": {"temperature": 1.0}}, ROW)
    for strict in (True, False):
        with pytest.raises(ValueError, match="one sampling setting"):
            read_sampling(path, strict=strict)
    path = lines(tmp_path / "n.jsonl", *(ROW | {"sampling": {"top_k": k}} for k in (5, 6)))
    with pytest.raises(ValueError, match="one sampling setting"):
        read_sampling(path)
    path = lines(tmp_path / "o.jsonl", *(ROW | {"sampling": s} for s in ({}, {"top_p": 1})))
    assert read_sampling(path) == fp.Sampling()
