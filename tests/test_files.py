"""Files that appear whole or not at all."""

import os
from pathlib import Path

import pytest
import torch

from funcprobe.runtime import files, resume
from funcprobe.runtime.files import write_atomically


@pytest.fixture
def failing(monkeypatch):
    """A disk on which no file can take its final name."""

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", refuse)


def test_a_file_is_written_with_its_folder_and_replaced(tmp_path):
    path = tmp_path / "very" / "deep" / "file.txt"
    write_atomically(path, b"first")
    write_atomically(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, failing):
    (tmp_path / "file.txt").write_bytes(b"old")
    with pytest.raises(OSError, match="no space left: .*file.txt"):
        write_atomically(tmp_path / "file.txt", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_bytes() == b"old"


def test_the_data_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    steps, replace = [], os.replace
    monkeypatch.setattr(files.os, "fsync", lambda _: steps.append("fsync"))
    monkeypatch.setattr(
        files.os, "replace", lambda *names: (steps.append("replace"), replace(*names))
    )
    resume.write(tmp_path, "a" * 64, torch.ones(2))
    assert steps == ["fsync", "replace"]
    assert torch.equal(resume.read(tmp_path, "a" * 64), torch.ones(2))


def test_partial_files_of_killed_runs_are_discarded(tmp_path, failing, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # as where the process is killed
    with pytest.raises(OSError, match="no space left"):
        resume.write(tmp_path / "blocks", "a" * 64, torch.ones(2))
    monkeypatch.undo()
    assert len(list((tmp_path / "blocks").iterdir())) == 1
    resume.discard(tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()
