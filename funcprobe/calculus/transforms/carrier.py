"""Tensors that carry more than a value through an unmodified model, and tables of their rules.

A `Carrier` holds a value and further parts of the same shape, such as a finite change or Taylor
coefficients. Torch hands every operation on a carrier to `Carrier.__torch_function__`, which looks
up the operation's rule: a function that computes the parts of the result from those of the
arguments. Each transform (`increment`, `jet`) brings a table of rules. A rule is named once, and
`SPELLINGS` lists every name under which torch offers its operations.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# The value first; None stands for a part that is zero everywhere.
Parts: TypeAlias = tuple[Tensor, *tuple[Tensor | None, ...]]

# A function or method of torch.
Operation: TypeAlias = Callable[..., Any]

# ``rule(operation, *args, **kwargs)`` takes an operation's arguments, at least one of which is or
# holds a carrier, and returns the parts of the result, or NotImplemented where it does not apply.
Rule: TypeAlias = Callable[..., Any]


@dataclass
class Scope:
    """What the carriers of one evaluation share."""

    rules: Mapping[Operation, Rule]
    fallbacks: Counter[str] = field(default_factory=Counter)  # operations without a rule, by name


class Carrier(Tensor):
    """A tensor's value and the parts that it carries, all of one shape and dtype."""

    parts: Parts
    scope: Scope

    @staticmethod
    def __new__(cls: type[Self], *parts_and_scope: Any) -> Self:
        """``cls(value, *others, scope)``, where the scope is that of the arguments."""
        *parts, scope = parts_and_scope
        value = parts[0]
        self = Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=value.device
        )
        self.parts, self.scope = tuple(parts), scope
        return self

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes what only torch passes
        """The shape and how many parts are not zero; torch's own would read the values."""
        value, *others = self.parts
        zeros = sum(part is None for part in others)
        return (
            f"{type(self).__name__}(shape={list(value.shape)}, dtype={value.dtype}, "
            f"parts={len(self.parts)}, zero parts={zeros})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Operation, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Applies the operation's rule and wraps the resulting parts in a carrier."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if "input" in kwargs and not args:
            args = (kwargs.pop("input"),)
        scope = first_carrier(args, kwargs).scope
        rule = scope.rules.get(func)
        if rule is None and _writes(func):
            return cls._in_place(func.__name__, *args, **kwargs)
        out = NotImplemented if rule is None else rule(func, *args, **kwargs)
        if out is NotImplemented:
            out = cls.without_rule(func, *args, **kwargs)
            scope.fallbacks[getattr(func, "__name__", str(func))] += 1
        return cls.wrap(out, scope)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a plain function
        cls, func: Operation, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuses: `__torch_function__` should have met the operation before it got here."""
        cls.refuse(
            f"an operation was expected to reach its rule, but {func} bypassed the rules, so its "
            "effect on a changing tensor is unknown. Does the function use a transform of "
            "torch.func itself? Write it without."
        )

    @classmethod
    def wrap(cls, parts: Any, scope: Scope) -> Any:
        """Makes a carrier of an operation's parts, or a tuple of carriers of parts that are tuples.

        A value without further parts is returned as it is.
        """
        if isinstance(parts, Tensor):
            return parts
        value, *others = parts
        if isinstance(value, tuple | list):
            filled = [[None] * len(value) if part is None else part for part in others]
            columns = zip(value, *filled, strict=True)
            return type(value)(cls.wrap(column, scope) for column in columns)
        return value if all(part is None for part in others) else cls(value, *others, scope)

    @classmethod
    def without_rule(cls, func: Operation, *args: Any, **kwargs: Any) -> Any:
        """The parts of the result of an operation that has no rule. Each transform defines it."""
        raise NotImplementedError

    @classmethod
    def refuse(cls, reason: str) -> NoReturn:
        """Raises the error of the transform, which says why it stops. Each transform defines it."""
        raise NotImplementedError

    @classmethod
    def _in_place(cls, name: str, a: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes the operation out of place and gives the carrier the result's parts.

        A fixed tensor cannot hold them, so writing a carrier into one is refused.
        """
        functional = getattr(Tensor, name.rstrip("_"), None)
        if not isinstance(a, cls) or functional is None:
            cls.refuse(
                f"an operation that returns a new tensor was expected, but {name} writes a "
                "changing tensor into another, for which there is no rule. Write the function "
                "without it (torch.where, torch.cat)."
            )
        a.parts = parts_of(functional(a, *args, **kwargs), len(a.parts))
        return a


def parts_of(leaf: Any, count: int) -> Parts:
    """The parts of a carrier; a fixed tensor or number has itself and `count` - 1 zeros."""
    return leaf.parts if isinstance(leaf, Carrier) else (leaf, *[None] * (count - 1))


def aligned(*leaves: Any) -> list[Parts]:
    """The parts of each argument, equally many for each. At least one must be a carrier."""
    count = len(first_carrier(leaves).parts)
    return [parts_of(leaf, count) for leaf in leaves]


def value_of(leaf: Any) -> Any:
    """The value of a carrier; anything else is returned as it is."""
    return leaf.parts[0] if isinstance(leaf, Carrier) else leaf


def first_carrier(*trees: Any) -> Carrier:
    """The first carrier in nested arguments that hold at least one."""
    carrier = _find(trees)
    if carrier is None:
        raise LookupError("first_carrier: a changing tensor was expected among the arguments.")
    return carrier


def has_carrier(*trees: Any) -> bool:
    """Whether nested arguments hold a carrier."""
    return _find(trees) is not None


def _find(trees: Iterable[Any]) -> Carrier | None:
    for tree in trees:
        if isinstance(tree, Carrier):
            return tree
        if isinstance(tree, dict):
            tree = tree.values()
        elif not isinstance(tree, tuple | list):
            continue
        if (carrier := _find(tree)) is not None:
            return carrier
    return None


def nested_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Applies `fn` to the leaves of nested tuples, lists and dicts, as operations take them."""
    if isinstance(tree, dict):
        return {key: nested_map(fn, leaf) for key, leaf in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(nested_map(fn, leaf) for leaf in tree)
    return fn(tree)


# The names under which torch offers the operations of a rule. A rule that is not listed here has
# one operation, of the rule's own name.
SPELLINGS = {
    # Linear in the first argument: views, sums, gathers, casts.
    "linear": """
        reshape view flatten unflatten ravel transpose permute swapaxes movedim t contiguous
        unsqueeze squeeze expand repeat tile repeat_interleave narrow select index_select flip roll
        __getitem__ chunk split unbind tensor_split gather take_along_dim sum mean cumsum neg
        __neg__ clone to type float double half bfloat16 cpu cuda tril triu diagonal broadcast_to
        pad requires_grad_""",
    "like": "view_as expand_as type_as",  # linear, with another tensor's shape or dtype
    "list": "cat concat stack hstack vstack",  # linear in a list of tensors
    "fixed": """
        new_zeros new_ones new_empty new_full new_tensor zeros_like ones_like full_like
        empty_like""",  # read nothing but shape and dtype
    "add": "add __add__ __radd__",
    "sub": "sub subtract __sub__",
    "rsub": "rsub __rsub__",
    "mul": "mul multiply __mul__ __rmul__",
    "matmul": "matmul __matmul__ bmm mm",
    "rmatmul": "__rmatmul__",
    "affine": "linear",  # torch.nn.functional.linear, x W' + b
    "div": "div divide true_divide __truediv__ __div__",
    "rdiv": "__rdiv__ __rtruediv__",
    "pow": "pow __pow__",
    "clamp": "clamp clip",
    "norm": "norm vector_norm",
}

# The properties of a tensor that a rule covers too.
_PROPERTIES = {"linear": ("T", "mT"), "detach": ("data",)}


def table(rules: Mapping[str, Rule]) -> dict[Operation, Rule]:
    """Turns rules by name into a table by operation, one entry for every spelling."""
    homes = (torch, Tensor, F, torch.special, torch.linalg)
    out: dict[Operation, Rule] = {}
    for name, rule in rules.items():
        for spelling in SPELLINGS.get(name, name).split():
            out |= {getattr(home, spelling): rule for home in homes if hasattr(home, spelling)}
        for attribute in _PROPERTIES.get(name, ()):
            out[getattr(Tensor, attribute).__get__] = rule
    return out


# The operations that read no value, so that the wrapper itself can answer them.
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


def _writes(op: Operation) -> bool:
    """Whether an operation is named as one that writes in place: add_, __setitem__, ..."""
    name = getattr(op, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
