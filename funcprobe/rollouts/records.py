"""Batches as JSON lines, one response a line."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..language.batch import Batch, collate
from ..language.sampling import Sampling
from ..runtime.files import write_atomically
from .lines import Record, read_lines, read_rows

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a text, token ids, or chat messages
Tokenizer = PreTrainedTokenizerBase | None

# Settings of other samplers, at the values at which they change no probability.
_NEUTRAL = {
    "do_sample": True,
    "num_beams": 1,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "guidance_scale": 1,
    "min_new_tokens": 0,
    "min_tokens": 0,
}


def write_batch(
    path: str | Path,
    batch: Batch,
    *,
    tokenizer: Tokenizer = None,
    sampling: Sampling | None = None,
) -> None:
    """Writes a batch as JSON lines, whole or not at all.

    Each line has prompt_ids, completion_ids (which include a sampled EOS) and group. It also has
    whatever is known of reward, advantage and old_logp (nats, one a token), the texts if a
    tokenizer is given, and the sampling settings if they are given. The weights and ref_logp are
    not written.
    """
    floats = ("reward", "advantage", "old_logp")
    known = {name for name in floats if not getattr(batch, name).isnan().all()}
    shared = {"sampling": asdict(sampling)} if sampling else {}
    records = [_record(batch, i, known, tokenizer) | shared for i in range(len(batch.group))]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def read_batch(path: str | Path, tokenizer: Tokenizer = None) -> Batch:
    """Reads a batch from JSON lines.

    A line needs a prompt (``prompt_ids``, or ``prompt``: a text, or a list of chat messages) and a
    completion (``completion_ids``, or ``completion``: a text). Texts need the tokenizer. A text
    completion is taken to have ended with EOS unless the line says ``"truncated": true``. Reward,
    advantage, group (by default, equal prompts share one) and old_logp (nats, one for each token of
    ``completion_ids``) are optional; null stands for unknown.

    Raises:
        ValueError: there are no rows, a line is malformed (its line or its row is named), a text
            comes without a tokenizer, or only some lines have a field.
    """
    records = read_rows("read_batch", path)
    group, reward, advantage, logp = (
        _field(path, records, name) for name in ("group", "reward", "advantage", "old_logp")
    )
    prompts = [_prompt(path, i, record, tokenizer) for i, record in enumerate(records)]
    completions = [_completion(path, i, record, tokenizer) for i, record in enumerate(records)]
    pad = getattr(tokenizer, "pad_token_id", None)
    try:
        return collate(
            prompts,
            completions,
            pad_id=0 if pad is None else pad,
            group=group,
            reward=reward,
            advantage=advantage,
            old_logp=logp
            and [
                [math.nan] * len(tokens) if row is None else row
                for row, tokens in zip(logp, completions, strict=True)
            ],
        )
    except ValueError as error:
        raise ValueError(f"read_batch: {path}: {str(error).removeprefix('collate: ')}") from error


def read_sampling(path: str | Path, *, strict: bool = True) -> Sampling | None:
    """The sampling settings that the lines carry; None if they carry none.

    A setting that is null, or missing while others stand in the line, is off, and so is vLLM's
    top_k of -1.

    Args:
        path: of JSON lines.
        strict: refuse settings that the scored policy does not have, unless they do nothing, such
            as a repetition_penalty of 1. Otherwise they are left out.

    Raises:
        ValueError: lines that are malformed or have different settings, impossible values, or a
            setting that the scored policy does not have.
    """
    texts = {
        json.dumps(r.get("sampling"), sort_keys=True) for r in read_lines("read_sampling", path)
    }
    try:
        settings = {_sampling(json.loads(text), strict) for text in texts}
    except ValueError as error:
        raise ValueError(f"read_sampling: {path}: {error}") from error
    if len(settings) > 1:
        raise ValueError(
            f"read_sampling: {path}: one sampling setting was expected, but the lines hold "
            f"{sorted(texts)[:5]}. Likely files were joined. Read them one by one."
        )
    return settings.pop()


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt: ids as they are, a text, or chat messages through the template.

    Raises:
        ValueError: the prompt is not token ids, and there is no tokenizer.
    """
    if not isinstance(prompt, str):
        token_ids = [token for token in prompt if isinstance(token, int)]
        if len(token_ids) == len(prompt):
            return token_ids
    if tokenizer is None:
        raise ValueError("a prompt given as text needs a tokenizer. Pass one, or give token ids.")
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    messages: Any = prompt
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(ids["input_ids"])


