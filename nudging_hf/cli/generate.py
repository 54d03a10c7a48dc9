"""`nudging-hf generate`: one prompt, one answer."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

from ..chats import messages_of, turn_template
from .arguments import (
    add_decoding,
    add_models,
    add_output,
    add_prompts,
    apply_seed,
    command_parser,
    decoding_of,
    load_pair,
    warn_of_context,
)
from .streams import refuse_undecoded, standard_input

_EXAMPLE = """\
for example, in a checkout of the project:
  nudging-hf generate --base examples/mini/models/base --nudging-model examples/mini/models/nudging \\
    "Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?"
"""


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "generate", run)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # An example that is wrapped cannot be copied.
    parser.description = inspect.cleandoc(run.__doc__ or "")
    parser.epilog = _EXAMPLE
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help='the prompt; it is read from standard input if it is left out or "-"',
    )
    add_models(parser)
    add_prompts(parser)
    add_decoding(parser)
    add_output(parser).add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page with the answer, which shows the base's top-1 probability at each piece",
    )


def run(args: argparse.Namespace) -> None:
    """Answers a prompt with a nudged base model. The answer goes to standard output as it is written, with the words
    of the nudging model in colour; a line of figures goes to standard error."""
    from .. import page
    from .answering import StreamedAnswer, ink_of
    from .files import refuse_missing_folders

    prompt = _read_prompt(args.prompt)
    messages = messages_of(prompt, args.system)
    turn_template(args.base_template)  # A bad one is refused now, not after the models have been loaded.
    refuse_missing_folders({"--html": args.html})
    decoding = decoding_of(args)
    apply_seed(args)
    pair = load_pair(args)
    config = decoding["nudging_config"] = pair.nudging_config(decoding["nudging_config"])
    inputs = pair.inputs(messages, args.base_template)
    warn_of_context(pair, inputs, args.max_new_tokens)
    answer = StreamedAnswer()
    answer.write(pair, inputs, decoding, ink_of(args))
    if not args.quiet:
        answer.show_figures()
    if args.html is not None:
        asked = prompt if args.system is None else f"{args.system}\n\n{prompt}"
        figures = {"base": args.base, "nudging model": args.nudging_model, **answer.figures()}
        compared = config.nudge_threshold if config.nudge_gate == "top1" else None
        gamma = compared if isinstance(compared, (int, float)) else None
        page.write(args.html, [page.MarkedAnswer(asked, answer.pieces, figures)], gamma)


def _read_prompt(argument: str | None) -> str:
    if argument in (None, "-"):
        if sys.stdin.isatty():
            print("Prompt, ended by Ctrl-D on a line of its own:", file=sys.stderr)
        with standard_input() as stream:
            argument = stream.read().removesuffix("\n")
            refuse_undecoded(argument, "Standard input", stream.encoding or "utf-8")
    assert argument is not None
    if not argument.strip():
        raise ValueError("The prompt is empty: give one as an argument or on standard input.")
    return argument
