"""Nudging accepts what plain `generate` accepts, or refuses it with a reason."""

import copy
import time

import pytest
import torch
import transformers
from packaging.version import Version
from running import inputs_of, nudge
from tiny import pair, prompts
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    ProcessorMixin,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)

import nudging_hf
from nudging_hf import NudgingConfig, NudgingOutput
from nudging_hf.core import transformers_private


@pytest.fixture
def shared():
    return pair("llama", 0, "shared")


@pytest.fixture
def inputs(shared):
    return inputs_of(shared, *prompts(shared, 2, 0))


def new_tokens(sequences: torch.Tensor, inputs: dict) -> list[list[int]]:
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


# Ways of calling -----------------------------------------------------------------------------------------------------


def test_every_door_gives_the_same_ids(shared, inputs):
    settings = {"max_new_tokens": 24, "nudge_threshold": 0.5}
    expected = nudging_hf.generate(shared.base, **inputs, **settings)
    by_position = {key: value for key, value in inputs.items() if key != "input_ids"}
    assert torch.equal(nudging_hf.generate(shared.base, inputs["input_ids"], **by_position, **settings), expected)
    assert torch.equal(
        nudging_hf.generate(inputs["input_ids"], model=shared.base, **by_position, **settings), expected
    )
    nudging_hf.register()
    try:
        assert torch.equal(shared.base.generate(**inputs, **settings), expected)
    finally:
        nudging_hf.unregister()
    called = {key: value for key, value in inputs.items() if key != "tokenizer"}
    by_callable = shared.base.generate(
        **called, base_tokenizer=shared.tokenizer, custom_generate=nudging_hf.generate, **settings
    )
    assert torch.equal(by_callable, expected)


@pytest.mark.parametrize("source", ["keyword", "nudging_config", "generation_config", "model"])
def test_a_parameter_may_be_given_anywhere(shared, inputs, source):
    expected = nudging_hf.generate(shared.base, **inputs, max_new_tokens=16, nudge_threshold=0.9, num_nudging_tokens=5)
    assert not torch.equal(expected, nudging_hf.generate(shared.base, **inputs, max_new_tokens=16))
    if source == "keyword":
        given = {"nudging_config": NudgingConfig(0.1), "nudge_threshold": 0.9, "num_nudging_tokens": 5}
    elif source == "nudging_config":
        given = {"nudging_config": NudgingConfig(nudge_threshold=0.9, num_nudging_tokens=5)}
    else:
        given = {}
    if source == "generation_config":
        given["generation_config"] = GenerationConfig(max_new_tokens=16, nudge_threshold=0.9, num_nudging_tokens=5)
    else:
        given["max_new_tokens"] = 16
    if source == "model":
        shared.base.generation_config.nudge_threshold = 0.9
        shared.base.generation_config.num_nudging_tokens = 5
    try:
        assert torch.equal(nudging_hf.generate(shared.base, **inputs, **given), expected)
    finally:
        if source == "model":
            del shared.base.generation_config.nudge_threshold, shared.base.generation_config.num_nudging_tokens


def test_tokenizers_are_loaded_by_name(shared, inputs, tmp_path):
    expected = nudging_hf.generate(shared.base, **inputs, max_new_tokens=8)
    shared.base.save_pretrained(tmp_path)
    shared.tokenizer.save_pretrained(tmp_path)
    base, nudging_model = type(shared.base).from_pretrained(tmp_path), shared.nudging_model
    without = {key: value for key, value in inputs.items() if "tokenizer" not in key}
    named = nudging_model.config.name_or_path
    nudging_model.config.name_or_path = nudging_model.name_or_path = str(tmp_path)
    try:
        again = nudging_hf.generate(base, **without | {"nudging_model": nudging_model}, max_new_tokens=8)
    finally:
        nudging_model.config.name_or_path = nudging_model.name_or_path = named
    assert torch.equal(again, expected)


