"""Middleware of vLLM's API server: it answers bad requests with 400 and makes the nudging model's prompt of a chat.

    vllm serve ... --middleware nudging_hf.integrations.vllm.middleware.NudgingMiddleware

The worker can only end a bad request, because it was admitted already. A chat reaches the worker as the base's ids,
from which its messages cannot be told. So the nudging model's prompt is made here and goes along in `vllm_xargs`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

from ...encoded_chats import chat_ids
from .params import is_plain, nudging_tokenizer, validate_params

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
_Message = MutableMapping[str, Any]

# Fields of a body whose values the engine would obey for the base alone.
_REFUSED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


class NudgingMiddleware:
    """Checks the requests of vLLM's completions and chat completions.

    Args:
        app: the next ASGI application.
    """

    def __init__(self, app: Any):
        self.app = app
        self._tokenizer: Any = None

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in (_CHAT, _COMPLETION):
            return await self.app(scope, receive, send)
        raw, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        try:
            body = json.loads(raw)
        except ValueError:
            body = None  # vLLM says what is wrong with it.
        if isinstance(body, dict):
            try:
                raw = json.dumps(self._checked(body, scope)).encode()
            except ValueError as error:
                return await _refuse(send, str(error))
            length = (b"content-length", str(len(raw)).encode())
            others = [each for each in scope["headers"] if each[0].lower() != b"content-length"]
            scope = {**scope, "headers": [*others, length]}
        given = iter([{"type": "http.request", "body": raw, "more_body": False}])

        async def replay() -> _Message:
            return next(given, None) or await receive()

        await self.app(scope, replay, send)

    def _checked(self, body: dict[str, Any], scope: MutableMapping[str, Any]) -> dict[str, Any]:
        """The body, to which a chat adds the nudging model's prompt.

        Raises:
            ValueError: for what nudging cannot do.
        """
        extra = body.get("vllm_xargs")
        if extra is not None and not isinstance(extra, dict):
            raise ValueError(f"`vllm_xargs` must be an object, got {type(extra).__name__}.")
        if is_plain(extra):
            return body
        config = scope["app"].state.vllm_config
        constrained = [name for name in _REFUSED if body.get(name)]
        form = body.get("response_format")
        if form and not (isinstance(form, dict) and form.get("type") == "text"):
            constrained.append("response_format")
        if body.get("tool_choice") not in (None, "none", "auto"):
            constrained.append("tool_choice")
        if body.get("use_beam_search"):
            constrained.append("use_beam_search")
        if body.get("prompt_embeds"):
            constrained.append("prompt_embeds")
        if constrained:
            raise ValueError(f"A nudged request cannot have `{constrained[0]}`: leave it out, or say `nudging: 0`.")
        names = ("thinking_token_budget", "repetition_detection", "logprob_token_ids", "watermarking", "logprobs")
        params = SimpleNamespace(extra_args=extra, **{name: body.get(name) or None for name in names})
        validate_params(params, config.model_config.logprobs_mode)
        if scope["path"] != _CHAT:
            return body
        # The base's chat template is plain text, and its tokenizer adds what a text begins with.
        body = {"add_special_tokens": True, **body}
        if "nudging_input_ids" not in (extra or {}):
            tokenizer = self._nudging_tokenizer(config)
            if tokenizer.chat_template:  # Without one, the nudging model reads the base's prompt.
                ids = chat_ids(tokenizer, body.get("messages", ()), body.get("chat_template_kwargs"))
                body = {**body, "vllm_xargs": {**(extra or {}), "nudging_input_ids": ids}}
        return body

    def _nudging_tokenizer(self, config: Any) -> Any:
        if self._tokenizer is None:
            self._tokenizer = nudging_tokenizer(config.additional_config["nudging"])
        return self._tokenizer


async def _refuse(send: Callable[[_Message], Awaitable[None]], message: str) -> None:
    """Answers with 400 in the form of OpenAI's errors."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
