"""The table of cases: tiny PEFT models of many families, ragged batches, random directions.

The models are random, with a vocabulary of 64 and two layers. `live` builds a new one, to which a
test may do anything; what `case` and `module64` return is shared, and nothing may change it.
"""

import warnings
from functools import cache
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from funcprobe import Scores, collate, objective, prepare, scorer, split

torch.set_num_threads(1)  # at these sizes a second thread costs ten times what it gives

VOCABULARY = 64
EOS = 2

_TOKENS = dict(bos_token_id=1, eos_token_id=EOS, pad_token_id=0, vocab_size=VOCABULARY)
_SIZES = _TOKENS | dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.25,
)
_GEMMA = _SIZES | dict(head_dim=4, sliding_window=4, query_pre_attn_scalar=4)
_GPT2 = _TOKENS | dict(n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=64)
_NEOX = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama_tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=4),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=4),
    "gemma2": lambda: Gemma2Config(
        **_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_GEMMA, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**_SIZES),
    "gpt2": lambda: GPT2Config(**_GPT2, initializer_range=0.25),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX),
    "olmo2": lambda: Olmo2Config(**_SIZES),
    "granite": lambda: GraniteConfig(
        **_SIZES,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
    ),
    "cohere": lambda: CohereConfig(**_SIZES, logit_scale=0.25),
}
FAMILIES = sorted(CONFIGS)
SOME = ["gemma2", "gpt2", "llama"]  # a soft-capped head, a layer norm with biases, the usual one


def live(family="llama", *, attention="eager", adapter=True, seed=0, **lora):
    """A new tiny model with an adapter that matters (its B is not zero), in eval mode."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers the old way
        torch.manual_seed(seed)
        config = CONFIGS[family]()
        module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        if adapter:
            settings = dict(r=2, lora_alpha=4, target_modules="all-linear") | lora
            settings["fan_in_fan_out"] = family == "gpt2"
            module = get_peft_model(module, LoraConfig(**settings))
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "lora_" in name:
                    p.normal_(0, 0.3)
                elif p.ndim == 1:
                    p.add_(0.1 * torch.randn_like(p))
    return module.eval()


@cache
def module64(family="llama"):
    """The live module with float64 weights; to be run within `reference.float64`."""
    return live(family).double()


@cache
def case(family="llama", dtype=torch.float64):
    """A live module (float32, shared), and what `split` makes of it."""
    module = live(family)
    model, params, base = split(module, dtype=dtype)
    return SimpleNamespace(module=module, model=model, params=params, base=base)


PROMPTS = {0: [5, 9, 11], 1: [7], 2: [3, 4, 6, 8, 10], 3: [12, 13]}
_ROWS = [  # prompt, response; some end with EOS, one is empty, one stops short
    (0, [14, 15, 16, 17, 18, EOS]),
    (2, [20, 21, EOS]),
    (1, []),
    (0, [22, 23, 24, 25, 26]),
    (1, [EOS]),
    (2, [27, 28, 29, EOS]),
    (3, [30, 31]),
    (0, [14, 33, 34, 35, 36, 37]),
]


def batch(*, rows=None, pad_id=0, **fields):
    """Eight ragged rows of four prompts, with rewards; `rows` selects and orders them."""
    chosen = [_ROWS[i] for i in (range(len(_ROWS)) if rows is None else rows)]
    reward = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0, 0.25, 1.0, 0.0], dtype=torch.float64)
    fields.setdefault("reward", reward[list(range(len(_ROWS)) if rows is None else rows)])
    return collate([PROMPTS[p] for p, _ in chosen], [r for _, r in chosen], pad_id=pad_id, **fields)


FULL = [0, 1, 3, 4, 5, 6, 7]  # the rows with a response


def loss(family="llama", recipe="reinforce"):
    """A case, a recipe's objective on it, and the batch prepared for that."""
    policy = case(family)
    score = scorer(policy.model, policy.base)
    return policy, objective(score, recipe), prepare(batch(), recipe)


def direction(params, *, seed=0, size=1.0):
    """A random direction with the names, shapes and dtypes of `params`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in params.items()
    }


# A policy small enough to enumerate: three tokens of which 0 ends the response, at most four of
# them, one table of logits by depth, its row the prefix (and the prompt) read as a binary number.

TOY_LENGTH = 4
TOY_EOS = 0


def toy_score(params, batch):
    """Scores of the enumerable policy: a plain function of (params, batch)."""
    response = batch.tokens[:, 1:]
    row = batch.tokens[:, 0] - 3  # the prompt is one token, 3 or more
    logp, entropy = [], []
    for depth in range(TOY_LENGTH):
        lp = params[f"depth{depth}"][row].log_softmax(-1)
        logp.append(lp.gather(-1, response[:, depth : depth + 1]).squeeze(-1))
        entropy.append(-(lp.exp() * lp).sum(-1))
        row = 2 * row + (response[:, depth] - 1).clamp(min=0)
    return Scores(
        *(torch.where(batch.response, torch.stack(parts, -1), 0.0) for parts in (logp, entropy))
    )


def toy_sequences():
    """All responses of the enumerable policy: EOS ends one, and so does the fourth token."""
    done, alive = [], [[]]
    for _ in range(TOY_LENGTH):
        done += [s + [TOY_EOS] for s in alive]
        alive = [s + [token] for s in alive for token in (1, 2)]
    return done + alive


def toy_params(*, prompts=1, seed=0, counts=True):
    """Its tables, float64: logs of small integers that sum to 4 (or plain random logits)."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for depth in range(TOY_LENGTH):
        shape = (prompts * 2**depth, 3)
        if counts:
            order = torch.argsort(torch.rand(shape, generator=generator), -1)
            tables[f"depth{depth}"] = torch.tensor([1.0, 1.0, 2.0]).double()[order].log()
        else:
            tables[f"depth{depth}"] = torch.randn(shape, generator=generator).double()
    return tables


def toy_batch(responses, prompts=None, **fields):
    """A batch of the enumerable policy, always `TOY_LENGTH` response positions wide."""
    prompts = [0] * len(responses) if prompts is None else prompts
    wide = [1] * TOY_LENGTH  # a last row that pins the width, and goes
    made = collate([[3 + p] for p in [*prompts, 0]], [*responses, wide])
    return made.rows(slice(0, len(responses)))._replace(**fields)
