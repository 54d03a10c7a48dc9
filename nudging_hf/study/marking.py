"""Reads what a text answers, and tells whether it is right. It knows texts, never models or files.

With a pattern, a text answers what the last match of the pattern holds. Without one, the right answer itself tells
how a text is read:

- a number: the last number of the text, as the nudging paper's authors score it, but with its sign;
- yes, no, true or false: the last verdict (see [`last_verdict`]);
- a capital letter from A to J: the last choice that the text states or marks;
- any other text of up to 12 words: what the text concludes with must contain it as whole words, whatever the case.
  That is what a box (`\\boxed{18}`) or a last line `#### 18` holds, or the rest of the sentence after the last "answer
  is" or "answer:", or else the last line.

No rule marks a longer answer: it is a reference for a judge. Two answers that are both numbers are compared as
numbers, with or without a pattern: "1,234", "1234.0" and "$1,234." are equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

LONGEST_ANSWER = 12  # In words.
_VERDICTS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_LABELS = "ABCDEFGHIJ"

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][-+]?\d+)?"
# A minus after a letter, a digit or a bracket is a hyphen, a range or a difference.
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}.%])[-−+])?[$€£]?(?:(?<=[$€£])[-−])?{_DIGITS}")
_WHOLE_NUMBER = re.compile(rf"\s*({_NUMBER.pattern})\s*%?[.,;:!?]?\s*")
_BOXED = re.compile(r".*\\boxed\{(.+?)\}|.*^####[ \t]*(\S[^\n]*?)\s*\Z", re.DOTALL | re.MULTILINE)
_STATED = re.compile(r"(?i)\banswer(?:\s+is\b|:)")
_AROUND = " \t\r\n.,;:!?\"'“”‘’()[]{}*_`$"


def number_of(text: str) -> float | None:
    """The number that a whole text is, such as "-1,234.50", "$18" or "18."; `None` if it is something else."""
    found = _WHOLE_NUMBER.fullmatch(text)
    return float(re.sub(r"[,$€£+]", "", found[1]).replace("−", "-")) if found else None


def last_number(text: str) -> str | None:
    """The last number of a text, as it stands there."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def last_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text states, marks or consists of: the last that it states, or else the last that it marks."""
    label = "|".join(map(re.escape, labels))
    stated = rf"(?i:\banswer|\bchoice|\boption)\b(?i:\s+is)?\W{{0,5}}\(?({label})\b(?!['’])"
    marked = rf"(?<!\w)\(?({label})[.):](?!\w)"
    for pattern in (stated, marked, rf"\A\W*({label})\W*\Z"):
        if found := re.findall(pattern, text):
            return found[-1]
    return None


YES, NO = r"yes|true", r"no|false"


def last_verdict(text: str, yes: str = YES, no: str = NO) -> str | None:
    """The verdict of a text, "yes" or "no".

    It is read after "answer is"; if there is none, at the start of a sentence; and otherwise anywhere. If there are
    several of one kind, the last one counts. `yes` and `no` are regular expressions without groups.
    """
    word = rf"(?:(?P<no>{no})|(?P<yes>{yes}))\b"
    for before in (r"\banswer(?:\s+is|:)\W{0,5}", r"(?:^|[.!?:]\W+)", r"\b"):
        found = list(re.finditer(before + word, text, re.IGNORECASE | re.MULTILINE))
        if found:
            return "no" if found[-1]["no"] else "yes"
    return None


def conclusion(text: str) -> str | None:
    """What a text concludes with, as the head of the module defines it."""
    return _conclusion(text) or next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)


def _conclusion(text: str) -> str | None:
    """What a text says that its answer is; `None` if it does not say that in so many words."""
    if boxed := _BOXED.match(text):
        return boxed[1] or boxed[2]
    stated = list(_STATED.finditer(text))
    rest = text[stated[-1].end() :].strip() if stated else ""
    return re.split(r"(?<=[.!?])\s|\n", rest, maxsplit=1)[0] or None


def reference(text: str) -> str:
    """The answer that is due where a worked solution is given: what it concludes with, if it says so.

    A text of more than 12 words counts as a whole unless it has a box or a last line `#### 18`, for "the answer is"
    may stand in it by chance.
    """
    if _BOXED.match(text) or len(text.split()) <= LONGEST_ANSWER:
        return (_conclusion(text) or text).strip()
    return text.strip()


class Rule(NamedTuple):
    """How a text is read and compared.

    Args:
        name: what is read, such as "the last number".
        read: what a text answers; `None` if it answers nothing.
        is_right: whether what was read is the answer that is due.
    """

    name: str
    read: Callable[[str], str | None]
    is_right: Callable[[str, str], bool]


def rule_for(answer: str, pattern: str | None = None) -> Rule | None:
    """The rule that marks answers where `answer` is due; `None` if it is too long to be found by a rule."""
    if pattern is not None:
        return Rule(f"the last match of {pattern!r}", lambda text: _last_match(pattern, text), _are_equal)
    if number_of(answer) is not None:
        return Rule("the last number", last_number, _are_equal)
    if answer.strip().lower() in _VERDICTS:
        return Rule("the last yes or no", last_verdict, lambda given, due: given == _VERDICTS[due.strip().lower()])
    if answer.strip() in set(_LABELS):
        return Rule("the last choice", lambda text: last_label(text, _LABELS), _are_equal)
    if len(answer.split()) > LONGEST_ANSWER:
        return None
    return Rule("what the text concludes with", conclusion, _contains)


def _last_match(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text)
    return found[-1] if found else None


def _are_equal(given: str, due: str) -> bool:
    numbers = number_of(given), number_of(due)
    return given.strip() == due.strip() if None in numbers else numbers[0] == numbers[1]


def _contains(given: str, due: str) -> bool:
    sought = " ".join(due.casefold().strip(_AROUND).split()) or due.strip()
    # Scripts without spaces between words have no ends of words to be found.
    edge = "" if max(sought) >= "\u2e80" else r"\w"
    before, after = (f"(?<!{edge})", f"(?!{edge})") if edge else ("", "")
    return bool(re.search(before + re.escape(sought) + after, " ".join(given.casefold().split())))
