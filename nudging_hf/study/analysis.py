"""What a pair of models is like, position by position and threshold by threshold. It knows models, prompts and
distributions, never files or plots.

The observations are those of the nudging paper (arXiv 2410.09300). They are made along answers that an aligned model
wrote: the greedy answers of the large aligned model or, if there is none, the nudged answers. All models read the
same answer, teacher-forced, each in its own vocabulary and after its own prompt.

*Positions* are the base's tokens of an answer that add text, so the end mark is none. At each position the base has a
greedy token and its top-1 probability p. Another model is *compared* there if one of its own tokens starts at the same
byte of the answer, which is so everywhere if the models share a vocabulary. Two greedy tokens *agree*

- within one vocabulary, if they are the same token;
- across vocabularies, if the text of one, which is not empty, is a prefix of the text of the other;
- in any case, if both end the answer, and never if only one does.

The aligned model's greedy token is that of the large aligned model or, if there is none, that of the nudging model. A
position where the base does not agree with it is *alignment-related*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any

from ..core.answer import answer_class
from .comparison import ALIGNED, BASE, NUDGED, NUDGING
from .examples import Answered, best
from .intervals import wilson
from .prompts import Prompt
from .reader import Answer, Prediction, Reader, nudged_answers, share_vocabulary
from .tables import share_of
from .verdict import Nudged, Scores, nothing_right, verdict

BINS = tuple(i / 10 for i in range(11))  # The paper's bins: tenths of the base's top-1 probability; 1 is in the last.
THRESHOLDS = tuple(i / 20 for i in range(1, 21))  # The thresholds at which nudges are counted.


@dataclass(frozen=True)
class Positions:
    """What the models would write along one answer, at each of the base's positions.

    Args:
        top1: the base's top-1 probability.
        differs: whether the position is alignment-related; `None` if the aligned model is not compared there.
        small_agrees: whether the nudging model agrees with the large aligned one; `None` if one of them is not
            compared there, or if there is no large one.
    """

    top1: list[float]
    differs: list[bool | None]
    small_agrees: list[bool | None]


def agree(one: Prediction, other: Prediction, one_vocabulary: bool) -> bool:
    """Whether two greedy tokens agree, as the head of the module defines it."""
    if one.ends or other.ends:
        return one.ends and other.ends
    if one_vocabulary:
        return one.token == other.token
    shorter, longer = sorted((one.text, other.text), key=len)
    return bool(shorter) and longer.startswith(shorter)


@dataclass(frozen=True)
class Unit:
    """A piece of the work that is done in one step.

    Args:
        kind: "along" (answers of the aligned model, and positions along them), "nudged", "base" or "nudging model"
            (answers of one model alone).
        start: the number of its first prompt.
        threshold: γ of nudged answers; `None` for answers of one model alone.
    """

    kind: str
    start: int
    threshold: float | None = None


@dataclass
class Analysis:
    """The measurements of a pair on one or more prompts, in units of `batch_size` prompts.

    Args:
        large: the large aligned model. If it is `None`, positions are those of the nudged answers.
        threshold: γ of the nudged answers that positions are taken from if there is no large aligned model.
        thresholds: the thresholds at which nudged answers are measured.
        max_new_tokens: the limit on an answer, in tokens of the model that writes it, or of the base.
    """

    base: Reader
    nudging: Reader
    large: Reader | None
    prompts: Sequence[Prompt]
    threshold: float
    thresholds: Sequence[float]
    batch_size: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        readers = [reader for reader in (self.base, self.nudging, self.large) if reader is not None]
        writer = self.large or self.base
        self._reads = {reader: answer_class(writer.vocabulary, reader.vocabulary) for reader in readers}
        self._one_vocabulary = {  # Either of two models may have control tokens of its own.
            (one, other): share_vocabulary(one, other) or share_vocabulary(other, one)
            for one, other in combinations(readers, 2)
        }

    def units(self) -> list[Unit]:
        """All units, each independent of the others."""
        kinds: list[tuple[str, float | None]] = [("along", self.threshold if self.large is None else None)]
        kinds += [("nudged", gamma) for gamma in self.thresholds]
        kinds += [("base", None), ("nudging model", None)]
        starts = range(0, len(self.prompts), self.batch_size)
        return [Unit(kind, start, threshold) for kind, threshold in kinds for start in starts]

    def measure(self, unit: Unit) -> list[dict[str, Any]]:
        """The result of a unit, as JSON: one row for each prompt, with an [`Answer`] and, along it, [`Positions`].

        Raises:
            ValueError: for prompts that a chat template or nudging refuses.
        """
        prompts = self.prompts[unit.start : unit.start + self.batch_size]
        writer = {"along": self.large or self.base, "nudging model": self.nudging}.get(unit.kind, self.base)
        if unit.threshold is None:
            answers = writer.answers(prompts, self.max_new_tokens)
        else:
            config = {"nudge_threshold": unit.threshold}
            answers = nudged_answers(self.base, self.nudging, config, prompts, self.max_new_tokens)
        rows = [{"answer": asdict(answer)} for answer in answers]
        if unit.kind == "along":
            for row, prompt, answer in zip(rows, prompts, answers, strict=True):
                row["positions"] = asdict(self._positions(writer, prompt, answer.ids))
        return rows

    def _positions(self, writer: Reader, prompt: Prompt, ids: list[int]) -> Positions:
        """What the models would write along an answer of `writer`, whose tokens are `ids`."""
        text = writer.vocabulary.join(ids)
        predicted = {}
        for reader, reading in self._reads.items():
            own_prompt = reader.prompt_ids(prompt)
            answer = reading(writer.vocabulary, reader.vocabulary, writer.prompt_ids(prompt), own_prompt)
            for token in ids:
                answer.append(token)
            predicted[reader] = reader.predictions(own_prompt, answer.nudging_ids(), text)

        def agreement(one: Reader, other: Reader, place: int) -> bool | None:
            if place not in predicted[one] or place not in predicted[other]:
                return None
            return agree(predicted[one][place], predicted[other][place], self._one_vocabulary[one, other])

        base, small, large = self.base, self.nudging, self.large
        differs: list[bool | None] = []
        small_agrees: list[bool | None] = []
        for place in predicted[base]:
            agrees = agreement(base, large or small, place)
            differs.append(None if agrees is None else not agrees)
            small_agrees.append(None if large is None else agreement(small, large, place))
        return Positions([each.top1 for each in predicted[base].values()], differs, small_agrees)


# Tables -------------------------------------------------------------------------------------------------------------


def tables(prompts: Sequence[Prompt], measured: Mapping[Unit, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of all units.

    Args:
        prompts: the prompts of the analysis.
        measured: the rows of each unit, as [`Analysis.measure`] gives them, in any order.

    Returns:
        Values that JSON has. Shares are numbers from 0 to 1, or `None` if they would be shares of nothing.

        - `along`: whose answers the positions are from, and how many positions there are.
        - `bins`: one row for each tenth of the base's top-1 probability.
        - `thresholds`: what p < γ would catch.
        - `agreement`: how often the nudging model and the large aligned one agree.
        - `curve`: the nudged answers at each γ that was measured.
        - `alone`: the accuracy of each model alone, and its interval.
        - `verdict`: whether nudging helps, in one sentence.
        - `nothing_right`: how an answer was read, for whoever is right on no question.
    """
    answers = _answers(measured)
    along = [Positions(**row["positions"]) for rows in measured.values() for row in rows if "positions" in row]
    columns = [(each.top1, each.differs, each.small_agrees) for each in along]
    positions = [position for each in columns for position in zip(*each, strict=True)]
    counted = _counted(positions)
    (threshold,) = [gamma for kind, gamma in answers if kind == "along"]
    large = threshold is None

    def scores(kind: str, gamma: float | None = None) -> Scores:
        pairs = zip(prompts, answers.get((kind, gamma), [None] * len(prompts)), strict=True)
        return Scores([prompt.is_right(answer.text) for prompt, answer in pairs if answer and prompt.is_labelled])

    alone = {"base": scores("base"), "nudging model": scores("nudging model")}
    curve = {gamma: its for (kind, gamma), its in answers.items() if kind == "nudged" and gamma is not None}
    rates = {
        gamma: share_of(sum(a.nudged_words for a in its), sum(a.words for a in its)) for gamma, its in curve.items()
    }
    nudged = [Nudged(f"γ = {gamma:g}", scores("nudged", gamma), rate) for gamma, rate in rates.items()]
    written = {
        f"{kind} alone" if gamma is None else f"{kind}, γ = {gamma:g}": list(zip(prompts, its, strict=True))
        for (kind, gamma), its in answers.items()
        if kind != "along"
    }
    return {
        "prompts": len(prompts),
        "along": {
            "writer": "large aligned" if large else "nudged",
            "threshold": threshold,
            **{name: counted[name] for name in ("positions", "compared", "alignment_related", "disagreement")},
            "unfinished": sum(not answer.finished for answer in answers["along", threshold]),
        },
        "bins": [_bin(low, high, positions) for low, high in pairwise(BINS)],
        "thresholds": [_caught(gamma, positions) for gamma in THRESHOLDS],
        "agreement": {
            "alignment_related": counted["small_agreement"],
            "elsewhere": _mean(agrees for _, differs, agrees in positions if differs is False),
            "alignment_related_compared": counted["small_compared"],
        },
        "curve": [
            {
                "threshold": gamma,
                **_accuracy(scores("nudged", gamma)),
                "nudged_words": rates[gamma],
                "nudged_tokens": share_of(sum(a.nudged_tokens for a in its), sum(a.tokens for a in its)),
                "unfinished": sum(not a.finished for a in its),
            }
            for gamma, its in curve.items()
        ],
        "alone": {
            name: _accuracy(its)
            for name, its in (alone | {"large aligned": scores("along") if large else Scores()}).items()
        },
        "verdict": verdict(alone["base"], alone["nudging model"], nudged),
        "nothing_right": nothing_right(written),
    }


