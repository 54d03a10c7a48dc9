"""Tests that both pipelines give the ids, texts, spans and streams of `generate`."""

import copy
import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
import torch
from tiny import CORPUS, Pair, byte_bpe, pair
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import nudging_hf
from nudging_hf import MarkingStreamer, chat_inputs, hub, spans_of
from nudging_hf.core.transformers_private import arguments_of_pipeline
from nudging_hf.pipelines import NudgedTextGenerationPipeline, _spans_as_decoded

TASK = "nudged-text-generation"
MODELS = Path(__file__).parents[1] / "examples" / "mini" / "models"
SETTINGS = {"max_new_tokens": 12, "nudge_threshold": 0.5}
# The texts differ in length, so that every batch is padded.
TEXTS = [CORPUS[6], "Two words", CORPUS[0], "One two three four five"]
CHATS = [
    [{"role": "user", "content": "What is the name of the dog?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And the fox?"}],
    [
        {"role": "user", "content": "One apple"},
        {"role": "assistant", "content": "and two more."},
        {"role": "user", "content": [{"type": "text", "text": "How many "}, {"type": "text", "text": "in all?"}]},
    ],
]
MINI_TEXTS = [
    'Question: Take the last letters of the words "Jovel", "Kreta" and concatenate them.\n',
    "Question: Nathok has 43 shells. Nathok sells 13. How many shells does Nathok have now?\n",
    "Question: How many letters do the names Cavo, Dolid and Trubres have together?\n",
]


@pytest.fixture(autouse=True)
def _registered():
    nudging_hf.register()
    yield
    nudging_hf.unregister()


