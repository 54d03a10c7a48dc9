"""How the base alone would have gone on at each nudge. It knows models and ids, never pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .core.prompts import unpad
from .core.transformers_private import end_tokens, greatest_length, input_device, plain_generate
from .core.vocabulary import Vocabulary, to_text
from .encoded_chats import padded
from .provenance import Piece, pieces_of


def pieces_with_continuations(
    model: Any,
    output: Any,
    tokenizer: Any,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> list[list[Piece]]:
    """The pieces of [`~provenance.pieces_of`], with continuations as of [`with_continuations`]. Prompts are text.

    Args:
        model: the base.
        output: what a nudged `generate` of it returned with `return_dict_in_generate=True`.
        tokenizer: the base's.
        attention_mask: that of the prompts, of shape (batch, prompt_length), if they are padded.
        max_new_tokens: how many tokens a continuation has at the most.
        batch_size: how many continuations are written at a time.
    """
    vocabulary = Vocabulary(tokenizer)
    answers = pieces_of(output, vocabulary)
    length = output.sequences.shape[1] - output.nudged_mask.shape[1]
    if attention_mask is not None:  # Several answers to one prompt stand in successive rows.
        attention_mask = attention_mask.repeat_interleave(len(answers) // len(attention_mask), dim=0)
    prompts, new = unpad(output.sequences[:, :length], attention_mask), output.sequences[:, length:].tolist()
    rows = list(zip(prompts, new, answers, strict=True))
    return with_continuations(model, tokenizer, rows, max_new_tokens, batch_size)


@torch.no_grad()
def with_continuations(
    model: Any,
    tokenizer: Any,
    answers: Sequence[tuple[list[int], list[int], Sequence[Piece]]],
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> list[list[Piece]]:
    """The pieces of some answers, with what the base alone would have written from each nudge on.

    A nudge is a stretch of the nudging model's text. The first of its pieces gets an `instead` with the greedy
    `continuation` of the base after the prompt and the answer so far.

    Args:
        model, tokenizer: the base and its tokenizer.
        answers: for each answer the ids of the base's prompt, those of the answer, and its pieces.
        max_new_tokens: how many tokens a continuation has at the most. The last position of the base is a limit too.
        batch_size: how many continuations are written at a time.
    """
    positions = greatest_length(model)
    vocabulary, eos = Vocabulary(tokenizer), end_tokens(model, tokenizer)
    found = [list(pieces) for _, _, pieces in answers]
    nudges = [
        (row, i, piece.instead)
        for row, pieces in enumerate(found)
        for i, piece in enumerate(pieces)
        if piece.instead is not None and not (i and pieces[i - 1].nudged)
    ]
    for start in range(0, len(nudges), batch_size):
        batch = nudges[start : start + batch_size]
        texts = [[*answers[row][0], *answers[row][1][: instead.place]] for row, _, instead in batch]
        ids, mask = (each.to(input_device(model)) for each in padded(texts, tokenizer))
        room = max_new_tokens if positions is None else positions + 1 - ids.shape[1]  # The last token is not read.
        written = plain_generate(model)(
            model,
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(max_new_tokens, room),
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=eos[0] if eos else 0,
        )
        for (row, i, instead), own in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(own) if token in eos), None)
            instead = replace(instead, continuation=to_text(vocabulary.join(own[:end])))
            found[row][i] = found[row][i]._replace(instead=instead)
    return found
