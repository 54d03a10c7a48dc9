"""A guess is what stood behind the same ids before: where the text was left first, then in the text itself."""

from hypothesis import given
from hypothesis import strategies as st

from nudging_hf.core.prompt_lookup import guess

IDS = st.lists(st.integers(0, 4), max_size=40)


def is_part(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@given(IDS, IDS, st.integers(-2, 40), st.integers(0, 8))
def test_it_was_written_before(text, left, since, most):
    found = guess(text, left, since, most)
    assert len(found) <= most
    assert is_part(found, left) or is_part(found, text)


def test_the_text_goes_on_as_it_would_have_gone_on():
    # "we get 25 pens so" was left where the base wrote 19 in the place of 25, and then " pens".
    assert guess([1, 2, 19, 30], [30, 31, 32, 33], 1, 2) == [31, 32]


def test_where_nothing_is_alike_one_id_stands_for_one():
    assert guess([1, 2, 19], [30, 31, 32], 0, 2) == [30, 31]
    assert guess([1, 2, 19, 40], [30, 31, 32], 1, 2) == [31, 32]
    assert guess([1, 2, 19, 40, 41, 42], [30, 31, 32, 33], 3, 2) == []


def test_the_longest_ids_in_common_say_where():
    assert guess([9, 1, 2], [2, 7, 7, 1, 2, 8, 8], 0, 3) == [8, 8]


def test_the_text_says_how_it_went_on_last_time():
    assert guess([1, 2, 3, 9, 1, 2, 4, 1, 2], [], 9, 3) == [4, 1, 2]


def test_one_id_in_common_is_too_little_within_the_text():
    assert guess([1, 2, 3, 1], [], 4, 3) == []
    assert guess([], [1, 2], 0, 3) == []
