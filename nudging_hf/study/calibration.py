"""The threshold that suits a pair, found on prompts. It knows answers and how much of them was nudged, never logits.

A *nudge rate* is here the share of the words of all answers of which the nudging model wrote at least a character.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from ..chats import DEFAULT_TEMPLATE
from ..core.config import NudgingConfig
from ..core.gate import GATES
from ..pair import Pair
from .intervals import wilson
from .journal import Journal, digest, model_setup
from .prompts import Prompt, are_labelled, built_in_prompts, validate_labelled
from .reader import Answer, Reader, nudged_answers
from .records import prompts_of
from .verdict import unread

logger = logging.getLogger(__name__)

# "Above about 20 % intervention quality falls" (arXiv 2606.11201).
HIGHEST_NUDGE_RATE = 0.2
# The search ends at a rate this near to the target: one set of prompts tells no more. At twice this, it warns.
_CLOSE = 0.01
# The parameters on which a rate depends, besides the threshold.
_KNOBS = ("nudge_gate", "num_nudging_tokens", "takeover_on_agreement", "word_boundary")


@dataclass(frozen=True)
class Point:
    """How many answers there are at one threshold, and words in them, and how many of each are nudged or right.

    `right` is `None` if that is not known. If it is 0, `unread` shows how an answer was read.
    """

    threshold: float
    nudged_words: int
    words: int
    answers: int
    right: int | None = None
    unread: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        counts = self.nudged_words, self.words, self.answers, self.right or 0
        if not all(type(count) is int for count in counts) or not 0 <= counts[0] <= counts[1] or counts[3] > counts[2]:
            raise ValueError(f"A point has impossible counts, got {self!r}.")

    @property
    def nudge_rate(self) -> float:
        """The share of all words that the nudging model wrote, wholly or in part."""
        return self.nudged_words / self.words

    @property
    def score(self) -> float | None:
        """The share of right answers."""
        return None if self.right is None else self.right / self.answers


@dataclass(frozen=True)
class Calibration:
    """The threshold for a pair, and all that were tried, in ascending order.

    `target_nudge_rate` is the nudge rate that was aimed at; it is `None` if the score decided. `word_boundary` is what
    counted as a word.
    """

    threshold: float
    curve: tuple[Point, ...]
    target_nudge_rate: float | None = None
    nudge_gate: str = NudgingConfig.nudge_gate
    word_boundary: str = NudgingConfig.word_boundary

    @property
    def chosen(self) -> Point:
        """The point of the curve that was taken."""
        return next(point for point in self.curve if point.threshold == self.threshold)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the pair or against the threshold."""
        rate, target = self.chosen.nudge_rate, self.target_nudge_rate
        found = []
        if target is not None and abs(rate - target) > 2 * _CLOSE:
            rates = [point.nudge_rate for point in self.curve]
            if min(rates) > target:
                why = (
                    "Every threshold nudges more: the nudging model writes the first word of each answer, and it "
                    "writes wherever the base would end one. Give a higher target, or prompts with longer answers."
                )
            elif max(rates) < target:
                why = "Every threshold nudges less: the base is hardly ever unsure. Give a lower target."
            else:
                why = "No threshold comes nearer: the base is about equally sure of many words."
            found.append(f"The target, {target:.1%} of the words, is missed by {abs(rate - target):.1%}. {why}")
        if rate > HIGHEST_NUDGE_RATE:
            found.append(
                f"{rate:.1%} of the words are nudged. Above about {HIGHEST_NUDGE_RATE:.0%} quality falls "
                "(arXiv 2606.11201): the nudging model writes so much that it decides the answers. "
                "Take a threshold that nudges less, or another pair."
            )
        if target is None and self.chosen.score == 0:
            found.append(
                f"No answer is right at any threshold, so that the score cannot choose one. {self.chosen.unread or ''}"
            )
        return tuple(found)

    @property
    def verdict(self) -> str:
        """What was found, what it rests on, and what was not measured, in one sentence."""
        point, target = self.chosen, self.target_nudge_rate
        if target is None and not point.right:
            opening = "No answer is right at any threshold"
        elif target is None:
            among = (
                "the only one that was tried" if len(self.curve) == 1 else f"the best of {len(self.curve)} thresholds"
            )
            opening = f"The score is {among}"
        elif abs(point.nudge_rate - target) <= 2 * _CLOSE:
            opening = f"The rate is on target ({target:.1%})"
        else:
            opening = f"The rate misses its target ({target:.1%})"
        if point.right is None:
            quality = "quality was not measured"
        else:
            low, high = wilson(point.right, point.answers)
            quality = (
                f"{point.right} of {point.answers} answers are right (95 % interval: {low:.0%} to {high:.0%}), and "
                "what the base alone would score was not measured"
            )
        prompts = f"{point.answers} prompt{'' if point.answers == 1 else 's'}"
        return (
            f"{opening}: at a threshold of {self.threshold:g}, {point.nudge_rate:.1%} of the words are nudged, "
            f"measured on {prompts} with {point.words:,} words of answers; {quality}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, in values that JSON has."""
        return {
            "nudge_gate": self.nudge_gate,
            "word_boundary": self.word_boundary,
            "threshold": self.threshold,
            "target_nudge_rate": self.target_nudge_rate,
            "nudge_rate": self.chosen.nudge_rate,
            "score": self.chosen.score,
            "verdict": self.verdict,
            "warnings": list(self.warnings),
            "curve": [{**vars(point), "nudge_rate": point.nudge_rate, "score": point.score} for point in self.curve],
        }


# The search ---------------------------------------------------------------------------------------------------------

Try = Callable[[float], Point]


def default_thresholds(nudge_gate: str) -> tuple[float, ...]:
    """Nine thresholds, from one that hardly nudges to one that nudges nearly everywhere."""
    return tuple(round(GATES[nudge_gate].greatest * tenth / 10, 3) for tenth in range(1, 10))


def search_by_nudge_rate(attempt: Try, target: float, nudge_gate: str = NudgingConfig.nudge_gate) -> Calibration:
    """Finds the threshold whose nudge rate is nearest to a target.

    The stricter the gate, the more is nudged. So the search is a bisection over hundredths of the gate's greatest
    threshold, which ends when a rate is within a hundredth of the target. On few prompts the rate may fall here and
    there. So the nearest of all that were tried is taken, and among equals the lowest threshold.
    """
    gate = GATES[nudge_gate]
    tried: list[Point] = []
    low, high = 0, 100  # Bounds on how strict the gate is, in hundredths.
    while low <= high:
        middle = (low + high) // 2
        hundredths = 100 - middle if gate.is_falling else middle
        tried.append(attempt(round(gate.greatest * hundredths / 100, 3)))
        rate = tried[-1].nudge_rate
        if abs(rate - target) <= _CLOSE:
            break
        if rate < target:
            low = middle + 1
        else:
            high = middle - 1
    tried.sort(key=lambda point: point.threshold)
    best = min(tried, key=lambda point: abs(point.nudge_rate - target))
    return Calibration(best.threshold, tuple(tried), target, nudge_gate)


def search_by_score(
    attempt: Try, thresholds: Sequence[float], nudge_gate: str = NudgingConfig.nudge_gate
) -> Calibration:
    """Finds the threshold with the best score; among equals, the one that nudges least, and then the lowest."""
    tried = [attempt(threshold) for threshold in sorted(set(thresholds))]
    best = min(tried, key=lambda point: (-(point.right or 0), point.nudge_rate))
    return Calibration(best.threshold, tuple(tried), nudge_gate=nudge_gate)


def calibrate(
    base: Any,
    nudging_model: Any,
    tokenizer: Any,
    nudging_tokenizer: Any,
    prompts: Iterable[Any] | None = None,
    *,
    target_nudge_rate: float = 0.1,
    by_score: bool = False,
    thresholds: Sequence[float] | None = None,
    nudging_config: NudgingConfig | None = None,
    base_template: str = DEFAULT_TEMPLATE,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    resume: str | Path | None = None,
    progress: Callable[[float, int], None] = lambda threshold, answered: None,
) -> Calibration:
    """Finds the `nudge_threshold` for a pair of models: each threshold that is tried answers all prompts, greedily.

    What speaks against the pair is logged as a warning, and is kept in `Calibration.warnings`.

    Args:
        base, nudging_model: the large base and the small aligned model.
        tokenizer, nudging_tokenizer: the tokenizer of each.
        prompts: texts, chats, rows with fields such as "question" and "answer", or a data set or column of the
            library datasets: see [`~study.records.prompts_of`]. If they are left out, [`built_in_prompts`]. Some
            twenty of the kind that the pair is for are enough. On questions of another kind the same threshold may
            nudge much more or less.
        target_nudge_rate: the share of words, in (0, 1), that is to be nudged.
        by_score: whether the score decides instead; every prompt then needs a right answer.
        thresholds: the thresholds among which the score decides; if they are left out, [`default_thresholds`].
        nudging_config: the other parameters of nudging, such as the gate; if they are left out, those of the base's
            generation config.
        base_template: the template of the base's prompts, for prompts that do not say what the base is given: see
            [`plain_prompt`].
        max_new_tokens: the limit on an answer, in tokens of the base.
        batch_size: how many prompts are answered at once. It changes speed and memory alone.
        resume: a file that keeps every threshold that is finished. A run with the file of an earlier one, which was
            broken off or had another target, does not try its thresholds again.
        progress: is called with the threshold and the number of prompts after each batch of answers.

    Raises:
        ValueError: for values out of range, unlabelled prompts if the score is to decide, and a `resume` file of
            other models, prompts or parameters.

    Example:
        ```python
        found = calibrate(base, nudger, tokenizer, nudging_tokenizer, prompts=prompts)
        base.generate(**inputs, nudging_model=nudger, nudge_threshold=found.threshold)
        ```
    """
    prompts = built_in_prompts() if prompts is None else prompts_of(prompts)
    if not prompts:
        raise ValueError("There are no `prompts`: give at least one, or leave them out for the built-in ones.")
    if not 0 < target_nudge_rate < 1:
        raise ValueError(f"`target_nudge_rate` is a share of words and must be in (0, 1), got {target_nudge_rate!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size!r}.")
    if by_score:
        validate_labelled(prompts, "The score")
    if by_score and thresholds is not None and not thresholds:
        raise ValueError("There are no `thresholds` for the score to choose from: give at least one.")
    pair = Pair(base, tokenizer, nudging_model, nudging_tokenizer)
    config = pair.nudging_config(vars(nudging_config) if nudging_config else {})
    gate = config.nudge_gate
    thresholds = default_thresholds(gate) if thresholds is None else thresholds
    for threshold in thresholds:
        replace(config, nudge_threshold=threshold)  # A threshold out of range is refused now, not after hours.
    base_reader = Reader(base, tokenizer, chat=False, base_template=base_template)
    nudging_reader = Reader(nudging_model, nudging_tokenizer, chat=True, base_template=base_template)
    setup = {
        "base": model_setup(base),
        "nudging_model": model_setup(nudging_model),
        "prompts": digest([asdict(prompt) for prompt in prompts]),
        "base_template": base_template,
        **{name: getattr(config, name) for name in _KNOBS},
        "max_new_tokens": max_new_tokens,
    }
    journal = Journal(resume, setup)

    def measure(threshold: float) -> dict[str, Any]:
        own_config = replace(config, nudge_threshold=threshold)
        nudged = words = 0
        answered: list[tuple[Prompt, Answer]] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            answers = nudged_answers(base_reader, nudging_reader, own_config, batch, max_new_tokens)
            nudged += sum(answer.nudged_words for answer in answers)
            words += sum(answer.words for answer in answers)
            answered += zip(batch, answers, strict=True)
            progress(threshold, len(batch))
        if not words:
            raise ValueError("No answer has a word, so there is no nudge rate: give other `prompts`.")
        if not are_labelled(prompts):
            return asdict(Point(threshold, nudged, words, len(prompts)))
        right = sum(prompt.is_right(answer.text) for prompt, answer in answered)
        shown = unread("The nudged base", answered)
        return asdict(Point(threshold, nudged, words, len(prompts), right, shown))

    def attempt(threshold: float) -> Point:
        return journal.once({"threshold": threshold}, lambda: measure(threshold), lambda row: Point(**row))

    if by_score:
        found = search_by_score(attempt, thresholds, gate)
    else:
        found = search_by_nudge_rate(attempt, target_nudge_rate, gate)
    for warning in found.warnings:
        logger.warning(warning)
    return replace(found, word_boundary=config.word_boundary)


# Files --------------------------------------------------------------------------------------------------------------


def save(calibration: Calibration, folder: str | Path) -> Path:
    """Writes gate, threshold, target and what counted as a word into the generation config of a model's folder.

    The rest stays as it is.

    Raises:
        ValueError: if the folder holds no model.
    """
    folder = check_model_folder(folder)
    path = folder / "generation_config.json"
    if path.exists():
        fields = json.loads(path.read_text(encoding="utf-8"))
    else:
        fields = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).to_diff_dict()
    # If a config is marked as made from the model's, transformers drops fields that it does not know.
    fields.pop("_from_model_config", None)
    names = ("nudge_gate", "word_boundary")
    fields |= {name: getattr(calibration, name) for name in names} | {"nudge_threshold": calibration.threshold}
    fields.pop("target_nudge_rate", None)
    if calibration.target_nudge_rate is not None:
        fields["target_nudge_rate"] = calibration.target_nudge_rate
    written = path.with_name(path.name + ".new")
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    written.write_text(text + "\n", encoding="utf-8")
    os.replace(written, path)
    return path


def check_model_folder(folder: str | Path) -> Path:
    """Returns the folder. Raises a `ValueError` if it holds no model."""
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{folder} is no model's folder: it has no config.json.")
    return Path(folder)
