"""Who wrote what of an answer, in text. It knows tokens and their authors, never models or terminals."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from .core.vocabulary import Vocabulary


class Piece(NamedTuple):
    """A piece of an answer's text.

    Args:
        text: some characters; never empty.
        nudged: whether the nudging model wrote them.
        top1: the base's top-1 probability where the piece's (last) token stands, if it is known.
    """

    text: str
    nudged: bool
    top1: float | None = None


@dataclass(frozen=True)
class Span:
    """A stretch of an answer by one author.

    Args:
        text: its characters.
        nudged: whether the nudging model wrote it.
        start, end: where it stands in the answer's text, in characters.
    """

    text: str
    nudged: bool
    start: int
    end: int


class PieceReader:
    """Makes text of the tokens of one answer, as they come.

    The pieces, joined, are the answer's text without control tokens. A character that is split over tokens comes whole
    and belongs to the author of its last token.

    Args:
        tokenizer: the base's.
    """

    def __init__(self, tokenizer: Any):
        self._vocabulary = Vocabulary(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last: tuple[bool, float | None] = (False, None)  # Whose the token is that was read last, and its top-1.

    def read(self, token: int, nudged: bool, top1: float | None = None) -> list[Piece]:
        """The text that has become whole with `token`: one piece, or none."""
        new = self._vocabulary.bytes_of(token)
        if new:  # An end mark adds nothing, and is nobody's.
            self._last = (nudged, top1)
        return self._piece(new)

    def finish(self) -> list[Piece]:
        """The rest of an answer that ends inside a character: one piece, or none. Makes ready for another answer."""
        rest = self._piece(b"", final=True)
        self._decoder.reset()
        return rest

    def _piece(self, new: bytes, final: bool = False) -> list[Piece]:
        text = self._decoder.decode(new, final)
        return [Piece(text, *self._last)] if text else []


def pieces_of(output: Any, tokenizer: Any) -> list[list[Piece]]:
    """The pieces of each answer of a nudged `generate`.

    Args:
        output ([`NudgingOutput`]): what `generate` returned with `return_dict_in_generate=True`.
        tokenizer: the base's.

    Returns:
        one list of pieces a row, the end mark and padding left out.
    """
    reader = PieceReader(tokenizer)
    answers = []
    new = output.sequences[:, output.sequences.shape[1] - output.nudged_mask.shape[1] :]
    rows = zip(new.tolist(), output.nudged_mask.tolist(), output.base_top1_probs.tolist(), strict=True)
    for ids, mask, top1 in rows:
        pieces: list[Piece] = []
        for token, nudged, probability in zip(ids, mask, top1, strict=True):
            if probability == probability:  # NaN stands on padding.
                pieces += reader.read(token, nudged, probability)
        answers.append(pieces + reader.finish())
    return answers


def spans(pieces: Iterable[Piece]) -> list[Span]:
    """Neighbouring pieces of one author, joined."""
    found: list[Span] = []
    end = 0
    for nudged, group in groupby(pieces, key=lambda piece: piece.nudged):
        text = "".join(piece.text for piece in group)
        start, end = end, end + len(text)
        found.append(Span(text, nudged, start, end))
    return found


def spans_of(output: Any, tokenizer: Any) -> list[list[Span]]:
    """Who wrote what of each answer of a nudged `generate`.

    Args:
        output ([`NudgingOutput`]): what `generate` returned with `return_dict_in_generate=True`.
        tokenizer: the base's.

    Returns:
        one list of [`Span`]s a row, which joined are the answer's text without control tokens.
    """
    return [spans(pieces) for pieces in pieces_of(output, tokenizer)]


def count_nudged_words(pieces: Iterable[Piece]) -> tuple[int, int]:
    """How many words of an answer the nudging model wrote, wholly or in part.

    Args:
        pieces: the answer, cut anywhere.

    Returns:
        The words of which it wrote at least one character, and all words: what stands between white space.
    """
    characters = ((character, piece.nudged) for piece in pieces for character in piece.text)
    words = [
        any(nudged for _, nudged in word)
        for is_space, word in groupby(characters, key=lambda character: character[0].isspace())
        if not is_space
    ]
    return sum(words), len(words)
