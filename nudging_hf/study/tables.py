"""Figures as text. It knows rows of cells, never what they measure."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown that is aligned for the eye too: the first column on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def percent(share: float | None, digits: int = 1) -> str:
    """A share as text, such as "12.5%"; "-" if it is the share of nothing."""
    return "-" if share is None else f"{share:.{digits}%}"


def share_of(part: int, whole: int) -> float | None:
    """The share that a part is of the whole; `None` if there is no whole."""
    return part / whole if whole else None
