"""Chats as text: messages, and the plain prompt of the base. It knows no tokenizers, and imports nothing of torch."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

# The plain prompts of the nudging paper (arXiv 2410.09300).
REASONING_TEMPLATE = "{system}\nQuestion: {user}\n"
INSTRUCTION_TEMPLATE = "{system}\nInstruction: {user}\n"
# All commands, functions and examples take this one, so that a threshold is found on prompts of the form in which it
# is used.
DEFAULT_TEMPLATE = REASONING_TEMPLATE

Message = Mapping[str, Any]

_CHAT_FORM = 'A chat must be a list of messages {"role": ..., "content": ...}'


def messages_of(user: str, system: str | None = None) -> list[dict[str, str]]:
    """A chat of a single question."""
    question = {"role": "user", "content": user}
    return [question] if system is None else [{"role": "system", "content": system}, question]


def plain_prompt(messages: Sequence[Message], template: str = DEFAULT_TEMPLATE) -> str:
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
    return fill_in(template, *checked_messages(messages))


def fill_in(template: str, system: str | None, turns: Sequence[str]) -> str:
    """The [`plain_prompt`] of checked messages."""
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


def has_system(template: str) -> bool:
    """Whether a template of [`plain_prompt`] shows the base the system message."""
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


def list_of_chats(chats: Any) -> list[Sequence[Message]]:
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
    return ValueError(f"{_CHAT_FORM}, got {quoted(given)}{': put the message into a list' if one else ''}.")


def _role(message: Message) -> str:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(f'A message must be {{"role": ..., "content": ...}}, got {quoted(message)}.')
    role = message["role"]
    if not isinstance(role, str):
        raise ValueError(f'The role of a message must be "system", "user" or "assistant", got {quoted(role)}.')
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
        raise ValueError(f"The content of a message must be text, got {quoted(content)}.")
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
        f'"text": ...}}, got a part {quoted(part)}.'
    )


def quoted(value: Any) -> str:
    """A value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
