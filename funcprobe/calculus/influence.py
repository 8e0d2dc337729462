"""What moves a function of parameters: covectors of its output pulled back to the parameters."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .blocks import Cuttable, RowFn, RowsPerBlock
from .derivatives import WholeEmbeddings, check_derivative
from .gradients import gradient
from .separable import is_separable
from .tree import (
    Params,
    Tree,
    all_concrete,
    describe,
    leaves,
    same_structure,
    size,
    tree_map,
)


def pullback(
    fn: RowFn, params: Params, batch: Any, cotangent: Tree, *, rows: RowsPerBlock = None
) -> Params:
    r"""The vector-Jacobian product of `fn` at `params`, summed over all rows.

    .. math:: u = \sum_i c_i^\top \, \partial f(\theta)_i / \partial \theta, \qquad
              \langle u, v \rangle = \langle c, f'(\theta) v \rangle \ \text{for every} \ v.

    It is exact to rounding, along an embedding of padding too, to which a trainer's backward pass
    (and `gradient`) gives 0. With the covector of an estimate (`entropy_covector`) it is the
    estimate's gradient in the parameters, whose product with a direction is the slope along it.

    Args:
        fn: a row-separable function ``(params, batch) -> tree`` of tensors with leading N.
        params: the trainable parameters.
        batch: a tree of tensors with leading N.
        cotangent: c, a tree with the structure and shapes of fn's output on the whole batch, in its
            rows' order.
        rows: rows per block; "all" makes one block. The default is that of `gradient`.

    Returns:
        u, with the names, shapes and dtypes of `params`, accumulated as by `gradient`.

    Raises:
        ValueError: the cotangent is not finite or has other rows, another structure or other shapes
            than fn's output; u is not finite; or fn says in ``false_derivative`` that its
            derivative is not that of its values.

    >>> import torch
    >>> double = lambda p, x: {"y": 2 * x * p["a"]}
    >>> c = {"y": torch.tensor([1.0, 10.0])}
    >>> pullback(double, {"a": torch.tensor(3.0)}, torch.tensor([1.0, 2.0]), c)
    {'a': tensor(42.)}
    """
    check_derivative("pullback", fn)
    _check_cotangent(cotangent, size(batch))
    pair = (_CuttablePair if isinstance(batch, Cuttable) else _Pair)(batch, cotangent)
    with WholeEmbeddings():
        return gradient(_Weighed(fn), params, pair, rows=rows)


class _Pair(NamedTuple):
    """Rows, and the cotangent of fn's output on them."""

    batch: Any
    cotangent: Tree


class _CuttablePair(NamedTuple):
    """A pair like `_Pair`, of a batch that divides itself."""

    batch: Any
    cotangent: Tree

    def cut(self, elements: int) -> tuple[list["_CuttablePair"], Tensor]:
        """Divides both as the batch divides itself."""
        blocks, order = self.batch.cut(elements)
        rows = order.split([size(block) for block in blocks])
        cotangents = [tree_map(lambda leaf, i=i: leaf[i], self.cotangent) for i in rows]
        pairs = zip(blocks, cotangents, strict=True)
        return [_CuttablePair(*pair) for pair in pairs], order


@dataclass(frozen=True)
class _Weighed:
    """The products of a function's output and the cotangent."""

    fn: RowFn

    @property
    def separable(self) -> bool:
        """Whether the function says that its rows do not depend on each other."""
        return is_separable(self.fn)

    def __call__(self, params: Params, pair: _Pair | _CuttablePair) -> list[Tensor]:
        """The products on the rows of `pair`, with leading N."""
        return _weighed(self.fn, params, pair)


def _weighed(fn: RowFn, params: Params, pair: _Pair | _CuttablePair) -> list[Tensor]:
    """The output times its cotangent: the gradient of its sum is the vector-Jacobian product."""
    batch, cotangent = pair
    out = fn(params, batch)
    shapes = [tuple(leaf.shape) for leaf in leaves(cotangent)]
    if not same_structure(out, cotangent) or shapes != [tuple(leaf.shape) for leaf in leaves(out)]:
        raise ValueError(
            f"pullback: a cotangent like the function's output was expected, which on "
            f"{size(batch)} rows is {describe(out)}; that of these rows is {describe(cotangent)}. "
            "Was it made from the output of another function, or of a batch of another width?"
        )
    return [a * c.to(a) for a, c in zip(leaves(out), leaves(cotangent), strict=True)]


def _check_cotangent(cotangent: Tree, n: int) -> None:
    counts = sorted({len(leaf) for leaf in leaves(cotangent)})
    if counts != [n]:
        raise ValueError(
            f"pullback: a cotangent of the batch's {n} rows was expected, its leaves have "
            f"{counts}. Pass the batch that the cotangent was made on."
        )
    if all_concrete(cotangent) and not all(leaf.isfinite().all() for leaf in leaves(cotangent)):
        raise ValueError(
            "pullback: the cotangent must be finite, it holds nan or inf. Look at the values that "
            "it was made from."
        )
