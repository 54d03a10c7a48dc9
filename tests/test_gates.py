"""The laws of nudging with the gates other than the paper's, and with online thresholds."""

import random

import pytest
import torch
from running import DRAFT_LENGTHS, KINDS, decode_with_oracle, inputs_of, nudge, outcomes, pair_with_prompts

import nudging_hf
from nudging_hf import NudgingConfig

# Thresholds on both sides of most scores of these pairs. `None` is the online threshold.
SETTINGS = [
    ("entropy", 1.2), ("entropy", 2.2), ("margin", 0.1), ("margin", 0.3), ("rejection", 0.0), ("rejection", 0.2),
    ("kad", 0.4), ("top1", None),
]  # fmt: skip


def parameters(gate, threshold):
    if threshold is None:
        return {"nudge_threshold": "auto", "target_nudge_rate": 0.3}
    return {"nudge_gate": gate, "nudge_threshold": threshold}


@pytest.mark.parametrize(("gate", "threshold"), SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_answers_are_those_of_a_plain_decoder(arch, kind, gate, threshold):
    draw = random.Random(f"{arch} {kind} {gate} {threshold}")
    chosen, base_prompts, nudging_prompts = pair_with_prompts(arch, kind, draw.randrange(12), rows=draw.randint(1, 4))
    settings = {"max_new_tokens": draw.choice([24, 48]), "takeover_on_agreement": draw.random() < 0.6}
    results = nudge(
        chosen,
        base_prompts,
        nudging_prompts,
        num_draft_tokens=draw.choice(DRAFT_LENGTHS),
        **settings,
        **parameters(gate, threshold),
    )
    for prompt, nudging_prompt, result in zip(base_prompts, nudging_prompts, results, strict=True):
        expected = decode_with_oracle(
            chosen,
            prompt,
            nudging_prompt,
            nudge_threshold=threshold,
            nudge_gate=gate,
            target=0.3 if threshold is None else None,
            **settings,
        )
        assert outcomes([result]) == outcomes([expected])


@pytest.mark.parametrize(("gate", "threshold"), SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_neither_drafts_nor_other_rows_nor_the_cache_change_an_answer(kind, gate, threshold):
    chosen, base_prompts, nudging_prompts = pair_with_prompts("qwen3", kind, seed=5, rows=3)
    settings = {"max_new_tokens": 40, **parameters(gate, threshold)}
    plain = outcomes(nudge(chosen, base_prompts, nudging_prompts, num_draft_tokens=0, **settings))
    assert any(any(nudged) and not all(nudged) for _, nudged, _ in plain)
    for drafts in (1, 5, 16, "adaptive"):
        assert outcomes(nudge(chosen, base_prompts, nudging_prompts, num_draft_tokens=drafts, **settings)) == plain
    assert outcomes(nudge(chosen, base_prompts, nudging_prompts, use_cache=False, **settings)) == plain
    for i, pair_of_prompts in enumerate(zip(base_prompts, nudging_prompts, strict=True)):
        assert outcomes(nudge(chosen, *[[prompt] for prompt in pair_of_prompts], **settings)) == plain[i : i + 1]


@pytest.mark.parametrize(("gate", "threshold"), SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_answer_depends_on_its_seed_alone(kind, gate, threshold):
    chosen, base_prompts, nudging_prompts = pair_with_prompts("llama", kind, seed=4, rows=3)
    sampling = {"max_new_tokens": 32, "do_sample": True, "temperature": 1.3, **parameters(gate, threshold)}
    answers = []
    for drafts, use_cache in [(0, True), (4, True), ("adaptive", False)]:
        torch.manual_seed(7)
        results = nudge(
            chosen, base_prompts, nudging_prompts, num_draft_tokens=drafts, use_cache=use_cache, **sampling
        )
        answers.append(outcomes(results))
    assert answers[1:] == answers[:1] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [0, 4])
def test_rejection_is_exact_before_min_new_tokens(kind, drafts):
    """Before `min_new_tokens` the nudging model's words depend on more than the text, but its probabilities do not."""
    chosen, base_prompts, nudging_prompts = pair_with_prompts("llama", kind, seed=3, rows=3)
    settings = {"max_new_tokens": 32, "min_new_tokens": 20, **parameters("rejection", 0.1)}
    plain = outcomes(nudge(chosen, base_prompts, nudging_prompts, num_draft_tokens=0, use_cache=False, **settings))
    assert outcomes(nudge(chosen, base_prompts, nudging_prompts, num_draft_tokens=drafts, **settings)) == plain


ALWAYS = {"entropy": 100, "margin": 0, "rejection": 1, "kad": 0}
NEVER = {"entropy": 0, "margin": 1.01, "kad": 1.01}


@pytest.mark.parametrize("gate", ALWAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_that_always_passes_equals_the_papers_gate_at_zero(kind, gate):
    chosen, *both = pair_with_prompts("mistral", kind, seed=6, rows=3)
    always = nudge(chosen, *both, max_new_tokens=32, nudge_gate=gate, nudge_threshold=ALWAYS[gate])
    assert outcomes(always) == outcomes(nudge(chosen, *both, max_new_tokens=32, nudge_threshold=0))


@pytest.mark.parametrize("gate", NEVER)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_that_never_passes_equals_the_papers_gate_above_one(kind, gate):
    chosen, *both = pair_with_prompts("mistral", kind, seed=6, rows=3)
    never = nudge(chosen, *both, max_new_tokens=32, nudge_gate=gate, nudge_threshold=NEVER[gate])
    assert outcomes(never) == outcomes(nudge(chosen, *both, max_new_tokens=32, nudge_threshold=1.01))


def test_kad_equals_top1_for_a_greedy_base_but_not_for_a_sampling_one():
    chosen, *both = pair_with_prompts("llama", "two", seed=8, rows=4)
    answers = {}
    for samples in (False, True):
        for gate in ("top1", "kad"):
            torch.manual_seed(0)
            settings = {"nudge_gate": gate, "nudge_threshold": 0.4, "do_sample": samples, "temperature": 1.5}
            answers[gate, samples] = outcomes(nudge(chosen, *both, max_new_tokens=40, **settings))
    assert answers["top1", False] == answers["kad", False]
    assert answers["top1", True] != answers["kad", True]


@pytest.mark.parametrize("kind", KINDS)
def test_only_rejection_reads_the_nudging_model_at_every_position(kind):
    """It does so also without drafts, where no other gate needs the nudging model."""
    chosen, [prompt], [nudging_prompt] = pair_with_prompts("llama", kind, seed=1, rows=1)

    def passes(**settings):
        inputs = inputs_of(chosen, [prompt], [nudging_prompt])
        output = nudging_hf.generate(
            chosen.base, **inputs, max_new_tokens=32, num_draft_tokens=0, return_dict_in_generate=True, **settings
        )
        return output.nudging_forward_passes

    # With these thresholds neither gate nudges after the first word.
    assert passes(nudge_gate="rejection", nudge_threshold=1) > passes(nudge_threshold=0)


# Stored and given thresholds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "gate", "threshold"),
    [
        ([{}], "top1", 0.4),
        ([{"nudge_gate": "entropy"}], "entropy", 2.0),
        ([{"nudge_gate": "rejection"}, {"nudge_threshold": 0.3}], "rejection", 0.2),
        ([{"nudge_gate": "top1"}, {"nudge_threshold": 0.3}], "top1", 0.3),
        ([{"nudge_threshold": 0.1}, {"nudge_gate": "rejection"}], "rejection", 0.1),
        ([{"nudge_gate": "margin"}, {"nudge_gate": "margin", "nudge_threshold": 0.3}], "margin", 0.3),
        ([{"nudge_threshold": "auto"}], "top1", "auto"),
        ([{"nudge_threshold": "auto"}, {"nudge_threshold": 0.3}], "top1", 0.3),
        ([{"nudge_threshold": "auto", "target_nudge_rate": 0.2}, {"nudge_threshold": 0.3}], "top1", "auto"),
        (
            [
                {"nudge_threshold": "auto", "target_nudge_rate": 0.2},
                {"nudge_threshold": 0.3, "target_nudge_rate": 0.2},
            ],
            "top1",
            0.3,
        ),
        ([{"nudge_threshold": "auto"}, {"nudge_threshold": 0.3, "target_nudge_rate": 0.05}], "top1", 0.3),
        ([{"nudge_threshold": "auto", "nudge_gate": "kad"}, {"nudge_threshold": 0.3}], "kad", "auto"),
        ([{"nudge_threshold": 0.5}, {"nudge_threshold": "auto"}], "top1", 0.5),
    ],
)
def test_a_threshold_belongs_to_its_gate_and_its_target(sources, gate, threshold):
    config = NudgingConfig.resolve(sources)
    assert (config.nudge_gate, config.nudge_threshold) == (gate, threshold)


def test_auto_uses_the_threshold_that_is_stored_with_the_model():
    chosen, *both = pair_with_prompts("llama", "two", seed=2, rows=2)
    stored = chosen.base.generation_config
    given = outcomes(nudge(chosen, *both, max_new_tokens=40, nudge_threshold=0.63))
    online = outcomes(nudge(chosen, *both, max_new_tokens=40, nudge_threshold="auto"))
    stored.nudge_threshold = 0.63
    try:
        assert outcomes(nudge(chosen, *both, max_new_tokens=40, nudge_threshold="auto")) == given != online
    finally:
        del stored.nudge_threshold
