"""The routes of a server with OpenAI's API. They know HTTP and an engine, never models or how answers are written."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise ImportError("The server needs further packages: pip install 'nudging-hf[serve]'.") from error

from .. import __version__
from ..chats import DEFAULT_TEMPLATE
from ..core.vocabulary import Vocabulary
from .engine import AnswerFailed, AnswerRequest, Answers, Chunk, Engine, QueueFull, Unavailable
from .metrics import Metrics, Outcome, RequestWatch
from .prompts import Prompt, PromptEncoder
from .protocol import (
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ErrorReply,
    FieldError,
    Model,
    ModelList,
    Usage,
    first_error,
)
from .replies import ChatForm, Choice, CompletionForm, ReplyForm

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_AFTER_SECONDS = 1
_GUARDED = "/v1/"  # Paths that need the key begin so.
_ENDPOINTS = {f"/v1/{endpoint.replace('.', '/')}": endpoint for endpoint in ("chat.completions", "completions")}


@dataclass(frozen=True)
class ServerSettings:
    """How a server presents its engine.

    Args:
        served_name: the name of the model in requests and replies.
        base_template: how the base is given a chat; see [`plain_prompt`].
        default_max_tokens: the limit on an answer where a request names none, in the base's tokens.
        max_answers: how many answers a request may ask for, over all its prompts.
        api_key: what clients must send as `Authorization: Bearer KEY`; `None` if anybody may ask.
    """

    served_name: str
    base_template: str = DEFAULT_TEMPLATE
    default_max_tokens: int = 1024
    max_answers: int = 128
    api_key: str | None = field(default=None, repr=False)


class _ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        outcome: Outcome,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.outcome = outcome
        self.headers = headers
        self.body = ErrorReply(error=ErrorBody(message=message, type=kind, param=param, code=code))

    def response(self) -> Response:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


class _ClientGone(Exception):
    """The client has closed its connection."""


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The application that serves an engine. When it ends, the engine is shut down without grace.

    Args:
        engine: writes the answers.
        settings: how it is presented.

    Raises:
        ValueError: for a malformed template.
    """
    service = _Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.shutdown(0)
        service.close()

    app = FastAPI(title="nudging_hf", version=__version__, lifespan=lifespan)
    if settings.api_key is not None:
        app.add_middleware(_KeyGuard, key=settings.api_key)

    @app.exception_handler(RequestValidationError)
    async def refuse(http: Request, error: RequestValidationError) -> Response:
        if endpoint := _ENDPOINTS.get(http.url.path):
            service.metrics.ended(endpoint, "refused")
        return _api_error(first_error(list(error.errors()))).response()

    @app.exception_handler(HTTPException)
    async def tell(http: Request, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}."
        return JSONResponse(
            ErrorReply(error=ErrorBody(message=message, type="invalid_request_error")).model_dump(),
            error.status_code,
            error.headers,
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        return await service.answer(http, body, ChatForm(settings.served_name, service.vocabulary))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await service.answer(http, body, CompletionForm(settings.served_name, service.vocabulary))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(ModelList(data=[service.model]).model_dump())

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        try:
            service.check_model(name)
        except _ApiError as error:
            return error.response()
        return JSONResponse(service.model.model_dump())

    @app.get("/health")
    async def health() -> Response:
        if engine.is_ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable"}, 503)

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


class _KeyGuard:
    """Lets only those through who send the key. It stands before everything else, so that no body is read."""

    def __init__(self, app: ASGIApp, key: str):
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_GUARDED) and not self._is_allowed(scope):
            refused = _ApiError(
                401,
                "This server needs an API key: send it as `Authorization: Bearer KEY`.",
                "authentication_error",
                "refused",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await refused.response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return bool(scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key))


