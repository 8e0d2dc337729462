"""The files of a checkpoint folder, and errors that say what is amiss and what to do."""

import json
import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

_SHARDS = ("global_step*", "optimizer_*", "pytorch_model_fsdp_*", "rank*-of-*", "optimizer.pt_*")
FRESH = "Or start AdamW from zero moments: optimizer='fresh', lr=."


def find(folder: Path, *names: str) -> Path:
    """The first of these files that the folder has."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    inner = [path.name for path in folder.glob("checkpoint-*")]
    shards = [path.name for pattern in _SHARDS for path in folder.glob(pattern)]
    fresh = f" {FRESH}" if "optimizer.pt" in names else ""
    if not folder.is_dir():
        found, cause, cure = "no such folder", "it is misspelt or a hub id", "Pass a local folder."
    elif inner:
        found, cause, cure = some(inner), "this is the run's folder", "Pass one of these." + fresh
    elif shards:
        found, cause = some(shards), "DeepSpeed or FSDP saved it sharded, which is not supported"
        cure = "Save the full state." + fresh
    else:
        found, cause = "none", "the run saved without it" + " (save_only_model)" * bool(fresh)
        cure = "Save it." + fresh
    claim = f"{' or '.join(names)} was expected in {folder}, found {found}"
    raise refusal(claim, cause, cure, FileNotFoundError)


def refusal(claim: str, cause: str, cure: str, kind: type = ValueError) -> Exception:
    """What was expected and what arrived; the likely cause; what to do."""
    return kind(f"load_checkpoint: {claim}. Likely {cause}. {cure}")


@contextmanager
def explained(claim: str, cause: str, cure: str):
    """Turns whatever a library raises within it into an error of ours."""
    try:
        yield
    except Exception as error:
        raise refusal(f"{claim}, found {brief(error)}", cause, cure) from error


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def brief(error: Exception) -> str:
    """An error's first line, with its type."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:  # torch would go on to advise weights_only=False
        return f"a reference to {code[1]}, which was not followed"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"


def some(names: Iterable) -> str:
    """At most five names, sorted."""
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"
