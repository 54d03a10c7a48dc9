"""The threshold that suits a pair, found on prompts. It knows answers and how much of them was nudged, never logits.

A *nudge rate* is here the share of the words of all answers of which the nudging model wrote at least a character.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from ..chats import (
    REASONING_TEMPLATE,
    Message,
    chat_inputs,
    checked_messages,
    messages_of,
    padded,
    plain_prompt,
    validate_no_surrogates,
)
from ..core.config import NudgingConfig
from ..core.gate import GATES
from ..core.generate import generate
from ..core.transformers_private import input_device
from ..provenance import count_nudged_words, pieces_of
from .journal import Journal, digest, model_setup

logger = logging.getLogger(__name__)

# "Above about 20 % intervention quality falls" (arXiv 2606.11201).
HIGHEST_NUDGE_RATE = 0.2
# A rate this near to the target is taken, for a set of prompts tells no more; one farther off than twice that is told.
_CLOSE = 0.01

_SYSTEM = "Answer the question by walking through the reasoning steps."
# The kinds of question that the paper has: sums in words, coins, letters, common sense, knowledge, and some advice.
BUILT_IN = (
    "Mia picks 14 pears and her brother picks 9. They give 6 to a neighbour. How many pears do they keep?",
    "A bus has 32 seats. 19 people get on at the first stop and 8 more at the second. How many seats are still free?",
    "Four boxes hold 12 candles each. Tom lights 5 of them. How many candles were not lit?",
    "A book has 180 pages. Ines reads 25 pages a day. How many pages are left after 6 days?",
    "A coin is heads up. Ravi flips it. Lena does not flip it. Otto flips it. Is the coin still heads up?",
    "A coin is heads up. Carla does not flip it. Ben flips it. Is the coin still heads up?",
    'Take the last letters of the words "Garden", "Purple" and "Stone" and concatenate them.',
    'Take the last letters of the words "Anna" and "Robert" and concatenate them.',
    "Today is the 27th of April. What is the date ten days from now?",
    "A red ball lies left of a blue ball, and the blue ball left of a green one. Which ball is in the middle?",
    "Would a snowman last longer in Oslo in January or in Cairo in July?",
    "Where would you put milk so that it stays fresh: in a drawer, in a fridge, or on a window sill?",
    "Could a person carry an adult elephant up the stairs?",
    "Why does a metal spoon feel colder than a wooden one in the same room?",
    "Which gas do plants take from the air when they make sugar out of sunlight?",
    "Which is farther from the sun, Mars or Venus?",
    "If all roses are flowers and some flowers fade quickly, must some roses fade quickly?",
    "How can I fall asleep more easily after a long day in front of a screen?",
    "What should I have at home before I bake bread for the first time?",
    "Explain to a child why the moon changes its shape during a month.",
)


@dataclass(frozen=True)
class Prompt:
    """A prompt of both models, and how to find the answer to it, if that is known.

    Args:
        messages: the chat that the nudging model is given.
        prompt: what the base is given; left out, the plain prompt that `base_template` makes of the chat.
        pattern, answer: a regular expression with one group, and what its last match in a right answer holds.

    Raises:
        ValueError: for messages in another order, a pattern without its one group, and one of `pattern` and `answer`
            without the other.
    """

    messages: Sequence[Message]
    prompt: str | None = None
    pattern: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        checked_messages(self.messages)
        for name in ("prompt", "pattern", "answer"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, str):
                    raise ValueError(f"`{name}` must be text, got {value!r}.")
                validate_no_surrogates(value, f"`{name}`")
        if (self.pattern is None) != (self.answer is None):
            raise ValueError("`pattern` and `answer` go together, and one of them is missing.")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"`pattern` is no regular expression: {error}.") from error
            if groups != 1:
                raise ValueError(f"`pattern` must have one group, got {groups}.")

    @property
    def is_labelled(self) -> bool:
        return self.pattern is not None

    def is_right(self, text: str) -> bool:
        """Whether a text gives the answer."""
        assert self.pattern is not None
        return re.findall(self.pattern, text)[-1:] == [self.answer]


def built_in_prompts() -> list[Prompt]:
    """Twenty questions of many kinds, without their answers."""
    return [Prompt(messages_of(question, _SYSTEM)) for question in BUILT_IN]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file.

    A file whose first line begins with `{` holds JSON lines: the fields of [`Prompt`], of which `messages` must be
    there; other fields are left alone. Any other file holds a question a line. Empty lines are left out.

    Raises:
        ValueError: for a row that is no prompt, naming its line, and where there is none at all.
    """
    numbered = [(number, line.strip()) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no prompts.")
    if not numbered[0][1].startswith("{"):
        return [Prompt(messages_of(line)) for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            row = json.loads(line)
            prompts.append(Prompt(row["messages"], *(row.get(name) for name in ("prompt", "pattern", "answer"))))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            why = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(
                f'{path}, line {number}, is no prompt, {{"messages": [...]}} at the least: {why}'
            ) from error
    return prompts


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file of text, which end at line breaks alone, and not at all that Unicode calls one.

    Raises:
        ValueError: for a file that is not UTF-8, naming the line.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")  # Some editors begin a file with the mark of UTF-8, which is no text.
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}, holds the byte 0x{error.object[error.start]:02x}, "
            "which is not UTF-8: save the file as UTF-8."
        ) from error
    return list(io.StringIO(text, newline=None))


