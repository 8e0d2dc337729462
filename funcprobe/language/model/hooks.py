"""Hooks on the caller's module, which the split leaves out: what changes numbers is refused.

Each hook is called on a row of a few tokens, on a copy of the module that is then dropped. It may
see that row (a logger logs it); the caller's module, its hooks and its tensors stay as they are.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from . import rotary
from .checks import rounding
from .forward import Forward, Params
from .skeleton import duplicate

# The dict of a module's hooks, the dicts of flags beside it, and what a hook of it is called.
_HOOKS = (
    ("_forward_pre_hooks", ("_forward_pre_hooks_with_kwargs",), "forward pre-hook"),
    (
        "_forward_hooks",
        ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
        "forward hook",
    ),
    ("_backward_pre_hooks", (), "backward pre-hook"),
    ("_backward_hooks", (), "backward hook"),
)


def check_hooks(module: nn.Module, forward: Forward, params: Params, base: Params) -> None:
    """The hooks of a module and of its trainable parameters change no number.

    Args:
        module: the caller's.
        forward: its own forward.
        params, base: its tensors.

    Raises:
        ValueError: a hook changes outputs or gradients, or raises on the test row.
    """
    for name, parameter in module.named_parameters():
        if name in params:
            _try_gradient_hooks(name, parameter, params[name])
    if not any(getattr(part, hooks) for part in module.modules() for hooks, *_ in _HOOKS):
        return
    scratch = _scratch(forward)
    names = _attach(module, scratch)
    hooked, plain = (_outcome(part, forward, params, base) for part in (scratch, _scratch(forward)))
    error = rounding((*hooked, *base.values())) ** 0.5
    pairs = zip(hooked, plain, strict=True)
    if not all((a - b).norm() <= error * b.norm() for a, b in pairs):
        raise _refusal(f"the hooks {', '.join(names[:5])} together change outputs or gradients")


class _Trial:
    """A module's hook that is refused as soon as it changes what it sees."""

    def __init__(self, hook: Callable[..., Any], name: str, replaces: Callable[..., Any]) -> None:
        self.hook, self.name, self.replaces = hook, name, replaces

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        return _call(self.hook, self.name, (module, *values), self.replaces(*values))


def _attach(module: nn.Module, scratch: nn.Module) -> list[str]:
    """Puts a trial of every hook of a module on a copy of it, and returns the hooks' names."""
    names = []
    for path, part in module.named_modules():
        twin = scratch.get_submodule(path)
        for hooks, flags, title in _HOOKS:
            trials: OrderedDict[int, _Trial] = OrderedDict()
            for key, hook in getattr(part, hooks).items():
                names.append(f"{title} {_hook_name(hook)} of {path or 'the module'!r}")
                with_options = any(key in getattr(part, flag) for flag in flags[:1])
                trials[key] = _Trial(hook, names[-1], _replaced(hooks, with_options))
            setattr(twin, hooks, trials)
            for flag in flags:
                setattr(twin, flag, OrderedDict(getattr(part, flag)))
        twin._is_full_backward_hook = part._is_full_backward_hook
    return names


def _replaced(hooks: str, with_options: bool) -> Callable[..., Any]:
    """Which of the values that a hook sees its result takes the place of."""
    if hooks == "_forward_hooks":
        return lambda *values: values[-1]
    if hooks == "_forward_pre_hooks" and with_options:
        return lambda *values: values
    return lambda *values: values[0]


def _call(hook: Callable[..., Any], name: str, values: tuple[Any, ...], replaced: Any) -> Any:
    """Calls a hook, and raises ValueError if it raises, or changes a value or what it replaces."""
    seen = values[1:] if isinstance(values[0], nn.Module) else values
    before, target = _copies(seen), _copies(replaced)
    try:
        result = hook(*values)
    except Exception as error:
        raise _refusal(f"the {name} raised {type(error).__name__}: {error}") from error
    if _differs(before, seen) or (result is not None and _differs(target, result)):
        raise _refusal(f"the {name} changes the numbers that it sees")
    return result


def _try_gradient_hooks(name: str, parameter: Tensor, value: Tensor) -> None:
    """Calls the hooks on a parameter with a gradient, on a copy where they take the parameter."""
    on_gradient = list((parameter._backward_hooks or {}).values())
    after = list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())
    if not on_gradient and not after:
        return
    generator = torch.Generator(value.device).manual_seed(0)
    gradient = torch.empty_like(value).normal_(generator=generator)
    for hook in on_gradient:
        _call(hook, f"gradient hook {_hook_name(hook)} of {name!r}", (gradient,), gradient)
    for hook in after:
        twin = nn.Parameter(value.clone())
        twin.grad = gradient.clone()
        title = f"post-accumulate hook {_hook_name(hook)} of {name!r}"
        _call(hook, title, (twin,), None)
        if twin.grad is None or _differs([gradient], twin.grad):
            raise _refusal(f"the {title} changes the gradient")


def _outcome(scratch: nn.Module, forward: Forward, params: Params, base: Params) -> list[Tensor]:
    """The logits of a row, and the gradient of a number of them in each trainable parameter."""
    moving = {name: p.detach().requires_grad_() for name, p in params.items()}
    tokens = torch.tensor([[1, 2, 3, 2, 1, 3]], device=next(iter(params.values())).device)
    inputs = {"input_ids": tokens, "use_cache": False}
    with torch.enable_grad(), forward.precision():
        logits = functional_call(scratch, base | moving, (), inputs, strict=True).logits
        number = logits.logsumexp(-1).sum() - logits[..., 1].sum()
        # `backward` reaches parts whose inputs alone have a gradient, `autograd.grad` does not.
        number.backward()
    return [logits.detach(), *(p.grad for p in moving.values() if p.grad is not None)]


def _scratch(forward: Forward) -> nn.Module:
    """A copy of a skeleton that runs its classes' forward, whose parts may have hooks."""
    scratch = duplicate(forward.skeleton)
    for part in scratch.modules():
        if not rotary.varies(part):  # whose class would write a table
            part.__dict__.pop("forward", None)
    return scratch


def _copies(values: Any) -> list[Any]:
    return [x.detach().clone() if isinstance(x, Tensor) else x for x in tree_leaves(values)]


def _differs(before: list[Any], values: Any) -> bool:
    """Whether the leaves of a tree are others than before."""
    after = tree_leaves(values)
    return len(before) != len(after) or not all(map(_same, before, after))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is b or bool(a == b)


def _hook_name(hook: Any) -> str:
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def _refusal(cause: str) -> ValueError:
    return ValueError(
        "split: hooks that change no number were expected, since the pure model runs none; "
        f"{cause}. Remove it before the split (handle.remove()), or write what it does into the "
        "module's forward."
    )
