"""Finished blocks on disk: an interrupted run continues where it was, with the same bits."""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
import transformers

from .files import write_atomically
from .serialize import decode, encode, fingerprint

Block = TypeVar("Block")
Result = TypeVar("Result")

# The names of the files that `write` leaves, and of the partial files on the way to them.
_STORED = re.compile(r"[0-9a-f]{64}\.safetensors(\.\d+\.part)?")


def resumable(
    fn: Callable[[Block], Result], folder: str | Path | None, key: str
) -> Callable[[Block], Result]:
    """``fn(block)``, read from `folder` if it was finished before, else computed and stored there.

    A block's file is named by the hash of everything that decides the result's bits: `key`, the
    block, this package's source, the versions of torch, transformers and peft, the processor and
    the number of threads. It appears whole or not at all, and holds a hash of its content. A block
    whose content does not match its hash is computed again. The result is therefore bitwise that of
    an uninterrupted run, on one processor and as far as `fn` itself repeats.

    Args:
        fn: ``block -> tree`` of tensors; blocks and results as `encode` takes them.
        folder: is made when the first block is written; None returns `fn` itself.
        key: the `fingerprint` of everything that `fn` depends on besides its block.

    Returns:
        A function of a block. Its result's tensors are on the CPU.

    >>> fn = lambda block: sweep(score, params, v, etas, block)              # doctest: +SKIP
    >>> key = fingerprint(model, params, base, v, etas)                      # doctest: +SKIP
    >>> blocks, order = by_length(batch, tokens=4096)                        # doctest: +SKIP
    >>> swept = join(map(resumable(fn, "blocks", key), blocks), order)       # doctest: +SKIP
    """
    if folder is None:
        return fn
    where, key = folder, fingerprint(key, surroundings())

    def stored(block: Block) -> Result:
        name = fingerprint(key, block)
        result: Result | None = read(where, name)
        return write(where, name, fn(block)) if result is None else result

    return stored


def read(folder: str | Path, name: str) -> Any:
    """The tree stored under this name; None if there is none, or if its file is damaged."""
    try:
        tree, about = decode((Path(folder) / f"{name}.safetensors").read_bytes())
    except Exception:  # a torn or foreign file can fail in any way, and the run must go on
        return None
    return tree if about == {"key": name, "sha256": fingerprint(tree)} else None


def write(folder: str | Path, name: str, tree: Any) -> Any:
    """Stores a tree under this name, whole or not at all; returns it as `read` would."""
    data = encode(tree, key=name, sha256=fingerprint(tree))
    write_atomically(Path(folder) / f"{name}.safetensors", data)
    return decode(data)[0]


def blocks_in(output: str | Path) -> Path:
    """The folder of an output's finished blocks. It is not made yet, but the output could be.

    Raises:
        OSError: it cannot be made.
    """
    output = Path(output)
    new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"a folder to write into was expected at {output}, but it cannot be made: "
            f"{error.strerror}. Likely a file has that name, or the place is not yours. Pass "
            "another output=."
        ) from error
    if new:
        with suppress(OSError):  # another process has written into it
            output.rmdir()
    return output / "blocks"


def discard(folder: str | Path) -> None:
    """Removes stored blocks, and the folder if nothing else is in it."""
    folder = Path(folder)
    for path in folder.glob("*.safetensors*"):
        if _STORED.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # the folder does not exist, or it holds other files
        folder.rmdir()


def surroundings() -> list[str | int]:
    """What decides the last bits of a result besides its inputs."""
    root, source = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source.update(f"{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
    versions = [torch.__version__, transformers.__version__, peft.__version__]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    processor = torch.backends.cpu.get_cpu_capability()
    return [source.hexdigest(), *map(str, versions), processor, cuda, torch.get_num_threads()]
