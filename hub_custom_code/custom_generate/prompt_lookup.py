"""Guesses what a text continues with from what was written before: prompt lookup. It knows ids, never models.

Where the base writes something else than the nudging model, the nudging model's text is abandoned. After the
difference the nudging model mostly writes what it would have written anyway: what it had written there, or what came
after the same words before. Such a guess is read in one pass, and the part of it that was right needed no pass for
each token. Source: prompt lookup decoding (Saxena, 2023), and n-grams of the model's own rejected text as in lookahead
decoding (Fu et al., arXiv 2402.02057).
"""

from __future__ import annotations

from collections.abc import Sequence

_MAX_MATCHING_NGRAM_SIZE = 3  # A place is found by at most this many ids.
_MAX_TOKENS_SINCE = 2  # Up to here one written id is taken to have replaced one abandoned id.
_MAX_SEARCHED = 1024  # Only the last ids of a text are searched, so that a long text costs no more than a short one.


def guess(text: Sequence[int], abandoned: Sequence[int], tokens_since: int, num_output_tokens: int) -> list[int]:
    """Guesses ids that may follow a text.

    Args:
        text: the ids to continue. Their last n-gram is looked for.
        abandoned: what had been written where the text went another way, from one id after the divergence on.
        tokens_since: how many ids the text has from the position of `abandoned[0]` on.
        num_output_tokens: the most ids to guess.

    Returns:
        At most `num_output_tokens` ids; none where nothing is found.
    """
    if num_output_tokens < 1 or not text:
        return []
    if place := _find_continuation(abandoned[:-1], text, min_matched=1):
        return list(abandoned[place : place + num_output_tokens])
    if 0 <= tokens_since <= min(_MAX_TOKENS_SINCE, len(abandoned) - 1):
        return list(abandoned[tokens_since : tokens_since + num_output_tokens])
    before = text[-_MAX_SEARCHED - 1 : -1]
    if place := _find_continuation(before, text, min_matched=2):
        return [*before, text[-1]][place : place + num_output_tokens]
    return []


def _find_continuation(ids: Sequence[int], text: Sequence[int], min_matched: int) -> int:
    """Finds the place in `ids` after the longest match with the end of a text, and of several the last one.

    Returns:
        The index of the id after the match; 0 where fewer than `min_matched` ids match.
    """
    best, place = min_matched - 1, 0
    last = text[-1]
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] == last:
            matched, limit = 1, min(_MAX_MATCHING_NGRAM_SIZE, i + 1, len(text))
            while matched < limit and ids[i - matched] == text[-1 - matched]:
                matched += 1
            if matched > best:
                best, place = matched, i + 1
                if best == _MAX_MATCHING_NGRAM_SIZE:
                    break
    return place
