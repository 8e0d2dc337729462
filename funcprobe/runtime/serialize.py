"""Trees of tensors as bytes, for disks and other processes, and their fingerprints."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..calculus.line import Sweep
from ..calculus.tree import Params, Terms
from ..language.batch import Batch
from ..language.model.split import Model
from ..language.score import Readings, Scores

_PLAIN = (str, int, float, bool, type(None))
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple}
# The named tuples that a tree may hold, by the name under which they are written.
_TUPLES: dict[str, type] = {cls.__name__: cls for cls in (Batch, Readings, Scores, Sweep)}


def encode(tree: Any, **about: str) -> bytes:
    """A tree of tensors and plain values as a safetensors file, with notes about it.

    Trees consist of dicts, lists, tuples, `Terms` and this package's named tuples. Every bit
    survives.

    Raises:
        ValueError: the tree holds something else.

    >>> decode(encode({"a": (torch.ones(2), "text")}, key="k"))
    ({'a': (tensor([1., 1.]), 'text')}, {'key': 'k'})
    """
    structure = json.dumps(_structure(tree))
    leaves = {str(i): t.detach().cpu().clone().contiguous() for i, t in enumerate(_tensors(tree))}
    return save(leaves, about | {"structure": structure})


def decode(data: bytes) -> tuple[Any, dict[str, str]]:
    """The tree, on the CPU, and the notes that `encode` was given."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = header["__metadata__"]
    leaves = load(data)
    structure = json.loads(about.pop("structure"))
    return _tree(structure, iter([leaves[str(i)] for i in range(len(leaves))])), about


def checksum(tensors: Params) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(*things: Any) -> str:
    """SHA-256 over anything a result depends on: trees of tensors, plain values, models.

    A `Model` counts by its structure: the classes of its parts and their plain attributes, such as
    LoRA's scalings and the norms' eps. It holds no weights, so pass its params and base too.

    Raises:
        ValueError: something without a fingerprint that every process would agree on.

    >>> fingerprint({"a": torch.ones(2)}, 1e-3) == fingerprint({"a": torch.ones(2)}, 1e-3)
    True
    >>> fingerprint({"a": torch.ones(2)}) == fingerprint({"a": torch.ones(2).double()})
    False
    """
    trees = [_settings(thing.skeleton) if isinstance(thing, Model) else thing for thing in things]
    structure = json.dumps(_structure(trees))
    leaves = checksum({f"{i:09d}": tensor for i, tensor in enumerate(_tensors(trees))})
    return hashlib.sha256(f"{structure} {leaves}".encode()).hexdigest()


class _Node(NamedTuple):
    """A container taken apart."""

    type: str
    keys: list[str]  # of a dict; empty otherwise
    items: Sequence[Any]


def _open(node: Any) -> _Node:
    """Takes a container apart; raises ValueError if it is none that could be put together again."""
    name = type(node).__name__
    if isinstance(node, dict) and all(isinstance(key, str) for key in node):
        return _Node("dict", list(node), list(node.values()))
    if isinstance(node, Terms):
        return _Node("Terms", [], [node.row_hashes, *node])
    if isinstance(node, list | tuple) and (_SEQUENCES | _TUPLES).get(name) is type(node):
        return _Node(name, [], list(node))
    raise ValueError(
        "blocks: tensors, numbers, strings, dicts with names, lists, tuples, Terms and "
        f"{', '.join(_TUPLES)} were expected, but a {name} arrived, which no other process could "
        "read back. Use a dict."
    )


def _structure(node: Any) -> dict[str, Any]:
    """What JSON can hold of a tree: everything but its tensors, whose places it marks."""
    if isinstance(node, Tensor):
        return {"tensor": None}
    if isinstance(node, _PLAIN):
        return {"plain": node}
    name, keys, items = _open(node)
    structures = [_structure(item) for item in items]
    return {name: [keys, structures] if name == "dict" else structures}


def _tensors(node: Any) -> Iterator[Tensor]:
    """The tensors of a tree, in the order of its structure."""
    if isinstance(node, Tensor):
        yield node
    elif not isinstance(node, _PLAIN):
        for item in _open(node).items:
            yield from _tensors(item)


def _tree(structure: dict[str, Any], tensors: Iterator[Tensor]) -> Any:
    """The tree of this structure, with the next tensors in its marked places."""
    ((name, content),) = structure.items()
    if name == "tensor":
        return next(tensors)
    if name == "plain":
        return content
    if name == "dict":
        keys, structures = content
        return dict(zip(keys, [_tree(item, tensors) for item in structures], strict=True))
    items = [_tree(item, tensors) for item in content]
    if name == "Terms":
        return Terms(items[1:], items[0])
    return _TUPLES[name](*items) if name in _TUPLES else _SEQUENCES[name](items)


def _settings(module: nn.Module) -> list[Any]:
    """What a module computes besides its tensors, as far as plain values say it."""
    parts = [
        [name, type(part).__qualname__, _plain(vars(part).items())]
        for name, part in module.named_modules()
    ]
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return [*parts, _plain(item for item in settings.items() if item[0] != "_name_or_path")]


def _plain(items: Iterable[tuple[Any, Any]]) -> list[Any]:
    """The items whose values are plain, or dicts, lists and tuples of plain ones."""
    kept = []
    for key, value in items:
        if isinstance(value, dict):
            kept.append([str(key), _plain(value.items())])
        elif isinstance(value, list | tuple):
            kept.append([str(key), _plain(enumerate(value))])
        elif type(value) in _PLAIN:
            kept.append([str(key), value])
    return kept