def _answers(measured: Mapping[Unit, list[dict[str, Any]]]) -> dict[tuple[str, float | None], list[Answer]]:
    """The answers of all units, in the order of the prompts, by kind and threshold."""
    answers: dict[tuple[str, float | None], list[Answer]] = {}
    for unit in sorted(measured, key=lambda unit: (unit.kind, unit.threshold or 0.0, unit.start)):
        found = answers.setdefault((unit.kind, unit.threshold), [])
        found += [Answer.from_row(row["answer"]) for row in measured[unit]]
    return answers


def examples(prompts: Sequence[Prompt], measured: Mapping[Unit, list[dict[str, Any]]]) -> list[Answered]:
    """The answers that stand beside each other on a page: of each model alone, and of the base nudged, with the best
    of the thresholds. The arguments are those of [`tables`]."""
    found = _answers(measured)

    def answered(name: str, answers: list[Answer], gamma: float | None = None) -> Answered:
        marked = zip(prompts, answers, strict=True)
        right = [prompt.is_right(answer.text) if prompt.is_labelled else None for prompt, answer in marked]
        return Answered(name, answers, right, gamma is not None, gamma)

    shown = [answered(BASE, found["base", None]), answered(NUDGING, found["nudging model", None])]
    curve = {gamma: answers for (_, gamma), answers in found.items() if gamma is not None}
    nudged = [answered(f"{NUDGED}, γ = {gamma:g}", its, gamma) for gamma, its in curve.items()]
    shown += [best(nudged)] if nudged else []
    return shown + ([answered(ALIGNED, found["along", None])] if ("along", None) in found else [])


