"""Tiny configurations of many architectures, and adapters, by name.

A model has two layers (more where its pattern of layers needs them), a width of 32 to 64 and a
vocabulary of 98 tokens unless its name says otherwise. `build` makes a live module of a family with
an adapter on it, in the precision that is asked for and always with the same numbers.
"""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 98
WIDE = 5002  # a vocabulary of two slices, the second one shorter
WINDOW = 16

_TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, vocab_size=VOCABULARY)
_SIZES = _TOKENS | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.15,
)
_HEADS = _SIZES | dict(num_key_value_heads=4)
_GEMMA = _SIZES | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW)
_GPT = _TOKENS | dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.15)
_BANDED = ["sliding_attention", "full_attention"]


def _rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return dict(rope_type=rope_type, rope_theta=10000.0, **settings)


# The name of a family -> its type in transformers, and its settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES | dict(tie_word_embeddings=False)),
    "llama_tied": ("llama", _SIZES | dict(tie_word_embeddings=True)),
    "llama_bias": ("llama", _SIZES | dict(attention_bias=True, mlp_bias=True)),
    "llama_wide": ("llama", _SIZES | dict(vocab_size=WIDE, tie_word_embeddings=True)),
    "llama_llama3": (
        "llama",
        _SIZES
        | dict(
            rope_parameters=_rope(
                "llama3",
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        ),
    ),
    "llama_linear": ("llama", _SIZES | dict(rope_parameters=_rope("linear", factor=2.0))),
    "llama_yarn": (
        "llama",
        _SIZES
        | dict(
            rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64),
        ),
    ),
    "mistral": ("mistral", _SIZES | dict(sliding_window=WINDOW)),
    "ministral": (
        "ministral",
        _SIZES | dict(head_dim=8, sliding_window=WINDOW, layer_types=_BANDED),
    ),
    "ministral3": (
        "ministral3",
        _SIZES
        | dict(
            rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64)
            | dict(llama_4_scaling_beta=0.1),
        ),
    ),
    "qwen2": ("qwen2", _SIZES),
    "qwen2_window": (
        "qwen2",
        _SIZES | dict(use_sliding_window=True, sliding_window=WINDOW, layer_types=_BANDED),
    ),
    "qwen3": ("qwen3", _SIZES | dict(head_dim=8)),
    "gemma": ("gemma", _SIZES | dict(head_dim=8)),
    "gemma2": (
        "gemma2",
        _GEMMA | dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    ),
    "gemma3": ("gemma3_text", _GEMMA | dict(layer_types=_BANDED)),
    "vaultgemma": ("vaultgemma", _GEMMA | dict(layer_types=_BANDED)),
    "phi": ("phi", _HEADS),
    "phi3": ("phi3", _SIZES),
    "gpt2": ("gpt2", _GPT),
    "gemma3_wide": ("gemma3_text", _GEMMA | dict(layer_types=_BANDED, vocab_size=WIDE)),
    "gpt2_wide": ("gpt2", _GPT | dict(vocab_size=WIDE)),
    "gpt_neox": ("gpt_neox", _HEADS),
    "gptj": ("gptj", _GPT | dict(rotary_dim=4)),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "codegen": ("codegen", _GPT | dict(rotary_dim=4)),
    "falcon": ("falcon", _HEADS | dict(new_decoder_architecture=False, multi_query=True)),
    "falcon_alibi": ("falcon", _HEADS | dict(alibi=True, new_decoder_architecture=False)),
    "mpt": (
        "mpt",
        _TOKENS | dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=256, initializer_range=0.15),
    ),
    "stablelm": ("stablelm", _SIZES),
    "starcoder2": ("starcoder2", _SIZES | dict(sliding_window=WINDOW)),
    "olmo": ("olmo", _SIZES),
    "olmo2": ("olmo2", _SIZES),
    "olmo3": ("olmo3", _SIZES | dict(sliding_window=WINDOW, layer_types=_BANDED)),
    "granite": (
        "granite",
        _SIZES | dict(logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    ),
    "cohere": ("cohere", _SIZES | dict(logit_scale=0.25)),
    "cohere2": (
        "cohere2",
        _SIZES | dict(sliding_window=WINDOW, layer_types=_BANDED, logit_scale=0.25),
    ),
    "glm": ("glm", _SIZES | dict(head_dim=8)),
    "glm4": ("glm4", _SIZES | dict(head_dim=8)),
    "smollm3": ("smollm3", _SIZES | dict(no_rope_layers=[1, 0])),
    "ernie4_5": ("ernie4_5", _SIZES | dict(head_dim=8)),
    "exaone4": ("exaone4", _SIZES | dict(sliding_window=WINDOW, layer_types=_BANDED)),
    "hunyuan": ("hunyuan_v1_dense", _SIZES | dict(head_dim=8)),
    "arcee": ("arcee", _SIZES),
    "seed_oss": ("seed_oss", _SIZES | dict(head_dim=8)),
    "helium": ("helium", _SIZES | dict(head_dim=8)),
    "nanochat": ("nanochat", _HEADS),
    "persimmon": ("persimmon", _HEADS),
    "biogpt": ("biogpt", _HEADS),
    "nemotron": ("nemotron", _SIZES | dict(head_dim=8)),
    "lfm2": ("lfm2", _SIZES | dict(layer_types=["conv", "full_attention"], block_multiple_of=8)),
    "bamba": (
        "bamba",
        _SIZES
        | dict(
            attn_layer_indices=[1],
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=8,
            mamba_chunk_size=16,
        ),
    ),
    "zamba2": (
        "zamba2",
        _HEADS
        | dict(
            layers_block_type=["mamba", "hybrid"],
            hybrid_layer_ids=[1],
            mamba_d_state=8,
            mamba_ngroups=1,
            n_mamba_heads=4,
            mamba_headdim=16,
            chunk_size=16,
            adapter_rank=4,
            num_mem_blocks=1,
        ),
    ),
    "diffllama": ("diffllama", _SIZES),
    "opt": ("opt", _HEADS | dict(ffn_dim=48, word_embed_proj_dim=32)),
    "gemma3n": (
        "gemma3n_text",
        _SIZES
        | dict(
            head_dim=8,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=4,
            altup_num_inputs=2,
            num_kv_shared_layers=0,
            layer_types=_BANDED,
            sliding_window=WINDOW,
            activation_sparsity_pattern=[0.0, 0.0],
        ),
    ),
    "qwen3_5": (
        "qwen3_5_text",
        _SIZES
        | dict(
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
    ),
    "apertus": ("apertus", _SIZES | dict(rope_parameters=_rope("default"))),
    # What is known to be wrong or to need a refusal.
    "gpt_neo": (
        "gpt_neo",
        _TOKENS
        | dict(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=48,
            window_size=WINDOW,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=256,
            initializer_range=0.15,
        ),
    ),
    "gpt_neo_wide": (
        "gpt_neo",
        _TOKENS
        | dict(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=48,
            window_size=64,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=256,
            initializer_range=0.15,
        ),
    ),
    "llama_dynamic": (
        "llama",
        _SIZES | dict(max_position_embeddings=64, rope_parameters=_rope("dynamic", factor=2.0)),
    ),
    "qwen2_dynamic": (
        "qwen2",
        _SIZES | dict(max_position_embeddings=64, rope_parameters=_rope("dynamic", factor=2.0)),
    ),
    "phi3_long": (
        "phi3",
        _SIZES
        | dict(
            original_max_position_embeddings=64,
            rope_parameters=_rope(
                "longrope",
                short_factor=[1.0, 1.125, 1.25, 1.5],
                long_factor=[2.0, 2.5, 3.0, 4.0],
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "gemma3_bidirectional": (
        "gemma3_text",
        _GEMMA | dict(layer_types=_BANDED, use_bidirectional_attention=True),
    ),
    "xlm": (
        "xlm",
        dict(
            vocab_size=VOCABULARY,
            emb_dim=32,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=256,
            n_langs=1,
        ),
    ),
    "hrm": ("hrm_text", _SIZES),
    "llama4": (
        "llama4_text",
        _SIZES
        | dict(
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            moe_layers=[],
            attention_chunk_size=WINDOW,
        ),
    ),
    "gpt_oss": ("gpt_oss", _SIZES | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1)),
}


# Where the layers of the four families with every adapter have their names.
NAMES = {
    "llama": ("q_proj", "embed_tokens"),
    "qwen2": ("q_proj", "embed_tokens"),
    "gemma3": ("q_proj", "embed_tokens"),
    "gpt2": ("c_attn", "wte"),
}
_Config = Callable[[str, str], peft.PeftConfig]


def _lora(**settings: Any) -> _Config:
    return lambda attention, _: LoraConfig(
        **dict(r=2, lora_alpha=4, target_modules="all-linear", fan_in_fan_out=attention == "c_attn")
        | settings
    )


def _named(config: Callable[..., peft.PeftConfig], **settings: Any) -> _Config:
    """A config on the attention's first projection, with its feed-forward or not."""
    return lambda attention, _: config(target_modules=[attention], **settings)


def _head(config: Callable[..., peft.PeftConfig], **settings: Any) -> _Config:
    return lambda attention, _: config(target_modules=[attention, "lm_head"], **settings)


_DORA = dict(use_dora=True)
_OFT = dict(use_cayley_neumann=False, oft_block_size=8, r=0)
_VB = dict(num_vectors=16, vector_length=8, r=2, topk=2)

# The name of an adapter -> the config for the names of an attention layer and the embedding.
ADAPTERS: dict[str, _Config | None] = {
    "LoRA": _lora(),
    "LoRA q": lambda attention, _: LoraConfig(
        r=2, target_modules=[attention], fan_in_fan_out=attention == "c_attn"
    ),
    "rslora": _lora(use_rslora=True),
    "alpha 3": _lora(lora_alpha=3),
    "patterns": lambda attention, _: LoraConfig(
        r=2,
        target_modules="all-linear",
        rank_pattern={attention: 3},
        alpha_pattern={attention: 5},
        fan_in_fan_out=attention == "c_attn",
    ),
    "bias all": _lora(bias="all"),
    "bias lora_only": _lora(bias="lora_only"),
    "lora_bias": _lora(lora_bias=True),
    "head saved": _lora(modules_to_save=["lm_head"]),
    "head adapted": _head(LoraConfig, r=2),
    "head alone": lambda *_: LoraConfig(r=2, target_modules=["lm_head"]),
    "embedding": lambda attention, embedding: LoraConfig(
        r=2, target_modules=[attention, embedding], fan_in_fan_out=attention == "c_attn"
    ),
    "embedding saved": lambda attention, embedding: LoraConfig(
        r=2, target_modules=[attention], modules_to_save=[embedding]
    ),
    "IA3": lambda attention, _: IA3Config(
        target_modules=[attention],
        feedforward_modules=[],
        fan_in_fan_out=attention == "c_attn",
    ),
    "VeRA": _named(peft.VeraConfig, r=4),
    "MiSS": _named(peft.MissConfig, r=2),
    "RoAd": _named(peft.RoadConfig, group_size=8),
    "LN": lambda attention, _: peft.LNTuningConfig(
        target_modules=["ln_1"] if attention == "c_attn" else ["input_layernorm"]
    ),
    "none": None,  # every parameter is trained
    "tokens": lambda *_: peft.LoraConfig(
        r=2, target_modules="all-linear", trainable_token_indices=[3, 9]
    ),
    "tokens alone": lambda *_: peft.TrainableTokensConfig(token_indices=[1, 3]),
    "tokens new": lambda *_: peft.TrainableTokensConfig(token_indices=[96, 97]),
    "HRA": _named(peft.HRAConfig, r=2),
    "LoKr": _named(peft.LoKrConfig, r=2, alpha=2),
    "BOFT": _named(peft.BOFTConfig, boft_block_size=4),
    "VBLoRA": _named(peft.VBLoRAConfig, **_VB),
    "DeLoRA": _named(peft.DeloraConfig, r=2),
    "DoRA": _lora(**_DORA),
    "DoRA last": lambda attention, embedding: LoraConfig(
        r=2,
        target_modules=[attention],
        layers_to_transform=[1],
        modules_to_save=[embedding],
        fan_in_fan_out=attention == "c_attn",
        **_DORA,
    ),
    "DoRA head": lambda _, embedding: LoraConfig(
        r=2, target_modules=["lm_head"], modules_to_save=[embedding], **_DORA
    ),
    "MiSS head": _head(peft.MissConfig, r=2),
    "RoAd head": _head(peft.RoadConfig, group_size=2),
    "LoKr head": _head(peft.LoKrConfig, r=2, alpha=2),
    "BOFT head": _head(peft.BOFTConfig, boft_block_size=1),
    "VBLoRA head": _head(peft.VBLoRAConfig, num_vectors=16, vector_length=1, r=2, topk=2),
    "C3A": _named(peft.C3AConfig, block_size=8),
    "LoHa": _named(peft.LoHaConfig, r=2, alpha=2),
    "OFT": _named(peft.OFTConfig, **_OFT),
    "aLoRA": _lora(alora_invocation_tokens=[9, 11]),
    "aLoRA beside": lambda attention, embedding: LoraConfig(
        r=2,
        target_modules=[attention],
        alora_invocation_tokens=[9, 11],
        modules_to_save=[embedding],
        task_type="CAUSAL_LM",
    ),
    "prompt": lambda *_: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def build(
    family: str, adapter: str = "LoRA", *, fresh: bool = False, seed: int = 0
) -> torch.nn.Module:
    """A live float32 module in eval mode.

    Args:
        family, adapter: their names.
        fresh: whether it is left as PEFT makes it: an adapter that changes nothing yet, where some
            tensors have no gradient. Else every trainable tensor and every vector is moved.
        seed: of all its numbers.
    """
    kind, settings = FAMILIES[family]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **settings)
        module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        adapt = ADAPTERS[adapter]
        if adapt is not None:
            names = NAMES.get(family.partition("_")[0], ("", ""))
            module = get_peft_model(module, adapt(*names))
    return module.eval() if fresh else moved(module, seed=seed).eval()


@torch.no_grad()
def moved(module: torch.nn.Module, *, seed: int = 0) -> torch.nn.Module:
    """The module, of which every trainable tensor and every vector has moved."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad or p.ndim == 1:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module
