"""What a text may go on with, by what was written before: prompt lookup. It knows ids, never models.

The nudging model's text is left where the base writes something else, and mostly goes on after it as it would have
gone on: with what it had written there, or as it went on after the same words before. Such a guess is read in one
pass, and what is good of it was written without a pass for each token. Source: prompt lookup decoding (Saxena, 2023),
and n-grams of the model's own rejected text as in lookahead decoding (Fu et al., arXiv 2402.02057).
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 3  # Ids by which a place is found again.
_LOOK_BACK = 1024  # Ids of the text that are searched, so that a long one costs no more than a short one.


def guess(text: Sequence[int], left: Sequence[int], most: int) -> list[int]:
    """At most so many ids that may follow a text.

    Args:
        text: with what the guess is to go on; its end is looked for.
        left: what had been written after a beginning of the text, from where the text went another way.
        most: how many ids are guessed.
    """
    if most < 1:
        return []
    for length in range(min(_LONGEST, len(text)), 0, -1):
        end = text[len(text) - length :]
        for start in range(len(left) - length):
            if left[start] == end[0] and left[start : start + length] == end:
                return list(left[start + length : start + length + most])
    for length in range(min(_LONGEST, len(text)), 1, -1):
        end = text[len(text) - length :]
        for start in range(len(text) - length - 1, max(0, len(text) - _LOOK_BACK) - 1, -1):
            if text[start] == end[0] and text[start : start + length] == end:
                return list(text[start + length : start + length + most])
    return []
