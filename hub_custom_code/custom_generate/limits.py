"""The limits that can end an answer at any token, also within a word. They know ids and clocks, never models."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)


class Limits:
    """The stopping criteria of a call.

    Args:
        criteria: the stopping criteria as `generate` prepared them.
        base_eos: the base's EOS ids. They do not end an answer: the base never writes one, and one that the nudging
            model writes is an ordinary word.
        stop_tokens: ids in the `eos_token_id` of the call that are not the base's own. Each of them ends an answer.
    """

    def __init__(self, criteria: StoppingCriteriaList, base_eos: Sequence[int], stop_tokens: Collection[int] = ()):
        self._stop_tokens = frozenset(stop_tokens)
        self._criterion_eos_tokens: set[int] = set()
        self._lengths: list[MaxLengthCriteria] = []
        self._times: list[MaxTimeCriteria] = []
        self._others: list[Any] = []
        self._max_length: float = float("inf")
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                self._max_length = min(self._max_length, criterion.max_length)
                self._lengths.append(criterion)
            elif isinstance(criterion, MaxTimeCriteria):
                self._times.append(criterion)
            elif isinstance(criterion, EosTokenCriteria):
                self._criterion_eos_tokens |= set(criterion.eos_token_id.tolist()) - set(base_eos)
            else:
                self._others.append(criterion)

    def time_is_up(self) -> bool:
        """Whether `max_time` (in seconds) has passed."""
        return any(time.time() - limit.initial_timestamp > limit.max_time for limit in self._times)

    def finish_reason(self, token: int, length: int, is_full: bool, ids: Callable[[], torch.Tensor]) -> str | None:
        """Why an answer ends with the token that it has just accepted; `None` if it goes on.

        Args:
            token: that token.
            length: tokens of the prompt, padding included, and of the answer.
            is_full: whether the answer has reached the last position of either model.
            ids: returns prompt and answer, of shape (1, length).
        """
        if token in self._stop_tokens:
            return "stop_token"
        if token in self._criterion_eos_tokens:
            return "stopping_criteria"
        for criterion in self._others:
            if criterion(ids(), None).all():
                return "stop_string" if isinstance(criterion, StopStringCriteria) else "stopping_criteria"
        if length >= self._max_length or is_full:
            return "length"
        for limit in self._lengths:
            if limit.max_position_embeddings is not None and length > limit.max_position_embeddings:
                limit(ids(), None)  # This call warns once, as in plain `generate`.
        return "time" if self.time_is_up() else None

    def room(self, length: int) -> float:
        """How many more tokens an answer of this length, prompt included, can have."""
        return self._max_length - length
