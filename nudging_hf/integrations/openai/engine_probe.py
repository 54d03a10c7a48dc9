"""Tries whether an engine can run a base, before it is relied upon. It knows requests, never answers or rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from transformers.utils import logging

from ...core.vocabulary import Vocabulary
from .completions import NO_LOGPROBS, Chunk, Completions, EngineError, EngineUnavailable

logger = logging.get_logger(__name__)

_TEXTS = ("The sky is blue because", "Question: What is 2 + 3?\nAnswer:", "Once upon a time, there was a")
_TOKENS = 6  # Of each trial.
_GREEDY_TOLERANCE = 0.05  # Between the token's log-probability and the greatest, which rounding may part.
_DECODE_EOS = ("vllm", "sglang")  # With `ignore_eos`, others forbid EOS, which changes what the base would write.


class Abilities(NamedTuple):
    """What a trial has shown.

    Args:
        decodes_eos: whether the engine tells EOS like any other token if it is asked to with `ignore_eos`.
        context_length: how many tokens a prompt and its answer may have together, if it says so.
    """

    decodes_eos: bool
    context_length: int | None = None


async def probe(
    completions: Completions, vocabulary: Vocabulary, logprobs: int, stop_fields: dict[str, Any] | None = None
) -> Abilities:
    """Asks for some short completions.

    Args:
        completions: the engine.
        vocabulary: the base's, by which the engine's tokens are checked.
        logprobs: of how many tokens the probabilities are needed at each place.
        stop_fields: fields of a request with which the engine is to stop after one token, if it is to stop by itself
            where the base is unsure.

    Raises:
        EngineUnavailable: if the engine cannot be reached for the moment.
        EngineError: if the engine cannot run the base. The message says what is wrong and what mends it.
    """
    compared = False
    for text in _TEXTS:
        prompt = [int(token) for token in vocabulary.tokenizer(text)["input_ids"]]
        chunks = await _complete(completions, prompt, text, logprobs)
        _check_prompt(chunks, prompt)
        compared = _check_tokens(chunks, prompt, vocabulary, logprobs) or compared
        if compared:
            break
    if not compared:
        logger.warning(
            "The engine ended each trial at once, so it is not known whether its tokens are those of the tokenizer."
        )
    if stop_fields is not None:
        chunks = await _chunks(completions, prompt, logprobs, **stop_fields)
        if sum(len(chunk.tokens) for chunk in chunks) != 1:
            raise EngineError(
                "The engine does not stop where the base is unsure: start vLLM with `--logits-processors "
                "nudging_hf.integrations.vllm.stop_when_unsure:StopWhenUnsure`, or leave out `stops_when_unsure`."
            )
    card = await completions.card()
    length = card.get("max_model_len")
    return Abilities(card.get("owned_by") in _DECODE_EOS, length if isinstance(length, int) else None)


async def _complete(completions: Completions, prompt: Sequence[int], text: str, logprobs: int) -> list[Chunk]:
    try:
        return await _chunks(completions, prompt, logprobs, stream_options={"include_usage": True})
    except EngineUnavailable:
        raise
    except EngineError as error:
        try:
            await _chunks(completions, text, logprobs)
        except EngineError:  # It is not the ids that it refuses.
            raise error from None
        raise EngineError(
            "The engine takes a text as a prompt, but not token ids of this tokenizer. If its model has another "
            "tokenizer, give that as `tokenizer=`. If it takes no ids at all, take an engine that does (vLLM, SGLang, "
            f"llama.cpp's server), because a text alone cannot be continued exactly. It said: {error}"
        ) from None


async def _chunks(completions: Completions, prompt: Sequence[int] | str, logprobs: int, **more: Any) -> list[Chunk]:
    async with aclosing(completions.stream(prompt, _TOKENS, logprobs, **more)) as chunks:
        return [chunk async for chunk in chunks]


def _check_prompt(chunks: Sequence[Chunk], prompt: Sequence[int]) -> None:
    for chunk in chunks:
        if chunk.prompt_ids is not None and list(chunk.prompt_ids) != list(prompt):
            raise EngineError(
                f"The engine has read other ids than it was sent ({list(chunk.prompt_ids)[:8]} for "
                f"{list(prompt)[:8]}): start it without a template or a prefix of its own for completions."
            )
        if chunk.prompt_tokens is not None and chunk.prompt_tokens != len(prompt):
            raise EngineError(
                f"The engine has read {chunk.prompt_tokens} tokens of a prompt of {len(prompt)} ids: start it without "
                "a template or a prefix of its own for completions."
            )


def _check_tokens(chunks: Sequence[Chunk], prompt: Sequence[int], vocabulary: Vocabulary, logprobs: int) -> bool:
    """Checks a completion, and returns whether its text could be compared with its ids."""
    tokens = [token for chunk in chunks for token in chunk.tokens]
    text = "".join(chunk.text for chunk in chunks)
    if text and not tokens:
        raise EngineError(NO_LOGPROBS)
    for token in tokens:
        if len(token.top_logprobs) < logprobs:
            raise EngineError(
                f"The engine tells the probabilities of {len(token.top_logprobs)} tokens at a place, and {logprobs} "
                "are needed: start vLLM with a greater `--max-logprobs`, or take another `nudge_gate`."
            )
        if token.logprob < token.top_logprobs[0] - _GREEDY_TOLERANCE:
            raise EngineError(
                "The engine does not write the most probable token at temperature 0, or tells probabilities that it "
                "has processed: start vLLM with `--logprobs-mode raw_logprobs`, and without sampling settings of its "
                "own that cannot be switched off."
            )
    own = _text_of([token.id for token in tokens], prompt, vocabulary)
    given = text.split("\ufffd")[0].strip()
    if not given:
        return False
    if not own.startswith(given) and not given.startswith(own or " "):
        raise EngineError(
            f"The engine's tokens are not those of the tokenizer: it wrote {given[:40]!r}, and its ids mean "
            f"{own[:40]!r}. Give the tokenizer of the model that the engine runs as `tokenizer=`, or its folder or "
            "Hub name as `base=`."
        )
    return True


def _text_of(ids: Sequence[int], prompt: Sequence[int], vocabulary: Vocabulary) -> str:
    size = len(vocabulary.tokenizer)
    known = [token for token in ids if token < size]
    decode = vocabulary.tokenizer.decode
    before = decode(list(prompt), skip_special_tokens=True)
    return decode([*prompt, *known], skip_special_tokens=True)[len(before) :].split("\ufffd")[0].strip()
