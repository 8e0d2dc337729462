"""Batches as JSON lines, one response a line."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..language.batch import Batch, collate, lengths
from ..language.score import Sampling
from ..runtime.files import write_atomically


def write_batch(path, batch: Batch, *, tokenizer=None, sampling: Sampling | None = None) -> None:
    """Writes a batch as JSON lines, whole or not at all.

    Each line has prompt_ids, completion_ids (a sampled EOS included) and group, whatever is known
    of reward, advantage and old_logp (nats, one a token), the texts if a tokenizer is given, and
    the sampling settings if they are.
    """
    known = {
        name: not getattr(batch, name).isnan().all() for name in ("reward", "advantage", "old_logp")
    }
    lines = []
    for i, steps in enumerate(lengths(batch).tolist()):
        row = batch.tokens[i, batch.attention[i]].tolist()
        start = len(row) - steps
        record = {"prompt_ids": row[:start], "completion_ids": row[start:]}
        if tokenizer is not None:
            record = {
                "prompt": tokenizer.decode(row[:start]),
                "completion": tokenizer.decode(row[start:], skip_special_tokens=True),
            } | record
        record["group"] = int(batch.group[i])
        for name in ("reward", "advantage"):
            if known[name]:
                value = float(getattr(batch, name)[i])
                record[name] = None if math.isnan(value) else value
        if known["old_logp"]:
            logp = batch.old_logp[i, :steps].tolist()
            record["old_logp"] = None if any(map(math.isnan, logp)) else logp
        lines.append(json.dumps(record | ({"sampling": asdict(sampling)} if sampling else {})))
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_batch(path, tokenizer=None) -> Batch:
    """Reads a batch from JSON lines.

    A line needs a prompt (``prompt_ids``, or ``prompt``: a text, or a list of chat messages) and a
    completion (``completion_ids``, or ``completion``: a text). Texts need the tokenizer; a text
    completion is taken to have ended with EOS unless the line says ``"truncated": true``. Optional
    are reward, advantage, group (default: equal prompts share one) and old_logp (nats, one a
    token, of ``completion_ids``); null stands for unknown.

    Raises:
        ValueError: no rows, a malformed line (its number is named), a field only some lines have.
    """
    records = _records(path)
    prompts = [_prompt(path, i, record, tokenizer) for i, record in enumerate(records)]
    completions = [_completion(path, i, record, tokenizer) for i, record in enumerate(records)]
    pad = getattr(tokenizer, "pad_token_id", None)
    try:
        return collate(
            prompts,
            completions,
            pad_id=0 if pad is None else pad,
            **{
                name: _field(path, records, name)
                for name in ("group", "reward", "advantage", "old_logp")
            },
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"read_batch: {path}: {error}") from error


def read_sampling(path) -> Sampling | None:
    """The sampling settings that the lines carry; None if they carry none.

    Raises:
        ValueError: lines with different settings.
    """
    found = {json.dumps(record.get("sampling"), sort_keys=True) for record in _records(path)}
    if len(found) > 1:
        raise ValueError(
            f"read_sampling: {path}: one sampling setting was expected, found {found}."
        )
    settings = json.loads(found.pop())
    try:
        return None if settings is None else Sampling(**settings)
    except TypeError as error:
        raise ValueError(
            f"read_sampling: {path}: sampling may hold temperature and top_p, found {settings}."
        ) from error


def encode_prompt(prompt, tokenizer) -> list[int]:
    """Token ids of a prompt: ids as they are, a text, or chat messages through the template."""
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        return list(prompt)
    if tokenizer is None:
        raise ValueError("a prompt given as text needs a tokenizer.")
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return list(ids["input_ids"])


def _records(path) -> list[dict]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"read_batch: {path} is not a text file of JSON lines: {error}") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"read_batch: {path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"read_batch: {path}, line {number}: an object was expected.")
        records.append(record)
    if not records:
        raise ValueError(f"read_batch: {path} holds no rows.")
    return records


def _prompt(path, row: int, record: dict, tokenizer) -> list[int]:
    prompt = record.get("prompt_ids")
    prompt = record.get("prompt") if prompt is None else prompt
    if prompt is None:
        raise ValueError(f"read_batch: {path}, row {row} has neither prompt_ids nor prompt.")
    if prompt is record.get("prompt_ids"):
        return _ids(path, row, "prompt_ids", prompt)
    try:
        return encode_prompt(prompt, tokenizer)
    except (ValueError, TypeError) as error:
        raise ValueError(f"read_batch: {path}, row {row}: {error}") from error


def _completion(path, row: int, record: dict, tokenizer) -> list[int]:
    ids = record.get("completion_ids")
    if ids is not None:
        return _ids(path, row, "completion_ids", ids)
    if record.get("completion") is None or tokenizer is None:
        raise ValueError(
            f"read_batch: {path}, row {row} needs completion_ids, or completion and a tokenizer."
        )
    ids = tokenizer(record["completion"], add_special_tokens=False).input_ids
    return list(ids) + ([] if record.get("truncated") else [tokenizer.eos_token_id])


def _ids(path, row: int, name: str, ids) -> list[int]:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f"read_batch: {path}, row {row}: {name} must be a list of integers.")
    return ids


def _field(path, records: Sequence[dict], name: str) -> list | None:
    having = [name in record for record in records]
    if any(having) and not all(having):
        raise ValueError(
            f"read_batch: {path}: {name} must stand in every line or in none, "
            f"row {having.index(False)} lacks it."
        )
    if not all(having):
        return None
    if name == "group":
        wrong = [i for i, record in enumerate(records) if type(record["group"]) is not int]
        if wrong:
            raise ValueError(f"read_batch: {path}, row {wrong[0]}: group must be an integer.")
    unknown = [math.nan] * max(len(record.get("completion_ids") or []) for record in records)
    unknown = unknown if name == "old_logp" else math.nan
    return [unknown if record[name] is None else record[name] for record in records]
