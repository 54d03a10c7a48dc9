import copy
import random
from itertools import pairwise

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nudging_hf.bridge import (
    OneVocabulary,
    TwoVocabularies,
    Vocabulary,
    answer_class,
    ends_inside_character,
    word_starts,
)

TOKENIZERS = ["byte_bpe", "other_byte_bpe", "metaspace_bpe", "unigram", "wordpiece"]
LOSSLESS = TOKENIZERS[:4]
TEXT = 'The cat sat on the mat. It had 12 hats,  and 3 mice; see "Anna".\nThen the café closed 😀 at nine!  '


def vocabulary(name: str) -> Vocabulary:
    return Vocabulary(getattr(tiny, name)())


def split(text: str) -> list[str]:
    raw = text.encode()
    bounds = [0, *word_starts(raw), len(raw)]
    return [raw[a:b].decode() for a, b in pairwise(bounds)]


@given(st.text(alphabet=" ab\n", max_size=12))
def test_words_split_as_the_rule_says(text):
    """As `text.lstrip(" ").split(" ")`, spaces kept: leading ones by the first word, the last of a run by the next."""
    pieces = text.lstrip(" ").split(" ")
    words = split(text)
    assert "".join(words) == text
    assert [word.strip(" ") for word in words if word.strip(" ")] == [piece for piece in pieces if piece]
    assert all(word[:1] == " " and word[1:2] != " " for word in words[1:])
    assert not words[-1].strip(" ") or pieces[-1] != ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one two", ["one", " two"]),
        ("  one   two ", ["  one  ", " two", " "]),
        ("one\ntwo three", ["one\ntwo", " three"]),
        ("\n two", ["\n", " two"]),
        ("   ", ["   "]),
        ("", [""]),
    ],
)
def test_words(text, words):
    assert split(text) == words


@given(st.binary(max_size=8))
@example(b"\xed\xa0")
@example(b"\xed\x9f")
@example(b"\xf0\x9f\x98")
@example(b"\xf4\x90")
def test_inside_a_character_is_a_matter_of_what_may_follow(raw):
    """Some byte that may follow completes or continues a character, and none of them would stand alone."""
    inside = ends_inside_character(raw)
    longer = [(raw + bytes([byte])).decode("utf-8", "replace") for byte in range(0x80, 0xC0)]
    grows = any(len(text) <= len(raw.decode("utf-8", "replace")) for text in longer)
    assert inside == grows


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_text_of_tokens_is_what_the_tokenizer_decodes(name):
    tokens = vocabulary(name)
    for text in (TEXT, "Anna", " 7 of 9"):
        ids = tokens.tokenizer("a" + text, add_special_tokens=False).input_ids
        decoded = tokens.tokenizer.decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=True)
        assert tokens.join(ids).decode().removeprefix(" ") == decoded


@pytest.mark.parametrize("name", LOSSLESS)
def test_encoding_in_context_keeps_the_text(name):
    tokens = vocabulary(name)
    draw = random.Random(name)
    for _ in range(200):
        cut, end = sorted(draw.sample(range(1, len(TEXT)), 2))
        left, text = TEXT[:cut], TEXT[cut:end]
        ids = tokens.encode_after(left, text)
        before = tokens.tokenizer("a" + left, add_special_tokens=False).input_ids
        assert tokens.join([*before, *ids]).decode().removeprefix(" ") == "a" + left + text


@pytest.mark.parametrize(
    "name", ["byte_bpe", "metaspace_bpe", "unigram", "wordpiece"]
)  # The other's tokens span words.
def test_words_encoded_one_by_one_are_the_ids_of_the_whole(name):
    tokens = vocabulary(name)
    text = "The cat sat on the mat and had 12 hats. It saw Anna."
    ids, left = [], "Now:\n"
    for word in split(text):
        ids += tokens.encode_after(left, word)
        left += word
    assert ids == tokens.encode_after("Now:\n", text)


def test_wordpiece_goes_on_within_a_word():
    tokens = vocabulary("wordpiece")
    ids = tokens.encode_after("the ca", "t")
    assert tokens.join(ids) == b"t"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_control_token_that_is_spelt_out_is_text(name):
    tokens = vocabulary(name)
    for i in tokens.control:
        spelt = tokens.tokenizer.convert_ids_to_tokens(i)
        assert not set(tokens.encode_after("so ", spelt)) & (tokens.control - {tokens.tokenizer.unk_token_id})
        assert tokens.bytes_of(i) == b""


