"""The same pair, prompts, parameters and seed give the same ids through every door (test_serving.py: served text)."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    TextIteratorStreamer,
    WatermarkingConfig,
    pipeline,
)

import nudging_hf
from nudging_hf import hub
from nudging_hf.core import transformers_private
from nudging_hf.core.validation import UNSUPPORTED

ROOT = Path(__file__).parents[1]
MINI = ROOT / "examples" / "mini" / "models"
PROMPTS = [
    'Show every step on the way.\nQuestion: Join the last letters of the words "Breto", "Dal".\n',
    "Question: Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?\n",
]
SETTINGS = {
    "greedy": {"do_sample": False},
    "rarely nudged": {"do_sample": False, "nudge_threshold": 0.1, "num_draft_tokens": 3},
    "always nudged": {"do_sample": False, "nudge_threshold": 1.01, "takeover_on_agreement": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "nudge_threshold": 0.5},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return str(hub.export(MINI / "base", MINI / "nudging", tmp_path_factory.mktemp("doors") / "nudged"))


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(MINI / "base")


@pytest.fixture(scope="module")
def nudging_model():
    return AutoModelForCausalLM.from_pretrained(MINI / "nudging")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINI / "base")


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")


@pytest.fixture
def registered():
    nudging_hf.register()
    yield
    nudging_hf.unregister()


def answers(sequences, width, pad):
    """The new ids of each row, without padding."""
    return [[token for token in row[width:] if token != pad] for row in sequences]


def piped(pipe, tokenizer, inputs, **settings):
    records = pipe(PROMPTS, batch_size=len(PROMPTS), return_tensors=True, **settings)
    sequences = [record["generated_token_ids"] for (record,) in records]
    return answers(sequences, inputs.input_ids.shape[1], tokenizer.pad_token_id)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_door_gives_the_same_ids(exported, base, nudging_model, tokenizer, inputs, registered, settings):
    settings = {"max_new_tokens": 48, **settings}

    def generated(generate, **more):
        torch.manual_seed(5)
        sequences = generate(**inputs, **settings, **more)
        return answers(sequences.tolist(), inputs.input_ids.shape[1], tokenizer.pad_token_id)

    def through(task, **more):
        torch.manual_seed(5)
        return piped(pipeline(task, **more), tokenizer, inputs, **settings)

    carrying = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    given = {"nudging_model": nudging_model}
    folder = {"custom_generate": str(ROOT / "hub_custom_code"), "trust_remote_code": True}
    expected = generated(nudging_hf.generate, model=base, **given)
    doors = {
        "registered": generated(base.generate, **given),
        "callable": generated(base.generate, custom_generate=nudging_hf.generate, **given),
        "folder": generated(base.generate, **folder, **given),
        "carried": generated(carrying.generate),
        "nudged-text-generation": through("nudged-text-generation", model=base, tokenizer=tokenizer, **given),
        "text-generation": through("text-generation", model=base, tokenizer=tokenizer, **given),
        "text-generation, carried": through("text-generation", model=exported, trust_remote_code=True),
    }
    assert [name for name, ids in doors.items() if ids != expected] == []
    assert all(expected) and expected[0] != expected[1]


# Unsupported arguments -----------------------------------------------------------------------------------------------

# Fields of a generation config that nudging obeys. Those that it refuses are in `validation.UNSUPPORTED`.
HEEDED = set(
    """
    max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample use_cache cache_implementation
    max_cache_len compile_config disable_compile temperature top_k top_p min_p top_h typical_p epsilon_cutoff
    eta_cutoff repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids renormalize_logits remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens sequence_bias num_return_sequences output_scores output_logits return_dict_in_generate
    pad_token_id bos_token_id eos_token_id
    """.split()
)
# These have an effect only together with other arguments, which are refused.
HARMLESS = set(
    """
    early_stopping length_penalty
    cache_config continuous_batching_config low_memory
    decoder_start_token_id
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    max_matching_ngram_size assistant_lookbehind target_lookbehind
    transformers_version
    """.split()
)
# Arguments of `generate` itself that nudging obeys.
ARGUMENTS_HEEDED = set(
    "inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn streamer kwargs".split()
)


def test_every_argument_of_generate_is_obeyed_or_refused_or_harmless():
    """A new field of a new version is in none of the tables. Look up what it does and add it to one."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - HEEDED - HARMLESS - set(UNSUPPORTED) == set()
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}
    assert arguments - ARGUMENTS_HEEDED - set(UNSUPPORTED) == set()
    assert not HEEDED & set(UNSUPPORTED) and not HARMLESS & (HEEDED | set(UNSUPPORTED))
    tried = {name for given in REFUSALS.values() for name in given} - {"top_k"}
    assert tried | _OF_OTHER_VERSIONS == set(UNSUPPORTED)


