"""Errors of `load_checkpoint`: what was expected, what arrived, the likely cause and the cure."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# The way out where an optimizer's state cannot be used.
FRESH = "Or start AdamW from zero moments: optimizer='fresh', lr=."


def refusal(claim: str, cause: str, cure: str, error: type[Exception] = ValueError) -> Exception:
    """An error to raise.

    Args:
        claim: what was expected and what arrived.
        cause: the likely one, as a clause.
        cure: what to do, as a sentence.
        error: the error's type.
    """
    return error(f"load_checkpoint: {claim}. Likely {cause}. {cure}")


@contextmanager
def explained(claim: str, cause: str, cure: str) -> Iterator[None]:
    """Turns whatever a library raises in this scope into a `refusal`."""
    try:
        yield
    except Exception as error:
        raise refusal(f"{claim}, found {brief(error)}", cause, cure) from error


def brief(error: Exception) -> str:
    """An error's first line, with its type; two lines where the first announces a list."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:  # torch's message goes on to advise weights_only=False
        return f"a reference to {code[1]}, which was not followed"
    first, *rest = (str(error).strip() or "no message").splitlines()
    if first.endswith(":") and rest:  # torch names the tensors in the lines that follow
        first = f"{first} {rest[0].strip()}"
    return f"{type(error).__name__}: {first[:300]}"


def listed(names: Iterable[object]) -> str:
    """At most five names, sorted.

    >>> listed("fedcba"), listed([])
    ('a, b, c, d, e, ...', 'none')
    """
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:5]) + (", ..." if len(ordered) > 5 else "") or "none"
