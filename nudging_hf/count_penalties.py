"""OpenAI's penalties for tokens that an answer has already. They know ids and logits, never who asks for them."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import LogitsProcessor


class CountPenalties(LogitsProcessor):
    """OpenAI's penalties: a token's logit falls with the number of times that the answer has it.

    logit -= presence * (count > 0) + frequency * count, as in OpenAI's documentation of `/v1/completions`.

    Args:
        presence, frequency: the two penalties, from -2 to 2.
        prompt_length: how many ids come before the answer.
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self.presence = presence
        self.frequency = frequency
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            counts = Counter(ids)
            places = torch.tensor(list(counts), dtype=torch.long, device=scores.device)
            number = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
            scores[row, places] -= self.presence + self.frequency * number
        return scores
