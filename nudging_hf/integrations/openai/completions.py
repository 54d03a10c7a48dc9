"""Asks an engine for tokens by OpenAI's `/v1/completions`. It knows requests and their tokens, never answers or rows.

Engines tell the probabilities of tokens in two shapes. In the older one (vLLM, SGLang) `logprobs` has lists, and the
ids stand in `token_ids` or are spelt "token_id:123". In that of llama.cpp `logprobs.content` has an entry with `id`
for each token. A token is told by its id alone, because half a character has no text of its own.
"""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple

try:
    import openai
except ImportError as error:
    raise ImportError("This needs the client of OpenAI: pip install 'nudging-hf[openai]'.") from error

_TOKEN_ID = "token_id:"
_FINISHED = ("stop", "length")  # An engine that is shut down may also say "abort" or "error".
# An engine that is not told otherwise takes these from the generation config of its model, or has defaults of its own.
_NEUTRAL = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,  # llama.cpp's name of the same.
}


class EngineError(RuntimeError):
    """The engine refuses a request, or its answer cannot be used. The message says why, without the API key."""


class EngineUnavailable(EngineError):
    """The engine is busy, broken or gone for the moment, and may be asked again.

    Args:
        retry_after: how many seconds it wants to be left alone, if it says so.
    """

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class Token(NamedTuple):
    """A token that the engine has decoded.

    Args:
        id: its id.
        logprob: its log-probability.
        top_logprobs: the greatest log-probabilities at its place, in falling order.
        top_id: the id of the most probable token, where the engine tells it.
        spelling: the bytes that the engine says it adds to the text, where it does.
    """

    id: int
    logprob: float
    top_logprobs: tuple[float, ...]
    top_id: int | None = None
    spelling: bytes | None = None


class Chunk(NamedTuple):
    """A part of a streamed completion.

    Args:
        tokens: those that are new.
        text: what they add to the text, as the engine sees it.
        finish_reason: "stop" or "length" in the last part.
        prompt_ids: the prompt as the engine has read it, where it says so.
        prompt_tokens: how many tokens that were, where it says so.
    """

    tokens: Sequence[Token]
    text: str = ""
    finish_reason: str | None = None
    prompt_ids: Sequence[int] | None = None
    prompt_tokens: int | None = None