def _filled(base, ids):
    cache = DynamicCache()
    base(ids, **{transformers_private.CACHE: cache})
    return cache


# Fields that older versions do not have, and names that other versions give to the cache.
_OF_LATER_VERSIONS = {"assistant_ensemble_weight", "speculation_type", "use_mtp"}
_OF_OTHER_VERSIONS = set(transformers_private.CACHE_NAMES) - {transformers_private.CACHE} | _OF_LATER_VERSIONS
ONE = torch.ones(1, 1, dtype=torch.long)
# Values of the arguments, or functions that make the value from the base.
REFUSALS = {
    "a filled cache": {transformers_private.CACHE: lambda base: _filled(base, ONE)},
    "an empty cache": {transformers_private.CACHE: lambda base: DynamicCache()},
    "custom_generate": {"custom_generate": lambda base: base},
    "constraints": {"constraints": [1]},
    "penalty_alpha": {"penalty_alpha": 0.5, "top_k": 4},
    "assistant_model": {"assistant_model": lambda base: base},
    "inputs_embeds": {"inputs_embeds": lambda base: torch.zeros(1, 3, base.config.hidden_size)},
    "position_ids": {"position_ids": torch.zeros(1, 3, dtype=torch.long)},
    **{
        name: {name: value}
        for name, value in {
            "assistant_early_exit": 1,
            "assistant_ensemble_weight": 0.5,
            "assistant_tokenizer": "a tokenizer",
            "diversity_penalty": 0.5,
            "dola_layers": "high",
            "force_words_ids": [[5]],
            "forced_bos_token_id": 3,
            "forced_eos_token_id": 3,
            "guidance_scale": 1.5,
            "negative_prompt_attention_mask": ONE,
            "negative_prompt_ids": ONE,
            "num_beam_groups": 2,
            "num_beams": 2,
            "output_attentions": True,
            "output_hidden_states": True,
            "prefill_chunk_size": 4,
            "prompt_lookup_num_tokens": 3,
            "speculation_type": "dflash",
            "synced_gpus": True,
            "token_healing": True,
            "use_mtp": True,
            "watermarking_config": WatermarkingConfig(bias=2.0),
        }.items()
        if name not in _OF_LATER_VERSIONS or hasattr(GenerationConfig(), name)
    },
}


@pytest.fixture(scope="module")
def ways_in(base, nudging_model, tokenizer, exported, tmp_path_factory):
    """Every door as a function of the arguments that a user gives besides a prompt."""
    folder = str(hub.write_code(tmp_path_factory.mktemp("code")).parent)
    inputs = dict(tokenizer(PROMPTS[:1], return_tensors="pt"))
    carrying = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    given = {"nudging_model": nudging_model}

    def registered(call):
        def through(**kwargs):
            nudging_hf.register()
            try:
                return call(**kwargs)
            finally:
                nudging_hf.unregister()

        return through

    def piped(task, **more):
        pipe = registered(pipeline)(task=task, tokenizer=tokenizer, **more)
        return registered(lambda **kwargs: pipe(PROMPTS[0], **kwargs))

    by_callable = {"custom_generate": nudging_hf.generate, **given}
    return {
        "function": lambda **kwargs: nudging_hf.generate(base, **inputs, **given, **kwargs),
        "registered": registered(lambda **kwargs: base.generate(**inputs, **given, **kwargs)),
        "callable": lambda **kwargs: base.generate(**inputs, **by_callable, **kwargs),
        "callable, registered": registered(lambda **kwargs: base.generate(**inputs, **by_callable, **kwargs)),
        "folder": lambda **kwargs: base.generate(
            **inputs, **given, custom_generate=folder, trust_remote_code=True, **kwargs
        ),
        "carried": lambda **kwargs: carrying.generate(**inputs, **kwargs),
        "nudged-text-generation": piped("nudged-text-generation", model=base, **given),
        "text-generation": piped("text-generation", model=base, **given),
        "text-generation, carried": piped("text-generation", model=carrying),
    }


