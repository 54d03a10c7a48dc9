"""Which tokens of a tokenizer are control tokens. It knows tokenizers and their templates, never text or models."""

from __future__ import annotations

from typing import Any

# These marks end the reasoning before an answer. The templates of reasoning models (Qwen3, DeepSeek-R1, EXAONE-Deep,
# Seed-OSS) leave the reasoning out of earlier answers, because the models were trained so.
REASONING_END_MARKS = ("</think>", "</thought>", "</seed:think>")

_TRIAL = [{"role": role, "content": f"zq{i}qz"} for i, role in enumerate(("user", "assistant", "user"))]


def control_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that are no text: special tokens, and those that part the turns of a chat in the tokenizer's template.

    DeepSeek-V3's `<｜User｜>` is an added token, but not special. Marks within a turn, such as `<think>` and
    `<tool_call>`, are text that a model may write.
    """
    added = tokenizer.added_tokens_decoder
    special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return special
    within_turns = {mark.replace("/", "") for mark in REASONING_END_MARKS}.union(REASONING_END_MARKS)
    others = {token.content: i for i, token in added.items() if i not in special and token.content in template}
    others = {content: i for content, i in others.items() if content.strip() and content not in within_turns}
    if not others:
        return special
    try:
        chat = tokenizer.apply_chat_template(_TRIAL, tokenize=False)
    except Exception:  # A template is a program, which may raise anything, and this one refuses so plain a chat.
        return special
    return special.union(i for content, i in others.items() if content in chat)
