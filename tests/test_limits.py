"""What ends answers or stops them with an error: stop tokens, last positions, embeddings, logits, exceptions."""

import contextlib
import copy
import functools
import itertools
import random
import time

import pytest
import torch
from running import (
    KINDS,
    SOME_DRAFT_LENGTHS,
    ForbidTokens,
    decode_in_every_way,
    decode_with_oracle,
    inputs_of,
    nudge,
    outcomes,
    random_rule,
)
from scripted import ScriptedLM, writer_of
from tiny import Pair, byte_bpe, pair, prompts
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

import nudging_hf
from nudging_hf.core.transformers_private import greatest_length


@contextlib.contextmanager
def changed(target, **values):
    """Sets attributes of an object within a `with` block."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


# EOS -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_of_the_call_ends_an_answer_whichever_model_writes_it(kind):
    """The answer equals the one without the stop token up to there, also in the middle of a lookahead."""
    by = set()
    for seed in range(6):
        chosen = pair("llama", seed, kind)
        given = prompts(chosen, 1, seed)
        settings = {"max_new_tokens": 30, "nudge_threshold": 0.5}
        [free] = nudge(chosen, *given, **settings)
        eos = chosen.base.generation_config.eos_token_id
        for place in (3, 8):
            if place >= len(free.ids) - 1 or free.ids[place] in (eos, *free.ids[:place]):
                continue
            stop = free.ids[place]
            [(ids, nudged, reason)] = decode_in_every_way(chosen, *given, eos_token_id=stop, **settings)
            assert (ids, nudged, reason) == (free.ids[: place + 1], free.nudged[: place + 1], "stop_token")
            by.add(nudged[-1])
            listed = {"generation_config": GenerationConfig(eos_token_id=[eos, stop], max_new_tokens=30)}
            assert outcomes(nudge(chosen, *given, nudge_threshold=0.5, **listed)) == [(ids, nudged, reason)]
            called = {key: value for key, value in inputs_of(chosen, *given).items() if key != "tokenizer"}
            through = chosen.base.generate(
                **called,
                base_tokenizer=chosen.tokenizer,
                custom_generate=nudging_hf.generate,
                eos_token_id=stop,
                **settings,
            )
            assert through[0, len(given[0][0]) :].tolist() == ids
    assert by == {False, True}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fewest", [9, 18])
def test_an_answer_is_no_longer_than_the_least_length_whoever_wrote_it(fewest, kind):
    """`min_length` counts the prompt, and `min_new_tokens` does not. What was written ahead is not used where another
    count of tokens kept it from ending.

    The nudging model ends as soon as it may, and each of its words is one token of the base. After the first word, the
    base writes tokens that the nudging model's text does not tell of: controls, or the same words letter by letter.
    """
    ours = byte_bpe()
    theirs = ours if kind == "shared" else byte_bpe(259)  # The latter has the bytes alone.
    space, letter, other = ours.convert_tokens_to_ids(["Ġ", "a", "z"])
    spelt = itertools.cycle([space, letter] if kind == "two" else [ours.pad_token_id])
    tokens = list(itertools.islice(spelt, 20))
    prompt = [letter] * 30
    nudging_model = ScriptedLM(theirs, writer_of(" a" * 40, theirs, 1))
    forward = nudging_model.forward

    @functools.wraps(forward)
    def would_rather_end(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., theirs.eos_token_id] = 9
        return output

    nudging_model.forward = would_rather_end
    for number, least in itertools.product((0, 6, 10), ({"min_new_tokens": fewest}, {"min_length": 30 + fewest})):

        def base_says(ids, number=number):
            written = len(ids) - len(prompt) - 1  # After the first word.
            return (tokens[written], 0.9) if written < number else (other, 0.1)

        [answer] = decode_in_every_way(
            Pair(ScriptedLM(ours, base_says), nudging_model, ours, theirs), [prompt], [[letter]],
            max_new_tokens=40, use_cache=False, **least,
        )  # fmt: skip
        is_one_lookahead = kind == "shared" and fewest <= 16  # Then all of it is accepted.
        expected = fewest if is_one_lookahead else max(fewest, 1 + number)
        assert answer[2] == "eos" and len(answer[0]) - 1 == expected


@pytest.mark.parametrize("kind", KINDS)
def test_min_new_tokens_holds_back_a_stop_token(kind):
    chosen = pair("llama", 0, kind)
    given = prompts(chosen, 1, 0)
    [free] = nudge(chosen, *given, max_new_tokens=30, nudge_threshold=0.6)
    stops = sorted(set(free.ids[:8]) - {chosen.base.generation_config.eos_token_id})
    settings = {"max_new_tokens": 30, "min_new_tokens": 12, "nudge_threshold": 0.6, "eos_token_id": stops}
    [(ids, _, _)] = decode_in_every_way(chosen, *given, **settings)
    assert len(ids) >= 12 and set(ids[:12]).isdisjoint(stops)


def test_a_stop_token_that_is_the_nudging_models_eos_ends_the_answer_with_itself():
    chosen = pair("llama", 0, "shared")
    pad = chosen.tokenizer.pad_token_id
    found = 0
    with changed(chosen.nudging_model.generation_config, eos_token_id=[chosen.tokenizer.eos_token_id, pad]):
        for seed in range(8):
            given = prompts(chosen, 1, seed)
            settings = {"max_new_tokens": 12, "nudge_threshold": 0.9}
            with changed(
                chosen.nudging_model.generation_config, sequence_bias=[[[pad], 9.0]], repetition_penalty=None
            ):
                [free] = nudge(chosen, *given, **settings)
                [(ids, nudged, reason)] = decode_in_every_way(chosen, *given, eos_token_id=pad, **settings)
            if free.reason == "eos" and reason == "stop_token":
                found += 1
                assert ids == [*free.ids[:-1], pad] and nudged[-1]
    assert found


def test_the_base_writes_none_of_its_eos_tokens():
    chosen = pair("llama", 0, "shared")
    prompt, nudging_prompt = ([each] for (each,) in prompts(chosen, 1, 0))
    settings = {"max_new_tokens": 24, "nudge_threshold": 0.2}
    [free] = nudge(chosen, prompt, nudging_prompt, **settings)
    often = sorted({token for token, nudged in zip(free.ids, free.nudged, strict=True) if not nudged})
    with changed(chosen.base.generation_config, eos_token_id=[chosen.tokenizer.eos_token_id, *often]):
        [result] = nudge(chosen, prompt, nudging_prompt, **settings)
        expected = decode_with_oracle(chosen, prompt[0], nudging_prompt[0], **settings)
    assert outcomes([result]) == outcomes([expected])
    assert not {t for t, nudged in zip(result.ids[:-1], result.nudged, strict=False) if not nudged} & set(often)


def test_the_nudging_model_also_ends_with_its_tokenizers_eos():
    """It still ends its answers if its generation config names another token as EOS."""
    chosen = pair("llama", 0, "shared")
    ended = 0
    for seed in range(6):
        given = prompts(chosen, 2, seed)
        expected = outcomes(nudge(chosen, *given, max_new_tokens=40, nudge_threshold=0.9))
        with changed(chosen.nudging_model.generation_config, eos_token_id=chosen.tokenizer.bos_token_id):
            results = outcomes(nudge(chosen, *given, max_new_tokens=40, nudge_threshold=0.9))
        ended += sum(reason == "eos" for _, _, reason in results)
        assert [r for r in results if r[2] == "eos"] == [r for r in expected if r in results and r[2] == "eos"]
    assert ended


# Last positions ------------------------------------------------------------------------------------------------------


def of_positions(model, positions: int):
    """A copy of a GPT-2 with only its first positions."""
    small = copy.deepcopy(model)
    for name in ("n_positions", "max_position_embeddings"):
        if hasattr(small.config, name):
            setattr(small.config, name, positions)
    table = torch.nn.Embedding(positions, model.config.n_embd, dtype=torch.float64)
    table.weight.data = model.transformer.wpe.weight.data[:positions].clone()
    small.transformer.wpe = table.requires_grad_(False)
    return small


def gpt2_pair(kind: str, seed: int, base_positions: int = 0, nudging_positions: int = 0) -> Pair:
    chosen = pair("gpt2", seed, kind)  # With an even seed both models are GPT-2s.
    base = of_positions(chosen.base, base_positions) if base_positions else chosen.base
    nudging = of_positions(chosen.nudging_model, nudging_positions) if nudging_positions else chosen.nudging_model
    return Pair(base, nudging, chosen.tokenizer, chosen.nudging_tokenizer)


@pytest.mark.parametrize("threshold", [0.4, 1.01])
@pytest.mark.parametrize(("base_positions", "nudging_positions"), [(64, 0), (0, 64), (64, 72)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_at_the_last_position_of_either_model(kind, base_positions, nudging_positions, threshold):
    seed = 0 if kind == "shared" else 4
    chosen = gpt2_pair(kind, seed, base_positions, nudging_positions)
    given = prompts(chosen, 2, seed)
    settings = {"max_new_tokens": 100, "nudge_threshold": threshold}
    settings |= {"num_nudging_tokens": 40} if threshold == 0.4 else {}
    answers = decode_in_every_way(chosen, *given, **settings)
    for prompt, nudging_prompt, answer in zip(*given, answers, strict=True):
        expected = decode_with_oracle(
            chosen,
            prompt,
            nudging_prompt,
            base_positions=base_positions or 1024,
            nudging_positions=nudging_positions or 1024,
            **settings,
        )
        assert [answer] == outcomes([expected])
        if not nudging_positions:
            assert len(prompt) + len(answer[0]) <= 64


@pytest.mark.parametrize("kind", KINDS)
def test_max_length_may_be_the_last_position(kind):
    chosen = gpt2_pair(kind, 0 if kind == "shared" else 4, base_positions=64)
    given = prompts(chosen, 1, 2)
    plain = chosen.base.generate(torch.tensor(given[0]), max_length=64, do_sample=False, eos_token_id=-1)
    assert plain.shape[1] == 64
    for drafts in SOME_DRAFT_LENGTHS:
        [result] = nudge(chosen, *given, max_length=64, num_draft_tokens=drafts, min_length=64)
        assert (len(given[0][0]) + len(result.ids), result.reason) == (64, "length")


def test_the_greatest_length_is_that_of_the_position_embeddings():
    assert greatest_length(pair("gpt2", 0, "shared").base) == 1024
    assert greatest_length(of_positions(pair("gpt2", 0, "shared").base, 64)) == 64
    assert greatest_length(pair("llama", 0, "shared").base) is None
    from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

    opt = OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2,
        max_position_embeddings=40, word_embed_proj_dim=16,
    )  # fmt: skip
    assert greatest_length(OPTForCausalLM(opt)) == 40
    assert greatest_length(BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))) is None


def test_a_prompt_that_fills_a_context_is_refused():
    chosen = gpt2_pair("shared", 0, base_positions=16)
    with pytest.raises(ValueError, match="base's prompt in row 0 has 16 tokens, but the model has only 16 positions"):
        nudge(chosen, [[5] * 16], [[5]], max_new_tokens=4)
    chosen = gpt2_pair("shared", 0, nudging_positions=16)
    with pytest.raises(ValueError, match="nudging model's prompt in row 1 has 20 tokens"):
        nudge(chosen, [[5], [5]], [[5], [5] * 20], max_new_tokens=4)


# Embeddings ----------------------------------------------------------------------------------------------------------


def with_rows(model, rows: int):
    """A copy of a model with `rows` rows in its embeddings and its head. Added rows are copies of token 40's."""
    changed_model = copy.deepcopy(model)
    have = len(model.lm_head.weight)
    places = [*range(min(rows, have)), *[40] * max(0, rows - have)]
    for module in (changed_model.get_input_embeddings(), changed_model.lm_head):
        module.weight.data = module.weight.data[places].clone()
    changed_model.get_input_embeddings().num_embeddings = rows
    changed_model.lm_head.out_features = changed_model.config.vocab_size = rows
    return changed_model


