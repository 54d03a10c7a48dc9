"""The engine that runs both models in this process. It knows rows and forward passes, never HTTP or text of prompts.

One thread makes all forward passes. Between two of them it lets waiting answers join those that are being written, and
cancelled ones leave. So each answer is that of a call of its own, and no answer waits for the end of another. A second
thread prepares requests, one after another, which keeps the draws of seeded requests apart.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from ..core.cached_lm import cached_lm
from ..core.decoding import NudgedDecoder
from ..core.draft_policy import borrowed_draft_length
from ..core.drafting import Drafter
from ..core.generate import prepare
from ..core.row import Row
from ..core.transformers_private import input_device
from ..core.vocabulary import Vocabulary
from ..pair import Pair
from .engine import AnswerFailed, AnswerRequest, Chunk, Logprobs, QueueFull, Stats, TokenLogprob, Unavailable

logger = logging.getLogger(__name__)

_SHUTTING_DOWN = "The server is shutting down."
_POLL_SECONDS = 0.02


class InProcessEngine:
    """Writes the nudged answers of a pair that is in memory. Its threads end with [`InProcessEngine.shutdown`].

    Args:
        pair: both models and their tokenizers.
        max_running: how many answers are written at once.
        max_waiting: how many more may wait for a place.
        parameters: the parameters of nudging that hold where a request does not set them, in place of those of the
            base's generation config.
        context_length: how many tokens a prompt and its answer may have together; by default as many as the base was
            trained on, by its config.
    """

    def __init__(
        self,
        pair: Pair,
        max_running: int = 8,
        max_waiting: int = 64,
        parameters: Mapping[str, Any] | None = None,
        context_length: int | None = None,
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
        self._drafts = pair.nudging_config(self._parameters).num_draft_tokens
        self._changed = threading.Condition()
        self._preparing = 0
        self._waiting: deque[_Writing] = deque()
        self._running: list[_Writing] = []
        self._is_closing = self._is_over = False
        self._passes = (0, 0)  # Of decoders that are gone.
        self._decoder: NudgedDecoder | None = None
        self._lent = ExitStack()
        self._preparation = ThreadPoolExecutor(1, "nudging-preparation")
        self._thread = threading.Thread(target=self._work, name="nudging-decoder", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return not self._is_closing and self._thread.is_alive()

    def stats(self) -> Stats:
        with self._changed:
            base, nudging = self._passes
            if self._decoder is not None:
                base += self._decoder.base.forward_passes
                nudging += self._decoder.nudging.forward_passes
            return Stats(len(self._running), len(self._waiting) + self._preparing, base, nudging)

    async def submit(self, request: AnswerRequest) -> InProcessAnswers:
        """Takes a request: see [`Engine.submit`]."""
        self._reserve(request.n)
        loop = asyncio.get_running_loop()
        answers = InProcessAnswers(self, loop, request.n)
        try:
            rows = await loop.run_in_executor(self._preparation, self._prepare, request)
        except BaseException:
            with self._changed:
                self._preparing -= request.n
            raise
        with self._changed:
            self._preparing -= request.n
            if self._is_closing:
                raise Unavailable(_SHUTTING_DOWN)
            self._waiting += [_Writing(answers, index, row, request) for index, row in enumerate(rows)]
            self._changed.notify_all()
        return answers

    async def shutdown(self, grace: float) -> None:
        """Ends the work: see [`Engine.shutdown`]."""
        with self._changed:
            self._is_closing = True
            waiting = list(self._waiting)
            self._waiting.clear()
        for each in waiting:
            each.answers.fail(Unavailable(_SHUTTING_DOWN))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while self._running and self._thread.is_alive() and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        while self._thread.is_alive():
            await asyncio.sleep(_POLL_SECONDS)
        self._preparation.shutdown(wait=False)

    def cancel(self, answers: InProcessAnswers) -> None:
        """Gives up the answers to a request. The thread drops those that it writes before its next pass."""
        with self._changed:
            self._waiting = deque(each for each in self._waiting if each.answers is not answers)
            self._changed.notify_all()

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
        pair, device = self._pair, input_device(self._pair.base)
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
            arguments["stopping_criteria"] = [StopText(self._vocabulary, request.stop, len(request.input_ids))]
        seed = secrets.randbits(63) if request.seed is None else request.seed
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return prepare(pair.base, **pair.arguments, **inputs, **arguments).rows

    # The thread that makes the forward passes.

    def _work(self) -> None:
        try:
            with torch.no_grad():
                while self._await_work():
                    self._turn()
        finally:
            with self._changed:
                self._is_closing = True
                left = [*self._running, *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for each in left:
                each.answers.fail(Unavailable(_SHUTTING_DOWN))
            self._drop_decoder()

    def _await_work(self) -> bool:
        """Waits until there is something to write; returns whether the work goes on."""
        with self._changed:
            while not (self._is_over or self._running or self._waiting):
                self._changed.wait()
            return not self._is_over

    def _turn(self) -> None:
        """Lets answers join and leave, makes one forward pass, and tells what is new."""
        try:
            self._step(self._decoder_at_work())
        except Exception as error:
            logger.error("A forward pass failed. All answers that were being written are given up.", exc_info=error)
            with self._changed:
                lost, self._running = self._running, []
            for each in lost:
                each.answers.fail(AnswerFailed(_reason(error)))
        if not self._running:
            self._drop_decoder()

    def _step(self, decoder: NudgedDecoder) -> None:
        with self._changed:
            gone = [each for each in self._running if each.answers.is_closed]
            joining = []
            self._running = [each for each in self._running if each not in gone]
            while self._waiting and len(self._running) < self.max_running:
                joining.append(self._waiting.popleft())
                self._running.append(joining[-1])
        for each in gone:
            decoder.cancel(each.row)
        for each in joining:
            decoder.admit(each.row)
        if not self._running:
            return
        decoder.step()
        told = self._running
        with self._changed:  # Before it is told, so that whoever hears of the end finds a free place.
            self._running = [each for each in told if each.row in decoder.rows]
        for each in told:
            try:
                self._tell(each, is_finished=each not in self._running)
            except Exception as error:
                logger.error("An answer failed.", exc_info=error)
                each.answers.fail(AnswerFailed(_reason(error)))

    def _tell(self, writing: _Writing, is_finished: bool) -> None:
        """Sends what is new of an answer.

        Raises:
            Exception: the error that has ended it, if one did.
        """
        row = writing.row
        if row.error is not None:
            raise row.error
        end = len(row.answer.ids) - row.end_marks
        top = writing.request.top_logprobs
        if top is not None:
            end = min(end, len(row.predictions))  # The base has not yet read the rest.
        start, writing.told = writing.told, end
        if end > start or is_finished:
            logprobs = None if top is None else tuple(_logprobs(row, place, top) for place in range(start, end))
            writing.answers.put(
                Chunk(
                    writing.index,
                    tuple(row.answer.ids[start:end]),
                    tuple(row.nudged[start:end]),
                    logprobs,
                    _finish_reason(row) if is_finished else None,
                )
            )

    def _decoder_at_work(self) -> NudgedDecoder:
        if self._decoder is None:
            base, nudging = (cached_lm(model, rows=0) for model in (self._pair.base, self._pair.nudging_model))
            setting = ("served", self.max_running, base.cache_kind)
            policy = self._lent.enter_context(borrowed_draft_length(base.model, nudging.model, setting))
            drafter = Drafter(self._drafts, policy, lambda numbers: numbers)
            self._decoder = NudgedDecoder(base, nudging, drafter, isolates_errors=True)
        return self._decoder

    def _drop_decoder(self) -> None:
        """Lets go of the caches of both models."""
        with self._changed:
            if self._decoder is not None:
                base, nudging = self._passes
                self._passes = (
                    base + self._decoder.base.forward_passes,
                    nudging + self._decoder.nudging.forward_passes,
                )
            self._decoder = None
        self._lent.close()
        if self._pair.base.device.type == "cuda":
            torch.cuda.empty_cache()


class InProcessAnswers:
    """The answers to a request, as they are written: see [`Answers`]."""

    def __init__(self, engine: InProcessEngine, loop: asyncio.AbstractEventLoop, n: int):
        self.is_closed = False
        self._engine = engine
        self._loop = loop
        self._unfinished = n
        self._queue: asyncio.Queue[Chunk | Exception] = asyncio.Queue()

    def __aiter__(self) -> InProcessAnswers:
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

    def put(self, chunk: Chunk) -> None:
        """Sends a chunk, from any thread."""
        self._send(chunk)

    def fail(self, error: Exception) -> None:
        """Sends an error, from any thread. Nothing more follows."""
        self._send(error)

    def _send(self, item: Chunk | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # The loop is closed, so nobody waits any more.
            self.is_closed = True


@dataclass(eq=False)
class _Writing:
    """An answer that is being written or waits for a place.

    Args:
        answers: where it is sent.
        index: which of them it is.
        row: the answer itself.
        request: what was asked.
        told: how many of its tokens have been sent.
    """

    answers: InProcessAnswers
    index: int
    row: Row
    request: AnswerRequest
    told: int = 0


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


def _reason(error: Exception) -> str:
    """What a client is told of an error: nudging's own message, or else only its kind."""
    return str(error) if isinstance(error, ValueError) else f"The models failed with {type(error).__name__}."
