"""What engines that write rows of nudged answers have in common. It knows places, rows and chunks, never passes.

A request is prepared in a thread of its own, one after another, which keeps the draws of seeded requests apart. Its
answers then wait until there is a place for them among those that are being written.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import StoppingCriteria

from ..core.generate import prepare
from ..core.row import Row
from ..core.transformers_private import input_device
from ..core.vocabulary import Vocabulary
from ..count_penalties import CountPenalties
from ..pair import Pair
from .engine import AnswerFailed, AnswerRequest, Chunk, Logprobs, QueueFull, TokenLogprob, Unavailable

logger = logging.getLogger(__name__)

_SHUTTING_DOWN = "The server is shutting down."
POLL_SECONDS = 0.02


class RowEngine(ABC):
    """An [`Engine`] without the part that writes.

    Its subclasses move answers from `_waiting` to `_running` and write them, and take them out of `_running` when they
    have ended. Both change only under `_changed`.

    Args:
        pair: both models and their tokenizers. Of the base its configs are enough.
        max_running: how many answers are written at once.
        max_waiting: how many more may wait for a place.
        parameters: the parameters of nudging that hold where a request does not set them, in place of those of the
            base's generation config.
        context_length: how many tokens a prompt and its answer may have together; by default as many as the base was
            trained on, by its config.
    """

    # Errors whose message is for the client. Of others it is told the kind.
    _told: ClassVar[tuple[type[Exception], ...]] = (ValueError,)

    def __init__(
        self,
        pair: Pair,
        max_running: int,
        max_waiting: int,
        parameters: Mapping[str, Any] | None,
        context_length: int | None,
    ):
        own = getattr(pair.base.config.get_text_config(), "max_position_embeddings", None)
        self.context_length: int | None = own if context_length is None else context_length
        self.tokenizer = pair.tokenizer
        self.nudging_tokenizer = pair.nudging_tokenizer
        self.samples_by_default = bool(pair.base.generation_config.do_sample)
        self.max_running = max_running
        self.max_waiting = max_waiting
        self._pair = pair
        self._vocabulary = Vocabulary(pair.tokenizer)
        self._parameters = dict(parameters or {})
        self._changed = threading.Condition()
        self._preparing = 0
        self._waiting: deque[Writing] = deque()
        self._running: list[Writing] = []
        self._is_closing = False
        self._preparation = ThreadPoolExecutor(1, "nudging-preparation")

    @property
    def is_ready(self) -> bool:
        return not self._is_closing

    async def submit(self, request: AnswerRequest) -> RowAnswers:
        """Takes a request: see [`Engine.submit`]."""
        self._reserve(request.n)
        answers = RowAnswers(self, asyncio.get_running_loop(), request.n)
        try:
            rows = await self._rows(request)
        except BaseException:
            with self._changed:
                self._preparing -= request.n
            raise
        with self._changed:
            self._preparing -= request.n
            if self._is_closing:
                raise Unavailable(_SHUTTING_DOWN)
            self._waiting += [Writing(answers, index, row, request) for index, row in enumerate(rows)]
            self._wake()
        return answers

    async def shutdown(self, grace: float) -> None:
        """Ends the work: see [`Engine.shutdown`]."""
        with self._changed:
            self._is_closing = True
            waiting = list(self._waiting)
            self._waiting.clear()
        self._give_up(waiting)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while self._running and loop.time() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        await self._end()
        self._preparation.shutdown(wait=False)

    def cancel(self, answers: RowAnswers) -> None:
        """Gives up the answers to a request, which are closed. Those that are being written end a little later."""
        with self._changed:
            self._waiting = deque(each for each in self._waiting if each.answers is not answers)
            self._wake()

    @abstractmethod
    def _wake(self) -> None:
        """Answers have begun to wait, or were given up. It is called under `_changed`."""

    @abstractmethod
    async def _end(self) -> None:
        """Gives up what is still being written, and lets go of all. It may be called again."""

    async def _rows(self, request: AnswerRequest) -> list[Row]:
        """The rows of a request. A `ValueError` says why there are none."""
        return await asyncio.get_running_loop().run_in_executor(self._preparation, self._prepare, request)

    def _reserve(self, n: int) -> None:
        capacity = self.max_running + self.max_waiting
        if n > capacity:
            raise ValueError(f"This server has room for {capacity} answers, got a request for {n}.")
        with self._changed:
            if not self.is_ready:
                raise Unavailable(_SHUTTING_DOWN)
            if len(self._running) + len(self._waiting) + self._preparing + n > capacity:
                raise QueueFull("Too many requests wait for an answer: try again later.")
            self._preparing += n

    def _prepare(self, request: AnswerRequest) -> list[Row]:
        """The rows of a request, as `generate` would begin to write them."""
        pair, device, length = self._pair, input_device(self._pair.base), len(request.input_ids)
        ids = torch.tensor([request.input_ids], device=device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if request.nudging_input_ids is not None:
            inputs["nudging_input_ids"] = torch.tensor([request.nudging_input_ids], device=device)
        wants_logits = request.top_logprobs is not None
        arguments: dict[str, Any] = {
            "nudging_config": self._parameters,
            "num_return_sequences": request.n,
            "return_dict_in_generate": wants_logits,
            "output_logits": wants_logits,
            **request.arguments,
        }
        if request.stop:
            arguments["stopping_criteria"] = [StopText(self._vocabulary, request.stop, length)]
        if request.presence_penalty or request.frequency_penalty:
            arguments["logits_processor"] = [
                CountPenalties(request.presence_penalty, request.frequency_penalty, length)
            ]
        seed = secrets.randbits(63) if request.seed is None else request.seed
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return prepare(pair.base, **pair.arguments, **inputs, **arguments).rows

    def _tell(self, writing: Writing, is_finished: bool) -> None:
        """Sends what is new of an answer, or the error that has ended it."""
        try:
            if writing.row.error is not None:
                raise writing.row.error
            writing.tell(is_finished)
        except Exception as error:
            logger.error("An answer failed.", exc_info=error)
            writing.answers.send(AnswerFailed(self._reason(error)))

    def _give_up(self, writings: list[Writing]) -> None:
        for each in writings:
            each.answers.send(Unavailable(_SHUTTING_DOWN))

    def _reason(self, error: Exception) -> str:
        """What a client is told of an error."""
        return str(error) if isinstance(error, self._told) else f"The models failed with {type(error).__name__}."


class RowAnswers:
    """The answers to a request, as they are written: see [`Answers`]."""

    def __init__(self, engine: RowEngine, loop: asyncio.AbstractEventLoop, n: int):
        self.is_closed = False
        self._engine = engine
        self._loop = loop
        self._unfinished = n
        self._queue: asyncio.Queue[Chunk | Exception] = asyncio.Queue()

    def __aiter__(self) -> RowAnswers:
        return self

    async def __anext__(self) -> Chunk:
        if not self._unfinished:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        self._unfinished -= item.finish_reason is not None
        return item

    def close(self) -> None:
        """Gives up what is not finished."""
        self._unfinished = 0
        if not self.is_closed:
            self.is_closed = True
            self._engine.cancel(self)

    def send(self, item: Chunk | Exception) -> None:
        """Sends a chunk, or an error after which nothing follows, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # The loop is closed, so nobody waits any more.
            self.is_closed = True


