"""`nudging-hf chat`: several turns in the terminal. Answers go to standard output, all else to standard error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..chats import turn_template
from ..pair import Pair
from ..provenance import spans, text_of
from ..terminal import TerminalWriter
from .answering import StreamedAnswer, add_output, ink_of
from .arguments import (
    add_decoding,
    add_models,
    add_prompts,
    apply_seed,
    command_parser,
    decoding_of,
    first_line,
    load_pair,
    threshold_or_auto,
)
from .files import write_json
from .streams import keep_undecoded_bytes_of_typed_lines, refuse_undecoded, standard_input


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "chat", "chat with a pair of models", run)
    add_models(parser)
    add_prompts(parser)
    add_decoding(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """A chat with a nudged base model. Each line is a turn, also where the lines come from a file or another program;
    /help lists the commands. The words of the nudging model are in colour."""
    turn_template(args.base_template)  # A bad one is refused now, not after the models have been loaded.
    decoding = decoding_of(args)
    apply_seed(args)
    pair = load_pair(args)
    decoding["nudging_config"] = pair.nudging_config(decoding["nudging_config"])
    chat = Chat(args, pair, decoding, ink_of(args))
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        _introduce(args)
    for line in _typed_lines() if at_terminal else _piped_lines():
        try:
            refuse_undecoded(line, "The line, which is left out,", sys.stdin.encoding or "utf-8")
            if not chat.take(line.strip()):
                return
        except KeyboardInterrupt:
            if not at_terminal:  # The program that feeds the chat does not notice that an answer was stopped.
                raise
        except ValueError as error:
            _say(f"error: {first_line(error)}")
        except (RuntimeError, IndexError) as error:  # torch: out of memory, or longer than the model has positions.
            _say(f"error: {type(error).__name__}: {first_line(error)}; /new starts over, /save FILE keeps the chat")


def _introduce(args: argparse.Namespace) -> None:
    with ink_of(args) as ink:
        ink.write(f"{args.base}, nudged by {args.nudging_model}: ", False)
        ink.write("words like these", True)
        ink.write(" are the nudging model's. /help lists the commands; Ctrl-D quits.", False)


def _piped_lines() -> Iterator[str]:
    with standard_input() as stream:
        yield from stream


def _typed_lines() -> Iterator[str]:
    """The lines that are typed, until Ctrl-D. Ctrl-C drops a line."""
    try:
        import readline
    except ImportError:  # Windows has none: the terminal itself edits lines.
        pass
    else:
        readline.parse_and_bind("set enable-bracketed-paste on")  # Several lines that are pasted are one turn.
    keep_undecoded_bytes_of_typed_lines()
    while True:
        _say("")
        try:
            yield input("> ")
        except KeyboardInterrupt:
            _say("\nCtrl-D quits.")
        except EOFError:
            return _say("")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Chat:
    """The turns so far, and how the next one is answered: `decoding` is what [`decoding_of`] returns."""

    def __init__(self, args: argparse.Namespace, pair: Pair, decoding: dict[str, Any], ink: TerminalWriter):
        self._args, self._pair, self._decoding, self._ink = args, pair, decoding, ink
        self._system: str | None = args.system
        self._turns: list[dict[str, Any]] = []
        self._saved_to: Path | None = None

    def take(self, line: str) -> bool:
        """Carries out a command or answers a turn, and returns whether the chat goes on.

        Raises:
            ValueError: for a command that cannot be carried out, and for a turn that cannot be answered, which is then
                left out of the chat.
        """
        if line.startswith("/"):
            name, _, argument = line.partition(" ")
            if name == "/quit":
                return False
            if name not in _COMMANDS:
                raise ValueError(f"There is no command {name}; /help lists them.")
            run, _, _ = _COMMANDS[name]
            run(self, argument.strip())
        elif line:
            self._answer(line)
        return True

    @property
    def _messages(self) -> list[dict[str, Any]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._turns]

    def _answer(self, text: str) -> None:
        turn, answer = {"role": "user", "content": text}, StreamedAnswer()
        inputs = self._pair.inputs([*self._messages, turn], self._args.base_template)
        try:
            answer.write(self._pair, inputs, self._decoding, self._ink)
        except KeyboardInterrupt:
            if answer.pieces:
                self._keep(turn, answer)
            raise
        self._keep(turn, answer)

    def _keep(self, turn: dict[str, Any], answer: StreamedAnswer) -> None:
        said = {
            "role": "assistant",
            "content": text_of(answer.pieces),
            "nudged_spans": [[span.start, span.end] for span in spans(answer.pieces) if span.nudged],
            "nudge_threshold": self._decoding["nudging_config"].nudge_threshold,
            "finish_reason": answer.finish_reason,
        }
        self._turns += [turn, said]
        if not self._args.quiet:
            answer.show_figures()

    def _new(self, _: str) -> None:
        self._turns, self._saved_to = [], None
        _say("A new chat.")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        _say("No system message." if self._system is None else "The system message, from the next answer on.")

    def _set_threshold(self, text: str) -> None:
        config = self._decoding["nudging_config"]
        if text:
            try:
                given = threshold_or_auto(text)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"/threshold: {error}.") from None
            config = self._decoding["nudging_config"] = replace(config, nudge_threshold=given)
        _say(f"The threshold of {config.nudge_gate} is {config.nudge_threshold}.")

    def _save(self, text: str) -> None:
        path = Path(text).expanduser() if text else self._saved_to
        if path is None:
            raise ValueError("/save takes the name of a file.")
        if path.exists() and path != self._saved_to:
            raise ValueError(f"{path} is there already: save to another file.")
        chat = {
            "base": self._args.base,
            "nudging_model": self._args.nudging_model,
            "base_template": self._args.base_template,
            "nudging_hf": __version__,
            "messages": self._messages,
        }
        try:
            write_json(path, chat)
        except OSError as error:
            raise ValueError(f"The chat cannot be saved: {error}") from error
        self._saved_to = path
        _say(f"Saved to {path}.")

    def _help(self, _: str) -> None:
        told = {f"{name} {argument}": what for name, (_, argument, what) in _COMMANDS.items()}
        told["/quit"] = "end the chat, as Ctrl-D does; Ctrl-C stops an answer and keeps what was written"
        width = max(map(len, told))
        for command, what in told.items():
            _say(f"{command:{width}}  {what}")


# Each command with what carries it out, its argument, and its help.
_COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str, str]] = {
    "/new": (Chat._new, "", "start over"),
    "/system": (Chat._set_system, "TEXT", "set the system message from now on; without TEXT there is none"),
    "/threshold": (Chat._set_threshold, "T", "set the threshold from now on; without T it is shown"),
    "/save": (Chat._save, "FILE", "write the chat to FILE as JSON; without FILE, to the same as before"),
    "/help": (Chat._help, "", "list the commands"),
}
