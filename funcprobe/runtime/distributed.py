"""Blocks shared out over the processes of torch.distributed, their results put back in order."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .serialize import decode, encode

# For a rank that hangs; one that ends is noticed at once.
_PATIENCE = timedelta(minutes=15)


class Elsewhere(RuntimeError):
    """Another rank failed; the message says which, and why."""


def rank(group) -> int:
    """This process's place in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def world(group) -> int:
    """How many processes the group has; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def sharded(fn: Callable, blocks: Sequence, group=None, *, to: int | None = None) -> Iterator:
    """``map(fn, blocks)``, shared out over the ranks of a process group.

    Rank r of N computes blocks r, r + N, ...: a share that depends on nothing but N, and an even
    one where blocks are sorted by length. What a block's result is does not depend on N, and
    results come in the order of the blocks; so whatever is made of them has the same bits for
    every N, on the same processors with as many threads each.

    It goes by rounds of N blocks, so that no rank holds more than a round's results that it did
    not ask for. Every rank must iterate it to its end.

    Args:
        fn: ``block -> tree``, as `encode` takes it.
        blocks: the same on every rank.
        group: of torch.distributed, ``dist.group.WORLD`` for instance; None is this process alone.
        to: the one rank that gets results, the others get none; None gives all of them to all.

    Returns:
        An iterator of results, on the CPU where they come from several ranks.

    Raises:
        Elsewhere: another rank's `fn` raised; on that rank, what it raised.
        RuntimeError: a rank is gone.
    """
    if world(group) == 1:
        yield from map(fn, blocks)
        return
    here, n = rank(group), world(group)
    for start in range(0, len(blocks), n):
        mine, data, error = start + here, b"", None
        if mine < len(blocks):
            try:
                data = encode(fn(blocks[mine]))
            except Exception as raised:
                error = raised
        sizes = _sizes(data, error, group)
        for owner in range(min(n, len(blocks) - start)):
            got = _send(data, sizes[owner], owner, to, group)
            if to in (None, here):
                yield decode(got)[0]


def share(tree, group=None):
    """Rank 0's tree, on every rank."""
    if world(group) == 1:
        return tree
    data = encode(tree) if rank(group) == 0 else b""
    return decode(_send(data, _exchange(len(data), group)[0], 0, None, group))[0]


def agree(what: str, value: str, group=None) -> None:
    """Raises ValueError unless every rank has the same value; waits for all of them."""
    values = [value] if world(group) == 1 else _exchange(value, group)
    others = [i for i, other in enumerate(values) if other != values[0]]
    if others:
        raise ValueError(
            f"sharded: the same {what} were expected on every rank, those of rank "
            f"{', '.join(map(str, others[:5]))} differ from rank 0's. Likely the hosts have other "
            "files. Copy them."
        )


@contextmanager
def together(device: str) -> Iterator[tuple]:
    """Joins the processes that torchrun started, for the scope: Gloo on a CPU, NCCL on GPUs.

    Yields the group, None outside torchrun, and a function that is True for the first process to
    call it: the one that speaks for all.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield None, lambda: True
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, here, n = next(dist.rendezvous("env://", timeout=_PATIENCE))
    # What ranks say goes by Gloo, which notices at once where one ends; NCCL takes the tensors.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=here, world_size=n, timeout=_PATIENCE)
    yield dist.group.WORLD, lambda: _first(store)
    dist.destroy_process_group()  # not where something failed: that could wait for those gone


def _first(store) -> bool:
    try:
        return store.add("funcprobe said what went wrong", 1) == 1
    except RuntimeError:  # who kept the store is gone
        return True


@contextmanager
def _noticing() -> Iterator[None]:
    """What torch raises where a rank is gone, said plainly."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "sharded: every rank was expected to go on, one ended without a word. Likely it was "
            "killed, or its memory was full. Stored blocks are kept: the same call goes on."
        ) from error


def _exchange(value, group) -> list:
    values = [None] * world(group)
    with _noticing():
        dist.all_gather_object(values, value, group=group)
    return values


def _sizes(data: bytes, error: Exception | None, group) -> list[int]:
    """How many bytes each rank has to send; raises on every rank if one had an error."""
    said = None if error is None else f"{type(error).__name__}: {error}"
    values = _exchange((len(data), said), group)
    if error is not None:
        raise error
    for other, (_, message) in enumerate(values):
        if message is not None:
            raise Elsewhere(f"rank {other} failed: {message}")
    return [size for size, _ in values]


def _send(data: bytes, size: int, source: int, to: int | None, group) -> bytes:
    """The source's bytes, on rank `to` or everywhere."""
    here = rank(group)
    if source == to or here not in (source, *(range(world(group)) if to is None else [to])):
        return data
    # NCCL knows GPUs alone.
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
