"""Whether a pair of models is fit for nudging, found out from tokenizers, configs and one pass of each model."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from ..core.answer import OneVocabulary, answer_class
from ..core.generate import loaded_vocabulary
from ..core.reading_mode import reading_mode
from ..core.transformers_private import end_tokens, input_device, input_rows, output_rows
from ..core.vocabulary import Vocabulary, to_text
from ..pair import Pair

# What both tokenizers should carry unchanged, with the name of each in a finding.
TEXTS = {
    "plain text": "Hello, world. It is 7 o'clock.",
    "capital letters": "ÉCOLE and McDonald",
    "double spaces": "one  two   three",
    "line breaks and tabs": "one\n\n\ttwo\r\nthree",
    "combining marks": "cafe\u0301",
    "emoji": "👩‍👩‍👧 😀",
    "other scripts": "Привет, 你好, مرحبا, ไทย",
    "code": "if (a<b) { return a[0] != 'x'; }",
}


class Level(Enum):
    """How much a finding matters."""

    FINE = "ok"
    NOTE = "note"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """What was found out about a pair.

    Args:
        subject: what was looked at.
        level: whether it is as it should be.
        message: one sentence.
    """

    subject: str
    level: Level
    message: str


def fitness(pair: Pair) -> Iterator[Finding]:
    """What is found out about a pair before it answers anything."""
    ours = loaded_vocabulary(pair.tokenizer, pair.base, "tokenizer", "base")
    theirs = loaded_vocabulary(pair.nudging_tokenizer, pair.nudging_model, "nudging_tokenizer", "nudging model")
    sides = (("base", pair.base, ours), ("nudging model", pair.nudging_model, theirs))
    one = answer_class(ours, theirs) is OneVocabulary
    yield Finding("vocabulary", Level.FINE, "one for both." if one else "two; words cross as text.")
    for whose, model, vocabulary in sides:
        yield _kind(whose, model)
        yield _ids(whose, model, vocabulary)
        yield _logits(whose, model, vocabulary)
        yield _texts(whose, vocabulary)
    yield _contexts(pair)
    yield _end_of_turn(pair)


def _kind(whose: str, model: Any) -> Finding:
    mode, name = reading_mode(model), type(model).__name__
    if not mode.is_causal:
        return Finding(f"{whose}: kind", Level.PROBLEM, f"{name} does not read ids strictly from left to right.")
    if mode.cache_problem is not None:
        return Finding(f"{whose}: kind", Level.PROBLEM, f"{name}: {mode.cache_problem}; only `use_cache=False` works.")
    held = [
        "rows share a cache" if mode.rows_share_cache else "each row has a cache of its own, so batches gain less",
        *(["it reads one token a pass, so drafts gain nothing"] if mode.one_token_per_pass else []),
    ]
    slow = not mode.rows_share_cache or mode.one_token_per_pass
    return Finding(f"{whose}: kind", Level.NOTE if slow else Level.FINE, f"{name}: {'; '.join(held)}.")


def _ids(whose: str, model: Any, vocabulary: Vocabulary) -> Finding:
    tokens, rows, scored = len(vocabulary.tokenizer), input_rows(model), output_rows(model)
    subject = f"{whose}: ids"
    if rows is not None and tokens > rows:
        message = f"its tokenizer has {tokens:,} tokens, and the model embeddings for {rows:,}: is it its own?"
        return Finding(subject, Level.PROBLEM, message)
    return Finding(subject, Level.FINE, f"{tokens:,} tokens, of which the model can write {min(tokens, scored):,}.")


@torch.no_grad()
def _logits(whose: str, model: Any, vocabulary: Vocabulary) -> Finding:
    ids = torch.tensor([vocabulary.encode_after("", TEXTS["plain text"])], device=input_device(model))
    logits = model(input_ids=ids).logits
    if bool(logits.isfinite().all()):
        return Finding(f"{whose}: logits", Level.FINE, f"finite in {model.dtype}.")
    message = f"NaN or infinite in {model.dtype}: look at its weights, or load it in another dtype."
    return Finding(f"{whose}: logits", Level.PROBLEM, message)


def _texts(whose: str, vocabulary: Vocabulary) -> Finding:
    lost = [
        name for name, text in TEXTS.items() if vocabulary.join(vocabulary.encode_after("", text)) != text.encode()
    ]
    if not lost:
        return Finding(f"{whose}: text", Level.FINE, "its tokenizer carries all kinds of text unchanged.")
    first = TEXTS[lost[0]]
    got = to_text(vocabulary.join(vocabulary.encode_after("", first)))
    level = Level.PROBLEM if {"plain text", "capital letters"} & set(lost) else Level.NOTE
    message = f"its tokenizer changes {', '.join(lost)}: {first!a} becomes {got!a}."
    return Finding(f"{whose}: text", level, message)


def _contexts(pair: Pair) -> Finding:
    positions = [
        getattr(model.config.get_text_config(), "max_position_embeddings", None)
        for model in (pair.base, pair.nudging_model)
    ]
    shown = ["unbounded" if each is None else f"{each:,}" for each in positions]
    message = f"{shown[0]} tokens for the base and {shown[1]} for the nudging model."
    ours, theirs = positions
    if theirs is not None and (ours is None or theirs < ours):
        return Finding("contexts", Level.NOTE, f"{message} Longer answers go beyond what the nudging model has seen.")
    return Finding("contexts", Level.FINE, message)


def _end_of_turn(pair: Pair) -> Finding:
    """Whether the token with which the nudging model's chat template ends a turn ends its answers."""
    tokenizer, template = pair.nudging_tokenizer, "nudging model: chat template"
    subject = "nudging model: end of a turn"
    if not getattr(tokenizer, "chat_template", None):
        return Finding(subject, Level.NOTE, "its tokenizer has no chat template: is it an aligned model?")
    said = "That is all I know"
    turns = [{"role": "user", "content": "What do you know?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, ValueError) as error:
        return Finding(template, Level.PROBLEM, f"it refuses a question and its answer: {error}.")
    if said not in text:
        return Finding(template, Level.PROBLEM, "it leaves out the answer to a question.")
    after = tokenizer(text[text.rindex(said) + len(said) :], add_special_tokens=False)["input_ids"]
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    end = next((token for token in after if token in control), None)
    if end is None:
        return Finding(subject, Level.NOTE, "its chat template puts no control token after an answer.")
    name, ends = tokenizer.convert_ids_to_tokens(end), end_tokens(pair.nudging_model, tokenizer)
    if end in ends:
        return Finding(subject, Level.FINE, f"{name} ends an answer, as in its chat template.")
    message = (
        f"its chat template ends a turn with {name}, but its EOS is "
        f"{', '.join(tokenizer.convert_ids_to_tokens(ends)) or 'missing'}: answers would not end. Set "
        f"`nudging_model.generation_config.eos_token_id` to {end}."
    )
    return Finding(subject, Level.PROBLEM, message)