@pytest.mark.parametrize("given", REFUSALS.values(), ids=REFUSALS)
def test_every_door_refuses_the_same_arguments(base, ways_in, given):
    name = next(iter(given))
    for door, call in ways_in.items():
        if name == "custom_generate" and door not in ("function", "carried", "nudged-text-generation"):
            continue  # There `custom_generate` is the door itself, or leads to plain `generate`.
        # transformers itself refuses token healing here, because it has no tokenizer.
        said = "token healing" if (name, door) == ("token_healing", "callable") else f"`{name}="
        made = {key: value(base) if callable(value) else value for key, value in given.items()}
        with pytest.raises(ValueError, match=said) as caught:
            call(max_new_tokens=4, do_sample=False, **made)
        assert "nudging" in str(caught.value) or door == "callable", door


@pytest.mark.parametrize("kind", ["offloaded", "paged", "sliding_window"])
def test_a_cache_that_cannot_roll_back_is_refused(ways_in, kind):
    """With `paged` transformers does not call a `custom_generate` function, so nudging cannot refuse it there."""
    for door, call in ways_in.items():
        if (kind, door) != ("paged", "callable"):
            with pytest.raises(ValueError, match="cache_implementation"):
                call(max_new_tokens=4, cache_implementation=kind)


def test_every_door_streams_the_answer_and_its_end(ways_in, tokenizer):
    texts = {}
    for door, call in ways_in.items():
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        call(max_new_tokens=24, do_sample=False, streamer=streamer)
        texts[door] = "".join(streamer)
    assert texts["function"] and set(texts.values()) == {texts["function"]}


def test_a_streamer_of_several_rows_is_refused_through_a_callable(base, nudging_model, tokenizer, inputs):
    class Streamer:
        def put(self, ids):
            pass

    with pytest.raises(ValueError, match="got 2 rows"):
        base.generate(
            **inputs,
            custom_generate=nudging_hf.generate,
            nudging_model=nudging_model,
            streamer=Streamer(),
            max_new_tokens=4,
        )


def test_a_callable_uses_the_given_tokenizer(nudging_model, tokenizer, inputs):
    nameless = AutoModelForCausalLM.from_pretrained(MINI / "base")
    nameless.name_or_path = nameless.config.name_or_path = ""
    given = {"nudging_model": nudging_model, "max_new_tokens": 8}
    with pytest.raises(ValueError, match="pass `tokenizer=`"):
        nameless.generate(**inputs, custom_generate=nudging_hf.generate, **given)
    answers = nameless.generate(**inputs, custom_generate=nudging_hf.generate, tokenizer=tokenizer, **given)
    assert torch.equal(answers, nudging_hf.generate(nameless, **inputs, tokenizer=tokenizer, **given))


def test_a_given_config_keeps_the_nudging_model_that_the_bases_config_names(base, nudging_model, tokenizer, inputs):
    """transformers merges the configs in this way. The config may also be given by position."""
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    expected = nudging_hf.generate(base, **inputs, nudging_model=nudging_model, generation_config=config)
    naming = AutoModelForCausalLM.from_pretrained(MINI / "base")
    naming.generation_config.nudging_model_name_or_path = str(MINI / "nudging")
    mask = inputs.attention_mask
    nudging_hf.register()
    try:
        assert torch.equal(naming.generate(**inputs, generation_config=config), expected)
        assert torch.equal(naming.generate(inputs.input_ids, config, attention_mask=mask), expected)
        config.nudging_model_name_or_path = str(MINI / "nudging")
        assert torch.equal(base.generate(inputs.input_ids, config, attention_mask=mask), expected)
    finally:
        nudging_hf.unregister()
