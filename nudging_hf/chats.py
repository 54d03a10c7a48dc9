"""Chats as the inputs of both models. It knows messages, templates and tokenizers, never models."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchEncoding

from .core.prompts import TemplateRefusal, templated_ids

# The plain prompts of the nudging paper (arXiv 2410.09300).
REASONING_TEMPLATE = "{system}\nQuestion: {user}\n"
INSTRUCTION_TEMPLATE = "{system}\nInstruction: {user}\n"

Message = Mapping[str, Any]

# What `chat_inputs` itself tells a chat template, or what would make other rows of its prompts.
_NOT_OF_TEMPLATES = (
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
)
_A_CHAT = 'A chat is a list of messages {"role": ..., "content": ...}'


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
    """The inputs of both models for one chat or several, to be given to `generate` as they are.

    The base, which knows no chats, is given [`plain_prompt`]; the nudging model its own chat template, or the base's
    prompt where it has none. A chat template that refuses a system message, or leaves it out, is given its text at the
    head of the first user turn. One that leaves out another message is refused. It may leave out the reasoning in
    front of an earlier answer (`<think>...</think>`), as the templates of models that reason do.

    Args:
        chats: a list of messages `{"role": ..., "content": ...}`, or a list of such lists, one a row. Roles are
            "system", "user" and "assistant"; the last message is the user's. A content is a string, or a list of
            strings and of parts `{"type": "text", "text": ...}`, which are joined. Other fields of a message are not
            read; tool calls are refused.
        tokenizer, nudging_tokenizer: of the base and of the nudging model.
        base_template: see [`plain_prompt`].
        chat_template_kwargs: what the nudging model's chat template is to be told besides, such as
            `{"enable_thinking": False}`.

    Returns:
        `input_ids`, `attention_mask`, `nudging_input_ids` and `nudging_attention_mask`, each of shape
        (batch, length), padded on the left.

    Raises:
        ValueError: for a chat or a template that cannot be made a prompt of, and for a system message that neither
            model would be given.

    Example:
        inputs = nudging_hf.chat_inputs(messages, tokenizer, nudging_tokenizer)
        base.generate(**inputs, nudging_model=nudger)
    """
    many = _list_of_chats(chats)
    if unheeded := sorted(set(chat_template_kwargs or {}) & set(_NOT_OF_TEMPLATES)):
        raise ValueError(
            f"`chat_template_kwargs` is what the chat template is told, got `{unheeded[0]}`, which says how a prompt "
            "is begun or encoded: leave it out."
        )
    plain = [plain_prompt(chat, base_template) for chat in many]
    rows = [tokenizer(text)["input_ids"] for text in plain]
    if nudging_tokenizer.chat_template:
        nudging_rows = [_chat_ids(nudging_tokenizer, chat, chat_template_kwargs) for chat in many]
    else:
        if not _has_system(base_template) and any((checked_messages(chat)[0] or "").strip() for chat in many):
            raise ValueError(
                "Neither model would be given the system message: the nudging model has no chat template, so that it "
                "is given the base's prompt, and the base's template has no {system}. Put {system} into "
                "`base_template`, or leave the system message out."
            )
        nudging_rows = [nudging_tokenizer(text)["input_ids"] for text in plain]
    ids, mask = padded(rows, tokenizer)
    nudging_ids, nudging_mask = padded(nudging_rows, nudging_tokenizer)
    return BatchEncoding({
        "input_ids": ids,
        "attention_mask": mask,
        "nudging_input_ids": nudging_ids,
        "nudging_attention_mask": nudging_mask,
    })  # fmt: skip


def plain_prompt(messages: Sequence[Message], template: str = REASONING_TEMPLATE) -> str:
    r"""What a base is given of a chat: plain text.

    Each user turn is the template, filled in. After the first turn, and where there is no system message, `{system}`
    is left out together with the white space behind it. Answers of earlier turns stand between, each ended by a line
    break.

    Args:
        messages: `{"role": ..., "content": ...}`; the first may be the system's, the last is the user's.
        template: one turn, with the fields `{user}` and, where the base is to see it, `{system}`; a brace itself is
            written twice. `"{system}\nQuestion: {user}\n"` is the paper's for reasoning.

    Raises:
        ValueError: for messages in another order, content that is not text, or a template without `{user}`.
    """
    later = turn_template(template)
    system, turns = checked_messages(messages)
    text = template.format(system=system, user=turns[0]) if system is not None else later.format(user=turns[0])
    for said, asked in zip(turns[1::2], turns[2::2], strict=True):
        text += said + ("" if said.endswith("\n") else "\n") + later.format(user=asked)
    return text


def turn_template(template: str) -> str:
    """The template of a turn without a system message.

    Raises:
        ValueError: for a template that `plain_prompt` cannot fill in.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"The base's template: {error}; a brace itself is written twice.") from error
    fields = [field for _, field, _, _ in parts if field is not None]
    if unknown := set(fields) - {"user", "system"}:
        raise ValueError(f"The base's template knows the fields {{user}} and {{system}}, got {{{min(unknown)}}}.")
    if fields.count("user") != 1 or fields.count("system") > 1:
        raise ValueError(f"The base's template needs {{user}} once, and {{system}} at most once, got {template!r}.")
    if any(specification or conversion for _, _, specification, conversion in parts):
        raise ValueError(f"A field of the base's template is a name alone, such as {{user}}, got {template!r}.")
    later, behind_system = "", False
    for literal, field, _, _ in parts:
        literal = literal.lstrip() if behind_system else literal
        later += literal.replace("{", "{{").replace("}", "}}") + ("{user}" if field == "user" else "")
        behind_system = field == "system"
    return later


