"""The held-out questions of the shipped pair as a task. It knows rows and answers, never models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..chats import messages_of
from ..study.demo import find_folder, read_questions
from ..study.prompts import Prompt
from .generated import as_data_set


def questions(**_: Any) -> Any:
    """The questions, each with its pattern and answer. The harness passes a task's metadata, which is ignored."""
    rows = read_questions(find_folder())
    return as_data_set([{"question": row.question, "pattern": row.pattern, "answer": row.answer} for row in rows])


def right(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether an answer is right."""
    asked = Prompt(messages_of(doc["question"]), pattern=doc["pattern"], answer=doc["answer"])
    return {"right": float(asked.is_right(results[0]))}
