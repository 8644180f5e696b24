"""Tables that fit the terminal: names break where their parts end, numbers and the words of headings nowhere.

A table that fits is framed. One that does not loses its frame first; then its headings take several lines, and what is
left of the width goes to the columns of long text, which break after one of the characters in `_BREAKS`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

_BREAKS = " ,./:=+-"
_FRAME, _GAP = 3, 2  # characters beside a column: framed, and without a frame
_SHORT = 18  # characters; a column of longer cells may be broken
_NARROWEST = 12  # of a column that is broken


def fitted(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table whose first column and those of long text are left-aligned, the others right-aligned. width: characters
    of a line."""
    table = Table(title=title or None, title_justify="left", title_style="bold")
    cells = [max([_widest(row[i]) for row in rows], default=0) for i in range(len(columns))]
    natural = sum(max(cell_len(name), cell) for name, cell in zip(columns, cells, strict=True))
    if natural + _FRAME * len(columns) + 1 > width:
        table.box, table.show_edge, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, False, (0, _GAP - 1, 0, 0)
        widths = widths_within(columns, cells, width - _GAP * (len(columns) - 1) - 1)
        columns = [broken(name, own) for name, own in zip(columns, widths, strict=True)]
        rows = [[broken(cell, own) for cell, own in zip(row, widths, strict=True)] for row in rows]
    for index, column in enumerate(columns):
        text = index == 0 or cells[index] > _SHORT
        table.add_column(Text(column), justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def widths_within(columns: Sequence[str], cells: Sequence[int], width: int) -> list[int]:
    """Characters of each column, `width` together if that can be. cells: the longest of each column."""
    words = [max(_widest(piece) for piece in _pieces(name)) for name in columns]
    long = [i for i, cell in enumerate(cells) if cell > _SHORT or i == 0]
    found = [max(word, cell) for word, cell in zip(words, cells, strict=True)]
    left = width - sum(own for i, own in enumerate(found) if i not in long)
    for place, i in enumerate(sorted(long, key=lambda i: found[i])):  # the narrowest takes what it needs
        share = max(_NARROWEST, left // (len(long) - place))
        found[i] = max(words[i], min(found[i], share))
        left -= found[i]
    for i, name in enumerate(columns):  # what is left over makes headings whole again
        more = min(max(0, cell_len(name) - found[i]), max(0, left))
        if cell_len(name) <= found[i] + left:
            found[i] += more
            left -= more
    return found


def broken(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, which end after one of `_BREAKS` where there is one."""
    lines = []
    for line in text.split("\n"):
        now = ""
        for piece in _pieces(line):
            if now and cell_len((now + piece).rstrip()) > width:
                lines.append(now.rstrip())
                now = ""
            while cell_len(piece.rstrip()) > width:
                lines.append(piece[:width])
                piece = piece[width:]
            now += piece
        lines.append(now.rstrip())
    return "\n".join(lines)


def _pieces(text: str) -> list[str]:
    """The text cut after each of `_BREAKS`; numbers stay whole."""
    return re.findall(rf"(?:\d+(?:[.,]\d+)*|[^{re.escape(_BREAKS)}])*[{re.escape(_BREAKS)}]?", text)[:-1] or [text]


def _widest(text: str) -> int:
    return max(cell_len(line) for line in text.split("\n"))
