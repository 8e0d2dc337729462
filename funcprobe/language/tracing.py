"""What a function can tell of the transforms that run it: whether a tensor's values can be read."""

from collections.abc import Iterator

import torch
from torch import Tensor


def concrete(x: Tensor) -> bool:
    """Whether the values of `x` can be read here; False inside a transform that has wrapped it."""
    return torch.func.debug_unwrap(x, recurse=False) is x


def levels(x: Tensor) -> Iterator[Tensor]:
    """The tensor as the innermost transform sees it, then as those around it do, one by one.

    >>> count = lambda x: print(len(list(levels(x)))) or x.sum()
    >>> float(count(torch.ones(2))), float(torch.func.vmap(count)(torch.ones(1, 2)))
    1
    2
    (2.0, 2.0)
    """
    yield x
    while not concrete(x):
        x = torch.func.debug_unwrap(x, recurse=False)
        yield x
