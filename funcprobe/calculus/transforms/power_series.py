r"""Recurrences of power series: the coefficients of f(x(t)) from those of x(t).

Where y obeys a differential equation :math:`y' = g x'`, its coefficients follow from those of g,

.. math:: y_k = \frac 1 k \sum_{j=1}^k j \, x_j \, g_{k-j}.

Griewank and Walther, Evaluating Derivatives, table 13.2.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

from torch import Tensor, addcmul

# The coefficients of t^0, t^1, ...: the value first. None stands for a coefficient of zero.
Coefficients: TypeAlias = tuple[Tensor, *tuple[Tensor | None, ...]]

# ``(w, a, b)`` stands for the product w a b, which is zero where a or b is.
Term: TypeAlias = tuple[float, Tensor | None, Tensor | None]


def total(terms: Iterable[Term], start: Tensor | None = None) -> Tensor | None:
    """``start`` plus the sum of the terms; None if all of them are zero."""
    for w, a, b in terms:
        if a is None or b is None:
            continue
        if start is not None:
            start = addcmul(start, a, b, value=w)
        elif w == 1:
            start = a * b
        else:
            start = addcmul(a.new_zeros(()), a, b, value=w)
    return start


def squares(y: Coefficients, k: int, w: float = 1.0) -> list[Term]:
    """The terms of the k-th coefficient of ``w y^2``, each product once."""
    return [(w if 2 * i == k else 2 * w, y[i], y[k - i]) for i in range(k // 2 + 1)]


def chain(x: Sequence[Tensor | None], g: Sequence[Tensor | None], k: int) -> Tensor | None:
    """The k-th coefficient of a y with ``y' = g x'``."""
    return total((j / k, x[j], g[k - j]) for j in range(k, 0, -1))


def quotient(a: Coefficients, b: Coefficients, y0: Tensor) -> Coefficients:
    """``y = a / b`` from its value `y0`, by the coefficients of ``y b = a``."""
    y: Coefficients = (y0,)
    for k in range(1, len(a)):
        top = total(((-1, b[j], y[k - j]) for j in range(1, k + 1)), start=a[k])
        y = (*y, None if top is None else top / b[0])
    return y


def power(n: float, y0: Tensor, x: Coefficients) -> Coefficients:
    """``y = x^n`` from its value `y0`, by ``y' = n x^(n-1) x'``.

    Unlike the recurrence of ``x y' = n y x'``, this does not divide by x, which may be 0.
    """
    orders = range(1, len(x))
    if n == 2:
        return y0, *(total(squares(x, k)) for k in orders)
    if len(x) == 1 or n == 0:
        return y0, *(None for _ in orders)
    below = power(n - 1, x[0] ** (n - 1), (x[0], *x[1:][:-1]))
    slope: Coefficients = (n * below[0], *(None if c is None else n * c for c in below[1:]))
    return y0, *(chain(x, slope, k) for k in orders)


def partition(
    p0: Tensor, x: Coefficients, dim: int
) -> tuple[Coefficients, Sequence[Tensor | None]]:
    """The softmax p from its value `p0`, and the logsumexp L.

    The two obey ``L' = sum p x'`` and ``p' = p (x' - L')``. L's value is not computed: None stands
    in its place.
    """
    p: Coefficients = (p0,)
    log: list[Tensor | None] = [None]
    for k in range(1, len(x)):
        both = chain(x, p, k)
        log.append(None if both is None else both.sum(dim, keepdim=True))
        terms = ((-j / k, p[k - j], log[j]) for j in range(1, k + 1))
        p = (*p, total(terms, start=both))
    return p, log


# ``expand(y0, x)``: the coefficients of y from its value and those of x.
Expansion: TypeAlias = Callable[[Tensor, Coefficients], Coefficients]


def _obeys(g: Callable[[Coefficients, int], Tensor | None]) -> Expansion:
    """The expansion of a y with ``y' = g x'``, where ``g(y, k)`` is the k-th coefficient of g.

    `g` may use y's coefficients up to the k-th.
    """

    def expand(y0: Tensor, x: Coefficients) -> Coefficients:
        y: Coefficients = (y0,)
        slope: tuple[Tensor | None, ...] = ()
        for k in range(1, len(x)):
            slope = (*slope, g(y, k - 1))
            y = (*y, chain(x, slope, k))
        return y

    return expand


def _one(y: Coefficients, k: int) -> Tensor | None:
    return y[0].new_ones(()) if k == 0 else None


def _log(y0: Tensor, x: Coefficients, shift: float = 0.0) -> Coefficients:
    """``y = log(shift + x)``, by the coefficients of ``(shift + x) y' = x'``."""
    y: Coefficients = (y0,)
    bottom = x[0] + shift
    for k in range(1, len(x)):
        top = total(((-j / k, y[j], x[k - j]) for j in range(1, k)), start=x[k])
        y = (*y, None if top is None else top / bottom)
    return y


def _wave(slope: Callable[[Tensor], Tensor]) -> Expansion:
    """The expansion of sine or cosine, whose second derivative is minus itself."""

    def expand(y0: Tensor, x: Coefficients) -> Coefficients:
        y: Coefficients = (y0,)
        g: Coefficients = (slope(x[0]),)
        for k in range(1, len(x)):
            y = (*y, chain(x, g, k))
            back = chain(x, y, k)
            g = (*g, None if back is None else -back)
        return y

    return expand


# The expansion of each operation, by its name.
EXPANSIONS: dict[str, Expansion] = {
    "exp": _obeys(lambda y, k: y[k]),
    "expm1": _obeys(lambda y, k: y[0] + 1 if k == 0 else y[k]),
    "sigmoid": _obeys(lambda y, k: total(squares(y, k, -1), start=y[k])),
    "tanh": _obeys(lambda y, k: total(squares(y, k, -1), start=_one(y, k))),
    "log": _log,
    "log1p": partial(_log, shift=1.0),
    "sin": _wave(Tensor.cos),
    "cos": _wave(lambda x: -x.sin()),
    "square": partial(power, 2),
    "sqrt": partial(power, 0.5),
    "rsqrt": partial(power, -0.5),
    "reciprocal": partial(power, -1),
}