@dataclass(frozen=True)
class Point:
    """What a threshold makes of the prompts.

    Args:
        threshold: γ.
        nudged_words, words: of all answers.
        answers: how many there are.
        right: how many of them are right; `None` where that is not known.
    """

    threshold: float
    nudged_words: int
    words: int
    answers: int
    right: int | None = None

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
    """The threshold for a pair, and what it was chosen from.

    Args:
        threshold: γ.
        curve: all thresholds that were tried, in their order.
        target_nudge_rate: what was aimed at; `None` where the score decided.
        nudge_gate: whose threshold it is.
    """

    threshold: float
    curve: tuple[Point, ...]
    target_nudge_rate: float | None = None
    nudge_gate: str = NudgingConfig.nudge_gate

    @property
    def chosen(self) -> Point:
        """The point of the curve that was taken."""
        return next(point for point in self.curve if point.threshold == self.threshold)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the pair or against the threshold; empty where nothing does."""
        rate, target = self.chosen.nudge_rate, self.target_nudge_rate
        found = []
        if target is not None and abs(rate - target) > 2 * _CLOSE:
            rates = [point.nudge_rate for point in self.curve]
            if min(rates) > target:
                why = (
                    "Every threshold nudges more: the nudging model writes the first word of each answer, and "
                    "wherever the base would end it. Give a higher target, or prompts with longer answers."
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
            found.append("No answer is right at any threshold, so that the score cannot choose one.")
        return tuple(found)

    @property
    def verdict(self) -> str:
        """What is to be said of the pair: that it is in order, or all that speaks against it."""
        return " ".join(self.warnings) or (
            f"The pair is in order: at a threshold of {self.threshold:g}, {self.chosen.nudge_rate:.1%} of the words "
            "are nudged."
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        curve = [asdict(point) | {"nudge_rate": point.nudge_rate, "score": point.score} for point in self.curve]
        return {
            "nudge_gate": self.nudge_gate,
            "threshold": self.threshold,
            "target_nudge_rate": self.target_nudge_rate,
            "nudge_rate": self.chosen.nudge_rate,
            "score": self.chosen.score,
            "verdict": self.verdict,
            "warnings": list(self.warnings),
            "curve": curve,
        }


# The search ---------------------------------------------------------------------------------------------------------

Try = Callable[[float], Point]


def default_thresholds(nudge_gate: str) -> tuple[float, ...]:
    """Nine thresholds, from hardly any nudging to nearly nothing else."""
    return tuple(round(GATES[nudge_gate].greatest * tenth / 10, 3) for tenth in range(1, 10))


def search_by_nudge_rate(attempt: Try, target: float, nudge_gate: str = NudgingConfig.nudge_gate) -> Calibration:
    """The threshold whose nudge rate is nearest to a target.

    The more the base must be sure of, the more is nudged: a bisection over hundredths of the gate's greatest
    threshold, which ends where a rate is within a hundredth of the target. On few prompts the rate may fall here and
    there, so the nearest of all that were tried is taken, and of equals the lowest threshold.
    """
    gate = GATES[nudge_gate]
    tried: list[Point] = []
    low, high = 0, 100  # Of strictness.
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
    """The threshold with the best score; of equals the one that nudges least, and then the lowest."""
    tried = [attempt(threshold) for threshold in sorted(set(thresholds))]
    best = min(tried, key=lambda point: (-(point.right or 0), point.nudge_rate))
    return Calibration(best.threshold, tuple(tried), nudge_gate=nudge_gate)


def calibrate(
    base: Any,
    nudging_model: Any,
    tokenizer: Any,
    nudging_tokenizer: Any,
    prompts: Sequence[Prompt] | None = None,
    *,
    target_nudge_rate: float = 0.1,
    by_score: bool = False,
    thresholds: Sequence[float] | None = None,
    nudging_config: NudgingConfig | None = None,
    base_template: str = REASONING_TEMPLATE,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    resume: str | Path | None = None,
    progress: Callable[[float, int], None] = lambda threshold, answered: None,
) -> Calibration:
    """Finds the `nudge_threshold` for a pair of models: for each that is tried all prompts are answered, greedily.

    What speaks against the pair is logged as a warning, and stands in `Calibration.warnings`.

    Args:
        base, nudging_model: the large base and the small aligned model.
        tokenizer, nudging_tokenizer: theirs.
        prompts: such as [`read_prompts`] reads; left out, [`built_in_prompts`]. Some twenty of the kind that the pair
            is for: on questions of another kind the same threshold may nudge much more or less.
        target_nudge_rate: the share of words, in (0, 1), that is to be nudged.
        by_score: choose by the score instead; every prompt then needs `pattern` and `answer`.
        thresholds: those among which the score chooses; left out, [`default_thresholds`].
        nudging_config: the other knobs, the gate among them; left out, those of the base's generation config.
        base_template: see [`plain_prompt`]; for prompts that do not say themselves what the base is given.
        max_new_tokens: of an answer, in tokens of the base.
        batch_size: prompts that are answered at once, a matter of speed and memory alone.
        resume: a file in which every threshold is kept once it is finished. A run that is given the file of one that
            was broken off, or that had another target, does not try them again.
        progress: called with the threshold and the number of prompts after each batch of answers.

    Raises:
        ValueError: for values out of range, unlabelled prompts where the score is to choose, and a `resume` file of
            other models, prompts or knobs.

    Example:
        found = calibrate(base, nudger, tokenizer, nudging_tokenizer)
        base.generate(**inputs, nudging_model=nudger, nudge_threshold=found.threshold)
    """
    prompts = built_in_prompts() if prompts is None else list(prompts)
    if not prompts:
        raise ValueError("There are no `prompts`: give at least one, or leave them out for the built-in ones.")
    if not 0 < target_nudge_rate < 1:
        raise ValueError(f"`target_nudge_rate` is a share of words and must be in (0, 1), got {target_nudge_rate!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size!r}.")
    unlabelled = sum(not prompt.is_labelled for prompt in prompts)
    if by_score and unlabelled:
        raise ValueError(
            f"The score needs `pattern` and `answer` for each prompt, and {unlabelled} of {len(prompts)} have none: "
            "give them, or a target nudge rate."
        )
    if by_score and thresholds is not None and not thresholds:
        raise ValueError("There are no `thresholds` for the score to choose from: give at least one.")
    config = NudgingConfig.resolve([vars(nudging_config) if nudging_config else {}, base.generation_config.to_dict()])
    gate = config.nudge_gate
    thresholds = default_thresholds(gate) if thresholds is None else thresholds
    for threshold in thresholds:
        replace(config, nudge_threshold=threshold)  # Refused now, not after hours.
    texts = [
        prompt.prompt if prompt.prompt is not None else plain_prompt(prompt.messages, base_template)
        for prompt in prompts
    ]
    batches = [range(start, min(start + batch_size, len(prompts))) for start in range(0, len(prompts), batch_size)]

    def attempt(threshold: float) -> Point:
        if threshold in finished:
            return finished[threshold]
        nudged = words = right = 0
        for batch in batches:
            questions = [prompts[i] for i in batch]
            output = generate(
                base,
                **_inputs([texts[i] for i in batch], questions, base, tokenizer, nudging_tokenizer),
                tokenizer=tokenizer,
                nudging_model=nudging_model,
                nudging_tokenizer=nudging_tokenizer,
                nudging_config=replace(config, nudge_threshold=threshold),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
            for question, pieces in zip(questions, pieces_of(output, tokenizer), strict=True):
                of_answer = count_nudged_words(pieces)
                nudged, words = nudged + of_answer[0], words + of_answer[1]
                right += question.is_labelled and question.is_right("".join(piece.text for piece in pieces))
            progress(threshold, len(batch))
        if not words:
            raise ValueError("No answer has a word, so there is no nudge rate: give other `prompts`.")
        point = Point(threshold, nudged, words, len(prompts), None if unlabelled else right)
        if journal is not None:
            journal.add(asdict(point))
        return point

    journal = None
    if resume is not None:
        setup = {
            "base": model_setup(base),
            "nudging_model": model_setup(nudging_model),
            "prompts": digest([texts, *(asdict(prompt) for prompt in prompts)]),
            "nudge_gate": gate,
            "num_nudging_tokens": config.num_nudging_tokens,
            "takeover_on_agreement": config.takeover_on_agreement,
            "max_new_tokens": max_new_tokens,
        }
        journal = Journal(resume, setup)
    finished = {row["threshold"]: Point(**row) for row in journal.rows} if journal is not None else {}
    if by_score:
        found = search_by_score(attempt, thresholds, gate)
    else:
        found = search_by_nudge_rate(attempt, target_nudge_rate, gate)
    for warning in found.warnings:
        logger.warning(warning)
    return found


def _inputs(
    texts: Sequence[str], prompts: Sequence[Prompt], base: Any, tokenizer: Any, nudging_tokenizer: Any
) -> dict[str, Any]:
    """The prompts of both models; where the nudging model knows no chats, `generate` gives it the base's."""
    ids, mask = padded([tokenizer(text)["input_ids"] for text in texts], tokenizer)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if nudging_tokenizer.chat_template:
        chats = chat_inputs([prompt.messages for prompt in prompts], tokenizer, nudging_tokenizer)
        inputs |= {name: chats[name] for name in ("nudging_input_ids", "nudging_attention_mask")}
    return {name: tensor.to(input_device(base)) for name, tensor in inputs.items()}


# Files --------------------------------------------------------------------------------------------------------------


def save(calibration: Calibration, folder: str | Path) -> Path:
    """Writes gate, threshold and target into the generation config of a model's folder, and leaves the rest of it.

    Raises:
        ValueError: for what is no model's folder.
    """
    folder = check_model_folder(folder)
    path = folder / "generation_config.json"
    if path.exists():
        fields = json.loads(path.read_text(encoding="utf-8"))
    else:
        fields = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).to_diff_dict()
    # transformers drops fields of others from a config that is marked as made from the model's.
    fields.pop("_from_model_config", None)
    fields |= {"nudge_gate": calibration.nudge_gate, "nudge_threshold": calibration.threshold}
    fields.pop("target_nudge_rate", None)
    if calibration.target_nudge_rate is not None:
        fields["target_nudge_rate"] = calibration.target_nudge_rate
    written = path.with_name(path.name + ".new")
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    written.write_text(text + "\n", encoding="utf-8")
    os.replace(written, path)
    return path


def check_model_folder(folder: str | Path) -> Path:
    """The folder, if it holds a model.

    Raises:
        ValueError: if it does not.
    """
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{folder} is no model's folder: it has no config.json.")
    return Path(folder)
