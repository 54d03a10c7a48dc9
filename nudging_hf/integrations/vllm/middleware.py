"""Middleware of vLLM's API server: refuses bad requests, makes the nudging model's prompt, and tells who wrote what.

    vllm serve ... --middleware nudging_hf.integrations.vllm.middleware.NudgingMiddleware

The worker can only end a bad request, because it was admitted already. A chat reaches the worker as the base's ids,
from which its messages cannot be told. So the nudging model's prompt is made here and goes along in `vllm_xargs`, with
the name of a report, from which the reply gets what the worker knows.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from ...core.vocabulary import Vocabulary
from ...encoded_chats import chat_ids
from .params import base_arguments, base_tokenizer, is_plain, nudging_tokenizer, validate_params
from .replies import Message, Replies, Send, send_error, with_length
from .reports import KEY, Reports

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"

# Fields of a body whose values the engine would obey for the base alone.
_REFUSED = [
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("use_beam_search", "prompt_embeds"),
]


class NudgingMiddleware:
    """Checks the requests of vLLM's completions and chat completions, and adds to the replies who wrote them.

    Args:
        app: the next ASGI application.
    """

    def __init__(self, app: Any):
        self.app = app
        self._config: Any = None  # vLLM's, which is known with the first request.

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Callable[[], Awaitable[Message]], send: Send
    ) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in (_CHAT, _COMPLETION):
            return await self.app(scope, receive, send)
        self._config = scope["app"].state.vllm_config
        raw, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict):  # vLLM says what is wrong with it.
            return await self._pass_on(scope, raw, receive, send)
        try:
            extra = _extra(body)
            if is_plain(extra):
                return await self._pass_on(scope, raw, receive, send)
            body = self._checked(body, extra, is_chat=scope["path"] == _CHAT)
        except ValueError as error:
            return await send_error(send, 400, str(error))
        report = self._reports.new()
        try:
            body["vllm_xargs"] = {**_extra(body), KEY: report.name}
            answers = body["n"] if isinstance(body.get("n"), int) else 1
            replies = Replies(send, report, self._vocabulary, answers)
            await self._pass_on(scope, json.dumps(body).encode(), receive, replies)
        finally:
            report.close()

    async def _pass_on(
        self, scope: MutableMapping[str, Any], raw: bytes, receive: Callable[[], Awaitable[Message]], send: Send
    ) -> None:
        """Lets vLLM answer a body that has been read."""
        given = iter([{"type": "http.request", "body": raw, "more_body": False}])

        async def replay() -> Message:
            return next(given, None) or await receive()

        await self.app(with_length(scope, raw), replay, send)

    def _checked(self, body: dict[str, Any], extra: dict[str, Any], is_chat: bool) -> dict[str, Any]:
        """The body of a nudged request, to which a chat adds the nudging model's prompt.

        Raises:
            ValueError: for what nudging cannot do.
        """
        constrained = [name for name in _REFUSED if body.get(name)]
        form = body.get("response_format")
        if form and not (isinstance(form, dict) and form.get("type") == "text"):
            constrained.append("response_format")
        if body.get("tool_choice") not in (None, "none", "auto"):
            constrained.append("tool_choice")
        if constrained:
            raise ValueError(f"A nudged request cannot have `{constrained[0]}`: leave it out, or say `nudging: 0`.")
        names = ("thinking_token_budget", "repetition_detection", "logprob_token_ids", "watermarking", "logprobs")
        params = SimpleNamespace(extra_args=extra, **{name: body.get(name) or None for name in names})
        validate_params(params, self._config.model_config.logprobs_mode)
        if not is_chat:
            return dict(body)
        # The base's chat template is plain text, and its tokenizer adds what a text begins with.
        body = {"add_special_tokens": True, **body}
        if "nudging_input_ids" not in extra:
            tokenizer = self._nudging_tokenizer
            if tokenizer.chat_template:  # Without one, the nudging model reads the base's prompt.
                ids = chat_ids(tokenizer, body.get("messages", ()), body.get("chat_template_kwargs"))
                body["vllm_xargs"] = {**extra, "nudging_input_ids": ids}
        return body

    @cached_property
    def _reports(self) -> Reports:
        return Reports()

    @cached_property
    def _nudging_tokenizer(self) -> Any:
        return nudging_tokenizer(self._config.additional_config["nudging"])

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """The base's."""
        model = self._config.model_config
        return Vocabulary(base_tokenizer(model.model, base_arguments(model)))


def _extra(body: dict[str, Any]) -> dict[str, Any]:
    """What a body says to the worker.

    Raises:
        ValueError: if it is no object.
    """
    extra = body.get("vllm_xargs")
    if extra is not None and not isinstance(extra, dict):
        raise ValueError(f"`vllm_xargs` must be an object, got {type(extra).__name__}.")
    return extra or {}
