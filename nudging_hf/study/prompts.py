"""What models are asked, and the right answer to it. It knows messages, never files or models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..chats import Message, checked_messages, messages_of, validate_no_surrogates
from . import marking

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
    """A prompt of both models, and the right answer to it, if that is known.

    Args:
        messages: the chat that the nudging model is given.
        prompt: what the base is given; if it is left out, the plain prompt that `base_template` makes of the chat.
        pattern: a regular expression with one group, whose last match in a text is what the text answers. If it is
            left out, the answer tells how a text is read: see [`~study.marking`].
        answer: the right answer.
        task: the task that the prompt belongs to; "" if it belongs to none.

    Raises:
        ValueError: for messages in another order or without a content, an answer that is blank, a pattern without its
            one group, and one without an answer.
    """

    messages: Sequence[Message]
    prompt: str | None = None
    pattern: str | None = None
    answer: str | None = None
    task: str = ""

    def __post_init__(self) -> None:
        try:
            system, turns = checked_messages(self.messages)
        except ValueError as error:
            raise ValueError(f"`messages`: {error}") from error
        if blank := [text for text in (*turns, *([] if system is None else [system])) if not text.strip()]:
            raise ValueError(f"`messages`: a content is empty, got {blank[0]!r}.")
        for name in ("prompt", "pattern", "answer"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, str):
                    raise ValueError(f"`{name}` must be text, got {value!r}.")
                validate_no_surrogates(value, f"`{name}`")
                if not value.strip():
                    raise ValueError(f"`{name}` is empty, got {value!r}: give one, or leave it out.")
        if self.pattern is not None:
            if self.answer is None:
                raise ValueError("`pattern` needs an `answer`, and there is none.")
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"`pattern` is no regular expression: {error}.") from error
            if groups != 1:
                raise ValueError(f"`pattern` must have one group, got {groups}.")

    @property
    def question(self) -> str:
        """The question itself, as the aligned models are asked it."""
        return checked_messages(self.messages)[1][-1]

    @property
    def rule(self) -> marking.Rule | None:
        """How an answer is read and marked; `None` if no rule can tell which answers are right."""
        return None if self.answer is None else marking.rule_for(self.answer, self.pattern)

    @property
    def is_labelled(self) -> bool:
        """Whether a rule can tell which answers are right."""
        return self.rule is not None

    def answer_in(self, text: str) -> str | None:
        """What a text answers, if it answers anything. There must be a rule."""
        assert self.rule is not None
        return self.rule.read(text)

    def is_right(self, text: str) -> bool:
        """Whether a text gives the right answer. There must be a rule."""
        given = self.answer_in(text)
        assert self.rule is not None and self.answer is not None
        return given is not None and self.rule.is_right(given, self.answer)


def are_labelled(prompts: Iterable[Prompt]) -> bool:
    """Whether a rule can tell which answers to each prompt are right."""
    return all(prompt.is_labelled for prompt in prompts)


def validate_labelled(prompts: Sequence[Prompt], what: str) -> None:
    """Raises a `ValueError` if there is a prompt without a right answer. `what` needs one, as an error says."""
    if unlabelled := sum(not prompt.is_labelled for prompt in prompts):
        raise ValueError(
            f"{what} needs the right answer to each prompt, and {unlabelled} of {len(prompts)} have none that a rule "
            f"can find: give each an `answer` of at most {marking.LONGEST_ANSWER} words, or a `pattern` too."
        )


def built_in_prompts() -> list[Prompt]:
    """Twenty questions of many kinds, without their answers."""
    return [Prompt(messages_of(question, _SYSTEM)) for question in BUILT_IN]


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
