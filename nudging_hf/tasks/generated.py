"""Generates coin_flip and last_letter_concat without a network. It knows names and rules, never models.

The recipe is that of Wei et al., "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models" (arXiv
2201.11903), with four names in each row. The columns are those of `skrishna/coin_flip` and
`ChilleD/LastLetterConcat`.
"""

from __future__ import annotations

import random
from typing import Any

NAMES_PER_ROW = 4

NAMES = (
    "Aaron Abigail Adam Alan Alice Amanda Amy Andrea Andrew Angela Anna Anthony Barbara Benjamin Beth Brandon Brian "
    "Carl Carol Catherine Charles Christine Cynthia Daniel David Deborah Dennis Diana Donald Dorothy Douglas Edward "
    "Elena Emily Eric Ethan Evelyn Frances Frank Gary George Gerald Gloria Grace Gregory Hannah Harold Heather Helen "
    "Henry Isabel Jack Jacob James Janet Jason Jeffrey Jennifer Jeremy Jerry Jessica Joan Joel Jonathan Jorge Joseph "
    "Joyce Juan Julia Justin Karen Keith Kelly Kenneth Kevin Kimberly Larry Laura Lawrence Linda Lisa Louis Lucy "
    "Margaret Maria Mark Martha Martin Mary Matthew Megan Melissa Michael Nancy Nathan Nicole Noah Olivia Oscar "
    "Pamela Patrick Paul Peter Philip Rachel Ralph Raymond Rebecca Richard Robert Roger Ronald Rose Russell Ruth Ryan "
    "Samuel Sandra Sara Scott Sean Sharon Shirley Simon Sofia Stephen Steven Susan Teresa Theresa Thomas Tiffany "
    "Timothy Tyler Victor Victoria Vincent Virginia Walter Wayne William Zachary"
).split()


def coin_flip_rows(rows: int, seed: int) -> list[dict[str, str]]:
    """`rows` rows of coin_flip. Each person flips the coin with probability 1/2."""
    rng = random.Random(f"coin_flip {seed}")
    drawn = []
    for _number in range(rows):
        flips = [(name, rng.random() < 0.5) for name in rng.sample(NAMES, NAMES_PER_ROW)]
        said = " ".join(f"{name} {'flips' if flipped else 'does not flip'} the coin." for name, flipped in flips)
        heads = sum(flipped for _, flipped in flips) % 2 == 0
        drawn.append({
            "inputs": f"Q: A coin is heads up. {said} Is the coin still heads up?",
            "targets": "yes" if heads else "no",
        })  # fmt: skip
    return drawn


def last_letter_concat_rows(rows: int, seed: int) -> list[dict[str, str]]:
    """`rows` rows of last_letter_concat."""
    rng = random.Random(f"last_letter_concat {seed}")
    drawn = []
    for _number in range(rows):
        names = rng.sample(NAMES, NAMES_PER_ROW)
        drawn.append({
            "question": f'Take the last letters of each words in "{" ".join(names)}" and concatenate them.',
            "answer": "".join(name[-1] for name in names),
        })  # fmt: skip
    return drawn


def coin_flips(rows: int, seed: int, **_: Any) -> Any:
    """The rows of [`coin_flip_rows`] as a data set. The harness passes a task's metadata too, which is ignored."""
    return as_data_set(coin_flip_rows(rows, seed))


def last_letter_concats(rows: int, seed: int, **_: Any) -> Any:
    """The rows of [`last_letter_concat_rows`], likewise."""
    return as_data_set(last_letter_concat_rows(rows, seed))


def as_data_set(rows: list[dict[str, Any]]) -> Any:
    """A `datasets.DatasetDict` with the one split "test"."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(rows)})