def test_a_nudging_tokenizer_may_have_one_token_more_than_its_model():
    for kind in KINDS:
        chosen = pair("llama", 0, kind)
        given = prompts(chosen, 2, 0)
        expected = outcomes(nudge(chosen, *given, max_new_tokens=20))
        longer = copy.deepcopy(chosen.nudging_tokenizer)
        longer.add_special_tokens({"pad_token": "[PAD]"})
        padded = Pair(chosen.base, chosen.nudging_model, chosen.tokenizer, longer)
        assert outcomes(nudge(padded, *given, max_new_tokens=20)) == expected
        longer = copy.deepcopy(longer)
        longer.add_special_tokens({"eos_token": "[END]"})
        with changed(chosen.nudging_model.generation_config, eos_token_id=None):
            ended = Pair(chosen.base, chosen.nudging_model, chosen.tokenizer, longer)
            with pytest.raises(ValueError, match=r"no EOS token.*an id below \d+, which it can write"):
                nudge(ended, *given, max_new_tokens=4)


def test_the_padding_token_need_not_have_an_embedding():
    chosen = pair("llama", 0, "shared")
    given = prompts(chosen, 3, 0)
    settings = {"max_new_tokens": 20, "repetition_penalty": 1.2}
    expected = outcomes(nudge(chosen, *given, **settings))
    longer = copy.deepcopy(chosen.tokenizer)
    longer.add_special_tokens({"pad_token": "[PAD]"})
    padded = Pair(chosen.base, chosen.nudging_model, longer, longer)
    assert outcomes(nudge(padded, *given, pad_token_id=longer.pad_token_id, **settings)) == expected


