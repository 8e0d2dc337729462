"""What split checks: each check by a module that it must refuse or measure, and what it leaves."""

import sys

import cases
import pytest
from transformers import LlamaForCausalLM

import funcprobe as fp
from funcprobe.language.model import attention, checks, derivative


class HeadOfOtherTokens(LlamaForCausalLM):
    """Between its tokens and its decoder it does what only the whole module does."""

    def forward(self, input_ids=None, **inputs):
        return super().forward(None if input_ids is None else input_ids.flip(1), **inputs)


def test_a_module_that_is_more_than_decoder_and_head_is_refused():
    module = cases.live(adapter=False)
    module.__class__ = HeadOfOtherTokens
    with pytest.raises(ValueError, match="split: head.* HeadOfOtherTokens computes something"):
        fp.split(module)


@pytest.mark.parametrize(
    ("family", "longest"), [("llama", sys.maxsize), ("gpt2", sys.maxsize), ("mistral", 0)]
)
def test_prompts_are_shared_where_no_window_binds(family, longest):
    """The mistral here has a window of 4, in which the check's own rows do not fit."""
    assert cases.case(family).model.shares == longest


def test_a_window_bounds_the_rows_whose_prompts_are_shared():
    module = cases.live("mistral")
    module.config.sliding_window = 32
    assert fp.split(module)[0].shares == 32


def test_checks_change_nothing():
    case = cases.case("llama")
    forward, params, base = case.model.forward, case.params, case.base
    name = fp.fingerprint(case.model, params, base)
    checks.check_head(forward, params, base)
    assert checks.attends_alike(forward, forward, params, base)
    assert derivative.check_derivative(forward, params, base) == ""
    assert checks.longest_shared(forward, forward, params, base) == 0  # it mixes tokens
    assert case.model.skeleton.config._attn_implementation == attention.NAME
    assert fp.fingerprint(case.model, params, base) == name
