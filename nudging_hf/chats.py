"""Makes the inputs of both models from chats. It knows messages, templates and tokenizers, never models."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchEncoding

from .core.prompts import TemplateRefusal, guarded_ids, templated_ids

# The plain prompts of the nudging paper (arXiv 2410.09300).
REASONING_TEMPLATE = "{system}\nQuestion: {user}\n"
INSTRUCTION_TEMPLATE = "{system}\nInstruction: {user}\n"

Message = Mapping[str, Any]

# `chat_inputs` sets these arguments of a chat template itself, or they would change how it encodes the prompts.
_RESERVED_TEMPLATE_KWARGS = "add_generation_prompt continue_final_message padding return_assistant_tokens_mask".split()
_RESERVED_TEMPLATE_KWARGS += ["return_dict", "return_tensors", "tokenize"]
_CHAT_FORM = 'A chat must be a list of messages {"role": ..., "content": ...}'


def messages_of(user: str, system: str | None = None) -> list[dict[str, str]]:
    """A chat of a single question."""
    question = {"role": "user", "content": user}
    return [question] if system is None else [{"role": "system", "content": system}, question]


def chat_inputs(
    chats: Sequence[Message] | Sequence[Sequence[Message]],
    tokenizer: Any,
    nudging_tokenizer: Any,
    base_template: str = REASONING_TEMPLATE,
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
        inputs = nudging_hf.chat_inputs(messages, tokenizer, nudging_tokenizer)
        base.generate(**inputs, nudging_model=nudger)
    """
    many = _list_of_chats(chats)
    if reserved := sorted(set(chat_template_kwargs or {}) & set(_RESERVED_TEMPLATE_KWARGS)):
        raise ValueError(
            f"`chat_template_kwargs` takes arguments of the chat template alone, got `{reserved[0]}`, which concerns "
            "how a prompt is encoded: leave it out."
        )
    rows = [plain_ids(tokenizer, chat, base_template) for chat in many]
    if nudging_tokenizer.chat_template:
        nudging_rows = [chat_ids(nudging_tokenizer, chat, chat_template_kwargs) for chat in many]
    else:
        if not _has_system(base_template) and any((checked_messages(chat)[0] or "").strip() for chat in many):
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


def plain_prompt(messages: Sequence[Message], template: str = REASONING_TEMPLATE) -> str:
    r"""The base's prompt for a chat, as plain text.

    Each user turn fills in the template. After the first turn, and without a system message, `{system}` is left out
    together with the white space after it. The answers of earlier turns stand between the user turns, and each ends
    with a line break.

    Args:
        messages: `{"role": ..., "content": ...}`. The first may be the system's, the last is the user's.
        template: one turn, with the field `{user}` and, if the base is to read the system message, `{system}`. Write
            a literal brace twice. The paper's template for reasoning is `"{system}\nQuestion: {user}\n"`.

    Raises:
        ValueError: if the messages have another order or a content that is not text, or the template lacks `{user}`.
    """
    return _fill_in(template, *checked_messages(messages))


def plain_ids(tokenizer: Any, messages: Sequence[Message], template: str = REASONING_TEMPLATE) -> list[int]:
    """The base's prompt for a chat in its own vocabulary; see [`plain_prompt`].

    Control tokens that a message spells out are text. Those of the template are kept.
    """
    system, turns = checked_messages(messages)
    if system is None:
        return guarded_ids(tokenizer, turns, lambda texts: _fill_in(template, None, texts))
    return guarded_ids(tokenizer, [system, *turns], lambda texts: _fill_in(template, texts[0], texts[1:]))


def _fill_in(template: str, system: str | None, turns: Sequence[str]) -> str:
    later = turn_template(template)
    text = template.format(system=system, user=turns[0]) if system is not None else later.format(user=turns[0])
    for answer, question in zip(turns[1::2], turns[2::2], strict=True):
        text += answer + ("" if answer.endswith("\n") else "\n") + later.format(user=question)
    return text