def test_a_prompt_with_an_id_without_an_embedding_is_refused():
    chosen = pair("llama", 0, "shared")
    size = len(chosen.tokenizer)
    for base_prompt, nudging_prompt, whose in [([5, size], [5], "base"), ([5], [5, size + 3], "nudging model")]:
        with pytest.raises(ValueError, match=rf"{whose}'s prompt in row 0 has the id .*resize_token_embeddings"):
            nudge(chosen, [base_prompt], [nudging_prompt], max_new_tokens=4)


@pytest.mark.parametrize("more", ["base", "nudging model"])
def test_with_one_vocabulary_either_model_may_have_more_embeddings(more):
    """Models may pad their embeddings beyond the tokenizer differently. The base may draw its extra tokens."""
    chosen = pair("llama", 1 if more == "base" else 0, "shared")
    size = len(chosen.tokenizer)
    if more == "base":
        base = with_rows(chosen.base, 2 * size - 100)
        base.lm_head.weight.data[size:] = base.lm_head.weight.data[100:size] * 1.1
        wider = Pair(base, chosen.nudging_model, chosen.tokenizer, chosen.tokenizer)
    else:
        nudging = with_rows(chosen.nudging_model, size + 40)
        nudging.lm_head.weight.data[size:] = nudging.lm_head.weight.data[30:70] * 1.1
        wider = Pair(chosen.base, nudging, chosen.tokenizer, chosen.tokenizer)
    drawn = 0
    for seed in range(3):
        answers = decode_in_every_way(wider, *prompts(chosen, 2, seed), max_new_tokens=24, nudge_threshold=0.3)
        drawn += sum(token >= size for ids, _, _ in answers for token in ids)
    assert drawn > 0 if more == "base" else drawn == 0


