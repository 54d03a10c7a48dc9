"""Prompts from records, which files and data sets hold. It knows fields, never formats or models.

A record is an object with these fields, a list of messages, or the text of a prompt. Further fields are ignored, and
what was read is told with their names.

- What is asked stands in one of `messages`, `conversations` (ShareGPT), `question`, `instruction`, `prompt` and
  `input`. Beside `question`, `instruction` or `prompt`, `input` (Alpaca) or `context` is further text. Beside
  messages, `prompt` is what the base is given. `system` is a system message.
- The right answer stands in one of `answer`, `target` and `output`, or else is the assistant's message at the end of a
  chat. It may be a number. Of a worked solution its conclusion counts, such as a last line `#### 18` (GSM8K).
- `pattern` and `task` are those of [`Prompt`].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..chats import messages_of, quoted
from .marking import reference
from .prompts import Prompt

_CHATS = ("messages", "conversations")
_QUESTIONS = ("question", "instruction", "prompt")
_ADDED = ("input", "context")
_ANSWERS = ("answer", "target", "output")
ASKED = (*_CHATS, *_QUESTIONS, "input")
KNOWN = {*ASKED, *_ADDED, *_ANSWERS, "pattern", "task", "system"}
# What belongs to a question and cannot be read: without it the question would be another one.
_REFUSED = ("choices", "options", "image", "images", "tools")

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    "system": "system",
}
EXPECTED = f"expected one of {', '.join(f'`{name}`' for name in ASKED)}"


def field_name(field: Any) -> str:
    """The name of a field without what people vary: case, and space and quotes around it."""
    return str(field).strip().strip('"').lower()


def listed(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def prompts_of(rows: Iterable[Any]) -> list[Prompt]:
    """The prompts of rows that are in memory, such as a list or a data set or column of the library datasets.

    Args:
        rows: prompts, texts, chats, or objects with the fields that the head of the module lists.

    Raises:
        ValueError: for a row that is no prompt, with its number; for a single text; and for several splits at once.
    """
    if isinstance(rows, (str, bytes, Path, Mapping)):
        hint = "choose one of its splits or columns" if isinstance(rows, Mapping) else "`read_prompts` reads a file"
        raise ValueError(f"`prompts` must be a list of prompts, got one {type(rows).__name__}: {hint}.")
    prompts = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts.append(row if isinstance(row, Prompt) else prompt_of(row))
        except ValueError as error:
            raise ValueError(f"`prompts`, number {number}, is no prompt: {error}") from error
    return prompts


def prompt_of(record: Any) -> Prompt:
    """The prompt of one record, as the head of the module describes it.

    Raises:
        ValueError: for a record that is not understood, naming the field.
    """
    if isinstance(record, str):
        return Prompt(messages_of(_content(record, "The prompt")))
    if isinstance(record, Sequence):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise ValueError(f"{EXPECTED}, got {quoted(record)}.")
    fields = {field_name(name): value for name, value in record.items() if value is not None}
    fields = {name: value for name, value in fields.items() if name in (*_CHATS, *_QUESTIONS) or not _is_blank(value)}
    for name in _REFUSED:
        if fields.get(name):
            raise ValueError(f"`{name}` belongs to the question and is not read: write it into the question.")
    messages, due = _asked(fields)
    system = fields.get("system")
    if system is not None:
        if messages[0].get("role") == "system":
            raise ValueError("`system` is a second system message: leave out one of them.")
        messages = [{"role": "system", "content": _content(system, "`system`")}, *messages]
    has_chat = any(name in fields for name in _CHATS)
    base_prompt = fields.get("prompt") if has_chat else None
    answers = {name: _answer(fields[name], f"`{name}`") for name in _ANSWERS if name in fields}
    if len({*answers.values()}) > 1:
        raise ValueError(f"{listed(answers)} differ, and only one can be the right answer: leave out the others.")
    answer = next(iter(answers.values()), due)
    task = fields.get("task", "")
    return Prompt(messages, base_prompt, fields.get("pattern"), answer, str(task))


def _asked(fields: Mapping[str, Any]) -> tuple[list[Any], str | None]:
    """The chat of a record, up to the last question, and the answer that follows it there, if one does."""
    chats = [name for name in _CHATS if name in fields]
    names = chats or [name for name in _QUESTIONS if name in fields] or [name for name in _ADDED[:1] if name in fields]
    if not names:
        raise ValueError(f"{EXPECTED}, got {listed(fields) or 'no field'}.")
    if len(names) > 1:
        raise ValueError(f"{listed(names)} are several questions, and one is expected: leave out the others.")
    name, value = names[0], fields[names[0]]
    if name in _CHATS or (name == "prompt" and not isinstance(value, str)):
        return _chat(value, name)
    text = _content(value, f"`{name}`")
    more = [_content(fields[each], f"`{each}`") for each in _ADDED if each != name and each in fields]
    return messages_of("\n\n".join([text, *more])), None


def _chat(value: Any, name: str) -> tuple[list[Any], str | None]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise ValueError(f"`{name}`: A chat must be a list of messages, got {quoted(value)}.")
    messages = [_message(message, name) for message in value]
    due = None
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        due = _answer(messages.pop()["content"], f"The last message of `{name}`")
    return messages, due


def _message(message: Any, name: str) -> dict[str, Any]:
    """A message with the names that transformers has for its fields and roles."""
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        role = _ROLES.get(str(message["from"]))
        if role is None:
            raise ValueError(f"`{name}`: `from` must be one of {', '.join(_ROLES)}, got {quoted(message['from'])}.")
        return {"role": role, "content": message["value"]}
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(f'`{name}`: a message must be {{"role": ..., "content": ...}}, got {quoted(message)}.')
    return dict(message)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _content(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {quoted(value)}.")
    if _is_blank(value):
        raise ValueError(f"{name} is empty, got {value!r}.")
    return value


def _answer(value: Any, what: str) -> str:
    """A right answer as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text or a number, got {quoted(value)}.")
    return reference(value)
