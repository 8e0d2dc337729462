"""Forward hooks: those that change what a layer says are refused, all others are dropped."""

import examine
import pytest
from zoo import build

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


def scale_output(module, inputs, output):
    first = output[0] if isinstance(output, tuple) else output
    return (first * 1.3, *output[1:]) if isinstance(output, tuple) else first * 1.3


def scale_input(module, inputs):
    return (inputs[0] * 1.3, *inputs[1:])


PLACES = {
    "a layer": lambda causal: causal.model.layers[1],
    "a projection": lambda causal: causal.model.layers[0].self_attn.q_proj,
    "the embedding": lambda causal: causal.model.embed_tokens,
    "the norm": lambda causal: causal.model.norm,
    "the head": lambda causal: causal.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_that_changes_what_a_layer_says(place):
    module = build("llama")
    PLACES[place](module.get_base_model()).register_forward_hook(scale_output)
    examine.refused(module, "hook")


@pytest.mark.parametrize("place", [place for place in PLACES if place != "the embedding"])
def test_a_hook_that_changes_what_a_layer_hears(place):
    module = build("llama")
    PLACES[place](module.get_base_model()).register_forward_pre_hook(scale_input)
    examine.refused(module, "hook")


def test_hooks_that_only_look_are_dropped():
    module = build("llama")
    module.enable_input_require_grads()
    seen = []
    for part in module.modules():
        part.register_forward_hook(lambda *_: seen.append(1))
        part.register_forward_pre_hook(lambda *_: seen.append(1))
    seen.clear()
    examine.right(module, checks=("scores",))
