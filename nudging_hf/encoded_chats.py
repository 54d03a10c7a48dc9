"""Makes the inputs of both models from chats. It knows messages, templates and tokenizers, never models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchEncoding

from .chats import DEFAULT_TEMPLATE, Message, checked_messages, fill_in, has_system, list_of_chats
from .core.prompts import TemplateRefusal, guarded_ids, templated_ids

# `chat_inputs` sets these arguments of a chat template itself, or they would change how it encodes the prompts.
_RESERVED_TEMPLATE_KWARGS = "add_generation_prompt continue_final_message padding return_assistant_tokens_mask".split()
_RESERVED_TEMPLATE_KWARGS += ["return_dict", "return_tensors", "tokenize"]


def chat_inputs(
    chats: Sequence[Message] | Sequence[Sequence[Message]],
    tokenizer: Any,
    nudging_tokenizer: Any,
    base_template: str = DEFAULT_TEMPLATE,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> BatchEncoding:
    """Makes the inputs of both models for one chat or several. Pass them to `generate` unchanged.

    The base, which knows no chats, gets the [`plain_prompt`]. The nudging model gets the chat through its chat
    template, or the base's prompt if it has no template. If the template refuses or leaves out a system message, the
    text of that message moves to the head of the first user turn. A template that leaves out another message is an
    error, but it may leave out the reasoning before an earlier answer (`<think>...</think>`), as the templates of
    reasoning models do.

    Args:
        chats: a list of messages `{"role": ..., "content": ...}`, or a list of such lists, one for each row. Roles
            are "system", "user" and "assistant"; the last message is the user's. A content is a string, or a list of
            strings and of parts `{"type": "text", "text": ...}`, which are joined. Other fields of a message are
            ignored, except that tool calls are an error.
        tokenizer, nudging_tokenizer: the base's and the nudging model's.
        base_template: see [`plain_prompt`].
        chat_template_kwargs: further arguments of the nudging model's chat template, such as
            `{"enable_thinking": False}`.

    Returns:
        `input_ids`, `attention_mask`, `nudging_input_ids` and `nudging_attention_mask`, each of shape
        (batch, length), padded on the left.

    Raises:
        ValueError: if a chat or a template is malformed, if a chat template leaves out a message, or if neither model
            would get the system message.

    Example:
        ```python
        inputs = nudging_hf.chat_inputs(messages, tokenizer, nudging_tokenizer)
        base.generate(**inputs, nudging_model=nudger)
        ```
    """
    many = list_of_chats(chats)
    if reserved := sorted(set(chat_template_kwargs or {}) & set(_RESERVED_TEMPLATE_KWARGS)):
        raise ValueError(
            f"`chat_template_kwargs` takes arguments of the chat template alone, got `{reserved[0]}`, which concerns "
            "how a prompt is encoded: leave it out."
        )
    rows = [plain_ids(tokenizer, chat, base_template) for chat in many]
    if nudging_tokenizer.chat_template:
        nudging_rows = [chat_ids(nudging_tokenizer, chat, chat_template_kwargs) for chat in many]
    else:
        if not has_system(base_template) and any((checked_messages(chat)[0] or "").strip() for chat in many):
            raise ValueError(
                "Neither model would get the system message: the nudging model has no chat template, so it gets the "
                "base's prompt, and `base_template` has no {system}. Put {system} into `base_template`, or leave the "
                "system message out."
            )
        nudging_rows = [plain_ids(nudging_tokenizer, chat, base_template) for chat in many]
    ids, mask = padded(rows, tokenizer)
    nudging_ids, nudging_mask = padded(nudging_rows, nudging_tokenizer)
    own = {"input_ids": ids, "attention_mask": mask}
    return BatchEncoding({**own, "nudging_input_ids": nudging_ids, "nudging_attention_mask": nudging_mask})


def plain_ids(
    tokenizer: Any, messages: Sequence[Message], template: str = DEFAULT_TEMPLATE, add_special_tokens: bool = True
) -> list[int]:
    """The base's prompt for a chat in its own vocabulary; see [`plain_prompt`].

    Control tokens that a message spells out are text. Those of the template are kept.
    """
    system, turns = checked_messages(messages)
    contents = turns if system is None else [system, *turns]

    def filled_in(texts: list[str]) -> str:
        return fill_in(template, *((None, texts) if system is None else (texts[0], texts[1:])))

    return guarded_ids(tokenizer, contents, filled_in, add_special_tokens)


def chat_ids(
    tokenizer: Any, messages: Sequence[Message], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """The nudging model's prompt for a chat, made by its chat template, as in [`chat_inputs`].

    Raises:
        ValueError: if the chat is malformed, or the template leaves out a message.
    """
    system, turns = checked_messages(messages)
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    if system is not None:
        try:
            return templated_ids(tokenizer, [{"role": "system", "content": system}, *chat], chat_template_kwargs)
        except TemplateRefusal:  # Gemma's template refuses a system message, and one of Phi-3's leaves it out.
            chat[0]["content"] = f"{system}\n\n{chat[0]['content']}"
    return templated_ids(tokenizer, chat, chat_template_kwargs)


def padded(rows: Sequence[list[int]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows on the left, with any token if the tokenizer has no padding token.

    Returns:
        Ids and attention mask, both of shape (batch, length).
    """
    pads = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None]
    width = max(map(len, rows))
    ids = torch.tensor([[pads[0]] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
