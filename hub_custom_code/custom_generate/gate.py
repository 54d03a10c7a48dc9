"""When a base is unsure. The gate sees logits, never text.

`top1_probabilities` is what nudging itself uses. The same gate is offered as hooks of plain `generate`, to look at a
base before it is nudged:

    recorder = Top1Recorder()
    model.generate(**inputs, logits_processor=[recorder], stopping_criteria=[StopWhenUnsure(recorder, 0.4)])
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria


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
