"""Runs that are killed and go on, bit for bit; files that are torn, foreign or of another run."""

import dataclasses
import importlib
import json
import math
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from cases import case

import funcprobe as fp
from funcprobe import cli
from funcprobe.calculus.tree import Terms
from funcprobe.runtime import resume
from funcprobe.runtime.serialize import decode, encode

composed = importlib.import_module("funcprobe.study.probe")  # `fp.probe` is the function


@pytest.fixture
def counted():
    """A function of a block that counts its calls."""

    def fn(block):
        fn.calls += 1
        return fp.Scores(block["x"].cumsum(0) / 3, block["x"].double().exp())

    fn.calls = 0
    return fn


BLOCKS = [{"x": torch.arange(4.0) + i} for i in range(3)]


def same(a, b) -> bool:
    return type(a) is type(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def test_finished_blocks_are_read(counted, tmp_path):
    plain = [counted(block) for block in BLOCKS]
    folder = tmp_path / "deep" / "blocks"
    fn = resume.resumable(counted, folder, "k")
    assert not folder.exists()
    first = [fn(block) for block in BLOCKS[:2]]
    again = [resume.resumable(counted, folder, "k")(block) for block in BLOCKS]
    assert counted.calls == 3 + 2 + 1
    assert all(map(same, plain, again)) and all(map(same, plain, first))
    assert len(list(folder.iterdir())) == 3  # and no unfinished ones
    assert resume.resumable(counted, None, "k") is counted


@pytest.mark.parametrize("harm", ["torn", "empty", "flipped", "foreign", "text", "renamed", "hole"])
def test_a_torn_or_foreign_file_is_computed_again(counted, tmp_path, harm):
    fn = resume.resumable(counted, tmp_path, "k")
    plain = [fn(block) for block in BLOCKS[:2]]
    path = next(tmp_path.iterdir())
    data = bytearray(path.read_bytes())
    if harm == "torn":
        data = data[:-5]
    elif harm == "empty":
        data = b""
    elif harm == "flipped":
        data[-3] ^= 1
    elif harm == "foreign":
        data = encode({"a": torch.ones(2)})
    elif harm == "text":
        data = b"not a safetensors file at all"
    elif harm == "renamed":
        other = next(p for p in tmp_path.iterdir() if p != path)
        data = other.read_bytes()
    elif harm == "hole":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    again = [fn(block) for block in BLOCKS[:2]]
    assert counted.calls == 3
    assert all(map(same, plain, again))
    assert [fn(block) for block in BLOCKS[:2]] and counted.calls == 3  # and written again


def test_whatever_decides_the_bits_is_in_the_key(counted, tmp_path, monkeypatch):
    block = BLOCKS[0]
    resume.resumable(counted, tmp_path, "k")(block)
    nudged = {"x": torch.nextafter(block["x"], torch.tensor(9.0))}
    others = [("k", nudged), ("k", {"x": block["x"].double()}), ("l", block)]
    for calls, (key, other) in enumerate(others, 2):
        resume.resumable(counted, tmp_path, key)(other)
        assert counted.calls == calls
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    resume.resumable(counted, tmp_path, "k")(block)
    monkeypatch.undo()
    monkeypatch.setattr(resume.transformers, "__version__", "0")
    resume.resumable(counted, tmp_path, "k")(block)
    monkeypatch.undo()
    assert counted.calls == 6
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"another source")
    assert resume.surroundings()[1:] and resume.surroundings()[0]
    changed = resume.surroundings()[0]
    monkeypatch.undo()
    assert resume.surroundings()[0] != changed


def test_discarding_leaves_other_files(counted, tmp_path):
    folder = tmp_path / "blocks"
    resume.discard(folder)  # which is not there
    fn = resume.resumable(counted, folder, "k")
    fn(BLOCKS[0])
    name = next(folder.iterdir()).name
    (folder / f"{name}.123.part").write_bytes(b"half")
    (folder / "model.safetensors").write_bytes(b"mine")
    resume.discard(folder)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    resume.discard(folder)
    assert not folder.exists()


def test_every_bit_of_a_tree_survives():
    odd = torch.tensor([math.nan, -0.0, math.inf, 5e-324], dtype=torch.float64)
    odd = torch.cat([odd, torch.tensor([0x7FF8000000000001]).view(torch.float64)])
    whole = torch.arange(6.0).view(2, 3)
    tree = {
        "odd": odd,
        "shared": (whole, whole[0], whole.T, whole[0].expand(4, 3)),
        "plain": [None, True, 3, 0.1, "text", ()],
        "none": torch.zeros(0, 3, dtype=torch.int8),
        "flag": torch.tensor(True),
        "scores": fp.Scores(torch.ones(1), torch.zeros(2)),
        "terms": Terms([{"a": torch.ones(2)}, {"a": whole[1]}], torch.arange(2)),
        "unidentified": Terms([torch.ones(2)]),
    }
    back, about = decode(encode(tree, note="yes"))
    assert about == {"note": "yes"} and list(back) == list(tree)
    assert torch.equal(back["odd"].view(torch.int64), odd.view(torch.int64))
    for a, b in zip(back["shared"], tree["shared"], strict=True):
        assert a.shape == b.shape and torch.equal(a, b) and a.is_contiguous()
    assert back["plain"] == tree["plain"] and type(back["plain"][1]) is bool
    assert back["none"].shape == (0, 3) and back["none"].dtype == torch.int8
    assert back["flag"].shape == () and bool(back["flag"])
    assert type(back["scores"]) is fp.Scores
    assert type(back["terms"]) is type(back["unidentified"]) is Terms
    assert torch.equal(back["terms"].row_hashes, torch.arange(2)) and len(back["terms"]) == 2
    assert torch.equal(back["terms"][1]["a"], whole[1])
    assert back["unidentified"].row_hashes is None and len(back["unidentified"]) == 1
    for wrong in ({1: torch.ones(1)}, {"a": object()}, torch.Size([1])):
        with pytest.raises(ValueError, match="Use a dict"):
            encode(wrong)


