"""Decides whether the base is confident: its score must reach a cutoff. The gate sees probabilities, never text.

A gate gives the base's next-token distribution p a score. With v the base's token (the most probable one, or the one
that was drawn), q the nudging model's next-token distribution after the same text, and t the threshold, the base is
confident where

| gate | formula | source |
|---|---|---|
| `top1` | max p >= t | Fei et al., "Nudging" (arXiv 2410.09300); the default |
| `entropy` | H(p) = -sum p ln p <= t, in nats | uncertainty sampling: Settles, "Active Learning" (2009), section 3.1 |
| `margin` | largest p - second largest p >= t | the same |
| `rejection` | p(v) >= max q - t | Hammal et al., "On the Rejection Criterion" (arXiv 2604.16146), where t = 0.2 |
| `kad` | p(v) >= t | Hammal et al., "KAD" (EACL 2026, paper 179): their token-wise rule |

p and q are softmaxes of the raw logits in float32, before any logits processor or temperature. The last two papers
reject single tokens. Here a rejected token means that the base is unsure, and the nudging model writes the next word,
as with every other gate. A greedy v is the most probable token unless a logits processor has changed the order, so
`kad` differs from `top1` only where the base samples. `rejection` needs the nudging model at every position.

`top1` is also offered as hooks of plain `generate`, to look at a base before it is nudged:

    recorder = Top1Recorder()
    model.generate(**inputs, logits_processor=[recorder], stopping_criteria=[StopWhenUnsure(recorder, 0.4)])
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from .config import AUTO, NudgingConfig
from .words import AuthorsOfWords

_FEWEST_SCORES = 8  # With fewer scores, their quantiles mean little.
_STEP = 0.05  # How far one word moves the level of an online cutoff.


@dataclass(frozen=True)
class Gate:
    """One formula of the table above.

    Args:
        scores: takes the base's probabilities, float32 of shape (n, vocab_size), and its tokens, int64 of shape (n,),
            and returns scores of shape (n,). A higher score means a more confident base.
        strictest: the threshold that `"auto"` never goes beyond. Nudging a base that is sure costs correct answers.
        greatest: the greatest threshold that makes a difference in practice; the least is 0.
        is_falling: whether the cutoff is minus the threshold, so that a greater threshold nudges less.
        against_nudging_model: whether the nudging model's top-1 probability after the same text is subtracted from
            the score.
    """

    scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    strictest: float
    greatest: float = 1.0
    is_falling: bool = False
    against_nudging_model: bool = False

    def cutoff(self, threshold: float) -> float:
        """The score from which on the base is confident."""
        return -threshold if self.is_falling else threshold


def _top1(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return p.amax(dim=-1)


def _negative_entropy(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -torch.special.entr(p).sum(dim=-1)


def _margin(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    first, second = p.topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def _token_probability(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return p.gather(-1, tokens[:, None])[:, 0]


GATES = {
    "top1": Gate(_top1, strictest=0.6),
    "entropy": Gate(_negative_entropy, strictest=1.0, greatest=6.0, is_falling=True),
    "margin": Gate(_margin, strictest=0.4),
    "rejection": Gate(_token_probability, strictest=0.1, is_falling=True, against_nudging_model=True),
    "kad": Gate(_token_probability, strictest=0.6),
}


class FixedCutoff:
    """The same cutoff for the whole answer."""

    def __init__(self, value: float):
        self.value = value

    def observe_score(self, score: float) -> None:
        """A fixed cutoff does not depend on the scores."""

    def observe_text(self, text: bytes, nudged: bool) -> None:
        """A fixed cutoff does not depend on the answer."""


class OnlineCutoff:
    """A cutoff that follows the base's scores in one answer, so that a given share of its words is nudged.

    The cutoff is a quantile of the scores so far, and each word of the answer moves the quantile's level: up by
    step * target if the base wrote the word, down by step * (1 - target) if the nudging model wrote any of it. The
    level thus accumulates the difference between the two shares, and in a long answer the share of nudged words
    approaches the target whatever the scores are. This is the update of adaptive conformal inference (Gibbs and
    Candes, arXiv 2106.00170). The cutoff never rises above `highest`, so a base that is sure of nearly everything is
    nudged less than the target says.

    The cutoff depends on the answer so far and on nothing else: neither drafts nor other rows of a batch change it.

    Args:
        target: the share of words, in (0, 1), that the nudging model is to write.
        first: the cutoff while there are too few scores.
        highest: the highest cutoff.
        word_boundary: what counts as a word: see [`AuthorsOfWords`].
    """

    def __init__(self, target: float, first: float, highest: float, word_boundary: str = NudgingConfig.word_boundary):
        self._target = target
        self._first = first
        self._highest = highest
        self._level = target
        self._scores: list[float] = []  # Sorted.
        self._words = AuthorsOfWords(word_boundary)

    @property
    def value(self) -> float:
        if len(self._scores) < _FEWEST_SCORES:
            return self._first
        if self._level < 0:
            return -inf
        place = int(self._level * len(self._scores))
        return min(self._scores[place], self._highest) if place < len(self._scores) else self._highest

    def observe_score(self, score: float) -> None:
        """Adds a score that has been compared with the cutoff."""
        insort(self._scores, score)

    def observe_text(self, text: bytes, nudged: bool) -> None:
        """Moves the level by the words that end in a piece of the answer, in UTF-8."""
        for word_is_nudged in self._words.read(text, nudged):
            self._level += _STEP * (self._target - word_is_nudged)


class Confidence:
    """Decides throughout one answer whether the base is confident.

    Args:
        gate: gives the scores.
        cutoff: is what they are compared with.
    """

    def __init__(self, gate: Gate, cutoff: FixedCutoff | OnlineCutoff):
        self.gate = gate
        self._cutoff = cutoff

    @classmethod
    def of_answer(cls, config: NudgingConfig) -> Confidence:
        """The decision for one answer, as a config describes it."""
        gate = GATES[config.nudge_gate]
        if config.nudge_threshold != AUTO:
            return cls(gate, FixedCutoff(gate.cutoff(float(config.nudge_threshold))))
        first = NudgingConfig(nudge_gate=config.nudge_gate).nudge_threshold
        bounds = gate.cutoff(float(first)), gate.cutoff(gate.strictest)
        return cls(gate, OnlineCutoff(config.target_nudge_rate, *bounds, config.word_boundary))

    def decide(self, score: float, nudging_top1: float | None) -> bool:
        """Decides whether the base is confident. An online cutoff learns the score: call this once for each verdict.

        Args:
            score: of the base's next token, from `gate.scores`.
            nudging_top1: the nudging model's top-1 probability after the same text, where the gate needs it.
        """
        if self.gate.against_nudging_model:
            assert nudging_top1 is not None
            score -= nudging_top1
        is_confident = score >= self._cutoff.value
        self._cutoff.observe_score(score)
        return is_confident

    def observe_text(self, text: bytes, nudged: bool) -> None:
        """Takes note of a piece by which the answer has grown, and of who wrote it."""
        self._cutoff.observe_text(text, nudged)


def top1_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The top-1 probability at each position.

    Args:
        logits: raw logits of shape (..., vocab_size), of any dtype.

    Returns:
        float32 probabilities of shape (...): the greatest entry of the softmax taken in float32.
    """
    return logits.float().softmax(dim=-1).amax(dim=-1)