class _Service:
    """Answers requests with an engine."""

    def __init__(self, engine: Engine, settings: ServerSettings):
        self._engine = engine
        self._settings = settings
        self._encoder = PromptEncoder(engine.tokenizer, engine.nudging_tokenizer, settings.base_template)
        # A single thread, because a tokenizer is not to be used by two.
        self._encoding = ThreadPoolExecutor(1, "nudging-prompts")
        self._num_tokens = len(engine.tokenizer)
        self.vocabulary = Vocabulary(engine.tokenizer)
        self.metrics = Metrics(engine.stats)
        self.model = Model(id=settings.served_name, created=int(time.time()), max_model_len=engine.context_length)

    def close(self) -> None:
        """Ends the thread."""
        self._encoding.shutdown(wait=False)

    async def answer(self, http: Request, body: ChatRequest | CompletionRequest, form: ReplyForm) -> Response:
        """The response to a request, or to one that is streamed, its beginning."""
        watch = self.metrics.watch(form.endpoint)
        try:
            return await _unless_gone(http, self._respond(body, form, watch))
        except _ClientGone:
            watch.end("cancelled")
            return Response(status_code=499)
        except asyncio.CancelledError:
            watch.end("cancelled")
            raise
        except Exception as error:
            told = _api_error(error)
            watch.end(told.outcome)
            return told.response()

    async def _respond(self, body: ChatRequest | CompletionRequest, form: ReplyForm, watch: RequestWatch) -> Response:
        exchange = await self._exchange(body, form, watch)
        try:
            if body.stream:
                await exchange.start()
                return _EventStream(exchange.events(body.includes_usage), exchange.close)
            reply = await exchange.reply()
        except BaseException:
            exchange.close()
            raise
        exchange.close()
        return Response(reply.model_dump_json(), media_type="application/json")

    async def _exchange(
        self, body: ChatRequest | CompletionRequest, form: ReplyForm, watch: RequestWatch
    ) -> _Exchange:
        """Submits what is asked, once all is known to be right."""
        if body.model is not None:
            self.check_model(body.model)
        arguments = body.generate_arguments(self._engine.samples_by_default)
        if (last := max(arguments.get("suppress_tokens", [0]))) >= self._num_tokens:
            raise FieldError("logit_bias", f"`logit_bias` has the token {last}, but there are {self._num_tokens}.")
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._encoding, self._encoder.prompts, body)
        if len(prompts) * body.answers > self._settings.max_answers:
            asked = f"{len(prompts)} prompts with {body.answers} answers each" if len(prompts) > 1 else f"n={body.n}"
            raise FieldError(
                "prompt" if len(prompts) > 1 else "n",
                f"A request may ask for {self._settings.max_answers} answers, got {asked}.",
            )
        requests = [
            AnswerRequest(
                prompt.input_ids,
                prompt.nudging_input_ids,
                {**arguments, "max_new_tokens": self._max_tokens(body, prompt)},
                n=body.answers,
                seed=body.seed,
                stop=body.stop_strings,
                top_logprobs=body.wanted_logprobs,
            )
            for prompt in prompts
        ]
        taken: list[Answers] = []
        try:
            for request in requests:
                taken.append(await self._engine.submit(request))
        except BaseException:
            for answers in taken:
                answers.close()
            raise
        prompt_tokens = sum(len(prompt.input_ids) for prompt in prompts)
        self.metrics.add_prompt(prompt_tokens)
        choices = [
            Choice(index, self.vocabulary, body.stop_strings, body.wanted_logprobs is not None)
            for index in range(len(prompts) * body.answers)
        ]
        return _Exchange(form, choices, taken, prompt_tokens, watch)

    def check_model(self, name: str) -> None:
        """Refuses a model that is not the one that is served."""
        if name != self._settings.served_name:
            raise _ApiError(
                404,
                f"There is no model {name!r}: this server has {self._settings.served_name!r}.",
                "invalid_request_error",
                "refused",
                param="model",
                code="model_not_found",
            )

    def _max_tokens(self, body: ChatRequest | CompletionRequest, prompt: Prompt) -> int:
        """The limit on an answer, which fits into the context."""
        length, context = len(prompt.input_ids), self._engine.context_length
        limit = self._settings.default_max_tokens if body.max_tokens is None else body.max_tokens
        if context is not None:
            if length + (body.max_tokens or 1) > context:
                asked = "" if body.max_tokens is None else f" and {body.max_tokens} tokens of an answer"
                raise _ApiError(
                    400,
                    f"The context has {context} tokens, got a prompt of {length}{asked}: shorten one of them.",
                    "invalid_request_error",
                    "refused",
                    param="messages" if isinstance(body, ChatRequest) else "prompt",
                    code="context_length_exceeded",
                )
            limit = min(limit, context - length)
        if body.min_tokens is not None and body.min_tokens > limit:
            raise FieldError("min_tokens", f"`min_tokens` ({body.min_tokens}) exceeds the limit of {limit} tokens.")
        return limit


