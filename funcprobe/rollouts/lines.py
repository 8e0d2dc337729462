"""JSON lines, one object each, whose fields are checked; an error names the file and the row."""

import json
import math
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # what a line holds

_INT64 = 2**63


def read_lines(reader: str, path: str | Path) -> list[Record]:
    """The lines' objects, their fields as they stand.

    Args:
        reader: the function that errors name.
        path: a text file in UTF-8; empty lines do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not text, holds no rows, or a line is not an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{reader}: {path} is not a text file of JSON lines: {error}. Likely another file was "
            "passed. Pass a batch's lines, in UTF-8."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{reader}: a file of JSON lines was expected at {path}, but there is none. Likely the "
            "path is misspelt, or it is relative to another folder. Pass its full path."
        ) from error
    except OSError as error:
        raise OSError(
            f"{reader}: a file of JSON lines was expected at {path}, but it cannot be read: "
            f"{error.strerror}. Likely two paths were swapped, or it is another user's."
        ) from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(
            f"{reader}: {path} holds no rows, but JSON objects were expected, one a line. Likely "
            "its sampling was interrupted. Write it again."
        )
    return [_parse(f"{reader}: {path}, line {n}", line) for n, line in lines]


def read_rows(reader: str, path: str | Path) -> list[Record]:
    """`read_lines`, with the fields of a response checked: what is unknown is nan or None.

    Raises:
        ValueError: a field holds what it cannot mean.
    """
    records = read_lines(reader, path)
    for row, record in enumerate(records):
        where = f"{reader}: {path}, row {row}"
        for name, check in _FIELDS.items():
            if name in record:
                record[name] = check(f"{where}: {name}", record[name])
    return records


def _parse(where: str, line: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON: {error}. Likely the line was cut or edited. Write one object a "
            "line."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: an object was expected, but a {type(record).__name__} arrived. Likely the "
            "file holds one list. Write one object a line."
        )
    return record


def _ids(where: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError(f"{where} must be a list of integers, not {_shown(value)}.")
    return [_integer(where, token) for token in value]


def _integer(where: str, value: Any) -> int:
    if type(value) is not int or not -_INT64 <= value < _INT64:
        raise ValueError(f"{where} must be an integer of 64 bits, not {_shown(value)}.")
    return value


def _number(where: str, value: Any) -> float:
    """A number, nan for null; true and false are 1 and 0."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or not abs(value) < 1e300 and value == value:
        raise ValueError(
            f"{where} must be a finite number, or null where it is unknown, not {_shown(value)}."
        )
    return float(value)


def _numbers(where: str, value: Any) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of numbers, not {_shown(value)}.")
    return [_number(where, item) for item in value]


def _text(where: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} must be a text, not {_shown(value)}.")
    return value


def _prompt(where: str, value: Any) -> Any:
    messages = isinstance(value, list) and (
        all(isinstance(item, dict) for item in value) or all(type(item) is int for item in value)
    )
    if value is not None and not isinstance(value, str) and not (messages and value):
        raise ValueError(
            f"{where} must be a text, a list of chat messages or of token ids, not {_shown(value)}."
        )
    return value


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "an integer of more than 30 digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


_FIELDS = {
    "prompt_ids": _ids,
    "completion_ids": _ids,
    "prompt": _prompt,
    "completion": _text,
    "group": _integer,
    "reward": _number,
    "advantage": _number,
    "old_logp": _numbers,
}
