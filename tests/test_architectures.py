"""The laws of nudging hold for every causal architecture of transformers, or the call is refused with a reason."""

import functools
import random
import re
from typing import Any

import oracle
import pytest
import torch
from architectures import LEFT_OUT, MODEL_TYPES, tiny
from running import Result, nudge
from tiny import Pair, byte_bpe, pair, prompts
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LENGTHS = {"max_new_tokens": 14, "num_nudging_tokens": 8}

# Each of these differs in how it is read: recurrent states, indexers, shared keys and values, positions counted by the
# cache, no cache, or a refusal.
READ_DIFFERENTLY = set(
    "bart bloom deepseek_v32 deepseek_v4 falcon_h1 gemma3n_text gemma4_text gpt_neo jamba lfm2 mamba mamba2 minimax "
    "nemotron_h openai-gpt qwen3_5_text qwen3_next qwen4_exp_text roberta roformer rwkv xlnet zamba2".split()
)


def all_model_types(every: int) -> list[Any]:
    """All model types. Those that are not in `READ_DIFFERENTLY` are slow tests, except one in `every`."""
    return [
        pytest.param(name, marks=() if name in READ_DIFFERENTLY or i % every == 0 else pytest.mark.slow)
        for i, name in enumerate(MODEL_TYPES)
    ]


Answers = list[tuple[list[int], list[bool], str]]


@functools.cache
def llama() -> PreTrainedModel:
    """The other model of each pair. It has the same vocabulary, because shared pairs with seed 0 use `byte_bpe`."""
    return pair("llama", 0, "shared").nudging_model


def answers_of(
    chosen: Pair, base_prompts: list[list[int]], nudging_prompts: list[list[int]], **kwargs: Any
) -> Answers:
    results: list[Result] = nudge(chosen, base_prompts, nudging_prompts, **kwargs)
    return [(result.ids, result.nudged, result.reason) for result in results]


def assert_names_model_and_remedy(refusal: ValueError, model: PreTrainedModel) -> None:
    message = str(refusal)
    assert type(model).__name__ in message, message
    assert re.search(r"\b(give|pass|leave out|use)\b|use_cache=False", message), message


def check(chosen: Pair, model: PreTrainedModel, threshold: float) -> None:
    """Checks the laws for a pair, with a cache and without. `model` is the one of the two that may be refused."""
    base_prompts, nudging_prompts = prompts(chosen, 3, seed=5)
    settings: dict[str, Any] = {"nudge_threshold": threshold, **LENGTHS}
    without_cache = None
    try:
        without_cache = answers_of(
            chosen, base_prompts, nudging_prompts, num_draft_tokens=4, use_cache=False, **settings
        )
    except ValueError as refusal:
        assert_names_model_and_remedy(refusal, model)
    try:
        undrafted = answers_of(chosen, base_prompts, nudging_prompts, num_draft_tokens=0, **settings)
    except ValueError as refusal:
        assert_names_model_and_remedy(refusal, model)
        if without_cache is None:
            return
        assert "use_cache=False" in str(refusal)
        settings["use_cache"] = False
        undrafted = answers_of(chosen, base_prompts, nudging_prompts, num_draft_tokens=0, **settings)
    assert without_cache is not None, "refused without a cache, but not with one"
    expected = oracle.decode(
        chosen.base,
        chosen.nudging_model,
        chosen.tokenizer,
        chosen.nudging_tokenizer,
        base_prompts[0],
        nudging_prompts[0],
        threshold=threshold,
        **LENGTHS,
    )
    as_expected = (expected.ids, expected.nudged, expected.reason)
    wrong = []
    if undrafted[0] != as_expected:
        wrong.append("undrafted = the oracle's")
    if without_cache != undrafted:
        wrong.append("drafted without a cache = undrafted" + (" with one" if "use_cache" not in settings else ""))
    if "use_cache" not in settings:
        drafted = answers_of(chosen, base_prompts, nudging_prompts, num_draft_tokens=4, **settings)
        if drafted != undrafted:
            wrong.append("drafted = undrafted")
    for row, (ids, nudging_ids) in enumerate(zip(base_prompts[1:], nudging_prompts[1:], strict=True), 1):
        [alone] = answers_of(chosen, [ids], [nudging_ids], num_draft_tokens=16, **settings)
        if alone != undrafted[row]:
            wrong.append("batch = singles")
    assert not wrong, wrong


def check_threshold_zero(chosen: Pair, prompt: list[int], nudging_prompt: list[int]) -> None:
    """Checks that at γ = 0 the base continues after the first word as plain `generate` does."""
    try:
        [answer] = answers_of(chosen, [prompt], [nudging_prompt], nudge_threshold=0, **LENGTHS)
    except ValueError:  # Without a cache, `check` has compared the same computation already.
        return
    ids, nudged, reason = answer
    first = nudged.index(False) if False in nudged else len(nudged)
    begun = torch.tensor([prompt + ids[:first]])
    own = chosen.base.generate(
        begun, attention_mask=torch.ones_like(begun), max_new_tokens=LENGTHS["max_new_tokens"], do_sample=False
    )[0, begun.shape[1] :].tolist()
    eos = chosen.base.generation_config.eos_token_id
    alone = own[: own.index(eos)] if eos in own else own
    written = ids[: -1 if reason == "eos" else None][first : first + len(alone)]
    if written or not alone:  # Otherwise the nudging model ended the answer in its first lookahead.
        assert written == alone[: len(written)] and not any(nudged[first : first + len(written)])


def test_every_architecture_is_tested_or_left_out_for_a_reason():
    assert set(MODEL_TYPES).isdisjoint(LEFT_OUT)
    assert set(MODEL_TYPES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert all(LEFT_OUT.values())


@pytest.mark.parametrize("model_type", all_model_types(every=4))
def test_the_laws_hold_for_a_base_or_it_is_refused(model_type):
    base = tiny(model_type, seed=1)
    threshold = random.Random(model_type).choice([0.3, 0.6])
    chosen = Pair(base, llama(), byte_bpe(), byte_bpe())
    check(chosen, base, threshold)
    [prompt], [nudging_prompt] = prompts(chosen, 1, seed=6)
    check_threshold_zero(chosen, prompt, nudging_prompt)


@pytest.mark.parametrize("model_type", all_model_types(every=8))
def test_the_laws_hold_for_a_nudging_model_or_it_is_refused(model_type):
    nudging_model = tiny(model_type, seed=2)
    threshold = random.Random(model_type).choice([0.3, 0.6])
    check(Pair(pair("llama", 0, "shared").base, nudging_model, byte_bpe(), byte_bpe()), nudging_model, threshold)