def test_a_nudging_word_without_an_embedding_in_the_base_is_not_accepted():
    chosen = pair("llama", 0, "two")
    given = [[5], [6]], prompts(chosen, 2, 0)[1]
    free = nudge(chosen, *given, max_new_tokens=24, nudge_threshold=0.9)
    nudged = {token for r in free for token, mine in zip(r.ids, r.nudged, strict=True) if mine}
    rows = sorted(nudged)[-2]
    small = Pair(with_rows(chosen.base, rows), chosen.nudging_model, chosen.tokenizer, chosen.nudging_tokenizer)
    answers = decode_in_every_way(small, *given, max_new_tokens=24, nudge_threshold=0.9)
    assert all(token < rows for ids, _, _ in answers for token in ids)
    assert any(any(nudged) for _, nudged, _ in answers)


# NaN and infinite logits ---------------------------------------------------------------------------------------------


class Broken(LogitsProcessor):
    """A logits processor that sets all scores to a value once the ids have a given length."""

    def __init__(self, length: int, value: float):
        self.length = length
        self.value = value

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, self.value) if input_ids.shape[1] >= self.length else scores


def broken(model, value: float, after: int, tokens: slice = slice(None)):
    """A copy of a model whose logits of some tokens are `value` from position `after` on."""
    bad = copy.deepcopy(model)
    forward = bad.forward

    def breaking(input_ids, position_ids=None, **kwargs):
        output = forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        keep = output.logits.shape[1]
        late = position_ids[:, -keep:] >= after
        output.logits[..., tokens] = output.logits[..., tokens].masked_fill(late[..., None], value)
        return output

    breaking.__signature__ = __import__("inspect").signature(forward)
    bad.forward = breaking
    return bad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("gate", ["top1", "rejection"])
