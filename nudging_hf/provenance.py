"""Which model wrote which part of an answer's text. It knows tokens and their authors, never models or terminals."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from .core.vocabulary import Vocabulary, to_text
from .core.words import nudged_words, word_starts


@dataclass(frozen=True)
class Alternative:
    """What the base itself would have written where the nudging model wrote.

    Args:
        place: how many tokens of the answer stand before.
        text: of the base's token; "" for an EOS, and for any other token without text.
        probability: of the base's token.
        rank: the rank, in the base's distribution, of the token that stands there; 1 is the most probable.
        continuation: how the base alone would go on from there, if that was asked for (see [`continuations`]).
    """

    place: int
    text: str
    probability: float
    rank: int
    continuation: str | None = None


class Piece(NamedTuple):
    """Some characters of an answer, at least one, and whether the nudging model wrote them.

    `top1` is the base's top-1 probability at the (last) token of the piece, if it is known. `instead` is what the base
    would have written at its (first nudged) token, if the nudging model wrote it and that is known.
    """

    text: str
    nudged: bool
    top1: float | None = None
    instead: Alternative | None = None


@dataclass(frozen=True)
class Span:
    """A stretch of an answer by one author, the nudging model or the base, from `start` to `end` in characters.

    `instead` is what the base would have written at its start, if the nudging model wrote it and that is known.
    """

    text: str
    nudged: bool
    start: int
    end: int
    instead: Alternative | None = None


class PieceReader:
    """Turns the tokens of one answer into text, one by one.

    The pieces, joined, are the answer's text without control tokens. A character that is split over several tokens
    comes whole and belongs to the author of its last token.

    Args:
        tokenizer: the base's, or its `Vocabulary`.
    """

    def __init__(self, tokenizer: Any):
        self._vocabulary = _vocabulary_of(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last: tuple[bool, float | None] = (False, None)  # The author and the top-1 of the last token with text.
        self._instead: Alternative | None = None  # What the base would have written where the nudging model begins.

    def read(
        self, token: int, nudged: bool, top1: float | None = None, instead: Alternative | None = None
    ) -> list[Piece]:
        """Reads a token and returns the text that it makes whole: one piece, or none."""
        new = self._vocabulary.bytes_of(token)
        if new:  # An end mark adds no text and has no author.
            self._last = (nudged, top1)
            self._instead = self._instead or instead
        pieces = self._piece(new)
        if pieces:
            self._instead = instead if self._decoder.getstate()[0] else None
        return pieces

    def finish(self) -> list[Piece]:
        """Returns the rest of an answer that ends inside a character (one piece, or none), and begins a new answer."""
        rest = self._piece(b"", final=True)
        self._decoder.reset()
        self._instead = None
        return rest

    def _piece(self, new: bytes, final: bool = False) -> list[Piece]:
        text = self._decoder.decode(new, final)
        nudged, top1 = self._last
        return [Piece(text, nudged, top1, self._instead if nudged else None)] if text else []


def pieces_of(output: Any, tokenizer: Any) -> list[list[Piece]]:
    """The pieces of each answer of a nudged `generate`, without the end mark and padding.

    The arguments are those of [`spans_of`].
    """
    vocabulary = _vocabulary_of(tokenizer)
    reader = PieceReader(vocabulary)
    answers = []
    new = output.sequences[:, output.sequences.shape[1] - output.nudged_mask.shape[1] :].tolist()
    columns = (new, output.nudged_mask.tolist(), output.base_top1_probs.tolist(), alternatives_of(output, vocabulary))
    for row in zip(*columns, strict=True):
        pieces: list[Piece] = []
        for token, nudged, top1, instead in zip(*row, strict=True):
            if top1 == top1:  # NaN stands on padding.
                pieces += reader.read(token, nudged, top1, instead)
        answers.append(pieces + reader.finish())
    return answers


def alternatives_of(output: Any, tokenizer: Any) -> list[list[Alternative | None]]:
    """What the base would have written at each token of each answer; `None` where the nudging model did not write.

    Args:
        output: as for [`spans_of`], or anything with its `nudged_mask`, `base_tokens`, `base_token_probs` and
            `base_ranks`.
        tokenizer: the base's, or its `Vocabulary`.
    """
    vocabulary = _vocabulary_of(tokenizer)
    columns = (output.nudged_mask, output.base_tokens, output.base_token_probs, output.base_ranks)
    return [
        [
            Alternative(place, to_text(vocabulary.bytes_of(token)), probability, rank) if nudged else None
            for place, (nudged, token, probability, rank) in enumerate(zip(*row, strict=True))
        ]
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _vocabulary_of(tokenizer: Any) -> Vocabulary:
    return tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary(tokenizer)


def text_of(pieces: Iterable[Piece]) -> str:
    """The text of an answer: its pieces, joined."""
    return "".join(piece.text for piece in pieces)


def spans(pieces: Iterable[Piece]) -> list[Span]:
    """The pieces, with neighbours of one author joined."""
    found: list[Span] = []
    end = 0
    for nudged, group in groupby(pieces, key=lambda piece: piece.nudged):
        first, *others = group
        text = text_of([first, *others])
        start, end = end, end + len(text)
        found.append(Span(text, nudged, start, end, first.instead))
    return found


def spans_of(output: Any, tokenizer: Any) -> list[list[Span]]:
    """The spans of each answer of a nudged `generate`, which say who wrote what.

    Args:
        output ([`NudgingOutput`]): what `generate` returned with `return_dict_in_generate=True`.
        tokenizer: the base's.

    Returns:
        One list of [`Span`]s for each row. Joined, they are the answer's text without control tokens.
    """
    return [spans(pieces) for pieces in pieces_of(output, tokenizer)]


def add_stretch(stretches: list[tuple[int, int]], start: int, end: int) -> None:
    """Adds a stretch at the end of others, and joins it to the last one if they touch."""
    if stretches and stretches[-1][1] == start:
        start, _ = stretches.pop()
    stretches.append((start, end))


def count_nudged_words(pieces: Iterable[Piece], word_boundary: str = "space") -> tuple[int, int]:
    """Counts the words of which the nudging model wrote at least one character, and all words.

    White space separates words. With the `word_boundary` "unicode", those of UAX #29 count, as when the answer was
    written. The pieces of the answer may be cut anywhere.
    """
    if word_boundary != "space":
        parts = [(piece.text.encode("utf-8", "replace"), piece.nudged) for piece in pieces]
        text = b"".join(part for part, _ in parts)
        nudged = b"".join(bytes([own]) * len(part) for part, own in parts)
        words = nudged_words(text, nudged, [*word_starts(text, word_boundary), len(text)])
        return sum(words), len(words)
    characters = ((character, piece.nudged) for piece in pieces for character in piece.text)
    words = [
        any(nudged for _, nudged in word)
        for is_space, word in groupby(characters, key=lambda character: character[0].isspace())
        if not is_space
    ]
    return sum(words), len(words)