class _Exchange:
    """The answers to one request, on their way to the client."""

    def __init__(
        self,
        form: ReplyForm,
        choices: Sequence[Choice],
        answers: Sequence[Answers],
        prompt_tokens: int,
        watch: RequestWatch,
    ):
        self._form = form
        self._choices = choices
        self._answers = answers
        self._per_prompt = len(choices) // len(answers)
        self._prompt_tokens = prompt_tokens
        self._watch = watch
        self._queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()
        self._pumps = [asyncio.ensure_future(self._pump(number)) for number in range(len(answers))]
        self._unfinished = len(answers)
        self._first: tuple[Choice, Chunk] | None = None

    async def _pump(self, number: int) -> None:
        """Puts the answers to one prompt among those to the others."""
        try:
            async for chunk in self._answers[number]:
                self._queue.put_nowait((number * self._per_prompt + chunk.index, chunk))
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)

    def close(self) -> None:
        """Gives up what is not finished. It waits for nothing, so that it can be called while all is cancelled."""
        for pump in self._pumps:
            pump.cancel()
        for answers in self._answers:
            answers.close()
        self._watch.end("cancelled")  # Unless it has ended otherwise before.

    async def start(self) -> None:
        """Waits for the first chunk, so that an error before it has a status of its own."""
        self._first = await anext(self._chunks())

    async def reply(self) -> Completion:
        """Waits for all answers."""
        async for choice, chunk in self._chunks():
            choice.read(chunk)
        self._watch.end("answered")
        return self._form.reply(self._choices, self._usage())

    async def events(self, includes_usage: bool) -> AsyncIterator[str]:
        """The server-sent events of a stream, after `start`."""
        opened = set()
        try:
            async for choice, chunk in self._chunks():
                if choice.index not in opened:
                    opened.add(choice.index)
                    for part in self._form.opening(choice):
                        yield _event(part)
                for part in self._form.parts(choice, choice.read(chunk)):
                    yield _event(part)
            if includes_usage:
                yield _event(self._form.closing(self._usage()))
            self._watch.end("answered")
            yield "data: [DONE]\n\n"
        except Exception as error:
            told = _api_error(error)
            self._watch.end(told.outcome)
            yield _event(told.body)

    async def _chunks(self) -> AsyncIterator[tuple[Choice, Chunk]]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        while self._unfinished:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                self._unfinished -= 1
                continue
            index, chunk = item
            nudging = sum(chunk.nudged)
            self._watch.tokens(len(chunk.ids) - nudging, nudging)
            yield self._choices[index], chunk

    def _usage(self) -> Usage:
        new = sum(choice.answer.num_tokens for choice in self._choices)
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=new, total_tokens=self._prompt_tokens + new)


class _EventStream(StreamingResponse):
    """A stream of server-sent events, at the end of which, however it comes, `close` is called."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def _event(said: Completion | ErrorReply) -> str:
    return f"data: {said.model_dump_json()}\n\n"


async def _unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled if the client closes its connection before.

    Raises:
        _ClientGone: if the client was first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _ClientGone
    finally:
        leaving.cancel()
        working.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _api_error(error: Exception) -> _ApiError:
    """What a client is told of an error."""
    if isinstance(error, _ApiError):
        return error
    if isinstance(error, ValueError):
        param = error.param if isinstance(error, FieldError) else None
        return _ApiError(400, str(error), "invalid_request_error", "refused", param=param)
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
        return _ApiError(429, str(error), "rate_limit_error", "busy", code="queue_full", headers=headers)
    if isinstance(error, Unavailable):
        return _ApiError(503, str(error), "service_unavailable_error", "unavailable", code="shutting_down")
    if isinstance(error, AnswerFailed):
        return _ApiError(500, str(error), "server_error", "failed")
    logger.error("A request failed.", exc_info=error)
    return _ApiError(500, "The server failed: its log says why.", "server_error", "failed")
