"""Makes both models' prompts from requests. It knows fields and tokenizers, never models or HTTP."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..chats import DEFAULT_TEMPLATE, turn_template
from ..encoded_chats import chat_inputs
from .protocol import ChatRequest, CompletionRequest, FieldError


class Prompt(NamedTuple):
    """The prompts of both models, each in its own ids.

    Args:
        input_ids: the base's.
        nudging_input_ids: the nudging model's; `None` if it is to be made from the base's.
    """

    input_ids: tuple[int, ...]
    nudging_input_ids: tuple[int, ...] | None = None


class PromptEncoder:
    """Encodes the prompts of requests, one request at a time, with tokenizers of its own.

    Args:
        tokenizer, nudging_tokenizer: the base's and the nudging model's, which are copied.
        base_template: how the base is given a chat; see [`plain_prompt`].

    Raises:
        ValueError: for a malformed template.
    """

    def __init__(self, tokenizer: Any, nudging_tokenizer: Any, base_template: str = DEFAULT_TEMPLATE):
        turn_template(base_template)
        self._tokenizer = copy.deepcopy(tokenizer)
        self._nudging_tokenizer = copy.deepcopy(nudging_tokenizer)
        self._base_template = base_template
        # A client may set variables of the template, but not give a template, which is a program.
        self._reserved = set(inspect.signature(self._nudging_tokenizer.apply_chat_template).parameters)

    def prompts(self, request: ChatRequest | CompletionRequest) -> list[Prompt]:
        """The prompts of a request.

        Raises:
            FieldError: for prompts that cannot be encoded, with the reason.
        """
        return [self._chat(request)] if isinstance(request, ChatRequest) else self._completion(request)

    def _chat(self, request: ChatRequest) -> Prompt:
        if reserved := sorted(self._reserved & set(request.chat_template_kwargs or {})):
            raise FieldError(
                "chat_template_kwargs",
                f"`chat_template_kwargs` sets variables of the chat template, and `{reserved[0]}` is none of them.",
            )
        try:
            inputs = chat_inputs(
                request.chat,
                self._tokenizer,
                self._nudging_tokenizer,
                self._base_template,
                request.chat_template_kwargs,
            )
        except ValueError as error:
            raise FieldError("messages", str(error)) from error
        return Prompt(tuple(inputs["input_ids"][0].tolist()), tuple(inputs["nudging_input_ids"][0].tolist()))

    def _completion(self, request: CompletionRequest) -> list[Prompt]:
        own = _encoded(self._tokenizer, request.prompt, "prompt")
        if request.nudging_prompt is not None:
            nudging = _encoded(self._nudging_tokenizer, request.nudging_prompt, "nudging_prompt")
        elif request.nudging_input_ids is not None:
            nudging = [tuple(ids) for ids in request.nudging_input_ids]
        else:
            return [Prompt(ids) for ids in own]
        return [Prompt(*both) for both in zip(own, nudging, strict=True)]


def _encoded(tokenizer: Any, prompts: Sequence[str | list[int]], param: str) -> list[tuple[int, ...]]:
    encoded = [tuple(tokenizer(each)["input_ids"] if isinstance(each, str) else each) for each in prompts]
    if not all(encoded):
        raise FieldError(param, f"`{param}` is empty: give at least one token.")
    return encoded
