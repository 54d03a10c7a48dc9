"""The prompts of a batch as ids, and chat templates applied to messages. It knows tokenizers, never models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase

from .control_tokens import REASONING_END_MARKS
from .prompt_guard import PromptGuard

# Some templates (SmolLM3's, Nemotron's) obey these switches in a message and remove them from its text.
_TEMPLATE_SWITCHES = ("/think", "/no_think", "/system_override")
# A template must not change these characters. It may change white space and escape the others.
_WORD = re.compile(r"""[^\s\\"'<>&]+""")
# These arguments of `apply_chat_template` concern the encoding, not the template.
_ENCODING_KWARGS = {"max_length", "padding", "sanitize_control_tokens", "tokenizer_kwargs", "truncation"}
_MAX_CACHED_ORDERS = 64

# For each tokenizer, by template, roles and keywords: the order in which the template writes the messages' contents.
_CONTENT_ORDERS: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[int, ...] | None]] = WeakKeyDictionary()


class TemplateRefusal(ValueError):
    """A chat template raises an error for some messages, or leaves out the content of one of them."""


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The rows of a padded batch as lists of ids.

    Args:
        input_ids: of shape (batch, length).
        attention_mask: of the same shape, 0 on padding. `None` if no row is padded.
    """
    if attention_mask is None:
        return input_ids.tolist()
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


def given_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, rows: int, name: str
) -> list[list[int]]:
    """The prompts that a call gives a small model, as lists of ids without padding.

    Args:
        input_ids, attention_mask: tensors of shape (batch, length).
        rows: how many prompts the base was given.
        name: what the names of both arguments begin with, such as "nudging".

    Raises:
        ValueError: if there are more or fewer prompts than the base has, or one of them is empty.
    """
    prompts = unpad(input_ids, attention_mask)
    if len(prompts) != rows:
        raise ValueError(
            f"`{name}_input_ids` has {len(prompts)} prompts, and `input_ids` has {rows}: give as many prompts in "
            f"`{name}_input_ids` as in `input_ids`."
        )
    if not all(prompts):
        raise ValueError(f"A prompt of the {name} model is empty: give at least one token in `{name}_input_ids`.")
    return prompts


def nudging_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: Any, nudging_tokenizer: Any, one_vocabulary: bool
) -> list[list[int]]:
    """Makes the nudging model's prompts from the base's.

    Each prompt is the text of the base's prompt as one user turn of the nudging tokenizer's chat template. Without a
    chat template it is that text itself.

    Args:
        prompts: the base's prompts, ids without padding.
        tokenizer: the base's.
        nudging_tokenizer: the nudging model's.
        one_vocabulary: whether the nudging model can read the base's ids.

    Returns:
        Ids of the nudging model without padding, one list for each prompt.

    Raises:
        ValueError: if the chat template refuses a user turn or leaves out its content.
    """
    if not nudging_tokenizer.chat_template and one_vocabulary:
        return [list(prompt) for prompt in prompts]
    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    if not nudging_tokenizer.chat_template:
        return [guarded_ids(nudging_tokenizer, [text], "".join) for text in texts]
    return [templated_ids(nudging_tokenizer, [{"role": "user", "content": text}]) for text in texts]


def guarded_ids(
    tokenizer: Any, contents: Sequence[str], fill_in: Callable[[list[str]], str], add_special_tokens: bool = True
) -> list[int]:
    """Encodes a plain prompt.

    Control tokens that a content spells out are encoded as text, and those of the prompt around it are kept.

    Args:
        tokenizer: the tokenizer of the model that reads the prompt.
        contents: what users have written.
        fill_in: makes the prompt from the contents.
        add_special_tokens: whether it has the tokens that the tokenizer adds to a text, such as BOS.
    """
    guard = PromptGuard(tokenizer, contents)
    if not guard.is_needed:
        return tokenizer(fill_in(list(contents)), add_special_tokens=add_special_tokens)["input_ids"]
    return guard.encode(fill_in([guard.broken(content) for content in contents]), add_special_tokens)


def templated_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Applies the nudging model's chat template to messages and checks that the result has each message's content.

    Control tokens that a content spells out are encoded as text.

    A template may change white space, escape quotation marks and angle brackets, and leave the reasoning out of an
    earlier answer. Some templates of multimodal models cannot read a content that is a string. They get it as a list
    of parts.

    Args:
        tokenizer: the nudging model's.
        messages: `{"role": ..., "content": ...}` with strings as contents.
        template_kwargs: further arguments of the template.

    Returns:
        Ids of the nudging model's vocabulary.

    Raises:
        TemplateRefusal: if the template raises an error for these messages, or leaves out a content.
        ValueError: if the tokenizer can encode a spelling only as the control token that it spells.
    """
    kwargs = dict(template_kwargs or {})
    guard = PromptGuard(tokenizer, [message["content"] for message in messages])
    order = _find_content_order(tokenizer, messages, kwargs)
    given: Sequence[Mapping[str, Any]] = [{**each, "content": guard.broken(each["content"])} for each in messages]
    if order == ():
        in_parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in given]
        if in_order := _find_content_order(tokenizer, in_parts, kwargs):
            order, given = in_order, in_parts
    text = _render(tokenizer, given, kwargs)
    for i in _missing_messages(messages, guard.mended(text), order):
        content = messages[i]["content"]
        raise TemplateRefusal(
            f"The nudging model's chat template leaves out the content of message {i + 1} of {len(messages)}, of role "
            f"{messages[i]['role']!r}: {content[:60]!r}{'...' * (len(content) > 60)}. Set "
            "`nudging_tokenizer.chat_template` to one that writes every message, or give the nudging model's prompt "
            "as `nudging_input_ids`."
        )
    if guard.is_needed:
        if refused := sorted(kwargs.keys() & _ENCODING_KWARGS - {"sanitize_control_tokens"}):
            raise ValueError(
                "A message spells out a control token, which is encoded as text, and then the chat template takes no "
                f"`{refused[0]}`: leave it out."
            )
        return guard.encode(text, add_special_tokens=False)
    if kwargs.keys() & _ENCODING_KWARGS or not _uses_standard_encoding(tokenizer):
        encoded = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True, **kwargs)
    else:  # The same, without rendering the messages a second time.
        encoded = tokenizer(text, add_special_tokens=False, padding=False, truncation=False)
    return encoded["input_ids"]


