"""Tests provenance: pieces, spans and words add up to the answer, whoever wrote it and however tokens split it."""

import random
from itertools import pairwise

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from running import inputs_of
from tiny import pair, prompts

import nudging_hf
from nudging_hf.core.vocabulary import Vocabulary, to_text
from nudging_hf.provenance import Alternative, Piece, PieceReader, count_nudged_words, pieces_of, spans, spans_of

PIECES = st.lists(st.builds(Piece, st.text(alphabet="ab \n\u00e9\u3000", max_size=4), st.booleans()))
NON_EMPTY = st.lists(st.builds(Piece, st.text(min_size=1, max_size=4), st.booleans()))


def read_all(reader, ids, authors):
    pieces = [piece for i, nudged in zip(ids, authors, strict=True) for piece in reader.read(i, nudged)]
    return pieces + reader.finish()


def characters(pieces):
    return [(character, piece.nudged) for piece in pieces for character in piece.text]


# Pieces --------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=20), st.integers(0))
def test_a_character_belongs_to_the_author_of_its_last_token(text, seed):
    tokenizer = tiny.byte_bpe()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    choose = random.Random(seed)
    authors = [choose.random() < 0.5 for _ in ids]
    by_byte = [author for i, author in zip(ids, authors, strict=True) for _ in Vocabulary(tokenizer).bytes_of(i)]
    ends, expected = 0, []
    for character in text:
        ends += len(character.encode())
        expected.append((character, by_byte[ends - 1]))
    pieces = read_all(PieceReader(tokenizer), ids, authors)
    assert characters(pieces) == expected
    assert all(piece.text for piece in pieces)


def test_an_emoji_over_several_tokens_is_one_piece_with_its_last_token():
    tokenizer = tiny.byte_bpe()
    reader = PieceReader(tokenizer)
    *begun, last = tokenizer("\U0001f9ff", add_special_tokens=False).input_ids
    assert len(begun) > 1
    first, other = Alternative(0, "a", 0.9, 3), Alternative(1, "b", 0.8, 2)
    assert [reader.read(i, True, 0.9, first if i == begun[0] else other) for i in begun] == [[]] * len(begun)
    assert reader.read(last, True, 0.2, other) == [Piece("\U0001f9ff", True, 0.2, first)]


@pytest.mark.parametrize("nudged", [True, False])
def test_an_answer_that_ends_inside_a_character_keeps_its_author(nudged):
    tokenizer = tiny.byte_bpe()
    reader = PieceReader(tokenizer)
    begun = tokenizer("\U0001f9ff", add_special_tokens=False).input_ids[0]
    assert reader.read(begun, nudged, 0.3) == []
    assert reader.read(tokenizer.eos_token_id, False, 0.5) == []  # The end mark has no author.
    assert reader.finish() == [Piece("\ufffd", nudged, 0.3)]
    assert reader.finish() == []


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
@given(data=st.data())
def test_pieces_join_to_the_text_without_control_tokens(name, data):
    tokenizer = tiny.TOKENIZERS[name]()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    reader = PieceReader(tokenizer)
    for _ in range(2):  # A reader can be used again after `finish`.
        pieces = read_all(reader, ids, [i % 2 == 0 for i in ids])
        assert "".join(piece.text for piece in pieces) == to_text(Vocabulary(tokenizer).join(ids))


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
@pytest.mark.parametrize("text", tiny.CORPUS)
def test_pieces_join_to_what_the_tokenizer_decodes(name, text):
    tokenizer = tiny.TOKENIZERS[name]()
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    pieces = read_all(PieceReader(tokenizer), ids, [False] * len(ids))
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    # Some decoders drop the space of a first token.
    assert "".join(piece.text for piece in pieces).lstrip(" ") == decoded.lstrip(" ")


# Spans ---------------------------------------------------------------------------------------------------------------


