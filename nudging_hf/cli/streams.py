"""Standard input and output in whatever encoding they have. It knows bytes and characters, never commands."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

_ESCAPING = "nudging_hf.escaping"


def open_closed_streams() -> None:
    """Puts the null device, to the end of the process, in the place of each standard stream that is closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def refuse_undecoded(text: str, what: str, encoding: str) -> None:
    """Refuses a text with bytes that could not be decoded, for which Python lets surrogate code points stand.

    Args:
        text: as Python read it, with the error handler "surrogateescape".
        what: what the text is, as the subject of a sentence.
        encoding: in which it was read.

    Raises:
        ValueError: where there is such a byte, saying what stands before it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else "half of a character of UTF-16"
        before = text[max(0, error.start - 20) : error.start]
        where = f"behind {before!r}" if before else "at its beginning"
        name = codecs.lookup(encoding).name
        mend = "give it as UTF-8" if name == "utf-8" else "set PYTHONUTF8=1, and give it as UTF-8"
        raise ValueError(f"{what} is no text in {name}: {where} stands {found}; {mend}.") from error


def refuse_undecoded_arguments(arguments: Sequence[str]) -> None:
    """Refuses arguments of the command line with bytes that are no text.

    Paths are no exception: a path is written into reports, which are UTF-8.
    """
    for number, argument in enumerate(arguments, start=1):
        refuse_undecoded(argument, f"Argument {number}", sys.getfilesystemencoding())


@contextmanager
def standard_input() -> Iterator[TextIO]:
    """Standard input, with a surrogate code point for each byte that cannot be decoded.

    So one such byte spoils its own line, and not all that was read ahead: see `refuse_undecoded`.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # Text that never was bytes.
        yield sys.stdin
        return
    stream = io.TextIOWrapper(buffer, encoding=sys.stdin.encoding, errors="surrogateescape")
    try:
        yield stream
    finally:
        stream.detach()  # Else it would close standard input.


def keep_undecoded_bytes_of_typed_lines() -> None:
    """Has `input` do what `standard_input` does."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


@contextmanager
def escaping_output() -> Iterator[None]:
    r"""Lets standard output show characters that its encoding lacks as escapes such as \u20ac.

    At the end a line on standard error says so. An error handler that the user chose (PYTHONIOENCODING) stays.
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
                "escapes stand there instead. Set PYTHONIOENCODING=utf-8 to have the characters.",
                file=sys.stderr,
            )
