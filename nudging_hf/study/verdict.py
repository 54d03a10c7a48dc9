"""The figures of a comparison in words: a verdict in one sentence, a table, and what can be told apart. It knows
scores and shares, never models or files.

Two contestants answer the same questions, so their difference is paired, and one is said to be above the other only
where the 95 % interval of the difference excludes 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import intervals
from .comparison import BASE, NUDGING, Result
from .intervals import Interval
from .prompts import Prompt, tasks_of
from .reader import Answer
from .tables import markdown_table, percent


@dataclass(frozen=True)
class Scores:
    """How good the answers of one contestant are. The same places in two contestants are the same questions.

    Args:
        marks: whether each answer is right, where that was marked.
        grades: a judge's grade from 1 to 5 of each answer, where it was graded and not marked.
    """

    marks: Sequence[bool] = ()
    grades: Sequence[float] = ()

    @property
    def are_measured(self) -> bool:
        return bool(self.marks or self.grades)

    @property
    def value(self) -> float:
        """The share of right answers if any were marked, or else the mean grade; larger is better."""
        counted = self.marks or self.grades
        return sum(counted) / len(counted)

    def __str__(self) -> str:
        return f"{sum(self.marks)} of {len(self.marks)}" if self.marks else f"{self.value:.2f}"

    @property
    def statement(self) -> str:
        """The value as a clause."""
        if self.marks:
            return f"{self} answers are right"
        return f"a judge's mean grade of {len(self.grades)} answers is {self} of 5"


class Difference(NamedTuple):
    """By how much one contestant is better than another, and the 95 % interval, as shares or in grades."""

    gain: float
    interval: Interval | None
    in_points: bool

    @property
    def direction(self) -> int:
        """1 if one is above the other, -1 if it is below, and 0 if that cannot be told."""
        if self.interval is None:
            return 0
        return (self.interval[0] > 0) - (self.interval[1] < 0)

    def __str__(self) -> str:
        scale, digits = (100, 0) if self.in_points else (1, 2)
        size = f"{abs(self.gain) * scale:.{digits}f}"
        said = f"{size} {'point' if self.in_points else 'grade'}{'' if size == '1' else 's'}"
        said += " less" if self.gain < 0 else " more"
        if self.interval is None:
            return f"{said} (on a single answer)"
        low, high = (f"{end * scale:+.{digits}f}".replace("-", "−") for end in self.interval)
        return f"{said} (95 % interval: {low} to {high})"


def difference(one: Scores, other: Scores) -> Difference:
    """The paired difference of two contestants, whose scores are measured."""
    if one.marks:
        pairs = list(zip(one.marks, other.marks, strict=True))
        counts = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        return Difference((counts[1] - counts[2]) / len(pairs), intervals.paired_difference(*counts), True)
    gains = [mine - its for mine, its in zip(one.grades, other.grades, strict=True)]
    return Difference(*intervals.mean(gains), False)


# The verdict --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nudged:
    """A nudged base with one setting, such as "γ = 0.4"; `None` stands for what was not measured.

    Args:
        scores: how good its answers are.
        nudge_rate: its share of nudged words.
        relative_time, relative_time_per_word: its time for an answer and for a word, as multiples of the base's.
    """

    setting: str
    scores: Scores
    nudge_rate: float | None
    relative_time: float | None = None
    relative_time_per_word: float | None = None


def verdict(base: Scores, nudging: Scores, nudged: Sequence[Nudged]) -> str:
    """Whether nudging helps, in one sentence: by how much, at which share of words, at what cost in time, and which
    setting to take. What was not measured is said to be so.

    Args:
        base, nudging: the scores of each model alone.
        nudged: one or more settings; the best of them is judged, and among equals the one that nudges least.
    """
    if not nudged:
        return "Whether nudging helps was not measured, because no nudged answer was."
    if not (base.are_measured and nudging.are_measured and all(each.scores.are_measured for each in nudged)):
        times = ["" if each.relative_time is None else f" ({_time(each)})" for each in nudged]
        costs = ", ".join(
            f"{_share(each)} with {each.setting}{time}" for each, time in zip(nudged, times, strict=True)
        )
        return (
            "Whether nudging helps, and which setting to take, was not measured, because no rule or judge marked the "
            f"answers; of the words, it nudges {costs}{'' if any(times) else '; the time was not measured'}."
        )
    best = min(nudged, key=lambda each: (-each.scores.value, each.nudge_rate or 0.0))
    over_base, over_nudging = difference(best.scores, base), difference(best.scores, nudging)
    better = "the base" if base.value >= nudging.value else "the nudging model"
    opening, advice = _judged(over_base.direction, over_nudging.direction, best.setting, len(nudged), better)
    return (
        f"{opening}: with {best.setting}, {best.scores.statement}, {over_base} than the base alone ({base}; the "
        f"nudging model alone: {nudging}), {_cost(best)}; {advice}."
    )


def _judged(over_base: int, over_nudging: int, setting: str, tried: int, better: str) -> tuple[str, str]:
    """How the verdict opens, and what it advises. `better` is the model that is better when each is alone."""
    among = f"the best of {tried} that were tried on these questions" if tried > 1 else "the only one that was tried"
    if over_base < 0 or over_nudging < 0:
        return "Nudging does not help", f"take {better} alone, or try another setting than {setting}"
    if over_base > 0 and over_nudging > 0:
        return "Nudging helps", f"take {setting}, {among}"
    if over_base > 0:
        opening = "Nudging helps the base, but cannot be told apart from the nudging model alone"
        return opening, f"take {setting}, {among}"
    return "It cannot be told from so few questions whether nudging helps", f"{setting} is {among}"


def _cost(each: Nudged) -> str:
    return f"{_share(each)} of the words nudged, {_time(each)}"


def _share(each: Nudged) -> str:
    return "an unknown share" if each.nudge_rate is None else f"{each.nudge_rate:.1%}"


def _time(each: Nudged) -> str:
    if each.relative_time is None:
        return "the time was not measured"
    time = f"{each.relative_time:.2g} times the base's time for an answer"
    if each.relative_time_per_word is not None:
        time += f" and {each.relative_time_per_word:.2g} times for a word"
    return time


# A comparison -------------------------------------------------------------------------------------------------------

LEGEND = (
    "Shares are in percent, and so is the 95 % interval (Wilson's) of the share of right answers. grade: the judge's "
    "mean grade from 1 to 5 where no right answer is known. nudged words: the share of words of which the nudging "
    "model wrote at least a character. time: seconds for a question, as a multiple of the base's alone. a word: "
    "seconds for a word, likewise; a base that is done sooner has written less. words: the mean number of words of an "
    "answer. passes: forward passes of the large model and of the small ones, each for a batch of questions at once."
)


def scores_of(result: Result) -> Scores:
    """The scores of a contestant of a comparison."""
    return Scores(result.marks(), result.grades())


def of_comparison(results: Sequence[Result]) -> str:
    """The [`verdict`] on a comparison in which each model alone took part."""
    alone = {result.name: result for result in results}
    base = alone[BASE]
    nudged = [
        Nudged(
            result.contestant.setting,
            scores_of(result),
            result.nudge_rate,
            result.seconds / base.seconds,
            _ratio(result.seconds_per_word, base.seconds_per_word),
        )
        for result in results
        if result.contestant.nudged
    ]
    return verdict(scores_of(base), scores_of(alone[NUDGING]), nudged)


def table(results: Sequence[Result]) -> str:
    """One line for each contestant, in Markdown. The first result is the base's alone."""
    base = results[0]
    tasks = tasks_of(base.questions)
    marked, graded = bool(base.marks()), bool(base.grades())
    head = [
        *([*(task or "(no task)" for task in tasks), "all", "95 %"] if marked else []),
        *(["grade"] if graded else []),
    ]
    head += ["nudged words", "time", "a word", "words", "large passes", "small passes"]
    rows = []
    for result in results:
        row = [result.name]
        if marked:
            row += [*(_number(result.accuracy(task)) for task in (*tasks, None)), _range(result.interval())]
        if graded:
            row.append(f"{intervals.mean(result.grades())[0]:.2f}")
        row += [
            _number(result.nudge_rate),
            f"{result.seconds / base.seconds:.2f}",
            "-" if (ratio := _ratio(result.seconds_per_word, base.seconds_per_word)) is None else f"{ratio:.2f}",
            f"{result.words:.0f}",
            *("-" if n is None else f"{n:,}" for n in (result.large_passes, result.small_passes)),
        ]
        rows.append(row)
    return markdown_table(["", *head], rows)


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _number(share: float | None) -> str:
    """A share in percent, without the sign."""
    return percent(share).removesuffix("%")


