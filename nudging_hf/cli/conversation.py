"""The turns of a chat in the terminal, and its commands. It knows a pair and lines, never where lines come from."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from glob import escape, glob
from pathlib import Path
from typing import Any

from .. import __version__
from ..chats import checked_messages
from ..pair import Pair
from ..provenance import spans, text_of
from ..terminal import TerminalWriter
from .answering import StreamedAnswer
from .arguments import threshold_or_auto, warn_of_context, warn_of_threshold
from .files import write_json
from .streams import say


class Conversation:
    """The turns so far, and how the next one is answered: `decoding` is what [`decoding_of`] returns."""

    def __init__(self, args: argparse.Namespace, pair: Pair, decoding: dict[str, Any], ink: TerminalWriter):
        self._args, self._pair, self._decoding, self._ink = args, pair, decoding, ink
        self._system: str | None = args.system
        self._turns: list[dict[str, Any]] = []
        self._saved_to: Path | None = None
        self._last: StreamedAnswer | None = None  # What was answered last, unless it was taken back.

    def introduce(self) -> None:
        """Says who answers, and what the colour means."""
        with self._ink as ink:
            ink.write(f"{self._args.base}, nudged by {self._args.nudging_model}: ", False)
            ink.write("words like these", True)
            ink.write(" are the nudging model's. /help lists the commands; Ctrl-D quits.", False)

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
            if name not in COMMANDS:
                raise ValueError(f"There is no command {name}; /help lists them.")
            run, _, _ = COMMANDS[name]
            run(self, argument.strip())
        elif line:
            self._answer({"role": "user", "content": line})
        return True

    @property
    def _messages(self) -> list[dict[str, Any]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._turns]

    def _answer(self, turn: dict[str, Any]) -> None:
        inputs = self._pair.inputs([*self._messages, turn], self._args.base_template)
        answer = StreamedAnswer(self._pair, inputs, self._decoding)
        warn_of_context(self._pair, inputs, self._args.max_new_tokens)
        try:
            answer.write(self._ink)
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
        self._last = answer
        if not self._args.quiet:
            answer.show_figures()

    def _new(self, _: str) -> None:
        self._turns, self._saved_to, self._last = [], None, None
        say("A new chat.")

    def _retry(self, _: str) -> None:
        before = self._turns
        if not before:
            raise ValueError("There is no question that could be answered again.")
        self._turns = before[:-2]
        try:
            self._answer(before[-2])
        finally:
            if len(self._turns) < len(before):  # Nothing was answered, so the former answer stays.
                self._turns = before

    def _undo(self, _: str) -> None:
        if not self._turns:
            raise ValueError("There is no turn that could be taken back.")
        *self._turns, question, _answer = self._turns
        self._last = None
        say(f"Taken back: {question['content']}")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        say("No system message." if self._system is None else "The system message, from the next answer on.")

    def _set_threshold(self, text: str) -> None:
        config = self._decoding["nudging_config"]
        if text:
            try:
                given = threshold_or_auto(text)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"/threshold: {error}.") from None
            config = self._decoding["nudging_config"] = replace(config, nudge_threshold=given)
            warn_of_threshold(config)
        say(f"The threshold of {config.nudge_gate} is {config.nudge_threshold}.")

    def _why(self, _: str) -> None:
        self._answered("/why").explain()

    def _page(self, text: str) -> None:
        answer = self._answered("/page")
        path = Path(text).expanduser()
        if not text:
            raise ValueError("/page takes the name of a file.")
        if path.exists():
            raise ValueError(f"{path} is there already: write to another file.")
        about = {"base": self._args.base, "nudging model": self._args.nudging_model}
        try:
            answer.write_page(path, self._turns[-2]["content"], about)
        except OSError as error:
            raise ValueError(f"The page cannot be written: {error}") from error
        say(f"Written to {path}.")

    def _answered(self, command: str) -> StreamedAnswer:
        """The last answer. A `ValueError` says if a command has none."""
        if self._last is None:
            raise ValueError(f"{command} tells of the last answer, and none has been given since: ask, or /retry.")
        return self._last

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
        say(f"Saved to {path}.")

    def _load(self, text: str) -> None:
        if not text:
            raise ValueError("/load takes the name of a file that /save wrote.")
        path = Path(text).expanduser()
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
            system, _ = checked_messages([*messages, {"role": "user", "content": ""}])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no chat that /save wrote: {type(error).__name__}: {error}") from error
        self._system, self._turns, self._saved_to = system, messages[system is not None :], path
        self._last = None
        say(f"A chat of {len(self._turns) // 2} turns.")

    def _help(self, _: str) -> None:
        told = {f"{name} {argument}": what for name, (_, argument, what) in COMMANDS.items()}
        told["/quit"] = "end the chat, as Ctrl-D does; Ctrl-C stops an answer and keeps what was written"
        width = max(map(len, told))
        for command, what in told.items():
            say(f"{command:{width}}  {what}")


# Each command with what carries it out, its argument, and its help.
COMMANDS: dict[str, tuple[Callable[[Conversation, str], None], str, str]] = {
    "/new": (Conversation._new, "", "start over"),
    "/retry": (Conversation._retry, "", "answer the last question again, with the threshold as it is now"),
    "/undo": (Conversation._undo, "", "take the last question and its answer back"),
    "/system": (Conversation._set_system, "TEXT", "set the system message from now on; without TEXT there is none"),
    "/threshold": (Conversation._set_threshold, "T", "set the threshold from now on; without T it is shown"),
    "/why": (Conversation._why, "", "list the nudges of the last answer, and what the base would have written there"),
    "/page": (Conversation._page, "FILE", "write a page with the last answer, which shows this at each nudge"),
    "/save": (Conversation._save, "FILE", "write the chat to FILE as JSON; without FILE, to the same as before"),
    "/load": (Conversation._load, "FILE", "go on with a chat that /save wrote"),
    "/help": (Conversation._help, "", "list the commands"),
}


def completions(line: str) -> list[str]:
    """What a line may become where it begins a command or the name of a file."""
    name, space, argument = line.partition(" ")
    if not space:
        return [each for each in (*COMMANDS, "/quit") if line and each.startswith(line)]
    if name not in ("/save", "/load", "/page"):
        return []
    paths = sorted(glob(escape(os.path.expanduser(argument)) + "*"))
    return [f"{name} {path}{os.sep if os.path.isdir(path) else ''}" for path in paths]
