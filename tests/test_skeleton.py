"""What stands around a module is taken off it, and what cannot be made pure is refused."""

import cases
import pytest
import torch

import funcprobe as fp

# Wrappers


def test_ddp_is_unwrapped():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = cases.live()
        wrapped = torch.nn.parallel.DistributedDataParallel(module)
        _, params, _ = fp.split(wrapped)
    finally:
        dist.destroy_process_group()
    assert set(params) == set(cases.case("llama", None).params)


def test_compile_is_unwrapped_repeatedly():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    module = cases.live()
    _, params, base = fp.split(Wrapper(torch.nn.DataParallel(Wrapper(module))))
    assert set(params) == set(cases.case("llama", None).params)
    assert set(base) == set(cases.case("llama", None).base)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_splits():
    _, params, _ = fp.split(torch.compile(cases.live()))
    assert set(params) == set(cases.case("llama", None).params)


# Refusals


def quantise(module):
    layer = module.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(
        torch.zeros(layer.weight.shape, dtype=torch.uint8), requires_grad=False
    )


def shard(module):
    module.__class__ = type("FSDP" + type(module).__name__, (type(module),), {})


def shard_a_layer(module):
    layer = module.get_base_model().model.layers[1]
    layer.__class__ = type("FSDP" + type(layer).__name__, (type(layer),), {})


def patch(module):
    layer = module.get_base_model().model.layers[0]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)


def freeze(module):
    for p in module.parameters():
        p.requires_grad_(False)


def to_meta(module):
    module.to("meta")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.merge_adapter(), "merged.*unmerge_adapter"),
        (freeze, "no parameter is trainable.*is_trainable=True"),
        (shard, "sharded.*full state"),
        (shard_a_layer, r"layers\.1' is sharded"),
        (quantise, r"quantised \('base_model.*up_proj.*uint8.*quantization_config"),
        (to_meta, "no data"),
        (patch, r"layers\.0' has its forward replaced"),
    ],
)
def test_what_cannot_be_split_is_refused(spoil, message):
    module = cases.live()
    spoil(module)
    with pytest.raises(ValueError, match=f"(?s)split: .*{message}"):
        fp.split(module)


def test_a_model_without_a_language_model_head_is_refused():
    module = cases.live(adapter=False).model
    with pytest.raises(ValueError, match="split: .*decoder-only causal language model"):
        fp.split(module)
