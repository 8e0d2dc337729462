"""How often the two tests of E's policy alarm, on true draws and on others; seeds are fixed.

The policies are tables of logits that each prefix reaches through a hash of its tokens. Prompts
differ in how sharp they are and in how soon they end, so the responses of one prompt are alike in
length and entropy, and lengths are ragged.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

import funcprobe as fp
from funcprobe.statistics.doubts import MEAN_WEIGHT_LEVEL
from funcprobe.statistics.uncertainty import t_pvalue
from funcprobe.statistics.weights import mean_weight_z

pytestmark = pytest.mark.slow

KINDS, STATES, VOCABULARY, LENGTH, COPIES = 40, 32, 8, 20, 4
BATCHES = {4: 3000, 8: 3000, 32: 2000, 128: 1000}  # by the number of prompts
USUAL, CERTAIN = 2.0, 20.0  # the logits' scale; the second gives 0.07 nats a token


@cache
def policy(scale):
    """Logits [kind, state, V], and a direction that moves the logits as much."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sharp = scale * torch.exp(0.4 * normal(KINDS))
    table = normal(STATES, VOCABULARY) + 0.5 * normal(KINDS, 1, VOCABULARY)
    logits = sharp[:, None, None] * table
    logits[..., 0] += normal(KINDS)[:, None] - scale / 2
    return logits, scale * normal(STATES, VOCABULARY)


def sample(scale, prompts, batches, *, eta=1e-6, sampling=fp.Sampling(), seed=0):
    """Scores, changes of log-probability along the direction, [batches, N, R], and rows."""
    logits, v = policy(scale)
    logp = logits.log_softmax(-1)
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp, 0.0).sum(-1)
    change = (logits + eta * v).log_softmax(-1) - logp
    tempered = logits / sampling.temperature
    q = tempered.masked_fill(~sampling.possible(tempered), -torch.inf).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(KINDS, (batches * prompts,), generator=generator)
    kind = kind.repeat_interleave(COPIES)
    state, alive = torch.zeros_like(kind), torch.ones_like(kind, dtype=torch.bool)
    columns = []
    for _ in range(LENGTH):
        token = torch.multinomial(q[kind, state], 1, generator=generator)[:, 0]
        at = kind, state
        read = logp[(*at, token)], entropy[at], change[(*at, token)]
        columns.append([*(torch.where(alive, x, 0.0) for x in read), alive])
        alive = alive & (token != 0)
        state = (7 * state + 5 * token + 1) % STATES
    shape = batches, prompts * COPIES, LENGTH
    return [torch.stack(x, -1).view(shape) for x in zip(*columns, strict=True)]


def alarms(scale, prompts, *, spread=0.05, batches=None, **options):
    """How often each of the two tests rejects, and either does."""
    batches = batches or BATCHES[prompts]
    group = torch.arange(prompts).repeat_interleave(COPIES)
    eta = 1e-6 * spread / float(sample(scale, 32, 20)[2].sum(-1).std())
    logp, entropy, change, response = sample(scale, prompts, batches, eta=eta, **options)
    z = mean_weight_z(change.sum(-1), group)
    by_weight = torch.tensor([t_pvalue(float(x), prompts - 1) < MEAN_WEIGHT_LEVEL for x in z])
    by_policy = torch.tensor(
        [
            fp.policy_test(
                fp.Scores(logp[i], entropy[i]), SimpleNamespace(response=response[i], group=group)
            ).rejects
            for i in range(batches)
        ]
    )
    return [float(x.double().mean()) for x in (by_policy, by_weight, by_policy | by_weight)]


@pytest.mark.parametrize("prompts", BATCHES)
@pytest.mark.parametrize("scale", [USUAL, CERTAIN])
def test_true_draws_alarm_in_at_most_one_percent(scale, prompts):
    rates = alarms(scale, prompts)
    print(f"scale {scale}, {prompts} prompts: policy, weight, either {rates}")
    assert rates[2] <= 0.01, rates


@pytest.mark.parametrize("spread", [0.001, 0.1])
def test_the_mean_weights_level_does_not_depend_on_a_small_spread(spread):
    for prompts in (4, 32):
        assert alarms(USUAL, prompts, spread=spread, seed=1)[1] <= 0.01


@pytest.mark.parametrize(
    ("sampling", "few"),
    [(fp.Sampling(0.7), 0.4), (fp.Sampling(0.5), 0.6), (fp.Sampling(1.0, 0.9), 0.3)],
)
def test_other_settings_alarm_with_enough_prompts(sampling, few):
    power = {
        prompts: alarms(USUAL, prompts, sampling=sampling, batches=200, seed=2)[0]
        for prompts in (4, 8, 16, 32)
    }
    print(f"{sampling}: {power}")
    assert power[8] >= few and power[16] >= 0.9 and power[32] >= 0.99
