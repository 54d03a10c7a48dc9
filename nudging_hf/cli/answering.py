"""One answer in the terminal: streamed, timed and counted. It knows one chat and a pair, never a command."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from .. import page
from ..continuations import pieces_with_continuations
from ..core.output import NudgingOutput
from ..pair import Pair
from ..provenance import Piece, count_nudged_words, pieces_of
from ..streaming import MarkingStreamer
from ..terminal import TerminalWriter, is_coloured, nudges_told
from .arguments import gamma_of
from .streams import say
from .wrapping import WordWrapper


class StreamedAnswer:
    """The answer of a pair to the prompts of [`Pair.inputs`], which is shown while it is written.

    `decoding` are the arguments of [`Pair.generate`], with a whole [`NudgingConfig`].

    Attributes:
        pieces: what has been written so far. Once the answer has ended, they have the base's top-1 probabilities.
        output ([`NudgingOutput`]): what `generate` returned; `None` before that, and after an interrupt.
    """

    def __init__(self, pair: Pair, inputs: Mapping[str, Any], decoding: Mapping[str, Any]) -> None:
        self._pair, self._inputs, self._decoding = pair, inputs, dict(decoding)
        self.pieces: list[Piece] = []
        self.output: NudgingOutput | None = None
        self._seconds = 0.0

    def write(self, ink: TerminalWriter) -> None:
        """Lets the pair answer, and shows the answer piece by piece."""
        began = time.monotonic()
        with ink:

            def show(text: str, nudged: bool) -> None:
                self.pieces.append(Piece(text, nudged))
                ink.write(text, nudged)

            streamer = MarkingStreamer(self._pair.tokenizer, show)
            output = self._pair.generate(
                self._inputs, **self._decoding, streamer=streamer, return_dict_in_generate=True
            )
        self._seconds = time.monotonic() - began
        self.output = output
        self.pieces = pieces_of(output, self._pair.tokenizer)[0]

    def figures(self) -> dict[str, str]:
        """The figures of the answer, by name."""
        nudged, words = count_nudged_words(self.pieces, self._decoding["nudging_config"].word_boundary)
        figures = {"nudged words": f"{nudged} of {words}" + (f" ({nudged / words:.0%})" if words else "")}
        if self.output is not None:
            assert self.output.nudged_mask is not None and self.output.finish_reasons is not None
            figures["passes"] = (
                f"base {self.output.base_forward_passes}, nudging model {self.output.nudging_forward_passes}"
            )
            figures["tokens"] = f"{self.output.nudged_mask.shape[1]} in {self._seconds:.1f} s"
        return {**figures, "finished": self.finish_reason}

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: a reason of [`NudgingOutput`], or "interrupted"."""
        reasons = self.output.finish_reasons if self.output is not None else None
        return str(reasons[0]) if reasons else "interrupted"

    def show_figures(self) -> None:
        """Writes the figures to standard error, in one line."""
        say(" | ".join(f"{name}: {value}" for name, value in self.figures().items()))

    def explain(self) -> None:
        """Writes to standard error what the base itself would have written at each nudge."""
        for line in nudges_told(self.pieces):
            say(line)

    def write_page(self, path: Path, asked: str, about: Mapping[str, str]) -> None:
        """Writes a page with the answer, for which the base goes on alone from each nudge.

        Args:
            asked: what the page says was asked.
            about: what it says of the answer besides the figures.
        """
        pieces = self.pieces
        if self.output is not None:
            [pieces] = pieces_with_continuations(
                self._pair.base, self.output, self._pair.tokenizer, self._inputs["attention_mask"]
            )
        config = self._decoding["nudging_config"]
        answer = page.MarkedAnswer(asked, pieces, {**about, **self.figures()}, config.word_boundary)
        page.write(path, [answer], gamma_of(config))


def ink_of(args: argparse.Namespace, wrapped: bool = False) -> TerminalWriter:
    """The ink with which answers are written to standard output; `wrapped` breaks lines between words."""
    coloured = is_coloured(args.color)
    marked = sys.stdout.isatty() and not coloured if args.marks is None else args.marks
    return TerminalWriter(cast(TextIO, WordWrapper(sys.stdout)) if wrapped else sys.stdout, coloured, marked)
