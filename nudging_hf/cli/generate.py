"""`nudging-hf generate`: one prompt, one answer."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ..chats import messages_of, turn_template
from ..generate import generate
from ..provenance import Piece, count_nudged_words
from ..streaming import MarkingStreamer
from ..terminal import CLOSING, OPENING, Ink, is_coloured
from .arguments import add_color, add_decoding, add_models, add_prompts, decoding_of, load_pair

_DESCRIPTION = (
    "Answers a prompt with a nudged base model. The answer goes to standard output as it is written, with the words "
    "of the nudging model in colour; a line of figures goes to standard error."
)


def add_command(commands: Any) -> None:
    """Adds `generate` to the commands of `nudging-hf`."""
    parser = commands.add_parser("generate", help="answer a prompt", description=_DESCRIPTION)
    parser.set_defaults(run=run)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help='left out or "-": read from standard input')
    add_models(parser)
    add_prompts(parser, base_template="{user}")
    add_decoding(parser)
    output = parser.add_argument_group("output")
    add_color(output)
    output.add_argument(
        "--marks",
        action=argparse.BooleanOptionalAction,
        help=f"put the nudged words in {OPENING} {CLOSING} (default: in a terminal without colour)",
    )
    output.add_argument("--quiet", action="store_true", help="no line of figures")


def run(args: argparse.Namespace) -> None:
    """Runs `nudging-hf generate`."""
    messages = messages_of(_read_prompt(args.prompt), args.system)
    turn_template(args.base_template)  # Refused now, not after the models have been loaded.
    decoding = decoding_of(args)
    pair = load_pair(args, progress=sys.stderr.isatty() and not args.quiet)
    inputs = pair.inputs(messages, args.base_template)
    pieces: list[Piece] = []
    coloured = is_coloured(args.color)
    marked = sys.stdout.isatty() and not coloured if args.marks is None else args.marks
    with Ink(sys.stdout, coloured, marked) as ink:

        def write(text: str, nudged: bool) -> None:
            pieces.append(Piece(text, nudged))
            ink.write(text, nudged)

        began = time.monotonic()
        streamer = MarkingStreamer(pair.tokenizer, write)
        out: Any = generate(pair.base, **inputs, **decoding, streamer=streamer, return_dict_in_generate=True)
        seconds = time.monotonic() - began
    if not args.quiet:
        nudged, words = count_nudged_words(pieces)
        figures = [
            f"nudged words: {nudged} of {words}" + (f" ({nudged / words:.0%})" if words else ""),
            f"passes: base {out.base_forward_passes}, nudging model {out.nudging_forward_passes}",
            f"tokens: {out.nudged_mask.shape[1]} in {seconds:.1f} s",
            f"finished: {out.finish_reasons[0]}",
        ]
        print(" | ".join(figures), file=sys.stderr)


def _read_prompt(argument: str | None) -> str:
    if argument in (None, "-"):
        if sys.stdin.isatty():
            print("Prompt, ended by Ctrl-D on a line of its own:", file=sys.stderr)
        argument = sys.stdin.read().removesuffix("\n")
    assert argument is not None
    if not argument.strip():
        raise ValueError("The prompt is empty: give one as an argument or on standard input.")
    return argument
