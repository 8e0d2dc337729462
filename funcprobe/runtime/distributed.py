"""Blocks divided among the processes of torch.distributed, their results put back in order."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .serialize import decode, encode

Block = TypeVar("Block")
Result = TypeVar("Result")
Group = dist.ProcessGroup | None  # None is this process alone

# How long a rank waits for one that hangs. It notices at once when one ends.
_TIMEOUT = timedelta(minutes=15)


class Elsewhere(RuntimeError):
    """Another rank failed; the message says which, and why."""


def rank(group: Group) -> int:
    """This process's place in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def world(group: Group) -> int:
    """How many processes the group has; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def sharded(
    fn: Callable[[Block], Result],
    blocks: Sequence[Block],
    group: Group = None,
    *,
    to: int | None = None,
) -> Iterator[Result]:
    """``map(fn, blocks)``, with the blocks divided among the ranks of a process group.

    Of W ranks, rank r computes blocks r, r + W, ...: its share depends on W alone, and the shares
    are even where blocks are sorted by length. A block's result does not depend on W, and results
    come in the order of the blocks. Whatever is made of them therefore has the same bits for every
    W, on the same processors with as many threads each.

    The ranks proceed in rounds of W blocks. A rank holds at most one round of unrequested results.
    Every rank must iterate to the end.

    Args:
        fn: ``block -> tree``, as `encode` takes it.
        blocks: the same on every rank.
        group: of torch.distributed, ``dist.group.WORLD`` for instance; None is this process alone.
        to: the only rank that gets results; None gives all of them to every rank.

    Returns:
        An iterator of results, on the CPU where they come from several ranks.

    Raises:
        Elsewhere: `fn` raised on another rank. On that rank, its own error is raised.
        RuntimeError: a rank has ended.
    """
    if world(group) == 1:
        yield from map(fn, blocks)
        return
    here, ranks = rank(group), world(group)
    for start in range(0, len(blocks), ranks):
        turn = blocks[start : start + ranks]
        data, error = _compute(fn, turn[here : here + 1])
        sizes = _sizes(data, error, group)
        for source in range(len(turn)):
            received = _send(data, sizes[source], source, to, group)
            if to in (None, here):
                yield decode(received)[0]


def share(tree: Any, group: Group = None) -> Any:
    """Rank 0's tree, on every rank."""
    if world(group) == 1:
        return tree
    data = encode(tree) if rank(group) == 0 else b""
    return decode(_send(data, _exchange(len(data), group)[0], 0, None, group))[0]


def agree(what: str, value: str, group: Group = None) -> None:
    """Raises ValueError unless every rank has the same value; waits for all of them."""
    values = [value] if world(group) == 1 else _exchange(value, group)
    others = [i for i, other in enumerate(values) if other != values[0]]
    if others:
        raise ValueError(
            f"sharded: the same {what} were expected on every rank, but those of rank "
            f"{', '.join(map(str, others[:5]))} differ from rank 0's. Likely the hosts have "
            "different files. Copy them from one host to the others."
        )


@contextmanager
def together(device: str) -> Iterator[tuple[Group, Callable[[], bool]]]:
    """Joins the processes that torchrun started, for the scope: Gloo on a CPU, NCCL on GPUs.

    Yields the group, None outside torchrun, and a function that is True for the first process to
    call it, which may then speak for all of them.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield None, lambda: True
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, here, ranks = next(rendezvous("env://", timeout=_TIMEOUT))
    # Messages between ranks go through Gloo, which notices at once when a rank ends; NCCL carries
    # the tensors.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=here, world_size=ranks, timeout=_TIMEOUT)
    yield dist.group.WORLD, lambda: _first(store)
    # After an error this is not reached: destroying the group could wait for ranks that are gone.
    dist.destroy_process_group()


def _first(store: Any) -> bool:
    try:
        return store.add("funcprobe said what went wrong", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True


@contextmanager
def _noticing() -> Iterator[None]:
    """Says plainly what torch raises when a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "sharded: every rank was expected to continue, but one ended without a word. Likely it "
            "was killed, or its memory was full. Run the same command again: it continues from the "
            "blocks that were stored."
        ) from error


def _compute(fn: Callable[[Block], Any], mine: Sequence[Block]) -> tuple[bytes, Exception | None]:
    """The result of this rank's block, if it has one in this round, or the error it raised."""
    try:
        return b"".join(encode(fn(block)) for block in mine), None
    except Exception as error:
        return b"", error


def _exchange(value: Any, group: Group) -> list[Any]:
    """The values of all ranks, on every rank."""
    values = [None] * world(group)
    with _noticing():
        dist.all_gather_object(values, value, group=group)
    return values


def _sizes(data: bytes, error: Exception | None, group: Group) -> list[int]:
    """How many bytes each rank has to send; raises on every rank if one had an error."""
    failure = None if error is None else f"{type(error).__name__}: {error}"
    values = _exchange((len(data), failure), group)
    if error is not None:
        raise error
    for other, (_, message) in enumerate(values):
        if message is not None:
            raise Elsewhere(f"rank {other} failed: {message}")
    return [size for size, _ in values]


def _send(data: bytes, size: int, source: int, to: int | None, group: Group) -> bytes:
    """The bytes of rank `source`, on rank `to`, or on every rank where `to` is None."""
    here = rank(group)
    if source == to or here not in (source, *(range(world(group)) if to is None else [to])):
        return data
    # NCCL only carries tensors that are on a GPU.
    nccl = "nccl" in dist.get_backend_config(group)
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    if here == source:
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    else:
        flat = torch.empty(size, dtype=torch.uint8, device=device)
    with _noticing():
        if to is None:
            dist.broadcast(flat, group_src=source, group=group)
        elif here == source:
            dist.send(flat, group_dst=to, group=group)
        else:
            dist.recv(flat, group_src=source, group=group)
    return data if here == source else flat.cpu().numpy().tobytes()
