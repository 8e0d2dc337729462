"""Hooks on the caller's module: those that change a number are refused by name."""

import cases
import pytest
import torch

import funcprobe as fp


def layer(module):
    return module.get_base_model().model.layers[1]


def weight(module):
    return next(p for n, p in module.named_parameters() if p.requires_grad and "lora_B" in n)


def louder(module, args, output):
    return 1.3 * output


def louder_in_place(module, args, output):
    output.data.mul_(1.3)


def louder_input(module, args):
    return (1.1 * args[0], *args[1:])


def louder_options(module, args, options):
    return args, options | {"hidden_states": 1.1 * args[0]}


def louder_gradient(module, grad_input, grad_output):
    return tuple(None if g is None else 2 * g for g in grad_input)


def louder_gradient_output(module, grad_output):
    return tuple(2 * g for g in grad_output)


def louder_activation(module, args, output):
    output.register_hook(lambda grad: 2 * grad)


def failing(module, args, output):
    raise KeyError("step")


def double(grad):
    return 2 * grad


def clear(parameter):
    parameter.grad = None


CHANGES = {
    "forward hook louder of .*layers.1.mlp": lambda m: layer(m).mlp.register_forward_hook(louder),
    "forward hook louder_in_place of .*layers.1.mlp": lambda m: layer(m).mlp.register_forward_hook(
        louder_in_place
    ),
    "forward pre-hook louder_input of .*layers.1.mlp": lambda m: layer(
        m
    ).mlp.register_forward_pre_hook(louder_input),
    "forward pre-hook louder_options of .*layers.1": lambda m: layer(m).register_forward_pre_hook(
        louder_options, with_kwargs=True
    ),
    "backward hook louder_gradient of .*layers.1.mlp": lambda m: layer(
        m
    ).mlp.register_full_backward_hook(louder_gradient),
    "backward pre-hook louder_gradient_output of .*layers.1.mlp": lambda m: layer(
        m
    ).mlp.register_full_backward_pre_hook(louder_gradient_output),
    "hooks forward hook louder_activation .*together change": lambda m: layer(
        m
    ).mlp.register_forward_hook(louder_activation),
    "forward hook failing of .*layers.1.mlp.*raised KeyError": lambda m: layer(
        m
    ).mlp.register_forward_hook(failing),
    "gradient hook double of .*lora_B": lambda m: weight(m).register_hook(double),
    "post-accumulate hook clear of .*lora_B": lambda m: weight(
        m
    ).register_post_accumulate_grad_hook(clear),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_hook_that_changes_a_number_is_refused_by_name(message):
    module = cases.live()
    CHANGES[message](module)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=f"split: hooks that change no number.*{message}"):
        fp.split(module)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in module.named_parameters())


def test_hooks_that_only_look_are_accepted():
    module, seen = cases.live(), []
    module.enable_input_require_grads()
    module.register_forward_hook(
        lambda module, args, options, output: seen.append(output.logits.shape), with_kwargs=True
    )
    layer(module).register_forward_pre_hook(lambda module, args: args)
    layer(module).register_forward_hook(lambda module, args, output: output)
    layer(module).register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(module).mlp.register_forward_hook(
        lambda module, args, output: output.register_hook(lambda grad: seen.append("grad")) and None
    )
    weight(module).register_hook(lambda grad: seen.append("weight"))
    weight(module).register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    batch = cases.batch()
    assert torch.equal(
        fp.logits(*fp.split(module), batch), fp.logits(*fp.split(cases.live()), batch)
    )
    assert sorted(map(str, seen)) == sorted(
        ["weight", "accumulated", "backward", "grad", "torch.Size([1, 6, 64])"]
    )


def test_a_hook_on_a_part_that_the_pure_model_passes_by_is_refused():
    module = cases.live()
    dropout = layer(module).mlp.up_proj.lora_dropout["default"]
    dropout.register_forward_hook(louder)
    with pytest.raises(ValueError, match=r"forward hook louder of .*lora_dropout"):
        fp.split(module)
