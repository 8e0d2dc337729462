"""Tables of text for a terminal and of HTML for a notebook."""

from collections.abc import Sequence
from html import escape
from typing import TypeVar

ROWS = 16  # a notebook's display leaves out the middle of a table or text with more rows

Row = TypeVar("Row")


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns are aligned to the right.

    >>> text_table(["eta", "dH"], [["0.1", "-2.0"], ["10", "3"]])
    ['eta    dH', '0.1  -2.0', ' 10     3']
    """
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (columns, *rows)
    ]


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A table in HTML, its cells escaped, with a note below it.

    >>> html_table(["a"], [["<1"]])
    '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;1</td></tr></tbody></table>'
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    table = f"<table><thead>{line('th', columns)}</thead><tbody>{body}</tbody></table>"
    return table + (f"<p>{escape(note)}</p>" if note else "")


def shortened(rows: Sequence[Row], gap: Row, most: int = ROWS) -> list[Row]:
    """The rows, or of more than `most` the first and the last ones with `gap` between them.

    >>> shortened(["1", "2", "3", "4", "5", "6"], "...", most=4)
    ['1', '2', '...', '6']
    """
    if len(rows) <= most:
        return list(rows)
    first, last = most // 2, (most - 1) // 2
    return [*rows[:first], gap, *rows[-last:]]


def formatted(columns: Sequence[Sequence[float]], formats: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows of columns of numbers, each number as its column's format has it.

    >>> formatted([[0.1, 10.0], [-2.0, 3.0]], [".3g", "+.1e"])
    [('0.1', '-2.0e+00'), ('10', '+3.0e+00')]
    """
    return [
        tuple(format(x, spec) for x, spec in zip(row, formats, strict=True))
        for row in zip(*columns, strict=True)
    ]
