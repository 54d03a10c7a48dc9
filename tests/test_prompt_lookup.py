"""A guess is what came after the same ids before: first in the abandoned text, then in the text itself."""

from hypothesis import given
from hypothesis import strategies as st

from nudging_hf.core.prompt_lookup import guess

IDS = st.lists(st.integers(0, 4), max_size=40)


def is_part(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@given(IDS, IDS, st.integers(-2, 40), st.integers(0, 8))
def test_every_guess_was_written_before(text, abandoned, tokens_since, num_output_tokens):
    found = guess(text, abandoned, tokens_since, num_output_tokens)
    assert len(found) <= num_output_tokens
    assert is_part(found, abandoned) or is_part(found, text)


def test_the_abandoned_text_continues_after_the_same_ids():
    # The nudging model had written "we get 25 pens so". The base wrote 19 in the place of 25, and then " pens".
    assert guess([1, 2, 19, 30], [30, 31, 32, 33], 1, 2) == [31, 32]


def test_without_a_match_one_written_id_replaces_one_abandoned_id():
    assert guess([1, 2, 19], [30, 31, 32], 0, 2) == [30, 31]
    assert guess([1, 2, 19, 40], [30, 31, 32], 1, 2) == [31, 32]
    assert guess([1, 2, 19, 40, 41, 42], [30, 31, 32, 33], 3, 2) == []


def test_the_longest_match_is_used():
    assert guess([9, 1, 2], [2, 7, 7, 1, 2, 8, 8], 0, 3) == [8, 8]


def test_without_abandoned_text_the_last_match_in_the_text_is_used():
    assert guess([1, 2, 3, 9, 1, 2, 4, 1, 2], [], 9, 3) == [4, 1, 2]


def test_one_matching_id_is_not_enough_within_the_text():
    assert guess([1, 2, 3, 1], [], 4, 3) == []
    assert guess([], [1, 2], 0, 3) == []
