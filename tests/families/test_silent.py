"""What was silently wrong once, each by its kind: it is right, or refused with the reason.

"Right" is what `examine` means by it: against the live module in float64.
"""

import examine
import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from zoo import WIDE, build, moved

import funcprobe as fp

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


# 1. A head that cannot be read in slices of the vocabulary


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tokens", [[3, 9], [WIDE - 1], [3, 4095, 4096]])
def test_trained_tokens_of_a_tied_head(family, tokens):
    module = build(f"{family}_wide", "none")
    module = get_peft_model(module, TrainableTokensConfig(token_indices=tokens))
    examine.right(moved(module))


def test_trained_tokens_of_embeddings_and_head_apart():
    module = build("llama_wide", "none")
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5000], "lm_head": [7, 4096]},
    )
    module.config.tie_word_embeddings = False
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    examine.right(moved(get_peft_model(module, config)))


@pytest.mark.parametrize("adapter", ["MiSS", "RoAd", "LoKr", "BOFT", "VBLoRA"])
def test_an_adapter_on_a_head_that_is_no_row_for_each_token(adapter):
    examine.right(build("llama_wide", f"{adapter} head"))


# 2. State that outlives a call


@pytest.mark.parametrize("family", ["llama_dynamic", "qwen2_dynamic", "phi3_long"])
def test_a_rotary_embedding_that_follows_the_length(family):
    """It is right up to the original length, and rows beyond it are refused, before and after."""
    module = build(family)
    examine.right(module, checks=examine.ALL, longest=64)
    model, params, base = fp.split(module, dtype=torch.float64)
    assert model.longest == 64
    score = fp.scorer(model, base)
    short = examine.batch(64)
    first = score(params, short)
    for call in (
        lambda batch: score(params, batch),
        lambda batch: fp.logits(model, params, base, batch),
        lambda batch: fp.sweep(score, params, params, [1e-3], batch),
        lambda batch: fp.gradient(score, params, batch),
        lambda batch: fp.row_gradients(score, params, batch),
        lambda batch: fp.taylor(score, params, params, batch),
    ):
        with pytest.raises(ValueError, match="64.*(160|159)|(160|159).*64"):
            call(examine.batch())
    assert all(torch.equal(a, b) for a, b in zip(first, score(params, short), strict=True))


class Counts(torch.nn.Module):
    """A layer that keeps something from one call to the next."""

    def __init__(self, inner, kept):
        super().__init__()
        self.inner, self.calls, self.kept = inner, 0, kept

    def forward(self, x):
        out = self.inner(x)
        if self.kept == "number":
            self.calls += 1
            return out * (1 + 0.1 * self.calls)
        memory = getattr(self, "memory", None)
        self.memory = out.detach().mean()
        return out if memory is None else out + memory


@pytest.mark.parametrize("kept", ["number", "tensor"])
def test_a_layer_that_remembers_the_call_before(kept):
    module = build("llama")
    layer = module.get_base_model().model.layers[0]
    layer.mlp = Counts(layer.mlp, kept)
    examine.refused(module, "(state|same bits|twice|again)")


# 3. and 7. Tokens that see what they should not, and prompts that cannot be shared


@pytest.mark.parametrize("family", ["gpt_neo", "gpt_neo_wide", "mistral", "qwen2_window"])
def test_prompts_in_a_band(family):
    """The window is 16 or 64; a shared prompt and its responses are longer than either."""
    examine.right(build(family), checks=("scores", "shared"))


@pytest.mark.parametrize("family", ["gemma3_bidirectional", "xlm"])
def test_attention_to_later_tokens(family):
    examine.refused(build(family), "(later|causal)")


class Mixes(torch.nn.Module):
    """A layer that lets a token see what is no token before it."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        out = self.inner(x)
        return (
            out
            + 0.3
            * {
                "next": lambda: out.roll(-1, -2),
                "mean": lambda: out.mean(-2, keepdim=True),
                "last": lambda: out[..., -1:, :],
                "rows": lambda: out.mean(0, keepdim=True),
            }[self.how]()
        )


class WillMix(torch.nn.Module):
    """The B of a LoRA layer, 0 as long as it is fresh, that gives each token the next one's."""

    def __init__(self, inner):
        super().__init__()
        self.weight, self.bias = inner.weight, None

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight).roll(-1, -2)


@pytest.mark.parametrize("how", ["next", "mean", "last", "rows"])
def test_a_layer_that_mixes_tokens(how):
    module = build("llama")
    layer = module.get_base_model().model.layers[0]
    layer.mlp = Mixes(layer.mlp, how)
    examine.refused(module, "(later|causal|row)")


def test_a_fresh_adapter_that_will_mix_tokens_when_it_moves():
    module = build("llama", fresh=True)
    adapter = module.get_base_model().model.layers[0].mlp.down_proj.lora_B
    adapter["default"] = WillMix(adapter["default"])
    examine.refused(module, "later")


# 5. An adapter that acts outside the part that is split off


@pytest.mark.parametrize("adapter", ["aLoRA", "aLoRA beside"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_that_reads_the_tokens(family, adapter):
    examine.refused(build(family, adapter), "aLoRA")