class Top1Recorder(LogitsProcessor):
    """Records the top-1 probability at each step of a plain `generate` and changes nothing.

    `generate` calls the caller's logits processors after its own, so the scores are the raw logits unless the call
    also asked for a penalty or a constraint. Sampling's warpers (temperature, top-k, top-p) come later and make no
    difference.

    Attributes:
        probabilities (`list[torch.Tensor]`): one float32 tensor of shape (batch,) for each step.
    """

    def __init__(self) -> None:
        self.probabilities: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.probabilities.append(top1_probabilities(scores))
        return scores


class StopWhenUnsure(StoppingCriteria):
    """Ends a row of a plain `generate` at the first position where the base is unsure.

    The row's last token is the one that was drawn at that position. Drop it if another model is to write there.

    Args:
        recorder: the `Top1Recorder` that is passed to the same `generate` as a logits processor.
        threshold: γ; the base is unsure where its top-1 probability is < γ.
    """

    def __init__(self, recorder: Top1Recorder, threshold: float):
        self.recorder = recorder
        self.threshold = threshold

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self.recorder.probabilities:
            raise ValueError(
                "`StopWhenUnsure` needs the top-1 probabilities, and its recorder has none: pass the recorder too, "
                "`logits_processor=[recorder]`."
            )
        return (self.recorder.probabilities[-1] < self.threshold).to(input_ids.device)
