"""Dicts of named tensors as vectors, and trees of tensors with leading rows. Uses optree."""

import difflib
from collections.abc import Iterator, Sequence

import optree
import torch
from torch import Tensor

Params = dict[str, Tensor]


def shift(params: Params, v: Params | None, eta: float | Tensor) -> Params:
    """The parameters at distance `eta` along `v`: ``params + eta * v``, in the dtype of `params`.

    Args:
        params: the trainable parameters.
        v: a direction with exactly the names and shapes of `params`; None mirrors `params`.
        eta: learning rate, a float or a tensor [].

    Returns:
        A new dict; `params` keeps its own tensors, unchanged.

    Raises:
        ValueError: an unknown, frozen or missing name, a wrong shape, a non-finite value.

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
    """``a + scale * b`` name by name, in the dtype of `a`, unchecked: for use inside transforms."""
    return {name: a[name] + (scale * b[name]).to(a[name].dtype) for name in a}


def dot(a: Params, b: Params) -> Tensor:
    """The inner product of two trees of the same names, [] float64, summed in float64."""
    check_names("dot", b, a)
    products = ((a[name].double() * b[name].double()).sum() for name in a)
    return sum(products, torch.zeros((), dtype=torch.float64))


def norm(a: Params) -> Tensor:
    """The Euclidean norm, [] float64."""
    return dot(a, a).sqrt()


def stack(trees: Sequence[Params]) -> Params:
    """K trees of the same names as one, every leaf with leading K.

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
            f"{len(unknown)} others did: {_some(unknown)}. They are frozen, misspelt or of another "
            f"model. The nearest trainable name to the first is {near[0] if near else 'none'!r}."
        )
    if missing:
        raise ValueError(
            f"{where}: every trainable name must appear, {len(missing)} of {len(expected)} are "
            f"missing: {_some(missing)}. Give zeros where nothing moves."
        )
    shapes = [name for name in sorted(given) if given[name].shape != expected[name].shape]
    if shapes:
        name = shapes[0]
        raise ValueError(
            f"{where}: {len(shapes)} tensors have another shape than their parameters: "
            f"{_some(shapes)}; {name!r} is {list(given[name].shape)}, "
            f"expected {list(expected[name].shape)}. They belong to another model or rank."
        )


def check_direction(where: str, v: Params, params: Params) -> None:
    """`check_names`, and every value of `v` finite where it can be looked at."""
    check_names(where, v, params)
    bad = [name for name in sorted(v) if concrete(v[name]) and not _finite(v[name])]
    if bad:
        raise ValueError(
            f"{where}: the direction must be finite, {len(bad)} tensors hold nan or inf: "
            f"{_some(bad)}. Look at the gradient and the optimizer state it was made from."
        )


def _finite(x: Tensor) -> bool:
    # In one pass where the sum is finite: then everything is.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def concrete(value) -> bool:
    """Whether a value can be read here: False for a tensor that a transform has wrapped."""
    return not isinstance(value, Tensor) or torch.func.debug_unwrap(value, recurse=False) is value


def tree_map(fn, tree, *rest):
    """`fn` leaf by leaf over trees of the same structure."""
    return optree.tree_map(fn, tree, *rest)


def leaves(tree) -> list[Tensor]:
    """The tensors of a tree."""
    return optree.tree_leaves(tree)


def blocks(batch, rows: int) -> Iterator:
    """The batch in consecutive slices of at most `rows` rows."""
    for start in range(0, size(batch), rows):
        yield tree_map(lambda leaf, start=start: leaf[start : start + rows], batch)


def size(batch) -> int:
    """The number of rows N that every leaf of the batch leads with."""
    sizes = {len(leaf) for leaf in leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(f"every leaf of a batch must lead with the same N, found {sorted(sizes)}.")
    return sizes.pop()


def concatenate(trees: Sequence, dim: int = 0):
    """Trees of the same structure joined along `dim`."""
    return trees[0] if len(trees) == 1 else tree_map(lambda *xs: torch.cat(xs, dim), *trees)


def merge(trees: Sequence, order: Tensor | None = None, dim: int = 0):
    """Results of blocks of rows as those of all rows, in the rows' original order.

    Args:
        trees: one per block, leaves with the block's rows on axis `dim`; where blocks were trimmed
            differently, the last axis is padded with zeros to the widest.
        order: [N] the original row of each row of the blocks, as `by_length` gives it; None keeps
            the blocks' order.

    Raises:
        ValueError: an order of another number of rows.
    """
    sizes = [leaves(tree)[0].shape[dim] for tree in trees]
    if order is not None and len(order) != sum(sizes):
        raise ValueError(
            f"join: an order of {sum(sizes)} rows was expected, as the blocks hold, not of "
            f"{len(order)}. Pass the order that by_length gave with these blocks."
        )
    places = torch.arange(sum(sizes)) if order is None else order

    def leaf(*parts: Tensor) -> Tensor:
        shape, trimmed = list(parts[0].shape), parts[0].ndim > dim + 1
        shape[dim] = sum(sizes)
        if trimmed:
            shape[-1] = max(part.shape[-1] for part in parts)
        out = parts[0].new_zeros(shape)
        for part, at in zip(parts, places.to(out.device).split(sizes), strict=True):
            there = out[..., : part.shape[-1]] if trimmed else out
            there.index_copy_(dim, at, part)
        return out

    return tree_map(leaf, *trees)


def check_nan(where: str, tree, dim: int = 0) -> None:
    """Raises ValueError if a leaf holds nan, naming the rows (axis `dim`) where it does."""
    for leaf in leaves(tree):
        bad = leaf.isnan()
        if bad.any():
            others = [axis for axis in range(bad.ndim) if axis != dim]
            rows = (bad.any(others) if others else bad).nonzero().flatten().tolist()
            raise ValueError(
                f"{where}: the function gave nan in {len(rows)} rows, the first {rows[:5]}. Either "
                "the parameters or the model's logits hold nan, a scored token has probability 0 "
                "(outside the top-p nucleus, say), or the batch lacks a field that is needed."
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
