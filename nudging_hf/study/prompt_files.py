"""Reads prompts from files. It knows formats, never fields or models.

The extension tells the format where it is known, and the content tells it otherwise:

- JSON lines, or one JSON array: each value is a record;
- CSV and TSV, whose first line is a header: each row is a record;
- plain text: each line is a prompt.

[`~study.records`] says what a record may be. Fields that it does not name are ignored, and what was read is told with
their names.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .prompts import Prompt, validate_labelled
from .records import ASKED, EXPECTED, KNOWN, field_name, listed, prompt_of

_TABLES = {".csv": ("CSV", ",;"), ".tsv": ("TSV", "\t"), ".tab": ("TSV", "\t")}
_JSON = (".jsonl", ".ndjson", ".json")
_OTHER = (".parquet", ".arrow", ".xlsx", ".xls", ".gz", ".zip", ".bz2", ".xz", ".zst", ".pdf", ".docx")

# A record, the number of the line where it begins, and what comes with it.
_Numbered = tuple[int, Any]


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
                ignored |= dict.fromkeys(name for name in record if field_name(name) not in KNOWN)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}, is no prompt: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    more = f"; ignored: {listed(ignored)}" if ignored else ""
    return prompts, f"{path} ({form}): {description(prompts)}{more}"


def read_labelled_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file. A `ValueError` says if the right answer to one is not known: see [`read_prompts`]."""
    prompts, _ = read_prompts(path)
    validate_labelled(prompts, str(path))
    return prompts


def description(prompts: Sequence[Prompt]) -> str:
    """What some prompts are, in one line: how many, how their answers are marked, and the first."""
    rules = Counter(_rulefield_name(prompt) for prompt in prompts if prompt.answer is not None)
    answered = f"{rules.total()} with answers" if rules else "none with an answer"
    marked = "; ".join(f"{count} read by {name}" for name, count in rules.items())
    first = prompts[0]
    due = "" if first.answer is None else f" -> {_short(first.answer)}"
    chats = f"{len(prompts):,} chat{'' if len(prompts) == 1 else 's'}"
    return f"{chats}, {answered}{f' ({marked})' if marked else ''}; the first: {_short(first.question)}{due}"


def _rulefield_name(prompt: Prompt) -> str:
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
    if delimiter := next((each for each in "\t,;" if len(_header_names(lines, each) & KNOWN) > 1), None):
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
    delimiter = max(delimiters, key=lambda each: len(_header_names(lines, each) & KNOWN))
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not names and any(cells):
                names = [field_name(cell) for cell in cells]
                if not {*names} & {*ASKED}:
                    raise ValueError(f"{path}, line {line}: {EXPECTED} in the header, got {listed(cells)}.")
                if twice := [name for name, count in Counter(names).items() if count > 1]:
                    raise ValueError(f"{path}, line {line}: the header has {listed(twice)} more than once.")
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


def _header_names(lines: Sequence[str], delimiter: str) -> set[str]:
    """The names of the first line that is not empty, if it is a header of several columns."""
    cells = next((line for line in lines if line.strip()), "").split(delimiter)
    names = {field_name(cell) for cell in cells}
    return names if len(cells) > 1 and names & {*ASKED} else set()