def _range(interval: Interval | None) -> str:
    return "-" if interval is None else " to ".join(f"{100 * end:.0f}" for end in interval)


def sentences(results: Sequence[Result]) -> list[str]:
    """For each nudged contestant: whether it is above each of the others, or cannot be told apart from it."""
    return [
        _against(nudged, other)
        for nudged in results
        for other in results
        if nudged.contestant.nudged and not other.contestant.nudged and scores_of(nudged).are_measured
    ]


def _against(nudged: Result, other: Result) -> str:
    mine, its = scores_of(nudged), scores_of(other)
    found = difference(mine, its)
    said = {1: "is above", -1: "is NOT above", 0: "cannot be told apart from"}[found.direction]
    return f"{nudged.name} {said} {other.name}: {mine} against {its}, {found}."


def nothing_right(answered: Mapping[str, Sequence[tuple[Prompt, Answer]]]) -> list[str]:
    """For each contestant that is right on no question: one of its answers, what was read there, and by which rule.

    Args:
        answered: the questions and answers of each contestant, by its name.
    """
    found = {name: said for name, pairs in answered.items() if (said := unread(name, pairs)) is not None}
    marked = [name for name, pairs in answered.items() if any(question.is_labelled for question, _ in pairs)]
    warning = "NOBODY is right on any question: look whether the answers are read as they are meant."
    return [*([warning] if found and len(found) == len(marked) else []), *found.values()]


def unread(name: str, answered: Sequence[tuple[Prompt, Answer]]) -> str | None:
    """What [`nothing_right`] says of one contestant; `None` if it is right on a question, or none can be marked."""
    marked = [(question, answer) for question, answer in answered if question.is_labelled]
    if not marked or any(question.is_right(answer.text) for question, answer in marked):
        return None
    question, answer = marked[0]
    given = question.answer_in(answer.text)
    assert question.rule is not None and question.answer is not None
    return (
        f"{name} is right on none of {len(marked)}. Asked {_shown(question.question)}, it wrote "
        f"{_shown(answer.text)}; {_shown(question.answer)} was due, and {question.rule.name} "
        f"{'found nothing' if given is None else f'is {_shown(given)}'}."
    )


def _shown(text: str) -> str:
    """A text in one line, of which a long one keeps both ends."""
    text = " ".join(text.split())
    return f"“{text if len(text) <= 160 else f'{text[:90]} ... {text[-60:]}'}”"
