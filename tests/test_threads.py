"""One `Model` in several threads at once gives the bits that it gives one call after another."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import cases
import pytest
import torch

import funcprobe as fp
from funcprobe.calculus.tree import leaves

THREADS = 4
REPEATS = 5
ETAS = [0.0, 0.03, 0.1]


@pytest.fixture(autouse=True)
def eager_switching():
    """Lets threads take turns every 10 microseconds, so that calls do overlap."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(work, arguments):
    """``work`` of each argument, every one in its own new thread, all starting together."""
    start = Barrier(len(arguments))

    def run(argument):
        torch.set_num_threads(1)  # a new thread does not inherit this setting
        start.wait()
        return work(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


def points(params):
    """Different parameters for each thread."""
    v = cases.direction(params)
    return [fp.shift(params, v, 0.05 * i) for i in range(THREADS)]


def assert_bits(a, b):
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    assert any(isinstance(x, torch.Tensor) for x, _ in pairs)
    for x, y in pairs:
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def evaluate(score, params, batch):
    return fp.evaluate(score, params, batch)


def gradient(score, params, batch):
    return fp.gradient(fp.objective(score, "reinforce"), params, fp.prepare(batch, "reinforce"))


def row_gradients(score, params, batch):
    return fp.row_gradients(score, params, batch)


def sweep(score, params, batch):
    return fp.sweep(score, params, cases.direction(params), ETAS, batch)


def sweep_increment(score, params, batch):
    return fp.sweep(score, params, cases.direction(params), ETAS, batch, change="increment")


def taylor(score, params, batch):
    return fp.taylor(score, params, cases.direction(params), batch, order=2)


def entropy_series(score, params, batch):
    series = fp.entropy_series(taylor(score, params, batch), batch)
    return series.value, series.psi


VERBS = [evaluate, gradient, row_gradients, sweep, sweep_increment, taylor, entropy_series]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_threads_at_different_parameters_do_not_meet(verb, dtype):
    case, batch = cases.case("llama", dtype), cases.batch()
    score = fp.scorer(case.model, case.base)

    def work(params):
        return [verb(score, params, batch) for _ in range(REPEATS)]

    for one_by_one, together in zip(
        map(work, points(case.params)), at_once(work, points(case.params)), strict=True
    ):
        assert_bits(one_by_one, together)


def test_threads_that_do_different_things_do_not_meet():
    case, batch = cases.case("gemma2"), cases.batch()
    score = fp.scorer(case.model, case.base)
    jobs = list(zip(VERBS, [*points(case.params), *points(case.params)], strict=False))

    def work(job):
        verb, params = job
        return [verb(score, params, batch) for _ in range(REPEATS)]

    for one_by_one, together in zip(map(work, jobs), at_once(work, jobs), strict=True):
        assert_bits(one_by_one, together)


def test_a_jvp_in_another_thread_changes_no_bit_of_a_gradient():
    """Forward mode is the process's, so a gradient must not take another thread's for its own."""
    case, batch = cases.case("llama", torch.float32), cases.batch()
    score, done = fp.scorer(case.model, case.base), Event()
    want = fp.gradient(score, case.params, batch)

    def work(differentiates):
        if differentiates:
            try:
                return [fp.gradient(score, case.params, batch) for _ in range(20)]
            finally:
                done.set()
        x = torch.ones(8)
        while not done.is_set():
            torch.func.jvp(torch.sin, (x,), (x,))
        return []

    for got in at_once(work, [True, False])[0]:
        assert_bits(got, want)


def test_derivatives_by_nested_jvp_wait_for_one_another():
    """An fn that transforms its parameters itself: taylor differentiates it by torch's jvp."""

    def fn(p, x):
        return x.unsqueeze(1) * torch.func.grad(lambda a: (a**4).sum())(p["a"])

    at = [{"a": torch.tensor([1.0, 2.0]) + i} for i in range(THREADS)]
    v, x = {"a": torch.tensor([1.0, -1.0])}, torch.arange(1.0, 4.0)

    def work(p):
        return [fp.taylor(fn, p, v, x, order=2) for _ in range(REPEATS)]

    for one_by_one, together in zip(map(work, at), at_once(work, at), strict=True):
        assert_bits(one_by_one, together)


def test_a_model_is_assembled_and_named_while_others_run_it():
    case, batch = cases.case("llama"), cases.batch()
    score = fp.scorer(case.model, case.base)
    name = fp.fingerprint(case.model)

    def work(i):
        if i % 2:
            return [score(case.params, batch).logp for _ in range(20)]
        made = [fp.assemble(case.model, case.params, case.base) for _ in range(5)]
        assert {fp.fingerprint(case.model) for _ in range(5)} == {name}
        return [dict(module.named_parameters()) for module in made]

    ours = case.params | case.base
    for i, out in enumerate(at_once(work, range(THREADS))):
        for item in out if i % 2 == 0 else ():
            assert all(p.data_ptr() == ours[n].data_ptr() for n, p in item.items())


def test_the_first_call_of_a_thread_may_be_within_a_transform():
    case, batch = cases.case("llama", torch.float32), cases.batch()
    model, params, base = fp.split(case.module)
    names = [n for n in params if "lora_B" in n]

    def work(scale):
        def of_rows(factor):
            moved = {n: p * factor if n in names else p for n, p in params.items()}
            return model.hidden(moved, base, batch).sum()

        factors = scale * torch.tensor([0.5, 1.0, 2.0])
        return torch.func.vmap(torch.func.grad(of_rows))(factors)

    scales = [1.0, 1.5, 2.0, 3.0]
    # All at once comes first: it is then that copies are made.
    for together, one_by_one in zip(at_once(work, scales), map(work, scales), strict=True):
        assert_bits(one_by_one, together)


def copies(model):
    return [halves.whole for halves in model.forward._idle]


def test_there_are_as_many_copies_as_calls_at_once_whatever_the_threads_do():
    model, params, base = fp.split(cases.live())
    batch = cases.batch()
    assert len(copies(model)) == 1  # that of split's own checks
    for _ in range(3):
        at_once(lambda p: model.hidden(p, base, batch), points(params))
    assert 1 <= len(copies(model)) <= THREADS
    made = copies(model)
    for _ in range(10):
        at_once(lambda p: model.hidden(p, base, batch), [params])
    assert copies(model) == made
    parts = [part for whole in [model.skeleton, *made] for part in whole.modules()]
    assert len({id(part) for part in parts}) == len(parts)  # no part in two copies
    bound = [part.forward.args[0] is part for part in parts if "forward" in vars(part)]
    assert bound and all(bound)
    assert all(t.is_meta for whole in made for t in [*whole.parameters(), *whole.buffers()])


def test_the_copies_go_with_the_model():
    case = cases.case("llama", None)

    def used():
        model = fp.split(case.module)[0]
        at_once(lambda p: model.hidden(p, case.base, cases.batch()), points(case.params))
        return [weakref.ref(whole) for whole in [model.skeleton, *copies(model)]]

    alive = used()
    gc.collect()
    assert len(alive) > 1 and not any(ref() for ref in alive)


def test_a_call_that_fails_gives_its_copy_back():
    model, params, base = fp.split(cases.live())
    batch = cases.batch()
    before = fp.logits(model, params, base, batch)
    (copy_,) = copies(model)
    name = next(iter(params))
    wrong = params | {name: params[name][:, :1]}
    with pytest.raises(RuntimeError):
        model.hidden(wrong, base, batch)
    assert copies(model) == [copy_]
    assert all(p.is_meta for p in copy_.parameters())
    assert torch.equal(fp.logits(model, params, base, batch), before)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("used", [False, True])
def test_a_model_copies_and_pickles_before_and_after_use(again, used):
    model, params, base = fp.split(cases.live("llama_tied"), dtype=torch.float64)
    batch = cases.batch()
    if used:
        at_once(lambda p: model.hidden(p, base, batch), points(params))
    other = again(model)
    assert copies(other) == []
    assert fp.fingerprint(other) == fp.fingerprint(model) and repr(other) == repr(model)
    assert other.shares == model.shares
    mine = {id(part) for whole in [model.skeleton, *copies(model)] for part in whole.modules()}
    ours, theirs = (fp.logits(m, params, base, batch) for m in (model, other))
    assert torch.equal(ours, theirs)
    assert not mine & {id(part) for part in copies(other)[0].modules()}


def test_a_checkpoint_copies_and_pickles_after_use(checkpoint, update):
    score = fp.scorer(checkpoint.model, checkpoint.base)
    batch = update.rows(slice(0, 4))
    want = at_once(lambda p: fp.evaluate(score, p, batch), [checkpoint.params] * 2)[0]
    for other in (copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):
        assert_bits(want, fp.evaluate(fp.scorer(other.model, other.base), other.params, batch))


FRESH = """
import pickle, sys, torch
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    model, params, base, batch, want = pickle.load(file)
import funcprobe as fp
assert torch.equal(fp.logits(model, params, base, batch), want)
"""


def test_a_model_is_unpickled_in_a_process_that_has_split_nothing(tmp_path):
    model, params, base = fp.split(cases.live())
    batch = cases.batch()
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump((model, params, base, batch, fp.logits(model, params, base, batch)), file)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model.pkl")]
    subprocess.run(command, check=True, cwd=Path(fp.__file__).parent.parent)
