"""Tests how answers are read and marked without a pattern, and how numbers compare."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nudging_hf.chats import messages_of
from nudging_hf.study.marking import LONGEST_ANSWER, number_of, reference, rule_for
from nudging_hf.study.prompts import Prompt


def is_right(text, answer, pattern=None):
    return Prompt(messages_of("?"), pattern=pattern, answer=answer).is_right(text)


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.0", "{:,}.00", "${}", " {}. ", "{}%"]),
       st.sampled_from(["{}", "So 3 and then {}.", "It is {:,}!", "**${:,}**", "x = {}.0, so"]))  # fmt: skip
def test_a_number_is_right_however_it_is_written(number, due, text):
    text = text.format(number)
    assert is_right(text, due.format(number)) and is_right(text, due.format(number), r"(-?[\d,.]+)")
    assert not is_right(text, due.format(number + 1)) and not is_right("None.", due.format(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.5", 1234.5), ("−5", -5), ("-$5", -5), ("$-5", -5), (".5", 0.5), ("1e3", 1000), ("18 apples", None),
     ("1/2", None), ("", None), ("a1", None), ("3-4", None)],
)  # fmt: skip
def test_a_whole_text_is_a_number_or_is_not(text, number):
    assert number_of(text) == number


@pytest.mark.parametrize(
    ("answer", "rule", "right", "wrong"),
    [
        ("-5", "the last number", ["It is -5.", "2 - 7 = -5"], ["5", "10-5", "7 - 5", "-5, no: 6"]),
        ("7", "the last number", ["10-7", "2 + 5 = 7."], ["7 - 1 = 6", "17", ""]),
        ("yes", "the last yes or no", ["Yes.", "True", "No? So the answer is yes."], ["No.", "yesterday", ""]),
        ("False", "the last yes or no", ["No, it is not.", "false"], ["Yes."]),
        ("B", "the last choice", ["B", "The answer is (B).", "(A) no. B. yes"], ["A", "The answer is A. B", "Bob"]),
        (
            "Paris",
            "what the text concludes with",
            ["Paris", "So the answer is **paris**, in France. Ask me more!", "Rome is not it.\nIt is Paris\n"],
            ["The answer is Rome. Paris", "Paris\nRome", "Parisian", ""],
        ),
        ("New  York", "what the text concludes with", ["#### new york", "In New York."], ["York", "New\nYork"]),
        ("巴黎", "what the text concludes with", ["答案是巴黎。"], ["罗马"]),
        ("C++", "what the text concludes with", ["Answer: C++."], ["Answer: C"]),
        ("?!", "what the text concludes with", ["?!"], ["?"]),
    ],
)  # fmt: skip
def test_the_answer_tells_how_a_text_is_read(answer, rule, right, wrong):
    assert rule_for(answer).name == rule
    assert [text for text in right if not is_right(text, answer)] == []
    assert [text for text in wrong if is_right(text, answer)] == []


def test_a_long_answer_is_a_reference_and_no_rule_marks_it():
    assert rule_for(" ".join(["a"] * LONGEST_ANSWER)) and rule_for(" ".join(["a"] * (LONGEST_ANSWER + 1))) is None
    assert rule_for("word " * 20, "(a)").name == "the last match of '(a)'"


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("9 + 9 = 18\n#### 1,018\n", "1,018"),
        (r"So it is $\boxed{18}$.", "18"),
        ("So the answer is 19.", "19."),
        ("#### Steps\nFirst one, then the other, for the answer is in between, and so on and on.", None),
        ("Paris", None),
    ],
)
def test_of_a_worked_solution_the_conclusion_is_due(text, due):
    assert reference(text) == (due or text)
    assert rule_for(reference(text)) is None or is_right(f"Yes.\n{text}", reference(text))


def test_what_a_pattern_takes_is_compared_as_text_or_as_a_number():
    assert is_right("First 7, then 42.", "42", r"(\d+)") and not is_right("42, no: 7.", "42", r"(\d+)")
    assert is_right('So "ol".', "ol", '"([a-z]+)"') and not is_right('So "olo".', "ol", '"([a-z]+)"')
    assert is_right("= 1234.0", "1,234", r"= (\S+)")
