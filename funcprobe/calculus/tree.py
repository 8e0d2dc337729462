"""Dicts of named tensors as vectors, and trees of tensors whose leaves lead with rows."""

import difflib
import html
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
Tree: TypeAlias = Any  # nested tuples, named tuples, lists and dicts with tensors at the leaves
T = TypeVar("T")

_NAMESPACE = "funcprobe"  # of optree's registry, so that other users of optree are not affected


class Terms(tuple[Any, ...]):
    """The derivatives ``(f, f', f'', ...)`` of a function along a line, as `taylor` returns them.

    It is a tuple with one tree for each order, and it also knows which rows it belongs to.

    Attributes:
        row_hashes: [N] int64, which identify the rows; None if they are unknown.

    >>> terms = Terms([torch.zeros(2), torch.ones(2)])
    >>> value, slope = terms
    >>> slope.tolist(), terms.row_hashes
    ([1.0, 1.0], None)
    """

    row_hashes: Tensor | None

    def __new__(cls, terms: Iterable[Any], row_hashes: Tensor | None = None) -> "Terms":
        """A tuple of the terms, which remembers its rows' hashes."""
        self = super().__new__(cls, terms)
        self.row_hashes = row_hashes
        return self

    def __repr__(self) -> str:
        known = "unknown" if self.row_hashes is None else "identified"
        inside = describe(self[0]) if self else "nothing"
        return f"Terms: orders 0 to {len(self) - 1}, each of {inside}; rows {known}"

    def _repr_html_(self) -> str:
        return html_text(repr(self))


def _children(terms: Collection[Any]) -> tuple[tuple[Any, ...], None]:
    return (*terms, getattr(terms, "row_hashes", None)), None


def _from_children(_: Any, children: Iterable[Any]) -> Terms:
    *terms, row_hashes = children
    return Terms(terms, row_hashes)


optree.register_pytree_node(Terms, _children, _from_children, namespace=_NAMESPACE)


def shift(params: Params, v: Params | None, eta: float | Tensor) -> Params:
    """The parameters at distance `eta` along `v`: ``params + eta * v``, in the dtype of `params`.

    Args:
        params: the trainable parameters.
        v: a direction with exactly the names and shapes of `params`; None stands for no direction.
        eta: the learning rate, a float or a tensor [].

    Returns:
        A new dict. The tensors of `params` are not changed.

    Raises:
        ValueError: a name is unknown, frozen or missing, a shape is wrong, or a value is not
            finite.

    >>> p = {"a": torch.ones(2), "b": torch.zeros(1)}
    >>> shift(p, {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(1)}, 0.5)["a"].tolist()
    [1.5, 1.0]
    """
    if v is None:
        return dict(params)
    check_direction("shift", v, params)
    if concrete(eta) and not torch.isfinite(torch.as_tensor(eta)).all():
        raise ValueError(f"shift: eta must be finite, not {eta}.")
    return add_scaled(params, v, eta)


def add_scaled(a: Params, b: Params, scale: float | Tensor = 1.0) -> Params:
    """``a + scale * b`` name by name, in the dtype of `a`. Nothing is checked: for transforms."""
    return {name: a[name] + (scale * b[name]).to(a[name].dtype) for name in a}


def dot(a: Params, b: Params) -> Tensor:
    """The inner product of two dicts with the same names and shapes, [] float64.

    Raises:
        ValueError: names or shapes differ.
    """
    check_names("dot", b, a)
    products = ((a[name].double() * b[name].double()).sum() for name in a)
    return sum(products, torch.zeros((), dtype=torch.float64))


def norm(a: Params) -> Tensor:
    """The Euclidean norm, [] float64."""
    return dot(a, a).sqrt()


