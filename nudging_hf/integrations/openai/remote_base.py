"""Nudges a base that an inference engine runs somewhere else, by OpenAI's API. It knows rows, never HTTP.

The nudging model runs here. Each phase of the base is one streamed request, which goes on from the ids of prompt and
answer and is cancelled at the first position where the base is unsure. What is asked and decided is the algorithm of
[`~core.rounds`]: this is another executor of it.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ...core.advance import end
from ...core.generate import loaded_vocabulary, prepare
from ...core.prompts import unpad
from ...core.rounds import Question
from ...core.row import Prediction, Row
from ...core.sampling import fold_in
from ...provenance import PieceReader
from ..described_base import described_base
from ..engine_decoder import EnginePass
from .completions import Completions, EngineUnavailable
from .engine_probe import Abilities
from .row_requests import RowRequests, num_logprobs
from .session import Counts, Session, Waiting
from .shared_writer import SharedWriter, waits

_MAX_REQUEST_TOKENS = 256  # An engine that does not notice that a request is cancelled decodes this many in vain.
_SEEDS = 1 << 31  # llama.cpp takes 32 bits.
# What stands where the nudging model has written and the base was not asked.
_UNASKED = Prediction(token=-1, score=math.nan, top1=math.nan, best=math.nan)
_NOT_TOLD = {
    "streamer": "call `stream`",
    "return_dict_in_generate": "each answer is a `RemoteAnswer`",
    "output_scores": "an engine does not tell them",
    "output_logits": "an engine does not tell them",
}


@dataclass(frozen=True)
class RemoteAnswer:
    """One answer.

    Args:
        ids: of the base's vocabulary, without the prompt. They end with the base's EOS if the nudging model ended it.
        nudged: for each id, whether the nudging model wrote it.
        base_top1_probs: the base's top-1 probability at each id; NaN where the base was not asked.
        finish_reason: as in [`NudgingOutput`], or "error".
        text: the answer without control tokens.
        error: what ended it, where something did.
        requests: how many requests it took, also failed ones.
        base_tokens: how many tokens the engine sent for it, used or not.
    """

    ids: list[int]
    nudged: list[bool]
    base_top1_probs: list[float]
    finish_reason: str
    text: str
    error: Exception | None = None
    requests: int = 0
    base_tokens: int = 0


class RemoteBase:
    """A base behind an OpenAI-compatible `/v1/completions`: vLLM, SGLang, llama.cpp's server, and others.

    The engine is tried before its first use, and refused with a reason if it cannot tell what nudging needs.

    Args:
        base_url (`str`):
            Of the API, such as "http://localhost:8000/v1".
        model (`str`):
            The model's name at the engine.
        base (`str` or `PreTrainedModel`, *optional*):
            The folder or Hub name of the base, of which only the configs are read, or a model on any device. By
            default it is `model`.
        tokenizer (*optional*):
            The base's. By default it is loaded from `base`.
        api_key_variable (`str`, defaults to "OPENAI_API_KEY"):
            The environment variable that holds the key. If it is not set, "none" is sent.
        max_concurrency (`int`, defaults to 32):
            How many answers are written at the same time; others wait.
        timeout (`float`, defaults to 120):
            How many seconds the engine may be silent in a request.
        retry_for (`float`, defaults to 600):
            How many seconds an answer waits for an engine that is busy, broken or gone, before it ends with an error.
            They begin anew with each token. Give more than a restart of the engine takes.
        stops_when_unsure (`bool`, defaults to `False`):
            Whether the engine itself ends a request where the base is unsure: see
            [`~integrations.vllm.stop_when_unsure`]. This is for greedy answers, the gate "top1" and a threshold that
            is a number.
        http_client (*optional*):
            An `AsyncClient` of httpx to be used instead of one's own. It is not closed.

    Attributes:
        described (`PreTrainedModel`): the base with its configs, perhaps without its weights.
        requests (`RowRequests`): what the engine is asked for a row, which refuses what it cannot be told.

    Example:
        ```python
        async with RemoteBase("http://localhost:8000/v1", "allenai/OLMo-2-1124-7B") as base:
            answers = await base.generate(prompts, nudging_model=nudger, nudge_threshold=0.3, max_new_tokens=200)
        ```
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        base: str | os.PathLike[str] | PreTrainedModel | None = None,
        tokenizer: Any = None,
        *,
        api_key_variable: str = "OPENAI_API_KEY",
        max_concurrency: int = 32,
        timeout: float = 120.0,
        retry_for: float = 600.0,
        stops_when_unsure: bool = False,
        http_client: Any = None,
    ):
        if max_concurrency < 1:
            raise ValueError(f"`max_concurrency` must be >= 1, got {max_concurrency!r}.")
        base = model if base is None else base
        self.described: Any = base if isinstance(base, PreTrainedModel) else described_base(base)
        self.max_concurrency = max_concurrency
        self._vocabulary = loaded_vocabulary(tokenizer, self.described, "tokenizer", "base")
        self.requests = RowRequests(self.described, self._vocabulary, stops_when_unsure)
        self._url, self._model, self._key_variable = base_url, model, api_key_variable
        self._timeout, self._retry_for = timeout, retry_for
        self._stops_when_unsure, self._http_client = stops_when_unsure, http_client
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, Session] = WeakKeyDictionary()

    def __repr__(self) -> str:
        parts = urlsplit(self._url)
        shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        return f"RemoteBase({shown!r}, {self._model!r})"

    @property
    def tokenizer(self) -> Any:
        """The base's."""
        return self._vocabulary.tokenizer

    async def __aenter__(self) -> RemoteBase:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections of the running event loop."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    async def check(self, nudge_gate: str = "top1", waits: bool = False) -> Abilities:
        """Tries the engine, as the first answer with a gate does, and returns what it can do.

        Args:
            nudge_gate: of the answers.
            waits: whether to wait up to `retry_for` seconds for an engine that is busy or not there.

        Raises:
            EngineError: if it cannot be used. The message says what is wrong, and which argument or flag mends it.
        """
        session, waiting = self._session(), Waiting(self._retry_for if waits else 0.0)
        while True:
            try:
                return await session.abilities(num_logprobs(nudge_gate))
            except EngineUnavailable as error:
                await waiting.after(error)

    def counts(self) -> Counts:
        """What the answers of the running event loop have taken so far."""
        session = self._sessions.get(asyncio.get_running_loop())
        return Counts(0, 0) if session is None else session.counts()

    async def generate(
        self,
        prompts: str | Sequence[Any] | Mapping[str, Any] | torch.Tensor,
        *,
        nudging_model: PreTrainedModel,
        nudging_prompts: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[RemoteAnswer]:
        """Writes the nudged answers of many prompts at once.

        Args:
            prompts (`str`, ids, a list of either, or what [`chat_inputs`] makes):
                The base's prompts.
            nudging_model (`PreTrainedModel`):
                The small aligned model. All answers of the event loop that it nudges share its passes.
            nudging_prompts (*optional*):
                Its prompts as ids. By default they are made from the base's.
            kwargs:
                The parameters of nudging, `nudging_tokenizer`, and what `generate` takes for limits and sampling
                (`max_new_tokens`, `stop_strings`, `max_time`, `do_sample`, `temperature`, `top_p`, `top_k`, `min_p`).
                Other processors of logits are refused, because the engine runs the base.

        Returns:
            The answers, in the order of the prompts. An error ends its own answer alone, and stands in it.

        Raises:
            ValueError: if no answer can be prepared.
            EngineError: if the engine cannot be used at all.
        """
        calls = self._calls(prompts, nudging_prompts)
        rows = await asyncio.to_thread(self._prepare_all, calls, nudging_model, kwargs)
        await self._try_engine(rows)
        pair = nudging_model, kwargs.get("nudging_tokenizer")
        tasks = [asyncio.create_task(self._answer(row, *pair)) for row in rows]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def generate_sync(self, prompts: Any, **kwargs: Any) -> list[RemoteAnswer]:
        """[`RemoteBase.generate`] in an event loop of its own, for programs that have none."""

        async def run() -> list[RemoteAnswer]:
            async with self:
                return await self.generate(prompts, **kwargs)

        return asyncio.run(run())

    async def stream(
        self,
        prompt: str | Sequence[int],
        *,
        nudging_model: PreTrainedModel,
        nudging_prompt: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[tuple[str, bool], None]:
        """Writes one answer, and yields each piece of its text and whether the nudging model wrote it.

        Args:
            prompt, nudging_model, nudging_prompt, kwargs: as in [`RemoteBase.generate`].

        Raises:
            Exception: what ended the answer, if something did.
        """
        calls = self._calls(prompt, None if nudging_prompt is None else [nudging_prompt])
        if len(calls) != 1:
            raise ValueError(f"`stream` takes one prompt, got {len(calls)}: call it once for each.")
        [row, *more] = await asyncio.to_thread(self._prepare_all, calls, nudging_model, kwargs)
        if more:
            raise ValueError(f"`stream` writes one answer, got `num_return_sequences={len(more) + 1}`: leave it out.")
        assert isinstance(row, Row)  # If there are none at all, the reason is raised.
        await self._try_engine([row])
        reader, done = PieceReader(self.tokenizer), 0
        async with aclosing(self.write(Work(row), nudging_model, kwargs.get("nudging_tokenizer"))) as steps:
            async for _ in steps:
                ids, nudged = row.answer.ids[done:], row.nudged[done:]
                done += len(ids)
                for token, by_nudging_model in zip(ids, nudged, strict=True):
                    for piece in reader.read(token, by_nudging_model):
                        yield piece.text, piece.nudged
        for piece in reader.finish():
            yield piece.text, piece.nudged
        if row.error is not None:
            raise row.error

    # Before an answer: prompts, rows, and what the engine is asked for.

    def _session(self) -> Session:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            key = os.environ.get(self._key_variable) or None
            completions = Completions(self._url, self._model, key, self._timeout, self._http_client)
            stop_fields = self.requests.stop_fields(2.0) if self._stops_when_unsure else None
            self._sessions[loop] = Session(completions, self._vocabulary, self.max_concurrency, stop_fields)
        return self._sessions[loop]

    def _calls(self, prompts: Any, nudging_prompts: Sequence[Sequence[int]] | None) -> list[dict[str, Any]]:
        """The prompts of each answer, as arguments of `prepare`."""
        if isinstance(prompts, Mapping):
            given = dict(prompts)
            if "nudging_input_ids" in given:
                nudging_prompts = unpad(given["nudging_input_ids"], given.get("nudging_attention_mask"))
            prompts = unpad(given["input_ids"], given.get("attention_mask"))
        if isinstance(prompts, torch.Tensor):
            prompts = prompts.tolist()
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        ids = [self.tokenizer(each)["input_ids"] if isinstance(each, str) else list(each) for each in prompts]
        if nudging_prompts is not None and len(nudging_prompts) != len(ids):
            raise ValueError(
                f"There are {len(nudging_prompts)} prompts of the nudging model, and {len(ids)} of the base: give as "
                "many in `nudging_prompts` as in `prompts`."
            )
        calls: list[dict[str, Any]] = [{"input_ids": torch.tensor([each], dtype=torch.long)} for each in ids]
        for call, nudging in zip(calls, nudging_prompts or (), strict=bool(nudging_prompts)):
            call["nudging_input_ids"] = torch.tensor([list(nudging)], dtype=torch.long)
        return calls

    def _prepare_all(
        self, calls: Sequence[Mapping[str, Any]], nudging_model: Any, kwargs: Mapping[str, Any]
    ) -> list[Row | Exception]:
        """The rows of each call, or why there are none. If there are none at all, the reason is raised."""
        if not hasattr(nudging_model, "generation_config"):
            raise ValueError(
                f"`nudging_model` must be a model of transformers, got {type(nudging_model).__name__}: load it with "
                "`AutoModelForCausalLM.from_pretrained`."
            )
        for name, instead in _NOT_TOLD.items():
            if kwargs.get(name):
                raise ValueError(
                    f"`{name}={kwargs[name]!r}` has no meaning for a remote base: {instead}; leave it out."
                )
        rows: list[Row | Exception] = []
        for call in calls:
            try:
                own = prepare(
                    self.described, **call, nudging_model=nudging_model, tokenizer=self.tokenizer, **kwargs
                ).rows
                for row in own:
                    self.requests.fields(row)
                rows += own
            except Exception as error:
                rows.append(error)
        if rows and all(isinstance(row, Exception) for row in rows):
            assert isinstance(rows[0], Exception)
            raise rows[0]
        return rows

    async def _try_engine(self, rows: Sequence[Row | Exception]) -> None:
        for gate in {row.request.config.nudge_gate for row in rows if isinstance(row, Row)}:
            await self.check(gate, waits=True)

    # One answer.

    async def _answer(self, row: Row | Exception, nudging_model: Any, nudging_tokenizer: Any) -> RemoteAnswer:
        if isinstance(row, Exception):
            return RemoteAnswer([], [], [], "error", "", row)
        work = Work(row)
        async with aclosing(self.write(work, nudging_model, nudging_tokenizer)) as steps:
            async for _ in steps:
                pass
        assert row.finish_reason is not None
        ids, said = row.answer.ids, row.predictions
        top1 = [said[i].top1 if i < len(said) and i not in work.untold else math.nan for i in range(len(ids))]
        reader = PieceReader(self.tokenizer)
        pieces = [piece.text for token in ids for piece in reader.read(token, False)]
        text = "".join([*pieces, *(piece.text for piece in reader.finish())])
        return RemoteAnswer(
            list(ids), list(row.nudged), top1, row.finish_reason, text, row.error, work.requests, work.base_tokens
        )

    async def write(self, work: Work, nudging_model: Any, nudging_tokenizer: Any = None) -> AsyncGenerator[None, None]:
        """Writes an answer to its end, and yields after each step. An error ends it, and is not raised.

        Args:
            work: a row that [`~core.generate.prepare`] has made with [`RemoteBase.described`].
            nudging_model, nudging_tokenizer: with which it was prepared.
        """
        session, row = self._session(), work.row
        writer = session.writer(nudging_model, nudging_tokenizer)
        async with session.places:
            try:
                await writer.admit(row)
                yield
                waiting = Waiting(self._retry_for)
                while row.is_open:
                    if row.request.limits.time_is_up():
                        end(row, "time")
                        break
                    before = work.base_tokens
                    try:
                        async with aclosing(self._phase(work, session, writer)) as steps:
                            async for _ in steps:
                                yield
                        await writer.write(row)
                        yield
                        waiting = Waiting(self._retry_for)
                    except EngineUnavailable as error:
                        if work.base_tokens > before:
                            waiting = Waiting(self._retry_for)
                        await waiting.after(error)
            except Exception as error:
                row.error = error
                if row.is_open:
                    end(row, "error")
            finally:
                writer.forget(row)
        yield

    async def _phase(self, work: Work, session: Session, writer: SharedWriter) -> AsyncGenerator[None, None]:
        """One request: takes in its tokens until the answer leaves them, and cancels it there."""
        row, fields = work.row, self.requests.fields(work.row)
        logprobs = num_logprobs(row.request.config.nudge_gate)
        abilities = await session.abilities(logprobs)
        draft, start = writer.decoder.pending(row), len(row.answer.ids)
        prompt = [*row.answer.prompt, *row.answer.ids]
        most = int(min(row.room, _MAX_REQUEST_TOKENS))
        if abilities.context_length is not None:
            most = min(most, abilities.context_length - len(prompt))
        if most < 1:
            end(row, "length")
            return
        if abilities.decodes_eos:
            fields["ignore_eos"] = True
        if row.request.rules.base_samples:
            fields["seed"] = (fold_in(row.seed, 0) + start) % _SEEDS
        work.requests += 1
        taken = 0
        async with aclosing(session.completions.stream(prompt, most, logprobs, **fields)) as chunks:
            async for chunk in chunks:
                work.base_tokens += len(chunk.tokens)
                said = [(token.id, self.requests.prediction(token, row)) for token in chunk.tokens]
                if chunk.finish_reason == "stop" and not said:
                    eos = self.requests.untold_eos(row)
                    work.untold.add(len(row.answer.ids))
                    said = [(eos.token, eos)]
                for decoded, prediction in said:
                    writer.decoder.take_in(row, EnginePass(draft, [*[_UNASKED] * len(draft), prediction]))
                    writer.decoder.tell(row, draft)
                    taken, draft = taken + 1, []
                    yield
                    if row.question is Question.VERDICT:
                        await writer.write(row)  # Its gate compares with the nudging model at each position.
                    if row.question is not Question.VERDICT or not _follows(row, start + taken, decoded):
                        return
        if not taken:
            raise EngineUnavailable("The engine ended a request without a token.")


@dataclass(eq=False)
class Work:
    """An answer that is being written, and what it has taken.

    Attributes:
        requests, base_tokens: see [`RemoteAnswer`].
        untold: the places where the engine did not tell how probable the base's token is.
    """

    row: Row
    requests: int = 0
    base_tokens: int = 0
    untold: set[int] = field(default_factory=set)


def _follows(row: Row, length: int, token: int) -> bool:
    """Whether the answer has gone on with the engine's own tokens, so that its stream still continues it.

    Args:
        length: of the answer, if it has.
        token: the last one that the engine has decoded.
    """
    return row.is_open and not waits(row) and len(row.answer.ids) == length and row.answer.ids[-1] == token
