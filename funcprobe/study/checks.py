"""What a probe refuses before it computes anything: impossible settings, batches and rates."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ..calculus.interpolation import check_nodes
from ..language.batch import Batch, unknown_rows
from ..language.model.positions import limit, positions
from ..language.model.split import Model
from ..language.objectives import prepare
from ..training.checkpoint import Checkpoint
from .setup import Inputs, Settings

# The largest count that fits the 32-bit integers of every device.
_LARGEST = 2**31 - 1


def check_settings(settings: Settings) -> None:
    """Refuses settings that no probe could mean.

    Raises:
        ValueError: nodes or tol are none of what `sweep` takes, or a count is not a whole number
            from 1 to 2^31 - 1.
    """
    check_nodes("probe", settings.nodes, settings.tol)
    for name in ("max_length", "tokens", "lanes"):
        count = getattr(settings, name)
        if count is None or (type(count) is int and 1 <= count <= _LARGEST):
            continue
        bound = "a whole number"
        if isinstance(count, int | float):
            bound = f"at most {_LARGEST}" if count > _LARGEST else "at least 1"
            bound = bound if count % 1 == 0 else "a whole number"
        raise ValueError(
            f"probe: {name} must be {bound}, not {count}. Leave it out for the default."
        )


def check_arguments(
    checkpoint: object, update: object, evaluation: object, etas: object = None
) -> None:
    """Refuses arguments of other types, as when two were swapped.

    Raises:
        TypeError: an argument is neither what it should be nor a path, or etas are a text.
    """
    if isinstance(etas, str):
        raise TypeError(
            f"probe: etas must be numbers or a function of the learning rate, not {etas!r}. In "
            "Python, multiples of the rate are lambda lr: [0.5 * lr, lr]."
        )
    wanted = (
        ("checkpoint", checkpoint, Checkpoint),
        ("update", update, Batch),
        ("evaluation", evaluation, Batch),
    )
    for name, given, expected in wanted:
        if not isinstance(given, (expected, str, Path)):
            raise TypeError(
                f"probe: {name} must be a {expected.__name__} or the path of one, not a "
                f"{type(given).__name__}. Likely two arguments were swapped: the order is "
                "checkpoint, update, evaluation. Pass them in this order, or by name."
            )


def check_inputs(inputs: Inputs, settings: Settings) -> None:
    """Refuses a checkpoint and batches that cannot belong together.

    Raises:
        ValueError: a rate or norm that is not usable, token ids outside the vocabulary, a row
            longer than the model's positions, a number that is impossible, or one that is needed
            and unknown.
    """
    checkpoint = inputs.checkpoint
    _check_adamw(checkpoint)
    _check_rewards(inputs.update)
    # Unknown log-probabilities of U are those at the checkpoint, which are not computed yet.
    known = inputs.update.old_logp.nan_to_num(0.0)
    prepare(inputs.update._replace(old_logp=known), settings.recipe)
    if settings.off_policy:
        _check_known(inputs.evaluation)
    for name, batch in (("U", inputs.update), ("E", inputs.evaluation)):
        _check_tokens(name, batch, checkpoint.model)
        _check_positions(name, batch, checkpoint.model)
        _check_logp(name, batch)


def _check_adamw(checkpoint: Checkpoint) -> None:
    """Refuses a rate or a clipping norm for which there is no step."""
    lr, most = checkpoint.adamw["lr"], checkpoint.adamw["max_grad_norm"]
    rates = list(lr.values()) if isinstance(lr, dict) else [lr]
    if not all(0 <= rate < math.inf for rate in rates) or not any(rates):
        raise ValueError(
            f"probe: a positive and finite learning rate was expected, not {max(rates)}. "
            "load_checkpoint takes another one as lr=."
        )
    if most is not None and not 0 <= most < math.inf:
        raise ValueError(
            f"probe: max_grad_norm must be positive and finite, or 0 for no clipping, not {most}. "
            "Pass load_checkpoint the run's own as max_grad_norm=."
        )


def _check_rewards(update: Batch) -> None:
    for field in ("reward", "advantage"):
        rows = getattr(update, field).isinf().nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"probe: {field} must be finite, but {len(rows)} rows of U hold an infinite one, "
                f"the first is row {rows[0]}. Likely a scorer divided by 0. Leave out such rows' "
                "groups."
            )


def _check_known(evaluation: Batch) -> None:
    rows = unknown_rows(evaluation, "old_logp").nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            "probe: off_policy=True weights E by the log-probabilities it was sampled with, but "
            f"old_logp is unknown in {len(rows)} rows of E, {rows[:5]}. Write old_logp into E's "
            "lines, or leave off_policy out if E was sampled at the checkpoint."
        )


def _check_tokens(name: str, batch: Batch, model: Model) -> None:
    """Refuses a batch of another tokenizer."""
    tokens, vocabulary = batch.tokens[batch.attention], model.vocabulary
    if not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise ValueError(
            f"probe: token ids from 0 to {vocabulary - 1} were expected, {name} has "
            f"{int(tokens.min())} to {int(tokens.max())}. It was tokenised for another model. "
            "Tokenise it with the checkpoint's tokenizer."
        )


def _check_positions(name: str, batch: Batch, model: Model) -> None:
    """Refuses rows that are longer than the model is right for."""
    lengths, most = batch.attention.sum(1), limit(model.skeleton)
    rows = (lengths > most.longest).nonzero().flatten().tolist() if most else []
    if most and rows:
        raise ValueError(
            f"probe: rows of at most {most.longest} tokens were expected, but row {rows[0]} of "
            f"{name} has {int(lengths[rows[0]])}. {most.cause} Likely it was sampled from another "
            "model. Leave out such rows."
        )


def _check_logp(name: str, batch: Batch) -> None:
    """Refuses log-probabilities of more than probability 1, beyond what rounding explains."""
    for field in ("old_logp", "ref_logp"):
        value = getattr(batch, field)
        known = value[batch.response & ~value.isnan()]
        if len(known) and not known.any():
            raise ValueError(
                f"probe: {field} must be log-probabilities in nats, but all {len(known)} of {name} "
                "are 0, as if every token had been certain. Likely they are placeholders. Write "
                "the log-probabilities, or leave them out."
            )
        wrong = batch.response & (value > 1e-3)
        if wrong.any():
            row = int(wrong.any(1).nonzero()[0])
            raise ValueError(
                f"probe: {field} must be log-probabilities in nats, none above 0, but row {row} of "
                f"{name} holds {float(value[row][wrong[row]].max()):.4g}. Likely they are "
                "probabilities, or their sign was lost. Write log-probabilities, or leave them out."
            )


def rows_beyond(batch: Batch, model: Model) -> Tensor:
    """The rows that are longer than the model was made for, as indices."""
    limit = positions(model.skeleton)
    if limit is None:
        return torch.empty(0, dtype=torch.int64)
    return (batch.attention.sum(1) > limit).nonzero().flatten()
