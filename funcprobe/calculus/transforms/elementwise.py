"""Changes of elementwise functions, from y = f(x), x and d: f(x + d) - f(x) without cancellation.

Accurate for every sign and size of d, to a few roundings of the result.
"""

import math

import torch
from torch import Tensor


def d_exp(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of e^x, from the larger of the two values, so that nothing overflows that need not."""
    return -torch.sign(d) * torch.maximum(x, x + d).exp() * torch.expm1(-d.abs())


def d_log(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of log x."""
    return torch.log1p(d / x)


def d_sqrt(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of the square root."""
    return torch.where(d == 0, 0.0, d / (y + (x + d).sqrt()))


def d_rsqrt(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of x^-1/2."""
    s, moved = x.sqrt(), (x + d).sqrt()
    return -d / (s + moved) * y / moved


def d_reciprocal(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of 1 / x."""
    return -d / (x * (x + d))


def d_sigmoid(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of the sigmoid: ``s(high) s(-low) (1 - e^-|d|)``, with the sign of d."""
    moved = x + d
    high, low = torch.maximum(x, moved), torch.minimum(x, moved)
    return -torch.sign(d) * torch.sigmoid(high) * torch.sigmoid(-low) * torch.expm1(-d.abs())


def d_silu(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of x s(x)."""
    return d * torch.sigmoid(x + d) + x * d_sigmoid(y, x, d)


def d_tanh(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of tanh x = 2 s(2 x) - 1."""
    return 2 * d_sigmoid(y, 2 * x, 2 * d)


def d_relu(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of max(x, 0)."""
    both = (x > 0) & (x + d > 0)
    return torch.where(both, d, (x + d).clamp(min=0) - y)


def d_sin(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of sin x."""
    return 2 * torch.cos(x + d / 2) * torch.sin(d / 2)


def d_cos(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Of cos x."""
    return -2 * torch.sin(x + d / 2) * torch.sin(d / 2)


def d_normal(x: Tensor, d: Tensor) -> Tensor:
    """The normal distribution's change over [x, x + d]: Gauss-Legendre while the step is short."""
    nodes = x.new_tensor([-0.9324695142031521, -0.6612093864662645, -0.2386191860831969])
    weights = (0.1713244923791704, 0.3607615730481386, 0.467913934572691)
    middle, half = x + d / 2, d / 2
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        for t in (middle + node * half, middle - node * half):
            total = total + weight * torch.exp(-t * t / 2)
    short = half * total / math.sqrt(2 * math.pi)
    # By symmetry in the tail where ndtr itself is small, and so exact.
    far = torch.where(x + d / 2 > 0, -1.0, 1.0)
    long = far * (torch.special.ndtr(far * (x + d)) - torch.special.ndtr(far * x))
    return torch.where(d.abs() < 0.5, short, long)


def d_logsumexp(p: Tensor, d: Tensor, dim: int) -> Tensor:
    """Of logsumexp from p = softmax(x): its first order, and the rest by log1p."""
    mean = (p * d).sum(dim, keepdim=True)
    return mean + torch.log1p((p * torch.expm1(d - mean)).sum(dim, keepdim=True))


# By the name of the operation.
CHANGES = {
    "exp": d_exp,
    "log": d_log,
    "sqrt": d_sqrt,
    "rsqrt": d_rsqrt,
    "reciprocal": d_reciprocal,
    "sigmoid": d_sigmoid,
    "silu": d_silu,
    "tanh": d_tanh,
    "relu": d_relu,
    "sin": d_sin,
    "cos": d_cos,
    "square": lambda y, x, d: d * (2 * x + d),
    "expm1": lambda y, x, d: x.exp() * torch.expm1(d),
    "log1p": lambda y, x, d: torch.log1p(d / (1 + x)),
}
