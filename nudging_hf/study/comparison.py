"""Nudging beside each model alone and beside its rivals, on the same questions. It knows models, answers and figures,
never files or terminals.

*Contestants* take turns: all of them answer a batch of questions before any of them answers the next one, so that the
load of the machine affects all of them equally. All decode greedily. A rule marks the answers to questions whose right
answer it can find. The others are left to a judge, if there is one.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..core.config import NudgingConfig
from . import judge
from .baselines import STOP_STRING, ensemble, in_context, proxy_tuning
from .intervals import Interval, wilson
from .journal import Journal
from .prompts import Prompt, tasks_of
from .reader import Answer, Reader, inputs_of_both, nudged_answers, pair_of, share_vocabulary
from .tables import share_of

BASE, NUDGING, NUDGED = "base alone", "nudging model alone", "nudged"
ENSEMBLE, PROXY, IN_CONTEXT, ALIGNED = "ensemble", "proxy tuning", "in-context", "large aligned"
_SHARED = " (shared)"  # Follows the name of a contestant that uses the second nudging model.


# Who answers --------------------------------------------------------------------------------------------------------

# Answers some prompts with at most so many new tokens each.
Write = Callable[[Sequence[Prompt], int], list[Answer]]


@dataclass(frozen=True)
class Contestant:
    """Who answers: one model alone, or several together.

    `large` and `small` are its models of the base's size and of the nudging model's, whose forward passes are
    counted. `nudged` says whether it has a nudge rate, and `setting` with which gate and threshold it is nudged.
    """

    name: str
    write: Write
    large: Reader | None = None
    small: tuple[Reader, ...] = ()
    nudged: bool = False
    setting: str = ""


@dataclass(frozen=True)
class Models:
    """The models that contestants are made of: a pair, and perhaps others.

    Args:
        shared: a second nudging model, which has the base's vocabulary, or a `ValueError` says so. The base is nudged
            by it too, and it takes the place of `nudging` in the ensemble and in proxy tuning.
        unaligned: the model that is mixed in, before its alignment.
        large_aligned: the model that alignment makes of the base.
    """

    base: Reader
    nudging: Reader
    shared: Reader | None = None
    unaligned: Reader | None = None
    large_aligned: Reader | None = None

    def __post_init__(self) -> None:
        if self.shared is not None and (why := _other_vocabulary(self.base, self.shared)):
            raise ValueError(f"The shared nudging model needs the base's vocabulary: {why}.")


def contestants_of(
    models: Models, configs: Sequence[NudgingConfig], with_rivals: bool = True
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that some models make, in the order of the table, and why others are not among them, by name.

    The words of all answers are counted by the `word_boundary` of `configs`.

    Args:
        configs: parameters of nudging that differ in gate and threshold; the base is nudged with each.
        with_rivals: whether the ensemble, proxy tuning and in-context alignment take part.
    """
    if configs:
        for reader in filter(None, vars(models).values()):
            reader.word_boundary = configs[0].word_boundary
    base, nudging, shared, large_aligned = models.base, models.nudging, models.shared, models.large_aligned
    found = [Contestant(BASE, base.answers, large=base), Contestant(NUDGING, nudging.answers, small=(nudging,))]
    left_out: dict[str, str] = {}
    for small, mark in ((nudging, ""), (shared, _SHARED)):
        if small is not None:
            for config in configs:
                gate = "γ =" if config.nudge_gate == NudgingConfig.nudge_gate else config.nudge_gate
                setting = f"{gate} {config.nudge_threshold}"
                write = partial(nudged_answers, base, small, config)
                name = f"{NUDGED}{mark}, {setting}"
                found.append(Contestant(name, write, base, (small,), nudged=True, setting=setting + mark))
    if with_rivals:
        rivals, left_out = _rivals_of(models)
        found += rivals
    if large_aligned is None:
        left_out[ALIGNED] = "it was not given"
    else:
        found.append(Contestant(ALIGNED, large_aligned.answers, large=large_aligned))
    return found, left_out


def _rivals_of(models: Models) -> tuple[list[Contestant], dict[str, str]]:
    """The other ways to align a base without training, and the reasons why some cannot take part."""
    base, unaligned = models.base, models.unaligned
    small, mark = (models.nudging, "") if models.shared is None else (models.shared, _SHARED)
    found: list[Contestant] = []
    left_out: dict[str, str] = {}
    if why := _other_vocabulary(base, small):
        left_out |= dict.fromkeys((ENSEMBLE, PROXY), f"it needs one vocabulary: {why}")
    else:
        found.append(Contestant(ENSEMBLE + mark, partial(_mixed_answers, base, small, ensemble), base, (small,)))
        if unaligned is None:
            left_out[PROXY] = "the nudging model before its alignment was not given"
        elif why := _other_vocabulary(base, unaligned, "unaligned"):
            left_out[PROXY] = f"it needs one vocabulary: {why}"
        else:
            mix = partial(proxy_tuning, unaligned_model=unaligned.model, unaligned_tokenizer=unaligned.tokenizer)
            write = partial(_mixed_answers, base, small, mix)
            found.append(Contestant(PROXY + mark, write, base, (small, unaligned)))
    found.append(Contestant(IN_CONTEXT, partial(_in_context_answers, base), large=base))
    return found, left_out


