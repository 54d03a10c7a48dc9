"""Adds to vLLM's replies who wrote them, and makes errors of answers that failed. It knows JSON, never an engine.

Each choice gets the field `nudging` as in `nudging-hf serve`: its `spans` by the nudging model in characters of the
text, and at its end the nudge `rate` and the `finish_reason`. A chunk of a stream has the spans of its own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ...core.vocabulary import Vocabulary
from ...provenance import Piece, PieceReader, add_stretch
from .reports import Report

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# "2_cmpl-NAME-1-0a1b2c3d" is the third answer to the second prompt. A chat has one prompt, and the end may be missing.
_REQUEST_ID = re.compile(r"(?:(?P<answer>\d+)_)?(?:chatcmpl-.*|cmpl-.*?-(?P<prompt>\d+)(?:-[0-9a-f]{8})?)", re.DOTALL)


def choice_index(request_id: str, answers: int) -> int:
    """Which choice of the reply a request of the engine is.

    Args:
        request_id: the engine's name for it.
        answers: how many answers each prompt has (`n`).
    """
    found = _REQUEST_ID.fullmatch(request_id)
    return 0 if found is None else int(found["prompt"] or 0) * answers + int(found["answer"] or 0)


def with_length(message: Message, body: bytes) -> Message:
    """A message, or a scope, whose headers tell the length of this body."""
    others = [each for each in message["headers"] if each[0].lower() != b"content-length"]
    return {**message, "headers": [*others, (b"content-length", str(len(body)).encode())]}


def error_body(status: int, message: str) -> bytes:
    """An error in the form of OpenAI's."""
    kind = "invalid_request_error" if status < 500 else "internal_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


async def send_error(send: Send, status: int, message: str) -> None:
    """Answers a request with an error."""
    body = error_body(status, message)
    headers = [(b"content-type", b"application/json")]
    await send(with_length({"type": "http.response.start", "status": status, "headers": headers}, body))
    await send({"type": "http.response.body", "body": body})


class _Authors:
    """Who wrote one answer, as far as it was told. vLLM may cut the answer short, at a stop string.

    Args:
        vocabulary: the base's.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._reader = PieceReader(vocabulary)
        self._text = ""
        self._stretches: list[tuple[int, int]] = []  # Of the nudging model, in characters.
        self._tokens: list[tuple[int, bool]] = []  # Where each token begins, and whether the nudging model wrote it.
        self._finish_reason = "stop_string"  # Every other end is the worker's.
        self._given = 0  # How many characters vLLM has sent.
        self._is_known = True

    def read(self, said: dict[str, Any]) -> None:
        for token, nudged in zip(said.get("ids", ()), said.get("nudged", ()), strict=True):
            self._tokens.append((len(self._text), nudged))
            self._add(self._reader.read(token, nudged))
        if "finish_reason" in said:
            self._add(self._reader.finish())
            self._finish_reason = said["finish_reason"]

    def _add(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.nudged:
                add_stretch(self._stretches, len(self._text), len(self._text) + len(piece.text))
            self._text += piece.text

    def report(self, text: str, is_last: bool) -> dict[str, Any]:
        """Who wrote the next text that vLLM sends, and in the last chunk of the answer how it ended."""
        start, end = self._given, self._given + len(text)
        self._given = end
        # A text with the prompt before it (`echo`), or without the thoughts that a parser takes out, has other places.
        self._is_known = self._is_known and self._text.startswith(text, start)
        report: dict[str, Any] = {}
        if self._is_known:
            within = [(max(a, start), min(b, end)) for a, b in self._stretches if a < end and b > start]
            report["spans"] = within
        if is_last:
            is_cut = self._is_known and end < len(self._text)
            authors = [nudged for place, nudged in self._tokens if not is_cut or place < end]
            report |= {"rate": sum(authors) / max(1, len(authors)), "finish_reason": self._finish_reason}
        return report


class Replies:
    """Takes the place of an ASGI application's `send`.

    Args:
        send: what is replaced.
        report: of the request.
        vocabulary: the base's.
        answers: how many answers each prompt has (`n`).
    """

    def __init__(self, send: Send, report: Report, vocabulary: Vocabulary, answers: int):
        self._send = send
        self._report = report
        self._vocabulary = vocabulary
        self._answers = answers
        self._authors: dict[int, _Authors] = {}  # By the choice, as are the errors.
        self._errors: dict[int, tuple[int, str]] = {}
        self._start: Message = {}
        self._sends: Callable[[Message], Awaitable[None]] = send  # What sends the parts of the body.
        self._held = b""  # A whole reply so far, or the beginning of an event.

    async def __call__(self, message: Message) -> None:
        """Sends a message of the reply."""
        if message["type"] == "http.response.body":
            return await self._sends(message)
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            kind = headers.get(b"content-type", b"").partition(b";")[0]
            if message["status"] == 200 and b"content-encoding" not in headers:
                if kind == b"application/json":
                    self._start, self._sends = message, self._send_whole
                    return None
                if kind == b"text/event-stream":
                    self._sends = self._send_events
        await self._send(message)

    async def _send_events(self, message: Message) -> None:
        *events, self._held = (self._held + message.get("body", b"")).split(b"\n\n")
        if not message.get("more_body", False) and self._held:
            events, self._held = [*events, self._held], b""
        await self._send({**message, "body": b"".join(self._event(event) + b"\n\n" for event in events)})

    async def _send_whole(self, message: Message) -> None:
        self._held += message.get("body", b"")
        if message.get("more_body", False):
            return
        reply = json.loads(self._held)
        self._read()
        if self._errors:
            return await send_error(self._send, *next(iter(self._errors.values())))
        self._mark(reply)
        body = json.dumps(reply, separators=(",", ":")).encode()
        await self._send(with_length(self._start, body))
        await self._send({"type": "http.response.body", "body": body})

    def _event(self, event: bytes) -> bytes:
        """An event of a stream, with who wrote its text, or an error in the place of the last one of an answer."""
        head, _, data = event.partition(b"data: ")
        if head or not data.startswith(b"{"):
            return event
        chunk = json.loads(data)
        if not chunk.get("choices"):
            return event
        self._read()
        for choice in chunk["choices"]:
            if choice.get("finish_reason") and choice["index"] in self._errors:
                return b"data: " + error_body(*self._errors[choice["index"]])
        self._mark(chunk)
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode()

    def _read(self) -> None:
        for said in self._report.news():
            index = choice_index(said["request"], self._answers)
            if "error" in said:
                self._errors[index] = (said["status"], said["error"])
            else:
                self._authors.setdefault(index, _Authors(self._vocabulary)).read(said)

    def _mark(self, reply: dict[str, Any]) -> None:
        for choice in reply.get("choices", ()):
            message = choice.get("message", choice.get("delta"))
            text = choice.get("text") if message is None else message.get("content")
            authors, is_last = self._authors.get(choice["index"]), bool(choice.get("finish_reason"))
            if authors is not None and (text or is_last):
                choice["nudging"] = authors.report(text or "", is_last)