def test_a_model_counts_by_what_it_computes():
    a = case("llama").model
    assert fp.fingerprint(a) == fp.fingerprint(fp.split(case("llama").module)[0])
    seen = {fp.fingerprint(a), fp.fingerprint(case("gemma2").model)}
    for name, value in (("scaling", {"default": 3.0}), ("variance_epsilon", 1e-3)):
        other = fp.split(case("llama").module)[0]
        part = next(part for part in other.skeleton.modules() if hasattr(part, name))
        setattr(part, name, value)
        seen.add(fp.fingerprint(other))
    assert len(seen) == 4


@pytest.fixture
def small(checkpoint, update, evaluation):
    update = update.rows(update.group < 4)
    update = update._replace(old_logp=torch.full_like(update.old_logp, torch.nan))
    return update, evaluation.rows(slice(0, 24))


STAGES = ("evaluate", "gradient", "sweep", "taylor")


@pytest.fixture
def work(monkeypatch):
    """How often the probe calls each of its expensive functions."""
    calls = dict.fromkeys(STAGES, 0)

    def watch(name, fn):
        def watched(*args, **options):
            calls[name] += 1
            return fn(*args, **options)

        return watched

    for name in STAGES:
        monkeypatch.setattr(composed, name, watch(name, getattr(composed, name)))
    return calls


def arrays(report) -> list[torch.Tensor]:
    return [*report.arrays.values(), report.change.psi, report.series.psi]


def test_the_same_call_computes_nothing_and_other_settings_only_theirs(
    checkpoint, small, work, tmp_path
):
    plain = fp.probe(checkpoint, *small, tokens=200)

    def spent(*etas, over=checkpoint, **options):
        before = dict(work)
        report = fp.probe(over, *small, *etas, tokens=200, resume=tmp_path, **options)
        return report, {name: work[name] - before[name] for name in STAGES}

    nothing = dict.fromkeys(STAGES, 0)
    first, once = spent()
    again, calls = spent()
    assert calls == nothing and min(once.values()) > 1
    for report in (first, again):
        for a, b in zip(arrays(report), arrays(plain), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert report.rounding == plain.rounding
    assert spent(per="sequence")[1] == nothing  # statistics are made anew
    calls = spent([0.0, 1e-4])[1]
    assert calls.pop("sweep") > 1 and set(calls.values()) == {0}
    calls = spent(change="direct")[1]
    assert calls.pop("sweep") > 1 and set(calls.values()) == {0}
    assert spent(recipe="reinforce")[1] == once | {"evaluate": 0}
    assert spent(max_length=30)[1] == once | {"evaluate": 0}
    name = next(iter(checkpoint.params))
    moved = checkpoint.params | {name: checkpoint.params[name] * (1 + 1e-12)}
    assert spent(over=dataclasses.replace(checkpoint, params=moved))[1] == once
    assert spent(over=dataclasses.replace(checkpoint, sampling=fp.Sampling(0.9)))[1] == once


@pytest.fixture(scope="module")
def server():
    """A process with the package loaded, whose forks run the command line."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["funcprobe.study.probe"])
    return context


def test_killed_at_any_point_it_loses_a_block_at_most(server, tmp_path):
    """SIGKILL at random moments until a run gets through; every file is written once."""
    checkpoint, update, evaluation = cli.bundled()
    lines = [json.loads(line) for line in update.read_text().splitlines()[:16]]
    for line in lines:
        line.pop("old_logp", None)
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = evaluation.read_text().splitlines(keepends=True)
    (tmp_path / "e.jsonl").write_text("".join(lines[:40]))
    files = ["--update", str(tmp_path / "u.jsonl"), "--evaluation", str(tmp_path / "e.jsonl")]
    words = ["probe", "--checkpoint", str(checkpoint), *files, "--tokens", "150"]
    assert cli.main([*words, "--output", str(tmp_path / "whole")]) == 0

    blocks, chance = tmp_path / "cut" / "blocks", random.Random(0)
    written: dict[str, int] = {}
    kills = most = 0
    while True:
        run = server.Process(target=cli.main, args=([*words, "--output", str(blocks.parent)],))
        run.start()
        # One more block at least, so that it ends; then at any moment of the next few.
        wanted, end = len(written) + chance.randint(1, 9), None
        while run.is_alive() and (end is None or time.monotonic() < end):
            for path in blocks.glob("*.safetensors"):
                try:
                    stamp = path.stat().st_mtime_ns
                except FileNotFoundError:
                    continue  # the sum so far, replaced by the next
                assert written.setdefault(path.name, stamp) == stamp  # never computed again
            if end is None and len(written) >= wanted:
                end = time.monotonic() + chance.uniform(0, 0.4)
            time.sleep(0.002)
        if not run.is_alive():
            run.join()
            assert run.exitcode == 0
            break
        run.kill()
        run.join()
        kills += 1
        most = max(most, len(written))
    assert kills >= 3 and most > 10
    assert not blocks.exists()
    for name in ("report.safetensors", "report.json"):
        whole, cut = ((tmp_path / run / name).read_bytes() for run in ("whole", "cut"))
        if name.endswith("json"):
            whole, cut = (json.loads(data) for data in (whole, cut))
            for name in ("seconds", "date"):
                whole["about"].pop(name), cut["about"].pop(name)
        assert whole == cut
    shutil.rmtree(tmp_path / "cut")
