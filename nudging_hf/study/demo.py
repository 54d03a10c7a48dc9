"""The demonstration: a comparison of a pair that lies in a folder. It knows models and scores, never a terminal.

The folder holds `heldout.jsonl`, the questions, and the models `models/base` and `models/nudging`. Two more take part
if they are there: `models/nudging-shared`, a nudging model with the base's own vocabulary, and
`models/large-aligned`, which training instead of nudging makes of the base. A row of `heldout.jsonl`:

    {"task": "sums", "prompt": what the base is given, "messages": what an aligned model is given, as chat messages,
     "pattern": a regular expression with one group, "answer": what its last match in a right answer holds}
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .prompt_files import read_labelled_prompts
from .prompts import Prompt

if TYPE_CHECKING:
    from .comparison import Models, Result

MAX_NEW_TOKENS = 220  # One and a half times the length of the longest right answer of examples/mini, in tokens.


def find_folder() -> Path:
    """`examples/mini` here or in the package's checkout, or what of it an installed package has.

    Raises:
        FileNotFoundError: if there is none of them.
    """
    package = Path(__file__).parents[1]
    for folder in (Path("examples", "mini"), package.parent / "examples" / "mini", package / "mini"):
        if (folder / "heldout.jsonl").exists():
            return folder
    raise FileNotFoundError("No examples/mini here: run from a checkout of the project, or name a folder by --pair.")


def read_questions(folder: Path) -> list[Prompt]:
    """The questions of a folder. It imports nothing of torch.

    Raises:
        FileNotFoundError: if the questions, the base or the nudging model are missing.
        ValueError: if `heldout.jsonl` holds something else than questions.
    """
    for needed in (folder / "heldout.jsonl", folder / "models" / "base", folder / "models" / "nudging"):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: name the folder of another pair by --pair.")
    return read_labelled_prompts(folder / "heldout.jsonl")


def load(folder: Path) -> Models:
    """Loads the models of a folder."""
    from .comparison import Models
    from .reader import Reader

    models = folder / "models"
    shared, large = (
        Reader.load(models / name) if (models / name).exists() else None
        for name in ("nudging-shared", "large-aligned")
    )
    base, nudging = Reader.load(models / "base", chat=False), Reader.load(models / "nudging")
    return Models(base, nudging, shared, large_aligned=large)


def as_dict(result: Result, base: Result) -> dict[str, Any]:
    """All figures and answers of a contestant, for JSON."""
    nudged, words = result.nudged_words
    is_nudged = result.contestant.nudged
    return {
        **result.as_dict(base),
        "nudged_words": nudged if is_nudged else None,
        "words": words,
        "answers": [
            {
                "task": question.task,
                "question": question.question,
                "answer": question.answer,
                "given": question.answer_in(answer.text),
                "correct": right,
                "text": answer.text,
                "nudged_spans": answer.nudged_spans if is_nudged else None,
            }
            for question, answer, right in zip(result.questions, result.answers, result.marks(), strict=True)
        ],
    }
