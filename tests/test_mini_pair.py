"""Tests that the mini pair is what its README says, and that nudging helps it."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from safetensors import safe_open

from nudging_hf.core.config import NudgingConfig
from nudging_hf.study import comparison, demo
from nudging_hf.study.journal import Journal
from nudging_hf.study.prompts import Prompt

MINI = Path(__file__).parents[1] / "examples" / "mini"
MODELS = ("base", "nudging", "nudging-shared", "nudging-shared-unaligned", "large-aligned")


@pytest.fixture(scope="module")
def world():
    spec = importlib.util.spec_from_file_location("world", MINI / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded():
    """The models and the held-out questions."""
    return demo.load(MINI), demo.read_questions(MINI)


@pytest.fixture(scope="module")
def models(loaded):
    return loaded[0]


def parameters(name: str) -> int:
    with safe_open(MINI / "models" / name / "model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118 - no mapping


def test_the_weights_are_small_and_those_of_nudging_models_ten_times_smaller():
    files = list((MINI / "models").rglob("*"))
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 25e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    for name in ("nudging", "nudging-shared", "nudging-shared-unaligned"):
        assert parameters("base") >= 10 * parameters(name)
    assert parameters("large-aligned") == parameters("base")


def test_which_models_share_the_base_s_vocabulary(models):
    shared = models.base.tokenizer.get_vocab()
    assert models.shared.tokenizer.get_vocab() == models.large_aligned.tokenizer.get_vocab() == shared
    assert models.nudging.tokenizer.get_vocab() != shared
    assert models.nudging.tokenizer.chat_template and models.shared.tokenizer.chat_template
    assert not models.base.tokenizer.chat_template


def test_any_text_survives_both_tokenizers(models):
    for lm in (models.base, models.nudging):
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


def test_no_held_out_question_is_among_ten_thousand_training_ones(loaded, world):
    questions = loaded[1]
    asked = {prompt.question.removeprefix("Question: ") for prompt in questions}
    assert len(asked) == len(questions) == 400
    rng = random.Random(5)
    assert asked.isdisjoint({world.training_problem(rng).question for _ in range(10_000)})


def test_the_held_out_file_is_what_its_command_writes(world):
    rows = [json.loads(line) for line in (MINI / "heldout.jsonl").read_text().splitlines()]
    again = world.problem_set("heldout", world.HELDOUT_SEED, world.HELDOUT_ROWS_PER_TASK)
    assert [(row["task"], row["messages"][-1]["content"], row["answer"]) for row in rows] == [
        (problem.task, f"Question: {problem.question}", problem.answer) for problem in again
    ]


def test_a_nudged_base_is_right_more_often_than_either_model_alone(models, world):
    """The questions are dev questions, because the held-out ones are reserved for reports."""
    questions = [Prompt(**world.row(problem)) for problem in world.problem_set("dev", world.DEV_SEED, 4)]
    contestants, _ = comparison.contestants_of(models, [NudgingConfig(0.4)], with_rivals=False)
    contestants = [contestant for contestant in contestants if contestant.name != comparison.ALIGNED]
    settings = {"max_new_tokens": demo.MAX_NEW_TOKENS, "batch_size": 16}
    base, nudging, *nudged = comparison.compare(contestants, questions, Journal(None, {}), **settings)
    alone = max(base.accuracy(), nudging.accuracy())
    assert len(nudged) == 2
    for result in nudged:
        assert result.accuracy() >= alone + 0.2
        assert 0.02 < result.nudge_rate < 0.3
