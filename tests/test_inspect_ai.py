"""Tests the nudged model in inspect-ai: its answers, its settings, and concurrent calls."""

import asyncio
import gc
import importlib.util
import sys
import time
from pathlib import Path

import pytest

import nudging_hf
from nudging_hf.provenance import count_nudged_words, pieces_of

pytest.importorskip("inspect_ai")

import inspect_ai
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolInfo

# inspect-ai itself causes this warning with tenacity 9.2.
pytestmark = pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning")

MINI = Path(__file__).parents[1] / "examples" / "mini"
NAME = f"nudging_hf/{MINI}/models/base"
ARGS = {"nudging_model": f"{MINI}/models/nudging", "base_template": "{system}\\n{user}\\n", "nudge_threshold": 0.4}
KINDS = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


@pytest.fixture(scope="module")
def rows():
    spec = importlib.util.spec_from_file_location("world", MINI / "world.py")
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    return [world.row(problem) for problem in world.problem_set("dev", world.DEV_SEED, 1)]


@pytest.fixture(scope="module")
def model():
    return get_model(NAME, memoize=False, **ARGS)


def chat(row):
    return [KINDS[message["role"]](content=message["content"]) for message in row["messages"]]


def ask(model, messages, **config):
    return asyncio.run(model.generate(messages, config=GenerateConfig(**config)))


def package(model, row, **kwargs):
    """The answer of `nudging_hf.generate`: its pieces, its whole output, and its inputs."""
    pair = model.api.pair
    inputs = nudging_hf.chat_inputs(row["messages"], pair.tokenizer, pair.nudging_tokenizer, "{system}\n{user}\n")
    output = nudging_hf.generate(
        pair.base,
        **inputs,
        nudging_model=pair.nudging_model,
        nudge_threshold=0.4,
        do_sample=False,
        return_dict_in_generate=True,
        **{"max_new_tokens": 512, **kwargs},
    )
    return pieces_of(output, pair.tokenizer)[0], output, inputs


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


# The answer ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_package_s_own_and_has_usage_and_metadata(model, rows):
    for row in rows[:2]:
        pieces, output, inputs = package(model, row)
        said = ask(model, chat(row))
        nudged, words = count_nudged_words(pieces)
        read, written = inputs["input_ids"].numel(), output.sequences.shape[1] - inputs["input_ids"].shape[1]
        assert said.completion == text_of(pieces) and said.stop_reason == "stop"
        assert (said.usage.input_tokens, said.usage.output_tokens) == (read, written)
        assert said.usage.total_tokens == read + written
        assert said.metadata == {"nudge_rate": nudged / words, "finish_reasons": ["eos"]}
        assert 0 < nudged < words


def test_the_parameters_have_an_effect(rows):
    never = get_model(NAME, memoize=False, **{**ARGS, "nudge_threshold": 0.0})
    said = ask(never, chat(rows[0]), max_tokens=24)
    assert (
        said.metadata["nudge_rate"] < ask(get_model(NAME, memoize=False, **ARGS), chat(rows[0])).metadata["nudge_rate"]
    )


def test_consecutive_messages_of_one_role_are_one_turn(model, rows):
    system, user = chat(rows[0])
    head, tail = user.content[:20], user.content[20:]
    split = [system, ChatMessageUser(content=head), ChatMessageUser(content=[ContentText(text=tail)])]
    joined = [system, ChatMessageUser(content=f"{head}\n{tail}")]
    assert ask(model, split, max_tokens=12).completion == ask(model, joined, max_tokens=12).completion


# Settings ------------------------------------------------------------------------------------------------------------


def test_max_tokens_limits_an_answer(model, rows):
    said = ask(model, chat(rows[0]), max_tokens=9)
    assert said.stop_reason == "max_tokens" and said.usage.output_tokens == 9
    assert said.completion == text_of(package(model, rows[0], max_new_tokens=9)[0])


def test_stop_sequences_end_an_answer_and_are_cut_off(model, rows):
    whole = text_of(package(model, rows[0])[0])
    said = ask(model, chat(rows[0]), stop_seqs=["", "never written", whole[30:36]])
    assert said.completion == whole[: whole.index(whole[30:36])] and said.stop_reason == "stop"
    assert said.metadata["finish_reasons"] == ["stop_string"]


