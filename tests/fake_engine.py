"""An inference engine in the test's own process: an ASGI application over a small base, and a transport that streams.

It speaks the shapes of several engines, and can be told to fail. Nothing of the package is imported.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import torch


class Fault:
    """What goes wrong with a request.

    Args:
        status: an HTTP status that is answered instead of tokens.
        headers: of that answer.
        message: in its body.
        after: how many events are sent before the stream breaks.
        how: in which way it breaks: "dropped" (the connection), "cut" (within an event), "ended" (without a finish
            reason), "error" (an event that says so), "abort" (a finish reason), or "silent" (nothing follows).
    """

    def __init__(self, status=None, headers=None, message="broken", after=0, how="dropped"):
        self.status, self.headers, self.message, self.after, self.how = status, headers or {}, message, after, how


class FakeEngine:
    """Serves `/v1/completions` and `/v1/models`.

    Args:
        model, tokenizer: of the base.
        shape: "vllm" (ids beside the names), "names" (ids in the names), or "llamacpp".
        owner: what `/v1/models` says of the owner; by default it is the shape.
        eos: "told" with the token, or "silent", where the engine is not asked to go on after EOS.
        ids, logprobs, takes_ids, greedy, stops: whether the engine tells ids and log-probabilities, takes ids as a
            prompt, is greedy at temperature 0, and obeys `nudge_threshold`.
        most_logprobs: of how many tokens it tells probabilities.
        speaks_for: another tokenizer, in which the engine's text is written.
        known: what the base says after texts that it has read; engines of one base may share it.
        pause: how many seconds each token takes.
        context: how many tokens it takes, and says that it takes.

    Attributes:
        faults: what goes wrong with the next requests, in turn; `None` for nothing.
        bodies: the requests so far.
        decoded: how many tokens were decoded.
        open, most_open, cancelled: how many requests are being answered, were at most, and were cancelled.
        down: whether nobody listens.
    """

    def __init__(
        self, model, tokenizer, shape="vllm", owner=None, eos="told", ids=True, logprobs=True, takes_ids=True,
        greedy=True, stops=False, most_logprobs=20, speaks_for=None, known=None, pause=0.0, context=None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.shape = model, tokenizer, shape
        self.owner = {"vllm": "vllm", "names": "someone", "llamacpp": "llamacpp"}[shape] if owner is None else owner
        self.eos, self.ids, self.logprobs, self.takes_ids = eos, ids, logprobs, takes_ids
        self.greedy, self.stops, self.most_logprobs, self.speaks_for = greedy, stops, most_logprobs, speaks_for
        eos_ids = model.generation_config.eos_token_id
        self.eos_ids = {eos_ids} if isinstance(eos_ids, int) else set(eos_ids or ())
        self.faults: list[Fault | None] = []
        self.bodies: list[dict[str, Any]] = []
        self.decoded = self.open = self.most_open = self.cancelled = 0
        self.down, self.pause, self.context = False, pause, context
        self.refuses: Callable[[dict[str, Any]], Fault | None] = lambda body: None
        self.known: dict[tuple[int, ...], list[tuple[int, float]]] = {} if known is None else known

    def client(self, **more) -> httpx2.AsyncClient:
        """A client of httpx that talks to this engine alone."""
        return httpx2.AsyncClient(transport=_Transport(self), **more)

    @torch.no_grad()
    def top(self, ids: tuple[int, ...]) -> list[tuple[int, float]]:
        """The most probable tokens after these ids, with log-probabilities."""
        if ids not in self.known:
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            found = logits.log_softmax(-1).topk(min(20, len(logits)))
            self.known[ids] = list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
        return self.known[ids]

    @torch.no_grad()
    def read_ahead(self, ids: list[int]) -> None:
        """Computes in one pass what follows each beginning of these ids, so that requests along them are quick."""
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0].float()
        found = logits.log_softmax(-1).topk(min(20, logits.shape[-1]))
        for i, (tokens, values) in enumerate(zip(found.indices.tolist(), found.values.tolist(), strict=True)):
            self.known[tuple(ids[: i + 1])] = list(zip(tokens, values, strict=True))

    async def __call__(self, scope, receive, send) -> None:
        path = scope["path"]
        if path == "/v1/models":
            card = {"id": "base", "owned_by": self.owner, "max_model_len": self.context}
            return await _send_json(send, 200, {"data": [{"id": "other"}, card]})
        assert path == "/v1/completions", path
        body = json.loads((await receive())["body"])
        self.bodies.append(body)
        fault = (self.faults.pop(0) if self.faults else None) or self.refuses(body)
        if isinstance(body["prompt"], list) and not self.takes_ids:
            fault = Fault(400, message="prompt must be a string")
        if self.context is not None and len(body["prompt"]) + body["max_tokens"] > self.context:
            fault = Fault(400, message="the prompt and max_tokens exceed the context")
        if fault is not None and fault.status is not None:
            return await _send_json(send, fault.status, {"error": {"message": fault.message}}, fault.headers)
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
            )
            sent = 0
            async for event in self._events(body):
                if fault is not None and sent == fault.after:
                    return await self._break(fault, event, send)
                await _send_event(send, event)
                sent += 1
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    async def _break(self, fault, event, send) -> None:
        if fault.how == "dropped":
            raise ConnectionResetError
        if fault.how == "cut":
            data = f"data: {json.dumps(event)}".encode()
            await send({"type": "http.response.body", "body": data[: len(data) // 2], "more_body": False})
        elif fault.how == "error":
            await _send_event(send, {"error": {"message": fault.message, "code": 500}}, more=False)
        elif fault.how == "abort":
            event["choices"][0] |= {"finish_reason": "abort", "logprobs": None, "text": ""}
            event["choices"][0].pop("token_ids", None)
            await _send_event(send, event, more=False)
        elif fault.how == "silent":
            await asyncio.sleep(60)
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, body) -> AsyncIterator[dict[str, Any]]:
        prompt = body["prompt"]
        ids = tuple(self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt)
        tokenizer = self.speaks_for or self.tokenizer
        begin, said, reason = len(ids), "", None
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        asked = body.get("vllm_xargs") or {}
        assert not (self.shape == "llamacpp" and body.get("ignore_eos")), "llama.cpp would forbid EOS"
        while reason is None:
            await asyncio.sleep(self.pause)
            top = self.top(ids)
            token = self._choose(top, body, generator)
            if self.stops and asked and math.exp(top[0][1]) < asked["nudge_threshold"]:
                token = asked["nudge_stop_id"]
            self.decoded += 1
            ids += (token,)
            is_eos = token in self.eos_ids and not body.get("ignore_eos")
            if is_eos or token in body.get("stop_token_ids", ()):
                reason = "stop"
            elif len(ids) - begin >= body["max_tokens"]:
                reason = "length"
            text = tokenizer.decode(list(ids[begin:]), skip_special_tokens=True)
            new, said = text[len(said) :], text
            if is_eos and self.eos == "silent":
                yield self._event("", [], reason)
                continue
            late = self.shape == "llamacpp"  # The reason comes in an event of its own.
            yield self._event(new, [(token, top)], None if late else reason, body["logprobs"])
            if late and reason is not None:
                yield self._event("", [], reason)
        if (body.get("stream_options") or {}).get("include_usage"):
            yield {"choices": [], "usage": {"prompt_tokens": begin, "completion_tokens": len(ids) - begin}}

    def _choose(self, top, body, generator) -> int:
        if not self.greedy:
            return top[3][0]
        if not body["temperature"]:
            return top[0][0]
        weights = torch.tensor([logprob / body["temperature"] for _, logprob in top]).softmax(-1)
        return top[int(torch.multinomial(weights, 1, generator=generator))][0]

    def _event(self, text, tokens, reason, count=0) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        if self.ids and self.shape == "vllm":
            choice["token_ids"] = [token for token, _ in tokens]
        if self.logprobs and tokens:
            entries = [self._entry(token, top, min(count, self.most_logprobs)) for token, top in tokens]
            if self.shape == "llamacpp":
                for entry in entries if not self.ids else ():
                    del entry["id"]
                choice["logprobs"] = {"content": entries}
            else:
                choice["logprobs"] = {
                    "tokens": [self._name(each["id"]) for each in entries],
                    "token_logprobs": [each["logprob"] for each in entries],
                    "top_logprobs": [
                        {self._name(one["id"]): one["logprob"] for one in each["top_logprobs"]} for each in entries
                    ],
                }
        return {"object": "text_completion", "choices": [choice]}

    def _entry(self, token, top, count) -> dict[str, Any]:
        entry = {"id": token, "token": "", "logprob": dict(top).get(token, -30.0)}
        entry["top_logprobs"] = [{"id": each, "token": "", "logprob": logprob} for each, logprob in top[:count]]
        return entry

    def _name(self, token) -> str:
        return f"token_id:{token}" if self.ids else self.tokenizer.decode([token])


async def _send_json(send, status, body, headers=None) -> None:
    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    pairs.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": json.dumps(body).encode(), "more_body": False})


async def _send_event(send, event, more=True) -> None:
    data = f"data: {json.dumps(event)}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": more})


class _Transport(httpx2.AsyncBaseTransport):
    """Calls an ASGI application and streams its answer. (httpx's own one waits for the end.)

    One part at a time is on its way. Closing the answer cancels the application, as a client does that hangs up.
    """

    def __init__(self, app: FakeEngine):
        self.app = app

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self.app.down:
            raise httpx2.ConnectError("Connection refused", request=request)
        body = await request.aread()
        parts: asyncio.Queue[Any] = asyncio.Queue(1)

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def run() -> None:
            try:
                scope = {"type": "http", "method": request.method, "path": request.url.path, "query_string": b""}
                scope["headers"] = [(name.lower(), value) for name, value in request.headers.raw]
                await self.app(scope, receive, parts.put)
            except ConnectionResetError:
                await parts.put(httpx2.RemoteProtocolError("peer closed connection", request=request))
            except Exception as error:
                await parts.put(error)

        task = asyncio.create_task(run())
        start = await parts.get()
        if isinstance(start, Exception):
            raise start
        return httpx2.Response(
            start["status"], headers=start["headers"], stream=_Stream(task, parts, request), request=request
        )


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, task, parts, request):
        self.task, self.parts, self.request = task, parts, request

    async def __aiter__(self):
        timeout = self.request.extensions.get("timeout", {}).get("read")
        more = True
        while more:
            part = await self._next(timeout)
            if isinstance(part, Exception):
                raise part
            more = part["more_body"]
            yield part["body"]

    async def _next(self, timeout):
        # `asyncio.wait_for` loses a cancellation that comes together with the part, before Python 3.12.
        getting = asyncio.ensure_future(self.parts.get())
        try:
            if not (await asyncio.wait({getting}, timeout=timeout))[0]:
                raise httpx2.ReadTimeout("timed out", request=self.request)
            return getting.result()
        finally:
            getting.cancel()

    async def aclose(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
