"""Turns an answer's tokens into text that may be sent. It knows tokens, authors and stop strings, never requests.

A stop string is not part of an answer, so text that may be the beginning of one is held back until it is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from ..core.vocabulary import Vocabulary
from ..provenance import Piece, PieceReader, add_stretch
from .engine import Chunk, Logprobs


class ToldToken(NamedTuple):
    """A token with its log-probabilities.

    Args:
        token: its id.
        offset: where its text begins in the answer, in characters.
        logprobs: what the base thought of it.
    """

    token: int
    offset: int
    logprobs: Logprobs


@dataclass(frozen=True)
class Delta:
    """What is added to the text of an answer.

    Args:
        text: whole characters; perhaps none.
        nudged: the stretches of it that the nudging model wrote, as `(start, end)` in characters of the answer.
        tokens: the tokens of this text, if log-probabilities were asked for.
        finish_reason: why the answer has ended, in its last delta.
    """

    text: str
    nudged: tuple[tuple[int, int], ...] = ()
    tokens: tuple[ToldToken, ...] = ()
    finish_reason: str | None = None


class AnswerText:
    """The text of one answer.

    Args:
        vocabulary: the base's.
        stop: the strings that end the answer. The first one in the text is left out, with all that follows.

    Attributes:
        text: what has been given out.
        num_tokens, num_nudged: how many tokens have been read, and how many of them the nudging model wrote.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Collection[str] = ()):
        self._reader = PieceReader(vocabulary)
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._held = ""  # It follows `text`.
        self._authors: deque[tuple[int, int]] = deque()  # Nudged stretches that end after `text`.
        self._tokens: deque[ToldToken] = deque()
        self._is_cut = False
        self.text = ""
        self.num_tokens = self.num_nudged = 0

    @property
    def nudge_rate(self) -> float:
        """The share of the answer's tokens that the nudging model wrote."""
        return self.num_nudged / max(1, self.num_tokens)

    def read(self, chunk: Chunk) -> Delta:
        """Reads what has been added to the answer, and returns the text that is certain now."""
        self.num_tokens += len(chunk.ids)
        self.num_nudged += sum(chunk.nudged)
        for i, (token, nudged) in enumerate(zip(chunk.ids, chunk.nudged, strict=True)):
            if self._is_cut:
                break
            if chunk.logprobs is not None:
                self._tokens.append(ToldToken(token, len(self.text) + len(self._held), chunk.logprobs[i]))
            self._hold(self._reader.read(token, nudged))
        if chunk.finish_reason is not None and not self._is_cut:
            self._hold(self._reader.finish())
        return self._release(chunk.finish_reason)

    def _hold(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            end = len(self.text) + len(self._held) + len(piece.text)
            if piece.nudged:
                self._authors.append((end - len(piece.text), end))
            self._held += piece.text
        if pieces and (cut := self._first_stop()) is not None:
            self._held, self._is_cut = self._held[:cut], True

    def _first_stop(self) -> int | None:
        """Where the stop string begins that is the first to be complete; the longest of those that end together."""
        found = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _release(self, finish_reason: str | None) -> Delta:
        is_last = finish_reason is not None
        size = len(self._held) if is_last or self._is_cut else len(self._held) - self._doubtful()
        end = len(self.text) + size
        new, self._held = self._held[:size], self._held[size:]
        self.text += new
        nudged: list[tuple[int, int]] = []
        while self._authors and self._authors[0][0] < end:
            first, last = self._authors[0]
            if last > end:  # The rest of the stretch is held back.
                self._authors[0] = (end, last)
            else:
                self._authors.popleft()
            add_stretch(nudged, first, min(last, end))
            if last > end:
                break
        tokens: list[ToldToken] = []
        while self._tokens and (self._tokens[0].offset < end or (is_last and not self._is_cut)):
            tokens.append(self._tokens.popleft())
        return Delta(new, tuple(nudged), tuple(tokens), finish_reason)

    def _doubtful(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        for size in range(min(len(self._held), self._longest_stop - 1), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
