"""Finished blocks on disk: a run that is cut short goes on where it was, to the same bits."""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import peft
import torch
import transformers

from .serialize import decode, encode, fingerprint

_OURS = re.compile(r"[0-9a-f]{64}\.safetensors(\.\d+\.part)?")


def resumable(fn: Callable, folder: str | Path | None, key: str) -> Callable:
    """``fn(block)``, read from `folder` where it was finished before, else computed and written.

    A block's file is named by the hash of `key`, the block, this package's source, the versions of
    torch, transformers and peft, the processor and the number of threads: what decides the
    result's bits. It appears whole or not at all, and holds a hash of its content; one that does
    not match is computed again. So a result is bitwise that of a run without interruption, on a
    processor and wherever `fn` itself repeats.

    Args:
        fn: ``block -> tree`` of tensors; blocks and results as `encode` takes them.
        folder: made when the first block is written; None gives `fn` itself.
        key: the `fingerprint` of all that `fn` depends on besides its block.

    Returns:
        ``fn(block)``, its tensors on the CPU.

    >>> fn = lambda block: sweep(score, params, v, etas, block)              # doctest: +SKIP
    >>> key = fingerprint(model, params, base, v, etas)                      # doctest: +SKIP
    >>> blocks, order = by_length(batch, tokens=4096)                        # doctest: +SKIP
    >>> swept = join(map(resumable(fn, "blocks", key), blocks), order)       # doctest: +SKIP
    """
    if folder is None:
        return fn
    key = fingerprint(key, surroundings())

    def stored(block):
        name = fingerprint(key, block)
        found = read(folder, name)
        return write(folder, name, fn(block)) if found is None else found

    return stored


def read(folder: str | Path, name: str):
    """The tree stored by this name, or None if it is not there, whole and right."""
    try:
        tree, about = decode((Path(folder) / f"{name}.safetensors").read_bytes())
    except Exception:  # a torn or foreign file can fail in any way, and none is worth a run
        return None
    return tree if about == {"key": name, "sha256": fingerprint(tree)} else None


def write(folder: str | Path, name: str, tree):
    """Stores a tree by this name, whole or not at all; returns it as `read` would."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    data = encode(tree, key=name, sha256=fingerprint(tree))
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return decode(data)[0]


def discard(folder: str | Path) -> None:
    """Removes stored blocks, and the folder if nothing else is in it."""
    folder = Path(folder)
    for path in folder.glob("*.safetensors*"):
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # there is none, or it holds someone's files
        folder.rmdir()


def surroundings() -> list:
    """What decides the last bits of a result besides its inputs."""
    root, source = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source.update(f"{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
    versions = [torch.__version__, transformers.__version__, peft.__version__]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    processor = [torch.backends.cpu.get_cpu_capability(), cuda, torch.get_num_threads()]
    return [source.hexdigest(), *map(str, versions), *processor]
