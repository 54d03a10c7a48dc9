"""A page of example answers beside each other: which questions are shown first, and what the base alone would have
written at their nudges. It knows answers and their marks, never how they came about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from .. import page
from ..continuations import with_continuations
from .prompts import Prompt
from .reader import Answer, Reader


@dataclass(frozen=True)
class Answered:
    """The answers of one contestant.

    Args:
        name: what it is called.
        answers: one for each question.
        right: whether each answer is right; `None` where that cannot be told.
        nudged: whether it is a nudged base.
        threshold: γ, if it is nudged with a fixed one.
    """

    name: str
    answers: Sequence[Answer]
    right: Sequence[bool | None]
    nudged: bool = False
    threshold: float | None = None


def best(nudged: Sequence[Answered]) -> Answered:
    """The contestant with most right answers and, among equals, the fewest nudged words."""
    return min(nudged, key=lambda each: (-each.right.count(True), sum(map(_nudged_share, each.answers))))


def chosen(base: Answered, nudged: Answered) -> dict[int, str]:
    """The questions that show most of a nudged base, by number, each with the reason.

    The best is one to which the nudged answer is right and the base's own is not, with as few nudged words as there
    are; the worst is the reverse. Where there is neither, the answers with most and fewest nudged words are taken.
    """
    by_share = sorted(range(len(nudged.answers)), key=lambda place: _nudged_share(nudged.answers[place]))
    helped = [place for place in by_share if (base.right[place], nudged.right[place]) == (False, True)]
    harmed = [place for place in by_share if (base.right[place], nudged.right[place]) == (True, False)]
    shown = [
        *((place, "the best: nudged right, base alone wrong") for place in helped[:1]),
        *((place, "the worst: nudged wrong, base alone right") for place in harmed[-1:]),
        (0, "the first"),
    ]
    if not (helped or harmed):
        shown += [(by_share[-1], "most nudged words"), (by_share[0], "fewest nudged words")]
    reasons: dict[int, list[str]] = {}
    for place, reason in shown:
        reasons.setdefault(place, []).append(reason)
    return {place: "; ".join(each) for place, each in reasons.items()}


def write_page(
    path: str | os.PathLike[str],
    questions: Sequence[Prompt],
    contestants: Sequence[Answered],
    base: Reader,
    further: int = 0,
) -> None:
    """Writes a page with the answers of all contestants to some questions beside each other.

    First come the questions of [`chosen`], with what `base` alone would have written from each nudge on, and then as
    many further ones as are wanted.

    Args:
        questions: all of them, one or more.
        contestants: the first is the base alone.
    """
    nudged = [each for each in contestants if each.nudged]
    first = chosen(contestants[0], best(nudged)) if nudged else {0: "the first"}
    others = islice((place for place in range(len(questions)) if place not in first), further)
    entries = []
    for place in (*first, *others):
        question, entry = questions[place], {}
        for each in contestants:
            answer, right = each.answers[place], each.right[place]
            pieces = answer.pieces
            if place in first and each.nudged:
                row = base.prompt_ids(question), answer.ids, pieces
                [pieces] = with_continuations(base.model, base.tokenizer, [row])
            figures = {} if right is None else {"marked": "right" if right else "wrong"}
            entry[each.name] = page.MarkedAnswer(question.question, pieces or answer.text, figures, base.word_boundary)
        entries.append(entry)
    headings = [f"Prompt ({reason})" for reason in first.values()]
    gammas = {each.threshold for each in nudged}
    page.write(path, entries, gammas.pop() if len(gammas) == 1 else None, "Answers side by side", headings)


def _nudged_share(answer: Answer) -> float:
    return answer.nudged_words / max(1, answer.words)