@pytest.mark.parametrize("whose", ["base", "nudging model"])
def test_nan_and_infinite_logits_are_an_error_that_names_the_model_and_the_place(whose, gate, samples, value):
    chosen = pair("llama", 0, "shared")
    given = ([[5, 40, 41]], [[5, 40, 41]])
    models = {"base": chosen.base, "nudging model": chosen.nudging_model}
    models[whose] = broken(models[whose], value, after=3 + 6)
    bad = Pair(models["base"], models["nudging model"], chosen.tokenizer, chosen.tokenizer)
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "nudge_gate": gate, "do_sample": samples}
    settings["remove_invalid_values"] = samples
    said = set()
    for drafts in (0, 4):
        torch.manual_seed(1)
        with pytest.raises(ValueError, match=rf"{whose}'s logits are NaN.* at token \d+ of .* row 0.*dtype") as error:
            nudge(bad, *given, nudge_threshold=0.4, num_draft_tokens=drafts, **settings)
        said.add(str(error.value))
    assert len(said) == 1


def test_single_tokens_may_have_a_logit_of_minus_infinity():
    """Some models give −inf to the extra tokens that pad their vocabulary."""
    chosen = pair("llama", 0, "shared")
    given = prompts(chosen, 2, 0)
    minus = float("-inf")
    masked = Pair(
        broken(chosen.base, minus, 0, slice(-30, None)),
        broken(chosen.nudging_model, minus, 0, slice(-30, None)),
        chosen.tokenizer,
        chosen.tokenizer,
    )
    for gate in ("top1", "entropy", "margin", "rejection", "kad"):
        for ids, _, _ in decode_in_every_way(masked, *given, max_new_tokens=12, nudge_gate=gate):
            assert max(ids) < len(chosen.tokenizer) - 30


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampled"])
def test_processors_that_forbid_every_token_are_an_error(kind, samples, value):
    chosen = pair("llama", 0, kind)
    given = prompts(chosen, 1, 0)
    processor = Broken(len(given[0][0]) + 3, value)
    with pytest.raises(ValueError, match=r"base's logits processors .* at token [4-9] of .*`logits_processor`"):
        nudge(
            chosen,
            *given,
            max_new_tokens=30,
            min_new_tokens=9,
            nudge_threshold=0,
            logits_processor=[processor],
            do_sample=samples,
        )
    size = len(chosen.nudging_tokenizer)
    with (
        changed(chosen.nudging_model.generation_config, suppress_tokens=list(range(size)), do_sample=samples),
        pytest.raises(ValueError, match=r"nudging model's logits processors forbid.*token 1 .*generation_config"),
    ):
        nudge(chosen, *given, max_new_tokens=30, do_sample=samples)


@pytest.mark.parametrize("where", ["criterion", "processor", "streamer", "allowed"])
def test_a_stop_iteration_of_the_callers_code_reaches_the_caller(where):
    chosen = pair("llama", 0, "shared")
    inputs = inputs_of(chosen, *prompts(chosen, 1, 0))

    def stop(*args, **kwargs):
        raise StopIteration("mine")

    given = {
        "criterion": {"stopping_criteria": [type("Mine", (StoppingCriteria,), {"__call__": stop})()]},
        "processor": {"logits_processor": [type("Mine", (LogitsProcessor,), {"__call__": stop})()]},
        "streamer": {"streamer": type("S", (BaseStreamer,), {"put": lambda s, v: None, "end": stop})()},
        "allowed": {"prefix_allowed_tokens_fn": stop},
    }[where]
    if where == "streamer":
        given["streamer"].put_marked = stop
    with pytest.raises(StopIteration, match="mine"):
        nudging_hf.generate(chosen.base, **inputs, max_new_tokens=8, **given)


# Lookaheads, times and reasons ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_lookahead_is_not_written_for_a_short_answer(kind):
    chosen = pair("llama", 2, kind)
    given = prompts(chosen, 1, 0)
    output = nudging_hf.generate(
        chosen.base,
        **inputs_of(chosen, *given),
        max_new_tokens=3,
        min_new_tokens=3,
        num_nudging_tokens=3000,
        num_draft_tokens=0,
        nudge_threshold=1.01,
        return_dict_in_generate=True,
    )
    assert output.nudging_forward_passes <= 3 * 36
    settings = {"max_new_tokens": 60, "num_nudging_tokens": 50, "nudge_threshold": 0.7}
    answers = decode_in_every_way(chosen, *given, **settings)
    [prompt], [nudging_prompt] = given
    expected = decode_with_oracle(chosen, prompt, nudging_prompt, **settings)
    assert answers == outcomes([expected])


