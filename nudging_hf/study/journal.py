"""A file of finished work, from which a run that was killed goes on. It knows keys and results, never the work."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Journal:
    """The results of a run, each under the key of the piece of work that made it.

    The file holds JSON lines: first the setup of the run, then one line for each result. A result is there once
    `once` returns, even if the process is killed then. Text after the last line break was being written when a
    process was killed, and is dropped.

    Args:
        path: the file, which is created if there is none; `None` keeps the results in memory alone.
        setup: everything that the results depend on, in values that JSON has (lists, no tuples).

    Raises:
        ValueError: if the file has another setup, or is no journal.
    """

    def __init__(self, path: str | Path | None, setup: Mapping[str, Any]):
        self._path = None if path is None else Path(path)
        self._results: dict[str, Any] = {}
        if self._path is None:
            return
        written = self._path.read_bytes() if self._path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        if whole:
            self._read(whole, setup)
        elif not _line(setup).startswith(written):  # Otherwise it is the line of the setup, half written.
            raise self._no_journal()
        if whole != written:
            logger.warning("%s ends in half a line, which was being written when a run was broken off.", path)
            os.truncate(self._path, len(whole))
        if not whole:
            self._append(setup)

    @property
    def results(self) -> list[Any]:
        """All results, in the order in which they were finished."""
        return list(self._results.values())

    def find(self, key: Mapping[str, Any]) -> Any:
        """The result under a key; `None` if that work is not finished."""
        return self._results.get(_text(key))

    def once(
        self, key: Mapping[str, Any], work: Callable[[], Any], read: Callable[[Any], Any] = lambda row: row
    ) -> Any:
        """The result under a key. Work that is not finished yet is done now, and its result is written down.

        Args:
            key: what tells this piece of work from all others, in values that JSON has.
            work: does it, and returns something that JSON has, but not `None`.
            read: makes of a result what is returned.

        Raises:
            ValueError: if `read` cannot read what the file has under the key.
        """
        found = self.find(key)
        if found is None:
            found = work()
            self._append({"key": key, "result": found})
            self._results[_text(key)] = found
            return read(found)
        try:
            return read(found)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._no_journal() from error

    def _read(self, whole: bytes, setup: Mapping[str, Any]) -> None:
        try:
            before, *rows = [json.loads(line) for line in whole.splitlines()]
            self._results = {_text(row["key"]): row["result"] for row in rows}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._no_journal() from error
        if not isinstance(before, dict):
            raise self._no_journal()
        other = [name for name in {**before, **setup} if before.get(name) != setup.get(name)]
        if other:
            raise ValueError(
                f"{self._path} belongs to a run with another setup ({', '.join(other)} differ): give another place, "
                "or delete it, and it is begun anew."
            )

    def _no_journal(self) -> ValueError:
        return ValueError(f"{self._path} is no file of finished work: give another place, and one is begun there.")

    def _append(self, row: Mapping[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_line(row))


def digest(value: Any) -> str:
    """A short stand-in for a long part of a setup, such as all prompts; `value` is one that JSON has."""
    return hashlib.sha256(_text(value).encode("ascii")).hexdigest()


def model_setup(model: Any) -> str:
    """What a setup says about a model of transformers."""
    return f"{model.name_or_path or type(model).__name__}, {model.num_parameters()} parameters, {model.dtype}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode("ascii")
