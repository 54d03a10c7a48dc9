"""Where words begin in a text, by the rule of `word_boundary`, and who wrote them. It knows bytes, never tokens.

Text is kept as UTF-8 bytes, because byte-level tokens may end inside a character. U+0020 is the byte 0x20, which is
part of no other character. Both rules are pure functions of the text. More text changes the last word alone: all words
before it stay what they are, but for a run of spaces that goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

SPACE = b" "
# `regex` before 2026.11.19 joins half a flag to the letter after it, and splits "l'arte" at its apostrophe. So signs
# of as many bytes stand in for them: any other sign, and others that join letters.
_STAND_INS = dict.fromkeys(range(0x1F1E6, 0x1F200), "\U00010100") | {ord("'"): ".", ord("\u2019"): "\u2024"}
_WHITE_SPACE = re.compile(rb"\s")
_MAX_WORD_BYTES = 256  # A longer word counts as several while it grows, so that the cost of a token is bounded.


def word_starts(text: bytes, word_boundary: str = "space") -> list[int]:
    """Where each word but the first starts in a lookahead, in bytes.

    Args:
        text: UTF-8, which may end inside a character or be invalid.
        word_boundary: the rule.
            With "space", a word starts at the space before it. Leading spaces belong to the first word. In a run of
            spaces the last belongs to the word after it. A trailing space starts an empty word.
            With "unicode", each of these words is split further. A word starts there as well at a boundary of UAX #29
            whose segment has a letter or a digit (so has any ideograph, kana or syllable), if the word that it ends
            has such a segment too, and if it splits no grapheme cluster. So signs belong to the word before them.
    """
    lead = len(text) - len(text.lstrip(SPACE))
    starts = [i for i in range(lead, len(text)) if text[i : i + 1] == SPACE and text[i + 1 : i + 2] != SPACE]
    if word_boundary == "space":
        return starts
    return [
        begin + start
        for begin, end in pairwise([0, *starts, len(text)])
        for start in ([0] if begin else []) + _starts_within(text[begin:end])
    ]


def _starts_within(word: bytes) -> list[int]:
    """Where further words start in a word of the rule "space", by UAX #29."""
    segments, clusters, lettered = _patterns()
    characters = word.decode("utf-8", "surrogateescape")  # A byte that is no whole character is a sign of its own.
    characters = characters.translate(_STAND_INS)
    cluster_starts = {match.start() for match in clusters(characters)}
    starts, is_begun, place, size = [], False, 0, 0
    for segment in segments(characters):
        if lettered(segment):
            if is_begun and place in cluster_starts:
                starts.append(size)
            is_begun = True
        place, size = place + len(segment), size + len(segment.encode("utf-8", "surrogateescape"))
    return starts


@cache
def _patterns() -> tuple[Callable[..., Any], ...]:
    """Splits a text at the boundaries of UAX #29, finds its grapheme clusters, and finds a letter or digit."""
    import regex  # It comes with transformers.

    # A halfwidth voicing mark is a letter for Unicode, but belongs to whatever stands before it.
    letter = r"(?V1)[[\p{L}\p{N}]--\p{Word_Break=Extend}]"
    return regex.compile(r"(?V1w)\b").split, regex.compile(r"\X").finditer, regex.compile(letter).search


def nudged_words(text: bytes, nudged: bytes, ends: Sequence[int]) -> list[bool]:
    """Tells for each word up to the last of `ends` whether the nudging model wrote any of it.

    White space around it is not part of a word, and words of white space alone are left out.

    Args:
        text: some text.
        nudged: for each of its bytes, 1 if the nudging model wrote it, else 0.
        ends: where its words end, in bytes.
    """
    found = []
    for start, end in pairwise([0, *ends]):
        word = text[start:end]
        if ink := word.strip():
            lead = start + word.index(ink)
            found.append(any(nudged[lead : lead + len(ink)]))
    return found


class AuthorsOfWords:
    """Tells, as an answer grows, of each word that has ended whether the nudging model wrote any of it.

    With "space", white space ends a word here. With "unicode", the start of the next word does, and a word of more
    than 256 bytes ends anyway.
    """

    def __init__(self, word_boundary: str):
        self._word_boundary = word_boundary
        self._text = self._nudged = b""  # From the start of the last word on.

    def read(self, text: bytes, nudged: bool) -> list[bool]:
        """The words that a piece of the answer ends; it is in UTF-8, and by one author."""
        self._text += text
        self._nudged += bytes([nudged]) * len(text)
        if self._word_boundary == "space":
            ends = [match.end() for match in _WHITE_SPACE.finditer(self._text)]
        else:
            ends = word_starts(self._text, self._word_boundary)
            if not ends and len(self._text) > _MAX_WORD_BYTES:
                ends = [len(self._text)]
        found = nudged_words(self._text, self._nudged, ends)
        if ends:
            self._text, self._nudged = self._text[ends[-1] :], self._nudged[ends[-1] :]
        elif self._word_boundary == "space":
            self._text, self._nudged = self._text[:1], bytes([any(self._nudged)]) * len(self._text[:1])
        return found