@pytest.mark.parametrize("kind", ["shared", "two"])
def test_the_default_nudging_prompt_is_the_base_prompt_as_a_user_turn(kind):
    chosen = pair("llama", 0, kind)
    base_prompts, _ = prompts(chosen, 2, 3)
    texts = [chosen.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in base_prompts]
    turns = [
        chosen.nudging_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in texts
    ]
    given = inputs_of(chosen, base_prompts, turns)
    expected = nudging_hf.generate(chosen.base, **given, max_new_tokens=16)
    left_out = {
        key: value for key, value in given.items() if key not in ("nudging_input_ids", "nudging_attention_mask")
    }
    assert torch.equal(nudging_hf.generate(chosen.base, **left_out, max_new_tokens=16), expected)


def test_without_a_chat_template_the_nudging_model_reads_the_base_prompt(shared):
    base_prompts, _ = prompts(shared, 2, 3)
    given = inputs_of(shared, base_prompts, base_prompts)
    expected = nudging_hf.generate(shared.base, **given, max_new_tokens=16)
    left_out = {
        key: value for key, value in given.items() if key not in ("nudging_input_ids", "nudging_attention_mask")
    }
    template, shared.nudging_tokenizer.chat_template = shared.nudging_tokenizer.chat_template, None
    try:
        assert torch.equal(nudging_hf.generate(shared.base, **left_out, max_new_tokens=16), expected)
    finally:
        shared.nudging_tokenizer.chat_template = template


# Output --------------------------------------------------------------------------------------------------------------


