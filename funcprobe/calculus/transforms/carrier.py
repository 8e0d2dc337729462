"""Tensors that carry more than a value through an unmodified model, and torch's operations by kind.

Each transform (`increment`, `jet`) says what it does with a kind of operation; `KINDS` lists the
spellings of each kind once, and `Carrier` meets them in `__torch_function__`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Scope:
    """What the carriers of one evaluation share."""

    rules: dict[Callable, Callable]
    fallbacks: Counter = field(default_factory=Counter)  # operations without a rule, by name


class Carrier(Tensor):
    """A tensor's value and what it carries, all of one shape and dtype; None stands for zeros."""

    parts: tuple[Tensor | None, ...]  # the value first
    scope: Scope

    @staticmethod
    def __new__(cls, *parts_and_scope):
        """``cls(value, *others, scope)``; `scope` is that of the arguments they came from."""
        *parts, scope = parts_and_scope
        value = parts[0]
        self = Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=value.device
        )
        self.parts, self.scope = tuple(parts), scope
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Applies the operation's rule, which gives the result's parts, or what stands for it."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if "input" in kwargs and not args:
            args = (kwargs.pop("input"),)
        scope = find(args, kwargs).scope
        rule = scope.rules.get(func)
        if rule is None and _writes(func):
            return cls._in_place(func.__name__, *args, **kwargs)
        out = NotImplemented if rule is None else rule(func, *args, **kwargs)
        if out is NotImplemented:
            out = cls.without_rule(func, *args, **kwargs)
            scope.fallbacks[getattr(func, "__name__", str(func))] += 1
        return cls.wrap(out, scope)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Refuses: operations are met in `__torch_function__`, but within a transform."""
        cls.refuse(f"{func} bypassed the rules, so what it does to a changing tensor is unknown.")

    @classmethod
    def wrap(cls, parts, scope: Scope):
        """Parts as a carrier, tuples of them as a tuple of carriers; a value alone as it is."""
        if isinstance(parts, Tensor):
            return parts
        value, *others = parts
        if isinstance(value, tuple | list):
            others = [[None] * len(value) if part is None else part for part in others]
            each = zip(value, *others, strict=True)
            return type(value)(cls.wrap(some, scope) for some in each)
        return value if all(part is None for part in others) else cls(*parts, scope)

    @classmethod
    def without_rule(cls, func, *args, **kwargs):
        """The parts of the result of an operation that has no rule."""
        raise NotImplementedError

    @classmethod
    def refuse(cls, reason: str):
        """Raises what says that the transform cannot go on."""
        raise NotImplementedError

    @classmethod
    def _in_place(cls, name: str, a, *args, **kwargs):
        """The operation out of place, and the carrier rebound; a fixed tensor cannot hold one."""
        functional = getattr(Tensor, name.rstrip("_"), None)
        if not isinstance(a, cls) or functional is None:
            cls.refuse(
                f"{name} writes a changing tensor into another, which has no rule. "
                "Write the function without it (torch.where, torch.cat)."
            )
        a.parts = parts_of(functional(a, *args, **kwargs), len(a.parts))
        return a


def parts_of(leaf, count: int) -> tuple:
    """The parts of a carrier, or of a fixed leaf: itself and zeros."""
    return leaf.parts if isinstance(leaf, Carrier) else (leaf, *[None] * (count - 1))


def value_of(leaf):
    """The value of a carrier; anything else as it is."""
    return leaf.parts[0] if isinstance(leaf, Carrier) else leaf


def find(*trees) -> Carrier | None:
    """The first carrier in nested arguments."""
    for tree in trees:
        if isinstance(tree, Carrier):
            return tree
        if isinstance(tree, dict):
            tree = tuple(tree.values())
        if isinstance(tree, tuple | list) and (found := find(*tree)) is not None:
            return found
    return None


def nested_map(fn: Callable, tree):
    """`fn` on the leaves of nested tuples, lists and dicts, as operations take them."""
    if isinstance(tree, dict):
        return {key: nested_map(fn, leaf) for key, leaf in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(nested_map(fn, leaf) for leaf in tree)
    return fn(tree)


# The spellings of each kind of operation; a kind that is not listed is spelt as it is called.
KINDS = {
    # Linear in the first argument: views, sums, gathers, casts.
    "linear": """
        reshape view flatten unflatten ravel transpose permute swapaxes movedim t contiguous
        unsqueeze squeeze expand repeat tile repeat_interleave narrow select index_select flip roll
        __getitem__ chunk split unbind tensor_split gather take_along_dim sum mean cumsum neg
        __neg__ clone to type float double half bfloat16 cpu cuda tril triu diagonal broadcast_to
        pad requires_grad_""",
    "like": "view_as expand_as type_as",  # the same, by another tensor's shape or dtype
    "list": "cat concat stack hstack vstack",  # linear in a list of tensors
    "fixed": """
        new_zeros new_ones new_empty new_full new_tensor zeros_like ones_like full_like
        empty_like""",  # of shape and dtype alone
    "add": "add __add__ __radd__",
    "sub": "sub subtract __sub__",
    "rsub": "rsub __rsub__",
    "mul": "mul multiply __mul__ __rmul__",
    "matmul": "matmul __matmul__ bmm mm",
    "rmatmul": "__rmatmul__",
    "affine": "linear",  # x W' + b
    "div": "div divide true_divide __truediv__ __div__",
    "rdiv": "__rdiv__ __rtruediv__",
    "pow": "pow __pow__",
    "clamp": "clamp clip",
}


def table(rules: dict[str, Callable]) -> dict[Callable, Callable]:
    """From a rule for each kind, one for every spelling of its operations."""
    homes = (torch, Tensor, F, torch.special)
    out = {}
    for kind, rule in rules.items():
        for name in KINDS.get(kind, kind).split():
            out |= {getattr(home, name): rule for home in homes if hasattr(home, name)}
    for kind, views in {"linear": (Tensor.T, Tensor.mT), "detach": (Tensor.data,)}.items():
        out |= {view.__get__: rules[kind] for view in views}
    return out


_METADATA = {
    *(getattr(torch, name) for name in ("is_floating_point", "is_complex", "numel")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
    ),
    *(
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex")
    ),
    *(getattr(Tensor, name) for name in ("__len__", "is_contiguous", "stride", "element_size")),
    Tensor.ndimension,
    Tensor.get_device,
}


def _writes(op) -> bool:
    """Whether an operation is named as one in place: add_, __setitem__, ..."""
    name = getattr(op, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