def stack(trees: Sequence[Params]) -> Params:
    """Stacks K dicts with the same names and shapes into one, whose tensors lead with K.

    Raises:
        ValueError: names or shapes differ.

    >>> stack([{"a": torch.zeros(2)}, {"a": torch.ones(2)}])["a"].shape
    torch.Size([2, 2])
    """
    for other in trees[1:]:
        check_names("stack", other, trees[0])
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def check_names(where: str, given: Params, expected: Params) -> None:
    """Raises ValueError unless both have the same names and, name by name, the same shapes."""
    unknown = sorted(set(given) - set(expected))
    missing = sorted(set(expected) - set(given))
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(expected), n=1, cutoff=0.0)
        raise ValueError(
            f"{where}: only the {len(expected)} trainable names may appear, "
            f"{len(unknown)} others did: {_listed(unknown)}. They are frozen, misspelt or of "
            "another model. The nearest trainable name to the first is "
            f"{near[0] if near else 'none'!r}."
        )
    if missing:
        raise ValueError(
            f"{where}: every trainable name must appear, {len(missing)} of {len(expected)} are "
            f"missing: {_listed(missing)}. Give zeros where nothing moves."
        )
    shapes = [name for name in sorted(given) if given[name].shape != expected[name].shape]
    if shapes:
        name = shapes[0]
        raise ValueError(
            f"{where}: {len(shapes)} tensors have another shape than their parameters: "
            f"{_listed(shapes)}; {name!r} is {list(given[name].shape)}, "
            f"expected {list(expected[name].shape)}. They belong to another model or rank."
        )


def check_direction(where: str, v: Params, params: Params) -> None:
    """Does `check_names`, and raises ValueError if a readable value of `v` is not finite."""
    check_names(where, v, params)
    bad = [name for name in sorted(v) if concrete(v[name]) and not _finite(v[name])]
    if bad:
        raise ValueError(
            f"{where}: the direction must be finite, {len(bad)} tensors hold nan or inf: "
            f"{_listed(bad)}. Look at the gradient and the optimizer state it was made from."
        )


def _finite(x: Tensor) -> bool:
    # A finite sum proves that every element is finite, and takes one pass instead of two.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def concrete(value: object) -> bool:
    """Whether a value can be read here: False for a tensor that a transform has wrapped."""
    return not isinstance(value, Tensor) or torch.func.debug_unwrap(value, recurse=False) is value


def all_concrete(*trees: Tree) -> bool:
    """Whether every leaf can be read here."""
    return all(concrete(leaf) for leaf in leaves(trees))


