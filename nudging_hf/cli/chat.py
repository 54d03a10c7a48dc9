"""`nudging-hf chat`: several turns in the terminal. Answers go to standard output, all else to standard error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ..chats import turn_template
from .arguments import (
    add_decoding,
    add_models,
    add_output,
    add_prompts,
    apply_seed,
    command_parser,
    decoding_of,
    first_line,
    load_pair,
)
from .streams import keep_undecoded_bytes_of_typed_lines, refuse_undecoded, say, standard_input


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "chat", run)
    add_models(parser)
    add_prompts(parser)
    add_decoding(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """A chat with a nudged base model. Each line is a turn, also where the lines come from a file or another program;
    /help lists the commands. The words of the nudging model are in colour."""
    from .answering import ink_of
    from .conversation import Conversation, completions

    turn_template(args.base_template)  # A bad one is refused now, not after the models have been loaded.
    decoding = decoding_of(args)
    apply_seed(args)
    pair = load_pair(args)
    decoding["nudging_config"] = pair.nudging_config(decoding["nudging_config"])
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Conversation(args, pair, decoding, ink_of(args, wrapped=at_terminal))
    if at_terminal:
        chat.introduce()
    for line in _typed_lines(completions) if at_terminal else _piped_lines():
        try:
            refuse_undecoded(line, "The line, which is left out,", sys.stdin.encoding or "utf-8")
            if not chat.take(line.strip()):
                return
        except KeyboardInterrupt:
            if not at_terminal:  # The program that feeds the chat does not notice that an answer was stopped.
                raise
        except ValueError as error:
            say(f"error: {first_line(error)}")
        except (RuntimeError, IndexError) as error:  # torch: out of memory, or longer than the model has positions.
            say(f"error: {type(error).__name__}: {first_line(error)}; /new starts over, /save FILE keeps the chat")


def _piped_lines() -> Iterator[str]:
    with standard_input() as stream:
        yield from stream


def _typed_lines(completions: Callable[[str], list[str]]) -> Iterator[str]:
    """The lines that are typed, until Ctrl-D. Ctrl-C drops a line, and the Tab key completes one."""
    try:
        import readline
    except ImportError:  # Windows has none: the terminal itself edits lines.
        pass
    else:
        readline.parse_and_bind("set enable-bracketed-paste on")  # Several lines that are pasted are one turn.
        readline.parse_and_bind("tab: complete")
        readline.set_completer_delims("")  # A line is completed as a whole.
        readline.set_completer(lambda line, number: dict(enumerate(completions(line))).get(number))
    keep_undecoded_bytes_of_typed_lines()
    while True:
        say("")
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\nCtrl-D quits.")
        except EOFError:
            return say("")
