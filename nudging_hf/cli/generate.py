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
    output = add_output(parser)
    output.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page with the answer, which shows the base's top-1 probability at each piece, and at a "
        "click on a nudge how the base alone would have gone on",
    )
    output.add_argument(
        "--explain",
        action="store_true",
        help="also list the nudges on standard error, each with what the base itself would have written, its "
        "probability, and the rank of the nudge in the base's distribution",
    )


def run(args: argparse.Namespace) -> None:
    """Answers a prompt with a nudged base model. The answer goes to standard output as it is written, with the words
    of the nudging model in colour; a line of figures goes to standard error."""
    from .answering import StreamedAnswer, ink_of
    from .files import refuse_missing_folders

    prompt = _read_prompt(args.prompt)
    messages = messages_of(prompt, args.system)
    turn_template(args.base_template)  # A bad one is refused now, not after the models have been loaded.
    refuse_missing_folders({"--html": args.html})
    decoding = decoding_of(args)
    apply_seed(args)
    pair = load_pair(args)
    decoding["nudging_config"] = pair.nudging_config(decoding["nudging_config"])
    inputs = pair.inputs(messages, args.base_template)
    warn_of_context(pair, inputs, args.max_new_tokens)
    answer = StreamedAnswer(pair, inputs, decoding)
    answer.write(ink_of(args))
    if not args.quiet:
        answer.show_figures()
    if args.explain:
        answer.explain()
    if args.html is not None:
        asked = prompt if args.system is None else f"{args.system}\n\n{prompt}"
        answer.write_page(args.html, asked, {"base": args.base, "nudging model": args.nudging_model})


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
