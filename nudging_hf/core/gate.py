"""When a base is unsure. The gate sees probabilities, never text.

A gate gives the base's next-token distribution p a score, and the base is confident where the score is at least a
cutoff. With v the base's token (its greatest, or the one that it drew), q the nudging model's next-token distribution
after the same text, and t the threshold, the base is confident where

| gate | formula | source |
|---|---|---|
| `top1` | max p >= t | Fei et al., "Nudging" (arXiv 2410.09300); the default |
| `entropy` | H(p) = -sum p ln p <= t, in nats | uncertainty sampling: Settles, "Active Learning" (2009), section 3.1 |
| `margin` | greatest p - second greatest p >= t | the same |
| `rejection` | p(v) >= max q - t | Hammal et al., "On the Rejection Criterion" (arXiv 2604.16146), where t = 0.2 |
| `kad` | p(v) >= t | Hammal et al., "KAD" (EACL 2026, paper 179): their token-wise rule |

p and q are softmaxes of raw logits in float32, before any processor or temperature. The last two papers refuse single
tokens; here what is refused is the base's going on, and the nudging model's next word is taken, as everywhere. A
greedy v is the greatest of p, unless a processor has changed the order: then `kad` is `top1`; they differ where the
base samples. `rejection` asks the nudging model at every position.

`top1` is offered as hooks of plain `generate` too, to look at a base before it is nudged:

    recorder = Top1Recorder()
    model.generate(**inputs, logits_processor=[recorder], stopping_criteria=[StopWhenUnsure(recorder, 0.4)])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria


@dataclass(frozen=True)
class Gate:
    """By what it is told whether a base is confident: where its score is at least the cutoff.

    Args:
        score: takes the base's probabilities, float32 of shape (n, vocab_size), and its tokens, int64 of shape (n,),
            and gives scores of shape (n,).
        strictest: the threshold that one which sets itself does not go beyond: by it, hardly anybody would call the
            base unsure. Nudging a base that is sure costs right answers.
        greatest: the greatest threshold that makes a difference in practice, from 0 on.
        is_falling: whether the cutoff is minus the threshold, so that a greater threshold nudges less.
        against_nudging_model: whether the nudging model's top-1 probability after the same text is taken off the
            score.
    """

    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    strictest: float
    greatest: float = 1.0
    is_falling: bool = False
    against_nudging_model: bool = False

    def cutoff(self, threshold: float) -> float:
        """What a score is compared with."""
        return -threshold if self.is_falling else threshold


def _greatest(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return p.amax(dim=-1)


def _certainty(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -torch.special.entr(p).sum(dim=-1)


def _margin(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    first, second = p.topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def _of_token(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return p.gather(-1, tokens[:, None])[:, 0]


GATES = {
    "top1": Gate(_greatest, strictest=0.6),
    "entropy": Gate(_certainty, strictest=1.0, greatest=6.0, is_falling=True),
    "margin": Gate(_margin, strictest=0.4),
    "rejection": Gate(_of_token, strictest=0.1, is_falling=True, against_nudging_model=True),
    "kad": Gate(_of_token, strictest=0.6),
}


def top1_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The top-1 probability at each position.

    Args:
        logits: raw logits of shape (..., vocab_size), any dtype.

    Returns:
        float32 probabilities of shape (...): the greatest entry of the softmax taken in float32.
    """
    return logits.float().softmax(dim=-1).amax(dim=-1)


class Top1Recorder(LogitsProcessor):
    """Records the top-1 probability at each step of a plain `generate` and changes nothing.

    `generate` calls the caller's processors after its own: the scores are the raw logits unless a penalty or a
    constraint was asked for as well. Sampling's warpers (temperature, top-k, top-p) come later and do not matter.

    Attributes:
        probabilities (`list[torch.Tensor]`): one tensor of shape (batch,) a step, float32.
    """

    def __init__(self) -> None:
        self.probabilities: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.probabilities.append(top1_probabilities(scores))
        return scores


class StopWhenUnsure(StoppingCriteria):
    """Ends a row of a plain `generate` at the first position where the base is unsure.

    The token drawn at that position is the last one of the row: drop it where another model is to write there.

    Args:
        recorder: the `Top1Recorder` that is passed to the same `generate` as a logits processor.
        threshold: γ; a base is unsure where its top-1 probability is < γ.
    """

    def __init__(self, recorder: Top1Recorder, threshold: float):
        self.recorder = recorder
        self.threshold = threshold

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self.recorder.probabilities:
            raise ValueError(
                "`StopWhenUnsure` found nothing recorded: pass its recorder too, `logits_processor=[recorder]`."
            )
        return (self.recorder.probabilities[-1] < self.threshold).to(input_ids.device)