def test_max_time_ends_an_answer_within_a_lookahead():
    chosen = pair("llama", 0, "shared")
    tokenizer = chosen.tokenizer

    def says(ids):
        time.sleep(0.01)
        return 40, 0.9

    slow = ScriptedLM(tokenizer, says)
    inputs = inputs_of(Pair(chosen.base, slow, tokenizer, tokenizer), [[5]], [[5]])
    begun = time.monotonic()
    output = nudging_hf.generate(
        chosen.base, **inputs, max_new_tokens=4000, num_nudging_tokens=4000, max_time=0.3, use_cache=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert output.finish_reasons == ["time"] and time.monotonic() - begun < 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_drafts_and_other_rows_change_nothing_under_any_mixture_of_settings(kind, seed):
    """The settings are thresholds, gates, lengths, stop strings and tokens, constraints and last positions."""
    draw = random.Random(f"{kind} {seed}")
    arch = draw.choice(["llama", "qwen3", "gpt2"])
    chosen = pair(arch, draw.randrange(0, 12, 2), kind)
    if arch == "gpt2" and draw.random() < 0.7:
        sizes = [draw.choice([0, 56, 70]) for _ in range(2)]
        chosen = Pair(
            *[of_positions(m, n) if n else m for m, n in zip((chosen.base, chosen.nudging_model), sizes, strict=True)],
            chosen.tokenizer,
            chosen.nudging_tokenizer,
        )
    given = prompts(chosen, draw.choice([1, 2, 3]), draw.randrange(100))
    [free, *_] = nudge(chosen, *given, max_new_tokens=20)
    text = chosen.tokenizer.decode(free.ids)
    for _ in range(3):
        settings = {
            "max_new_tokens": draw.choice([1, 2, 5, 20, 40]),
            "nudge_threshold": draw.choice([0, 0.3, 0.6, 1.01]),
            "nudge_gate": draw.choice(["top1", "top1", "rejection", "kad"]),
            "num_nudging_tokens": draw.choice([2, 16, 40]),
            "takeover_on_agreement": draw.random() < 0.7,
        }
        if draw.random() < 0.4:
            settings["min_new_tokens"] = min(settings["max_new_tokens"], draw.choice([1, 8]))
        if draw.random() < 0.5:
            settings["stop_strings"] = [text[i : i + draw.randint(1, 3)] or "aa" for i in (2, 9)]
        if draw.random() < 0.5:
            settings["eos_token_id"] = draw.sample(free.ids, min(2, len(free.ids)))
        if draw.random() < 0.5:
            settings["suppress_tokens"] = draw.sample(range(5, 200), 20)
        if draw.random() < 0.5:
            settings["bad_words_ids"] = [list(each) for each in itertools.pairwise(free.ids[:8])] or [[9]]
        if draw.random() < 0.3:
            rule = random_rule(chosen.tokenizer.eos_token_id, len(chosen.tokenizer), seed, (0.02, 0.2))
            settings["logits_processor"] = [ForbidTokens(max(map(len, given[0])), rule)]
        decode_in_every_way(chosen, *given, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finish_reason_is_a_function_of_the_ids(kind):
    """Stop strings begin in the prompt, are a single token, or end at the budget of a short answer."""
    draw = random.Random(kind)
    for seed in range(8):
        chosen = pair("llama", seed, kind)
        given = prompts(chosen, 2, seed)
        last = chosen.tokenizer.decode(given[0][0][-1:])
        [free, _] = nudge(chosen, *given, max_new_tokens=2)
        text = last + chosen.tokenizer.decode(free.ids)
        for stop in ("aa", text[-1:] or "a", text[len(last) - 1 : len(last) + 1] or "a"):
            try:
                StopStringCriteria(chosen.tokenizer, [stop])
            except ValueError:  # No token contains any part of the stop string.
                continue
            decode_in_every_way(chosen, *given, max_new_tokens=draw.choice([1, 1, 2]), stop_strings=[stop])
