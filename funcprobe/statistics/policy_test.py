"""Were the responses drawn from the scored policy? A test without recorded log-probabilities."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .estimators import Estimator, Rows
from .inputs import Scored, read
from .uncertainty import ONE_PROMPT, by_group, t_pvalue

LEVEL = 0.005  # below this p the test rejects
ENOUGH = 8  # prompts, below which only gross differences are seen


class PolicyTest(NamedTuple):
    """Whether responses were drawn from the scored policy. It prints as a sentence."""

    t: float  # Student's t of the summed discrepancy by prompt; nan for one prompt
    df: int  # its degrees of freedom, the number of prompts less 1
    p: float  # two-sided; nan for one prompt
    nats: float  # mean of -logp - H a token: above 0 if the responses are less likely than draws

    @property
    def rejects(self) -> bool:
        """Whether p is below 0.005."""
        return self.p < LEVEL

    @property
    def weak(self) -> bool:
        """Whether there are fewer than eight prompts, so that only gross differences are seen."""
        return self.df + 1 < ENOUGH

    def evidence(self) -> str:
        """The numbers, in brackets."""
        return (
            f"({self.nats:+.2g} nats a token, t = {self.t:.1f}, df = {self.df}, p = {self.p:.1g})"
        )

    def __str__(self) -> str:
        if math.isnan(self.p):
            return (
                f"Policy test: whether the rows are draws of the scored policy is unknown. "
                f"-logp - H is {self.nats:+.2g} nats a token, with {ONE_PROMPT}."
            )
        verdict = "are not" if self.rejects else "may be"
        text = f"Policy test: the rows {verdict} draws of the scored policy {self.evidence()}."
        if self.weak and not self.rejects:
            text += (
                f" With {self.df + 1} prompts only gross differences are seen: evaluate on "
                f"{ENOUGH} or more."
            )
        return text

    def __repr__(self) -> str:
        return str(self)


def policy_test(scores: Scored, batch: Rows) -> PolicyTest:
    r"""Tests that the responses were drawn from the policy that is scored.

    On policy the sum over a response of ``-logp_k - H_k`` has mean 0 given its prompt, whatever
    decides where the response ends, because each term has mean 0 given the prefix (a martingale).
    With D_g the sum over the rows of prompt g,

    .. math:: t = \frac{\sum_g D_g}{\sqrt{\max(\frac{G}{G - 1} \sum_g (D_g - \bar D)^2,
                                              \sum_{ik} v(H_{ik}))}}, \quad df = G - 1.

    The prompts' sums are independent with mean 0, but their variances differ. Student's t of normal
    sums is then conservative, at levels below 8% and for any G (Ibragimov and Mueller, 2010). Sums
    are not divided by lengths, which depend on the draws. The surprisal of a nearly certain policy
    is not normal: a whole batch may lack the rare tokens that carry its variance, and Student's t
    alone then gives up to 3% false alarms for a p of 0.5%. So the variance is at least the part
    that the entropies prove: v(H) is the least variance of -log p that a distribution of entropy H
    can have.

    The entropy and log-probability must be those of one policy. With top-p, both are of the
    truncated one, so the test holds as well. It is no test of rows that are weighted by recorded
    log-probabilities, which are declared to be of another policy.

    Args:
        scores: logp and entropy [N, R] in nats, at the policy.
        batch: gives response [N, R] and group [N].

    Returns:
        t, its degrees of freedom, the two-sided p, and the mean of ``-logp - H`` in nats a token.
        It is above 0 where the responses are less likely than the policy's own (drawn at a higher
        temperature, from another model, or written), below 0 where they are likelier (drawn at a
        lower temperature, or with top-p). With one prompt t and p are nan.

    Raises:
        ValueError: the batch is not that of the scores, they have no entropy, or the policy cannot
            produce a token of the batch.

    >>> import torch, types
    >>> logp, entropy = torch.full((2, 3), -1.0), torch.ones(2, 3)
    >>> rows = types.SimpleNamespace(response=torch.ones(2, 3, dtype=bool), group=torch.arange(2))
    >>> policy_test(types.SimpleNamespace(logp=logp, entropy=entropy), rows).nats
    0.0
    """
    inputs = read("policy_test", scores, batch, Estimator(), scores)
    if inputs.quantity != "entropy":
        raise ValueError(
            "policy_test: scores with an entropy were expected, these hold a readout's value. "
            "Score the rows with a scorer that has no readout=."
        )
    response, entropy = inputs.ground.response, inputs.ground.x
    surplus = torch.where(response, -scores.logp.double() - entropy, 0.0)
    tokens = int(response.sum())
    sums = by_group(surplus.sum(-1), inputs.group)
    total, g = float(sums.sum()), len(sums)
    nats = total / tokens if tokens else math.nan
    if g < 2:
        return PolicyTest(math.nan, 0, math.nan, nats)
    variance = max(float(sums.var()) * g, float(least_variance(entropy[response]).sum()))
    t = total / math.sqrt(variance) if variance else math.copysign(math.inf if total else 0, total)
    return PolicyTest(t, g - 1, t_pvalue(t, g - 1), nats)


def least_variance(entropy: Tensor) -> Tensor:
    """The least variance of -log p that a distribution of this entropy can have, nats squared.

    It is that of n equally likely tokens and a rarer one, with n the integer part of ``exp(H)``: of
    probability q, which the entropy determines, it has ``q (1 - q) log^2((1 - q) / (n q))``.

    Args:
        entropy: nats, of any shape.
    """
    h = entropy.double().clamp(min=0)
    n = h.exp().floor().clamp(min=1)
    low, high = torch.zeros_like(h), 1 / (n + 1)
    for _ in range(50):
        q = (low + high) / 2
        below = -torch.xlogy(1 - q, (1 - q) / n) - torch.xlogy(q, q) < h
        low, high = torch.where(below, q, low), torch.where(below, high, q)
    gap = ((1 - low) / n).log() - low.clamp(min=1e-300).log()
    return low * (1 - low) * gap.square()
