"""What nudging is compared with is what it is defined to be: each is held against a loop without cache or batch."""

import functools

import pytest
import torch
from running import inputs_of, padded
from tiny import byte_bpe, pair, prompts, relative, tiny_model
from transformers import RepetitionPenaltyLogitsProcessor, T5Config, T5ForConditionalGeneration, TextStreamer

from nudging_hf.study import baselines
from nudging_hf.study.baselines import (
    EXAMPLES,
    PREAMBLE,
    STOP_STRING,
    ensemble,
    in_context,
    in_context_prompt,
    proxy_tuning,
)

ALPHA = 0.7
NEW = 20


# The definitions -----------------------------------------------------------------------------------------------------


def mean_of_distributions(base, nudging):
    return ((base.softmax(-1) + nudging.softmax(-1)) / 2).log()


def moved_by_proxy(base, nudging, unaligned, alpha=ALPHA):
    return base + alpha * (nudging - unaligned)


def greedy(logits):
    return int(logits.argmax())


def defined(models, texts, mix, eos, new=NEW, process=lambda ids, logits: logits, draw=greedy):
    """An answer, token by token: every model reads its whole text, and what they say is mixed.

    Args:
        texts: each model's prompt, ids.
        process: what is done to the mixture, given the base's text.
    """
    answer = []
    while len(answer) < new and not (answer and answer[-1] in eos):
        read = [
            model(torch.tensor([text + answer]), use_cache=False).logits[0, -1].float()
            for model, text in zip(models, texts, strict=True)
        ]
        width = min(map(len, read))
        answer.append(draw(process(texts[0] + answer, mix(*(logits[:width] for logits in read)))))
    return answer


@functools.cache
def unaligned_of(arch, seed):
    return relative(pair(arch, seed, "shared").nudging_model, noise=0.4, seed=seed + 5000)


class Case:
    """A pair and an unaligned model, ragged prompts for all, and how a baseline is called with them."""

    def __init__(self, name, arch="llama", seed=0, rows=3):
        self.pair, self.unaligned = pair(arch, seed, "shared"), unaligned_of(arch, seed)
        self.prompts, self.nudging_prompts = prompts(self.pair, rows, seed + 3)
        self.name = name
        self.pad = self.pair.tokenizer.pad_token_id
        self.eos = [self.pair.tokenizer.eos_token_id]

    def call(self, rows=slice(None), **kwargs):
        """The answers to some rows, padding left out."""
        inputs = inputs_of(self.pair, self.prompts[rows], self.nudging_prompts[rows])
        base, kwargs = self.pair.base, {"max_new_tokens": NEW} | kwargs
        if self.name == "ensemble":
            sequences = ensemble(base, **inputs, **kwargs)
        else:
            own = {"unaligned_model": self.unaligned, "unaligned_tokenizer": self.pair.tokenizer, "alpha": ALPHA}
            sequences = proxy_tuning(base, **inputs, **(own | kwargs))
        new = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in self.eos), len(row)) for row in new]
        assert all(set(row[end:]) <= {self.pad} for row, end in zip(new, ends, strict=True))
        return [row[:end] for row, end in zip(new, ends, strict=True)]

    def defined(self, row, **kwargs):
        base, nudging = self.prompts[row], self.nudging_prompts[row]
        if self.name == "ensemble":
            models, texts, mix = [self.pair.base, self.pair.nudging_model], [base, nudging], mean_of_distributions
        else:
            models = [self.pair.base, self.pair.nudging_model, self.unaligned]
            texts, mix = [base, nudging, base], moved_by_proxy
        return defined(models, texts, mix, self.eos, **kwargs)


BOTH = pytest.mark.parametrize("name", ["ensemble", "proxy_tuning"])


# What holds for both mixtures ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("arch", "seed"), [("llama", 0), ("gemma3", 2), ("gpt2", 3)])
def test_a_batch_is_what_its_definition_says_row_by_row(name, arch, seed):
    case = Case(name, arch, seed)
    answers = case.call()
    assert answers == [case.defined(row) for row in range(3)]
    assert len({len(prompt) for prompt in case.prompts}) > 1


@BOTH
def test_it_is_neither_the_base_nor_the_nudging_model(name):
    case = Case(name)
    alone = [defined([case.pair.base], [prompt], lambda logits: logits, case.eos) for prompt in case.prompts]
    theirs = [
        defined([case.pair.nudging_model], [prompt], lambda logits: logits, case.eos)
        for prompt in case.nudging_prompts
    ]
    answers = case.call()
    assert answers != alone and answers != theirs


