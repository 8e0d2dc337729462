r"""Recurrences of power series: the coefficients of f(x(t)) from those of x(t).

Whatever obeys a differential equation :math:`y' = g x'` has, with its own coefficients in g,

.. math:: y_k = \frac 1 k \sum_{j=1}^k j \, x_j \, g_{k-j}.

Griewank and Walther, Evaluating Derivatives, table 13.2.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor, addcmul

Series = Sequence[Tensor | None]  # the coefficients of t^0, t^1, ...; None is zero


def total(terms: Iterable[tuple], start: Tensor | None = None) -> Tensor | None:
    """``start + sum of w a b`` over the (w, a, b) without a zero; None if nothing is left."""
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


def squares(y: Series, k: int, w: float = 1.0) -> list[tuple]:
    """The terms of the k-th coefficient of ``w y^2``."""
    return [(w if 2 * i == k else 2 * w, y[i], y[k - i]) for i in range(k // 2 + 1)]


def chain(x: Series, g: Series, k: int) -> Tensor | None:
    """The k-th coefficient of a y with ``y' = g x'``."""
    return total((j / k, x[j], g[k - j]) for j in range(k, 0, -1))


def quotient(a: Series, b: Series, y: Tensor) -> Series:
    """``a / b``, from its value y: the coefficients of ``y b = a``."""
    y = [y]
    for k in range(1, len(a)):
        top = total(((-1, b[j], y[k - j]) for j in range(1, k + 1)), start=a[k])
        y.append(None if top is None else top / b[0])
    return y


def power(n: float, y: Tensor, x: Series) -> Series:
    """``y = x^n``, by ``y' = n x^(n-1) x'``, which divides by nothing."""
    rest = range(1, len(x))
    if n == 2:
        return y, *(total(squares(x, k)) for k in rest)
    if len(x) == 1 or n == 0:
        return y, *(None for _ in rest)
    slope = [c if c is None else n * c for c in power(n - 1, x[0] ** (n - 1), x[:-1])]
    return y, *(chain(x, slope, k) for k in rest)


def partition(p: Tensor, x: Series, dim: int) -> tuple[Series, Series]:
    """The softmax p and, but for L_0, the logsumexp L: ``L' = sum p x'``, ``p' = p (x' - L')``."""
    p, log = [p], [None]
    for k in range(1, len(x)):
        both = chain(x, p, k)
        log.append(None if both is None else both.sum(dim, keepdim=True))
        terms = ((-j / k, p[k - j], log[j]) for j in range(1, k + 1))
        p.append(total(terms, start=both))
    return p, log


def _obeys(g: Callable[[Series, int], Tensor | None]):
    """The expansion of a y with ``y' = g x'``, from ``g(y, k)``, its k-th coefficient."""

    def expand(y: Tensor, x: Series) -> Series:
        y, slope = [y], []
        for k in range(1, len(x)):
            slope.append(g(y, k - 1))
            y.append(chain(x, slope, k))
        return y

    return expand


def _one(y: Tensor, k: int) -> Tensor | None:
    return y.new_ones(()) if k == 0 else None


def _log(y: Tensor, x: Series, shift: float = 0.0) -> Series:
    """Of ``log(shift + x)``: the coefficients of ``(shift + x) y' = x'``."""
    y, bottom = [y], x[0] + shift
    for k in range(1, len(x)):
        top = total(((-j / k, y[j], x[k - j]) for j in range(1, k)), start=x[k])
        y.append(None if top is None else top / bottom)
    return y


def _wave(slope: Callable[[Tensor], Tensor]):
    """Of sine or cosine, whose slope's slope is minus itself."""

    def expand(y: Tensor, x: Series) -> Series:
        y, g = [y], [slope(x[0])]
        for k in range(1, len(x)):
            y.append(chain(x, g, k))
            back = chain(x, y, k)
            g.append(None if back is None else -back)
        return y

    return expand


# By the name of the operation, from its value y and the series x.
EXPANSIONS = {
    "exp": _obeys(lambda y, k: y[k]),
    "expm1": _obeys(lambda y, k: y[0] + 1 if k == 0 else y[k]),
    "sigmoid": _obeys(lambda y, k: total(squares(y, k, -1), start=y[k])),
    "tanh": _obeys(lambda y, k: total(squares(y, k, -1), start=_one(y[0], k))),
    "log": _log,
    "log1p": partial(_log, shift=1.0),
    "sin": _wave(Tensor.cos),
    "cos": _wave(lambda x: -x.sin()),
    "square": partial(power, 2),
    "sqrt": partial(power, 0.5),
    "rsqrt": partial(power, -0.5),
    "reciprocal": partial(power, -1),
}
