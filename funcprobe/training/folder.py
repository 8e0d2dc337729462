"""The files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from .refusal import FRESH, explained, listed, refusal

_SHARDS = ("global_step*", "optimizer_*", "pytorch_model_fsdp_*", "rank*-of-*", "optimizer.pt_*")


def find_file(folder: Path, *names: str) -> Path:
    """The first of these files that the folder has.

    Raises:
        FileNotFoundError: it has none of them; the message says what the folder seems to be.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    optimizer = "optimizer.pt" in names
    held, cause, cure = _diagnose(folder, optimizer)
    if optimizer and folder.is_dir():
        cure = f"{cure} {FRESH}"
    claim = f"{' or '.join(names)} was expected in {folder}, found {held}"
    raise refusal(claim, cause, cure, FileNotFoundError)


def _diagnose(folder: Path, optimizer: bool) -> tuple[str, str, str]:
    """What a folder holds instead of a file that it lacks, the likely cause and the cure.

    `optimizer` says whether the file is the optimizer's.
    """
    if folder.is_file():
        return "a file", "two arguments were swapped", "Pass the checkpoint's folder."
    if not folder.is_dir():
        return "no such folder", "it is misspelt or a hub id", "Pass a local folder."
    checkpoints = [path.name for path in folder.glob("checkpoint-*")]
    if checkpoints:
        return listed(checkpoints), "this is the run's folder", "Pass one of these."
    shards = [path.name for pattern in _SHARDS for path in folder.glob(pattern)]
    if shards:
        cause = "DeepSpeed or FSDP saved it sharded, which is not supported"
        return listed(shards), cause, "Save the full state."
    return "none", "the run saved without it" + " (save_only_model)" * optimizer, "Save it."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file holds anything else.
    """
    claim, cause = f"a JSON object was expected in {path}", "the file is damaged"
    cure = "Use another copy."
    with explained(claim, cause, cure):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise refusal(f"{claim}, found a {type(content).__name__}", cause, cure)
    return content
