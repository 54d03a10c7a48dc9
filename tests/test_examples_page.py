"""Tests which questions a page of examples shows first, and that answers keep what the page shows of them."""

import json
import re
from dataclasses import asdict

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from nudging_hf.chats import messages_of
from nudging_hf.provenance import Alternative, Piece
from nudging_hf.study.examples import Answered, best, chosen, write_page
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.reader import Answer, Reader, nudged_answers


def answered(rows, nudged=True):
    """The answers of a contestant: for each its mark, and how many of its ten words are nudged."""
    return Answered("", [Answer("a", [7], True, 10, words) for _, words in rows], [mark for mark, _ in rows], nudged)


MARKS = st.sampled_from([True, False, None])
ROWS = st.lists(st.tuples(MARKS, MARKS, st.integers(0, 10)), min_size=1, max_size=8)


@given(ROWS)
def test_the_best_the_worst_and_the_first_are_shown(rows):
    base = answered([(mark, 0) for mark, _, _ in rows], nudged=False)
    found = chosen(base, answered([(mark, words) for _, mark, words in rows]))
    reasons = {reason: place for place, said in found.items() for reason in said.split("; ")}
    words = [each[2] for each in rows]
    helped = [words[i] for i, each in enumerate(rows) if each[:2] == (False, True)]
    harmed = [words[i] for i, each in enumerate(rows) if each[:2] == (True, False)]
    assert reasons["the first"] == 0
    for reason, pair, extreme in (
        ("the best: nudged right, base alone wrong", (False, True), min(helped, default=None)),
        ("the worst: nudged wrong, base alone right", (True, False), max(harmed, default=None)),
    ):
        assert (reason in reasons) is (extreme is not None)
        if reason in reasons:
            assert rows[reasons[reason]][:2] == pair and words[reasons[reason]] == extreme
    assert ("most nudged words" in reasons) is (not helped and not harmed)
    if not helped and not harmed:
        assert words[reasons["most nudged words"]] == max(words)
        assert words[reasons["fewest nudged words"]] == min(words)


def test_the_best_setting_is_right_most_often_and_nudges_least():
    worse, more, less = (answered([(mark, words), (True, 1)]) for mark, words in ((False, 0), (True, 3), (True, 2)))
    assert best([worse, more, less]) is less and best([worse, more]) is more


@given(st.lists(st.builds(
    Piece, st.text(min_size=1), st.booleans(), st.none() | st.floats(0, 1),
    st.none() | st.builds(Alternative, st.integers(0), st.text(), st.floats(0, 1), st.integers(1)),
)))  # fmt: skip
def test_an_answer_is_the_same_after_it_was_json(pieces):
    answer = Answer.of(pieces, [7], True)
    assert Answer.from_row(json.loads(json.dumps(asdict(answer)))) == Answer.from_row(asdict(answer)) == answer
    assert "".join(answer.text[start:end] for start, end in answer.nudged_spans) == "".join(
        piece.text for piece in pieces if piece.nudged
    )


def test_the_page_has_all_answers_beside_each_other_and_the_base_s_own_at_each_nudge(tmp_path):
    chosen_pair = tiny.pair("llama", 1, "two")
    base = Reader(chosen_pair.base, chosen_pair.tokenizer, chat=False)
    nudging = Reader(chosen_pair.nudging_model, chosen_pair.nudging_tokenizer, chat=True)
    questions = [Prompt(messages_of(f"What is {i}?")) for i in range(5)]
    nudged = nudged_answers(base, nudging, {"nudge_threshold": 0.4}, questions, 12)
    assert all(answer.pieces and any(piece.instead for piece in answer.pieces) for answer in nudged)
    contestants = [
        Answered("base alone", base.answers(questions, 12), [False] * 5),
        Answered("nudged", nudged, [False, None, False, True, False], True, 0.4),
    ]
    write_page(tmp_path / "page.html", questions, contestants, base, further=2)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"<article>\n<h2>(.+)</h2>", html) == [
        "Prompt (the best: nudged right, base alone wrong)", "Prompt (the first)", "Prompt", "Prompt"
    ]  # fmt: skip
    assert re.findall(r">What is (\d)\?</div>", html) == ["3", "0", "1", "2"]
    assert html.count("<h2>base alone</h2>") == html.count("<h2>nudged</h2>") == 4
    assert html.count("<dd>right</dd>") == 1 and html.count("<dd>wrong</dd>") == 6
    assert html.count("\nthe base alone: ") > 4 and "below γ = 0.4" in html
    first_two, others = html.split("<h2>Prompt</h2>", 1)
    assert "would have written:</p>" in first_two and "would have written:</p>" not in others


@pytest.mark.parametrize("changed", [{"text": 5}, {"text": ["<b>"]}, {"pieces": [[5, 1, None, None]]}])
def test_an_answer_of_a_hostile_file_is_refused(changed):
    with pytest.raises((TypeError, ValueError)):
        Answer.from_row(asdict(Answer.of_one_model("a", [1], True)) | changed)
