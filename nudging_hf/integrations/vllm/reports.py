"""What vLLM's worker tells the API server about a request: who wrote its tokens, how it ended, why it failed.

vLLM itself has no room for that. So the API server makes a file for each HTTP request, in a folder of its own, and the
file's name goes along in `vllm_xargs`. The worker adds to it before the engine is given the tokens: whoever reads it
with a reply finds all tokens of the reply. Where the two run on different machines nothing is told.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

KEY = "nudging_report"  # Of `vllm_xargs`.
_PREFIX = "nudging-hf-vllm-"
_NAME = re.compile(r"[a-z0-9_]{8}/[0-9a-f]{32}")


def tell(name: Any, request_id: str, **said: Any) -> None:
    """Adds to a report, if there is one.

    Args:
        name: what the request has under `KEY`. Only the name of a file that an API server has made is written to.
        request_id: the engine's name for the request. An HTTP request may come to several.
        said: what is told.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return
    line = json.dumps({"request": request_id, **said}).encode() + b"\n"
    try:
        file = os.open(Path(tempfile.gettempdir(), _PREFIX + name), os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        try:
            os.write(file, line)
        finally:
            os.close(file)
    except FileNotFoundError:  # The client has left, or the API server is on another machine.
        return
    except OSError as error:
        logger.warning_once(f"Who wrote which part of an answer cannot be told: {error}.")


class Reports:
    """The reports of one API server. Their folder is removed when the process ends."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def new(self) -> Report:
        """Makes a report. It must be closed."""
        return Report(self._folder / uuid.uuid4().hex)


class Report:
    """What is told of one HTTP request.

    Args:
        path: of its file, which is made.

    Attributes:
        name: the value of `KEY` in the request.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("x+b")
        self._line = b""  # The beginning of a line that is not whole yet.
        self.name = f"{path.parent.name.removeprefix(_PREFIX)}/{path.name}"

    def news(self) -> Iterator[dict[str, Any]]:
        """What has been told since the last call."""
        *lines, self._line = (self._line + self._file.read()).split(b"\n")
        return map(json.loads, lines)

    def close(self) -> None:
        """Removes the file. What is told later is dropped."""
        self._file.close()
        self._path.unlink(missing_ok=True)
