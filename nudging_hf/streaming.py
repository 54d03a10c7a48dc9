"""A streamer that tells which model wrote each piece of text. It knows tokens and authors, never models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .provenance import Piece, PieceReader
from .terminal import TerminalWriter


class MarkingStreamer(BaseStreamer):
    """Streams an answer piece by piece, with the author of each piece, as [`~provenance.PieceReader`] cuts it.

    In a plain `generate` the base is the author of all pieces.

    Args:
        tokenizer: the base's.
        write: called as `write(text, nudged)`, where `text` is not empty. By default the answer goes to standard
            output, with the nudging model's words in colour, or between marks if the output is not a terminal.

    Raises:
        ValueError: if a plain `generate` has several rows.

    Example:
        ```python
        nudging_hf.generate(base, **inputs, nudging_model=nudger, streamer=MarkingStreamer(tokenizer))

        pieces = []  # With a callback; `nudging_hf.provenance.spans(pieces)` joins neighbours and counts characters.
        streamer = MarkingStreamer(tokenizer, lambda text, nudged: pieces.append(Piece(text, nudged)))
        ```
    """

    def __init__(self, tokenizer: Any, write: Callable[[str, bool], None] | None = None):
        self._reader = PieceReader(tokenizer)
        self._finish: Callable[[], None] | None = None
        if write is None:
            writer = TerminalWriter.of_stdout()
            write, self._finish = writer.write, writer.end
        self._write = write
        self._expects_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt, which `generate` sends first, and then the tokens of a plain `generate`."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"`streamer` takes a single answer, got {len(value)} rows: generate them one at a time.")
        if not self._expects_prompt:
            self.put_marked(value.flatten(), nudged=False)
        self._expects_prompt = False

    def put_marked(self, value: torch.Tensor, nudged: bool) -> None:
        """Receives new tokens of shape (n,) and whether the nudging model wrote them."""
        for token in value.tolist():
            self._write_pieces(self._reader.read(token, nudged))

    def end(self) -> None:
        """Writes what is left of the answer, an incomplete character perhaps, and gets ready for the next one."""
        self._write_pieces(self._reader.finish())
        if self._finish is not None:
            self._finish()
        self._expects_prompt = True

    def _write_pieces(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._write(piece.text, piece.nudged)