@BOTH
def test_cached_is_recomputed_and_a_batch_is_its_rows(name):
    case = Case(name, seed=2, rows=4)
    answers = case.call()
    assert case.call(use_cache=False) == answers
    assert [case.call(slice(row, row + 1))[0] for row in range(4)] == answers


@BOTH
def test_each_model_reads_each_token_once(name):
    case, fed = Case(name), {}
    models = {"base": case.pair.base, "nudging": case.pair.nudging_model, "unaligned": case.unaligned}
    hooks = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs, whose=whose: fed.setdefault(whose, []).append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        for whose, model in models.items()
    ]
    try:
        (answer,) = case.call(slice(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    after = [1] * (len(answer) - 1)
    assert fed["base"] == [len(case.prompts[0]), *after]
    assert fed["nudging"] == [len(case.nudging_prompts[0]), *after]
    if name == "proxy_tuning":
        assert fed["unaligned"] == fed["base"]


@BOTH
def test_a_sampled_answer_is_drawn_from_the_mixture(name):
    case = Case(name)

    def draw(logits):
        return int(torch.multinomial((logits / 0.8)[None].softmax(-1), 1))

    torch.manual_seed(7)
    (answer,) = case.call(slice(0, 1), do_sample=True, temperature=0.8, top_k=0)
    torch.manual_seed(7)
    assert answer == case.defined(0, draw=draw)
    assert answer != case.defined(0)


@BOTH
def test_processors_see_the_mixture(name):
    case = Case(name)
    penalty = RepetitionPenaltyLogitsProcessor(1.5)

    def process(ids, logits):
        logits = penalty(torch.tensor([ids]), logits[None])[0]
        if len(ids) < len(case.prompts[0]) + 12:
            logits[case.eos] = -torch.inf
        return logits

    (answer,) = case.call(slice(0, 1), repetition_penalty=1.5, min_new_tokens=12)
    assert answer == case.defined(0, process=process)
    assert answer != case.defined(0)


@BOTH
def test_several_answers_to_a_prompt_go_with_its_nudging_prompt(name):
    case = Case(name, rows=2)
    answers = case.call(do_sample=True, top_k=1, num_return_sequences=2)  # The likeliest token alone: greedy.
    assert answers == [case.defined(row) for row in (0, 0, 1, 1)]


@BOTH
def test_what_is_streamed_is_what_is_returned(name):
    case, seen = Case(name), []

    class Recorder(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            seen.append(text)

    (answer,) = case.call(slice(0, 1), streamer=Recorder(case.pair.tokenizer, skip_prompt=True))
    assert "".join(seen) == case.pair.tokenizer.decode(answer)


@BOTH
def test_a_stop_string_ends_an_answer(name):
    case = Case(name)
    (whole,) = case.call(slice(0, 1))
    texts = [case.pair.tokenizer.decode(whole[:n]) for n in range(1, len(whole) + 1)]
    letter = next(letter for letter in texts[-1] if letter.isascii() and letter not in texts[1])
    (stopped,) = case.call(slice(0, 1), stop_strings=letter)
    assert stopped == next(whole[:n] for n, text in enumerate(texts, start=1) if letter in text)
    assert 2 < len(stopped) < len(whole)


@pytest.mark.parametrize(("name", "more"), [("ensemble", 7), ("proxy_tuning", -9)])
def test_rows_of_an_embedding_beyond_the_smallest_are_no_tokens(name, more):
    case = Case(name)
    tokenizer = case.pair.tokenizer
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    nudging = tiny_model("llama", len(tokenizer) + more, 42, **ends)  # More rows than the base has, or fewer.
    case.pair = type(case.pair)(case.pair.base, nudging, tokenizer, tokenizer)
    assert case.call(slice(0, 1)) == [case.defined(0)]


@BOTH
def test_the_nudging_models_eos_ends_an_answer_too(name):
    case = Case(name)
    config = case.pair.nudging_model.generation_config
    (whole,) = case.call(slice(0, 1))
    eos, config.eos_token_id = config.eos_token_id, whole[4]
    try:
        (ended,) = case.call(slice(0, 1))
    finally:
        config.eos_token_id = eos
    assert ended == whole[: whole.index(whole[4]) + 1]


@BOTH
def test_the_eos_of_the_nudging_tokenizer_ends_an_answer_where_the_config_names_another(name):
    case = Case(name)
    configs = case.pair.nudging_model.generation_config, case.pair.base.generation_config
    expected = case.call(max_new_tokens=80)
    assert any(row[-1] in case.eos for row in expected)
    eos = configs[0].eos_token_id
    for config in configs:
        config.eos_token_id = case.pad
    try:
        assert case.call(max_new_tokens=80) == expected
    finally:
        for config in configs:
            config.eos_token_id = eos


@BOTH
def test_left_out_prompts_are_those_of_nudging(name):
    case = Case(name)
    tokenizer, inputs = case.pair.tokenizer, inputs_of(case.pair, case.prompts, case.nudging_prompts)
    texts = tokenizer.batch_decode(case.prompts, skip_special_tokens=True)
    case.nudging_prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in texts
    ]
    expected = case.call()
    del inputs["nudging_input_ids"], inputs["nudging_attention_mask"]
    if name == "ensemble":
        out = ensemble(case.pair.base, **inputs, max_new_tokens=NEW)
    else:
        ids, mask = padded(case.prompts, case.pad)
        out = proxy_tuning(
            case.pair.base,
            **inputs,
            unaligned_model=case.unaligned,
            unaligned_tokenizer=tokenizer,
            unaligned_input_ids=ids,
            unaligned_attention_mask=mask,
            alpha=ALPHA,
            max_new_tokens=NEW,
        )
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: len(answer)] for row, answer in zip(new, expected, strict=True)] == expected


