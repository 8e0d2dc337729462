"""The check that a module's derivative is that of its values: what it must catch, and accept."""

import pickle
import warnings
from dataclasses import replace
from functools import cache, partial

import cases
import peft
import pytest
import reference
import torch
from torch import nn

import funcprobe as fp
from funcprobe.calculus.line import secant
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


# DoRA: PEFT detaches the weight norm


@cache
def dora():
    model, params, base = fp.split(cases.live(use_dora=True), dtype=torch.float64)
    v = cases.direction(params, size=0.01)
    return model, fp.scorer(model, base), params, v


@cache
def dora_in_place():
    """The change at eta 1 and the slope, by writing into the live module's weights."""
    live, step = cases.live(use_dora=True).double(), 1e-3
    with torch.no_grad(), reference.float64(live):
        _, change = reference.sweep(live, dora()[3], [1.0, -2e-3, -step, step, 2e-3], cases.batch())
    end, far, near, on, off = torch.stack(change, 1)
    return end, (8 * (on - near) - (off - far)) / (12 * step)


@pytest.mark.parametrize(
    "config",
    [
        lora(["q_proj"], use_dora=True, layers_to_transform=[1], modules_to_save=["embed_tokens"]),
        lora(["lm_head"], use_dora=True, modules_to_save=["embed_tokens"]),
        lora(["lm_head"], use_dora=True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dora_is_caught_beside_what_is_larger(config, dtype):
    model, _, _ = fp.split(adapted(config), dtype=dtype)
    assert "DoRA" in model.false_derivative


def test_dora_is_caught_on_a_bfloat16_base():
    assert "DoRA" in fp.split(cases.live(use_dora=True).to(torch.bfloat16))[0].false_derivative


def test_doras_model_says_so_and_pickles():
    model = dora()[0]
    assert model.false_derivative in repr(model)
    assert pickle.loads(pickle.dumps(model)).false_derivative == model.false_derivative


def test_doras_gradient_is_the_trainers():
    model, score, params, _ = dora()
    batch = cases.batch()
    grads = fp.gradient(lambda p, b: score(p, b).logp, params, batch)
    live = cases.live(use_dora=True).double()
    with reference.float64(live):
        reference.scores(live, batch)[0].sum().backward()
    for name, p in live.named_parameters():
        if name in params:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", ["direct", "increment"])
def test_doras_changes_are_right(change):
    _, score, params, v = dora()
    swept = fp.sweep(score, params, v, [1.0], cases.batch(), change=change)
    assert not swept.fallbacks
    end, _ = dora_in_place()
    torch.testing.assert_close(torch.stack(swept.change, 1)[0], end, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_doras_secant_is_its_slope(dtype, limit):
    model, params, base = fp.split(cases.live(use_dora=True), dtype=dtype)
    v = {name: d.to(dtype) for name, d in dora()[3].items()}
    terms = secant(fp.scorer(model, base), params, v, cases.batch(), 1e-4)
    _, slope = dora_in_place()
    assert (torch.stack(tuple(terms[1])) - slope).norm() < limit * slope.norm()


class Entropy:
    def __init__(self, score):
        self.score = score

    def __call__(self, params, batch):
        return self.score(params, batch).entropy

    def of(self, params, batch):
        return self.score(params, batch).entropy


def scaled(score, factor, params, batch):
    return factor * score(params, batch).entropy


def test_what_needs_the_true_derivative_is_refused_by_name():
    _, score, params, v = dora()
    batch = fp.prepare(cases.batch(), "reinforce")
    functions = [
        score,
        fp.objective(score, "reinforce"),
        fp.with_value(score, lambda batch: batch.reward),
        lambda p, b: score(p, b).entropy,
        partial(scaled, score, 2.0),
        Entropy(score),
        Entropy(score).of,
    ]
    for fn in functions:
        with pytest.raises(ValueError, match="taylor: .*DoRA"):
            fp.taylor(fn, params, v, batch)
        with pytest.raises(ValueError, match="pullback: .*DoRA"):
            fp.pullback(fn, params, batch, batch.weight)


def test_the_probe_gives_a_secant_for_the_slope_and_says_so(checkpoint, small, report):
    model = replace(checkpoint.model, false_derivative="the derivative is planted")
    other = fp.probe(replace(checkpoint, model=model), *small)
    assert torch.allclose(other.series.value, report.series.value, rtol=1e-5)
    assert torch.allclose(other.series.stderr, report.series.stderr, rtol=1e-5)
    assert any("is planted" in flag and "secant" in flag for flag in other.flags)
    assert not any("secant" in flag for flag in report.flags)
