"""Tests the figures in words: the verdict in one sentence, what can be told apart, and who is right on nothing."""

import pytest

from nudging_hf.chats import messages_of
from nudging_hf.study.comparison import Contestant, Result, Turn
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.reader import Answer
from nudging_hf.study.verdict import Nudged, Scores, difference, nothing_right, of_comparison, sentences, verdict

QUESTIONS = tuple(Prompt(messages_of(f"Number {i}?"), answer=str(i)) for i in range(40))


def marks(right, of=40):
    return Scores([i < right for i in range(of)])


def result_of(name, right, seconds=1.0, nudged="", questions=QUESTIONS):
    answers = [Answer(f"It is {i if i < right else 99}.", [7], True, 10, 1) for i in range(len(questions))]
    contestant = Contestant(name, None, nudged=bool(nudged), setting=nudged)
    marked = [q.is_right(a.text) if q.is_labelled else None for q, a in zip(questions, answers, strict=True)]
    return Result(contestant, questions, (Turn(seconds, 1, 1, answers, marked),))


def test_a_difference_is_paired_and_its_direction_is_told_only_where_its_interval_excludes_0():
    assert difference(marks(36), marks(20)).direction == 1 and difference(marks(20), marks(36)).direction == -1
    assert difference(marks(22), marks(20)).direction == 0 and difference(marks(20), marks(20)).direction == 0
    apart = difference(Scores([True, False] * 20), Scores([False, True] * 20))
    together = difference(Scores([True, False] * 20), Scores([True, False] * 20))
    assert apart.gain == together.gain == 0 and apart.interval[1] > 2 * together.interval[1] > 0
    graded = difference(Scores(grades=[4, 5, 4.5]), Scores(grades=[2, 2.5, 2]))
    assert graded.direction == 1 and str(graded).startswith("2.33 grades more (95 % interval: +")
    assert difference(Scores(grades=[4]), Scores(grades=[2])).direction == 0


def test_the_verdict_is_one_sentence_with_gain_uncertainty_share_cost_and_setting():
    results = [
        result_of("base alone", 2),
        result_of("nudging model alone", 10),
        result_of("nudged, γ = 0.2", 30, 2.0, "γ = 0.2"),
        result_of("nudged, γ = 0.4", 37, 3.0, "γ = 0.4"),
    ]
    assert of_comparison(results) == (
        "Nudging helps: with γ = 0.4, 37 of 40 answers are right, 88 points more (95 % interval: +71 to +94) than the "
        "base alone (2 of 40; the nudging model alone: 10 of 40), 10.0% of the words nudged, 3 times the base's time "
        "for an answer and 3 times for a word; take γ = 0.4, the best of 2 that were tried on these questions."
    )


@pytest.mark.parametrize(
    ("base", "nudging", "nudged", "opening", "advice"),
    [
        (2, 10, 37, "Nudging helps: ", "take γ = 0.4, the only one that was tried."),
        (30, 2, 10, "Nudging does not help: ", "take the base alone, or try another setting than γ = 0.4."),
        (2, 35, 10, "Nudging does not help: ", "take the nudging model alone, or try"),
        (
            2,
            36,
            37,
            "Nudging helps the base, but cannot be told apart from the nudging model alone: ",
            "take γ = 0.4,",
        ),
        (20, 10, 22, "It cannot be told from so few questions whether nudging helps: ", "γ = 0.4 is the only one"),
        (0, 0, 0, "It cannot be told from so few questions whether nudging helps: ", "γ = 0.4 is the only one"),
    ],
)
def test_the_verdict_says_no_more_than_can_be_told(base, nudging, nudged, opening, advice):
    said = verdict(marks(base), marks(nudging), [Nudged("γ = 0.4", marks(nudged), 0.1)])
    assert said.startswith(opening) and advice in said and "the time was not measured" in said


def test_what_was_not_measured_is_said_to_be_so():
    unlabelled = tuple(Prompt(messages_of("?")) for _ in range(3))
    results = [
        result_of(name, 0, seconds, setting, unlabelled)
        for name, seconds, setting in (
            ("base alone", 1, ""),
            ("nudging model alone", 1, ""),
            ("nudged", 2.5, "γ = 0.4"),
        )
    ]
    assert of_comparison(results) == (
        "Whether nudging helps, and which setting to take, was not measured, because no rule or judge marked the "
        "answers; of the words, it nudges 10.0% with γ = 0.4 (2.5 times the base's time for an answer and 2.5 times "
        "for a word)."
    )
    assert sentences(results) == [] and nothing_right({"base alone": results[0].answered}) == []
    untimed = verdict(Scores(), Scores(), [Nudged("γ = 0.2", Scores(), 0.05), Nudged("γ = 0.4", Scores(), None)])
    assert untimed.endswith("it nudges 5.0% with γ = 0.2, an unknown share with γ = 0.4; the time was not measured.")
    assert verdict(marks(0), marks(0), []) == "Whether nudging helps was not measured, because no nudged answer was."


def test_sentences_say_where_nudging_is_not_better_and_where_that_cannot_be_told():
    results = [result_of("base alone", 0), result_of("nudged", 24, nudged="γ = 0.4"), result_of("ensemble", 27),
               result_of("large aligned", 40)]  # fmt: skip
    assert sentences(results) == [
        "nudged is above base alone: 24 of 40 against 0 of 40, 60 points more (95 % interval: +42 to +74).",
        "nudged cannot be told apart from ensemble: 24 of 40 against 27 of 40, 8 points less (95 % interval: −17 to "
        "+2).",
        "nudged is NOT above large aligned: 24 of 40 against 40 of 40, 40 points less (95 % interval: −55 to −24).",
    ]


def test_who_is_right_on_nothing_is_shown_with_what_was_read_and_how():
    base, nudged = result_of("base alone", 0), result_of("nudged", 3, nudged="γ = 0.4")
    shown = (
        "base alone is right on none of 40. Asked “Number 0?”, it wrote “It is 99.”; “0” was due, and the last number "
        "is “99”."
    )
    assert nothing_right({"base alone": base.answered, "nudged": nudged.answered}) == [shown]
    assert nothing_right({"base alone": base.answered}) == [
        "NOBODY is right on any question: look whether the answers are read as they are meant.", shown
    ]  # fmt: skip
    silent = [(Prompt(messages_of("?"), pattern="(a)", answer="a"), Answer("b " * 200, [7], True, 200))]
    [_, said] = nothing_right({"x": silent})
    assert "the last match of '(a)' found nothing" in said and len(said) < 400