def test_the_output_says_who_wrote_what(shared, inputs):
    output = nudging_hf.generate(
        shared.base, **inputs, max_new_tokens=24, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert isinstance(output, NudgingOutput)
    assert torch.equal(output.sequences, nudging_hf.generate(shared.base, **inputs, max_new_tokens=24))
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    assert output.nudged_mask.shape == output.base_top1_probs.shape == (2, new)
    assert output.nudged_mask.any() and not output.nudged_mask.all()
    assert output.nudge_rate.shape == (2,)
    assert output.base_forward_passes > 0 and output.nudging_forward_passes > 0
    assert output.base_tokens_fed > output.base_forward_passes
    assert len(output.scores) == len(output.logits) == new
    # The base's logits at every token, whichever model wrote it, are those of one pass over the whole text.
    for row in range(2):
        there = inputs["attention_mask"][row].bool()
        n = int((~output.base_top1_probs[row].isnan()).sum())
        prompt = inputs["input_ids"][row][there]
        text = torch.cat([prompt, output.sequences[row, inputs["input_ids"].shape[1] :][: n - 1]])
        whole = shared.base(text[None]).logits[0, len(prompt) - 1 :].float()
        torch.testing.assert_close(torch.stack([step[row] for step in output.logits[:n]]), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.base_top1_probs[row, :n], whole.softmax(-1).amax(-1), rtol=0, atol=1e-6)
        # So are its own tokens, and its ranks of those that were written.
        written = output.sequences[row, inputs["input_ids"].shape[1] :][:n]
        assert torch.equal(output.base_tokens[row, :n], whole.argmax(-1))
        assert torch.equal(output.base_ranks[row, :n], (whole >= whole.gather(-1, written[:, None])).sum(-1))
        probabilities = whole.softmax(-1).gather(-1, output.base_tokens[row, :n, None])[:, 0]
        torch.testing.assert_close(output.base_token_probs[row, :n], probabilities, rtol=0, atol=1e-6)
        assert output.nudge_rate[row] == pytest.approx(
            output.nudged_mask[row].sum().item() / (n - (output.finish_reasons[row] == "eos"))
        )


def test_logits_after_the_end_of_a_row_are_zero_whatever_was_drafted(shared):
    """A stop string can end a row in the middle of a draft, of which the base has predicted more."""
    given = inputs_of(shared, *prompts(shared, 3, 0))
    settings = {"max_new_tokens": 40, "return_dict_in_generate": True, "output_logits": True}
    first = nudging_hf.generate(shared.base, **given, **settings)
    stop = shared.tokenizer.decode(first.sequences[0, given["input_ids"].shape[1] + 6])
    seen = []
    for num_draft_tokens in (0, 8):
        output = nudging_hf.generate(
            shared.base, **given, **settings, stop_strings=[stop], num_draft_tokens=num_draft_tokens
        )
        logits = torch.stack(output.logits, dim=1)
        is_padding = output.base_top1_probs.isnan()
        assert is_padding.any() and not logits[is_padding].any()
        seen.append(logits)
    torch.testing.assert_close(*seen, rtol=0, atol=1e-5)


def test_drafts_save_passes_of_the_base(shared, inputs):
    passes = [
        nudging_hf.generate(
            shared.base, **inputs, max_new_tokens=40, num_draft_tokens=k, return_dict_in_generate=True
        ).base_forward_passes
        for k in (0, 8)
    ]
    assert passes[1] < passes[0]


def test_the_end_mark_is_the_bases_eos_and_not_nudged(shared):
    found = 0
    for seed in range(20):
        for result in nudge(shared, *prompts(shared, 3, seed), max_new_tokens=60, nudge_threshold=0.9):
            if result.reason == "eos":
                found += 1
                assert result.ids[-1] == shared.base.generation_config.eos_token_id
                assert not result.nudged[-1]
    assert found


def test_rows_of_different_lengths_are_padded_after_their_ends(shared):
    """`nudge` asserts the padding of each row. This test makes sure that rows of different lengths occur."""
    results = nudge(shared, *prompts(shared, 8, 1), nudge_threshold=0.9, max_new_tokens=50)
    assert len({len(result.ids) for result in results}) > 1


# Limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "two"])
def test_a_budget_cuts_anywhere_and_changes_nothing_before(kind):
    """A budget may also end within a word or a lookahead."""
    chosen = pair("qwen3", 3, kind)
    given = prompts(chosen, 2, 1)
    longest = nudge(chosen, *given, max_new_tokens=24, nudge_threshold=0.6)
    for budget in range(1, 24):
        for short, long in zip(
            nudge(chosen, *given, max_new_tokens=budget, nudge_threshold=0.6), longest, strict=True
        ):
            assert short.ids == long.ids[:budget]
            assert short.nudged == long.nudged[:budget]
            assert short.reason == ("length" if budget < len(long.ids) else long.reason)


def test_max_length_counts_the_prompt(shared, inputs):
    width = inputs["input_ids"].shape[1]
    assert torch.equal(
        nudging_hf.generate(shared.base, **inputs, max_length=width + 9),
        nudging_hf.generate(shared.base, **inputs, max_new_tokens=9),
    )


@pytest.mark.parametrize("kind", ["shared", "two"])
@pytest.mark.parametrize("drafts", [0, 4])
def test_min_new_tokens_holds_back_the_end(kind, drafts):
    chosen = pair("llama", 0, kind)
    ended = 0
    for seed in range(4):
        given = prompts(chosen, 2, seed)
        free = nudge(chosen, *given, max_new_tokens=40, nudge_threshold=0.9)
        held = nudge(
            chosen, *given, max_new_tokens=40, min_new_tokens=30, nudge_threshold=0.9, num_draft_tokens=drafts
        )
        ended += sum(result.reason == "eos" and len(result.ids) <= 30 for result in free)
        assert all(len(result.ids) >= 30 for result in held)
    assert ended


def test_stop_strings_end_a_row_at_the_token_that_completes_them(shared):
    given = prompts(shared, 2, 1)
    free = nudge(shared, *given, max_new_tokens=40)
    assert len(free[0].ids) > 11
    text = shared.tokenizer.decode(free[0].ids[8:11])
    stopped = nudge(shared, *given, max_new_tokens=40, stop_strings=[text])
    assert stopped[0].reason == "stop_string"
    assert len(stopped[0].ids) <= 11
    assert stopped[0].ids == free[0].ids[: len(stopped[0].ids)]
    config = GenerationConfig(max_new_tokens=40, stop_strings=[text])
    again = nudging_hf.generate(shared.base, **inputs_of(shared, *given), generation_config=config)
    assert new_tokens(again, inputs_of(shared, *given))[0][: len(stopped[0].ids)] == stopped[0].ids


class AtToken(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token
        self.lengths: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        assert input_ids.shape[0] == 1
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


def test_stopping_criteria_hold_at_every_token(shared):
    inputs = inputs_of(shared, *prompts(shared, 1, 1))
    free = new_tokens(nudging_hf.generate(shared.base, **inputs, max_new_tokens=30), inputs)
    assert len(free[0]) > 7
    criterion = AtToken(free[0][7])
    stopped = nudging_hf.generate(shared.base, **inputs, max_new_tokens=30, stopping_criteria=[criterion])
    first = free[0].index(free[0][7]) + 1
    assert new_tokens(stopped, inputs)[0] == free[0][:first]
    width = inputs["input_ids"].shape[1]
    assert criterion.lengths == list(range(width + 1, width + first + 1))


def test_an_eos_criterion_of_the_callers_own_ends_a_row(shared):
    inputs = inputs_of(shared, *prompts(shared, 1, 1))
    free = new_tokens(nudging_hf.generate(shared.base, **inputs, max_new_tokens=30), inputs)[0]
    criterion = EosTokenCriteria(torch.tensor([free[7]]))
    stopped = nudging_hf.generate(shared.base, **inputs, max_new_tokens=30, stopping_criteria=[criterion])
    assert new_tokens(stopped, inputs)[0] == free[: free.index(free[7]) + 1]


def test_the_bases_eos_is_an_ordinary_word_of_the_nudging_model(shared):
    given = prompts(shared, 1, 1)
    settings = {"max_new_tokens": 20, "nudge_threshold": 1.01, "takeover_on_agreement": False}
    [free] = nudge(shared, *given, **settings)
    config = shared.base.generation_config
    eos, config.eos_token_id = config.eos_token_id, free.ids[4]
    try:
        [again] = nudge(shared, *given, **settings)
    finally:
        config.eos_token_id = eos
    assert again.ids[:-1] == free.ids[:-1]  # The last id is the end mark, or the last of the budget.


def test_max_time_ends_all_rows_also_within_a_lookahead(shared, inputs):
    begun = time.monotonic()
    output = nudging_hf.generate(
        shared.base, **inputs, max_new_tokens=4000, min_new_tokens=4000, max_time=0.5, return_dict_in_generate=True
    )
    assert output.finish_reasons == ["time", "time"]
    assert time.monotonic() - begun < 20
    at_once = nudging_hf.generate(shared.base, **inputs, max_new_tokens=9, max_time=1e-9, return_dict_in_generate=True)
    assert at_once.nudging_forward_passes == 0


# Logits processors and sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [17, 30]},
        {"bad_words_ids": [[40], [41, 42]]},
        {"encoder_repetition_penalty": 1.3},
        {"encoder_no_repeat_ngram_size": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_base_obeys_logits_processors_as_in_plain_generate(shared, settings):
    """At γ = 0 it writes what it would have written after the first word, with drafts and beside other rows too."""
    base_prompts, nudging_prompts = prompts(shared, 3, 2)
    together = nudge(shared, base_prompts, nudging_prompts, nudge_threshold=0, max_new_tokens=24, **settings)
    assert together == nudge(
        shared, base_prompts, nudging_prompts, nudge_threshold=0, max_new_tokens=24, num_draft_tokens=0, **settings
    )
    compared = 0
    for prompt, result in zip(base_prompts, together, strict=True):
        first = result.nudged.index(False)
        # The processors count the first word as part of the answer, so plain `generate` must write it too.
        forced = result.ids[:first]
        plain = shared.base.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            prefix_allowed_tokens_fn=None,
            logits_processor=[Forced(len(prompt), forced)],
            **settings,
        )[0, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(plain) if token == shared.base.generation_config.eos_token_id]
        until = min([*ends, len(result.ids) - (result.reason == "eos")])
        assert result.ids[:until] == plain[:until]
        compared += until > first
    assert compared


class Forced(LogitsProcessor):
    """A logits processor that makes a plain `generate` begin with the given tokens."""

    def __init__(self, prompt_length: int, tokens: list[int]):
        self.prompt_length = prompt_length
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        place = input_ids.shape[1] - self.prompt_length
        if place < len(self.tokens):
            scores = torch.full_like(scores, float("-inf"))
            scores[:, self.tokens[place]] = 0
        return scores


def test_prefix_allowed_tokens_fn_gets_its_row(shared, inputs):
    seen = set()

    def allowed(row, ids):
        seen.add(row)
        return [50, 51] if row == 0 else [60, 61]

    output = nudging_hf.generate(
        shared.base,
        **inputs,
        max_new_tokens=20,
        nudge_threshold=0,
        prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert seen == {0, 1}
    assert set(new[0][~output.nudged_mask[0]].tolist()) <= {50, 51}
    assert set(new[1][~output.nudged_mask[1]].tolist()) <= {60, 61}


def test_the_gate_reads_raw_logits_before_processors_and_temperature(shared, inputs):
    common = {"max_new_tokens": 1, "return_dict_in_generate": True}
    plain = nudging_hf.generate(shared.base, **inputs, **common).base_top1_probs
    for settings in ({"repetition_penalty": 1.9}, {"do_sample": True, "temperature": 0.1, "top_k": 2}):
        assert torch.equal(nudging_hf.generate(shared.base, **inputs, **common, **settings).base_top1_probs, plain)


def test_several_sampled_answers_to_one_prompt(shared, inputs):
    three = nudging_hf.generate(
        shared.base, **inputs, do_sample=True, temperature=1.5, num_return_sequences=3, max_new_tokens=16
    )
    rows = new_tokens(three, inputs)
    assert len(rows) == 6
    assert torch.equal(three[0, : inputs["input_ids"].shape[1]], three[2, : inputs["input_ids"].shape[1]])
    assert len({tuple(row) for row in rows[:3]}) > 1


def test_a_greedy_call_has_a_greedy_nudging_model(shared, inputs):
    expected = nudging_hf.generate(shared.base, **inputs, max_new_tokens=16)
    shared.nudging_model.generation_config.do_sample = True
    try:
        assert torch.equal(nudging_hf.generate(shared.base, **inputs, max_new_tokens=16), expected)
    finally:
        shared.nudging_model.generation_config.do_sample = False


def test_the_nudging_model_obeys_its_own_generation_config(shared):
    given = prompts(shared, 1, 4)
    settings = {"nudge_threshold": 1.01, "takeover_on_agreement": False, "max_new_tokens": 30}
    shared.nudging_model.generation_config.repetition_penalty = 1.7
    try:
        [result] = nudge(shared, *given, **settings)
        eos = shared.nudging_model.generation_config.eos_token_id
        own = shared.nudging_model.generate(
            torch.tensor(given[1]), max_new_tokens=30, do_sample=False,
            suppress_tokens=sorted(set(shared.nudging_tokenizer.all_special_ids) - {eos}),
        )[0, len(given[1][0]) :].tolist()  # fmt: skip
    finally:
        shared.nudging_model.generation_config.repetition_penalty = None
    assert result.ids[: len(own) - 1] == own[:-1]
    assert result.ids != nudge(shared, *given, **settings)[0].ids


# Odd text ------------------------------------------------------------------------------------------------------------


def test_eos_as_the_first_token_is_an_empty_answer(shared):
    given = prompts(shared, 2, 0)
    eos = shared.nudging_model.generation_config.eos_token_id
    shared.nudging_model.generation_config.suppress_tokens = [i for i in range(len(shared.tokenizer)) if i != eos]
    try:
        for result in nudge(shared, *given, max_new_tokens=10):
            assert result.ids == [shared.base.generation_config.eos_token_id]
            assert (result.nudged, result.reason) == ([False], "eos")
    finally:
        shared.nudging_model.generation_config.suppress_tokens = None


# Errors --------------------------------------------------------------------------------------------------------------


def refused(model, inputs, match, **kwargs):
    with pytest.raises(ValueError, match=match):
        nudging_hf.generate(model, **{"max_new_tokens": 4, **inputs, **kwargs})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"token_healing": True}, "token_healing"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"past_key_values": ()}, "past_key_values"),
        ({"position_ids": torch.ones(2, 3)}, "position_ids"),
        ({"custom_generate": "some/where"}, "custom_generate"),
        ({"nudge_threshold": "high"}, "`nudge_threshold` must be a finite number such as 0.4, or 'auto', got 'high'"),
        ({"nudge_threshold": float("nan")}, "nudge_threshold"),
        ({"num_draft_tokens": -1}, "num_draft_tokens"),
        ({"nudging_config": 0.4}, "NudgingConfig"),
        ({"nudging_config": {"threshold": 0.4}}, "nudge_threshold.*got 'threshold'"),
        ({"nudging_model": "/nowhere"}, "'/nowhere' cannot be loaded"),
        ({"nudging_model": 7}, "from_pretrained"),
        ({"nudge_treshold": 0.4}, "nudge_treshold"),
        ({"nudging_input_ids": [[1, 2]]}, "nudging_input_ids"),
        ({"nudging_input_ids": torch.tensor([[5, 6]]), "nudging_attention_mask": None}, "1 prompts.* 2"),
        ({"nudging_input_ids": torch.ones(3, 2).long(), "nudging_attention_mask": None}, "3 prompts.* 2"),
        ({"nudging_attention_mask": torch.zeros(2, 1)}, "nudging_attention_mask"),
        ({"tokenizer": 7}, "`tokenizer` must be a tokenizer"),
        ({"tokenizer": None}, "pass `tokenizer=`"),
        ({"nudging_tokenizer": None}, "pass `nudging_tokenizer=`"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_wrong_use_is_refused(shared, inputs, given, match):
    refused(shared.base, inputs, match, **given)


def test_a_streamer_takes_a_single_row(shared, inputs):
    refused(shared.base, inputs, "one at a time", streamer=TextStreamer(shared.tokenizer))


def test_a_forgotten_model_is_refused(inputs):
    with pytest.raises(ValueError, match="model"):
        nudging_hf.generate(**inputs)


def test_encoder_decoder_models_are_refused(shared, inputs):
    config = T5Config(vocab_size=400, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(config)
    refused(t5, inputs, "base is an encoder-decoder model, T5")
    refused(shared.base, inputs, "nudging model is an encoder-decoder", nudging_model=t5)


@pytest.mark.parametrize("which", ["base", "nudging model"])
def test_a_model_that_cannot_generate_is_refused_by_its_name(shared, inputs, which):
    def given(model):
        base = model if which == "base" else shared.base
        return base, inputs | ({} if which == "base" else {"nudging_model": model})

    argument = which.replace("nudging model", "nudging_model").replace("base", "model")
    inside = shared.base if which == "base" else shared.nudging_model
    refused(*given(torch.nn.DataParallel(inside)), f"The {which} is wrapped in DataParallel.* its `.module`")
    refused(*given(copy.deepcopy(inside).to("meta")), f"The {which}, .* is on the meta device.*`to_empty")
    refused(*given(torch.nn.Linear(1, 1)), f"`{argument}` must be a causal language model of transformers, got Linear")
    if which == "base":
        refused("gpt2", inputs, "`model` must be a causal language model of transformers, got str")


def test_ranks_that_wait_for_each_other_are_refused(shared, inputs, monkeypatch):
    monkeypatch.setattr("transformers.generation.utils.is_fsdp_managed_module", lambda model: True)
    # Newer and older versions of transformers ask for the world size differently.
    for name, value in (
        ("_get_torch_distributed_world_size", 2),
        ("dist.get_world_size", 2),
        ("dist.is_initialized", 1),
    ):
        monkeypatch.setattr(f"transformers.generation.utils.{name}", lambda value=value: value, raising=False)
    refused(shared.base, inputs, "FSDP")


def test_an_untried_version_is_logged_once_and_an_old_one_is_refused(caplog):
    for version in ("5.12.0", "5.24.0", "5.24.3", "5.12.1.dev0"):
        transformers_private.check_version.cache_clear()
        transformers_private.check_version(version)
    assert not caplog.records
    for _ in range(2):
        transformers_private.check_version("6.0.0.dev0")
    assert [record.getMessage() for record in caplog.records] == [
        "Nudging was tested with transformers 5.12 to 5.24, but 6.0.0.dev0 is installed."
    ]
    with pytest.raises(ImportError, match=r"transformers 5\.12 to 5\.24, and 5\.11\.2 is too old"):
        transformers_private.check_version("5.11.2")


def _mamba(size):
    return MambaForCausalLM(
        MambaConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=2, pad_token_id=1)
    )


def _deepseek(size):
    """A model with an index of what to attend to, kept in the cache. Fewer heads would make many scores equal."""
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 16, "index_head_dim": 16}
    config = DeepseekV32Config(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        index_topk=4,
        eos_token_id=2,
        pad_token_id=1,
        **heads,
    )
    return DeepseekV32ForCausalLM(config)