def _accuracy(scores: Scores) -> dict[str, Any]:
    """The share of right answers and its interval; `None` if none was marked."""
    right, marked = sum(scores.marks), len(scores.marks)
    return {"accuracy": share_of(right, marked), "interval": list(wilson(right, marked)) if marked else None}


# A position: the base's top-1 probability, and two marks, each as [`Positions`] has it.
_Position = tuple[float, "bool | None", "bool | None"]


def _counted(rows: Sequence[_Position]) -> dict[str, Any]:
    """What some positions have in common. The figures of the small model are those at alignment-related positions."""
    differs = [differs for _, differs, _ in rows]
    small = [agrees for _, differs, agrees in rows if differs]
    return {
        "positions": len(rows),
        "compared": sum(mark is not None for mark in differs),
        "alignment_related": sum(mark is True for mark in differs),
        "disagreement": _mean(differs),
        "small_compared": sum(mark is not None for mark in small),
        "small_agreement": _mean(small),
    }


def _bin(low: float, high: float, rows: Sequence[_Position]) -> dict[str, Any]:
    counted = _counted([row for row in rows if low <= row[0] and (row[0] < high or high == BINS[-1])])
    del counted["alignment_related"]
    return {"from": low, "to": high, "share": share_of(counted["positions"], len(rows)), **counted}


def _caught(gamma: float, rows: Sequence[_Position]) -> dict[str, Any]:
    """The share of positions that a nudge wherever p < γ would fall on."""
    below, everywhere = _counted([row for row in rows if row[0] < gamma]), _counted(rows)
    return {
        "threshold": gamma,
        "positions": share_of(below["positions"], everywhere["positions"]),
        "caught": share_of(below["alignment_related"], everywhere["alignment_related"]),
        "disagreement": below["disagreement"],
        "small_agreement": below["small_agreement"],
    }


def _mean(marks: Iterable[bool | None]) -> float | None:
    """The share of the known marks that are true."""
    known = [mark for mark in marks if mark is not None]
    return share_of(sum(known), len(known))
