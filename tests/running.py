"""Runs nudging on tiny pairs, with `nudging_hf.generate` in several ways and with the oracle, and compares answers."""

import functools
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import tiny
import torch
from tiny import Pair
from transformers import LogitsProcessor

import nudging_hf

KINDS = ["shared", "two"]  # Pairs with one vocabulary, and with two.
UNSPACED = ["unspaced shared", "unspaced two"]  # The same for text without spaces.
DRAFT_LENGTHS = [0, 1, 4, 16, "adaptive"]
SOME_DRAFT_LENGTHS = [0, 1, 4, "adaptive"]

Outcome = tuple[list[int], list[bool], str]


@dataclass
class Result:
    """The answer in one row of a batch.

    Attributes:
        ids: the answer, without padding.
        nudged: for each id, whether the nudging model wrote it.
        top1: the base's top-1 probability at each id.
        reason: the finish reason.
        base_tokens, base_token_probs: what the base itself would have written at each id, and its probability.
        base_ranks: the rank of each id in the base's distribution.
    """

    ids: list[int]
    nudged: list[bool]
    top1: list[float]
    reason: str
    base_tokens: list[int]
    base_token_probs: list[float]
    base_ranks: list[int]


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their attention mask, both of shape (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pair_with_prompts(arch: str, kind: str, seed: int, rows: int) -> tuple[Pair, list[list[int]], list[list[int]]]:
    """A tiny pair, and prompts for its base and for its nudging model."""
    chosen = tiny.pair(arch, seed, kind)
    return chosen, *tiny.prompts(chosen, rows, seed)


def inputs_of(pair: Pair, prompts: list[list[int]], nudging_prompts: list[list[int]]) -> dict[str, Any]:
    """The arguments of `generate` for a pair and its prompts."""
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
    """The nudged answers of a batch. It asserts that each row is padded after its end."""
    output = nudging_hf.generate(
        pair.base, **inputs_of(pair, prompts, nudging_prompts), return_dict_in_generate=True, **kwargs
    )
    new = output.sequences[:, max(map(len, prompts)) :]
    results = []
    columns = [new.tolist(), output.nudged_mask.tolist(), output.base_top1_probs, output.finish_reasons]
    columns += [output.base_tokens.tolist(), output.base_token_probs, output.base_ranks.tolist()]
    for ids, mask, top1, reason, tokens, probabilities, ranks in zip(*columns, strict=True):
        n = int((~top1.isnan()).sum())
        assert set(ids[n:]) | set(tokens[n:]) <= {pair.tokenizer.pad_token_id} and not any(mask[n:] + ranks[n:])
        assert top1[n:].isnan().all() and probabilities[n:].isnan().all()
        said = (tokens[:n], probabilities[:n].tolist(), ranks[:n])
        results.append(Result(ids[:n], mask[:n], top1[:n].tolist(), reason, *said))
    return results


def assert_same(results: Sequence[Result], expected: Sequence[Result]) -> None:
    """Asserts that answers are equal, and what the base would have said at each of their tokens."""
    assert outcomes(results) == outcomes(expected)
    for result, other in zip(results, expected, strict=True):
        assert (result.base_tokens, result.base_ranks) == (other.base_tokens, other.base_ranks)
        assert result.base_token_probs == pytest.approx(other.base_token_probs, abs=1e-6)


def outcomes(results: Sequence[Result | oracle.Answer]) -> list[Outcome]:
    """The parts of answers that must be equal however they were decoded: ids, authors and finish reasons."""
    return [(result.ids, result.nudged, result.reason) for result in results]


def decode_with_oracle(
    pair: Pair,
    prompt: list[int],
    nudging_prompt: list[int],
    *,
    nudge_threshold: float | None,
    nudge_gate: str = "top1",
    **settings: Any,
) -> oracle.Answer:
    """The answer of the oracle, which takes further settings by the names of [`oracle.decode`]."""
    return oracle.decode(
        pair.base,
        pair.nudging_model,
        pair.tokenizer,
        pair.nudging_tokenizer,
        prompt,
        nudging_prompt,
        threshold=nudge_threshold,
        gate=nudge_gate,
        **settings,
    )


def decode_in_every_way(
    pair: Pair, prompts: list[list[int]], nudging_prompts: list[list[int]], **settings: Any
) -> list[Outcome]:
    """The nudged answers of a batch. It asserts that neither drafts nor the other rows change them.

    A `logits_processor` counts the padding of its batch as part of the prompt, so with one the rows are not tried
    alone.
    """
    answers = [
        outcomes(nudge(pair, prompts, nudging_prompts, num_draft_tokens=length, **settings))
        for length in SOME_DRAFT_LENGTHS
    ]
    assert answers[1:] == answers[:1] * (len(SOME_DRAFT_LENGTHS) - 1)
    if "logits_processor" not in settings:
        for i, (prompt, nudging_prompt) in enumerate(zip(prompts, nudging_prompts, strict=True)):
            assert outcomes(nudge(pair, [prompt], [nudging_prompt], **settings)) == [answers[0][i]]
    return answers[0]


def state_of(pair: Pair) -> list[Any]:
    """The state of the user's objects, and of torch in this thread, that a call might change."""
    tokenizers = [pair.tokenizer, pair.nudging_tokenizer]
    models = [pair.base, pair.nudging_model]
    return [
        *[(t.backend_tokenizer.encode_special_tokens, t.padding_side, t.truncation_side) for t in tokenizers],
        *[(t.backend_tokenizer.padding, t.backend_tokenizer.truncation) for t in tokenizers],
        *[(id(m.generation_config), dict(vars(m.generation_config)), m.training) for m in models],
        *[{**vars(m.config), "dtype": None} for m in models],
        *[_attributes(part) for m in models for part in m.modules()],
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    ]


def _attributes(part: torch.nn.Module) -> dict[str, Any]:
    """What a module is made of: its attributes, and the names in its tables of hooks, parameters and parts.

    Where transformers keeps the length of its last static cache is left out.
    """
    return {
        name: tuple(value) if isinstance(value, dict) else id(value)
        for name, value in vars(part).items()
        if name != "_previous_max_cache_length"
    }


class ForbidTokens(LogitsProcessor):
    """A logits processor as a caller may write it: it forbids the tokens that a function of the answer's ids returns.

    Args:
        prompt_length: the length of the prompts with padding.
        forbidden: takes the answer's ids so far and returns the ids that must not come next.
    """

    def __init__(self, prompt_length: int, forbidden: Callable[[list[int]], Collection[int]]):
        self.prompt_length = prompt_length
        self.forbidden = forbidden

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            scores[row, sorted(self.forbidden(ids))] = float("-inf")
        return scores


def random_rule(
    eos: int, size: int, seed: int, shares: Sequence[float] = (0.1, 0.5, 0.9), ends_from: int = 7
) -> Callable[[list[int]], frozenset[int]]:
    """A random function from ids to the tokens that are forbidden after them. It always allows some token.

    Args:
        eos: the EOS id, which may be forbidden too, or be the only token that is allowed.
        size: the size of the vocabulary.
        seed: seeds the function.
        shares: the share of forbidden tokens is drawn from these.
        ends_from: EOS is the only token that is allowed only after so many ids.
    """

    @functools.cache
    def after(last: tuple[int, ...], length: int) -> frozenset[int]:
        draw = random.Random(f"{seed} {last} {length % 5}")
        share = draw.choice(shares)
        forbidden = {token for token in range(size) if draw.random() < share}
        if draw.random() < 0.5:
            forbidden.discard(eos)
        if draw.random() < 0.03 and length >= ends_from:
            forbidden = set(range(size)) - {eos}
        if len(forbidden) == size or (forbidden == set(range(size)) - {eos} and length < ends_from):
            forbidden.discard(draw.choice([token for token in range(size) if token != eos]))
        return frozenset(forbidden)

    return lambda ids: after(tuple(ids[-2:]), len(ids))
