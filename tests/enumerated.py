"""The truth of the enumerable policy of `cases`: every sequence, by its probability.

Its probabilities are multiples of 1/4 at each step, so a batch that holds each sequence
``256 p`` times has exact expectations: whatever bias an estimator has is gone, and it must give the
truth to rounding.
"""

import math

import cases

SEQUENCES = cases.toy_sequences()
PROMPTS = 3
ETAS = [0.0, 1e-3, 0.1, -0.5, 2.0]


def log_probability(params, prompt, sequence):
    """log p of a whole response, by walking its prefixes."""
    row, total = prompt, 0.0
    for depth, token in enumerate(sequence):
        total += float(params[f"depth{depth}"][row].log_softmax(-1)[token])
        row = 2 * row + token - 1
    return total


def exact(params, prompts, per):
    """The entropy by enumeration: -sum p log p of whole sequences, over the mean length."""
    entropy = length = 0.0
    for prompt in prompts:
        for sequence in SEQUENCES:
            logp = log_probability(params, prompt, sequence)
            entropy -= math.exp(logp) * logp
            length += math.exp(logp) * len(sequence)
    return entropy / (length if per == "token" else len(prompts))


def exact_batch(params, prompts):
    """Each sequence as often as its probability says: 256 rows a prompt."""
    responses, owner = [], []
    for prompt in prompts:
        for sequence in SEQUENCES:
            times = 256 * math.exp(log_probability(params, prompt, sequence))
            assert abs(times - round(times)) < 1e-9
            responses += [sequence] * round(times)
            owner += [prompt] * round(times)
    assert len(responses) == 256 * len(prompts)
    return cases.toy_batch(responses, owner)


def setting(seed=0):
    params = cases.toy_params(prompts=PROMPTS, seed=seed)
    return params, cases.direction(params, seed=seed + 10), range(PROMPTS)
