"""A streamer that says who wrote what. It knows tokens and authors, never models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .provenance import Piece, PieceReader
from .terminal import Ink


class MarkingStreamer(BaseStreamer):
    """Hands on an answer as it is written, piece by piece, with the author of each piece.

    The pieces, joined, are the answer's text without control tokens. A character that is split over tokens comes whole
    and belongs to the author of its last token. In a plain `generate` all of them are the base's.

    Args:
        tokenizer: the base's.
        write: called as `write(text, nudged)`; `text` is not empty. Left out, the answer goes to standard output, with
            the nudging model's words in colour, or in marks where that is no terminal.

    Raises:
        ValueError: for a plain `generate` of several rows.

    Example:
        nudging_hf.generate(model, **inputs, nudging_model=m, streamer=MarkingStreamer(tokenizer))

        pieces = []  # or with a callback; `nudging_hf.provenance.spans(pieces)` joins neighbours and counts characters
        streamer = MarkingStreamer(tokenizer, lambda text, nudged: pieces.append(Piece(text, nudged)))
    """

    def __init__(self, tokenizer: Any, write: Callable[[str, bool], None] | None = None):
        self._reader = PieceReader(tokenizer)
        self._finish: Callable[[], None] | None = None
        if write is None:
            ink = Ink.of_stdout()
            write, self._finish = ink.write, ink.end
        self._write = write
        self._prompt_is_due = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which `generate` hands to every streamer first, and then tokens of a plain `generate`."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"A streamer takes a single answer, got {len(value)} rows: generate them one at a time.")
        if not self._prompt_is_due:
            self.put_marked(value.flatten(), nudged=False)
        self._prompt_is_due = False

    def put_marked(self, value: torch.Tensor, nudged: bool) -> None:
        """Takes new tokens of shape (n,) and whether the nudging model wrote them."""
        for token in value.tolist():
            self._hand_on(self._reader.read(token, nudged))

    def end(self) -> None:
        """Hands on what an answer left unfinished, and makes ready for the next one."""
        self._hand_on(self._reader.finish())
        if self._finish is not None:
            self._finish()
        self._prompt_is_due = True

    def _hand_on(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._write(piece.text, piece.nudged)
