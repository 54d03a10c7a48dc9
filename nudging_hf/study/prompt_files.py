"""Reads prompts from files, and from rows that are in memory. It knows formats and fields, never models.

The extension tells the format where it is known, and the content tells it otherwise:

- JSON lines, or one JSON array: each value is a record;
- CSV and TSV, whose first line is a header: each row is a record;
- plain text: each line is a prompt.

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

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..chats import messages_of, quoted
from .marking import reference
from .prompts import Prompt, validate_labelled

_CHATS = ("messages", "conversations")
_QUESTIONS = ("question", "instruction", "prompt")
_ADDED = ("input", "context")
_ANSWERS = ("answer", "target", "output")
_ASKED = (*_CHATS, *_QUESTIONS, "input")
_KNOWN = {*_ASKED, *_ADDED, *_ANSWERS, "pattern", "task", "system"}
# What belongs to a question and cannot be read: without it the question would be another one.
_REFUSED = ("choices", "options", "image", "images", "tools")

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    "system": "system",
}
_EXPECTED = f"expected one of {', '.join(f'`{name}`' for name in _ASKED)}"
_TABLES = {".csv": ("CSV", ",;"), ".tsv": ("TSV", "\t"), ".tab": ("TSV", "\t")}
_JSON = (".jsonl", ".ndjson", ".json")
_OTHER = (".parquet", ".arrow", ".xlsx", ".xls", ".gz", ".zip", ".bz2", ".xz", ".zst", ".pdf", ".docx")

# A record, the number of the line where it begins, and what comes with it.
_Numbered = tuple[int, Any]


# Files --------------------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> tuple[list[Prompt], str]:
    """The prompts of a file in UTF-8, with or without a byte order mark, and what was read, in one line.

    Lines end at a line feed, with or without a carriage return before it. Empty lines are skipped.

    Raises:
        ValueError: for what is not understood, naming the file, the line and the field, and for a file without
            prompts.
        OSError: for a file that cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() in _OTHER:
        raise ValueError(
            f"{path}, line 1: a file of the kind {path.suffix.lower()} is not read; expected JSON lines, a JSON "
            "array, CSV, TSV or plain text. In Python, `prompts` also takes a data set of the library datasets."
        )
    form, records = _records_of(_text_of(path), path)
    prompts = []
    ignored: dict[str, None] = {}
    for line, record in records:
        try:
            prompts.append(prompt_of(record))
            if isinstance(record, Mapping):
                ignored |= dict.fromkeys(name for name in record if _name(name) not in _KNOWN)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}, is no prompt: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    more = f"; ignored: {_listed(ignored)}" if ignored else ""
    return prompts, f"{path} ({form}): {description(prompts)}{more}"


def read_labelled_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file. A `ValueError` says if the right answer to one is not known: see [`read_prompts`]."""
    prompts, _ = read_prompts(path)
    validate_labelled(prompts, str(path))
    return prompts


def description(prompts: Sequence[Prompt]) -> str:
    """What some prompts are, in one line: how many, how their answers are marked, and the first."""
    rules = Counter(_rule_name(prompt) for prompt in prompts if prompt.answer is not None)
    answered = f"{rules.total()} with answers" if rules else "none with an answer"
    marked = "; ".join(f"{count} read by {name}" for name, count in rules.items())
    first = prompts[0]
    due = "" if first.answer is None else f" -> {_short(first.answer)}"
    chats = f"{len(prompts):,} chat{'' if len(prompts) == 1 else 's'}"
    return f"{chats}, {answered}{f' ({marked})' if marked else ''}; the first: {_short(first.question)}{due}"


def _rule_name(prompt: Prompt) -> str:
    if prompt.rule is None:
        return "a judge alone, being too long for a rule"
    return "a pattern" if prompt.pattern is not None else prompt.rule.name


def _short(text: str) -> str:
    text = " ".join(text.split())
    return f"“{text if len(text) <= 80 else f'{text[:77]}...'}”"


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # Some editors begin a file with the mark of UTF-8, which is no text.
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        utf_16 = " (it seems to be UTF-16)" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise ValueError(
            f"{path}, line {line}, holds the byte 0x{error.object[error.start]:02x}, "
            f"which is not UTF-8{utf_16}: save the file as UTF-8."
        ) from error
    if "\r" in text and "\n" not in text:
        raise ValueError(f"{path}, line 1: lines end at a carriage return alone: save the file with \\n or \\r\\n.")
    if odd := re.search(r"[\x00-\x08\x0e-\x1f]", text):
        line = text.count("\n", 0, odd.start()) + 1
        raise ValueError(
            f"{path}, line {line}, holds the control character {odd[0]!r}, which is not text: save the file as plain "
            "text in UTF-8."
        )
    return text


def _records_of(text: str, path: Path) -> tuple[str, Iterator[_Numbered]]:
    """The form of a file's text, and its records."""
    kind = path.suffix.lower()
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if kind in _TABLES:
        form, delimiters = _TABLES[kind]
        return form, _rows_of(lines, delimiters, path)
    if kind in _JSON or re.match(r'\s*(?:\{|\[\s*[\[{"\]])', text):
        return _json_records(text, lines, path)
    if delimiter := next((each for each in "\t,;" if len(_header_names(lines, each) & _KNOWN) > 1), None):
        return "TSV" if delimiter == "\t" else "CSV", _rows_of(lines, delimiter, path)
    return "plain text, a prompt a line", ((n, line.strip()) for n, line in enumerate(lines, 1) if line.strip())


