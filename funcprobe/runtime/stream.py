"""A function over the blocks of a batch: shared out, resumed, on a device, with a bar."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..calculus.tree import Params, tree_map
from ..language.batch import Batch, by_length
from .distributed import rank, sharded, share, world
from .memory import Room
from .resume import read, resumable, surroundings, write
from .serialize import fingerprint


@dataclass(frozen=True)
class Stream:
    """Where and how blocks are computed. The batch stays on the CPU, one block is on the device."""

    device: torch.device
    room: Room  # what a block may hold
    key: str  # the fingerprint of what every result depends on
    folder: Path | None = None  # of finished blocks
    group: Any = None  # of torch.distributed
    progress: bool = False

    def cut(
        self, batch: Batch, lanes: int = 1, *, reverse: bool = False
    ) -> tuple[list[Batch], Tensor]:
        """Blocks that hold what there is room for, all lanes counted, and their rows' order."""
        positions = self.room.reverse if reverse else self.room.forward
        return by_length(batch, tokens=max(positions // lanes, 1))

    def each(
        self, name: str, fn: Callable, blocks: list[Batch], *given, to: int | None = None
    ) -> list:
        """``[fn(block), ...]`` on the CPU; `given` is what `fn` depends on besides `key`.

        With `to`, only that rank gets them.
        """

        def on_device(block: Batch):
            return tree_map(_cpu, fn(block.to(self.device)))

        stored = resumable(on_device, self.folder, self._key(name, given))
        results = sharded(stored, blocks, self.group, to=to)
        return list(self._bar(results, name, len(blocks)))

    def total(self, name: str, fn: Callable, blocks: list[Batch], *given) -> Params:
        """``sum(fn(block))`` on every rank: in float64 and in the blocks' order.

        Both make it the same bits on any number of ranks. What is stored is the sum so far, so
        that one file is enough for whatever number of blocks.
        """
        names = [fingerprint(self._key(name, given), surroundings())]
        for block in blocks:
            names.append(fingerprint(names[-1], block))
        first, n = rank(self.group) == 0, world(self.group)
        stored = self.folder is not None and first
        done, so_far = share(self._latest(names) if stored else (0, {}), self.group)
        results = sharded(lambda block: fn(block.to(self.device)), blocks[done:], self.group)
        results = self._bar(results, name, len(blocks), done)
        for i, part in enumerate(results, done + 1):
            so_far = {
                key: so_far[key].to(g.device) + g if so_far else g.double().contiguous()
                for key, g in part.items()
            }
            if stored and ((i - done) % n == 0 or i == len(blocks)):
                write(self.folder, names[i], so_far)
                for old in names[1:i]:
                    (self.folder / f"{old}.safetensors").unlink(missing_ok=True)
        return so_far

    def _latest(self, names: list[str]) -> tuple[int, Params]:
        for i in range(len(names) - 1, 0, -1):
            found = read(self.folder, names[i])
            if found is not None:
                return i, found
        return 0, {}

    def _key(self, name: str, given: tuple) -> str:
        return fingerprint(self.key, name, *given)

    def _bar(self, results: Iterator, name: str, total: int, done: int = 0) -> Iterator:
        quiet = not self.progress or rank(self.group) > 0
        return tqdm(results, name, total=total, initial=done, disable=quiet)


def _cpu(leaf):
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf
