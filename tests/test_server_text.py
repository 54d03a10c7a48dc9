"""The text of a served answer: joined, it is the whole text up to a stop string, in whole characters."""

import functools
import itertools

import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nudging_hf.core.vocabulary import Vocabulary
from nudging_hf.provenance import PieceReader
from nudging_hf.server.engine import Chunk, Logprobs
from nudging_hf.server.text import AnswerText, add_stretch


@functools.cache
def vocabulary():
    return Vocabulary(tiny.byte_bpe())


def words_of(text):
    return vocabulary().tokenizer.encode(text, add_special_tokens=False)


def read(ids, nudged, stop=(), sizes=None, reason="length", logprobs=False):
    """The deltas of an answer that comes in chunks of these sizes."""
    answer, deltas, sizes, at = AnswerText(vocabulary(), stop), [], iter(sizes or itertools.repeat(1)), 0
    while at < len(ids):
        end = at + next(sizes)
        told = tuple(Logprobs(-1.0, ()) for _ in ids[at:end]) if logprobs else None
        chunk = Chunk(0, tuple(ids[at:end]), tuple(nudged[at:end]), told, reason if end >= len(ids) else None)
        deltas.append(answer.read(chunk))
        at = end
    return answer, deltas


def first_stop(text, stop):
    """Where a text ends if it is written character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            return min(starts)
    return None


ANSWERS = st.text("abc é€🙂\n", min_size=1, max_size=30)
STOPS = st.lists(st.text("abc €🙂\n", min_size=1, max_size=4), max_size=3)


@given(text=ANSWERS, stop=STOPS, data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_part_of_a_stop_string_and_of_a_character_is_ever_given_out(text, stop, data):
    ids = words_of(text)
    nudged = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(ids), max_size=len(ids)))
    whole = vocabulary().join(ids).decode()
    answer, deltas = read(ids, nudged, stop, sizes)
    cut = first_stop(whole, stop)
    assert "".join(delta.text for delta in deltas) == answer.text == whole[:cut]
    assert answer.num_tokens == len(ids) and answer.num_nudged == sum(nudged)


@given(text=ANSWERS, stop=STOPS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_authors_are_told_with_the_text_that_they_wrote(text, stop, data):
    ids = words_of(text)
    nudged = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    answer, deltas = read(ids, nudged, stop)
    reader, authors = PieceReader(vocabulary()), []
    for token, by in zip(ids, nudged, strict=True):
        authors += [piece.nudged for piece in reader.read(token, by) for _ in piece.text]
    told, at = [], 0
    for delta in deltas:
        end = at + len(delta.text)
        assert all(at <= first < last <= end for first, last in delta.nudged)
        told += [any(first <= place < last for first, last in delta.nudged) for place in range(at, end)]
        at = end
    assert told == authors[: len(answer.text)]


@given(text=ANSWERS, stop=STOPS)
@settings(max_examples=200, deadline=None)
def test_tokens_are_told_with_the_text_that_they_begin(text, stop):
    ids = words_of(text)
    answer, deltas = read(ids, [False] * len(ids), stop, logprobs=True)
    told = [each for delta in deltas for each in delta.tokens]
    assert [each.token for each in told] == ids[: len(told)]
    assert all(each.offset < len(answer.text) for each in told) or not told
    if not stop:
        assert len(told) == len(ids)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    answer = AnswerText(vocabulary(), ("\n\n",))
    ids = [each for letter in ("a", "\n", "b", "\n", "\n", "c") for each in words_of(letter)]
    given_out = [answer.read(Chunk(0, (token,), (False,))).text for token in ids]
    assert given_out == ["a", "", "\nb", "", "", ""]
    assert answer.read(Chunk(0, finish_reason="stop_string")).text == ""


def test_an_answer_that_ends_inside_a_character_shows_that():
    ids = words_of("🙂")
    assert len(ids) > 1
    answer, deltas = read(ids[:1], [True])
    assert answer.text == "�" and deltas[-1].nudged == ((0, 1),)


def test_stretches_that_touch_are_one():
    stretches = []
    for start, end in ((0, 2), (2, 3), (5, 6)):
        add_stretch(stretches, start, end)
    assert stretches == [(0, 3), (5, 6)]
