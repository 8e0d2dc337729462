"""A derivative planted wrong by 1% in any one tensor is noticed, in every family and adapter.

The plant changes no value: in the place of a tensor p a forward pass reads
``p + 0.01 (p - detach(p))``, whose derivative is 1.01.
"""

from contextlib import contextmanager

import pytest
import torch
from cells import CELLS
from examine import batch
from zoo import build

import funcprobe as fp
from funcprobe.language.model.forward import Forward

RIGHT = [c for c in CELLS if not (c.raises or c.refused or c.false_derivative)]


@contextmanager
def planted(name: str):
    """Within it every model's derivative along the parameter `name` is wrong by 1%."""

    def wrong(right):
        def call(self, params, *rest):
            if name in params:
                p = params[name]
                params = params | {name: p + 0.01 * (p - p.detach())}
            return right(self, params, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "states", wrong(Forward.states))
        patch.setattr(Forward, "head", wrong(Forward.head))
        yield


def noticed(module: torch.nn.Module, name: str, dtype: torch.dtype | None) -> bool:
    with planted(name):
        model, _, _ = fp.split(module, dtype=dtype)
    return bool(model.false_derivative)


def one_of_each(module: torch.nn.Module) -> list[str]:
    """One trainable tensor of each that the module has in every layer."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    return list({"".join(c for c in name if not c.isdigit()): name for name in names}.values())


def chosen(names: list[str]) -> list[str]:
    """Three of the names at most: a check that fails looks at each tensor, which takes its time."""
    return names[:: max(-(-len(names) // 3), 1)]


def test_the_plant_is_seen_by_the_gradient_and_changes_no_value():
    model, params, base = fp.split(build("llama"), dtype=torch.float64)
    name = next(iter(params))
    score = fp.scorer(model, base)
    right, value = fp.gradient(score, params, batch()), score(params, batch())
    with planted(name):
        wrong, same = fp.gradient(score, params, batch()), score(params, batch())
    assert torch.equal(value.logp, same.logp)
    torch.testing.assert_close(wrong[name], 1.01 * right[name], rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("cell", RIGHT, ids=lambda cell: cell.id)
def test_a_derivative_wrong_by_a_percent_is_noticed(cell):
    module = build(cell.family, cell.adapter, fresh=True)
    names = chosen(one_of_each(module))
    assert not [name for name in names if not noticed(module, name, torch.float64)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("adapter", ["LoRA", "none", "embedding", "head saved", "tokens"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_derivative_wrong_by_a_percent_is_noticed_in_every_tensor(family, adapter, dtype):
    module = build(family, adapter)
    names = one_of_each(module)
    assert not [name for name in names if not noticed(module, name, dtype)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "adapter"), [("llama", "IA3"), ("gpt2", "LN"), ("qwen2", "VeRA")]
)
def test_a_derivative_wrong_by_a_percent_is_noticed_in_float32(family, adapter):
    module = build(family, adapter)
    assert not [name for name in one_of_each(module) if not noticed(module, name, None)]
