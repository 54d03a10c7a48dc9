"""Nudging beside each model alone and beside its rivals, on questions with known answers. It knows models, answers and
figures, never files or terminals.

*Contestants* take turns: all of them answer a batch of questions before any of them answers the next one, so that what
else the machine is doing weighs on all alike. All are greedy. Of two accuracies the *difference* has a standard error
of its own, for both are of the same questions: that of the mean of what each question adds to it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..core.answer import OneVocabulary, answer_class
from ..core.config import NudgingConfig
from ..core.generate import generate
from ..provenance import Piece, count_nudged_words, pieces_of
from .analysis import Reader
from .baselines import STOP_STRING, ensemble, in_context, proxy_tuning
from .calibration import Prompt, read_lines, read_prompts
from .journal import Journal

BASE, NUDGING, NUDGED, ENSEMBLE, PROXY, IN_CONTEXT, ALIGNED = (
    "base alone",
    "nudging model alone",
    "nudged",
    "ensemble",
    "proxy tuning",
    "in-context",
    "large aligned",
)
_SHARED = " (shared)"  # Behind the name of who is helped by the second nudging model.
_TOLD_APART = 2  # Standard errors: of a difference of fewer, the questions do not tell that it is there.


@dataclass(frozen=True)
class Question(Prompt):
    """A prompt with a known answer, and the task that it belongs to, if it has one."""

    task: str = ""


Asked = TypeVar("Asked", bound=Question)


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file, as [`read_prompts`] reads them; a field `task` says what a question belongs to.

    Raises:
        ValueError: for a file that has none, and for a row without `pattern` and `answer`.
    """
    prompts = read_prompts(path)
    if unlabelled := sum(not prompt.is_labelled for prompt in prompts):
        raise ValueError(
            f"{path}: who is right is told by `pattern` and `answer`, and {unlabelled} of {len(prompts)} prompts have "
            "none: give JSON lines with both in each."
        )
    tasks = [json.loads(line).get("task") for line in read_lines(path) if line.strip()]
    return [Question(**vars(prompt), task=str(task or "")) for prompt, task in zip(prompts, tasks, strict=True)]


def first_of_each_task(questions: Iterable[Asked], count: int) -> list[Asked]:
    """The first `count` questions of each task, in their order."""
    taken: Counter[str] = Counter()
    first = []
    for question in questions:
        if taken[question.task] < count:
            taken[question.task] += 1
            first.append(question)
    return first


# Who answers --------------------------------------------------------------------------------------------------------

# The answers to some questions, of at most so many tokens, and who wrote what of them.
Write = Callable[[Sequence[Prompt], int], list[list[Piece]]]


@dataclass(frozen=True)
class Contestant:
    """Who answers: one model alone or several together.

    Args:
        name: as tables have it.
        write: how it answers.
        large, small: its models of the base's size and of the nudging model's, whose forward passes are counted.
        nudged: whether it has a nudge rate.
    """

    name: str
    write: Write
    large: Reader | None = None
    small: tuple[Reader, ...] = ()
    nudged: bool = False


@dataclass(frozen=True)
class Models:
    """The models that contestants are made of.

    Args:
        base, nudging: the pair.
        shared: a second nudging model, which has the base's vocabulary. Given one, it is mixed into the base, instead
            of `nudging`, in the ensemble and in proxy tuning, and the base is nudged by it too.
        unaligned: what the model that is mixed in was before its alignment.
        large_aligned: what the base becomes by alignment.

    Raises:
        ValueError: for a `shared` that has another vocabulary.
    """

    base: Reader
    nudging: Reader
    shared: Reader | None = None
    unaligned: Reader | None = None
    large_aligned: Reader | None = None

    def __post_init__(self) -> None:
        if self.shared is not None and not _one_vocabulary(self.base, self.shared):
            raise ValueError(
                f"The shared nudging model needs the base's vocabulary: {_vocabularies(self.base, self.shared)}."
            )


