"""The prompts of a batch as ids, and the nudging model's where none was given. It knows tokenizers, never models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The rows of a padded batch as lists of ids.

    Args:
        input_ids: of shape (batch, length).
        attention_mask: of the same shape, 0 on padding; `None` where nothing is padded.
    """
    if attention_mask is None:
        return input_ids.tolist()
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


def nudging_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: Any, nudging_tokenizer: Any, one_vocabulary: bool
) -> list[list[int]]:
    """The nudging model's prompts where none were given.

    Each is the text of the base's prompt as one user turn of the nudging tokenizer's chat template, or as it is where
    there is no template.

    Args:
        prompts: the base's prompts, ids without padding.
        one_vocabulary: whether the base's ids may be passed on as they are.
    """
    if not nudging_tokenizer.chat_template and one_vocabulary:
        return [list(prompt) for prompt in prompts]
    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    if not nudging_tokenizer.chat_template:
        return [nudging_tokenizer(text).input_ids for text in texts]
    return [
        nudging_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in texts
    ]