@pytest.mark.parametrize("base", [_mamba, _deepseek])
def test_a_base_that_keeps_more_than_keys_and_values_is_cached_too(shared, inputs, base):
    torch.manual_seed(0)
    model = base(len(shared.tokenizer)).double().eval()
    if base is _deepseek and Version(transformers.__version__) < Version("5.17"):
        # In those versions a pass over several tokens ignores the index in the cache.
        refused(model, inputs, "use_cache=False")
        return
    answer = nudging_hf.generate(model, **inputs, max_new_tokens=6, use_cache=False)
    for drafts in (0, 4):
        cached = nudging_hf.generate(model, **inputs, max_new_tokens=6, num_draft_tokens=drafts)
        assert torch.equal(answer, cached)


def test_a_processor_stands_for_its_tokenizer(shared, inputs):
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    expected = nudging_hf.generate(shared.base, **inputs, max_new_tokens=6)
    inputs["tokenizer"] = Processor(inputs["tokenizer"])
    assert torch.equal(nudging_hf.generate(shared.base, **inputs, max_new_tokens=6), expected)


def test_a_batch_without_padding_id_is_refused(shared, inputs):
    config = shared.base.generation_config
    eos, pad, config.eos_token_id, config.pad_token_id = config.eos_token_id, config.pad_token_id, None, None
    try:
        refused(shared.base, inputs, "pad_token_id")
    finally:
        config.eos_token_id, config.pad_token_id = eos, pad


