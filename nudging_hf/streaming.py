"""A streamer that says who wrote what. It knows tokens and authors, never models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .provenance import PieceReader
from .terminal import Ink


class MarkingStreamer(BaseStreamer):
    """Hands on a nudged answer as it is written, piece by piece, with the author of each piece.

    The pieces, joined, are the answer's text without control tokens. A character that is split over tokens comes whole
    and belongs to the author of its last token.

    Args:
        tokenizer: the base's.
        write: called as `write(text, nudged)`; `text` is not empty. Left out, the answer goes to standard output, with
            the nudging model's words in colour, or in marks where that is no terminal.

    Example:
        nudging_hf.generate(model, **inputs, nudging_model=m, streamer=MarkingStreamer(tokenizer))
    """

    def __init__(self, tokenizer: Any, write: Callable[[str, bool], None] | None = None):
        self._reader = PieceReader(tokenizer)
        ink = Ink.of_stdout()
        self._write = ink.write if write is None else write
        self._end = ink.end if write is None else lambda: None

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which `generate` hands to every streamer first, and leaves it out."""

    def put_marked(self, value: torch.Tensor, nudged: bool) -> None:
        """Takes new tokens of shape (n,) and whether the nudging model wrote them."""
        for token in value.tolist():
            for piece in self._reader.read(token, nudged):
                self._write(piece.text, piece.nudged)

    def end(self) -> None:
        """Hands on what an answer left unfinished, and makes ready for the next one."""
        for piece in self._reader.finish():
            self._write(piece.text, piece.nudged)
        self._end()
