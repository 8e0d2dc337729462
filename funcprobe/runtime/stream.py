"""Runs a function over the blocks of a batch: distributed, resumable, with progress."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..calculus.tree import Params, tree_map
from ..language.batch import Batch, by_length
from .distributed import Group, rank, sharded, share, world
from .memory import Room
from .resume import read, resumable, surroundings, write
from .serialize import fingerprint

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stream:
    """Where and how blocks are computed. The batch stays on the CPU; the device holds one block."""

    device: torch.device
    room: Room  # what a block may hold
    key: str  # the fingerprint of everything that all results depend on
    folder: Path | None = None  # of finished blocks; None stores nothing
    group: Group = None  # of torch.distributed
    progress: bool = False

    def cut(
        self, batch: Batch, lanes: int = 1, *, reverse: bool = False
    ) -> tuple[list[Batch], Tensor]:
        """The batch in blocks that fit the room, and the original row [N] of each of their rows.

        Args:
            batch: on the CPU.
            lanes: parameter points that are computed at once, all of which count.
            reverse: the blocks are for gradients.
        """
        positions = self.room.reverse if reverse else self.room.forward
        return by_length(batch, tokens=max(positions // lanes, 1))

    def map(
        self,
        name: str,
        fn: Callable[[Batch], Result],
        blocks: list[Batch],
        *inputs: Any,
        to: int | None = None,
    ) -> list[Result]:
        """``[fn(block), ...]``, on the CPU.

        Args:
            name: of the computation, for its bar and its stored blocks.
            fn: ``block -> tree`` of tensors.
            blocks: from `cut`.
            inputs: what `fn` depends on besides `key`.
            to: the only rank that gets the results; None gives them to every rank.
        """

        def on_device(block: Batch) -> Result:
            return tree_map(_cpu, fn(block.to(self.device)))

        stored = resumable(on_device, self.folder, self._key(name, inputs))
        results = sharded(stored, blocks, self.group, to=to)
        return list(self._bar(results, name, len(blocks)))

    def total(
        self, name: str, fn: Callable[[Batch], Params], blocks: list[Batch], *inputs: Any
    ) -> Params:
        """``sum(fn(block))`` on every rank, in float64 and in the blocks' order.

        It therefore has the same bits on any number of ranks. What is stored is the sum so far, so
        one file is enough however many blocks there are. The arguments are those of `map`.
        """
        names = self._names_of_sums(name, blocks, inputs)
        folder = self.folder if rank(self.group) == 0 else None
        done, total = share(_resume_point(folder, names), self.group)
        parts = sharded(lambda block: fn(block.to(self.device)), blocks[done:], self.group)
        ranks, unstored = world(self.group), 0
        for part in self._bar(parts, name, len(blocks), done):
            total, done, unstored = _accumulate(total, part), done + 1, unstored + 1
            if folder is not None and (unstored == ranks or done == len(blocks)):
                _store_sum(folder, names, done, total)
                unstored = 0
        return total

    def _names_of_sums(self, name: str, blocks: list[Batch], inputs: tuple[Any, ...]) -> list[str]:
        """The names under which the sums of the first 0, 1, ... blocks are stored."""
        names = [fingerprint(self._key(name, inputs), surroundings())]
        for block in blocks:
            names.append(fingerprint(names[-1], block))
        return names

    def _key(self, name: str, inputs: tuple[Any, ...]) -> str:
        return fingerprint(self.key, name, *inputs)

    def _bar(
        self, results: Iterator[Result], name: str, total: int, done: int = 0
    ) -> Iterator[Result]:
        quiet = not self.progress or rank(self.group) > 0
        return iter(tqdm(results, name, total=total, initial=done, disable=quiet))


def _resume_point(folder: Path | None, names: list[str]) -> tuple[int, Params]:
    """How many blocks the latest stored sum holds, and that sum; 0 and nothing if there is none."""
    if folder is not None:
        for done in range(len(names) - 1, 0, -1):
            total = read(folder, names[done])
            if total is not None:
                return done, total
    return 0, {}


def _accumulate(total: Params, part: Params) -> Params:
    """``total + part`` in float64, on the device of `part`; an empty total is zero."""
    if not total:
        return {name: g.double().contiguous() for name, g in part.items()}
    return {name: total[name].to(g.device) + g for name, g in part.items()}


def _store_sum(folder: Path, names: list[str], done: int, total: Params) -> None:
    """Stores the sum of `done` blocks, then removes those of fewer."""
    write(folder, names[done], total)
    for name in names[1:done]:
        (folder / f"{name}.safetensors").unlink(missing_ok=True)


def _cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf
