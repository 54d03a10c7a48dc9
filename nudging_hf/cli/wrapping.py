"""Breaks lines between words while they are written to a terminal. It knows columns, never who wrote what."""

from __future__ import annotations

import re
import shutil
import unicodedata
from typing import TextIO

# A sequence that colours text, white space, or the rest of a word.
_PARTS = re.compile(r"\033\[[0-9;]*m|\s|[^\s\033]+|\033")


class WordWrapper:
    """A text stream to a terminal, which begins a new line where a word would pass the edge.

    A word is written when the white space after it comes, because only then it is known whether it fits. White space
    at a break is left out. A word that is longer than a line is left to the terminal.
    """

    def __init__(self, out: TextIO):
        self._out = out
        self._column = 0
        self._space = self._word = ""

    def write(self, text: str) -> None:
        """Takes text, which may have colours."""
        for part in _PARTS.findall(text):
            if not part.isspace():
                self._word += part
                continue
            self._write_word()
            if part == "\n":
                self._out.write(self._space + part)
                self._column, self._space = 0, ""
            else:
                self._space += part

    def flush(self) -> None:
        """Flushes the terminal. An unfinished word stays here."""
        self._out.flush()

    def _write_word(self) -> None:
        width = _width(self._word)
        if width and self._column and self._column + _width(self._space) + width > shutil.get_terminal_size().columns:
            self._out.write("\n")
            self._column = 0
        elif self._word:
            self._out.write(self._space)
            self._column += _width(self._space)
        if self._word:
            self._out.write(self._word)
            self._column += width
            self._space = self._word = ""


def _width(text: str) -> int:
    """How many columns a text takes: two for a wide character, none for a colour or a combining character."""
    plain = re.sub(r"\033\[[0-9;]*m", "", text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in plain)
    return len(plain) + wide - sum(bool(unicodedata.combining(character)) for character in plain)