# What is special to each ---------------------------------------------------------------------------------------------


def test_the_scores_of_an_ensemble_are_the_log_of_the_mean():
    case = Case("ensemble")
    inputs = inputs_of(case.pair, case.prompts, case.nudging_prompts)
    out = ensemble(case.pair.base, **inputs, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    for row, scores in enumerate(out.scores[0]):
        read = [
            model(torch.tensor([ids])).logits[0, -1].float()
            for model, ids in (
                (case.pair.base, case.prompts[row]),
                (case.pair.nudging_model, case.nudging_prompts[row]),
            )
        ]
        torch.testing.assert_close(scores, mean_of_distributions(*read))


def test_an_ensemble_with_itself_is_the_base():
    case = Case("ensemble")
    case.pair = type(case.pair)(case.pair.base, case.pair.base, case.pair.tokenizer, case.pair.tokenizer)
    case.nudging_prompts = case.prompts
    assert case.call() == [defined([case.pair.base], [ids], lambda logits: logits, case.eos) for ids in case.prompts]


def test_proxy_tuning_by_nothing_is_the_base_and_off_the_base_is_the_nudging_model():
    case = Case("proxy_tuning")
    base, nudging = case.pair.base, case.pair.nudging_model
    assert case.call(alpha=0) == [defined([base], [ids], lambda logits: logits, case.eos) for ids in case.prompts]
    case.unaligned = base
    alone = [defined([nudging], [ids], lambda logits: logits, case.eos) for ids in case.nudging_prompts]
    assert case.call(alpha=1.0) == alone


def test_small_models_may_be_named(tmp_path):
    case = Case("proxy_tuning")
    expected = case.call()
    for name, model in (("nudging", case.pair.nudging_model), ("unaligned", case.unaligned)):
        model.save_pretrained(tmp_path / name)
        case.pair.tokenizer.save_pretrained(tmp_path / name)
    named = {"nudging_model": str(tmp_path / "nudging"), "unaligned_model": tmp_path / "unaligned"}
    inputs = inputs_of(case.pair, case.prompts, case.nudging_prompts) | named
    del inputs["nudging_tokenizer"]
    out = proxy_tuning(case.pair.base, **inputs, alpha=ALPHA, max_new_tokens=NEW)
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: len(answer)] for row, answer in zip(new, expected, strict=True)] == expected


# In-context alignment ------------------------------------------------------------------------------------------------

SHORT = {"preamble": "Answers.", "examples": [("1 + 1?", "It is 2."), ("The sky?", "Blue.")]}


def test_the_in_context_prompt():
    assert in_context_prompt(" Why?\n", **SHORT) == (
        "Answers.\n\n# Query:\n1 + 1?\n\n# Answer:\nIt is 2.\n\n# Query:\nThe sky?\n\n# Answer:\nBlue.\n\n"
        "# Query:\nWhy?\n\n# Answer:\n"
    )
    assert in_context_prompt("Why?", preamble="", examples=()) == "# Query:\nWhy?\n\n# Answer:\n"
    whole = in_context_prompt("Why?")
    assert whole.startswith(PREAMBLE) and all(asked in whole and answer in whole for asked, answer in EXAMPLES)
    assert whole.count(STOP_STRING) == len(EXAMPLES) + 1


