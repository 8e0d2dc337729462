"""Changes of elementwise functions: f(x + d) - f(x) without cancellation.

Most functions here take ``y = f(x)``, x and the change d of x; the others take what they need of
these. The result keeps its relative precision however small d is, of either sign.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def d_exp(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of e^x, from the larger value, so that nothing overflows unless the result does.

    ``sign(d) e^max(x, x + d) (1 - e^-|d|)``.
    """
    return -torch.sign(d) * torch.maximum(x, x + d).exp() * torch.expm1(-d.abs())


def d_log(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of log x, ``log(1 + d / x)``."""
    return torch.log1p(d / x)


def d_sqrt(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of the square root, ``d / (sqrt(x) + sqrt(x + d))``."""
    return torch.where(d == 0, 0.0, d / (y + (x + d).sqrt()))


def d_rsqrt(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of x^-1/2, ``-d / (s s' (s + s'))`` with s and s' the two square roots."""
    s, moved = x.sqrt(), (x + d).sqrt()
    return -d / (s + moved) * y / moved


def d_reciprocal(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of 1 / x, ``-d / (x (x + d))``."""
    return -d / (x * (x + d))


def d_sigmoid(x: Tensor, d: Tensor) -> Tensor:
    """The change of the sigmoid s: ``s(high) s(-low) (1 - e^-|d|)``, with the sign of d.

    `low` and `high` are the smaller and the larger of x and x + d.
    """
    moved = x + d
    high, low = torch.maximum(x, moved), torch.minimum(x, moved)
    return -torch.sign(d) * torch.sigmoid(high) * torch.sigmoid(-low) * torch.expm1(-d.abs())


def d_silu(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of x s(x), where s is the sigmoid: ``d s(x + d) + x (s(x + d) - s(x))``."""
    return d * torch.sigmoid(x + d) + x * d_sigmoid(x, d)


def d_tanh(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of ``tanh x = 2 s(2 x) - 1``, where s is the sigmoid."""
    return 2 * d_sigmoid(2 * x, 2 * d)


def d_relu(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of max(x, 0): d itself where both values are positive."""
    both = (x > 0) & (x + d > 0)
    return torch.where(both, d, (x + d).clamp(min=0) - y)


def d_sin(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of sin x, ``2 cos(x + d / 2) sin(d / 2)``."""
    return 2 * torch.cos(x + d / 2) * torch.sin(d / 2)


def d_cos(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The change of cos x, ``-2 sin(x + d / 2) sin(d / 2)``."""
    return -2 * torch.sin(x + d / 2) * torch.sin(d / 2)


def d_normal(x: Tensor, d: Tensor) -> Tensor:
    """The change of the normal distribution function, which is its density's integral over d.

    A short interval is integrated by the six-point Gauss-Legendre rule. Over a long one the two
    values are subtracted, in the tail where they are small and so exact.
    """
    nodes = x.new_tensor([-0.9324695142031521, -0.6612093864662645, -0.2386191860831969])
    weights = (0.1713244923791704, 0.3607615730481386, 0.467913934572691)
    middle, half = x + d / 2, d / 2
    integral = sum(
        weight * torch.exp(-t * t / 2)
        for node, weight in zip(nodes, weights, strict=True)
        for t in (middle + node * half, middle - node * half)
    )
    short = half * integral / math.sqrt(2 * math.pi)
    # The density is symmetric, so either tail serves: the one in which ndtr is small.
    far = torch.where(x + d / 2 > 0, -1.0, 1.0)
    long = far * (torch.special.ndtr(far * (x + d)) - torch.special.ndtr(far * x))
    return torch.where(d.abs() < 0.5, short, long)


def d_gelu(x: Tensor, d: Tensor, approximate: str) -> Tensor:
    r"""The change of x g(x), ``d g(x + d) + x (g(x + d) - g(x))``.

    The gate g is the normal distribution function. Its approximation "tanh" is sigmoid(u), with
    :math:`u = 2 \sqrt{2 / \pi} \, (x + 0.044715 x^3)`.
    """
    if approximate == "tanh":
        c = 2 * math.sqrt(2 / math.pi)
        u, v = c * (x + 0.044715 * x**3), x + d
        du = c * d * (1 + 0.044715 * (x * x + x * v + v * v))
        return d * torch.sigmoid(u + du) + x * d_sigmoid(u, du)
    return d * torch.special.ndtr(x + d) + x * d_normal(x, d)


def d_logsumexp(p: Tensor, d: Tensor, dim: int) -> Tensor:
    r"""The change of the logsumexp along `dim`, from the softmax p of x.

    .. math:: \bar d + \log \Big(1 + \sum p \, (e^{d - \bar d} - 1)\Big), \qquad
              \bar d = \sum p \, d.

    The first order is the mean change; the rest is small, and log1p keeps its digits.
    """
    mean = (p * d).sum(dim, keepdim=True)
    return mean + torch.log1p((p * torch.expm1(d - mean)).sum(dim, keepdim=True))


def d_norm(y: Tensor, x: Tensor, d: Tensor, dim: int, keepdim: bool) -> Tensor:
    """The change of the Euclidean norm along `dim`, ``sum d (2 x + d)`` over the sum of both."""
    squares = (d * (2 * x + d)).sum(dim, keepdim)
    moved = torch.linalg.vector_norm(x + d, 2, dim, keepdim)
    return torch.where(squares == 0, 0.0, squares / (y + moved))


# The ``change(y, x, d)`` of each power that has one without cancellation, by its exponent.
POWERS: dict[float, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    2: lambda y, x, d: d * (2 * x + d),
    3: lambda y, x, d: d * (3 * x * (x + d) + d * d),
    0.5: d_sqrt,
    -0.5: d_rsqrt,
    -1: d_reciprocal,
}

# The ``change(y, x, d)`` of each operation, by its name.
CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "exp": d_exp,
    "log": d_log,
    "sqrt": d_sqrt,
    "rsqrt": d_rsqrt,
    "reciprocal": d_reciprocal,
    "sigmoid": lambda y, x, d: d_sigmoid(x, d),
    "silu": d_silu,
    "tanh": d_tanh,
    "relu": d_relu,
    "sin": d_sin,
    "cos": d_cos,
    "square": lambda y, x, d: d * (2 * x + d),
    "expm1": lambda y, x, d: x.exp() * torch.expm1(d),
    "log1p": lambda y, x, d: torch.log1p(d / (1 + x)),
}