def _has_system(template: str) -> bool:
    return any(field == "system" for _, field, _, _ in string.Formatter().parse(template))


def checked_messages(messages: Sequence[Message]) -> tuple[str | None, list[str]]:
    """The system message of a chat, if it has one, and its turns: the user's and the assistant's by turns.

    Raises:
        ValueError: for messages in another order, for content that is not text, and for what is no list of messages.
    """
    if not _is_list(messages):
        raise _no_chat(messages)
    said = [(_role(message), _text(message)) for message in messages]
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    expected = ["user", "assistant"] * len(said)
    if len(said) % 2 == 0 or any(role != due for (role, _), due in zip(said, expected, strict=False)):
        roles = ", ".join(_role(message) for message in messages)
        raise ValueError(
            "A chat goes: a system message or none, then user and assistant by turns, the user last; got messages of: "
            f"{roles or 'nobody'}."
        )
    return system, [text for _, text in said]


def refuse_half_characters(text: str, what: str) -> None:
    """Refuses a text that no tokenizer and no file takes: one with a surrogate code point, which is no character.

    Args:
        text: any string. Python reads bytes that it cannot decode as such code points.
        what: what the text is, as the subject of a sentence.

    Raises:
        ValueError: where there is one, saying where it stands.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds {text[error.start]!r} at position {error.start}, which is no character but a byte that "
            "could not be decoded, or half of a character of UTF-16: give it as UTF-8."
        ) from error


def _list_of_chats(chats: Any) -> list[Sequence[Message]]:
    """One chat or several as a list of chats, which are not looked into."""
    if not _is_list(chats):
        raise _no_chat(chats)
    if not chats:
        raise ValueError("There is no chat: give a list of messages, or a list of such lists.")
    return [chats] if isinstance(chats[0], Mapping) else list(chats)


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, (str, bytes))


def _no_chat(given: Any) -> ValueError:
    one = isinstance(given, Mapping) and "role" in given
    return ValueError(f"{_A_CHAT}, got {_short(given)}{': put the message into a list' if one else ''}.")


def _role(message: Message) -> str:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(f'A message is {{"role": ..., "content": ...}}, got {_short(message)}.')
    role = message["role"]
    if not isinstance(role, str):
        raise ValueError(f'The role of a message is "system", "user" or "assistant", got {_short(role)}.')
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(
                f"A message has `{name}`, which the base, whose prompt is plain text, cannot read: write what was "
                "called into its content."
            )
    return role


def _text(message: Message) -> str:
    """The content of a message, which may come in parts."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"The content of a message must be text, got {_short(content)}.")
    text = "".join(map(_text_of_part, parts))
    refuse_half_characters(text, "The content of a message")
    return text


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(
        'The content of a message must be text, a string or a list of strings and of parts {"type": "text", '
        f'"text": ...}}, got a part {_short(part)}.'
    )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _chat_ids(tokenizer: Any, messages: Sequence[Message], kwargs: Mapping[str, Any] | None) -> list[int]:
    """The nudging model's prompt for a chat, by its chat template."""
    system, turns = checked_messages(messages)
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    if system is not None:
        try:
            return templated_ids(tokenizer, [{"role": "system", "content": system}, *chat], kwargs)
        except TemplateRefusal:  # Gemma's refuses a system message; one of Phi-3's leaves it out.
            chat[0]["content"] = f"{system}\n\n{chat[0]['content']}"
    return templated_ids(tokenizer, chat, kwargs)


def padded(rows: Sequence[list[int]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of shape (batch, length), padded on the left; masked padding may be any token."""
    pads = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None]
    width = max(map(len, rows))
    ids = torch.tensor([[pads[0]] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
