"""Functions over blocks: mapped in order, summed in float64, and continued where they stopped."""

import cases
import pytest
import torch

from funcprobe.runtime.memory import Room
from funcprobe.runtime.stream import Stream


@pytest.fixture
def stream(tmp_path):
    return Stream(torch.device("cpu"), Room(20, 10, None), "key", tmp_path / "blocks")


def sizes(block):
    return {"rows": torch.tensor(float(len(block.tokens))), "tokens": block.tokens.float().sum()}


class Interrupted:
    """A function that stops the run at its n-th call."""

    def __init__(self, fn, calls):
        self.fn, self.calls, self.taken = fn, calls, []

    def __call__(self, block):
        if len(self.taken) == self.calls:
            raise KeyboardInterrupt
        self.taken.append(block)
        return self.fn(block)


def test_blocks_fit_into_the_room_and_gradients_into_half_of_it(stream):
    batch = cases.batch()
    for blocks, order in (stream.cut(batch), stream.cut(batch, 2), stream.cut(batch, reverse=True)):
        assert sorted(order.tolist()) == list(range(len(batch.tokens)))
        assert len(blocks) > 1
    assert all(b.tokens.numel() <= 20 or len(b.tokens) == 1 for b in stream.cut(batch)[0])
    halves = zip(stream.cut(batch, 2)[0], stream.cut(batch, reverse=True)[0], strict=True)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in halves)


def test_results_come_in_the_blocks_order(stream):
    blocks, _ = stream.cut(cases.batch())
    results = stream.map("sizes", sizes, blocks)
    assert [result["rows"] for result in results] == [len(block.tokens) for block in blocks]


def test_a_sum_continues_after_the_last_block_and_keeps_one_file(stream):
    blocks, _ = stream.cut(cases.batch())
    whole = Stream(stream.device, stream.room, "key").total("sum", sizes, blocks)
    with pytest.raises(KeyboardInterrupt):
        stream.total("sum", Interrupted(sizes, 2), blocks)
    assert len(list(stream.folder.iterdir())) == 1
    rest = Interrupted(sizes, len(blocks))
    total = stream.total("sum", rest, blocks)
    assert len(rest.taken) == len(blocks) - 2
    assert len(list(stream.folder.iterdir())) == 1
    for name, value in whole.items():
        assert value.dtype == torch.float64 and torch.equal(value, total[name])
    assert total["rows"] == len(cases.batch().tokens)
    again = Interrupted(sizes, 0)
    assert torch.equal(stream.total("sum", again, blocks)["tokens"], whole["tokens"])


def test_other_inputs_start_another_sum(stream):
    blocks, _ = stream.cut(cases.batch())
    stream.total("sum", sizes, blocks, "grpo")
    with pytest.raises(KeyboardInterrupt):
        stream.total("sum", Interrupted(sizes, 0), blocks, "rloo")


def test_a_stream_prints_in_a_few_lines(stream):
    assert (
        len(repr(stream)) < 500 and repr(stream.room) == "Room(forward=20, reverse=10, free=None)"
    )
