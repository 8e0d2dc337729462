"""Two Gloo ranks against one process, bit for bit; ranks that fail; blocks in rounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcprobe as fp
from funcprobe import cli
from funcprobe.runtime import resume
from funcprobe.runtime.distributed import agree, share

RANKS = Path(__file__).with_name("ranks.py")


def torchrun(folder: Path, fault: str, *words: str, ranks: int = 2) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launch, "--nproc-per-node", str(ranks), str(RANKS), str(folder), fault, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def said(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("funcprobe: ")]


def notes(folder: Path, rank: int) -> list:
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> tuple[bytes, dict]:
    """The arrays' bytes, and the report without what depends on the clock."""
    report = json.loads((folder / "report.json").read_text())
    report["about"].pop("seconds"), report["about"].pop("date")
    return (folder / "report.safetensors").read_bytes(), report


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A probe of 20 rows of U, whose log-probabilities are not recorded, and 31 of E."""
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint, update, evaluation = cli.bundled()
    lines = [json.loads(line) for line in update.read_text().splitlines()[:20]]
    for line in lines:
        line.pop("old_logp", None)
    (folder / "u.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = evaluation.read_text().splitlines(keepends=True)
    # Equal rows would make equal blocks, which are computed once.
    lines = list({str(json.loads(line)["completion_ids"]): line for line in lines}.values())
    (folder / "e.jsonl").write_text("".join(lines[:31]))
    (folder / "other.jsonl").write_text("".join(lines[1:32]))
    files = ["--update", str(folder / "u.jsonl"), "--evaluation", str(folder / "e.jsonl")]
    return ["probe", "--checkpoint", str(checkpoint), *files, "--tokens", "300"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> tuple[bytes, dict]:
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main([*words, "--output", str(folder / "probe")]) == 0
    assert sorted(path.name for path in (folder / "probe").iterdir()) == [
        "report.json",
        "report.png",
        "report.safetensors",
    ]
    return numbers(folder / "probe")


def test_two_ranks_give_the_bits_of_one_and_hold_only_their_rows(words, alone, tmp_path):
    result = torchrun(tmp_path, "fine", *words)
    assert result.returncode == 0, result.stderr
    assert numbers(tmp_path / "probe") == alone
    assert not (tmp_path / "probe" / "blocks").exists()
    assert result.stdout.count("wrote probe") == 1
    assert result.stderr.count("sweep over E:   0%") == 1

    whole, taken = dict(notes(tmp_path, 0))["E"], []
    for r in (0, 1):
        log = notes(tmp_path, r)
        at = [i for i, (what, _) in enumerate(log) if what == "sweep"]
        taken.append([log[i][1] for i in at])
        # While it sweeps, a block goes to the device, is swept, and the next goes.
        assert log[at[0] - 1 : at[-1] + 1] == [[w, b] for b in taken[r] for w in ("to", "sweep")]
    assert sorted(sum(taken[0] + taken[1], [])) == sorted(whole)  # each row once
    assert abs(len(taken[0]) - len(taken[1])) <= 1
    reports = [dict(notes(tmp_path, r))["report"] for r in (0, 1)]
    assert reports == [True, False]


def test_a_rank_that_fails_ends_the_job_with_one_line(words, tmp_path):
    result = torchrun(tmp_path, "raise", *words)
    assert result.returncode != 0
    (line,) = said(result)
    assert "the third block is bad" in line
    assert [dict(notes(tmp_path, r)).get("status") for r in (0, 1)].count(0) == 0
    assert not (tmp_path / "probe" / "report.json").exists()


def test_a_rank_that_dies_ends_the_job_at_once_and_one_process_goes_on(
    words, alone, tmp_path, monkeypatch
):
    result = torchrun(tmp_path, "die", *words)  # which waits for less than a hung rank would
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr  # torchrun's own report
    assert len(said(result)) <= 1 and all("one ended without a word" in s for s in said(result))

    output = tmp_path / "probe"
    kept = {path.name for path in (output / "blocks").iterdir()}
    assert len(kept) >= 6
    written, write = [], resume.write

    def watched(folder, name, tree):
        written.append(f"{name}.safetensors")
        return write(folder, name, tree)

    monkeypatch.setattr(resume, "write", watched)
    assert cli.main([*words, "--output", str(output)]) == 0
    assert written and not set(written) & kept
    assert numbers(output) == alone


def test_hosts_with_other_files_are_refused(words, tmp_path):
    other = Path(words[words.index("--evaluation") + 1]).with_name("other.jsonl")
    (tmp_path / "other.jsonl").write_text(other.read_text())
    result = torchrun(tmp_path, "files", *words)
    assert result.returncode != 0
    (line,) = said(result)
    assert "rank 1 differ from rank 0's" in line


def test_bad_input_is_said_once(tmp_path):
    result = torchrun(tmp_path, "fine", "probe", "--checkpoint", "nowhere")
    assert result.returncode != 0
    (line,) = said(result)
    assert "go together" in line


def test_without_a_group_it_is_map():
    seen = []

    def fn(block):
        seen.append(block)
        return {"a": torch.ones(block)}

    results = fp.sharded(fn, [1, 2, 3])
    assert seen == []  # as they are asked for
    assert len(next(results)["a"]) == 1 and seen == [1]
    assert [len(result["a"]) for result in results] == [2, 3]
    tree = {"a": torch.ones(1)}
    assert share(tree) is tree
    agree("weights", "x")


def test_blocks_are_shared_out_by_the_public_functions(checkpoint, evaluation, stepped):
    step, v = stepped
    few = evaluation.rows(slice(0, 12))
    score = fp.scorer(checkpoint.model, checkpoint.base)
    blocks, order = fp.by_length(few, tokens=100)
    assert len(blocks) > 2

    def fn(block):
        return fp.sweep(score, checkpoint.params, v, [step.lr], block)

    joined = fp.join(fp.sharded(fn, blocks), order)
    whole = fp.sweep(score, checkpoint.params, v, [step.lr], few)
    width = joined.change.entropy.shape[-1]
    assert torch.allclose(
        joined.change.entropy, whole.change.entropy[..., :width], rtol=1e-9, atol=1e-14
    )
