"""What a text may go on with, by what was written before: prompt lookup. It knows ids, never models.

The nudging model's text is left where the base writes something else, and mostly goes on after it as it would have
gone on: with what it had written there, or as it went on after the same words before. Such a guess is read in one
pass, and what is good of it was written without a pass for each token. Source: prompt lookup decoding (Saxena, 2023),
and n-grams of the model's own rejected text as in lookahead decoding (Fu et al., arXiv 2402.02057).
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 3  # Ids by which a place is found again.
_SAME_LENGTH = 2  # Ids behind another one for which it is thought that it stands for just one that was left.
_LOOK_BACK = 1024  # Ids of the text that are searched, so that a long one costs no more than a short one.


def guess(text: Sequence[int], left: Sequence[int], since: int, most: int) -> list[int]:
    """At most so many ids that may follow a text.

    Args:
        text: with what the guess is to go on; its end is looked for.
        left: what had been written after a beginning of the text, from behind the id where it went another way.
        since: how many ids of the text stand behind that id.
        most: how many ids are guessed.
    """
    if most < 1 or not text:
        return []
    if place := _behind(left[:-1], text, fewest=1):
        return list(left[place : place + most])
    if 0 <= since <= min(_SAME_LENGTH, len(left) - 1):
        return list(left[since : since + most])
    before = text[-_LOOK_BACK - 1 : -1]
    if place := _behind(before, text, fewest=2):
        return [*before, text[-1]][place : place + most]
    return []


def _behind(ids: Sequence[int], text: Sequence[int], fewest: int) -> int:
    """Where `ids` go on behind most of the last ids of a text, the last such place; 0 where it is behind too few."""
    best, place = fewest - 1, 0
    last = text[-1]
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] == last:
            alike = 1
            while alike < _LONGEST and alike <= i and alike < len(text) and ids[i - alike] == text[-1 - alike]:
                alike += 1
            if alike > best:
                best, place = alike, i + 1
                if best == _LONGEST:
                    break
    return place
