"""Runs `nudging_hf.generate` on tiny pairs, and takes its output apart by rows."""

from dataclasses import dataclass
from typing import Any

import torch
from tiny import Pair

import nudging_hf


@dataclass
class Result:
    """One row: answer ids without padding, who wrote them, the base's top-1 probability at each, why it ended."""

    ids: list[int]
    nudged: list[bool]
    top1: list[float]
    reason: str


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their attention mask, both of shape (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def inputs_of(pair: Pair, prompts: list[list[int]], nudging_prompts: list[list[int]]) -> dict[str, Any]:
    """All that `generate` needs to know of a pair and its prompts, as keywords."""
    ids, mask = padded(prompts, pair.tokenizer.pad_token_id)
    nudging_ids, nudging_mask = padded(nudging_prompts, pair.nudging_tokenizer.pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "nudging_model": pair.nudging_model,
        "nudging_input_ids": nudging_ids,
        "nudging_attention_mask": nudging_mask,
        "tokenizer": pair.tokenizer,
        "nudging_tokenizer": pair.nudging_tokenizer,
    }


def nudge(pair: Pair, prompts: list[list[int]], nudging_prompts: list[list[int]], **kwargs: Any) -> list[Result]:
    """The nudged answers of a batch."""
    output = nudging_hf.generate(
        pair.base, **inputs_of(pair, prompts, nudging_prompts), return_dict_in_generate=True, **kwargs
    )
    new = output.sequences[:, max(map(len, prompts)) :]
    results = []
    for ids, mask, top1, reason in zip(
        new.tolist(), output.nudged_mask.tolist(), output.base_top1_probs, output.finish_reasons, strict=True
    ):
        n = int((~top1.isnan()).sum())
        assert set(ids[n:]) <= {pair.tokenizer.pad_token_id} and not any(mask[n:]) and top1[n:].isnan().all()
        results.append(Result(ids[:n], mask[:n], top1[:n].tolist(), reason))
    return results