def test_in_context_is_the_base_behind_the_prompt():
    case = Case("in_context")
    base, tokenizer = case.pair.base, case.pair.tokenizer
    ids, mask = padded(case.prompts, case.pad)
    settings = {"tokenizer": tokenizer, "max_new_tokens": NEW, **SHORT}
    out = in_context(base, input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for row, prompt in enumerate(case.prompts):
        shown = tokenizer(in_context_prompt(tokenizer.decode(prompt, skip_special_tokens=True), **SHORT)).input_ids
        answer = defined([base], [shown], lambda logits: logits, case.eos)
        new = out[row, ids.shape[1] :].tolist()
        assert new[: len(answer)] == answer and set(new[len(answer) :]) <= {case.pad}
        alone = in_context(base, torch.tensor([prompt]), **settings)
        assert alone[0, len(prompt) :].tolist() == answer
    full = in_context(base, ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert torch.equal(full.sequences, out)


def test_an_answer_in_context_ends_where_the_base_asks_a_query_of_its_own():
    tokenizer, base = byte_bpe(), pair("llama", 0, "shared").base
    prompt = tokenizer("Why?", return_tensors="pt").input_ids
    coming = tokenizer(f"Because.{STOP_STRING}\nWhat else?").input_ids

    def say_it(ids, scores):
        said = ids.shape[1] - start
        scores[:] = -torch.inf
        scores[:, coming[said]] = 0
        return scores

    start = len(tokenizer(in_context_prompt("Why?")).input_ids)
    settings = {"tokenizer": tokenizer, "logits_processor": [say_it], "max_new_tokens": len(coming)}
    for own, ends in ((None, STOP_STRING), ("cause", "cause"), (["x", "use."], "use.")):
        (answer,) = in_context(base, prompt, stop_strings=own, **settings)[:, prompt.shape[1] :]
        assert tokenizer.decode(answer).endswith(ends)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [ensemble, proxy_tuning])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"nudging_model": None}, "`nudging_model` must be a causal language model"),
        ({"num_beams": 2}, "leave out `num_beams`"),
        ({"custom_generate": ensemble}, "leave it out"),
        ({"input_ids": None}, "`input_ids` must be a tensor"),
        ({"inputs": torch.ones(1, 2, dtype=torch.long)}, "given twice"),
        ({"nudging_input_ids": [1]}, "`nudging_input_ids` must be a tensor"),
        ({"nudging_attention_mask": torch.ones(1, 1)}, "must have the shape of `nudging_input_ids`"),
        ({"nudging_input_ids": torch.ones(3, 2).long(), "nudging_attention_mask": None}, "has 3 prompts"),
        ({"nudging_attention_mask": 0}, "at least one token in `nudging_input_ids`"),
        ({"nudge_treshold": 0.4}, "nudge_treshold"),
    ],
)
def test_bad_input_is_refused_with_the_argument_that_mends_it(baseline, given, says):
    case = Case("")
    inputs = inputs_of(case.pair, case.prompts[:2], case.nudging_prompts[:2])
    if given.get("nudging_attention_mask") == 0:
        given = {"nudging_attention_mask": torch.zeros_like(inputs["nudging_attention_mask"])}
    if baseline is proxy_tuning:
        inputs |= {"unaligned_model": case.unaligned, "unaligned_tokenizer": case.pair.tokenizer}
    with pytest.raises(ValueError, match=says):
        baseline(case.pair.base, **(inputs | given), max_new_tokens=2)


def test_two_vocabularies_are_refused():
    two = pair("llama", 0, "two")
    inputs = inputs_of(two, *prompts(two, 1, 0))
    with pytest.raises(ValueError, match=r"one vocabulary.*`nudging_model` of the base's family"):
        ensemble(two.base, **inputs, max_new_tokens=2)
    shared = inputs | {"nudging_model": two.base, "nudging_tokenizer": two.tokenizer}
    with pytest.raises(ValueError, match=r"one vocabulary.*`unaligned_model` of the base's family"):
        proxy_tuning(two.base, **shared, unaligned_model=two.nudging_model, unaligned_tokenizer=two.nudging_tokenizer)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "1", None])
def test_alpha_is_a_finite_number(alpha):
    case = Case("proxy_tuning")
    with pytest.raises(ValueError, match="`alpha` must be a finite number"):
        case.call(alpha=alpha)


def test_an_encoder_decoder_model_is_refused():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=16, **sizes))
    case = Case("ensemble")
    inputs = inputs_of(case.pair, case.prompts, case.nudging_prompts) | {"nudging_model": encoder_decoder}
    with pytest.raises(ValueError, match="nudging model is an encoder-decoder"):
        ensemble(case.pair.base, **inputs)


def test_a_nudging_model_whose_end_the_base_cannot_write_is_refused(monkeypatch):
    monkeypatch.setattr(baselines, "end_tokens", lambda model, tokenizer: [10_000])
    with pytest.raises(ValueError, match=r"nudging_model\.generation_config\.eos_token_id"):
        Case("ensemble").call()
