"""What the caller's logits processors forbid, whoever writes. It knows processors and the base's ids, never text.

A *hard* processor may give a token the score −∞: a token that is forbidden by the ids before it is written by neither
model. Sampling's warpers (temperature, top-k, ...) cut a distribution, and so shape only the model that draws from it;
`min_new_tokens` and `min_length` have a rule of their own, for only the nudging model ends an answer.
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
_ABOUT_LENGTH = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
# Of these very classes: one that is derived from them may forbid.
_SOFT = (
    EncoderRepetitionPenaltyLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    RepetitionPenaltyLogitsProcessor,
    WatermarkLogitsProcessor,
)
_STATEFUL = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
}
_REMEMBERED = 64  # Places of which it is remembered what is forbidden there.
_FAVOUR = 100.0  # A score beyond all others, by which it is found out whether a processor goes by scores.


def refuse_processors_of_base(processors: LogitsProcessorList) -> None:
    """Raises a `ValueError` for a processor that no nudged answer can go by, and says what to give instead."""
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, ExponentialDecayLengthPenalty):
            raise ValueError(
                "`exponential_decay_length_penalty` raises the score of the base's EOS, and only the nudging model "
                "ends an answer: give `max_new_tokens`, or set "
                "`nudging_model.generation_config.exponential_decay_length_penalty`."
            )
        if isinstance(processor, tuple(_STATEFUL)):
            raise ValueError(
                f"`{name}` counts on being called once for each token, in order, which drafts do not do: leave it out "
                "of `logits_processor`."
            )


def refuse_processors_of_nudging_model(generation_config: Any) -> None:
    """Raises a `ValueError` where the nudging model's own config asks for a processor that keeps a state."""
    for name in ("guidance_scale", "watermarking_config"):
        value = getattr(generation_config, name, None)
        if value is not None and value != 1:
            raise ValueError(
                f"`nudging_model.generation_config.{name}` asks for a processor that keeps count of the tokens it has "
                "seen, which drafts do not write in order: set it to `None`."
            )


def hard_processors(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that may forbid a token by the ids before it; transformers' own as copies, for some keep a table."""
    return LogitsProcessorList(
        copy.copy(each) if _is_of_transformers(each) else each for each in processors if _may_forbid(each)
    )


def _is_of_transformers(processor: Any) -> bool:
    return type(processor).__module__.startswith("transformers.")


def _may_forbid(processor: Any) -> bool:
    if isinstance(processor, (*_WARPERS, *_ABOUT_LENGTH)) or type(processor) in _SOFT:
        return False
    if type(processor) is SequenceBiasLogitsProcessor:
        return float("-inf") in processor.sequence_bias.values()
    return True


class Constraint:
    """What the hard processors of one row forbid. A pure function of the base's ids, remembered for the last places.

    Args:
        processors: the hard ones, bound to the row.
        prompt: the base's, as the processors are to see it, of shape (1, prompt_length).
        vocab_size: how many tokens the base scores.
        ends: the ids that end an answer in the eyes of the processors: the base's EOS.
        stops: the caller's stop tokens: nothing is asked about what stands after one.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        prompt: torch.Tensor,
        vocab_size: int,
        ends: Sequence[int],
        stops: Sequence[int] = (),
    ):
        self._processors = processors
        self._prompt = prompt
        self._vocab_size = vocab_size
        self._ends = [token for token in ends if token < vocab_size]
        self._stops = frozenset(stops)
        self._by_ids: dict[tuple[int, ...], torch.Tensor] = {}
        self._unproved = [each for each in processors if not _is_of_transformers(each)]

    def forbidden(self, ids: Sequence[int]) -> torch.Tensor:
        """Which tokens are forbidden after these ids of the answer, a bool tensor of shape (vocab_size,)."""
        key = tuple(ids)
        if (known := self._by_ids.get(key)) is not None:
            return known
        answer = torch.tensor([ids], dtype=self._prompt.dtype, device=self._prompt.device)
        text = torch.cat([self._prompt, answer], dim=1)
        scores = torch.zeros(1, self._vocab_size, device=self._prompt.device)
        for processor in self._processors:
            if any(processor is each for each in self._unproved):
                self._prove(processor, text)
            scores = processor(text, scores)
        if len(self._by_ids) == _REMEMBERED:
            del self._by_ids[next(iter(self._by_ids))]
        self._by_ids[key] = scores[0] == float("-inf")
        return self._by_ids[key]

    def _prove(self, processor: Any, text: torch.Tensor) -> None:
        """Raises a `ValueError` where what a processor of the caller's own forbids depends on the scores."""
        self._unproved = [each for each in self._unproved if each is not processor]
        even = torch.zeros(1, self._vocab_size, device=text.device)
        forbidden = processor(text, even.clone()) == float("-inf")
        favoured = processor(text, even.masked_fill(forbidden, _FAVOUR)) == float("-inf")
        if not torch.equal(forbidden, favoured):
            raise ValueError(
                f"`logits_processor` holds a {type(processor).__name__} that forbids tokens by their scores, and not "
                "by the ids before them alone: it cannot be said which words of the nudging model it forbids. To cut "
                "the base's distribution, give `top_k`, `top_p` or `min_p`, or derive its class from "
                "`TopKLogitsWarper`."
            )

    def allowed_prefix(self, ids: Sequence[int], more: Sequence[int]) -> int:
        """How many of the ids `more` may stand, one after the other, after `ids`; a stop token is the last of them."""
        for n, token in enumerate(more):
            if token >= self._vocab_size or self.forbidden([*ids, *more[:n]])[token]:
                return n
            if token in self._stops:
                return n + 1
        return len(more)

    def allows_end(self, ids: Sequence[int]) -> bool:
        """Whether the answer may end after these ids: where the base has an EOS, one must be allowed there."""
        return not self._ends or not bool(self.forbidden(ids)[self._ends].all())

    def allows_only_end(self, ids: Sequence[int]) -> bool:
        """Whether nothing but the base's EOS is allowed after these ids."""
        if not self._ends:
            return False
        allowed = ~self.forbidden(ids)
        return bool(allowed[self._ends].any()) and int(allowed.sum()) == int(allowed[list(set(self._ends))].sum())