def _other_vocabulary(base: Reader, small: Reader, which: str = "nudging") -> str:
    """How the vocabularies of two models differ; "" if they have one."""
    if share_vocabulary(base, small):
        return ""
    sizes = len(base.tokenizer), len(small.tokenizer)
    return f"the base has {sizes[0]} tokens, and the {which} model {sizes[1]}, with other ids or spellings"


def _mixed_answers(
    base: Reader, nudging: Reader, mix: Callable[..., Any], prompts: Sequence[Prompt], max_new_tokens: int
) -> list[Answer]:
    """The answers of the ensemble or of proxy tuning, which end with an EOS of either model."""
    inputs = inputs_of_both(base, nudging, prompts, max_new_tokens)
    sequences = mix(base.model, **inputs, **pair_of(base, nudging).arguments)
    return base.answers_of(sequences[:, inputs["input_ids"].shape[1] :], base.eos | nudging.eos)


def _in_context_answers(base: Reader, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
    inputs = base.inputs(prompts, max_new_tokens)
    sequences = in_context(base.model, **inputs, tokenizer=base.tokenizer)
    answers = []
    for answer in base.answers_of(sequences[:, inputs["input_ids"].shape[1] :], base.eos):
        text, stop, _ = answer.text.partition(STOP_STRING)
        answers.append(Answer.of_one_model(text, answer.ids, answer.finished or bool(stop), base.word_boundary))
    return answers


# How they take turns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A contestant's answers to a batch of questions, which of them are right, and what they took.

    That is seconds by the wall clock, and forward passes of models of either size. `right` is `None` where no rule
    can tell.
    """

    seconds: float
    large_passes: int
    small_passes: int
    answers: list[Answer]
    right: list[bool | None]

    @classmethod
    def from_row(cls, questions: int, row: dict[str, Any]) -> Turn:
        """The inverse of `asdict`, for a turn of so many questions."""
        turn = cls(**{**row, "answers": [Answer.from_row(answer) for answer in row["answers"]]})
        if len(turn.answers) != questions or len(turn.right) != questions:
            raise ValueError(f"A turn of {questions} questions has {len(turn.answers)} answers.")
        return turn


def take_turn(contestant: Contestant, questions: Sequence[Prompt], max_new_tokens: int) -> Turn:
    """Lets a contestant answer a batch of questions."""
    with counted_passes(contestant.large) as large_passes, counted_passes(*contestant.small) as small_passes:
        began = time.perf_counter()
        answers = contestant.write(questions, max_new_tokens)
        seconds = time.perf_counter() - began
    right = [
        question.is_right(answer.text) if question.is_labelled else None
        for question, answer in zip(questions, answers, strict=True)
    ]
    return Turn(seconds, large_passes.total(), small_passes.total(), answers, right)


@contextmanager
def counted_passes(*readers: Reader | None) -> Iterator[Counter[str]]:
    """Counts the forward passes of some models, whoever asks for them."""
    passes: Counter[str] = Counter()
    with ExitStack() as hooks:
        for reader in filter(None, readers):
            hook = reader.model.register_forward_pre_hook(lambda *_: passes.update(["forward"]))
            hooks.callback(hook.remove)
        yield passes


def compare(
    contestants: Sequence[Contestant],
    questions: Sequence[Prompt],
    journal: Journal,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: Callable[[str, int], None] = lambda contestant, answered: None,
) -> list[Result]:
    """Lets all contestants answer all questions, `batch_size` at once, and returns one result for each contestant.

    Args:
        questions: one or more prompts. The answers to those whose right answer no rule can find are judged by a
            model if `NUDGING_HF_JUDGE` names one.
        journal: keeps every turn and what the judge says of it; what it holds is not done again.
        max_new_tokens: the limit on an answer, in tokens of the model that writes it.
        progress: is called with a contestant's name and the number of questions after each of its turns.
    """
    turns: dict[str, list[Turn]] = {contestant.name: [] for contestant in contestants}
    judged: dict[str, list[Grades]] = {contestant.name: [] for contestant in contestants}
    warm = set()

    def take(contestant: Contestant, batch: Sequence[Prompt]) -> dict[str, Any]:
        if contestant.name not in warm:  # Some work is done only in a model's first pass on a device: it is not timed.
            contestant.write(batch, 2)
            warm.add(contestant.name)
        return asdict(take_turn(contestant, batch, max_new_tokens))

    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        for contestant in contestants:
            key = {"contestant": contestant.name, "start": start}
            turn = journal.once(key, partial(take, contestant, batch), partial(Turn.from_row, len(batch)))
            turns[contestant.name].append(turn)
            if judge.is_wanted() and None in turn.right:
                own = {**key, "judge": judge.name()}
                judged[contestant.name] += journal.once(own, partial(judged_turn, batch, turn))
            else:
                judged[contestant.name] += [{}] * len(batch)
            progress(contestant.name, len(batch))
    return [Result(each, tuple(questions), tuple(turns[each.name]), tuple(judged[each.name])) for each in contestants]


# What a judge says of an answer, by name: whether it is "correct", or a grade for each aspect; nothing of those that
# it was not asked about.
Grades = dict[str, int]


def judged_turn(questions: Sequence[Prompt], turn: Turn) -> list[Grades]:
    """What the judge says of a turn's answers that no rule can mark: [`~judge.verdict`]."""
    return [
        judge.grades(question.question, answer.text, question.answer) if right is None else {}
        for question, answer, right in zip(questions, turn.answers, turn.right, strict=True)
    ]


# The figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A contestant's turns as figures. Shares are numbers from 0 to 1; `None` stands for a share of nothing.

    `judged` is what the judge said of each answer; it may be left out if there is no judge.
    """

    contestant: Contestant
    questions: tuple[Prompt, ...]
    turns: tuple[Turn, ...]
    judged: tuple[Grades, ...] = ()

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def answers(self) -> list[Answer]:
        return [answer for turn in self.turns for answer in turn.answers]

    @property
    def answered(self) -> list[tuple[Prompt, Answer]]:
        """Each question with its answer."""
        return list(zip(self.questions, self.answers, strict=True))

    @property
    def right(self) -> list[bool | None]:
        """Whether each answer is right, by its rule or by the judge; `None` where neither can tell."""
        found = [right for turn in self.turns for right in turn.right]
        for place, grades in enumerate(self.judged):
            if "correct" in grades:
                found[place] = bool(grades["correct"])
        return found

    def marks(self, task: str | None = None) -> list[bool]:
        """Whether each answer is right that can be told: those to the questions of one task, or all."""
        marks = zip(self.questions, self.right, strict=True)
        return [right for question, right in marks if right is not None and task in (None, question.task)]

    def grades(self) -> list[float]:
        """The mean grade from 1 to 5 of each answer that a judge has graded by aspects."""
        graded = [grades for grades in self.judged if grades and "correct" not in grades]
        return [statistics.fmean(grades.values()) for grades in graded]

    def accuracy(self, task: str | None = None) -> float | None:
        marks = self.marks(task)
        return share_of(sum(marks), len(marks))

    def interval(self, task: str | None = None) -> Interval | None:
        """The 95 % interval of the accuracy."""
        marks = self.marks(task)
        return wilson(sum(marks), len(marks)) if marks else None

    @property
    def nudged_words(self) -> tuple[int, int]:
        """How many words of all answers the nudging model wrote at least a character of, and how many there are."""
        return sum(answer.nudged_words for answer in self.answers), sum(answer.words for answer in self.answers)

    @property
    def nudge_rate(self) -> float | None:
        """The share of nudged words."""
        return share_of(*self.nudged_words) if self.contestant.nudged else None

    @property
    def words(self) -> float:
        """The mean number of words of an answer."""
        return statistics.fmean(answer.words for answer in self.answers)

    @property
    def seconds(self) -> float:
        return sum(turn.seconds for turn in self.turns)

    @property
    def seconds_per_word(self) -> float | None:
        return self.seconds / (self.words * len(self.answers)) if self.words else None

    @property
    def large_passes(self) -> int | None:
        return sum(turn.large_passes for turn in self.turns) if self.contestant.large is not None else None

    @property
    def small_passes(self) -> int | None:
        return sum(turn.small_passes for turn in self.turns) if self.contestant.small else None

    def as_dict(self, base: Result) -> dict[str, Any]:
        """All figures, for JSON; times are in seconds, and relative to those of the base alone."""
        tasks = tasks_of(self.questions)
        return {
            "name": self.name,
            "accuracy": {task: self.accuracy(task) for task in tasks} | {"all": self.accuracy()},
            "interval": {task: self.interval(task) for task in tasks} | {"all": self.interval()},
            "right": sum(self.marks()),
            "marked": len(self.marks()),
            "grade": statistics.fmean(self.grades()) if self.grades() else None,
            "questions": len(self.questions),
            "nudge_rate": self.nudge_rate,
            "words_per_answer": self.words,
            "seconds": self.seconds,
            "relative_time": self.seconds / base.seconds,
            "seconds_per_word": self.seconds_per_word,
            "large_forward_passes": self.large_passes,
            "small_forward_passes": self.small_passes,
        }
