"""The prompts of a batch as ids, and chats through a chat template. It knows tokenizers, never models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase

# The marks that end the reasoning before an answer. Templates of reasoning models (Qwen3, DeepSeek-R1, EXAONE-Deep,
# Seed-OSS) leave the reasoning out of earlier answers, because the models were trained to read them so.
_ENDS_OF_REASONING = ("</think>", "</thought>", "</seed:think>")
# Switches of the templates of SmolLM3 and Nemotron, which obey them and remove them from the text.
_SWITCHES = ("/think", "/no_think", "/system_override")
# A template may change white space, and may escape some characters. Everything else must stay as it is.
_WORD = re.compile(r"""[^\s\\"'<>&]+""")
# The arguments of `apply_chat_template` that go to the tokenizer and not to the template.
_ENCODING_ARGUMENTS = {"max_length", "padding", "sanitize_control_tokens", "tokenizer_kwargs", "truncation"}
_MOST_ORDERS = 64

# For each tokenizer, by template, roles and keywords: the order in which the contents of messages are written.
_ORDERS: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[int, ...] | None]] = WeakKeyDictionary()


class TemplateRefusal(ValueError):
    """A chat template raises an error for some messages, or leaves out what one of them says."""


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The rows of a padded batch as lists of ids.

    Args:
        input_ids: a tensor of shape (batch, length).
        attention_mask: a tensor of the same shape, 0 on padding; `None` if nothing is padded.
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
        ValueError: for another number of prompts than the base has, and for an empty one.
    """
    prompts = unpadded(input_ids, attention_mask)
    if len(prompts) != rows:
        raise ValueError(
            f"`{name}_input_ids` holds {len(prompts)} prompts, and the base was given {rows}: each row needs one of "
            "each."
        )
    if not all(prompts):
        raise ValueError(f"The {name} model's prompt is empty: give it at least one token in `{name}_input_ids`.")
    return prompts


def nudging_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: Any, nudging_tokenizer: Any, one_vocabulary: bool
) -> list[list[int]]:
    """The nudging model's prompts, if none were given.

    Each is the text of the base's prompt, as one user turn of the nudging tokenizer's chat template or, if there is no
    template, as it is.

    Args:
        prompts: the base's prompts, ids without padding.
        one_vocabulary: whether the base's ids may be passed on as they are.

    Raises:
        ValueError: for a chat template that refuses a user turn or leaves out what it says.
    """
    if not nudging_tokenizer.chat_template and one_vocabulary:
        return [list(prompt) for prompt in prompts]
    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    if not nudging_tokenizer.chat_template:
        return [nudging_tokenizer(text).input_ids for text in texts]
    return [templated_ids(nudging_tokenizer, [{"role": "user", "content": text}]) for text in texts]


def templated_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """The ids that the nudging model's chat template makes of messages, none of which it may leave out.

    A template may change white space, escape quotation marks and angle brackets, and leave the reasoning out of an
    earlier answer. A template that reads no strings, as those of some multimodal models, is given contents in parts.

    Args:
        messages: `{"role": ..., "content": ...}`; the contents are strings.
        template_kwargs: further arguments of the template.

    Raises:
        TemplateRefusal: if the template raises an error for these messages, or leaves one of them out.
    """
    kwargs = dict(template_kwargs or {})
    order = _order_of_contents(tokenizer, messages, kwargs)
    given: Sequence[Mapping[str, Any]] = messages
    if order == ():
        in_parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
        if in_order := _order_of_contents(tokenizer, in_parts, kwargs):
            order, given = in_order, in_parts
    text = _rendered(tokenizer, given, kwargs)
    for i in _left_out(messages, text, order):
        said = messages[i]["content"]
        raise TemplateRefusal(
            f"The nudging model's chat template leaves out what message {i + 1} of {len(messages)}, of role "
            f"{messages[i]['role']!r}, says: {said[:60]!r}{'...' * (len(said) > 60)}. Set "
            "`nudging_tokenizer.chat_template` to one that writes every message, or give the nudging model's prompt "
            "as `nudging_input_ids`."
        )
    if kwargs.keys() & _ENCODING_ARGUMENTS or not _encodes_what_it_renders(tokenizer):
        encoded = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True, **kwargs)
    else:  # This does the same without rendering the messages a second time.
        encoded = tokenizer(text, add_special_tokens=False, padding=False, truncation=False)
    return encoded["input_ids"]


def _encodes_what_it_renders(tokenizer: Any) -> bool:
    """Whether a chat is encoded by transformers' own method, which the tokenizer does not override."""
    return getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template


def _left_out(messages: Sequence[Mapping[str, str]], text: str, order: tuple[int, ...] | None) -> list[int]:
    """The numbers of the messages whose contents are not in a text.

    Args:
        order: which contents the template writes, in the order in which it writes them; `None` if that is not known.
    """
    found, end = set(), 0
    for i in range(len(messages)) if order is None else order:
        content, role = messages[i]["content"], messages[i]["role"]
        wanted = [content]
        if role == "assistant":
            wanted += [content.rpartition(mark)[2] for mark in _ENDS_OF_REASONING if mark in content]
        ends = [at for each in wanted if (at := _end_of(each, text, 0 if order is None else end)) is not None]
        if ends:
            found.add(i)
            end = ends[0]
    return [i for i, message in enumerate(messages) if i not in found and message["content"].strip()]


def _end_of(content: str, text: str, start: int) -> int | None:
    """The end of a content in `text[start:]`, where it is whole or word for word; `None` if it is not there."""
    content = content.strip()
    at = text.find(content, start)
    if at >= 0:
        return at + len(content)
    for word in _WORD.findall(content):
        if word not in _SWITCHES:
            at = text.find(word, start)
            if at < 0:
                return None
            start = at + len(word)
    return start


def _order_of_contents(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], kwargs: dict[str, Any]
) -> tuple[int, ...] | None:
    """Which contents of messages the template writes, in the order in which it writes them.

    The order is found with stand-ins, because a short content may occur in the template's own text. Some templates
    write the system message after the other ones.

    Returns:
        The numbers of the messages in the chat; `None` if the template refuses the stand-ins.
    """
    template = tokenizer.chat_template
    known = _ORDERS.setdefault(tokenizer, {})
    in_parts = not all(isinstance(message["content"], str) for message in messages)
    roles = tuple(message["role"] for message in messages)
    key = (template if isinstance(template, str) else repr(template), roles, in_parts, repr(sorted(kwargs.items())))
    if key in known:
        return known[key]
    marks = [f"zq{i}qz" for i in range(len(messages))]
    contents: list[Any] = [[{"type": "text", "text": mark}] for mark in marks] if in_parts else marks
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    order = None
    try:
        text = _rendered(tokenizer, chat, kwargs)
    except TemplateRefusal:  # It refuses the stand-ins; it may take the messages themselves.
        pass
    else:
        places = sorted((text.find(mark), i) for i, mark in enumerate(marks))
        order = tuple(i for place, i in places if place >= 0)
    if len(known) >= _MOST_ORDERS:
        known.clear()
    known[key] = order
    return order


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], kwargs: dict[str, Any]) -> str:
    """The text that the template writes. It does not matter here how control tokens in it are encoded."""
    kwargs = {name: value for name, value in kwargs.items() if name != "sanitize_control_tokens"}
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs)
    except ImportError:  # Jinja is not installed.
        raise
    except Exception as error:  # A template is somebody else's program, which may raise any error.
        raise TemplateRefusal(f"The nudging model's chat template refuses the messages: {error}") from error