@dataclass(eq=False)
class Writing:
    """An answer that is being written or waits for a place.

    Args:
        answers: where it is sent.
        index: which of them it is.
        row: the answer itself.
        request: what was asked.
        told: how many of its tokens have been sent.
    """

    answers: RowAnswers
    index: int
    row: Row
    request: AnswerRequest
    told: int = 0

    def tell(self, is_finished: bool) -> None:
        """Sends what is new."""
        row, top = self.row, self.request.top_logprobs
        end = len(row.answer.ids) - row.end_marks
        if top is not None:
            end = min(end, len(row.predictions))  # The base has not yet read the rest.
        start, self.told = self.told, end
        if end > start or is_finished:
            logprobs = None if top is None else tuple(_logprobs(row, place, top) for place in range(start, end))
            reason = _finish_reason(row) if is_finished else None
            ids, nudged = tuple(row.answer.ids[start:end]), tuple(row.nudged[start:end])
            self.answers.send(Chunk(self.index, ids, nudged, logprobs, reason))


class StopText(StoppingCriteria):
    """Ends an answer whose text has one of these strings. The prompt is not looked at.

    transformers' own criterion also finds a string that begins in the prompt, and it takes a table of the whole
    vocabulary for each set of strings.

    Args:
        vocabulary: the base's.
        stop: the strings.
        prompt_length: how many tokens stand before the answer.
    """

    def __init__(self, vocabulary: Vocabulary, stop: tuple[str, ...], prompt_length: int):
        self._vocabulary = vocabulary
        self._stop = [each.encode() for each in stop]
        self._longest = max(map(len, self._stop))
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Whether a string is complete with the last token.

        Args:
            input_ids: of shape (batch, length).

        Returns:
            A tensor of shape (batch,).
        """
        found = [self._is_complete(ids) for ids in input_ids[:, self._prompt_length :].tolist()]
        return torch.tensor(found, device=input_ids.device)  # type: ignore[return-value]

    def _is_complete(self, ids: list[int]) -> bool:
        if not ids:
            return False
        tail = self._vocabulary.bytes_of(ids[-1])
        missing = self._longest - 1
        for token in reversed(ids[:-1]):
            if missing <= 0:
                break
            new = self._vocabulary.bytes_of(token)
            tail, missing = new + tail, missing - len(new)
        return any(each in tail for each in self._stop)


def _finish_reason(row: Row) -> str:
    assert row.finish_reason is not None
    # The server has no other criterion than `StopText`.
    return "stop_string" if row.finish_reason == "stopping_criteria" else row.finish_reason


def _logprobs(row: Row, place: int, top: int) -> Logprobs:
    """What the base said of a token, whose logits are not needed any more then."""
    logits = row.predictions[place].logits
    assert logits is not None
    row.predictions.forget_logits(place)
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    alternatives = tuple(map(TokenLogprob, ids.tolist(), values.tolist()))
    return Logprobs(logprobs[row.answer.ids[place]].item(), alternatives)