def test_a_nudging_model_without_eos_is_refused(shared, inputs):
    config, tokenizer = shared.nudging_model.generation_config, shared.nudging_tokenizer
    eos, config.eos_token_id = config.eos_token_id, None
    token, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        refused(shared.base, inputs, "eos_token_id")
    finally:
        config.eos_token_id, tokenizer.eos_token = eos, token


def test_unregister_restores_plain_generate(shared, inputs):
    from transformers import GenerationMixin

    before = GenerationMixin.generate
    nudging_hf.register()
    nudging_hf.register()
    assert GenerationMixin.generate is not before
    plain = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 6}
    registered = shared.base.generate(**plain)
    nudging_hf.unregister()
    assert GenerationMixin.generate is before
    nudging_hf.unregister()
    assert GenerationMixin.generate is before
    assert torch.equal(shared.base.generate(**plain), registered)
    with pytest.raises(ValueError, match="nudging_model"):
        shared.base.generate(**plain, nudging_model=shared.nudging_model)


def test_a_registered_generate_without_a_nudging_model_is_the_plain_one(shared, inputs):
    plain = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 6}
    expected = shared.base.generate(**plain)
    nudging_hf.register()
    try:
        assert torch.equal(shared.base.generate(**plain, nudging_model=None), expected)
    finally:
        nudging_hf.unregister()
