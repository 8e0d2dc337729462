"""Trees of tensors as bytes, for disks and other processes, and their fingerprints."""

import hashlib
import json
from collections.abc import Iterable

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..calculus.line import Sweep
from ..calculus.tree import Params
from ..language.batch import Batch
from ..language.model.split import Model
from ..language.score import Readings, Scores

_KINDS = {kind.__name__: kind for kind in (Batch, Readings, Scores, Sweep)}
_PLAIN = (str, int, float, bool, type(None))


def encode(tree, **about: str) -> bytes:
    """A tree of tensors and plain values as a safetensors file, with notes about it.

    Trees are dicts, lists, tuples and this package's named tuples. Every bit survives.

    Raises:
        ValueError: something else is in the tree.

    >>> decode(encode({"a": (torch.ones(2), "text")}, key="k"))
    ({'a': (tensor([1., 1.]), 'text')}, {'key': 'k'})
    """
    structure, tensors = _pack(tree)
    leaves = {str(i): t.detach().cpu().clone().contiguous() for i, t in enumerate(tensors)}
    return save(leaves, about | {"structure": json.dumps(structure)})


def decode(data: bytes) -> tuple[object, dict[str, str]]:
    """The tree, on the CPU, and the notes that `encode` was given."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = header["__metadata__"]
    leaves = load(data)
    tree = _unpack(json.loads(about.pop("structure")), [leaves[str(i)] for i in range(len(leaves))])
    return tree, about


def checksum(tensors: Params) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(*things) -> str:
    """SHA-256 over anything a result depends on: trees of tensors, plain values, models.

    A `Model` counts by its structure: the classes of its parts and their plain attributes, LoRA's
    scalings and the norms' eps among them. It holds no weight: give its params and base too.

    Raises:
        ValueError: something without a fingerprint that every process would agree on.

    >>> fingerprint({"a": torch.ones(2)}, 1e-3) == fingerprint({"a": torch.ones(2)}, 1e-3)
    True
    >>> fingerprint({"a": torch.ones(2)}) == fingerprint({"a": torch.ones(2).double()})
    False
    """
    things = [_structure(each.skeleton) if isinstance(each, Model) else each for each in things]
    structure, tensors = _pack(things)
    leaves = checksum({f"{i:09d}": t for i, t in enumerate(tensors)})
    return hashlib.sha256(f"{json.dumps(structure)} {leaves}".encode()).hexdigest()


def _pack(tree) -> tuple[object, list[Tensor]]:
    """What JSON can hold of a tree, and its tensors."""
    tensors: list[Tensor] = []

    def take(node):
        if isinstance(node, Tensor):
            tensors.append(node)
            return {"tensor": len(tensors) - 1}
        if isinstance(node, _PLAIN):
            return {"plain": node}
        if isinstance(node, dict) and all(isinstance(key, str) for key in node):
            return {"dict": [[key, take(value)] for key, value in node.items()]}
        kind = type(node).__name__
        if type(node) in (list, tuple) or _KINDS.get(kind) is type(node):
            return {kind: [take(value) for value in node]}
        raise ValueError(
            f"blocks: dicts, lists, tuples, {', '.join(_KINDS)}, tensors, numbers and strings were "
            f"expected, found a {kind}, which no other process could read back. Use a dict."
        )

    return take(tree), tensors


def _unpack(structure, tensors: list[Tensor]):
    (kind, value), *more = structure.items()
    if more:
        raise ValueError("blocks: this is not the structure of a tree.")
    if kind == "tensor":
        return tensors[value]
    if kind == "plain":
        return value
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value}
    items = [_unpack(item, tensors) for item in value]
    if kind in _KINDS:
        return _KINDS[kind](*items)
    return {"list": list, "tuple": tuple}[kind](items)


def _structure(module: nn.Module) -> list:
    """What a module computes besides its tensors, as far as plain values say it."""
    parts = [
        [name, type(part).__qualname__, _plain(vars(part).items())]
        for name, part in module.named_modules()
    ]
    config = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return [*parts, _plain(item for item in settings.items() if item[0] != "_name_or_path")]


def _plain(items: Iterable) -> list:
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