def _uses_standard_encoding(tokenizer: Any) -> bool:
    """Whether the tokenizer has transformers' own `apply_chat_template` and does not override it."""
    return getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template


def _missing_messages(messages: Sequence[Mapping[str, str]], text: str, order: tuple[int, ...] | None) -> list[int]:
    """The indices of the messages whose contents are not in a text.

    Args:
        messages: with strings as contents.
        text: the rendered chat.
        order: the indices of the messages whose contents the template writes, in the order in which it writes them.
            `None` if the order is unknown.
    """
    found, end = set(), 0
    for i in range(len(messages)) if order is None else order:
        content, role = messages[i]["content"], messages[i]["role"]
        wanted = [content]
        if role == "assistant":
            wanted += [content.rpartition(mark)[2] for mark in REASONING_END_MARKS if mark in content]
        ends = [at for each in wanted if (at := _find_end(each, text, 0 if order is None else end)) is not None]
        if ends:
            found.add(i)
            end = ends[0]
    return [i for i, message in enumerate(messages) if i not in found and message["content"].strip()]


def _find_end(content: str, text: str, start: int) -> int | None:
    """Where a content ends in `text[start:]`, found as a whole or word by word; `None` if it is not there.

    It is the first of both ends. If the template has escaped the content, the whole may stand in a later message.
    """
    content = content.strip()
    at = text.find(content, start)
    whole = at + len(content) if at >= 0 else None
    for word in _WORD.findall(content):
        if word not in _TEMPLATE_SWITCHES:
            at = text.find(word, start)
            if at < 0:
                return whole
            start = at + len(word)
    return start if whole is None else min(whole, start)


def _find_content_order(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], kwargs: dict[str, Any]
) -> tuple[int, ...] | None:
    """Finds out which messages' contents the template writes, and in which order.

    The template is tried with stand-ins as contents, because a short content may occur in the template's own text.
    The order matters because some templates write the system message after the others.

    Returns:
        The indices of the messages in that order. `None` if the template refuses the stand-ins.
    """
    template = tokenizer.chat_template
    known = _CONTENT_ORDERS.setdefault(tokenizer, {})
    in_parts = not all(isinstance(message["content"], str) for message in messages)
    roles = tuple(message["role"] for message in messages)
    key = (template if isinstance(template, str) else repr(template), roles, in_parts, repr(sorted(kwargs.items())))
    if key in known:
        return known[key]
    stand_ins = [f"zq{i}qz" for i in range(len(messages))]
    contents: list[Any] = [[{"type": "text", "text": mark}] for mark in stand_ins] if in_parts else stand_ins
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    order = None
    try:
        text = _render(tokenizer, chat, kwargs)
    except TemplateRefusal:  # It refuses the stand-ins. Whether it accepts the messages is seen later.
        pass
    else:
        places = sorted((text.find(mark), i) for i, mark in enumerate(stand_ins))
        order = tuple(i for place, i in places if place >= 0)
    if len(known) >= _MAX_CACHED_ORDERS:
        known.clear()
    known[key] = order
    return order


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], kwargs: dict[str, Any]) -> str:
    """The text that the template writes. How control tokens in it will be encoded does not matter here."""
    kwargs = {name: value for name, value in kwargs.items() if name != "sanitize_control_tokens"}
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs)
    except ImportError:  # Jinja is not installed.
        raise
    except Exception as error:  # A template is a program, which may raise anything.
        raise TemplateRefusal(f"The nudging model's chat template refuses the messages: {error}") from error
