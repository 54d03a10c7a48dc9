"""Reads and writes the standard streams in their own encodings. It knows bytes and characters, never commands."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

_ESCAPING = "nudging_hf.escaping"


def say(text: str) -> None:
    """Writes a line to standard error."""
    print(text, file=sys.stderr, flush=True)


def open_closed_streams() -> None:
    """Replaces each closed standard stream with the null device, for the rest of the process."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def refuse_undecoded(text: str, what: str, encoding: str) -> None:
    """Raises a `ValueError` for a text with bytes that could not be decoded, which says what comes before them.

    The text was decoded from `encoding` with the error handler "surrogateescape", so that a surrogate code point
    stands for each such byte. `what` names the text, as the subject of the error's sentence.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else "half of a character of UTF-16"
        before = text[max(0, error.start - 20) : error.start]
        where = f"after {before!r}" if before else "at its beginning"
        name = codecs.lookup(encoding).name
        remedy = "give it as UTF-8" if name == "utf-8" else "set PYTHONUTF8=1, and give it as UTF-8"
        raise ValueError(f"{what} is not valid {name}: it has {found} {where}; {remedy}.") from error


def refuse_undecoded_arguments(arguments: Sequence[str]) -> None:
    """Refuses undecoded bytes in arguments. Paths are refused too, because reports name them and are UTF-8."""
    for number, argument in enumerate(arguments, start=1):
        refuse_undecoded(argument, f"Argument {number}", sys.getfilesystemencoding())


@contextmanager
def standard_input() -> Iterator[TextIO]:
    """Standard input, with a surrogate code point for each byte that cannot be decoded.

    Such a byte then makes only its own line invalid, and not everything that was read ahead: see `refuse_undecoded`.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # The stream has text only, as an `io.StringIO` does.
        yield sys.stdin
        return
    stream = io.TextIOWrapper(buffer, encoding=sys.stdin.encoding, errors="surrogateescape")
    try:
        yield stream
    finally:
        stream.detach()  # Otherwise it would close standard input.


def keep_undecoded_bytes_of_typed_lines() -> None:
    """Makes `input` return a surrogate code point for each byte that cannot be decoded."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


@contextmanager
def escaping_output() -> Iterator[None]:
    r"""Makes standard output show characters that its encoding lacks as escapes such as \u20ac.

    If there were any, a line on standard error says so at the end. An error handler that the user chose
    (PYTHONIOENCODING) is kept.
    """
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper) or out.errors not in ("strict", "surrogateescape"):
        yield
        return
    before = out.errors
    lacking: set[str] = set()

    def escape(error: UnicodeError) -> tuple[str | bytes, int]:
        if isinstance(error, UnicodeEncodeError):
            lacking.update(error.object[error.start : error.end])
        return codecs.backslashreplace_errors(error)

    codecs.register_error(_ESCAPING, escape)
    out.reconfigure(errors=_ESCAPING)
    try:
        yield
    finally:
        out.reconfigure(errors=before)
        if lacking:
            shown = ", ".join(ascii(character) for character in sorted(lacking)[:5])
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            print(
                f"nudging-hf: standard output is {codecs.lookup(out.encoding).name}, which lacks {shown}{more}: "
                "they are shown as escapes. Set PYTHONIOENCODING=utf-8 to see the characters.",
                file=sys.stderr,
            )
