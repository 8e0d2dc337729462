"""The check that a module's derivative is that of its values: what it must catch, and accept."""

import warnings

import cases
import peft
import pytest
import torch
from torch import nn

import funcprobe as fp
from funcprobe.language.model import derivative

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def adapted(config, family="llama", dtype=torch.float32):
    """A fresh adapter, as PEFT initialises it, on a module whose base has a dtype."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return peft.get_peft_model(cases.live(family, adapter=False).to(dtype), config).eval()


def lora(modules, **settings):
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules, **settings)


# Planted errors


class Scaled(torch.autograd.Function):
    """The identity, whose derivative in one mode or both is 1% off."""

    @staticmethod
    def forward(x, forward, reverse):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.forward_factor, ctx.reverse_factor = inputs

    @staticmethod
    def jvp(ctx, dx, *_):
        return ctx.forward_factor * dx

    @staticmethod
    def backward(ctx, dy):
        return ctx.reverse_factor * dy, None, None


def planted(forward, fault, reverse_only=False):
    """The forward pass with a parameter whose derivative is wrong."""

    def wrong(params):
        x = params[fault]
        x = Scaled.apply(x, 1.0, 0.99) if reverse_only else 0.99 * x + 0.01 * x.detach()
        return params | {fault: x}

    class Faulty:
        skeleton = forward.skeleton

        def states(self, params, base, layout):
            return forward.states(wrong(params), base, layout)

        def head(self, params, base, hidden):
            return forward.head(wrong(params), base, hidden)

    return Faulty()


def reason(module, fault, **how):
    model, params, base = fp.split(module)
    assert model.false_derivative == ""
    return derivative.check_derivative(planted(model.forward, fault, **how), params, base)


def trainable(module):
    return [name for name, p in module.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_percent_in_one_tensor_is_caught(family, dtype):
    """In every fifth tensor of a fresh LoRA, which is 0 in its B."""
    module = adapted(lora("all-linear", fan_in_fan_out=family == "gpt2"), family, dtype)
    for fault in trainable(module)[::5]:
        kind = fault.replace(".0.", ".").replace(".1.", ".")
        assert f"along {kind!r}" in reason(module, fault)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_one_percent_in_any_tensor_is_caught(family, adapter):
    module = cases.live(family, adapter=adapter)
    for fault in trainable(module):
        assert reason(module, fault), fault


def test_a_backward_of_its_own_is_caught_though_forward_mode_is_right():
    module = cases.live()
    for fault in trainable(module)[::9]:
        assert "along" in reason(module, fault, reverse_only=True)


def test_what_matters_a_million_times_less_is_tested_by_itself():
    """The last layer's output is scaled down, so that hardly anything reads its adapter."""
    module = cases.live()
    layer = module.get_base_model().model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.lora_B.default.weight.mul_(1e-6)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"
    assert "mlp.down_proj.lora_A" in reason(module, name)


class Detached(nn.Module):
    """A linear map whose derivative in its input is lost."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.detach())


def test_a_layer_that_detaches_is_named():
    module = cases.live()
    layer = module.get_base_model().model.layers[1].mlp
    layer.down_proj = Detached(layer.down_proj)
    text = fp.split(module)[0].false_derivative
    assert "Linear layers" in text and "detached" in text


# No false alarms

ADAPTERS = {
    "embeddings": lora(["embed_tokens"]),
    "embeddings and layers": lora(["embed_tokens", "q_proj"]),
    "head": lora(["lm_head"]),
    "saved head": lora(["q_proj"], modules_to_save=["lm_head"]),
    "saved embeddings": lora(["q_proj"], modules_to_save=["embed_tokens"]),
    "new tokens": peft.TrainableTokensConfig(token_indices=[50, 51]),
    "tokens": lora(["q_proj"], trainable_token_indices=[50, 51, 62]),
    "biases": lora("all-linear", bias="all", lora_bias=True),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "VeRA": peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "MiSS": peft.MissConfig(r=2, target_modules="all-linear"),
    "RoAd": peft.RoadConfig(group_size=8, target_modules=["q_proj"]),
    "LN": peft.LNTuningConfig(),
    "HRA": peft.HRAConfig(r=2, target_modules=["q_proj"]),
    "DeLoRA": peft.DeloraConfig(r=2, target_modules=["q_proj"]),
    "VBLoRA": peft.VBLoRAConfig(
        r=2, num_vectors=16, vector_length=4, target_modules=["q_proj", "v_proj"]
    ),
    "LoKr": peft.LoKrConfig(r=2, target_modules="all-linear"),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_right_derivative_is_not_suspected(adapter):
    model, _, _ = fp.split(adapted(ADAPTERS[adapter]))
    assert model.false_derivative == ""


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_no_family_is_suspected(family):
    for dtype in DTYPES:
        fresh = lora("all-linear", fan_in_fan_out=family == "gpt2")
        assert fp.split(adapted(fresh, family, dtype))[0].false_derivative == ""
    if family != "gpt2":
        assert fp.split(cases.live(family, adapter=False))[0].false_derivative == ""
