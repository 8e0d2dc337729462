r"""The estimators as functions of sums over rows, from which values and errors follow alike.

An estimator is ``T(sum_i m_i x_i)``, where x_i is what row i adds to each sum, m_i is the row's
weight, and T is a smooth function that does not change when all sums are scaled. With m = 1 it
gives the estimate; with counts drawn over prompts, one draw of the bootstrap; with m = 0 for one
prompt, a value of the jackknife; with base weights, the estimate from rows of another policy. Its
derivative in m_i is the influence value ``psi_i = m_i <grad T, x_i>``, and these sum to 0 (Euler).
Everything takes arrays and returns arrays, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad

from .weights import log_weights

Per = Literal["token", "sequence"]
Weights = Literal["sequence", "prefix", "prefix_raw", "none"]

WEIGHTS = ("sequence", "prefix", "prefix_raw", "none")
UNITS = ("token", "sequence")


class Rows(Protocol):
    """What the estimators read of a batch."""

    @property
    def response(self) -> Tensor:
        """[N, R] bool, the tokens that count."""
        ...

    @property
    def group(self) -> Tensor:
        """[N] int64, the prompt of each row."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Estimator:
    """Which estimator a result came from; two results are combined only if theirs are the same.

    The arguments are those of `entropy_change`, which explains them.

    Args:
        weights: the importance weights, by name.
        per: the unit, "token" or "sequence".
        behaviour: [N, R] nats, log-probabilities under the policy that sampled the rows; None if
            that is the scored policy.
        control: [N, R] nats, the control variate of prefix weights; None without one.

    Raises:
        ValueError: an unknown name, or a control variate without prefix weights.

    >>> Estimator("prefix").differences(Estimator(per="sequence"))
    {'weights': "'prefix' and 'sequence'", 'per': "'token' and 'sequence'"}
    """

    weights: Weights = "sequence"
    per: Per = "token"
    behaviour: Tensor | None = None
    control: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {self.weights!r}.")
        if self.per not in UNITS:
            raise ValueError(f"per must be 'token' or 'sequence', not {self.per!r}.")
        if self.control is not None and not self.weights.startswith("prefix"):
            raise ValueError(
                f"control: a control variate belongs to prefix weights, these are "
                f"{self.weights!r}. Use weights='prefix' or 'prefix_raw', or leave control= out."
            )

    @property
    def off_policy(self) -> bool:
        """Whether the rows are weighted because another policy sampled them."""
        return self.behaviour is not None

    def differences(self, other: "Estimator") -> dict[str, str]:
        """The settings in which two estimators differ: for each its name, and what the two have.

        Tensors are compared by value, nan equal to nan, over the positions that both have: an
        estimator reads those of the responses alone, and checks that it has them all.
        """
        differing = {}
        for name in ("weights", "per"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                differing[name] = f"{mine!r} and {theirs!r}"
        for name in ("behaviour", "control"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if not _same(mine, theirs):
                both = mine is not None and theirs is not None
                differing[name] = "other numbers" if both else "given for one of them only"
        return differing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Estimator) and not self.differences(other)

    def __hash__(self) -> int:
        return hash((self.weights, self.per))

    def __repr__(self) -> str:
        text = f"Estimator(weights={self.weights!r}, per={self.per!r}"
        for name in ("behaviour", "control"):
            if getattr(self, name) is not None:
                text += f", {name}=<{list(getattr(self, name).shape)}>"
        return text + ")"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors [N, R] hold the same numbers where both have a position."""
    if a is b:
        return True
    if a is None or b is None or len(a) != len(b):
        return False
    width = min(a.shape[-1], b.shape[-1])
    a, b = (x[..., :width].detach().cpu().double() for x in (a, b))
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


class Sums(NamedTuple):
    """An estimate as a smooth function T of sums over rows."""

    terms: Tensor  # [..., N, F] what each row adds to each of F sums
    combine: Callable[[Tensor], Tensor]  # sums [..., F] -> estimate [...]

    def value(self) -> Tensor:
        """The estimate, [...]."""
        return self.combine(self.terms.sum(-2))

    def influence(self, sums: Tensor | None = None) -> Tensor:
        """The rows' influence values over N, [..., N]. T's gradient is taken at `sums` if given."""
        at = self.terms.sum(-2) if sums is None else sums
        slope = grad(lambda s: self.combine(s).sum())(at)
        return (self.terms * slope.unsqueeze(-2)).sum(-1)


class Ground(NamedTuple):
    """The rows at the base policy, which do not depend on eta.

    The level R is subtracted from x before sums are taken, since it drops out of the change, and
    otherwise large sums would cancel. Prefix weights per sequence keep it: there it does not.
    """

    response: Tensor  # [N, R] bool
    x: Tensor  # [N, R] the quantity, 0 off the response
    size: Tensor  # [N] T: the response's length, or 1 per sequence
    level: Tensor  # [] R, the ratio of sums of x and T
    weight: Tensor  # [N] base weights over the largest, 1 on policy
    per: Per


def ground(x: Tensor, response: Tensor, per: Per, logb: Tensor | None = None) -> Ground:
    """The rows at the base policy, from x [N, R] and log base weights [N]; None is on policy."""
    x = torch.where(response, x.double(), 0.0)
    size = response.sum(-1).double() if per == "token" else torch.ones_like(x[:, 0])
    weight = torch.ones_like(size) if logb is None else (logb - logb.max()).exp()
    level = (weight * x.sum(-1)).sum() / (weight * size).sum()
    return Ground(response, x, size, level, weight, per)


def base_sums(g: Ground) -> Sums:
    """The estimate at the base policy less its level, ``sum (x - R T) / sum T``."""
    terms = torch.stack([g.x.sum(-1) - g.level * g.size, g.size], -1)
    return Sums(terms * g.weight.unsqueeze(-1), lambda s: s[..., 0] / s[..., 1])


def change_sums(
    g: Ground,
    logp: Tensor,
    dx: Tensor,
    weights: Weights,
    *,
    adjust: Callable[[Tensor], Tensor] | None = None,
    control: Tensor | None = None,
) -> Sums:
    """The change of the estimate, from changes [..., N, R] of log-probability and of x.

    Args:
        g: the rows at the base policy.
        logp, dx: the changes; what they hold off the response is ignored.
        weights: see `entropy_change`.
        adjust: clips or smooths log sequence weights [..., N]; None leaves them as they are.
        control: [N, R] coefficients of the control variate of prefix weights.
    """
    logp = torch.where(g.response, logp.double(), 0.0)
    dx = torch.where(g.response, dx.double(), 0.0)
    if weights in ("prefix", "prefix_raw"):
        return _by_prefix(g, logp, dx, weights == "prefix", control)
    logw = torch.zeros_like(logp[..., 0]) if weights == "none" else log_weights(logp, g.response)
    return _by_sequence(g, adjust(logw) if adjust else logw, dx.sum(-1))


def _by_sequence(g: Ground, logw: Tensor, dx: Tensor) -> Sums:
    """``[sum w dx + sum e (x - R T)] / sum w T`` with w = 1 + e."""
    w, e = scaled_weights(logw)
    h = g.x.sum(-1) - g.level * g.size
    terms = [g.size, h, w * g.size, e * g.size, w * dx + e * h]

    def combine(s: Tensor) -> Tensor:
        size, h, norm, tilt, moved = s.unbind(-1)
        return (moved - h / size * tilt) / norm

    return Sums(_stacked(terms, g.weight), combine)


class _PrefixSums(NamedTuple):
    """What each row adds to the sums of prefix weights, or these sums.

    a is 1 while a row lives; u is its x, less the level if the estimate is per token. The last five
    are [..., R] with one sum a position where weights are normalised at each position, and [..., 1]
    where they are not.
    """

    n: Tensor  # [..., 1] rows
    size: Tensor  # [..., 1] T
    x: Tensor  # [..., 1] sum u
    drift: Tensor  # r, whose mean over rows normalises the weights at a position
    moved: Tensor  # a [(1 + r) dx + r u]
    extra: Tensor  # a r
    u: Tensor  # a u
    alive: Tensor  # a

    def joined(self) -> Tensor:
        """All of them side by side, [..., F]."""
        shape = self.moved.shape[:-1]
        return torch.cat([part.expand(*shape, part.shape[-1]) for part in self], -1)

    @classmethod
    def split(cls, sums: Tensor) -> "_PrefixSums":
        """The parts of what `joined` gave, or of its sum over rows."""
        positions = (sums.shape[-1] - 3) // 5
        return cls(*sums.split([1, 1, 1, *[positions] * 5], -1))


def _by_prefix(
    g: Ground, logp: Tensor, dx: Tensor, normalised: bool, control: Tensor | None
) -> Sums:
    """``sum a [(1 + r) dx + r (x - R)] / (sum T + sum a r)``, per token; see `entropy_change`."""
    per_token = g.per == "token"
    alive = g.response.double()
    r, rho = prefix_weights(logp, normalised)
    u = alive * (g.x - g.level) if per_token else g.x
    moved = rho * dx + r * u
    if control is not None:
        b = torch.where(g.response, control.double(), 0.0)
        moved = moved - b * rho * torch.expm1(logp)
    drift = r if normalised else torch.zeros_like(moved)
    by_position = [drift, moved, alive * r, u, alive]
    if not normalised:
        by_position = [part.sum(-1, keepdim=True) for part in by_position]
    n, size, x = torch.ones_like(g.size), g.size, u.sum(-1)
    rows = _PrefixSums(*(part.unsqueeze(-1) for part in (n, size, x)), *by_position)

    def combine(sums: Tensor) -> Tensor:
        s = _PrefixSums.split(sums)
        mean = s.drift / s.n
        top = ((s.moved - mean * s.u) / (1 + mean)).sum(-1)
        if not per_token:
            return top / s.n.squeeze(-1)
        tilt = ((s.extra - mean * s.alive) / (1 + mean)).sum(-1)
        size, x = s.size.squeeze(-1), s.x.squeeze(-1)
        return (top - x / size * tilt) / (size + tilt)

    return Sums(rows.joined() * g.weight.unsqueeze(-1), combine)


def scaled_weights(logw: Tensor) -> tuple[Tensor, Tensor]:
    """w and e = w - 1, over the largest weight where that exceeds 1, so that neither overflows.

    Where all weights are below 1/e, both are over the largest too, and e is w without the -1.
    """
    largest = logw.amax(-1, keepdim=True).detach()
    # Where all weights are small, w - 1 rounds as 1 does and w may underflow. There w is scaled up
    # and the 1 of w - 1 is dropped, since a constant in e cancels from the change and from psi.
    tiny = largest < -1
    c = torch.where(tiny, largest, largest.clamp(min=0))
    w = (logw - c).exp()
    one = (-c.clamp(min=0)).exp()
    # expm1 is exact at small changes; where it would overflow, the 1 is below rounding.
    e = torch.where(logw > 30, w - one, one * torch.expm1(logw.clamp(max=30)))
    return w, torch.where(tiny, w, e)


def prefix_weights(logp: Tensor, normalised: bool = True) -> tuple[Tensor, Tensor]:
    """The importance weights of each token's prefix, less 1 and as they are, both [..., N, R].

    If `normalised`, they are first divided by their mean over all rows at each position.
    """
    before = logp.cumsum(-1) - logp
    if not normalised:
        f = torch.expm1(before)
        return f, 1 + f
    largest = before.amax(-2, keepdim=True).detach()
    rho = (before - largest).exp()
    rho = rho / rho.mean(-2, keepdim=True)
    # expm1 is exact at small changes; far from them nothing cancels.
    far = (largest > 30) | (largest < -1)
    f = torch.expm1(before.clamp(max=30))
    mean = f.mean(-2, keepdim=True)
    r = torch.where(far, rho - 1, (f - mean) / torch.where(far, 1.0, 1 + mean))
    return r, torch.where(far, rho, 1 + r)


def _stacked(terms: list[Tensor], weight: Tensor) -> Tensor:
    """Terms [..., N] side by side, times the rows' weights: [..., N, F]."""
    return torch.stack(torch.broadcast_tensors(*terms), -1) * weight.unsqueeze(-1)
