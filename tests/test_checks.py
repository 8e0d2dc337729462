"""What split checks: each check by a module that it must refuse or measure, and what it leaves."""

import sys

import cases
import peft
import pytest
import reference
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    LlamaForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.masking_utils import chunked_overlay, sliding_window_overlay
from transformers.models.llama import modeling_llama

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


# Adapters outside the layers


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers the old way
def test_alora_is_refused_alone_and_beside_other_trainable_parts():
    for saved in (None, ["embed_tokens"]):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            target_modules=["q_proj"],
            alora_invocation_tokens=[9, 11],
            modules_to_save=saved,
        )
        module = peft.get_peft_model(cases.live(adapter=False), config)
        with pytest.raises(ValueError, match="split: .*'default' is an aLoRA.*plain LoRA"):
            fp.split(module)


# State


class CountingNorm(torch.nn.Module):
    """A norm that remembers how many tokens the longest row had."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.longest = inner, 0

    def forward(self, x):
        self.longest = max(self.longest, x.shape[1])
        return self.inner(x) * (1 + self.longest / 100)


def test_a_forward_that_keeps_state_is_refused():
    module = cases.live()
    decoder = module.get_base_model().model
    decoder.norm = CountingNorm(decoder.norm)
    with pytest.raises(ValueError, match="LlamaForCausalLM .*its forward keeps state between"):
        fp.split(module)


class GrowingRotary(torch.nn.Module):
    """A rotary embedding that keeps a table of the positions that it has seen, and no decorator."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.longest = inner, 64

    def forward(self, x, position_ids):
        self.longest = max(self.longest, int(position_ids.max()))
        return tuple(64 / self.longest * table for table in self.inner(x, position_ids))


def test_a_table_that_grows_beyond_the_rows_tried_is_refused():
    module = cases.live()
    decoder = module.get_base_model().model
    decoder.rotary_emb = GrowingRotary(decoder.rotary_emb)
    with pytest.raises(ValueError, match="LlamaForCausalLM .*its forward keeps state between"):
        fp.split(module)


# Causality


def test_attention_in_both_directions_is_refused():
    module = cases.live("gemma3", adapter=False)
    both = module.config.to_dict() | dict(use_bidirectional_attention=True)
    module = type(module)(type(module.config)(**both))
    with pytest.raises(ValueError, match="split: a causal .*Gemma3ForCausalLM later tokens"):
        fp.split(module)
    sizes = dict(vocab_size=64, emb_dim=16, n_layers=2, n_heads=4)
    with pytest.raises(ValueError, match="split: a causal .*XLMWithLMHeadModel later tokens"):
        fp.split(XLMWithLMHeadModel(XLMConfig(**sizes)).eval())


# Shared prompts


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_prompts_are_shared_up_to_the_shortest_window(family):
    """The windows here are of 4 tokens, in which the check's own rows do not fit."""
    windows = {"mistral", "gemma2", "gemma3"}
    assert cases.case(family).model.shares == (0 if family in windows else sys.maxsize)


WINDOWS = {
    "mistral": dict(sliding_window=20),
    "gemma3": dict(sliding_window=20),
    "gemma2": dict(sliding_window=20),
    "qwen2": dict(use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "phi3": dict(sliding_window=20),
}


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_bounds_the_rows_whose_prompts_are_shared(family):
    module = cases.live(family, adapter=False)
    sizes = module.config.to_dict() | WINDOWS[family]
    if family == "qwen2":
        del sizes["layer_types"]  # which follow from the others
    module = type(module)(type(module.config)(**sizes)).eval()
    assert fp.split(module)[0].shares == 20


@pytest.mark.parametrize(
    "band", [sliding_window_overlay(17), chunked_overlay(17, torch.zeros(8, dtype=torch.int64))]
)
def test_a_band_that_no_configuration_names_is_read_off_the_mask(monkeypatch, band):
    right = modeling_llama.create_causal_mask

    def narrow(**inputs):
        return right(**inputs, and_mask_function=band)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", narrow)
    assert fp.split(cases.live())[0].shares == 17


def test_a_mask_of_the_models_making_is_not_shared(monkeypatch):
    right = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **inputs: 1 * right(**inputs))
    assert fp.split(cases.live())[0].shares == 0


def gpt_neo():
    torch.manual_seed(0)
    config = GPTNeoConfig(
        **cases._TOKENS,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=64,
        max_position_embeddings=128,
        initializer_range=0.25,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_prompts_are_not_shared_where_a_layer_has_attention_of_its_own():
    module = gpt_neo()
    prompt = [3 + i * i % 61 for i in range(60)]
    batch = fp.collate([prompt] * 3, [[5 + i, 9, 11, 13 + i, 17, 19] for i in range(3)])
    model, params, base = fp.split(module, dtype=torch.float64)
    assert model.shares == 0
    ours = fp.scorer(model, base)(params, batch)
    with torch.no_grad(), reference.float64(module.double()):
        for x, y in zip(ours, reference.scores(module, batch), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


class Smoothing(torch.nn.Module):
    """A causal convolution over three tokens before a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        before = torch.nn.functional.pad(x, (0, 0, 2, 0))
        return self.inner(x + 0.5 * before[:, :-2])


def test_prompts_are_not_shared_where_a_layer_mixes_tokens_without_attention():
    module = cases.live()
    layer = module.get_base_model().model.layers[1]
    layer.mlp = Smoothing(layer.mlp)
    assert fp.split(module)[0].shares == 0


# All of them


def test_checks_change_nothing():
    case = cases.case("llama")
    forward, params, base = case.model.forward, case.params, case.base
    name = fp.fingerprint(case.model, params, base)
    whole = checks.check_head(forward, params, base, checks.check_runs(forward, params, base))
    assert checks.attends_alike(forward, params, base, whole)
    assert derivative.check_derivative(forward, params, base) == ""
    assert checks.longest_shared(forward, forward, params, base) == 0  # it mixes tokens
    assert case.model.skeleton.config._attn_implementation == attention.NAME
    assert fp.fingerprint(case.model, params, base) == name


def test_a_forward_pass_that_fails_is_one_line_with_the_cause():
    module = cases.live()
    module.get_base_model().model.layers[1].mlp = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="split: .*LlamaForCausalLM was expected to run") as caught:
        fp.split(module)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "\n" not in str(caught.value) and "shapes cannot be multiplied" in str(caught.value)
