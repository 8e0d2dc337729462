"""Where memory runs out: smaller blocks, the same numbers, and a word about it."""

import importlib
from types import SimpleNamespace

import cases
import pytest
import torch

import funcprobe as fp
from funcprobe.runtime.memory import positions, room

MESSAGES = (
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ...",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
)


def limited(fn, most, message=MESSAGES[0]):
    """`fn` on a machine that holds `most` rows times lanes; `calls` are the sizes that it held."""
    calls = []

    def run(params, batch):
        p = next(iter(params.values()))
        lanes = torch.func.debug_unwrap(getattr(p, "d", p)).shape[0] if wrapped(p) else 1
        if len(batch.tokens) * lanes > most:
            kind = torch.OutOfMemoryError if "CUDA" in message else RuntimeError
            raise kind(message)
        calls.append((len(batch.tokens), lanes))
        return fn(params, batch)

    run.separable = True
    return run, calls


def wrapped(p):
    p = getattr(p, "d", p)
    return torch.func.debug_unwrap(p) is not p


@pytest.fixture
def setting():
    case = cases.case()
    return fp.scorer(case.model, case.base), case.params, cases.batch()


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("change", ["direct", "increment"])
def test_a_sweep_halves_rows_and_says_so(setting, change, message):
    score, params, batch = setting
    v, etas = cases.direction(params), [0.0, 1e-3, 0.1]
    options = dict(change=change, rows=8, lanes=4)
    whole = fp.sweep(score, params, v, etas, batch, **options)
    run, calls = limited(score, 12, message)
    with pytest.warns(UserWarning) as warned:
        small = fp.sweep(run, params, v, etas, batch, **options)
    assert calls == [(2, 4)] * 4
    assert str(warned[0].message).endswith(f"computed again at 4 x 4: {message}")
    assert len(small.shrunk) == 3 and small.shrunk[0].startswith("out of memory at 8 x 4")
    assert whole.shrunk == () and fp.join([small, whole]).shrunk == small.shrunk
    for a, b in zip((*small.base, *small.change), (*whole.base, *whole.change), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert all((x[0] == 0).all() for x in small.change)


@pytest.mark.parametrize("change", ["direct", "increment"])
def test_lanes_are_halved_after_rows(setting, change):
    score, params, batch = setting
    v, etas = cases.direction(params), [0.0, 1e-3, 0.0, 0.1, 0.2]
    whole = fp.sweep(score, params, v, etas, batch, change=change)
    run, calls = limited(score, 4 if change == "direct" else 2)
    with pytest.warns(UserWarning):
        small = fp.sweep(run, params, v, etas, batch, change=change, rows=2, lanes=8)
    most = 4 if change == "direct" else 2
    assert {rows for rows, _ in calls} == {1} and max(lanes for _, lanes in calls) == most
    assert any("1 x 8" in note and "1 x 4" in note for note in small.shrunk)
    for a, b in zip(small.change, whole.change, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        assert (a[0] == 0).all() and (a[2] == 0).all()


def test_values_and_gradients_halve_too(setting):
    score, params, batch = setting
    run, calls = limited(score, 3)
    with pytest.warns(UserWarning):
        values = fp.evaluate(run, params, batch, rows=8)
    assert calls == [(2, 1)] * 4
    for a, b in zip(values, fp.evaluate(score, params, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    with pytest.warns(UserWarning):
        grads = fp.gradient(run, params, batch, rows=8)
    whole = fp.gradient(score, params, batch)
    for n, g in grads.items():
        torch.testing.assert_close(g, whole[n], rtol=1e-10, atol=1e-12)


def test_one_row_that_does_not_fit_is_an_error(setting):
    score, params, batch = setting
    run, _ = limited(score, 0)
    v = cases.direction(params)
    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="one row at one parameter"):
        fp.sweep(run, params, v, [0.1], batch)


def test_another_error_passes(setting):
    score, params, batch = setting
    run, calls = limited(score, 0, "size mismatch")
    with pytest.raises(RuntimeError, match="size mismatch"):
        fp.evaluate(run, params, batch)
    assert calls == []


# The budget


SIZES = SimpleNamespace(
    hidden_size=100, intermediate_size=300, num_hidden_layers=10, num_attention_heads=4
)


def test_the_budget_is_the_estimate_by_hand():
    one = 4 * (800 + 1200 + 8 * 50)  # bytes of a position in a layer
    free = 2 * 3 * one * 600  # half of it holds 600 positions forward, 600 * 3 / 20 = 90 in reverse
    assert positions(SIZES, free, 4, 50, most=16384) == (512, 64, free)
    assert positions(SIZES, free, 8, 50, most=16384)[:2] == (256, 32)
    assert positions(SIZES, 100 * free, 4, 50, most=128)[:2] == (128, 128)
    assert positions(SIZES, 1, 4, 50, most=128)[:2] == (1, 1)
    assert positions(SIZES, int(1.2 * free), 4, 50, most=16384)[:2] == (512, 64)


def test_on_a_cpu_the_budget_is_the_default():
    assert room(SIZES, {"a": torch.zeros(1)}, 50) == (1024, 512, None)


def test_the_report_holds_the_budget(checkpoint, update, evaluation):
    report = fp.probe(checkpoint, update, evaluation.rows(slice(0, 64)), [0.0, 1e-3], tokens=600)
    assert report.about.block_positions == (600, 300, None)


def test_the_report_says_that_memory_ran_out(checkpoint, update, evaluation, monkeypatch):
    probe_module = importlib.import_module("funcprobe.study.probe")
    join = probe_module.join

    def short(parts, order=None):
        joined = join(parts, order)
        if isinstance(joined, fp.Sweep):
            return joined._replace(shrunk=("out of memory at 8 x 4",))
        return joined

    monkeypatch.setattr(probe_module, "join", short)
    report = fp.probe(checkpoint, update, evaluation.rows(slice(0, 64)), [0.0, 1e-3])
    assert any("memory ran out 1 times" in flag and "8 x 4" in flag for flag in report.flags)
