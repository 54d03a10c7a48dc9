"""Writes nudged text to a terminal. It knows pieces of text and their authors, never tokens or models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from .provenance import Piece

OPENING, CLOSING = "⟦", "⟧"
_COLOUR, _PLAIN = "\033[1;32m", "\033[0m"
# A control character in an answer could move the cursor or worse, so its picture is written in its place.
_CONTROL_PICTURES: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    # These set the direction of all text after them, so that it could show other authors than it has.
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}
# Brackets of an answer must not look like the marks.
_OTHER_BRACKETS: dict[int, int | str] = {ord(OPENING): "[", ord(CLOSING): "]"}
_ON_ONE_LINE = {**_CONTROL_PICTURES, **_OTHER_BRACKETS, ord("\t"): 0x2409, ord("\n"): 0x23CE}


class TerminalWriter:
    """Writes an answer so that the nudging model's words stand out, but not the white space around them.

    With colours or marks, control characters other than tabs and line breaks are written as pictures (␛), and those
    that set the direction of text as U+FFFD. With marks, an answer's own ⟦ and ⟧ are written as [ and ]. With neither,
    as for a pipe, the answer is written as it is.

    As a context manager it resets the terminal and begins a new line at the end, also after an interrupt.
    """

    def __init__(self, out: TextIO, coloured: bool, marked: bool):
        self._out = out
        self._shown: dict[int, int | str] = {}
        if coloured or marked:
            self._shown |= _CONTROL_PICTURES
        if marked:
            self._shown |= _OTHER_BRACKETS
        self._before = _COLOUR * coloured + OPENING * marked
        self._after = CLOSING * marked + _PLAIN * coloured
        self._nudged = False  # Whether the nudging model wrote the last text.
        self._space = ""  # White space that is written once the author of the text after it is known.

    @classmethod
    def of_stdout(cls, color: str = "auto") -> TerminalWriter:
        """A writer to standard output, with colours if it has them (see `is_coloured`), else with marks."""
        coloured = is_coloured(color)
        return cls(sys.stdout, coloured, marked=not coloured)

    def write(self, text: str, nudged: bool) -> None:
        """Writes a piece of an answer. `nudged` says whether the nudging model wrote it."""
        text = text.translate(self._shown)
        body = text.strip()
        if not body:
            self._space += text
            return
        start = text.index(body)
        self._space += text[:start]
        if nudged != self._nudged:
            self._out.write(self._space + self._before if nudged else self._after + self._space)
            self._nudged = nudged
        else:
            self._out.write(self._space)
        self._out.write(body)
        self._space = text[start + len(body) :]
        self._out.flush()

    def end(self) -> None:
        """Resets the terminal and begins a new line, ready for another answer."""
        self._out.write((self._after if self._nudged else "") + self._space.rstrip("\n") + "\n")
        self._out.flush()
        self._nudged, self._space = False, ""

    def __enter__(self) -> TerminalWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def nudges_told(pieces: Iterable[Piece]) -> Iterator[str]:
    """A heading, and a line for each nudge of an answer: what the base itself would have written at its start."""
    from .provenance import spans  # It imports torch, which takes seconds, and help needs this module.

    told = [(span.text, span.instead) for span in spans(pieces) if span.instead is not None]
    if not told:
        yield "There is no nudge to tell of, or the answer was broken off."
        return
    yield "At each nudge, what the base itself would have written, its probability, and the rank of the nudge there:"
    for nudge, instead in told:
        text, own = (each.strip(" ").translate(_ON_ONE_LINE) for each in (nudge, instead.text))
        said = f"“{own}”" if instead.text else "no more text"
        yield f"{OPENING}{text}{CLOSING} base: {said} ({instead.probability:.3f}); rank {instead.rank}"


def is_coloured(choice: str = "auto") -> bool:
    """Whether standard output gets colours: "always", "never", or "auto", which depends on the terminal."""
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always"
