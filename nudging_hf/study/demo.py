"""The demonstration: a pair of models on questions with known answers. It knows models and scores, never a terminal.

A pair's folder holds `heldout.jsonl`, the questions, and `models/base` and `models/nudging`. Two more are used where
they stand: `models/nudging-shared`, a nudging model with the base's own vocabulary, and `models/large-aligned`, what
the base becomes by training instead of nudging. A row of `heldout.jsonl`:

    {"task": "sums", "prompt": what the base is given, "messages": what an aligned model is given, as chat messages,
     "pattern": a regular expression with one group, "answer": what its last match in a right answer holds}
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..core.config import NudgingConfig
from ..provenance import Piece, count_nudged_words, spans
from ..streaming import MarkingStreamer
from . import comparison
from .analysis import Reader
from .comparison import counted_passes, write_alone, write_nudged

MAX_NEW_TOKENS = 220  # Half as many again as the longest right answer of examples/mini, in tokens.


class Question(comparison.Question):
    """A question, in the words of both prompts, and how to find the answer given to it."""

    @property
    def text(self) -> str:
        """The question itself, as the aligned models are asked it."""
        return self.messages[-1]["content"]

    def given(self, text: str) -> str | None:
        """The answer that a text gives: what the last match of `pattern` holds, if there is one."""
        assert self.pattern is not None
        found = re.findall(self.pattern, text)
        return found[-1] if found else None


def read_questions(path: Path) -> list[Question]:
    """The questions of a `heldout.jsonl`; for the errors see [`comparison.read_questions`]."""
    return [Question(**vars(question)) for question in comparison.read_questions(path)]


class LM(Reader):
    """A causal LM and its tokenizer."""

    @classmethod
    def load(cls, folder: Path, chat: bool = True) -> LM:
        """The model of a folder; `chat` says whether it is asked by its chat template, if it has one."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, chat)


@dataclass(frozen=True)
class Pair:
    """The models of a pair's folder, and its questions."""

    folder: Path
    questions: list[Question]
    base: LM
    nudging: LM
    nudging_shared: LM | None
    large_aligned: LM | None

    @classmethod
    def load(cls, folder: Path) -> Pair:
        """Loads a pair's folder.

        Raises:
            FileNotFoundError: where the questions, the base or the nudging model are missing.
            ValueError: where `heldout.jsonl` is not made of questions.
        """
        models = folder / "models"
        for needed in (folder / "heldout.jsonl", models / "base", models / "nudging"):
            if not needed.exists():
                raise FileNotFoundError(f"{needed} is missing: name the folder of another pair by --pair.")
        questions = read_questions(folder / "heldout.jsonl")
        shared, large = models / "nudging-shared", models / "large-aligned"
        return cls(
            folder=folder,
            questions=questions,
            base=LM.load(models / "base", chat=False),
            nudging=LM.load(models / "nudging"),
            nudging_shared=LM.load(shared) if shared.exists() else None,
            large_aligned=LM.load(large) if large.exists() else None,
        )


def find_pair() -> Path:
    """`examples/mini` of the current folder, or else of the checkout that the package is installed from.

    Raises:
        FileNotFoundError: where there is neither.
    """
    for start in (Path(), Path(__file__).parents[2]):
        if (start / "examples" / "mini" / "heldout.jsonl").exists():
            return start / "examples" / "mini"
    raise FileNotFoundError("No examples/mini here: run from a checkout of the project, or name a folder by --pair.")


# What is measured ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One answer, piece by piece."""

    question: Question
    pieces: list[Piece]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def given(self) -> str | None:
        return self.question.given(self.text)

    @property
    def correct(self) -> bool:
        return self.given == self.question.answer

    @property
    def nudged_spans(self) -> list[tuple[int, int]]:
        """Where the nudging model wrote, in characters of `text`: starts and ends."""
        return [(span.start, span.end) for span in spans(self.pieces) if span.nudged]


@dataclass(frozen=True)
class Contestant:
    """Who answers: one model alone or two together.

    Args:
        name: as tables have it.
        large: of the large size, a base or an aligned model.
        small: a nudging model.
    """

    name: str
    large: LM | None = None
    small: LM | None = None

    @property
    def is_nudged(self) -> bool:
        return self.large is not None and self.small is not None


BASE, NUDGING, NUDGED, SHARED, ALIGNED = (
    "base alone",
    "nudging alone",
    "nudged",
    "nudged (shared)",
    "large aligned",
)


def contestants(pair: Pair) -> list[Contestant]:
    """All that a pair's folder has models for."""
    found = [
        Contestant(BASE, large=pair.base),
        Contestant(NUDGING, small=pair.nudging),
        Contestant(NUDGED, large=pair.base, small=pair.nudging),
    ]
    if pair.nudging_shared is not None:
        found.append(Contestant(SHARED, large=pair.base, small=pair.nudging_shared))
    if pair.large_aligned is not None:
        found.append(Contestant(ALIGNED, large=pair.large_aligned))
    return found


