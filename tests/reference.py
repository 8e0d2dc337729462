"""Slow, obvious versions of what the package does: loops, full logits, .backward(), torch.optim.

Written from the definitions, on a live module, and sharing no code with the package.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

# The live module in float64


@contextmanager
def float64(module):
    """Runs a module whose weights are float64 in float64: its casts to float32 do nothing."""
    low = (torch.float32, torch.float16, torch.bfloat16)
    to, softmax = torch.Tensor.to, F.softmax
    saved = {name: table.clone() for name, table in module.named_buffers()}

    def keep(value):
        return torch.float64 if isinstance(value, torch.dtype) and value in low else value

    torch.Tensor.to = lambda self, *args, **kwargs: to(
        self, *(keep(a) for a in args), **{k: keep(a) for k, a in kwargs.items()}
    )
    torch.Tensor.float = lambda self: self.double()
    F.softmax = lambda x, dim, dtype=None, **_: softmax(x, dim, dtype=keep(dtype))
    _exact_rotary(module)
    try:
        yield module
    finally:
        del torch.Tensor.to, torch.Tensor.float
        F.softmax = softmax
        for name, table in module.named_buffers():
            table.copy_(saved[name])


def _exact_rotary(module):
    """theta^(-2 j / d) again, in float64."""
    for name, table in module.named_buffers():
        if "inv_freq" not in name:
            continue
        rope = module.config.rope_parameters
        for kind, values in rope.items():
            if isinstance(values, dict) and kind in name:
                rope = values
        half = len(table)
        exact = torch.tensor(
            [rope["rope_theta"] ** (-j / half) for j in range(half)], dtype=torch.float64
        ) / torch.tensor(rope.get("short_factor", 1.0), dtype=torch.float64)
        assert torch.allclose(table, exact, rtol=1e-5)
        table.copy_(exact)


@contextmanager
def moved(module, v, eta):
    """The live module at ``params + eta * v``, by writing its weights in place."""
    weights = dict(module.named_parameters())
    saved = {name: weights[name].detach().clone() for name in v}
    try:
        with torch.no_grad():
            for name in v:
                weights[name].add_(v[name].to(saved[name].dtype), alpha=float(eta))
        yield module
    finally:
        with torch.no_grad():
            for name in v:
                weights[name].copy_(saved[name])


# Scores


def row_logits(module, batch, i):
    """The logits [T_i, V] that predict row i's response: its own forward, without padding."""
    ids = batch.tokens[i][batch.attention[i]]
    t = int(batch.response[i].sum())
    if t == 0:
        return torch.zeros(0, 0), ids[:0]
    out = module(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
    return out[len(ids) - t - 1 : len(ids) - 1], ids[len(ids) - t :]


def scores(module, batch, *, temperature=1.0, warp=None):
    """(logp, entropy), both [N, R], row by row and token by token; `warp` maps logits [T, V]."""
    n, r = batch.response.shape
    zero = torch.zeros((), dtype=next(module.parameters()).dtype)
    logp, entropy = [[zero] * r for _ in range(n)], [[zero] * r for _ in range(n)]
    for i in range(n):
        z, target = row_logits(module, batch, i)
        for k in range(len(target)):
            row = z[k] / temperature
            if warp is not None:
                row = warp(row)
            lp = torch.log_softmax(row, -1)
            logp[i][k] = lp[target[k]]
            possible = lp > -math.inf
            entropy[i][k] = -(lp[possible].exp() * lp[possible]).sum()
    return torch.stack([torch.stack(x) for x in logp]), torch.stack(
        [torch.stack(x) for x in entropy]
    )


@torch.no_grad()
def sweep(module, v, etas, batch, **options):
    """(base, change): scores at 0, and at each eta less them, one in-place write after another."""
    base = scores(module, batch, **options)
    changes = []
    for eta in etas:
        with moved(module, v, eta):
            there = scores(module, batch, **options)
        changes.append([x - y for x, y in zip(there, base, strict=True)])
    return base, tuple(torch.stack(x) for x in zip(*changes, strict=True))


# Losses, as the trainers define them


def group_advantages(reward, group, *, baseline, scale):
    out = torch.zeros_like(reward)
    for i in range(len(reward)):
        peers = [j for j in range(len(reward)) if group[j] == group[i]]
        rewards = [float(reward[j]) for j in peers]
        others = [float(reward[j]) for j in peers if j != i]
        value = float(reward[i])
        if baseline == "mean":
            value -= sum(rewards) / len(rewards)
        elif baseline == "loo" and others:
            value -= sum(others) / len(others)
        if scale == "group":
            # torch.std of one number is nan: a group of one has no scale.
            std = float(torch.tensor(rewards).double().std()) if others else 0.0
            value /= std + 1e-4
        elif scale == "batch":
            value /= float(reward.std()) + 1e-4
        out[i] = value
    return out


def loss(
    name, logp, mask, reward, group, *, old=None, ref=None, beta=0.0, max_length=None, epsilon=0.2
):
    """The batch loss of a recipe, from log-probabilities [N, R] that carry a graph."""
    mask = mask.to(logp.dtype)
    n, width = mask.shape
    if name == "reinforce":
        return -(reward[:, None] * logp * mask).sum() / n
    if name == "rloo":
        advantage = group_advantages(reward, group, baseline="loo", scale="none")
        total = (logp * mask).sum(1) - (torch.nan_to_num(old) * mask).sum(1)
        ratio = torch.exp(total)
        clipped = torch.clamp(ratio, 1 - epsilon, 1 + epsilon)
        return -torch.min(ratio * advantage, clipped * advantage).mean()
    scale = "none" if name == "dr_grpo" else "group"
    advantage = group_advantages(reward, group, baseline="mean", scale=scale)[:, None]
    high = 0.28 if name == "dapo" else epsilon
    ratio = torch.exp(logp - torch.nan_to_num(old))
    clipped = torch.clamp(ratio, 1 - epsilon, 1 + high)
    token = -torch.min(ratio * advantage, clipped * advantage)
    if beta:
        gap = torch.nan_to_num(ref) - logp
        token = token + beta * (torch.exp(gap) - gap - 1)
    if name == "grpo":
        return ((token * mask).sum(1) / mask.sum(1).clamp(min=1.0)).mean()
    if name == "dr_grpo":
        return (token * mask).sum() / (n * (max_length or width))
    return (token * mask).sum() / mask.sum().clamp(min=1.0)  # dapo


# The estimator: from two entropies and weights, row by row, in Python's floats


def entropy_change(base, change, response, *, per):
    """(value, psi [N]) at one eta; base and change are (logp, entropy), each [N, R]."""
    n = len(response)
    h, moved_h, w, size = [], [], [], []
    for i in range(n):
        alive = [k for k in range(response.shape[1]) if response[i, k]]
        h.append(math.fsum(float(base[1][i, k]) for k in alive))
        moved_h.append(math.fsum(float(base[1][i, k]) + float(change[1][i, k]) for k in alive))
        w.append(math.exp(math.fsum(float(change[0][i, k]) for k in alive)))
        size.append(len(alive) if per == "token" else 1)
    before = math.fsum(h) / sum(size)
    weighted = math.fsum(w[i] * size[i] for i in range(n))
    after = math.fsum(w[i] * moved_h[i] for i in range(n)) / weighted
    psi = [
        w[i] * (moved_h[i] - after * size[i]) / (weighted / n)
        - (h[i] - before * size[i]) / (sum(size) / n)
        for i in range(n)
    ]
    return after - before, psi


def slope(base, derivative, response, *, per):
    """(value, phi [N]): the derivative of the same at eta = 0, by its closed form."""
    n = len(response)
    zero = torch.zeros(())
    h, dh, s = (
        torch.where(response, x, zero).double().sum(1)
        for x in (base[1], derivative[1], derivative[0])
    )
    size = response.sum(1).double() if per == "token" else torch.ones(n).double()
    ratio = h.sum() / size.sum()
    value = (dh + (h - ratio * size) * s).sum() / size.sum()
    tilt = (size * s).sum() / size.sum()
    phi = (dh + (h - ratio * size) * (s - tilt) - value * size) / (size.sum() / n)
    return float(value), phi


def stderr(psi, group):
    """The standard error of a mean of influence values [N], over prompts."""
    prompts = sorted({int(g) for g in group})
    total = 0.0
    for prompt in prompts:
        total += sum(float(p) for p, g in zip(psi, group, strict=True) if int(g) == prompt) ** 2
    return math.sqrt(len(prompts) / (len(prompts) - 1) * total) / len(psi)


def pareto_khat(logw):
    """k-hat of one row of log weights, after ArviZ's psislw and gpdfit, in loops."""
    x = [float(value) - float(max(logw)) for value in logw]
    n = len(x)
    ordered = sorted(x)
    cutoff = max(ordered[-math.floor(min(n / 5, 3 * math.sqrt(n))) - 1], math.log(2.0**-1022))
    tail = sorted(math.exp(value) - math.exp(cutoff) for value in x if value > cutoff)
    m = len(tail)
    if m <= 4:
        return math.nan
    grid = 30 + int(math.sqrt(m))
    b, k, length = [], [], []
    for j in range(1, grid + 1):
        b.append(
            (1 - math.sqrt(grid / (j - 0.5))) / (3 * tail[int(m / 4 + 0.5) - 1]) + 1 / tail[-1]
        )
        k.append(sum(math.log1p(-b[-1] * t) for t in tail) / m)
        length.append(m * (math.log(-b[-1] / k[-1]) - k[-1] - 1))
    weight = [1 / sum(math.exp(other - own) for other in length) for own in length]
    kept = [(w, value) for w, value in zip(weight, b, strict=True) if w >= 10 * 2.0**-52]
    mean = sum(w * value for w, value in kept) / sum(w for w, _ in kept)
    shape = sum(math.log1p(-mean * t) for t in tail) / m
    return (m * shape + 10 * 0.5) / (m + 10)


# Optimizers


def optimizer_step(kind, params, grads, state, *, groups, max_grad_norm=None, **options):
    """The parameters after one step of a torch optimizer, from `state` by name.

    groups: a list of (names, group options). A gradient None is no gradient.
    """
    p = {name: torch.nn.Parameter(value.clone()) for name, value in params.items()}
    optimizer = kind(
        [{"params": [p[name] for name in names], **own} for names, own in groups],
        foreach=False,
        **options,
    )
    for name, values in state.items():
        optimizer.state[p[name]] = {key: value.clone() for key, value in values.items()}
    for name in p:
        p[name].grad = None if grads[name] is None else grads[name].clone()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(p.values()), max_grad_norm)
    optimizer.step()
    after = {name: dict(optimizer.state[value]) for name, value in p.items()}
    return {name: value.detach() for name, value in p.items()}, after