def answer(name: str, nudging_name: str, kind=TwoVocabularies):
    return kind(vocabulary(name), vocabulary(nudging_name), [5, 6], [7, 8])


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("nudging_name", TOKENIZERS)
def test_what_the_nudging_model_reads_is_a_function_of_the_text(name, nudging_name):
    """However the answer came about: token by token with questions in between, or all at once."""
    text = " ".join([TEXT] * 12)
    asked, unasked = answer(name, nudging_name), answer(name, nudging_name)
    for token in asked.vocabulary.encode_after("a", text):
        asked.append(token)
        asked.nudging_ids()
        unasked.append(token)
    assert asked.nudging_ids() == unasked.nudging_ids()


@pytest.mark.parametrize("nudging_name", TOKENIZERS)
def test_what_the_nudging_model_reads_is_what_its_tokenizer_makes_of_the_whole(nudging_name):
    written = answer("byte_bpe", nudging_name)
    text = " The cat sat on the mat and had 12 hats. It saw Anna." * 20
    for token in written.vocabulary.encode_after("", text):
        written.append(token)
    assert written.nudging_ids() == written.nudging_vocabulary.encode_after(written._nudging_left, text)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["The", " cat", "  ", " 12", "\n", " é😀", " a"]), max_size=8))
def test_words_of_two_vocabularies_lose_no_text(parts):
    text = "".join(parts)
    for nudging_name in LOSSLESS:
        row = answer("other_byte_bpe", nudging_name)
        lookahead = row.nudging_vocabulary.encode_after("a", text)
        words = row.words(lookahead)
        assert "".join(word.text for word in words) == text
        assert b"".join(row.vocabulary.join(word.ids) for word in words).decode() == text


def test_a_word_that_the_base_cannot_write_is_joined_with_the_next():
    row = answer("wordpiece", "byte_bpe")
    newline_only = row.nudging_vocabulary.encode_after("", "\n the cat")
    assert [word.text for word in row.words(newline_only)] == ["\n the", " cat"]
    assert row.words(row.nudging_vocabulary.encode_after("", "\n\n")) == ()


def test_splits_of_one_vocabulary_move_to_the_start_of_a_token():
    row = answer("byte_bpe", "byte_bpe", OneVocabulary)
    for text in (TEXT, "  two  spaces ", "\n\n", "x"):
        ids = row.vocabulary.encode_after("", text)
        words = row.words(ids)
        assert [token for word in words for token in word.ids] == ids
        assert all(word.ids for word in words)
        assert not any(word.is_empty for word in words[1:-1])


def test_an_emoji_split_over_tokens_is_one_unfinished_word():
    row = answer("byte_bpe", "other_byte_bpe")
    ids = row.nudging_vocabulary.encode_after("a", " 😀")
    states = [row.is_one_unfinished_word(ids[:n]) for n in range(1, len(ids) + 1)]
    assert states[-1] is False and any(states[:-1])


def test_the_models_exchange_ids_only_where_theirs_mean_the_same():
    same, other = vocabulary("byte_bpe"), vocabulary("other_byte_bpe")
    assert answer_class(same, vocabulary("byte_bpe")) is OneVocabulary
    assert answer_class(same, other) is TwoVocabularies
    grown = copy.deepcopy(tiny.byte_bpe())
    grown.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    assert answer_class(same, Vocabulary(grown)) is OneVocabulary
    grown.add_tokens(["word"])
    assert answer_class(same, Vocabulary(grown)) is TwoVocabularies


def test_unigram_does_not_find_a_control_token_that_is_spelt_out():
    """Control tokens are among the pieces of a Unigram model, here the cheapest ones."""
    backend = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("</s>", 0.0), *((c, -9.0) for c in "\n▁</s>ab")], unk_id=0, byte_fallback=False
        )
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokens = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))
    for text in ("a </s> b", "a</s></s>", "</s>"):
        ids = tokens.encode_after("b", text)
        assert 1 not in ids
        assert tokens.join(ids) == text.encode()
