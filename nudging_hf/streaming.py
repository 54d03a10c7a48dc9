"""A streamer that says who wrote what. It knows tokens and authors, never models."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .bridge import Vocabulary


class MarkingStreamer(BaseStreamer):
    """Hands on a nudged answer as it is written, piece by piece, with the author of each piece.

    The pieces, joined, are the answer's text without control tokens. A character that is split over tokens comes whole
    and belongs to the author of its last token.

    Args:
        tokenizer: the base's.
        write: called as `write(text, nudged)`; `text` is not empty.

    Example:
        nudging_hf.generate(model, **inputs, nudging_model=m, streamer=MarkingStreamer(tokenizer, show))
    """

    def __init__(self, tokenizer: Any, write: Callable[[str, bool], None]):
        self._vocabulary = Vocabulary(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._write = write

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which `generate` hands to every streamer first, and leaves it out."""

    def put_marked(self, value: torch.Tensor, nudged: bool) -> None:
        """Takes new tokens of shape (n,) and whether the nudging model wrote them."""
        for token in value.tolist():
            self._hand_on(self._decoder.decode(self._vocabulary.bytes_of(token)), nudged)

    def end(self) -> None:
        """Hands on what an answer left unfinished, and makes ready for the next one."""
        self._hand_on(self._decoder.decode(b"", final=True), nudged=False)
        self._decoder.reset()

    def _hand_on(self, text: str, nudged: bool) -> None:
        if text:
            self._write(text, nudged)