def turn_template(template: str) -> str:
    """Makes the template of a turn without a system message from a template of [`plain_prompt`].

    Raises:
        ValueError: if `plain_prompt` cannot fill in the template.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"The base's template is malformed ({error}): write a literal brace twice, got {template!r}."
        ) from error
    fields = [field for _, field, _, _ in parts if field is not None]
    if unknown := set(fields) - {"user", "system"}:
        raise ValueError(f"The base's template may have the fields {{user}} and {{system}}, got {{{min(unknown)}}}.")
    if fields.count("user") != 1 or fields.count("system") > 1:
        raise ValueError(f"The base's template needs {{user}} once, and {{system}} at most once, got {template!r}.")
    if any(specification or conversion for _, _, specification, conversion in parts):
        raise ValueError(f"A field of the base's template must be a name alone, such as {{user}}, got {template!r}.")
    later, is_after_system = "", False
    for literal, field, _, _ in parts:
        literal = literal.lstrip() if is_after_system else literal
        later += literal.replace("{", "{{").replace("}", "}}") + ("{user}" if field == "user" else "")
        is_after_system = field == "system"
    return later


def _has_system(template: str) -> bool:
    return any(field == "system" for _, field, _, _ in string.Formatter().parse(template))


def checked_messages(messages: Sequence[Message]) -> tuple[str | None, list[str]]:
    """Checks a chat and takes it apart.

    Returns:
        The system message, or `None`, and the contents of the other messages: the user's and the assistant's in turn.

    Raises:
        ValueError: if this is not a list of messages, or they have another order or a content that is not text.
    """
    if not _is_list(messages):
        raise _not_a_chat(messages)
    turns = [(_role(message), _text(message)) for message in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    expected = ["user", "assistant"] * len(turns)
    if len(turns) % 2 == 0 or any(role != due for (role, _), due in zip(turns, expected, strict=False)):
        roles = ", ".join(_role(message) for message in messages)
        raise ValueError(
            "A chat may begin with a system message; then user and assistant alternate, the user first and last; got "
            f"messages of: {roles or 'nobody'}."
        )
    return system, [text for _, text in turns]


def validate_no_surrogates(text: str, what: str) -> None:
    """Raises a `ValueError` for a text with a surrogate code point, because no tokenizer and no file can encode one.

    Python turns bytes that it cannot decode into surrogates. `what` is the text, as the subject of a sentence.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has {text[error.start]!r} at position {error.start}, which is not a character but a byte that "
            "could not be decoded, or half of a UTF-16 character: give the text as UTF-8."
        ) from error


def _list_of_chats(chats: Any) -> list[Sequence[Message]]:
    """A list of chats from one chat or several. The chats themselves are not checked."""
    if not _is_list(chats):
        raise _not_a_chat(chats)
    if not chats:
        raise ValueError("There is no chat, got an empty list: give a list of messages, or a list of such lists.")
    return [chats] if isinstance(chats[0], Mapping) else list(chats)


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, (str, bytes))


def _not_a_chat(given: Any) -> ValueError:
    one = isinstance(given, Mapping) and "role" in given
    return ValueError(f"{_CHAT_FORM}, got {_quote(given)}{': put the message into a list' if one else ''}.")


def _role(message: Message) -> str:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(f'A message must be {{"role": ..., "content": ...}}, got {_quote(message)}.')
    role = message["role"]
    if not isinstance(role, str):
        raise ValueError(f'The role of a message must be "system", "user" or "assistant", got {_quote(role)}.')
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(
                f"A message has `{name}`, which the base cannot read, because its prompt is plain text: write the "
                "call into the content of the message."
            )
    return role


def _text(message: Message) -> str:
    """The content of a message as one string."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"The content of a message must be text, got {_quote(content)}.")
    text = "".join(map(_text_of_part, parts))
    validate_no_surrogates(text, "The content of a message")
    return text


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(
        'The content of a message must be text, a string or a list of strings and of parts {"type": "text", '
        f'"text": ...}}, got a part {_quote(part)}.'
    )


def _quote(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


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