class Completions:
    """A client of one model of an engine.

    Args:
        base_url: of the API, such as "http://localhost:8000/v1".
        model: the model's name there.
        api_key: it is sent to the engine, and stands in no message. `None` if there is none.
        timeout: how many seconds may pass without a byte.
        http_client: an `AsyncClient` of httpx to be used instead of one's own. It is not closed.

    Attributes:
        tokens (`int`): how many tokens the engine has sent.
    """

    def __init__(self, base_url: str, model: str, api_key: str | None, timeout: float, http_client: Any = None):
        self._model, self._api_key = model, api_key
        self._owns_client = http_client is None
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",  # The client sends one in any case.
            timeout=openai.Timeout(timeout, connect=min(timeout, 10.0)),
            max_retries=0,  # Whoever asks tries again, also after half an answer.
            http_client=http_client,
        )
        self.tokens = 0

    async def close(self) -> None:
        if self._owns_client:
            await self._client.close()

    async def card(self) -> Mapping[str, Any]:
        """What the engine says of the model: who owns it ("vllm", "sglang", "llamacpp", ...), its context length."""
        try:
            listed = await self._client.get("/models", cast_to=object)
        except openai.OpenAIError:
            return {}
        models = listed.get("data") if isinstance(listed, Mapping) else None
        cards = [each for each in models if isinstance(each, Mapping)] if isinstance(models, list) else []
        return next((each for each in cards if each.get("id") == self._model), cards[0] if cards else {})

    async def stream(
        self, prompt: Sequence[int] | str, max_tokens: int, logprobs: int, **more: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Streams a completion. Closing the iterator cancels the request.

        Args:
            prompt: ids, or for a trial a text.
            max_tokens: how many tokens are decoded at most.
            logprobs: of how many tokens the probabilities are told at each place.
            more: further fields of the request.

        Raises:
            EngineUnavailable: if the same may succeed later.
            EngineError: if it may not.
        """
        body = {
            **_NEUTRAL,
            "model": self._model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "logprobs": logprobs,
            "n_probs": logprobs,  # llama.cpp's name of the same.
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": True,
            **more,
        }
        finished = False
        try:
            events = await self._client.post(
                "/completions", cast_to=object, body=body, stream=True, stream_cls=openai.AsyncStream[object]
            )
            try:
                async for event in events:
                    chunk = _chunk_of(event)
                    finished = finished or chunk.finish_reason is not None
                    self.tokens += len(chunk.tokens)
                    yield chunk
            finally:
                await events.close()
                # The stream and its generator refer to each other. Left to the garbage collector, the generator could
                # be finalized in another thread than that of its event loop.
                await events._iterator.aclose()  # type: ignore[attr-defined]
        except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._explained(error) from None  # What the engine said stands in the chain, maybe with the key.
        if not finished:
            raise EngineUnavailable("The engine's stream ended in the middle.")

    def _explained(self, error: Exception) -> EngineError:
        said = f"{type(error).__name__}: {error}"
        if self._api_key is not None:
            said = said.replace(self._api_key, "***")
        if isinstance(error, openai.APIStatusError):
            status: Any = error.status_code
        elif isinstance(error, openai.APIConnectionError) or not isinstance(error, openai.OpenAIError):
            return EngineUnavailable(f"The engine cannot be reached, or its stream broke: {said}")
        else:  # An error within a stream has no status, but may have a code.
            body = getattr(error, "body", None)
            status = body.get("code") if isinstance(body, Mapping) else None
            status = int(status) if isinstance(status, (int, str)) and str(status).isdigit() else 500
        if status == 429 or status >= 500:
            headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
            return EngineUnavailable(f"The engine is busy or broken: {said}", _retry_after(headers))
        return EngineError(f"The engine refuses the request: {said}")


def _retry_after(headers: Mapping[str, str]) -> float:
    """How many seconds an engine wants to be left alone: the header Retry-After, a number or a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return 0.0


def _chunk_of(event: Any) -> Chunk:
    try:
        usage = event.get("usage") or {}
        if not event.get("choices"):
            return Chunk((), prompt_tokens=usage.get("prompt_tokens"))
        choice = event["choices"][0]
        reason = choice.get("finish_reason")
        if reason is not None and reason not in _FINISHED:
            raise EngineUnavailable(f"The engine gave up a request: its finish reason is {reason!r}.")
        return Chunk(
            _tokens_of(choice),
            choice.get("text") or "",
            reason,
            choice.get("prompt_token_ids"),
            usage.get("prompt_tokens"),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"The engine's answer has a shape that is not known ({type(error).__name__}: {error}): update the engine, "
            "or take vLLM, SGLang or llama.cpp."
        ) from None


def _tokens_of(choice: Mapping[str, Any]) -> list[Token]:
    logprobs, ids = choice.get("logprobs"), choice.get("token_ids")
    if not logprobs:
        if ids:
            raise EngineError(NO_LOGPROBS)
        return []
    if logprobs.get("content") is not None:
        return [_token_of_entry(entry) for entry in logprobs["content"]]
    names, own, tops = logprobs["tokens"], logprobs["token_logprobs"], logprobs.get("top_logprobs")
    if ids is None:
        ids = [_id_of(name) for name in names]
    tokens = []
    for token, logprob, top in zip(ids, own, tops or [{}] * len(names), strict=True):
        if token is None:
            raise EngineError(NO_IDS)
        ranked = sorted((top or {}).items(), key=lambda item: -item[1])
        top_id = _id_of(ranked[0][0]) if ranked else None
        tokens.append(Token(int(token), float(logprob), tuple(value for _, value in ranked), top_id))
    return tokens


def _token_of_entry(entry: Mapping[str, Any]) -> Token:
    if entry.get("id") is None:
        raise EngineError(NO_IDS)
    ranked = sorted(entry.get("top_logprobs") or (), key=lambda each: -each["logprob"])
    spelling = entry.get("bytes")
    return Token(
        int(entry["id"]),
        float(entry["logprob"]),
        tuple(each["logprob"] for each in ranked),
        ranked[0].get("id") if ranked else None,
        None if spelling is None else bytes(spelling),
    )


def _id_of(name: str) -> int | None:
    number = name.removeprefix(_TOKEN_ID)
    return int(number) if name.startswith(_TOKEN_ID) and number.isdigit() else None


NO_LOGPROBS = (
    "The engine ignores `logprobs`, without which nobody knows how sure the base is: take an engine that obeys it in "
    "streamed completions (vLLM with `--max-logprobs` of 1 or more, SGLang, or llama.cpp's server)."
)
NO_IDS = (
    "The engine does not tell the ids of its tokens, and text alone does not tell them: take a version that obeys "
    "`return_token_ids` or `return_tokens_as_token_ids` (vLLM from 0.10.2, a recent SGLang), or llama.cpp's server, "
    "which tells `id`s."
)
