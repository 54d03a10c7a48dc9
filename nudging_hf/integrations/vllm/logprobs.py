"""The raw logprobs of sampled tokens, in the form in which vLLM's model runners return them."""

from __future__ import annotations

import torch
from vllm.v1.outputs import LogprobsTensors


def raw_logprobs(logits: torch.Tensor, tokens: torch.Tensor, number: int) -> LogprobsTensors:
    """The logprobs of tokens and of the most probable tokens at their positions.

    Args:
        logits: raw, of shape (positions, vocab_size).
        tokens: of shape (positions,), int64.
        number: how many of the most probable tokens are reported.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(-1, tokens[:, None])
    top = logprobs.topk(number, dim=-1)
    ranks = (logprobs >= own).sum(dim=-1)
    ids = torch.cat([tokens[:, None], top.indices], dim=1)
    return LogprobsTensors(ids.to(torch.int32), torch.cat([own, top.values], dim=1), ranks)
