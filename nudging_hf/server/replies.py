"""Writes answers in the form of OpenAI's replies. It knows text, authors and fields, never HTTP or engines."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from ..core.vocabulary import Vocabulary
from ..provenance import add_stretch
from .engine import Chunk
from .protocol import (
    ChatChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    NudgingReport,
    TokenLogprobs,
    TopLogprob,
    Usage,
    finish_reason_of,
)
from .text import AnswerText, Delta, ToldToken

_LEAST_LOGPROB = -9999.0  # JSON has no −∞.


class Choice:
    """One answer, as far as it is written.

    Args:
        index: its place in the reply.
        vocabulary: the base's.
        stop: the strings that end it.
        tells_logprobs: whether log-probabilities were asked for.
    """

    def __init__(self, index: int, vocabulary: Vocabulary, stop: Sequence[str], tells_logprobs: bool):
        self.index = index
        self.tells_logprobs = tells_logprobs
        self.answer = AnswerText(vocabulary, stop)
        self.spans: list[tuple[int, int]] = []
        self.tokens: list[ToldToken] = []
        self.finish_reason: str | None = None

    def read(self, chunk: Chunk) -> Delta:
        """Reads a chunk of the answer, and returns what it adds."""
        delta = self.answer.read(chunk)
        for stretch in delta.nudged:
            add_stretch(self.spans, *stretch)
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason
        return delta

    def report(self, spans: Iterable[tuple[int, int]]) -> NudgingReport:
        """Who wrote these stretches, and how the answer ended, if it has."""
        if self.finish_reason is None:
            return NudgingReport(spans=list(spans))
        return NudgingReport(spans=list(spans), rate=self.answer.nudge_rate, finish_reason=self.finish_reason)


class ReplyForm:
    """The form of the replies to one request. Its subclasses say how chats and how completions look.

    Args:
        model: the name by which the model was asked.
        vocabulary: the base's.
    """

    endpoint: ClassVar[str]
    _prefix: ClassVar[str]
    _whole: ClassVar[Literal["chat.completion", "text_completion"]]
    _part: ClassVar[Literal["chat.completion.chunk", "text_completion"]]

    def __init__(self, model: str, vocabulary: Vocabulary):
        self.model = model
        self.vocabulary = vocabulary
        self._id = f"{self._prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def reply(self, choices: Sequence[Choice], usage: Usage) -> Completion:
        """The whole reply, when all answers are finished."""
        return self._completion(self._whole, [self._choice(each) for each in choices], usage)

    def opening(self, choice: Choice) -> list[Completion]:
        """What a stream says before the first text of a choice."""
        return []

    def parts(self, choice: Choice, delta: Delta) -> list[Completion]:
        """What a stream says of an addition to a choice."""
        parts: list[Any] = []
        is_last = delta.finish_reason is not None
        if delta.text or (delta.tokens and not is_last):
            parts.append(self._addition(choice, delta.text, delta.tokens, NudgingReport(spans=list(delta.nudged))))
        if is_last:
            rest = () if delta.text else delta.tokens
            parts.append(self._addition(choice, "", rest, choice.report(()), is_last=True))
        return [self._completion(self._part, [part]) for part in parts]

    def closing(self, usage: Usage) -> Completion:
        """The last thing that a stream says, if counts were asked for."""
        return self._completion(self._part, [], usage)

    def _completion(self, object: Any, choices: list[Any], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self._id, object=object, created=self._created, model=self.model, choices=choices, usage=usage
        )

    def _choice(self, choice: Choice) -> ChatChoice | CompletionChoice:
        raise NotImplementedError

    def _addition(
        self, choice: Choice, text: str, tokens: Sequence[ToldToken], report: NudgingReport, is_last: bool = False
    ) -> ChatChoice | CompletionChoice:
        raise NotImplementedError

    def _spelling(self, token: int) -> str:
        """A token as text; one that is no whole text, in the way of OpenAI's API, by its bytes."""
        written = self.vocabulary.bytes_of(token)
        if not written:
            return str(self.vocabulary.tokenizer.convert_ids_to_tokens(token))
        try:
            return written.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


class ChatForm(ReplyForm):
    """Chat completions."""

    endpoint = "chat.completions"
    _prefix = "chatcmpl"
    _whole = "chat.completion"
    _part = "chat.completion.chunk"

    def opening(self, choice: Choice) -> list[Completion]:
        delta = ChatDelta(role="assistant", content="")
        return [self._completion(self._part, [ChatChoice(index=choice.index, delta=delta)])]

    def _choice(self, choice: Choice) -> ChatChoice:
        assert choice.finish_reason is not None
        return ChatChoice(
            index=choice.index,
            message=ChatMessage(content=choice.answer.text),
            logprobs=self._logprobs(choice.tokens) if choice.tells_logprobs else None,
            finish_reason=finish_reason_of(choice.finish_reason),
            nudging=choice.report(choice.spans),
        )

    def _addition(
        self, choice: Choice, text: str, tokens: Sequence[ToldToken], report: NudgingReport, is_last: bool = False
    ) -> ChatChoice:
        return ChatChoice(
            index=choice.index,
            delta=ChatDelta(content=text) if text or not is_last else ChatDelta(),
            logprobs=self._logprobs(tokens) if choice.tells_logprobs and (tokens or not is_last) else None,
            finish_reason=finish_reason_of(choice.finish_reason) if is_last and choice.finish_reason else None,
            nudging=report,
        )

    def _logprobs(self, tokens: Sequence[ToldToken]) -> ChatLogprobs:
        return ChatLogprobs(
            content=[
                TokenLogprobs(
                    **self._token(told.token, told.logprobs.logprob),
                    top_logprobs=[TopLogprob(**self._token(*each)) for each in told.logprobs.top],
                )
                for told in tokens
            ]
        )

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        written = self.vocabulary.bytes_of(token)
        return {
            "token": self._spelling(token),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(written) if written else None,
        }


class CompletionForm(ReplyForm):
    """Completions."""

    endpoint = "completions"
    _prefix = "cmpl"
    _whole = "text_completion"
    _part = "text_completion"

    def _choice(self, choice: Choice) -> CompletionChoice:
        assert choice.finish_reason is not None
        return CompletionChoice(
            index=choice.index,
            text=choice.answer.text,
            logprobs=self._logprobs(choice.tokens) if choice.tells_logprobs else None,
            finish_reason=finish_reason_of(choice.finish_reason),
            nudging=choice.report(choice.spans),
        )

    def _addition(
        self, choice: Choice, text: str, tokens: Sequence[ToldToken], report: NudgingReport, is_last: bool = False
    ) -> CompletionChoice:
        return CompletionChoice(
            index=choice.index,
            text=text,
            logprobs=self._logprobs(tokens) if choice.tells_logprobs and (tokens or not is_last) else None,
            finish_reason=finish_reason_of(choice.finish_reason) if is_last and choice.finish_reason else None,
            nudging=report,
        )

    def _logprobs(self, tokens: Sequence[ToldToken]) -> CompletionLogprobs:
        spelt = [self._spelling(told.token) for told in tokens]
        own = [max(told.logprobs.logprob, _LEAST_LOGPROB) for told in tokens]
        return CompletionLogprobs(
            tokens=spelt,
            token_logprobs=own,
            top_logprobs=[
                {self._spelling(each): max(value, _LEAST_LOGPROB) for each, value in told.logprobs.top} | {token: one}
                for told, token, one in zip(tokens, spelt, own, strict=True)
            ],
            text_offset=[told.offset for told in tokens],
        )
