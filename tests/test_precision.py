"""The process's precision flags: right inside for every thread, restored by the last one out."""

import threading

import pytest
import torch

import funcprobe as fp
from funcprobe.calculus.precision import _read, exact, products

WAIT = 20.0  # seconds after which a test that hangs fails


@pytest.fixture(autouse=True)
def callers():
    """A caller whose own settings are not the exact ones; they must be back at the end."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    before = _read()
    yield before
    after = _read()
    torch.set_float32_matmul_precision("highest")
    assert after == before


def is_exact():
    flags = _read()
    return set(flags.products) == {"ieee"} and not any(flags.reductions)


def in_threads(*targets):
    """Runs each function in a thread of its own; an error in one is raised here."""
    errors = []

    def run(target):
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def wait(event):
    assert event.wait(WAIT)


def test_scopes_nest_within_a_thread(callers):
    with exact():
        assert is_exact()
        with exact(alone=True), products("tf32"):
            assert set(_read().products) == {"tf32"}
            with exact():
                assert is_exact()
            assert set(_read().products) == {"tf32"}
        assert is_exact()
    assert _read() == callers
    with products("tf32"):
        with exact():
            assert is_exact()
        assert set(_read().products) == {"tf32"}


def test_an_error_inside_restores(callers):
    with pytest.raises(KeyError), exact(), products("tf32"):
        raise KeyError
    assert _read() == callers
    with pytest.raises(RuntimeError), products("nonsense"):
        pass
    assert _read() == callers


def test_nobody_is_thought_to_be_inside_after_an_error():
    with pytest.raises(RuntimeError), products("nonsense"):
        pass

    def alone():
        with exact(alone=True):
            assert is_exact()

    in_threads(alone)


@pytest.mark.parametrize("first_out", [0, 1])
def test_the_last_thread_out_restores(callers, first_out):
    entered, left = threading.Barrier(3), [threading.Event() for _ in range(2)]
    go = [threading.Event() for _ in range(2)]

    def inside(i):
        def run():
            with exact():
                entered.wait(WAIT)
                wait(go[i])
                assert is_exact()
                with exact():
                    assert is_exact()
                assert is_exact()
            left[i].set()

        return run

    def conduct():
        entered.wait(WAIT)
        for i in (first_out, 1 - first_out):
            assert is_exact()
            go[i].set()
            wait(left[i])
        assert _read() == callers

    in_threads(inside(0), inside(1), conduct)


def test_a_thread_that_enters_second_does_not_restore_the_firsts_settings(callers):
    """The second thread finds exact flags; were they what it restores, they would stay."""
    second_in, first_out = threading.Event(), threading.Event()
    first_in = threading.Event()

    def first():
        with exact():
            first_in.set()
            wait(second_in)
        first_out.set()

    def second():
        wait(first_in)
        with exact():
            second_in.set()
            wait(first_out)
            assert is_exact()

    in_threads(first, second)
    assert _read() == callers


def test_no_thread_computes_in_another_precision_than_it_asked_for():
    """Many scopes of both kinds at once: at every look inside, the flags are the scope's own."""
    start = threading.Barrier(4)

    def full():
        start.wait(WAIT)
        for _ in range(200):
            with exact():
                assert is_exact()
                with exact():
                    assert is_exact()

    def coarse():
        start.wait(WAIT)
        for _ in range(200):
            with exact(alone=True):
                assert is_exact()
                with products("tf32"):
                    assert set(_read().products) == {"tf32"}
                assert is_exact()

    in_threads(full, coarse, full, coarse)


@pytest.mark.parametrize("scope", [lambda: exact(alone=True), lambda: products("tf32")])
def test_who_is_alone_waits_for_others_and_keeps_them_out(scope):
    order, inside, asked = [], threading.Event(), threading.Event()

    def first():
        with exact():
            inside.set()
            wait(asked)
            assert is_exact()
            order.append("first leaves")

    def second():
        wait(inside)
        asked.set()
        with scope():
            order.append("second enters")
            newcomer = threading.Thread(target=third, daemon=True)
            newcomer.start()
            newcomer.join(0.1)
            order.append("second leaves")
        newcomer.join(WAIT)

    def third():
        with exact():
            order.append("third enters")

    in_threads(first, second)
    assert order == ["first leaves", "second enters", "second leaves", "third enters"]


def test_sweeps_in_tf32_take_turns_with_whatever_other_threads_compute():
    """Inside its own function each thread finds full precision, and the sweeps do not deadlock."""
    params, rows = {"a": torch.tensor(0.5)}, torch.arange(1.0, 5.0)
    start, seen = threading.Barrier(4), []

    def fn(params, batch):
        seen.append(is_exact())
        return torch.tanh(params["a"] * batch)

    def coarse():
        start.wait(WAIT)
        for _ in range(20):
            fp.sweep(fn, params, params, [0.1], rows, change="increment", matmul="tf32", lanes=1)

    def full():
        start.wait(WAIT)
        for _ in range(20):
            fp.evaluate(fn, params, rows)
            fp.taylor(fn, params, params, rows)

    in_threads(coarse, full, coarse, full)
    assert len(seen) == 120 and all(seen)


def test_two_threads_that_would_wait_for_each_other_are_told():
    both, refused, done = threading.Barrier(2), [], []

    def run():
        with exact():
            both.wait(WAIT)
            try:
                with products("tf32"):
                    done.append(set(_read().products))
            except RuntimeError as error:
                refused.append(str(error))

    in_threads(run, run)
    assert done == [{"tf32"}]
    assert len(refused) == 1 and "each would wait for the other" in refused[0]


def test_autocast_is_each_threads_own():
    inside, looked = threading.Event(), threading.Event()

    def full():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with exact():
                inside.set()
                wait(looked)
                assert not torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_enabled("cpu")

    def other():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wait(inside)
            assert torch.is_autocast_enabled("cpu")
            looked.set()

    in_threads(full, other)