def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Any:
    """Applies `fn` leaf by leaf to trees of the same structure."""
    return optree.tree_map(fn, tree, *rest, namespace=_NAMESPACE)


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree."""
    return optree.tree_leaves(tree, namespace=_NAMESPACE)


def same_structure(a: Tree, b: Tree) -> bool:
    """Whether two trees have the same containers and keys, whatever their leaves are."""
    first, second = (optree.tree_structure(tree, namespace=_NAMESPACE) for tree in (a, b))
    return first == second


def describe(tree: Tree, most: int = 8) -> str:
    """The leaves' paths, shapes and dtypes in one line, of at most `most` leaves.

    >>> describe({"a": torch.zeros(2, 3)})
    "['a'] [2, 3] float32"
    """
    paths, tensors, _ = optree.tree_flatten_with_accessor(tree, namespace=_NAMESPACE)
    lines = [
        f"{path.codify('')} {_type_of(leaf)}".strip()
        for path, leaf in zip(paths[:most], tensors[:most], strict=True)
    ]
    return ", ".join(lines) + (f", ... ({len(tensors)} leaves)" if len(tensors) > most else "")


def html_text(text: str) -> str:
    """A text as HTML that keeps its lines, for a notebook."""
    return f"<pre>{html.escape(text)}</pre>"


def blocks(batch: T, rows: int) -> Iterator[T]:
    """The batch in consecutive slices of at most `rows` rows."""
    for start in range(0, size(batch), rows):
        yield tree_map(lambda leaf, start=start: leaf[start : start + rows], batch)


def size(batch: Tree) -> int:
    """The number of rows N that every leaf of the batch leads with.

    Raises:
        ValueError: the leaves lead with different numbers, or there are none.
    """
    sizes = {len(leaf) for leaf in leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(f"every leaf of a batch must lead with the same N, found {sorted(sizes)}.")
    return sizes.pop()


def concatenate(trees: Sequence[T], dim: int = 0) -> T:
    """Joins trees of the same structure along `dim`, leaf by leaf."""
    if len(trees) == 1:
        return trees[0]
    return tree_map(lambda *parts: torch.cat(parts, dim), *trees)


def merge(trees: Sequence[T], order: Tensor | None = None, dim: int = 0) -> T:
    """Puts the results of blocks of rows together, in the rows' original order.

    Args:
        trees: one for each block, with the block's rows on axis `dim` of every leaf. Blocks may
            have been trimmed to different widths: then the last axis is padded with zeros to the
            widest.
        order: [N] the original row of each row of the blocks; None keeps the blocks' order.

    Raises:
        ValueError: the order has another number of rows than the blocks, or a result has no rows.
    """
    scalars = [tree for tree in trees if any(leaf.ndim <= dim for leaf in leaves(tree))]
    if scalars:
        raise ValueError(
            "join: results that lead with their rows were expected, but a block gave "
            f"{describe(scalars[0])}. Likely the function reduces over its rows. Return each row's "
            "own part."
        )
    sizes = [leaves(tree)[0].shape[dim] for tree in trees]
    if order is None:
        order = torch.arange(sum(sizes))
    if len(order) != sum(sizes):
        raise ValueError(
            f"join: an order of {sum(sizes)} rows was expected, as the blocks hold, not of "
            f"{len(order)}. Pass the order that these blocks were cut in."
        )
    rows = order.split(sizes)
    return tree_map(lambda *parts: _place(parts, rows, dim), *trees)


def _place(parts: Sequence[Tensor], rows: Sequence[Tensor], dim: int) -> Tensor:
    """One tensor with the rows `rows[b]` of axis `dim` taken from ``parts[b]``."""
    ragged = parts[0].ndim > dim + 1
    shape = list(parts[0].shape)
    shape[dim] = sum(len(index) for index in rows)
    if ragged:
        shape[-1] = max(part.shape[-1] for part in parts)
    out = parts[0].new_zeros(shape)
    for part, index in zip(parts, rows, strict=True):
        target = out[..., : part.shape[-1]] if ragged else out
        target.index_copy_(dim, index.to(out.device), part)
    return out


_NAN_MEANS = (
    "Either the parameters hold nan, the function is undefined on these rows (it takes the "
    "logarithm of 0, say), or the batch lacks a field that is needed."
)


def check_nan(where: str, fn: object, tree: Tree, dim: int = 0, points: Sequence[str] = ()) -> None:
    """Raises ValueError if a leaf of what `fn` gave holds nan; it names the rows (axis `dim`).

    If axis 0 has points along a line, their names are given, and the error names the first with
    nan. A function that knows what nan means in its results may say it in an attribute
    ``nan_means``.
    """
    for leaf in leaves(tree):
        bad = leaf.isnan()
        if bad.any():
            others = [axis for axis in range(bad.ndim) if axis != dim]
            rows = (bad.any(others) if others else bad).nonzero().flatten().tolist()
            meaning = getattr(fn, "nan_means", _NAN_MEANS)
            place = ""
            if points:
                first = int(bad.flatten(1).any(1).nonzero()[0])
                place = f" at {points[first]}"
                meaning = f"The step may be so long that the function overflows. {meaning}"
            raise ValueError(
                f"{where}: the function gave nan{place} in {len(rows)} rows, the first {rows[:5]}. "
                f"{meaning} Evaluate the function on one of these rows alone to see which."
            )


def _type_of(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
