"""The bundled checkpoint and its batches, loaded once; training runs as the Trainer saves them."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from runs import base, folder, run, saved  # noqa: F401  the fixtures of training runs

import funcprobe as fp
from funcprobe.cli import bundled

torch.set_num_threads(1)  # at these sizes a second thread costs ten times what it gives

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=30,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def checkpoint():
    return fp.load_checkpoint(bundled()[0], dtype=torch.float64)


@pytest.fixture(scope="session")
def update(checkpoint):
    return fp.read_batch(bundled()[1], checkpoint.tokenizer)


@pytest.fixture(scope="session")
def evaluation(checkpoint):
    return fp.read_batch(bundled()[2], checkpoint.tokenizer)


@pytest.fixture(scope="session")
def stepped(checkpoint, update):
    """The bundled checkpoint's next step, and its direction."""
    score = fp.scorer(checkpoint.model, checkpoint.base)
    prepared = fp.prepare(update, "dr_grpo")
    grads = fp.gradient(fp.objective(score, "dr_grpo"), checkpoint.params, prepared)
    step = fp.adamw(grads, checkpoint.params, checkpoint.state, **checkpoint.adamw)
    return step, fp.direction(step, grads)


@pytest.fixture(scope="session")
def small(update, evaluation):
    """A few prompts of the bundled U and E."""
    return update.rows(update.group < 6), evaluation.rows(evaluation.group < 16)


@pytest.fixture(scope="session")
def report(checkpoint, small):
    """What a probe of the bundled checkpoint's few prompts reports."""
    return fp.probe(checkpoint, *small)