@given(NON_EMPTY)
def test_spans_split_the_text_where_the_author_changes(pieces):
    text = "".join(piece.text for piece in pieces)
    found = spans(pieces)
    assert "".join(span.text for span in found) == text
    assert [text[span.start : span.end] for span in found] == [span.text for span in found]
    assert all(left.end == right.start and left.nudged != right.nudged for left, right in pairwise(found))
    assert characters(found) == characters(pieces)


# The output of generate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "two"])
@pytest.mark.parametrize("seed", range(2))
def test_the_pieces_of_an_output_match_its_tokens_mask_and_probabilities(kind, seed):
    chosen = pair("llama", seed, kind)
    inputs = inputs_of(chosen, *prompts(chosen, 3, seed))
    output = nudging_hf.generate(chosen.base, **inputs, max_new_tokens=24, return_dict_in_generate=True)
    reader, vocabulary = PieceReader(chosen.tokenizer), Vocabulary(chosen.tokenizer)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    for row, pieces in enumerate(pieces_of(output, chosen.tokenizer)):
        n = int((~output.base_top1_probs[row].isnan()).sum())
        columns = (new, output.nudged_mask, output.base_top1_probs)
        columns += (output.base_tokens, output.base_token_probs, output.base_ranks)
        expected, place = [], -1
        for token, nudged, top1, *said in zip(*(column[row, :n].tolist() for column in columns), strict=True):
            own, *figures = said
            place += 1
            instead = Alternative(place, to_text(vocabulary.bytes_of(own)), *figures) if nudged else None
            expected += reader.read(token, nudged, top1, instead)
        assert pieces == expected + reader.finish()
        assert all((piece.instead is not None) == piece.nudged for piece in pieces)
        assert "".join(piece.text for piece in pieces) == to_text(Vocabulary(chosen.tokenizer).join(new[row].tolist()))
        assert spans_of(output, chosen.tokenizer)[row] == spans(pieces)


def test_end_marks_and_padding_have_no_pieces():
    chosen = pair("llama", 0, "shared")
    inputs = inputs_of(chosen, *prompts(chosen, 8, 0))
    output = nudging_hf.generate(chosen.base, **inputs, max_new_tokens=60, return_dict_in_generate=True)
    assert "eos" in output.finish_reasons and output.base_top1_probs.isnan().any()
    vocabulary = Vocabulary(chosen.tokenizer)
    for row, pieces in enumerate(pieces_of(output, chosen.tokenizer)):
        inside = ~output.base_top1_probs[row].isnan()
        ended = output.finish_reasons[row] == "eos"
        ids = output.sequences[row, inputs["input_ids"].shape[1] :][inside].tolist()
        words = ids[:-1] if ended else ids
        assert "".join(piece.text for piece in pieces) == to_text(vocabulary.join(words))


# Words ---------------------------------------------------------------------------------------------------------------


@given(PIECES)
def test_words_are_those_of_str_split(pieces):
    text = "".join(piece.text for piece in pieces)
    words = len(text.split())
    nudged, counted = count_nudged_words(pieces)
    assert counted == words and 0 <= nudged <= words
    assert count_nudged_words([Piece(piece.text, True) for piece in pieces]) == (words, words)
    assert count_nudged_words([Piece(piece.text, False) for piece in pieces]) == (0, words)


@given(PIECES)
def test_word_counts_do_not_depend_on_how_the_text_is_split(pieces):
    characters = [Piece(character, piece.nudged) for piece in pieces for character in piece.text]
    assert count_nudged_words(characters) == count_nudged_words(pieces)


@given(PIECES, PIECES)
def test_word_counts_add_up_where_texts_meet_at_white_space(left, right):
    (a, b), (c, d) = count_nudged_words(left), count_nudged_words(right)
    assert count_nudged_words([*left, Piece(" ", True), *right]) == (a + c, b + d)


def test_a_word_is_nudged_if_any_of_its_characters_is():
    pieces = [
        Piece(" So", True),
        Piece(" the sum", False),
        Piece(" is", True),
        Piece("n't", False),
        Piece(" 4", False),
        Piece("2", True),
    ]
    assert count_nudged_words(pieces) == (3, 5)
