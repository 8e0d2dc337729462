"""split, assemble and logits: a module becomes pure functions, and is itself left alone."""

import gc
import types
import weakref
from collections import OrderedDict

import cases
import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import funcprobe as fp
from funcprobe.language.model import attention

LOWER = (torch.float32, torch.float16, torch.bfloat16)


def reference_logits(module, batch):
    """[N, R, V] from one forward of the live module on the very same padded tokens."""
    out = module(input_ids=batch.tokens, use_cache=False).logits
    return torch.take_along_dim(out, batch.position.unsqueeze(-1), 1)


# Parity


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_hidden_states_are_bit_identical_to_the_modules_own(family):
    """The module is given the attention that the skeleton has."""
    attention.register()
    module = cases.live(family, attention=attention.NAME)
    model, params, base = fp.split(module)
    batch = cases.batch()
    with torch.no_grad():
        causal = module.get_base_model()
        decoder = getattr(causal, causal.base_model_prefix)
        expected = decoder(input_ids=batch.tokens, use_cache=False).last_hidden_state
        expected = torch.take_along_dim(expected, batch.position.unsqueeze(-1), 1)
        assert torch.equal(model.hidden(params, base, batch), expected)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_logits_are_the_modules_own(family):
    module, batch = cases.live(family), cases.batch()
    with torch.no_grad():
        expected = reference_logits(module, batch)
        ours = fp.logits(*fp.split(module), batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert ours.shape == (*batch.response.shape, cases.VOCABULARY)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_float64_logits_are_those_of_unpadded_rows_in_true_float64(family):
    case, batch = cases.case(family), cases.batch()
    with torch.no_grad():
        ours = fp.logits(case.model, case.params, case.base, batch)
        with reference.float64(cases.module64(family)) as module:
            for i, t in enumerate(batch.response.sum(1).tolist()):
                if t:
                    expected, _ = reference.row_logits(module, batch, i)
                    assert expected.dtype == ours.dtype == torch.float64
                    torch.testing.assert_close(ours[i, :t], expected, rtol=1e-12, atol=1e-12)


def test_the_usual_attention_and_the_padding_mask_change_nothing_but_rounding():
    batch = cases.batch()
    module = cases.live(attention="sdpa")
    with torch.no_grad():
        out = module(input_ids=batch.tokens, attention_mask=batch.attention.long()).logits
        expected = torch.take_along_dim(out, batch.position.unsqueeze(-1), 1)
        ours = fp.logits(*fp.split(module), batch)
    where = batch.response
    torch.testing.assert_close(ours[where], expected[where], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_the_head_caps_and_scales_as_the_module_does(family):
    case = cases.case(family, None)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 4
    config = case.module.config
    head = case.module.get_output_embeddings().weight.detach()
    expected = hidden @ head.T
    if family == "gemma2":
        expected = torch.tanh(expected / 3.0) * 3.0
        assert expected.abs().max() > 2.5  # else the cap is not seen
    expected = expected / getattr(config, "logits_scaling", 1.0)
    expected = expected * getattr(config, "logit_scale", 1.0)
    with torch.no_grad():
        ours = case.model.head(case.params, case.base, hidden.unsqueeze(0))[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_module_without_an_adapter_splits_too():
    module = cases.live(adapter=False)
    for p in module.model.layers[0].parameters():
        p.requires_grad_(False)
    batch = cases.batch()
    with torch.no_grad():
        expected = reference_logits(module, batch)
        model, params, base = fp.split(module)
        torch.testing.assert_close(fp.logits(model, params, base, batch), expected)
    assert not any("layers.0." in name for name in params)
    assert all("layers.0." in name or "inv_freq" in name for name in base)


# Names and dtypes


def test_names_are_those_of_the_module():
    case = cases.case("llama_tied", None)
    trainable = {n for n, p in case.module.named_parameters() if p.requires_grad}
    frozen = {n for n, p in case.module.named_parameters() if not p.requires_grad}
    assert set(case.params) == trainable
    assert set(case.base) == frozen | {n for n, _ in case.module.named_buffers()}
    assert not any("lm_head" in name for name in case.base)  # tied: it appears once
    assert all("default" in name for name in case.params)


def test_tied_weights_move_together():
    module = cases.live("llama_tied", adapter=False)
    model, params, base = fp.split(module, dtype=torch.float64)
    (name,) = [n for n in params if "embed_tokens" in n]
    v = {n: torch.zeros_like(p) for n, p in params.items()}
    v[name] = torch.randn(v[name].shape, generator=torch.Generator().manual_seed(1)).double()
    batch = cases.batch()
    moved = fp.logits(model, fp.shift(params, v, 0.1), base, batch)
    live = module.double()
    with torch.no_grad(), reference.float64(live), reference.moved(live, v, 0.1):
        expected = reference_logits(live, batch)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_tensors_are_the_modules_own_detached():
    case = cases.case("llama", None)
    expected = dict(case.module.named_parameters()) | dict(case.module.named_buffers())
    for name, tensor in (case.params | case.base).items():
        assert tensor.data_ptr() == expected[name].data_ptr()
        assert not tensor.requires_grad


def test_a_bfloat16_base_stays_and_its_parameters_are_float32():
    module = cases.live().to(torch.bfloat16)
    model, params, base = fp.split(module)
    assert {p.dtype for p in params.values()} == {torch.float32}
    weights = {n: t for n, t in base.items() if n.endswith("weight")}
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert not model.float64
    scores = fp.scorer(model, base)(params, cases.batch())
    assert scores.logp.dtype == torch.float32
    exact = fp.scorer(cases.case().model, cases.case().base)(cases.case().params, cases.batch())
    assert (scores.logp - exact.logp).abs().max() < 0.3


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2", "olmo2"]
)
def test_a_float64_split_computes_in_float64_throughout(family):
    class OnlyFloat64(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, torch.Tensor):
                    assert leaf.dtype not in LOWER, f"{func} saw {leaf.dtype}"
                    self.seen += 1
            return out

    case, batch = cases.case(family), cases.batch()
    assert case.model.float64
    mode = OnlyFloat64()
    with torch.no_grad(), mode:
        hidden = case.model.hidden(case.params, case.base, batch)
        logits = case.model.head(case.params, case.base, hidden)
    assert mode.seen > 100
    assert hidden.dtype == logits.dtype == torch.float64


def test_rotary_tables_are_float64_to_the_last_bit():
    base = cases.case("llama").base
    (name,) = [n for n in base if n.endswith("rotary_emb.inv_freq")]
    exact = torch.tensor([10000.0 ** (-j / 2) for j in range(2)], dtype=torch.float64)
    torch.testing.assert_close(base[name], exact, rtol=1e-15, atol=0)


def test_a_changed_rotary_table_stays_as_it_is():
    module = cases.live("llama")
    module.get_base_model().model.rotary_emb.inv_freq.mul_(0.5)
    _, _, base = fp.split(module, dtype=torch.float64)
    (name,) = [n for n in base if n.endswith("rotary_emb.inv_freq")]
    torch.testing.assert_close(base[name], torch.tensor([0.5, 0.005]).double(), rtol=1e-6, atol=0)


# The caller's module


def snapshot(module):
    """All of a module's state that anyone could notice a change of."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    hooks = {
        (name, key): list(value.items())
        for name, part in module.named_modules()
        for key, value in part.__dict__.items()
        if "hooks" in key and isinstance(value, OrderedDict)
    }
    return {
        "ids": {n: (id(t), t.data_ptr(), t._version) for n, t in tensors.items()},
        "values": {n: t.detach().clone() for n, t in tensors.items()},
        "grads": {n: None if t.grad is None else t.grad.clone() for n, t in tensors.items()},
        "flags": {n: t.requires_grad for n, t in tensors.items()},
        "training": {n: part.training for n, part in module.named_modules()},
        "checkpointing": {
            n: (part.gradient_checkpointing, part.__dict__.get("_gradient_checkpointing_func"))
            for n, part in module.named_modules()
            if hasattr(part, "gradient_checkpointing")
        },
        "hooks": hooks,
        "keys": {n: sorted(part.__dict__) for n, part in module.named_modules()},
        "attention": module.config._attn_implementation,
    }


def settings():
    return {
        "random": torch.get_rng_state(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def busy_module():
    """As a trainer leaves it: training mode, dropout, gradients, hooks, gradient checkpointing."""
    module = cases.live(attention="sdpa", lora_dropout=0.5)
    module.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    module.enable_input_require_grads()
    calls = []
    for part in module.modules():
        if type(part).__name__ == "LlamaDecoderLayer":
            part.register_forward_hook(lambda *_: calls.append("forward"))
            part.register_forward_pre_hook(lambda *_: calls.append("pre"))
            part.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.train()
    module(input_ids=cases.batch().tokens, use_cache=False).logits.sum().backward()
    calls.clear()
    return module, calls


def test_the_callers_module_and_settings_are_untouched():
    module, calls = busy_module()
    batch = fp.prepare(cases.batch(), "reinforce")
    before, world = snapshot(module), settings()
    for dtype in (None, torch.float64):
        model, params, base = fp.split(module, dtype=dtype)
        score = fp.scorer(model, base)
        fp.sweep(score, params, cases.direction(params), [0.0, 0.1], batch)
        fp.row_gradients(fp.objective(score, "reinforce"), params, batch)
        fp.taylor(score, params, cases.direction(params), batch)
        fp.assemble(model, params, base)
    assert_same(snapshot(module), before)
    assert_same(settings(), world)
    assert sorted(calls) == sorted(["forward", "pre", "backward"] * 2 * 2)


def test_dropout_hooks_and_checkpointing_do_not_reach_the_split():
    module, _ = busy_module()
    batch = cases.batch()
    with torch.no_grad():
        assert torch.equal(
            fp.logits(*fp.split(module), batch), fp.logits(*fp.split(cases.live()), batch)
        )


# What the pure half holds


@pytest.mark.parametrize(("family", "adapter"), [("llama", True), ("gemma2", False)])
def test_a_models_repr_is_a_few_lines(family, adapter):
    model, params, base = fp.split(cases.live(family, adapter=adapter, attention="eager"))
    text = repr(model)
    assert len(text.splitlines()) <= 6 and "tensor(" not in text
    architecture = {"llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM"}[family]
    assert text.startswith(f"Model({architecture}, adapter {'LORA' if adapter else None},")
    assert f"{len(params)} tensors of params and {len(base)} of base" in text
    assert f"vocabulary {cases.VOCABULARY}" in text and "'funcprobe'" in text
    assert "float64" not in text and "float64" in repr(cases.case(family).model)


def reachable(root):
    """Everything `root` refers to, short of modules, types and functions' globals."""
    seen, stack = {}, [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, types.ModuleType | type | types.CodeType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, types.FunctionType):
            stack += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
        else:
            stack += gc.get_referents(thing)
    return seen.values()


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma3"])
def test_the_model_holds_no_weight(family):
    module = cases.live(family)
    module.enable_input_require_grads()
    model, _, _ = fp.split(module)
    expected = {id(x) for x in [*module.modules(), *module.parameters(), *module.buffers()]}
    tensors = 0
    for thing in reachable(model):
        assert id(thing) not in expected, type(thing)
        if isinstance(thing, torch.Tensor):
            assert thing.is_meta or thing.numel() <= 1, thing.shape
            tensors += 1
    assert tensors >= len(list(module.parameters()))


def test_the_module_can_be_let_go():
    module = cases.live()
    model, params, base = fp.split(module)
    score = fp.scorer(model, base)
    alive = [weakref.ref(part) for part in module.modules()]
    del module
    gc.collect()
    assert not any(ref() for ref in alive)
    score(params, cases.batch())


def test_a_missing_name_fails_loudly():
    case = cases.case("llama", None)
    less = dict(case.base)
    less.pop(next(n for n in less if "up_proj" in n))
    with pytest.raises(ValueError, match="1 are missing.*up_proj"):
        case.model.hidden(case.params, less, cases.batch())
    with pytest.raises(ValueError, match="1 are unknown.*up_prøj"):
        case.model.hidden(case.params, case.base | {"up_prøj": torch.zeros(1)}, cases.batch())


@pytest.mark.parametrize("alpha", [3, 4])  # over rank 2: 1.5 does not commute with rounding, 2 does
def test_scaling_changes_no_bit(alpha):
    attention.register()
    module = cases.live("llama", attention=attention.NAME, lora_alpha=alpha)
    model, params, base = fp.split(module)
    batch = cases.batch()
    with torch.no_grad():
        expected = module(input_ids=batch.tokens, use_cache=False).logits
        expected = torch.take_along_dim(expected, batch.position.unsqueeze(-1), 1)
        ours = fp.logits(model, params, base, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    decoder = module.get_base_model().model
    with torch.no_grad():
        states = decoder(input_ids=batch.tokens, use_cache=False).last_hidden_state
        states = torch.take_along_dim(states, batch.position.unsqueeze(-1), 1)
        assert torch.equal(model.hidden(params, base, batch), states)


# assemble


def test_an_assembled_module_runs_its_classes_own_code():
    back = fp.assemble(*fp.split(cases.live("llama")))
    assert not [name for name, part in back.named_modules() if "forward" in vars(part)]


def test_assemble_is_the_inverse_and_shares_storage():
    module = cases.live("llama_tied", attention="sdpa")
    model, params, base = fp.split(module)
    back = fp.assemble(model, params, base)
    expected = dict(module.named_parameters()) | dict(module.named_buffers())
    new = dict(back.named_parameters()) | dict(back.named_buffers())
    assert new.keys() == expected.keys()
    assert all(new[n].data_ptr() == expected[n].data_ptr() for n in expected)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == set(params)
    assert back.config._attn_implementation == "sdpa"
    assert not back.training and back is not module
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
    tokens = cases.batch().tokens
    with torch.no_grad():
        assert torch.equal(back(input_ids=tokens).logits, module(input_ids=tokens).logits)


@pytest.mark.parametrize("family", cases.SOME)
def test_an_assembled_module_generates_at_any_params(family):
    module = cases.live(family)
    model, params, base = fp.split(module)
    v = cases.direction(params)
    prompt = torch.tensor([[5, 9, 11]])
    options = dict(
        attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=63
    )
    here = fp.assemble(model, params, base).generate(prompt, **options)
    moved = fp.assemble(model, fp.shift(params, v, 0.5), base).generate(prompt, **options)
    assert torch.equal(here, module.generate(prompt, **options))
    with reference.moved(module, v, 0.5):
        assert torch.equal(moved, module.generate(prompt, **options))
    assert not torch.equal(here, moved)


def test_assembling_leaves_the_model_usable():
    model, params, base = fp.split(cases.live())
    batch = cases.batch()
    before = fp.logits(model, params, base, batch)
    fp.assemble(model, params, base).train()
    assert not model.skeleton.training
    assert all(p.is_meta for p in model.skeleton.parameters())
    assert torch.equal(fp.logits(model, params, base, batch), before)
