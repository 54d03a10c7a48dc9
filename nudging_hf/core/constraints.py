"""What the caller's logits processors forbid to both models. It knows processors and the base's ids, never text.

A *hard* processor may give a token the score −∞. A token that it forbids, judging by the ids before it, is written by
neither model. The warpers of sampling (temperature, top-k, ...) only cut a distribution, so they shape the model that
draws from it and bind no other. `min_new_tokens` and `min_length` have a rule of their own, because only the nudging
model ends an answer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)

_WARPERS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
_LENGTH_PROCESSORS = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
# Only these classes themselves never forbid a token. A subclass may.
_SOFT_PROCESSORS = (
    EncoderRepetitionPenaltyLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    RepetitionPenaltyLogitsProcessor,
    WatermarkLogitsProcessor,
)
_STATEFUL_PROCESSORS = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
_MAX_CACHED = 64  # A constraint remembers what is forbidden at this many places.
_PROBE_SCORE = 100.0  # A high score for forbidden tokens, to test whether they are still forbidden.


def validate_base_processors(processors: LogitsProcessorList) -> None:
    """Raises a `ValueError` for a processor of the call that nudging cannot obey. It says what to give instead."""
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, ExponentialDecayLengthPenalty):
            raise ValueError(
                "`exponential_decay_length_penalty` raises the score of the base's EOS, but only the nudging model "
                "ends an answer: give `max_new_tokens` instead, or set "
                "`nudging_model.generation_config.exponential_decay_length_penalty`."
            )
        if isinstance(processor, _STATEFUL_PROCESSORS):
            raise ValueError(
                f"`{name}` keeps a state that needs one call for each token, in order, and drafts call it otherwise: "
                "leave it out of `logits_processor`."
            )


def validate_nudging_generation_config(generation_config: Any) -> None:
    """Raises a `ValueError` if the nudging model's generation config asks for a processor that keeps a state."""
    for name in ("guidance_scale", "watermarking_config"):
        value = getattr(generation_config, name, None)
        if value is not None and value != 1:
            raise ValueError(
                f"`nudging_model.generation_config.{name}` asks for a processor that keeps a state and needs one "
                "call for each token, in order, and drafts call it otherwise: set it to `None`."
            )


def hard_processors(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors that may forbid a token. Those of transformers are copied, because some keep a table."""
    return LogitsProcessorList(
        copy.copy(each) if _is_from_transformers(each) else each for each in processors if _may_forbid(each)
    )


def _is_from_transformers(processor: Any) -> bool:
    return type(processor).__module__.startswith("transformers.")


def _may_forbid(processor: Any) -> bool:
    if isinstance(processor, (*_WARPERS, *_LENGTH_PROCESSORS)) or type(processor) in _SOFT_PROCESSORS:
        return False
    if type(processor) is SequenceBiasLogitsProcessor:
        return float("-inf") in processor.sequence_bias.values()
    return True


class Constraint:
    """What the hard processors of one row forbid: a pure function of the base's ids, with a cache.

    Args:
        processors: the hard processors, bound to the row.
        prompt: the base's prompt as the processors see it, of shape (1, prompt_length).
        vocab_size: how many tokens the base scores.
        eos_tokens: the ids that processors know as the end of an answer, which are the base's EOS ids.
        stop_tokens: the caller's stop tokens. The processors are never asked about the place after one.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        prompt: torch.Tensor,
        vocab_size: int,
        eos_tokens: Sequence[int],
        stop_tokens: Sequence[int] = (),
    ):
        self._processors = processors
        self._prompt = prompt
        self._vocab_size = vocab_size
        self._eos_tokens = [token for token in eos_tokens if token < vocab_size]
        self._stop_tokens = frozenset(stop_tokens)
        self._by_ids: dict[tuple[int, ...], torch.Tensor] = {}
        self._unchecked = [each for each in processors if not _is_from_transformers(each)]

    def forbidden(self, ids: Sequence[int]) -> torch.Tensor:
        """Which tokens are forbidden after the ids of an answer.

        Returns:
            A bool tensor of shape (vocab_size,), true where a token is forbidden.

        Raises:
            ValueError: if a processor of the caller's own forbids tokens by their scores.
        """
        key = tuple(ids)
        if (known := self._by_ids.get(key)) is not None:
            return known
        answer = torch.tensor([ids], dtype=self._prompt.dtype, device=self._prompt.device)
        text = torch.cat([self._prompt, answer], dim=1)
        scores = torch.zeros(1, self._vocab_size, device=self._prompt.device)
        for processor in self._processors:
            if any(processor is each for each in self._unchecked):
                self._check_ignores_scores(processor, text)
            scores = processor(text, scores)
        if len(self._by_ids) == _MAX_CACHED:
            del self._by_ids[next(iter(self._by_ids))]
        self._by_ids[key] = scores[0] == float("-inf")
        return self._by_ids[key]

    def _check_ignores_scores(self, processor: Any, text: torch.Tensor) -> None:
        """Raises a `ValueError` if the tokens that the caller's own processor forbids depend on the scores."""
        self._unchecked = [each for each in self._unchecked if each is not processor]
        equal_scores = torch.zeros(1, self._vocab_size, device=text.device)
        forbidden = processor(text, equal_scores.clone()) == float("-inf")
        forbidden_after_probe = processor(text, equal_scores.masked_fill(forbidden, _PROBE_SCORE)) == float("-inf")
        if not torch.equal(forbidden, forbidden_after_probe):
            raise ValueError(
                f"`logits_processor` holds a {type(processor).__name__} that forbids tokens by their scores, so it is "
                "undefined which words of the nudging model it forbids; a processor must forbid by the ids before a "
                "token alone. To cut the base's distribution, give `top_k`, `top_p` or `min_p`, or derive the class "
                "from `TopKLogitsWarper`."
            )

    def allowed_prefix(self, ids: Sequence[int], more: Sequence[int]) -> int:
        """How many of the ids `more` are allowed in succession after `ids`. The count ends with a stop token."""
        for n, token in enumerate(more):
            if token >= self._vocab_size or self.forbidden([*ids, *more[:n]])[token]:
                return n
            if token in self._stop_tokens:
                return n + 1
        return len(more)

    def allows_end(self, ids: Sequence[int]) -> bool:
        """Whether the answer may end after these ids: if the base has EOS ids, one of them must be allowed there."""
        return not self._eos_tokens or not bool(self.forbidden(ids)[self._eos_tokens].all())

    def allows_only_end(self, ids: Sequence[int]) -> bool:
        """Whether the base's EOS is the only token allowed after these ids."""
        if not self._eos_tokens:
            return False
        allowed = ~self.forbidden(ids)
        return bool(allowed[self._eos_tokens].any()) and int(allowed.sum()) == int(
            allowed[list(set(self._eos_tokens))].sum()
        )