@dataclass(frozen=True)
class Result:
    """A contestant's answers and what they took.

    Args:
        large_passes, small_passes: forward passes of the large and of the small model, all batches together; `None`
            where it took no part.
        seconds: of the wall clock.
    """

    contestant: Contestant
    answers: list[Answer]
    large_passes: int | None
    small_passes: int | None
    seconds: float

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(answer.question.task for answer in self.answers))

    def accuracy(self, task: str | None = None) -> float:
        """The share of right answers, to the questions of one task or to all."""
        marks = [answer.correct for answer in self.answers if task in (None, answer.question.task)]
        return sum(marks) / len(marks)

    @property
    def right(self) -> int:
        return sum(answer.correct for answer in self.answers)

    @property
    def nudged_words(self) -> tuple[int, int]:
        """Nudged words and words of all answers."""
        counts = [count_nudged_words(answer.pieces) for answer in self.answers]
        return sum(nudged for nudged, _ in counts), sum(words for _, words in counts)


# How it is measured -------------------------------------------------------------------------------------------------


def stream_answer(pair: Pair, question: Question, threshold: float, write: Callable[[str, bool], None]) -> Answer:
    """The nudged answer to one question, handed to `write(text, nudged)` as it is written."""
    streamer = MarkingStreamer(pair.base.tokenizer, write)
    knobs = NudgingConfig(nudge_threshold=threshold)
    [pieces] = write_nudged(pair.base, pair.nudging, knobs, [question], MAX_NEW_TOKENS, streamer)
    return Answer(question, pieces)


def evaluate(
    contestant: Contestant,
    questions: Sequence[Question],
    threshold: float,
    batch_size: int,
    progress: Callable[[int], None] = lambda answered: None,
) -> Result:
    """Lets a contestant answer, greedily, `batch_size` questions at a time.

    Args:
        progress: called with the number of questions after each batch of them.
    """
    began = time.monotonic()
    answers: list[Answer] = []
    with counted_passes(contestant.large) as large, counted_passes(contestant.small) as small:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            answers += _answer(contestant, batch, threshold)
            progress(len(batch))
    return Result(
        contestant=contestant,
        answers=answers,
        large_passes=large.total() if contestant.large else None,
        small_passes=small.total() if contestant.small else None,
        seconds=time.monotonic() - began,
    )


def _answer(contestant: Contestant, questions: Sequence[Question], threshold: float) -> list[Answer]:
    large, small = contestant.large, contestant.small
    if large is not None and small is not None:
        written = write_nudged(large, small, NudgingConfig(nudge_threshold=threshold), questions, MAX_NEW_TOKENS)
    else:
        lm = large or small
        assert lm is not None
        written = write_alone(lm, small is not None, questions, MAX_NEW_TOKENS)
    return [Answer(*answer) for answer in zip(questions, written, strict=True)]


# How it is told -----------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """One line a contestant: accuracies, the share of nudged words, forward passes."""
    if not results:
        return ""
    tasks = results[0].tasks
    rows = [
        ["", *[""] * len(tasks), "", "nudged", "passes", "passes"],
        ["", *tasks, "all", "words", "large", "small"],
    ]
    for result in results:
        rows.append([
            result.name,
            *(f"{result.accuracy(task):.0%}" for task in tasks),
            f"{result.accuracy():.0%}",
            _share(*result.nudged_words) if result.contestant.is_nudged else "-",
            *("-" if passes is None else f"{passes:,}" for passes in (result.large_passes, result.small_passes)),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(2, "-" * max(map(len, lines)))
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> list[str]:
    """What the figures show, in sentences made of them."""
    found = {result.name: result for result in results}
    if NUDGED not in found:
        return []
    nudged, count = found[NUDGED], len(found[NUDGED].answers)
    others = {
        SHARED: "nudged by the model that shares the base's vocabulary",
        BASE: "by the base alone",
        NUDGING: "by the nudging model alone",
        ALIGNED: "by the large aligned model",
    }
    present = [(how, found[name]) for name, how in others.items() if name in found]
    right = ", ".join([f"{nudged.right} nudged", *(f"{result.right} {how}" for how, result in present)])
    gains = [
        f"{nudged.right - found[name].right:+d} against {who}"
        for name, who in ((BASE, "the base alone"), (NUDGING, "the nudging model alone"))
        if name in found
    ]
    wrote = f"The nudging model wrote {_share(*nudged.nudged_words)} of the words of the nudged answers"
    if BASE in found:
        passes = f"{nudged.large_passes:,} forward passes for them, and {found[BASE].large_passes:,}"
        wrote += f"; the base made {passes} for its own"
    return [
        f"Right answers to {count} questions: {right}.",
        *([f"What nudging changes: {', '.join(gains)}."] if gains else []),
        f"{wrote}.",
        f"A share of {count} questions is uncertain by about {98 / count**0.5:.0f} points either way.",  # 1.96 / 2
    ]


def as_dict(results: Sequence[Result]) -> list[dict[str, Any]]:
    """All figures and answers, for JSON."""
    return [
        {
            "name": result.name,
            "accuracy": {**{task: result.accuracy(task) for task in result.tasks}, "all": result.accuracy()},
            "right": result.right,
            "questions": len(result.answers),
            "nudged_words": result.nudged_words[0] if result.contestant.is_nudged else None,
            "words": result.nudged_words[1],
            "large_forward_passes": result.large_passes,
            "small_forward_passes": result.small_passes,
            "seconds": round(result.seconds, 3),
            "answers": [
                {
                    "task": answer.question.task,
                    "question": answer.question.text,
                    "answer": answer.question.answer,
                    "given": answer.given,
                    "correct": answer.correct,
                    "text": answer.text,
                    "nudged_spans": answer.nudged_spans if result.contestant.is_nudged else None,
                }
                for answer in result.answers
            ],
        }
        for result in results
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
