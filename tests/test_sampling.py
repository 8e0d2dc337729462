"""A checkpoint's path stands for the checkpoint where responses are sampled."""

import pytest
import torch

import funcprobe as fp
from funcprobe.study.sampling import ground_truth, rollout

PROMPTS = ["3+4+5=", "2+2+2="]
OPTIONS = dict(samples=2, max_new_tokens=8, seed=1)


@pytest.fixture(scope="module")
def narrow(checkpoint):
    """The bundled checkpoint as a path loads: in float32."""
    return fp.load_checkpoint(checkpoint.path)


@pytest.mark.parametrize("form", [str, lambda path: path], ids=["text", "path"])
def test_a_path_is_loaded_and_sampled(narrow, form):
    by_path = rollout(form(narrow.path), PROMPTS, **OPTIONS)
    given = rollout(narrow, PROMPTS, **OPTIONS)
    assert torch.equal(by_path.tokens, given.tokens)
    assert torch.equal(by_path.old_logp.nan_to_num(), given.old_logp.nan_to_num())
    assert torch.equal(rollout(policy=narrow, prompts=PROMPTS, **OPTIONS).tokens, given.tokens)


def test_a_path_has_a_ground_truth(narrow, evaluation):
    v = {name: torch.ones_like(p) for name, p in narrow.params.items()}
    rows = evaluation.rows(slice(0, 8))
    by_path = ground_truth(narrow.path, v, 1e-3, rows, **OPTIONS)
    given = ground_truth(narrow, v, 1e-3, rows, **OPTIONS)
    assert torch.equal(by_path.value, given.value) and torch.equal(by_path.psi, given.psi)


def test_the_signature_and_docstring_are_the_functions():
    assert rollout.__doc__ == fp.rollouts.sample.rollout.__doc__
    assert rollout.__name__ == "rollout" and ground_truth.__name__ == "ground_truth"
