"""A file of finished work, from which a run that was killed goes on. It knows lines and setups, never the work."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Journal:
    """JSON lines: first the setup of a run, then a row for each piece of its work that is finished.

    A row is there once `add` returns, even if the process is killed then. What stands behind the last line break was
    being written when a process was killed, and is dropped.

    Args:
        path: of the file, which is begun where there is none.
        setup: all on which the rows depend, as JSON has it: lists, no tuples.

    Attributes:
        rows: those of the file, in its order.

    Raises:
        ValueError: where the file has another setup, or is no journal.
    """

    def __init__(self, path: str | Path, setup: Mapping[str, Any]):
        self._path = Path(path)
        self.rows: list[dict[str, Any]] = []
        written = self._path.read_bytes() if self._path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        if whole:
            self._read(whole, setup)
        elif not _line(setup).startswith(written):  # Else it is the setup's own line, half written.
            raise self._no_journal()
        if whole != written:
            logger.warning("%s ends in half a line, which was being written when a run was broken off.", path)
            os.truncate(self._path, len(whole))
        if not whole:
            self._append(setup)

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a row down."""
        self._append(row)
        self.rows.append(dict(row))

    def _read(self, whole: bytes, setup: Mapping[str, Any]) -> None:
        try:
            before, *rows = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise self._no_journal() from error
        if not all(isinstance(row, dict) for row in (before, *rows)):
            raise self._no_journal()
        other = [name for name in {**before, **setup} if before.get(name) != setup.get(name)]
        if other:
            raise ValueError(
                f"{self._path} is of a run with another setup ({', '.join(other)} differ): give another place, or "
                "delete it, and it is begun anew."
            )
        self.rows = rows

    def _no_journal(self) -> ValueError:
        return ValueError(f"{self._path} is no file of finished work: give another place, and one is begun there.")

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(_line(row))


def digest(value: Any) -> str:
    """A short stand-in for a long part of a setup, such as all prompts; `value` is of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def model_setup(model: Any) -> str:
    """What a setup says of a model of transformers."""
    return f"{model.name_or_path or type(model).__name__}, {model.num_parameters()} parameters, {model.dtype}"


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode("ascii")
