"""The pair in miniature is what its README says, and nudging helps it."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from safetensors import safe_open

from nudging_hf.study import demo

MINI = Path(__file__).parents[1] / "examples" / "mini"
MODELS = ("base", "nudging", "nudging-shared", "nudging-shared-unaligned", "large-aligned")


@pytest.fixture(scope="module")
def world():
    spec = importlib.util.spec_from_file_location("world", MINI / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair():
    return demo.Pair.load(MINI)


def parameters(name: str) -> int:
    with safe_open(MINI / "models" / name / "model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118 - no mapping


def test_the_weights_are_small_and_the_nudging_models_ten_times_smaller():
    files = list((MINI / "models").rglob("*"))
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 25e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    for name in ("nudging", "nudging-shared", "nudging-shared-unaligned"):
        assert parameters("base") >= 10 * parameters(name)
    assert parameters("large-aligned") == parameters("base")


def test_who_shares_the_bases_vocabulary(pair):
    shared = pair.base.tokenizer.get_vocab()
    assert pair.nudging_shared.tokenizer.get_vocab() == pair.large_aligned.tokenizer.get_vocab() == shared
    assert pair.nudging.tokenizer.get_vocab() != shared
    assert pair.nudging.tokenizer.chat_template and pair.nudging_shared.tokenizer.chat_template
    assert not pair.base.tokenizer.chat_template


def test_any_text_survives_both_tokenizers(pair):
    for lm in (pair.base, pair.nudging):
        text = "Some – 😀 text,\n  with\ttabs and 1234."
        assert lm.tokenizer.decode(lm.tokenizer(text, add_special_tokens=False).input_ids) == text


def test_names_and_sums_of_held_out_questions_belong_to_the_held_out_split(world):
    problems = world.problem_set("heldout", world.HELDOUT_SEED, world.HELDOUT_ROWS_PER_TASK)
    steps = [facts for problem in problems for _, facts in problem.steps]
    names = {facts[key] for facts in steps for key in ("w", "n") if key in facts}
    sums = {(facts["s"], facts["x"], facts["y"]) for facts in steps if "s" in facts}
    assert len(names) > 100 and len(sums) > 50
    assert {world.split_of(name) for name in names} == {"heldout"}
    assert {world.pair_split(*each) for each in sums} == {"heldout"}


def test_no_held_out_question_is_among_ten_thousand_training_ones(pair, world):
    asked = {question.text.removeprefix("Question: ") for question in pair.questions}
    assert len(asked) == len(pair.questions) == 400
    rng = random.Random(5)
    assert asked.isdisjoint({world.training_problem(rng).question for _ in range(10_000)})


def test_the_held_out_file_is_what_its_command_writes(world):
    rows = [json.loads(line) for line in (MINI / "heldout.jsonl").read_text().splitlines()]
    again = world.problem_set("heldout", world.HELDOUT_SEED, world.HELDOUT_ROWS_PER_TASK)
    assert [(row["task"], row["messages"][-1]["content"], row["answer"]) for row in rows] == [
        (problem.task, f"Question: {problem.question}", problem.answer) for problem in again
    ]


def test_a_nudged_base_is_right_more_often_than_either_model_alone(pair, world):
    """On dev questions: the held-out ones are for reports."""
    dev = world.problem_set("dev", world.DEV_SEED, 4)
    questions = [demo.Question(**world.row(problem)) for problem in dev]
    results = {
        contestant.name: demo.evaluate(contestant, questions, threshold=0.4, batch_size=16)
        for contestant in demo.contestants(pair)
        if contestant.name != demo.ALIGNED
    }
    alone = max(results[demo.BASE].accuracy(), results[demo.NUDGING].accuracy())
    for name in (demo.NUDGED, demo.SHARED):
        assert results[name].accuracy() >= alone + 0.2
        nudged, words = results[name].nudged_words
        assert 0.02 < nudged / words < 0.3
