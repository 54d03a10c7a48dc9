"""What models are asked, and how an answer is marked. It knows messages and files, never models."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..chats import Message, checked_messages, messages_of, validate_no_surrogates

_SYSTEM = "Answer the question by walking through the reasoning steps."
# The paper's kinds of question (sums in words, coins, letters, common sense, knowledge), and some that ask for advice.
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
    """A prompt of both models, and how to find the answer to it, if the right one is known.

    Args:
        messages: the chat that the nudging model is given.
        prompt: what the base is given; if it is left out, the plain prompt that `base_template` makes of the chat.
        pattern: a regular expression with one group.
        answer: what the last match of `pattern` in a right answer holds.
        task: the task that the prompt belongs to; "" if it belongs to none.

    Raises:
        ValueError: for messages in another order, a pattern without its one group, and one of `pattern` and `answer`
            without the other.
    """

    messages: Sequence[Message]
    prompt: str | None = None
    pattern: str | None = None
    answer: str | None = None
    task: str = ""

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
    def question(self) -> str:
        """The question itself, as the aligned models are asked it."""
        return self.messages[-1]["content"]

    @property
    def is_labelled(self) -> bool:
        """Whether the right answer is known."""
        return self.pattern is not None

    def answer_in(self, text: str) -> str | None:
        """The answer that a text gives: what the last match of `pattern` holds, if there is one."""
        assert self.pattern is not None
        found = re.findall(self.pattern, text)
        return found[-1] if found else None

    def is_right(self, text: str) -> bool:
        """Whether a text gives the right answer."""
        return self.answer_in(text) == self.answer


def are_labelled(prompts: Iterable[Prompt]) -> bool:
    """Whether the right answer to every prompt is known."""
    return all(prompt.is_labelled for prompt in prompts)


def built_in_prompts() -> list[Prompt]:
    """Twenty questions of many kinds, without their answers."""
    return [Prompt(messages_of(question, _SYSTEM)) for question in BUILT_IN]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file.

    A file whose first line begins with `{` holds JSON lines with the fields of [`Prompt`]: `messages` must be there,
    the others may be, and all other fields are ignored. Any other file holds one question in each line. Empty lines
    are skipped.

    Raises:
        ValueError: for a row that is no prompt, naming its line, and for a file that holds none.
    """
    numbered = [(number, line.strip()) for number, line in enumerate(_lines_of(path), start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no prompts.")
    if not numbered[0][1].startswith("{"):
        return [Prompt(messages_of(line)) for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            row = json.loads(line)
            fields = {name: row.get(name) for name in ("prompt", "pattern", "answer")}
            prompts.append(Prompt(row["messages"], **fields, task=str(row.get("task") or "")))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            why = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(
                f'{path}, line {number}, is no prompt, {{"messages": [...]}} at the least: {why}'
            ) from error
    return prompts


def read_labelled_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file whose right answers are all known: see [`read_prompts`].

    Raises:
        ValueError: for a row without `pattern` and `answer` too.
    """
    prompts = read_prompts(path)
    if unlabelled := sum(not prompt.is_labelled for prompt in prompts):
        raise ValueError(
            f"{path}: `pattern` and `answer` tell which answers are right, and {unlabelled} of {len(prompts)} prompts "
            "have none: give JSON lines with both in each."
        )
    return prompts


def _lines_of(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file. Only line breaks end them, not the other separators that Unicode has."""
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


def first_of_each_task(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """The first `count` prompts of each task, in their order."""
    taken: Counter[str] = Counter()
    first = []
    for prompt in prompts:
        if taken[prompt.task] < count:
            taken[prompt.task] += 1
            first.append(prompt)
    return first


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts, or all, at even distances, because a file goes task by task."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def tasks_of(prompts: Sequence[Prompt]) -> list[str]:
    """The tasks, in their order; none if all prompts belong to one."""
    tasks = list(dict.fromkeys(prompt.task for prompt in prompts))
    return tasks if len(tasks) > 1 else []
