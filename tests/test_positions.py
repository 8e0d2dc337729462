"""Tables of positions, which end somewhere: longer rows are refused, by whatever scores them."""

import cases
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import funcprobe as fp
from funcprobe.language.model import positions

TABLES = {
    "gpt2": ("n_positions", {}),
    "gpt_neo": ("max_position_embeddings", dict(attention_types=[[["global", "local"], 1]])),
    "biogpt": ("max_position_embeddings", {}),
    "opt": ("max_position_embeddings", dict(word_embed_proj_dim=32, ffn_dim=48)),
    "gptj": ("n_positions", dict(rotary_dim=4)),
    "openai-gpt": ("n_positions", {}),
}
LONGEST = 40


def live(family):
    """A tiny module whose table has `LONGEST` positions."""
    field, settings = TABLES[family]
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    layers = {"num_layers" if family == "gpt_neo" else "num_hidden_layers": 2}
    heads = {"num_heads": 4} if family == "gpt_neo" else {}
    config = AutoConfig.for_model(
        family, **sizes, **layers, **heads, **cases._TOKENS, **settings, **{field: LONGEST}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def batch(length):
    """A row of `length` tokens and a short one."""
    tokens = [3 + i * i % 60 for i in range(length)]
    return fp.collate([tokens[:5], [7, 9]], [tokens[5:], [11, 12, 13]])


@pytest.mark.parametrize("family", TABLES)
def test_rows_beyond_a_table_are_refused_when_they_are_scored(family):
    model, params, base = fp.split(live(family))
    assert model.longest == LONGEST
    score = fp.scorer(model, base)
    fp.evaluate(score, params, batch(LONGEST))
    message = f"model: rows of at most {LONGEST} tokens.*one has {LONGEST + 2}.*table of positions"
    for call in (
        lambda rows: fp.evaluate(score, params, rows),
        lambda rows: fp.logits(model, params, base, rows),
        lambda rows: fp.row_gradients(lambda p, b: score(p, b).logp.sum(-1), params, rows),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call(batch(LONGEST + 2))
        assert "rotary" not in str(caught.value)


def test_the_shorter_of_two_limits_holds():
    module = live("gpt2")
    module.config.max_position_embeddings = 8
    assert positions.limit(module).longest == 8
    assert positions.limit(cases.live()) is None


def test_a_model_says_how_long_its_rows_may_be_and_how_its_head_is_read():
    model = fp.split(live("gpt2"))[0]
    assert f"rows of at most {LONGEST} tokens, prompts" in repr(model)
    assert repr(model).endswith("head read in slices)")
    assert "rows of any length, prompts" in repr(cases.case("llama").model)