def test_a_seed_makes_a_sampled_answer_repeatable(model, rows):
    drawn = [
        ask(model, chat(rows[0]), temperature=3.0, top_p=0.99, seed=seed, max_tokens=30).completion
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_top_k_of_1_and_a_temperature_of_0_are_greedy(model, rows):
    greedy = ask(model, chat(rows[0]), max_tokens=30).completion
    assert ask(model, chat(rows[0]), temperature=0, top_p=0.5, max_tokens=30).completion == greedy
    assert ask(model, chat(rows[0]), temperature=3.0, top_k=1, seed=3, max_tokens=30).completion == greedy


def test_several_choices_are_sampled_independently(model, rows):
    said = ask(model, chat(rows[0]), temperature=3.0, num_choices=3, seed=0, max_tokens=20)
    assert len({choice.message.text for choice in said.choices}) == 3
    assert len(said.metadata["finish_reasons"]) == 3
    assert (
        said.usage.output_tokens == 60 and said.usage.input_tokens == package(model, rows[0])[2]["input_ids"].numel()
    )


# Several at once -----------------------------------------------------------------------------------------------------


def test_calls_run_one_at_a_time_and_do_not_block_the_event_loop(model, rows, monkeypatch):
    singles = [ask(model, chat(row), max_tokens=16).completion for row in rows]
    running, most, ticks = [], [], []

    def slow(*args, **kwargs):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        output = nudging_hf.generate(*args, **kwargs)
        running.pop()
        return output

    monkeypatch.setattr("nudging_hf.pair.generate", slow)

    async def all_at_once():
        async def tick():
            while True:
                ticks.append(len(running))
                await asyncio.sleep(0.01)

        ticking = asyncio.create_task(tick())
        config = GenerateConfig(max_tokens=16)
        said = await asyncio.gather(*(model.api.generate(chat(row), [], "none", config) for row in rows))
        ticking.cancel()
        return [output.completion for output in said]

    assert asyncio.run(all_at_once()) == singles
    assert most == [1] * len(rows)
    assert sum(ticks) > len(rows)  # The event loop ran while a model wrote.


# An evaluation by inspect-ai ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # An evaluation leaves streams open.
def test_an_evaluation_finds_the_provider_and_its_score_is_the_package_s(model, rows, tmp_path):
    answers = [text_of(package(model, row)[0]) for row in rows[:2]]
    targets = [answers[0][40:60], "not in the answer"]
    task = inspect_ai.Task(
        dataset=[Sample(input=chat(row), target=target) for row, target in zip(rows[:2], targets, strict=True)],
        scorer=includes(),
    )
    (log,) = inspect_ai.eval(task, model=NAME, model_args=ARGS, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert [sample.output.completion for sample in log.samples] == answers
    assert log.results.scores[0].metrics["accuracy"].value == 0.5
    assert all(0 < sample.output.metadata["nudge_rate"] < 1 for sample in log.samples)
    gc.collect()  # Warnings about streams that the evaluation left open appear here and not in another test.


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"logprobs": True, "top_logprobs": 2}, "`logprobs`, `top_logprobs`"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"num_choices": 2}, "needs a temperature"),
        ({"num_choices": 2, "temperature": 0}, "needs a temperature"),
    ],
)
def test_unsupported_settings_are_refused(model, rows, config, message):
    with pytest.raises(ValueError, match=message):
        ask(model, chat(rows[0]), **config)


def test_tools_and_images_are_refused(model, rows):
    tool = ToolInfo(name="search", description="It searches.")
    with pytest.raises(ValueError, match=r"calls no tools, got \['search'\]"):
        asyncio.run(model.generate(chat(rows[0]), tools=[tool]))
    image = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,iVBORw0KGgo=")])
    with pytest.raises(ValueError, match="must be text"):
        ask(model, [image])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"nudging_model": None}, "-M nudging_model="),
        ({"nudge_threshold": -1}, "nudge_threshold"),
        ({"base_template": "{question}"}, "may have the fields"),
    ],
)
def test_errors_name_the_argument_to_correct(args, message):
    with pytest.raises(ValueError, match=message):
        get_model(NAME, memoize=False, **{**ARGS, **args})


def test_without_inspect_ai_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    spec = importlib.util.find_spec("nudging_hf.integrations.inspect_ai")
    with pytest.raises(ImportError, match=r"nudging-hf\[inspect-ai\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