def contestants_of(models: Models, configs: Sequence[NudgingConfig]) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that some models make.

    Args:
        configs: the knobs of nudging, which differ in gate and threshold; the base is nudged with each.

    Returns:
        The contestants in the order of the table, and why others are not among them, by name.
    """
    base, nudging, shared = models.base, models.nudging, models.shared
    unaligned, large_aligned = models.unaligned, models.large_aligned
    found = [
        Contestant(BASE, partial(write_alone, base, False), large=base),
        Contestant(NUDGING, partial(write_alone, nudging, True), small=(nudging,)),
    ]
    left_out: dict[str, str] = {}
    for small, mark in ((nudging, ""), (shared, _SHARED)):
        if small is not None:
            for config in configs:
                name = f"{NUDGED}{mark}, {_gate_of(config)}"
                write = partial(write_nudged, base, small, config)
                found.append(Contestant(name, write, base, (small,), nudged=True))
    mixed, mark = (nudging, "") if shared is None else (shared, _SHARED)
    if not _one_vocabulary(base, mixed):
        why = f"it needs one vocabulary: {_vocabularies(base, mixed)}"
        left_out |= {ENSEMBLE: why, PROXY: why}
    else:
        found.append(Contestant(ENSEMBLE + mark, partial(_write_ensemble, base, mixed), base, (mixed,)))
        if unaligned is None:
            left_out[PROXY] = "what the nudging model was before its alignment was not given"
        elif not _one_vocabulary(base, unaligned):
            left_out[PROXY] = f"it needs one vocabulary: {_vocabularies(base, unaligned, 'unaligned')}"
        else:
            moved = partial(_write_proxy_tuning, base, mixed, unaligned)
            found.append(Contestant(PROXY + mark, moved, base, (mixed, unaligned)))
    found.append(Contestant(IN_CONTEXT, partial(_write_in_context, base), large=base))
    if large_aligned is None:
        left_out[ALIGNED] = "it was not given"
    else:
        found.append(Contestant(ALIGNED, partial(write_alone, large_aligned, False), large=large_aligned))
    return found, left_out


def _one_vocabulary(base: Reader, small: Reader) -> bool:
    return answer_class(base.vocabulary, small.vocabulary) is OneVocabulary


def _vocabularies(base: Reader, small: Reader, which: str = "nudging") -> str:
    return (
        f"the base has {len(base.tokenizer)} tokens, and the {which} model {len(small.tokenizer)}, with other ids or "
        "spellings"
    )


def _gate_of(config: NudgingConfig) -> str:
    if config.nudge_gate == NudgingConfig.nudge_gate:
        return f"γ = {config.nudge_threshold}"
    return f"{config.nudge_gate} {config.nudge_threshold}"


def write_alone(reader: Reader, small: bool, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[Piece]]:
    """The answers of one model; `small` says whether it is a nudging model."""
    return [_of(reader.text(ids), small) for ids, _ in reader.answers(prompts, max_new_tokens)]


def write_nudged(
    base: Reader,
    nudging: Reader,
    config: NudgingConfig,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    streamer: Any = None,
) -> list[list[Piece]]:
    """The base's answers, nudged."""
    out = generate(
        base.model,
        **_inputs_of_two(base, nudging, prompts, max_new_tokens),
        nudging_config=config,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    return pieces_of(out, base.tokenizer)


def _write_ensemble(
    base: Reader, nudging: Reader, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[list[Piece]]:
    inputs = _inputs_of_two(base, nudging, prompts, max_new_tokens)
    return _texts(base, base.eos | nudging.eos, inputs, ensemble(base.model, **inputs))


def _write_proxy_tuning(
    base: Reader, nudging: Reader, unaligned: Reader, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[list[Piece]]:
    inputs = _inputs_of_two(base, nudging, prompts, max_new_tokens)
    out = proxy_tuning(base.model, **inputs, unaligned_model=unaligned.model, unaligned_tokenizer=unaligned.tokenizer)
    return _texts(base, base.eos | nudging.eos, inputs, out)


def _write_in_context(base: Reader, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[Piece]]:
    inputs = _inputs_of_one(base, prompts, max_new_tokens)
    rows = _texts(base, base.eos, inputs, in_context(base.model, **inputs))
    return [_of("".join(piece.text for piece in row).partition(STOP_STRING)[0]) for row in rows]


def _inputs_of_one(base: Reader, prompts: Sequence[Prompt], max_new_tokens: int) -> dict[str, Any]:
    ids, mask = base.padded_prompts(prompts)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "tokenizer": base.tokenizer,
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": base.pad_token_id,
    }


def _inputs_of_two(base: Reader, nudging: Reader, prompts: Sequence[Prompt], max_new_tokens: int) -> dict[str, Any]:
    ids, mask = nudging.padded_prompts(prompts)
    return {
        **_inputs_of_one(base, prompts, max_new_tokens),
        "nudging_model": nudging.model,
        "nudging_tokenizer": nudging.tokenizer,
        "nudging_input_ids": ids,
        "nudging_attention_mask": mask,
    }


def _texts(base: Reader, ends: set[int], inputs: dict[str, Any], sequences: Any) -> list[list[Piece]]:
    """The answers behind the prompts, up to their end marks."""
    rows = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [_of(base.text(row[: next((i for i, token in enumerate(row) if token in ends), None)])) for row in rows]


def _of(text: str, nudged: bool = False) -> list[Piece]:
    return [Piece(text, nudged)] if text else []


# How they take turns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One answer. Words are what stands between white space."""

    text: str
    right: bool
    nudged_words: int
    words: int


@dataclass(frozen=True)
class Turn:
    """A contestant's answers to a batch of questions, and what they took.

    Args:
        contestant: its name.
        start: the number of the first question.
        seconds: of the wall clock.
        large_passes, small_passes: forward passes of models of either size.
        answers: in the order of the questions.
    """

    contestant: str
    start: int
    seconds: float
    large_passes: int
    small_passes: int
    answers: list[Answer]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Turn:
        """The inverse of `asdict`."""
        return cls(**{**row, "answers": [Answer(**answer) for answer in row["answers"]]})


def take_turn(contestant: Contestant, questions: Sequence[Question], start: int, max_new_tokens: int) -> Turn:
    """Lets a contestant answer some questions, of which the first is number `start`."""
    with counted_passes(contestant.large) as large_passes, counted_passes(*contestant.small) as small_passes:
        began = time.perf_counter()
        written = contestant.write(questions, max_new_tokens)
        seconds = time.perf_counter() - began
    answers = []
    for question, pieces in zip(questions, written, strict=True):
        text = "".join(piece.text for piece in pieces)
        nudged, words = count_nudged_words(pieces)
        answers.append(Answer(text, question.is_right(text), nudged if contestant.nudged else 0, words))
    return Turn(contestant.name, start, seconds, large_passes.total(), small_passes.total(), answers)


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
    questions: Sequence[Question],
    journal: Journal,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: Callable[[str, int], None] = lambda contestant, answered: None,
) -> list[Result]:
    """Lets all contestants answer all questions.

    Args:
        contestants: such as those of [`contestants_of`].
        questions: one or more.
        journal: where every turn is kept once it is finished; those that are there are not taken again.
        max_new_tokens: of an answer, in tokens of who writes it.
        batch_size: questions that are answered at once.
        progress: called with a contestant's name and the number of questions after each of its turns.

    Returns:
        one result a contestant, in their order.
    """
    starts = range(0, len(questions), batch_size)
    turns = {(turn.contestant, turn.start): turn for turn in map(Turn.from_row, journal.rows)}
    warm = set()
    for start in starts:
        batch = questions[start : start + batch_size]
        for contestant in contestants:
            if (contestant.name, start) not in turns:
                if contestant.name not in warm:  # What a device does at a model's first pass alone is not timed.
                    contestant.write(batch, 2)
                    warm.add(contestant.name)
                turn = take_turn(contestant, batch, start, max_new_tokens)
                journal.add(asdict(turn))
                turns[contestant.name, start] = turn
            progress(contestant.name, len(batch))
    return [
        Result(contestant, tuple(questions), tuple(turns[contestant.name, start] for start in starts))
        for contestant in contestants
    ]


# What it comes to ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a contestant's turns come to. Shares are of 1; `None` stands for a share of nothing."""

    contestant: Contestant
    questions: tuple[Question, ...]
    turns: tuple[Turn, ...]

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def answers(self) -> list[Answer]:
        return [answer for turn in self.turns for answer in turn.answers]

    def marks(self, task: str | None = None) -> list[bool]:
        """Whether each answer is right, of those to the questions of one task or of all."""
        pairs = zip(self.questions, self.answers, strict=True)
        return [answer.right for question, answer in pairs if task in (None, question.task)]

    def accuracy(self, task: str | None = None) -> float:
        return statistics.fmean(self.marks(task))

    def standard_error(self, task: str | None = None) -> float | None:
        """Of the accuracy; `None` for a single question."""
        return _standard_error(self.marks(task))

    @property
    def nudge_rate(self) -> float | None:
        """The share of the words of all answers of which the nudging model wrote at least a character."""
        nudged, words = sum(a.nudged_words for a in self.answers), sum(a.words for a in self.answers)
        return nudged / words if words and self.contestant.nudged else None

    @property
    def words(self) -> float:
        """Of an answer, in the mean."""
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


def tasks_of(questions: Sequence[Question]) -> list[str]:
    """The tasks, in their order; none where all questions belong to one."""
    tasks = list(dict.fromkeys(question.task for question in questions))
    return tasks if len(tasks) > 1 else []


def difference(one: Result, other: Result) -> tuple[float, float]:
    """How much higher the accuracy of one is than that of the other, and the standard error of that."""
    gains = [mine - its for mine, its in zip(one.marks(), other.marks(), strict=True)]
    return statistics.fmean(gains), _standard_error(gains) or 0.0


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


# How it is told -----------------------------------------------------------------------------------------------------

LEGEND = (
    "Accuracy and nudged words in percent; ±: the standard error of the accuracy. nudged words: the share of words of "
    "which the nudging model wrote at least a character. time: seconds a question, as a multiple of the base's alone. "
    "a word: seconds a word, likewise; a base that is done sooner has written less. words: of an answer, in the mean. "
    "passes: forward passes of the large model and of the small ones, each for a batch of questions at once."
)
_HEADS = ("all", "±", "nudged words", "time", "a word", "words", "large passes", "small passes")


def table(results: Sequence[Result]) -> str:
    """One line a contestant, in Markdown that is aligned for the eye too."""
    tasks = tasks_of(results[0].questions)
    base = results[0]
    rows = [["", *(task or "(no task)" for task in tasks), *_HEADS]]
    for result in results:
        error = result.standard_error()
        rows.append([
            result.name,
            *(_percent(result.accuracy(task)) for task in tasks),
            _percent(result.accuracy()),
            "-" if error is None else _percent(error),
            "-" if result.nudge_rate is None else _percent(result.nudge_rate),
            f"{result.seconds / base.seconds:.2f}",
            _ratio(result.seconds_per_word, base.seconds_per_word),
            f"{result.words:.0f}",
            *("-" if n is None else f"{n:,}" for n in (result.large_passes, result.small_passes)),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    lines.insert(1, "|" + "|".join("-" * (n + 1) + (":" if i else "-") for i, n in enumerate(widths)) + "|")
    return "\n".join(lines)


def _ratio(one: float | None, other: float | None) -> str:
    return "-" if one is None or other is None else f"{one / other:.2f}"


def _percent(share: float) -> str:
    return f"{share:.1%}".removesuffix("%")


def sentences(results: Sequence[Result]) -> list[str]:
    """What the figures say of each nudged contestant: whether it is above the others, and whether that is certain."""
    said = []
    for nudged in results:
        if not nudged.contestant.nudged:
            continue
        for other in results:
            if not other.contestant.nudged:
                said.append(_against(nudged, other))
    return said


def _against(nudged: Result, other: Result) -> str:
    gain, error = difference(nudged, other)
    both = f"{nudged.accuracy():.1%} against {other.accuracy():.1%}"
    if gain == 0:
        return f"{nudged.name} is NOT above {other.name}: {both}."
    verdict, direction = ("above", "more") if gain > 0 else ("NOT above", "less")
    told = f"{100 * abs(gain):.1f} points {direction}, with a standard error of {100 * error:.1f}"
    if abs(gain) < _TOLD_APART * error:
        told += ": too few questions to tell the two apart"
    return f"{nudged.name} is {verdict} {other.name}: {both}, {told}."


def as_dict(results: Sequence[Result]) -> list[dict[str, Any]]:
    """All figures, for JSON; times are in seconds."""
    tasks = tasks_of(results[0].questions)
    return [
        {
            "name": result.name,
            "accuracy": {task: result.accuracy(task) for task in tasks} | {"all": result.accuracy()},
            "standard_error": {task: result.standard_error(task) for task in tasks} | {"all": result.standard_error()},
            "right": sum(result.marks()),
            "questions": len(result.questions),
            "nudge_rate": result.nudge_rate,
            "words_per_answer": result.words,
            "seconds": result.seconds,
            "relative_time": result.seconds / results[0].seconds,
            "seconds_per_word": result.seconds_per_word,
            "large_forward_passes": result.large_passes,
            "small_forward_passes": result.small_passes,
        }
        for result in results
    ]