def _sampling(settings: Any, strict: bool) -> Sampling | None:
    """The settings of one line; None if it has none. See `read_sampling`."""
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"sampling must be an object, not {settings!r}.")
    names = [field.name for field in fields(Sampling)]
    foreign = {
        name: value
        for name, value in settings.items()
        if name not in names and value not in (None, _NEUTRAL.get(name))
    }
    if foreign and strict:
        raise ValueError(
            f"sampling may hold {', '.join(names)}, but it also holds {foreign}, which the scored "
            "policy does not have. Sample without, or remove what does not change probabilities."
        )
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    if given.get("top_k") == -1:
        del given["top_k"]
    return Sampling(**given)


def _record(batch: Batch, i: int, known: set[str], tokenizer: Tokenizer) -> Record:
    """What the line of row i holds, but for the sampling settings."""
    steps = int(batch.response[i].sum())
    row = batch.tokens[i, batch.attention[i]].tolist()
    prompt, completion = row[: len(row) - steps], row[len(row) - steps :]
    record: Record = {}
    if tokenizer is not None:
        record["prompt"] = tokenizer.decode(prompt)
        record["completion"] = tokenizer.decode(completion, skip_special_tokens=True)
    record |= {"prompt_ids": prompt, "completion_ids": completion, "group": int(batch.group[i])}
    for name in ("reward", "advantage"):
        if name in known:
            value = float(getattr(batch, name)[i])
            record[name] = None if math.isnan(value) else value
    if "old_logp" in known:
        logp = batch.old_logp[i, :steps].tolist()
        record["old_logp"] = None if any(map(math.isnan, logp)) else logp
    return record


def _prompt(path: str | Path, row: int, record: Record, tokenizer: Tokenizer) -> list[int]:
    ids, prompt = record.get("prompt_ids"), record.get("prompt")
    if ids is not None:
        return list(ids)
    if prompt is None:
        raise ValueError(
            f"read_batch: {path}, row {row} has neither prompt_ids nor prompt. Write one of them."
        )
    with _named(path, row, "prompt", prompt, tokenizer):
        return encode_prompt(prompt, tokenizer)


def _completion(path: str | Path, row: int, record: Record, tokenizer: Tokenizer) -> list[int]:
    ids, text = record.get("completion_ids"), record.get("completion")
    if ids is not None:
        return list(ids)
    if text is None or tokenizer is None:
        raise ValueError(
            f"read_batch: {path}, row {row} needs completion_ids, or completion and a tokenizer. "
            "Write the ids, or pass the tokenizer."
        )
    with _named(path, row, "completion", text, tokenizer):
        ids = tokenizer(text, add_special_tokens=False).input_ids
    return list(ids) + ([] if record.get("truncated") else [tokenizer.eos_token_id])


@contextmanager
def _named(
    path: str | Path, row: int, name: str, value: Any, tokenizer: Tokenizer
) -> Iterator[None]:
    """Says which row's text a tokenizer or a chat template refused, and why if that is seen."""
    where = f"read_batch: {path}, row {row}"
    try:
        yield
    except Exception as error:  # a tokenizer's own exception has no other type
        if tokenizer is None:
            raise ValueError(f"{where}: {error}") from error
        reason = " ".join(str(error).split())[:200]
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: the tokenizer's chat template does not take these messages: {reason}. "
                f"Write {name}_ids, or a {name} that it takes."
            ) from error
        lacking = next((char for char in value if not _encodes(tokenizer, char)), None)
        cause = f"it lacks the character {lacking!r}" if lacking else "it refuses the text"
        raise ValueError(
            f"{where}: the tokenizer cannot encode the {name} {value[:60]!r}: {cause} ({reason}). "
            f"Write {name}_ids, or a text of the model's own characters."
        ) from error


def _encodes(tokenizer: PreTrainedTokenizerBase, char: str) -> bool:
    try:
        tokenizer(char, add_special_tokens=False)
    except Exception:
        return False
    return True


def _field(path: str | Path, records: Sequence[Record], name: str) -> list[Any] | None:
    """The values of a field, which stands in every line; None if it stands in none."""
    rows = [row for row, record in enumerate(records) if name in record]
    if not rows:
        return None
    if len(rows) < len(records):
        lacking = min(set(range(len(records))) - set(rows))
        raise ValueError(
            f"read_batch: {path}: {name} must stand in every line or in none, but row {lacking} "
            "lacks it. Write null where it is unknown."
        )
    return [record[name] for record in records]