def _json_records(text: str, lines: Sequence[str], path: Path) -> tuple[str, Iterator[_Numbered]]:
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    first = numbered[0][1] if numbered else ""
    if first.lstrip().startswith("[") and (len(numbered) == 1 or not _is_json(first)):
        return "JSON array", _array_of(text, path)
    if len(numbered) > 1 and not _is_json(first) and _is_json(text):
        return "JSON", iter([(numbered[0][0], json.loads(text))])
    return "JSON lines", ((number, _parsed(line, number, path)) for number, line in numbered)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _parsed(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}, is no JSON: {error}.") from error


def _array_of(text: str, path: Path) -> Iterator[_Numbered]:
    """The values of a JSON array, each with the line where it begins."""
    space, decoder = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()

    def skip(place: int) -> int:
        found = space.match(text, place)
        assert found is not None
        return found.end()

    place, line, counted = skip(0), 1, 0
    opening, end = "[", "]"
    try:
        while text[place : place + 1] == opening:
            place = skip(place + 1)
            if opening == "[" and text[place : place + 1] == end:
                break
            line, counted = line + text.count("\n", counted, place), place
            value, place = decoder.raw_decode(text, place)
            yield line, value
            place, opening = skip(place), ","
        if text[place : place + 1] != end or skip(place + 1) != len(text):
            raise json.JSONDecodeError("Expected ',' or ']', and nothing after the array", text, place)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, is no JSON: {error}.") from error


def _rows_of(lines: Sequence[str], delimiters: str, path: Path) -> Iterator[_Numbered]:
    """The rows of a table as objects, each with the line where it begins."""
    delimiter = max(delimiters, key=lambda each: len(_header_names(lines, each) & _KNOWN))
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not names and any(cells):
                names = [_name(cell) for cell in cells]
                if not {*names} & {*_ASKED}:
                    raise ValueError(f"{path}, line {line}: {_EXPECTED} in the header, got {_listed(cells)}.")
                if twice := [name for name, count in Counter(names).items() if count > 1]:
                    raise ValueError(f"{path}, line {line}: the header has {_listed(twice)} more than once.")
            elif any(cells):
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}, line {line}, has {len(cells)} cells, and the header has {len(names)}: put a cell "
                        "that contains the delimiter or a line break into double quotes."
                    )
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}, is no row of a table: {error}.") from error


def _name(field: Any) -> str:
    return str(field).strip().strip('"').lower()


def _header_names(lines: Sequence[str], delimiter: str) -> set[str]:
    """The names of the first line that is not empty, if it is a header of several columns."""
    cells = next((line for line in lines if line.strip()), "").split(delimiter)
    names = {_name(cell) for cell in cells}
    return names if len(cells) > 1 and names & {*_ASKED} else set()


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# Rows ---------------------------------------------------------------------------------------------------------------


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
        raise ValueError(f"{_EXPECTED}, got {quoted(record)}.")
    fields = {_name(name): value for name, value in record.items() if value is not None}
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
        raise ValueError(f"{_listed(answers)} differ, and only one can be the right answer: leave out the others.")
    answer = next(iter(answers.values()), due)
    task = fields.get("task", "")
    return Prompt(messages, base_prompt, fields.get("pattern"), answer, str(task))


def _asked(fields: Mapping[str, Any]) -> tuple[list[Any], str | None]:
    """The chat of a record, up to the last question, and the answer that follows it there, if one does."""
    chats = [name for name in _CHATS if name in fields]
    names = chats or [name for name in _QUESTIONS if name in fields] or [name for name in _ADDED[:1] if name in fields]
    if not names:
        raise ValueError(f"{_EXPECTED}, got {_listed(fields) or 'no field'}.")
    if len(names) > 1:
        raise ValueError(f"{_listed(names)} are several questions, and one is expected: leave out the others.")
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
        if message["from"] not in _ROLES:
            raise ValueError(f"`{name}`: `from` must be one of {', '.join(_ROLES)}, got {quoted(message['from'])}.")
        return {"role": _ROLES[message["from"]], "content": message["value"]}
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