@pytest.fixture(scope="module")
def mini():
    def load(name):
        return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float64)

    return Pair(
        load("base"),
        load("nudging"),
        AutoTokenizer.from_pretrained(MODELS / "base"),
        AutoTokenizer.from_pretrained(MODELS / "nudging"),
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model folder that nudges by itself."""
    chosen, root = pair("llama", 0, "shared"), tmp_path_factory.mktemp("exported")
    for name, model, tokenizer in (
        ("base", chosen.base, chosen.tokenizer),
        ("nudging", chosen.nudging_model, chosen.nudging_tokenizer),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return str(hub.export(root / "base", root / "nudging", root / "nudged", nudge_threshold=0.5))


PAIRS = {
    "shared": lambda: pair("llama", 0, "shared"),
    "two": lambda: pair("qwen3", 1, "two"),
}


@pytest.fixture(params=PAIRS)
def chosen(request):
    return PAIRS[request.param]()


def complete_arguments(chosen, **kwargs):
    """The arguments that a pipeline and `nudging_hf.generate` both take for a pair."""
    return {
        "tokenizer": chosen.tokenizer,
        "nudging_model": chosen.nudging_model,
        "nudging_tokenizer": chosen.nudging_tokenizer,
        **SETTINGS,
        **kwargs,
    }


def nudged_pipeline(chosen, **kwargs):
    return pipeline(TASK, model=chosen.base, device="cpu", **complete_arguments(chosen, **kwargs))


def inputs_of(chosen, prompt, **kwargs):
    """A prompt as the inputs of `generate`."""
    if isinstance(prompt, str):
        return dict(chosen.tokenizer(prompt, return_tensors="pt"))
    return dict(chat_inputs(prompt, chosen.tokenizer, chosen.nudging_tokenizer, **kwargs))


ANSWERS = {}


def answer_of(chosen, inputs, **kwargs):
    """The ids of the answer of `nudging_hf.generate`. Each answer is computed only once."""
    key = repr((id(chosen), {name: ids.tolist() for name, ids in inputs.items()}, kwargs))
    if key not in ANSWERS:
        ids = nudging_hf.generate(chosen.base, **inputs, **complete_arguments(chosen, **kwargs))
        ANSWERS[key] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return ANSWERS[key]


def same_ids(records, chosen, inputs, batch_size):
    """Asserts that the token records of several prompts are the left-padded prompts and their single answers."""
    pad, widths = chosen.tokenizer.pad_token_id, [given["input_ids"].shape[1] for given in inputs]
    for i, ([record], given) in enumerate(zip(records, inputs, strict=True)):
        first = i - i % batch_size
        ids, width = record["generated_token_ids"], max(widths[first : first + batch_size])
        expected = answer_of(chosen, given)
        answer, padding = ids[width : width + len(expected)], ids[width + len(expected) :]
        assert ids[width - widths[i] : width] == given["input_ids"][0].tolist()
        assert answer == expected and set(padding) <= {pad}


# The same ids as `generate` ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["strings", "chats"])
def test_the_ids_are_those_of_generate(chosen, prompts, batch_size):
    pipe = nudged_pipeline(chosen)
    records = pipe(prompts, batch_size=batch_size, return_tensors=True)
    same_ids(records, chosen, [inputs_of(chosen, prompt) for prompt in prompts], batch_size)
    if batch_size == 1:
        assert pipe(prompts[1], return_tensors=True) == records[1]
        assert list(pipe((prompt for prompt in prompts[1:3]), return_tensors=True)) == records[1:3]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_trained_pair_answers_as_generate_does(mini, batch_size):
    chats = [[{"role": "user", "content": text.removeprefix("Question: ").rstrip()}] for text in MINI_TEXTS]
    pipe = nudged_pipeline(mini)
    for prompts in (MINI_TEXTS, chats):
        records = pipe(prompts, batch_size=batch_size, return_tensors=True)
        same_ids(records, mini, [inputs_of(mini, prompt) for prompt in prompts], batch_size)


def test_the_base_template_can_be_given_once_or_for_one_call():
    chosen, template = PAIRS["two"](), "{system}\nInstruction: {user}\n"
    otherwise = inputs_of(chosen, CHATS[1], base_template=template)
    asked, usual = answer_of(chosen, otherwise), answer_of(chosen, inputs_of(chosen, CHATS[1]))
    assert asked != usual
    length = otherwise["input_ids"].shape[1]
    constructed, pipe = nudged_pipeline(chosen, base_template=template), nudged_pipeline(chosen)
    assert constructed(CHATS[1], return_tensors=True)[0]["generated_token_ids"][length:] == asked
    assert pipe(CHATS[1], base_template=template, return_tensors=True)[0]["generated_token_ids"][length:] == asked
    assert pipe(CHATS[1], return_tensors=True)[0]["generated_token_ids"][-len(usual) :] == usual


def test_a_call_can_override_the_pipeline_s_settings(chosen):
    given = inputs_of(chosen, TEXTS[0])
    others = {"nudge_threshold": 0.95, "num_nudging_tokens": 5}
    expected = answer_of(chosen, given, **others)
    assert expected != answer_of(chosen, given)
    pipe = nudged_pipeline(chosen)
    for call in (
        others,
        {"generation_config": GenerationConfig(max_new_tokens=12, **others), "nudge_threshold": 0.95},
    ):
        [record] = pipe(TEXTS[0], return_tensors=True, **call)
        assert record["generated_token_ids"][given["input_ids"].shape[1] :] == expected
    [again] = pipe(TEXTS[0], return_tensors=True)
    assert again["generated_token_ids"][given["input_ids"].shape[1] :] == answer_of(chosen, given)


def test_the_default_is_greedy_with_256_tokens():
    chosen = pair("llama", 2, "shared")
    without = {name: value for name, value in complete_arguments(chosen).items() if name not in SETTINGS}
    pipe = pipeline(TASK, model=chosen.base, device="cpu", **without)
    settings = arguments_of_pipeline(pipe, {})
    settings = vars(settings.get("generation_config", GenerationConfig())) | settings
    assert settings["max_new_tokens"] == 256 and not settings["do_sample"]
    own = copy.copy(chosen.base)
    own.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=chosen.tokenizer.eos_token_id)
    pipe = pipeline(TASK, model=own, device="cpu", **without)
    ids = pipe(TEXTS[0], return_tensors=True)[0]["generated_token_ids"]
    assert ids[-5:] == answer_of(chosen, inputs_of(chosen, TEXTS[0]), max_new_tokens=5, nudge_threshold=None)


# Where the models come from ------------------------------------------------------------------------------------------


def test_models_may_be_folders_without_given_tokenizers(mini):
    base, shared = str(MODELS / "base"), str(MODELS / "nudging-shared")
    pipe = pipeline(TASK, model=base, nudging_model=shared, dtype=torch.float64, **SETTINGS)
    objects = pipeline(TASK, model=mini.base, nudging_model=mini.nudging_model, **SETTINGS)
    assert pipe._forward_params["nudging_model"].dtype == pipe.model.dtype == torch.float64
    expected = nudged_pipeline(mini)(MINI_TEXTS[0])
    assert objects(MINI_TEXTS[0]) == expected
    # The constructor's nudging tokenizer is not taken for another nudging model's.
    for other in (mini.nudging_model, str(MODELS / "nudging")):
        assert pipe(MINI_TEXTS[0], nudging_model=other) == expected
        question = [{"role": "user", "content": MINI_TEXTS[0]}]
        assert pipe(question, nudging_model=other) == objects(question)


def test_the_generation_config_may_name_the_nudging_model(exported):
    chosen = pair("llama", 0, "shared")
    pipe = pipeline(TASK, model=exported, max_new_tokens=12)
    assert pipe(TEXTS, batch_size=2) == nudged_pipeline(chosen)(TEXTS, batch_size=2)
    assert pipe(CHATS) == nudged_pipeline(chosen)(CHATS)


def test_both_models_go_to_the_device_of_the_pipeline():
    chosen = pair("llama", 0, "shared")
    models = {name: copy.deepcopy(getattr(chosen, name)) for name in ("base", "nudging_model")}
    pipeline(
        TASK,
        model=models["base"],
        tokenizer=chosen.tokenizer,
        nudging_model=models["nudging_model"],
        nudging_tokenizer=chosen.tokenizer,
        device="meta",
    )
    assert models["base"].device == models["nudging_model"].device == torch.device("meta")


def test_a_saved_pipeline_is_the_base_and_needs_no_code(tmp_path):
    chosen = pair("llama", 0, "shared")
    nudged_pipeline(chosen).save_pretrained(tmp_path)
    pipe = pipeline(
        TASK, model=str(tmp_path), **{k: v for k, v in complete_arguments(chosen).items() if k != "tokenizer"}
    )
    assert pipe(TEXTS[0]) == nudged_pipeline(chosen)(TEXTS[0])
    assert not list(tmp_path.glob("*.py"))


# Records -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))  # Each seed has another kind of tokenizer.
def test_spans_are_the_text_of_the_answer(seed):
    chosen = pair("llama", seed, "shared")
    pipe = nudged_pipeline(chosen, return_nudged_spans=True)
    for prompts, batch_size in ((TEXTS[:3], 3), (CHATS[:1], 1)):
        records = [record for [record] in pipe(prompts, batch_size=batch_size, return_full_text=False)]
        for record in records:
            spans = record["nudged_spans"]
            assert "".join(span["text"] for span in spans) == record["generated_text"]
            assert all(record["generated_text"][span["start"] : span["end"]] == span["text"] for span in spans)
            assert all(span["text"] and set(span) == {"text", "nudged", "start", "end", "instead"} for span in spans)
            assert all(one["nudged"] != two["nudged"] for one, two in pairwise(spans))
        assert json.loads(json.dumps(records)) == records
        without = pipe(prompts, batch_size=batch_size, return_full_text=False, return_nudged_spans=False)
        assert [record for [record] in without] == [{"generated_text": r["generated_text"]} for r in records]


def test_spans_are_those_of_the_output(mini):
    pipe = nudged_pipeline(mini, max_new_tokens=30)
    for prompt in MINI_TEXTS[:2]:
        given = inputs_of(mini, prompt)
        output = nudging_hf.generate(
            mini.base, **given, **complete_arguments(mini, max_new_tokens=30), return_dict_in_generate=True
        )
        [expected] = spans_of(output, mini.tokenizer)
        [record] = pipe(prompt, return_nudged_spans=True)
        assert record["nudged_spans"] == [asdict(span) for span in expected]
        assert all((span.instead is not None) == span.nudged for span in expected)
        assert record["generated_text"] == prompt + "".join(span.text for span in expected)
        assert {span.nudged for span in expected} == {True, False}


def test_a_character_over_two_tokens_is_whole_and_belongs_to_the_author_of_the_last():
    tokenizer = byte_bpe()
    ids = tokenizer("a caf\u00e9 \U0001f600!", add_special_tokens=False).input_ids
    bytewise = [tokenizer.convert_tokens_to_ids(symbol) for i in ids for symbol in tokenizer.convert_ids_to_tokens(i)]
    text = tokenizer.decode(bytewise)
    assert len(bytewise) == len(text.encode())
    for cut in range(len(bytewise) + 1):
        nudged = [True] * cut + [False] * (len(bytewise) - cut)
        spans = _spans_as_decoded(bytewise, nudged, [None] * len(nudged), tokenizer.decode)
        whole = text.encode()[:cut].decode(errors="ignore")
        assert [(span.text, span.nudged) for span in spans if span.nudged] == [(whole, True)] * bool(whole)
        assert "".join(span.text for span in spans) == text


def test_a_chat_is_returned_with_the_assistant_s_answer(chosen):
    pipe = nudged_pipeline(chosen)
    [record], [answer] = pipe(CHATS[2]), pipe(CHATS[2], return_full_text=False)
    assert record["generated_text"] == [*CHATS[2], {"role": "assistant", "content": answer["generated_text"]}]
    ids = answer_of(chosen, inputs_of(chosen, CHATS[2]))
    assert answer["generated_text"] == chosen.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("prompts", [TEXTS[:2], CHATS[:2]], ids=["strings", "chats"])
def test_several_answers_to_a_prompt(prompts, batch_size):
    chosen = PAIRS["two"]()
    pipe = nudged_pipeline(chosen, return_nudged_spans=True, do_sample=True, num_return_sequences=3)
    records = pipe(prompts, batch_size=batch_size, return_full_text=False)
    assert [len(each) for each in records] == [3, 3]
    for each in records:
        assert len({record["generated_text"] for record in each}) > 1
        for record in each:
            assert "".join(span["text"] for span in record["nudged_spans"]) == record["generated_text"]


def test_a_stop_sequence_ends_an_answer(chosen):
    text = nudged_pipeline(chosen)(TEXTS[0], return_full_text=False)[0]["generated_text"]
    stop = text[3:5]
    stopped = nudged_pipeline(chosen)(TEXTS[0], return_full_text=False, stop_sequence=stop)[0]["generated_text"]
    assert len(stopped) < len(text) and text.startswith(stopped) and stop in stopped


# Streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [TEXTS[0], CHATS[1]], ids=["string", "chat"])
def test_what_is_streamed_is_returned(chosen, prompt):
    pipe = nudged_pipeline(chosen)
    streamer = TextIteratorStreamer(chosen.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    records = []
    thread = Thread(target=lambda: records.extend(pipe(prompt, streamer=streamer, return_full_text=False)))
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == records[0]["generated_text"]


def test_marked_pieces_are_the_spans(mini):
    pieces = []
    streamer = MarkingStreamer(mini.tokenizer, lambda text, nudged: pieces.append((text, nudged)))
    [record] = nudged_pipeline(mini)(MINI_TEXTS[0], streamer=streamer, return_nudged_spans=True)
    letters = [(letter, span["nudged"]) for span in record["nudged_spans"] for letter in span["text"]]
    assert [(letter, nudged) for text, nudged in pieces for letter in text] == letters


def test_prompts_of_a_list_are_streamed_one_after_another(mini):
    pieces = []
    streamer = MarkingStreamer(mini.tokenizer, lambda text, nudged: pieces.append(text))
    records = nudged_pipeline(mini)(MINI_TEXTS, streamer=streamer, return_full_text=False)
    assert "".join(pieces) == "".join(record["generated_text"] for [record] in records)
    with pytest.raises(ValueError, match="`streamer` takes a single answer"):
        nudged_pipeline(mini)(MINI_TEXTS, streamer=streamer, batch_size=2)


# Refusals -----------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "There is no prompt: give a string, a chat"),
        ("", "The prompt is empty: give a string"),
        (5, "A prompt is a string or a chat, .* got 5"),
        ([None], "A prompt is a string or a chat, .* got None"),
        ([{"role": "user"}], "A prompt is a string or a chat, .* got {'role': 'user'}"),
        (["text", [USER]], "a list holds prompts of one kind; got .*'Hi'"),
        ([[USER], "text"], "a list holds prompts of one kind; got"),
        ([USER, ASSISTANT], "the user first and last; got messages of: user, assistant"),
        ([ASSISTANT, USER], "then user and assistant alternate, .* got messages of: assistant, user"),
        ([[USER], [USER, USER]], "got messages of: user, user"),
        ([{"role": "user", "content": 7}], "content of a message must be text, got 7"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of a message must be text, .* got a part"),
        ([{"role": None, "content": "Hi"}], "The role of a message must be .* got None"),
        (USER, "A prompt is a string or a chat, .* got {'role': 'user'"),
        ("caf\udce9", "The prompt has '.udce9' at position 3, which is not a character"),
        ([{"role": "user", "content": "caf\udce9"}], "content of a message has '.udce9' at position 3"),
    ],
    ids=lambda value: None,
)
def test_invalid_prompts_are_refused(prompt, message):
    pipe = nudged_pipeline(PAIRS["shared"]())
    with pytest.raises(ValueError, match=message):
        pipe(prompt)


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        (TEXTS[0], {"nudging_model": None}, 'got none: .* or take the task "text-generation"'),
        (TEXTS[0], {"nudging_model": 5}, "needs `nudging_model=`, .* got int"),
        (TEXTS[0], {"nudging_model": "/nowhere/at/all"}, "The nudging model '/nowhere/at/all' cannot be loaded"),
        (TEXTS[0], {"nudging_tokenizer": "name"}, "`nudging_tokenizer` must be a tokenizer .* got str"),
        (TEXTS[0], {"prefix": "Once"}, "takes no `prefix`: write it in front of the prompt"),
        (CHATS[0], {"tools": [print]}, "takes no `tools`"),
        (CHATS[0], {"continue_final_message": True}, "takes no `continue_final_message`"),
        (CHATS[0], {"truncation": True}, "`truncation` is for prompts that are strings, got a chat"),
        (CHATS[0], {"nudging_input_ids": torch.ones(1, 2)}, "`nudging_input_ids` is for prompts that are strings"),
        (CHATS[0], {"base_template": "{question}"}, "may have the fields {user} and {system}"),
        (TEXTS[0], {"num_beams": 2}, "`num_beams=2` is not supported by nudging"),
        (TEXTS[0], {"nudge_treshold": 0.4}, "nudge_treshold"),
    ],
    ids=lambda value: None,
)
def test_unsupported_arguments_are_refused(prompt, given, message):
    pipe = nudged_pipeline(PAIRS["shared"]())
    with pytest.raises(ValueError, match=message):
        pipe(prompt, **given)


def test_a_pipeline_without_a_nudging_model_or_a_tokenizer_is_refused():
    chosen = PAIRS["shared"]()
    with pytest.raises(ValueError, match=r"needs `nudging_model=`.* got none: give one, name one as"):
        pipeline(TASK, model=chosen.base, tokenizer=chosen.tokenizer)
    with pytest.raises(
        ValueError, match=r"No tokenizer was given for the nudging model, .* pass `nudging_tokenizer=`"
    ):
        pipeline(TASK, model=chosen.base, tokenizer=chosen.tokenizer, nudging_model=chosen.nudging_model)
    with pytest.raises(ValueError, match=r"No tokenizer was given for the base, .* pass `tokenizer=`"):
        pipeline(TASK, model=chosen.base, nudging_model=chosen.nudging_model)


# Both pipeline tasks ------------------------------------------------------------------------------------------------


def test_the_task_is_registered_and_unregistered():
    registered = dict(PIPELINE_REGISTRY.supported_tasks)
    nudging_hf.register()
    assert PIPELINE_REGISTRY.supported_tasks == registered
    assert isinstance(nudged_pipeline(PAIRS["shared"]()), NudgedTextGenerationPipeline)
    nudging_hf.unregister()
    assert PIPELINE_REGISTRY.supported_tasks == {k: v for k, v in registered.items() if k != TASK}
    with pytest.raises(KeyError, match="Unknown task nudged-text-generation"):
        nudged_pipeline(PAIRS["shared"]())


def plain_pipeline(chosen, **kwargs):
    """The text-generation pipeline, which does not pass its tokenizer on and so needs `base_tokenizer`."""
    arguments = complete_arguments(chosen, base_tokenizer=chosen.tokenizer, do_sample=False, **kwargs)
    return pipeline("text-generation", model=chosen.base, device="cpu", **arguments)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation_nudges_when_it_is_given_a_nudging_model(chosen, batch_size):
    records = plain_pipeline(chosen)(TEXTS, batch_size=batch_size, return_tensors=True)
    same_ids(records, chosen, [inputs_of(chosen, text) for text in TEXTS], batch_size)


def test_text_generation_takes_a_nudging_model_for_a_call(chosen):
    pipe = pipeline("text-generation", model=chosen.base, tokenizer=chosen.tokenizer, device="cpu", do_sample=False)
    by_call = {**complete_arguments(chosen), "base_tokenizer": chosen.tokenizer}
    del by_call["tokenizer"]  # The pipeline would take it for itself.
    assert pipe(TEXTS[0], **by_call) == nudged_pipeline(chosen)(TEXTS[0])


def test_text_generation_gives_a_chat_to_the_template_of_the_base(chosen):
    chats = CHATS[:2]
    records = plain_pipeline(chosen)(chats, batch_size=2, return_tensors=True)
    template = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    same_ids(records, chosen, [dict(chosen.tokenizer.apply_chat_template(chat, **template)) for chat in chats], 2)


@pytest.mark.parametrize("registered", [True, False])
def test_an_exported_folder_nudges_in_text_generation(exported, registered):
    chosen = pair("llama", 0, "shared")
    if not registered:
        nudging_hf.unregister()
    pipe = pipeline("text-generation", model=exported, trust_remote_code=True, do_sample=False, max_new_tokens=12)
    for batch_size in (1, 3):
        records = pipe(TEXTS, batch_size=batch_size, return_tensors=True)
        same_ids(records, chosen, [inputs_of(chosen, text) for text in TEXTS], batch_size)
    # A chat becomes the base's plain prompt, and the nudging model gets that prompt as a user turn.
    prompts = [{"input_ids": inputs_of(chosen, chat)["input_ids"]} for chat in CHATS]
    same_ids(pipe(CHATS, batch_size=3, return_tensors=True), chosen, prompts, 3)
    other = answer_of(chosen, inputs_of(chosen, TEXTS[0]), nudge_threshold=0.95)
    assert other != answer_of(chosen, inputs_of(chosen, TEXTS[0]))
    assert pipe(TEXTS[0], nudge_threshold=0.95, return_tensors=True)[0]["generated_token_ids"][-len(other) :] == other
    plain = pipeline("text-generation", model=chosen.base, tokenizer=chosen.tokenizer, device="cpu", do_sample=False)
    assert pipe(TEXTS[0], nudging_model=None) == plain(TEXTS[0], max_new_tokens=12)
