"""Words of the command line: keywords of Python become flags in what it says."""

import re
from collections.abc import Collection

# Keywords that messages advise, and the options that do the same.
ALIASES = {"behaviour": "off_policy"}

_VALUE = r"(?:'(?P<quoted>[^']*)'|(?:torch\.)?(?P<plain>[\w+-]+(?:\.\w+)*))?"


def in_flags(text: str, options: Collection[str]) -> str:
    """A message with flags in the place of keywords.

    ``name=``, ``name='value'`` and ``name=True`` are rewritten for every option. A name by itself
    is rewritten where it cannot be an ordinary word: before "must", or if it has an underscore.

    >>> in_flags("Pass optimizer='fresh', lr=, or off_policy=True.", ["optimizer", "lr"])
    'Pass --optimizer fresh, --lr, or off_policy=True.'
    >>> in_flags("probe: tol must be finite; max_length is not.", ["tol", "max_length"])
    'probe: --tol must be finite; --max_length is not.'
    """
    names = "|".join(map(re.escape, [*options, *ALIASES]))
    long = "|".join(re.escape(name) for name in options if "_" in name) or "(?!)"
    text = re.sub(rf"(?<![\w./-])(?P<name>{names})={_VALUE}", _flag, text)
    text = re.sub(rf"(?<=: )(?=(?:{names}) must\b)", "--", text)
    return re.sub(rf"(?<![\w./'-])(?=(?:{long})(?![\w./=']))", "--", text)


def doubts_in_flags(report: str, options: Collection[str]) -> str:
    """A printed report whose doubts, the lines behind "! ", advise flags."""
    lines = report.split("\n")
    return "\n".join(in_flags(line, options) if line[:2] == "! " else line for line in lines)


def _flag(match: re.Match[str]) -> str:
    name = ALIASES.get(match["name"], match["name"])
    value = match["quoted"] or match["plain"] or ""
    if match["name"] in ALIASES or value == "True":
        value = ""
    return f"--{name} {value}".rstrip()


def negatives_joined(words: list[str]) -> list[str]:
    """A command's words, with a negative value joined to its flag: argparse would take it for one.

    >>> negatives_joined(["--etas", "-1x,0,1x", "--quiet"])
    ['--etas=-1x,0,1x', '--quiet']
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("--") and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
