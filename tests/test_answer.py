"""Text and ids of answers: words, encoding in context, chunks of any script, and the user's tokenizers."""

import copy
import random
import sys
import threading
from itertools import pairwise
from typing import ClassVar

import oracle
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nudging_hf.core.answer import OneVocabulary, TwoVocabularies, answer_class, ends_inside_character
from nudging_hf.core.vocabulary import Vocabulary
from nudging_hf.core.words import word_starts

TOKENIZERS = ["byte_bpe", "other_byte_bpe", "metaspace_bpe", "unigram", "wordpiece"]
LOSSLESS = TOKENIZERS[:4]  # They hold all text but U+2581.
BYTE_LEVEL = TOKENIZERS[:2]  # They hold all text.
TEXT = 'The cat sat on the mat. It had 12 hats,  and 3 mice; see "Anna".\nThen the café closed 😀 at nine!  '


def vocabulary(name: str) -> Vocabulary:
    return Vocabulary(getattr(tiny, name)())


def split(text: str) -> list[str]:
    raw = text.encode()
    bounds = [0, *word_starts(raw), len(raw)]
    return [raw[a:b].decode() for a, b in pairwise(bounds)]


@given(st.text(alphabet=" ab\n", max_size=12))
def test_words_split_as_the_rule_says(text):
    """Words are those of `text.lstrip(" ").split(" ")`, and each space belongs to the word that the rule says."""
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
def test_text_ends_inside_a_character_iff_a_continuation_byte_may_follow(raw):
    """Then, and only then, some continuation byte after the text does not become a character of its own."""
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
def test_encoding_in_context_preserves_the_text(name):
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
)  # The tokens of `other_byte_bpe` span words.
def test_words_encoded_one_by_one_are_the_ids_of_the_whole(name):
    tokens = vocabulary(name)
    text = "The cat sat on the mat and had 12 hats. It saw Anna."
    ids, left = [], "Now:\n"
    for word in split(text):
        ids += tokens.encode_after(left, word)
        left += word
    assert ids == tokens.encode_after("Now:\n", text)


def test_wordpiece_continues_a_word():
    tokens = vocabulary("wordpiece")
    ids = tokens.encode_after("the ca", "t")
    assert tokens.join(ids) == b"t"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_spelt_out_control_token_is_plain_text(name):
    tokens = vocabulary(name)
    for i in tokens.control:
        spelt = tokens.tokenizer.convert_ids_to_tokens(i)
        assert not set(tokens.encode_after("so ", spelt)) & (tokens.control - {tokens.tokenizer.unk_token_id})
        assert tokens.bytes_of(i) == b""


@pytest.mark.parametrize("context", ["", "\n", "a  \n"])
def test_no_space_is_added_after_a_line_break_that_forms_a_token_with_the_text(context):
    own = vocabulary("metaspace_bpe")
    assert own.encode_suffix("\n", "- the") is None
    assert own.join(own.encode_after(context, "- the")) == b"- the"


class _OwnCode(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus(text, *args, **kwargs)


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, _OwnCode])
def test_a_spelt_out_control_token_has_the_ids_that_its_letters_have_together(kind):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=12, special_tokens=["<|end|>"], show_progress=False)
    backend.train_from_iterator(["<|no|> <|so|> <|on|>"] * 3, trainer)
    tokenizer = kind(tokenizer_object=backend, eos_token="<|end|>")
    ids = Vocabulary(tokenizer).encode_after("", "so <|end|>")
    assert ids == tokenizer("so <|end|>", split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in ids


def answer(name: str, nudging_name: str, kind=TwoVocabularies):
    return kind(vocabulary(name), vocabulary(nudging_name), [5, 6], [7, 8])


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("nudging_name", TOKENIZERS)
def test_the_nudging_models_ids_are_a_function_of_the_text(name, nudging_name):
    """It does not matter whether the ids are asked for after each token or only at the end."""
    text = " ".join([TEXT] * 12)
    asked, unasked = answer(name, nudging_name), answer(name, nudging_name)
    for token in asked.vocabulary.encode_after("a", text):
        asked.append(token)
        asked.nudging_ids()
        unasked.append(token)
    assert asked.nudging_ids() == unasked.nudging_ids()


@pytest.mark.parametrize("nudging_name", TOKENIZERS)
def test_the_nudging_models_ids_are_those_of_the_whole_text(nudging_name):
    written = answer("byte_bpe", nudging_name)
    text = " The cat sat on the mat and had 12 hats. It saw Anna." * 20
    for token in written.vocabulary.encode_after("", text):
        written.append(token)
    assert written.nudging_ids() == written.nudging_vocabulary.encode_after(written._nudging_prompt_context, text)


@settings(max_examples=40, deadline=None)
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


def test_with_one_vocabulary_splits_move_to_the_start_of_a_token():
    row = answer("byte_bpe", "byte_bpe", OneVocabulary)
    for text in (TEXT, "  two  spaces ", "\n\n", "x"):
        ids = row.vocabulary.encode_after("", text)
        words = row.words(ids)
        assert [token for word in words for token in word.ids] == ids
        assert all(word.ids for word in words)
        assert not any(word.is_empty for word in words[1:-1])


def ordinary_ids(tokens: Vocabulary, draw: random.Random, length: int) -> list[int]:
    """Random ids that are no control tokens. Half of them have a space."""
    ids = [i for i in range(len(tokens.tokenizer)) if tokens.bytes_of(i) and i not in tokens.control]
    with_space = [i for i in ids if b" " in tokens.bytes_of(i)]
    return [draw.choice(with_space if draw.random() < 0.5 else ids) for _ in range(length)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_with_one_vocabulary_words_are_those_of_the_rule(name):
    row, draw = answer(name, name, OneVocabulary), random.Random(name)
    for _ in range(200):
        ids = ordinary_ids(row.vocabulary, draw, draw.randint(1, 9))
        words = [list(word.ids) for word in row.words(ids)]
        assert words == oracle.words_of_tokens(row.vocabulary.tokenizer, ids)


@pytest.mark.parametrize("name", tiny.UNSPACED_TOKENIZERS)
def test_unspaced_words_of_tokens_are_those_of_the_rule(name):
    tokens, draw = vocabulary(name), random.Random(name)
    row = OneVocabulary(tokens, tokens, [5], [6], "unicode")
    for _ in range(200):
        ids = ordinary_ids(tokens, draw, draw.randint(1, 9))
        words = row.words(ids)
        assert [list(word.ids) for word in words] == oracle.words_of_tokens(tokens.tokenizer, ids, "unicode")
        is_one = len(words) == 1 and ends_inside_character(tokens.join(ids))
        assert row.is_one_unfinished_word(ids) == is_one


@pytest.mark.parametrize("name", ["unspaced_byte_bpe", "unspaced_metaspace_bpe"])
def test_an_unspaced_lookahead_crosses_as_a_whole(name):
    """The base reads the ids that it would have for the whole text, and no word splits one of them."""
    base, other = vocabulary(name), vocabulary("other_byte_bpe")
    row, joined = TwoVocabularies(base, other, [5], [6], "unicode"), 0
    for text in tiny.UNSPACED:
        lookahead = other.encode_after("a", text)
        words = row.words(lookahead)
        assert [token for word in words for token in word.ids] == row.draft(lookahead, len(text) * 4)
        assert "".join(word.text for word in words) == text
        joined += len(word_starts(text.encode(), "unicode")) + 1 - len(words)
    assert joined > 0


@pytest.mark.parametrize(
    ("name", "nudging_name"),
    [("byte_bpe", "unigram"), ("other_byte_bpe", "wordpiece"), ("wordpiece", "metaspace_bpe")],
)
def test_each_text_is_encoded_after_the_text_before_it(name, nudging_name):
    """Before it are the prompt, from its last control token on, the answer, and the words before it."""
    ours, theirs, draw = vocabulary(name), vocabulary(nudging_name), random.Random(name)
    texts = [piece for line in tiny.CORPUS[:3] for piece in split(line)]
    for _ in range(60):
        prompts = []
        for tokens in (ours, theirs):
            ids = tokens.encode_after("", "".join(draw.sample(texts, 2)))
            ids.insert(draw.randint(0, len(ids)), tokens.tokenizer.eos_token_id)
            prompts.append(ids)
        row = TwoVocabularies(ours, theirs, *prompts)
        for _ in range(4):
            left = [
                oracle.text_of(tokens.tokenizer, oracle.after_last_control(tokens.tokenizer, prompt))
                for tokens, prompt in zip((ours, theirs), prompts, strict=True)
            ]
            written = oracle.text_of(ours.tokenizer, row.ids)
            assert row.nudging_ids() == oracle.encode_in_context(theirs.tokenizer, left[1], written)
            lookahead = theirs.encode_after("a", "".join(draw.sample(texts, 3))[draw.randint(0, 2) :])
            left[0] += written
            words = row.words(lookahead)
            for word in words:
                assert list(word.ids) == oracle.encode_in_context(ours.tokenizer, left[0], word.text)
                left[0] += oracle.text_of(ours.tokenizer, word.ids)
            for token in words[0].ids if words else ():
                row.append(token)


def test_a_word_is_encoded_after_what_the_base_can_read_of_the_words_before_it():
    ours, theirs = vocabulary("wordpiece"), vocabulary("byte_bpe")
    row = TwoVocabularies(ours, theirs, [], [], "unicode")
    words = row.words(theirs.encode_after("", "A8漢a"))
    assert len(words) > 1 and ours.tokenizer.unk_token_id in [token for word in words for token in word.ids]
    left = ""
    for word in words:
        assert list(word.ids) == oracle.encode_in_context(ours.tokenizer, left, word.text)
        left += oracle.text_of(ours.tokenizer, word.ids)


def test_an_emoji_split_over_tokens_is_one_unfinished_word():
    row = answer("byte_bpe", "other_byte_bpe")
    ids = row.nudging_vocabulary.encode_after("a", " 😀")
    states = [row.is_one_unfinished_word(ids[:n]) for n in range(1, len(ids) + 1)]
    assert states[-1] is False and any(states[:-1])
    assert not row.is_one_unfinished_word([*row.nudging_vocabulary.encode_after("a", "a b"), *ids[:-1]])


def test_an_answer_ends_inside_a_character_until_its_last_token():
    row = answer("byte_bpe", "other_byte_bpe")
    ids = row.vocabulary.encode_after("a", "😀")
    inside = []
    for token in ids:
        row.append(token)
        inside.append(row.inside_character)
    assert inside == [True] * (len(ids) - 1) + [False] and len(ids) > 1


def test_models_exchange_ids_only_if_the_ids_mean_the_same():
    same, other = vocabulary("byte_bpe"), vocabulary("other_byte_bpe")
    assert answer_class(same, vocabulary("byte_bpe")) is OneVocabulary
    assert answer_class(same, other) is TwoVocabularies
    grown = copy.deepcopy(tiny.byte_bpe())
    grown.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    assert answer_class(same, Vocabulary(grown)) is OneVocabulary
    grown.add_tokens(["word"])
    assert answer_class(same, Vocabulary(grown)) is TwoVocabularies


def unigram_with_cheap_control_token() -> Vocabulary:
    """A Unigram vocabulary in which the control tokens are the cheapest pieces."""
    backend = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("</s>", 0.0), *((c, -9.0) for c in "\n▁</s>ab")], unk_id=0, byte_fallback=False
        )
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))


def test_unigram_encodes_a_spelt_out_control_token_as_text():
    tokens = unigram_with_cheap_control_token()
    for text in ("a </s> b", "a</s></s>", "</s>"):
        ids = tokens.encode_after("b", text)
        assert 1 not in ids
        assert tokens.join(ids) == text.encode()


# Text of any script --------------------------------------------------------------------------------------------------

PILES = {
    "English": "The cat sat on the mat and had 12 hats. ",
    "Chinese": "昨天夜里河水上涨到了早晨低处的田地已经被水淹没，村里没有人感到惊讶。",
    "Thai": "แม่น้ำเพิ่มขึ้นในเวลากลางคืนและในตอนเช้า",
    "one long word": "pneumonoultramicroscopicsilicovolcanoconiosis",
    "one letter": "a",
    "spaces": " ",
    "newlines": "\n",
    "emoji": "😀😁👨‍👩‍👧‍👦👍🏽🇩🇪🇫🇷❤️",
    "accents without end": "\u0301",
    "indented code": "if x:\n" + " " * 60 + "y\n",
    "spelt control tokens": "</s><eos>",
}


def piled(kind: str, characters: int) -> str:
    return ("x" + PILES[kind] * (characters // len(PILES[kind]) + 1))[:characters]


def ids_of_long(tokens: Vocabulary, text: str) -> list[int]:
    """Ids of a long text, encoded in short pieces to save time."""
    return [
        token for start in range(0, len(text), 100) for token in tokens.encode_after("a", text[start : start + 100])
    ]


class Meter:
    """Records the length in characters of each text that a vocabulary encodes."""

    def __init__(self, tokens: Vocabulary):
        codec = tokens._get_codec()
        self.lengths: list[int] = []
        encode = codec.encode
        codec.encode = lambda text: (self.lengths.append(len(text)), encode(text))[1]


@pytest.mark.parametrize("kind", PILES)
@pytest.mark.parametrize(("name", "nudging_name"), [("byte_bpe", "metaspace_bpe"), ("unigram", "other_byte_bpe")])
def test_the_text_encoded_per_token_is_bounded_for_any_script_and_length(name, nudging_name, kind):
    row = answer(name, nudging_name)
    text = piled(kind, 1600)
    meters = Meter(row.vocabulary), Meter(row.nudging_vocabulary)
    lookahead = ids_of_long(row.nudging_vocabulary, text[:60])[:16]
    ids = ids_of_long(row.vocabulary, text)[:1800]
    encodes, characters = [], []
    for token in ids:
        for meter in meters:
            meter.lengths.clear()
        row.append(token)
        row.nudging_ids()
        row.words(lookahead)
        row.draft(lookahead, 16)
        lengths = [length for meter in meters for length in meter.lengths]
        encodes.append(len(lengths))
        characters.append(sum(lengths))
        assert max(lengths, default=0) < 800
    assert max(encodes) < 250
    quarters = [characters[i * len(ids) // 4 : (i + 1) * len(ids) // 4] for i in range(4)]
    means = [sum(quarter) / len(quarter) for quarter in quarters]
    assert means[3] < 2 * max(means[:3]) + 100  # A token costs no more in a long answer than in a short one.
    assert max(means) < 16_000


@pytest.mark.parametrize("kind", PILES)
@pytest.mark.parametrize("nudging_name", LOSSLESS)
def test_the_nudging_model_reads_text_of_any_script_completely(nudging_name, kind):
    draw = random.Random(kind)
    asked, now_and_then, unasked = (answer("byte_bpe", nudging_name) for _ in range(3))
    text = piled(kind, 700)
    for token in ids_of_long(asked.vocabulary, text):
        for row in (asked, now_and_then, unasked):
            row.append(token)
        asked.nudging_ids()
        if draw.random() < 0.05:
            now_and_then.nudging_ids()
    assert asked.nudging_ids() == unasked.nudging_ids() == now_and_then.nudging_ids()
    assert asked.nudging_vocabulary.join(asked.nudging_ids()).decode() == text


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.sampled_from([b"\x80", b"\xf0\x9f", b"\xe4\xbd\xa0", b"a", b"\xff", b" ", b"\xcc\x81"]), min_size=1)
)
def test_the_ids_of_invalid_utf8_are_a_function_of_the_bytes(parts):
    asked, unasked = (answer("byte_bpe", "metaspace_bpe") for _ in range(2))
    single = {asked.vocabulary.bytes_of(i): i for i in range(len(asked.vocabulary.tokenizer))}
    raw = (b"".join(parts) * 900)[:900]
    for byte in raw:
        for row in (asked, unasked):
            row.append(single[bytes([byte])])
        asked.nudging_ids()
    assert asked.nudging_ids() == unasked.nudging_ids()
    assert bytes(asked.text) == raw


@pytest.mark.parametrize("kind", PILES)
def test_no_chunk_begins_inside_a_character_or_before_an_accent(kind):
    row = answer("byte_bpe", "other_byte_bpe")
    text = piled(kind, 700)
    for token in ids_of_long(row.vocabulary, text):
        row.append(token)
        row.nudging_ids()
        if not row.inside_character:
            assert "\ufffd" not in row._base_context() + row._nudging_context_at(len(row.text))
        begun = bytes(row.text[row._chunks_end :])
        assert begun[:1] < b"\x80" or begun[:1] >= b"\xc0"
        if kind != "accents without end":
            assert not begun[:3].startswith(("\u0301".encode(), "\u200d".encode(), "\ufe0f".encode()))
    assert row._chunks_end > 0


@pytest.mark.parametrize("nudging_name", LOSSLESS)
def test_a_chunk_without_spaces_ends_where_the_nudging_tokenizer_ends_a_token(nudging_name):
    """So the ids are nearly those of the whole text, encoded at once."""
    row = answer("byte_bpe", nudging_name)
    text = "pneumonoultramicroscopicsilicovolcanoconiosis" * 30
    for token in ids_of_long(row.vocabulary, text):
        row.append(token)
    whole = row.nudging_vocabulary.encode_after(row._nudging_prompt_context, text)
    differing = sum(a != b for a, b in zip(row.nudging_ids(), whole, strict=False))
    assert row.nudging_ids() == whole or differing < len(whole)
    assert abs(len(row.nudging_ids()) - len(whole)) <= 4


def test_many_spelt_out_control_tokens_are_plain_text():
    tokens = unigram_with_cheap_control_token()
    text = "</s>" * 400
    ids = tokens.encode_after("b", text)
    assert 1 not in ids and tokens.join(ids) == text.encode()


# The user's tokenizer ------------------------------------------------------------------------------------------------


def state_of(tokenizer) -> tuple:
    backend = tokenizer.backend_tokenizer
    return backend.to_str(), backend.encode_special_tokens, backend.padding, backend.truncation


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_users_tokenizer_does_not_change_while_threads_encode(name):
    """Some threads encode with one vocabulary, while others use the tokenizer itself with control tokens."""
    tokenizer = copy.deepcopy(getattr(tiny, name)())
    eos = tokenizer.eos_token
    chat, expected = f"The cat{eos}", [*tokenizer("The cat").input_ids, tokenizer.eos_token_id]
    plain = Vocabulary(copy.deepcopy(tokenizer)).encode_after("The", f" cat {eos} sat")
    before = state_of(tokenizer)
    tokens = Vocabulary(tokenizer)
    wrong, stop, start = [], threading.Event(), threading.Barrier(8)

    def cross(number):
        start.wait()
        for i in range(150):
            if tokens.encode_after("The", f" cat {eos} sat") != plain:
                wrong.append("ids")
            tokens.encode_after(f"{number} {i}", f" {i} {eos}")
            tokens.bytes_of(i % len(tokenizer))

    def use():
        start.wait()
        while not stop.is_set():
            if tokenizer(chat, add_special_tokens=False).input_ids != expected:
                wrong.append("chat")
            if state_of(tokenizer)[1:] != before[1:]:
                wrong.append("state")

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:  # An error in another thread must fail the test.
            wrong.append(repr(error))
            start.abort()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        crossing = [threading.Thread(target=guarded, args=(cross, i)) for i in range(6)]
        using = [threading.Thread(target=guarded, args=(use,)) for _ in range(2)]
        for thread in crossing + using:
            thread.start()
        for thread in crossing:
            thread.join()
        stop.set()
        for thread in using:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert state_of(tokenizer) == before


def test_the_users_padding_and_truncation_are_ignored_and_kept():
    tokenizer = copy.deepcopy(tiny.byte_bpe())
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    before = state_of(tokenizer)
    assert Vocabulary(tokenizer).encode_after("a", TEXT) == vocabulary("byte_bpe").encode_after("a", TEXT)
    assert state_of(tokenizer) == before


def test_a_tokenizer_that_does_more_than_its_backend_is_copied_whole():
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(text.replace("the", "THE"), *args, **kwargs)

    tokenizer = Shouting(tokenizer_object=copy.deepcopy(tiny.byte_bpe().backend_tokenizer), eos_token="<eos>")
    before = state_of(tokenizer)
    tokens = Vocabulary(tokenizer)
    assert tokens.join(tokens.encode_after("", "the <eos>")) == b"THE <eos>"
    assert state_of(tokenizer) == before


def test_a_tokenizer_that_cannot_be_copied_is_refused():
    class Unique(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs): ...
        def __deepcopy__(self, memo):
            raise TypeError("there is one of it")

    with pytest.raises(ValueError, match=r"cannot be copied, .* must not change the original: there is one of it"):
        Vocabulary(Unique(tokenizer_object=tiny.byte_bpe().backend_tokenizer)).encode_after("", "the")


def test_a_new_vocabulary_knows_a_token_that_is_added_later():
    tokenizer = copy.deepcopy(tiny.byte_bpe())
    assert len(Vocabulary(tokenizer).encode_after("", "zyzzyva")) > 1
    tokenizer.add_tokens(["zyzzyva"])
    tokens = Vocabulary(tokenizer)
    assert tokens.encode_after("", "zyzzyva") == [len(tokenizer) - 1]
    assert tokens.bytes_of(len(tokenizer) - 1) == b"zyzzyva"


def test_added_tokens_with_a_replaced_model_are_refused():
    tokenizer = copy.deepcopy(tiny.byte_bpe(300))
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.backend_tokenizer.model = tiny.byte_bpe(320).backend_tokenizer.model
    with pytest.raises(ValueError, match="its model was replaced"):
        Vocabulary(tokenizer).encode_after("", "the")


def test_an_object_that_is_not_a_tokenizer_is_refused_with_what_it_lacks():
    with pytest.raises(ValueError, match=r"a str, lacks `convert_ids_to_tokens`, .*AutoTokenizer.from_pretrained"):
        Vocabulary("gpt2")


def test_mistral_common_tokenizers_are_refused_with_a_remedy():
    """transformers' `MistralCommonBackend` has no added tokens and cannot encode control tokens as text."""

    class MistralCommonBackend:
        all_special_ids: ClassVar[list[int]] = [0, 1, 2]

        def __call__(self, text): ...
        def convert_ids_to_tokens(self, ids): ...
        def get_vocab(self): ...
        def decode(self, ids): ...
        def added_tokens_decoder(self):
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"lacks a mapping `added_tokens_decoder`.*PreTrainedTokenizerFast.*tekken"):
        Vocabulary(MistralCommonBackend())


# Text that a tokenizer cannot represent ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
def test_added_tokens_for_runs_of_spaces_translate_to_spaces(name):
    tokens = vocabulary("spaces_bpe")
    text = "def f():\n    return   1\n\n        <table> x"
    assert tokens.join(tokens.encode_after("a", text)) == text.encode()
    assert "\u2581\u2581\u2581\u2581" in tokens.tokenizer.convert_ids_to_tokens(tokens.encode_after("a", text))
    for row in (answer("spaces_bpe", name), answer(name, "spaces_bpe")):
        ids = row.vocabulary.encode_after("a", text)
        assert "".join(word.text for word in row.words(row.nudging_vocabulary.encode_after("a", text))) == text
        for token in ids:
            row.append(token)
        assert row.nudging_vocabulary.join(row.nudging_ids()) == text.encode()


@pytest.mark.parametrize(
    ("name", "text", "held"),
    [
        ("composing_byte_bpe", "Cafe\u0301", "Caf\u00e9"),  # It composes characters.
        ("composing_byte_bpe", "5 \u212b", "5 \u00c5"),
        ("metaspace_bpe", "a\u2581b", "a b"),  # U+2581 is its symbol for a space.
        ("wordpiece", "a\nb", "a b"),  # It drops white space.
    ],
)
def test_a_lossy_tokenizer_is_announced_once_before_anything_crosses(name, text, held, caplog):
    lossy, other = vocabulary(name), vocabulary("byte_bpe")
    assert lossy.join(lossy.encode_after("x", text)).decode().strip() == held
    for _ in range(3):
        row = TwoVocabularies(lossy, other, [5], [6])
        row.words(other.encode_after("x", text))
        row = TwoVocabularies(other, lossy, [5], [6])
        for token in other.encode_after("x", text):
            row.append(token)
        row.nudging_ids()
    [record] = caplog.records
    assert "cannot represent all text" in caplog.text and type(lossy.tokenizer).__name__ in caplog.text
    sample, becomes = next(iter(lossy.losses.items()))
    assert f"{sample!a} becomes {becomes!a}" in record.getMessage()


def test_a_loss_that_no_sample_shows_is_warned_about_when_it_occurs(caplog):
    tokenizer = copy.deepcopy(tiny.byte_bpe())
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("colour", "color")
    row = TwoVocabularies(vocabulary("byte_bpe"), Vocabulary(tokenizer), [5], [6])
    assert not caplog.records
    for _ in range(3):
        for token in row.vocabulary.encode_after("x", " the colour"):
            row.append(token)
        row.nudging_ids()
    [record] = caplog.records
    assert "'ur' becomes 'r' (at character 9 of 11)" in record.getMessage()


def test_a_lossless_tokenizer_is_not_warned_about(caplog):
    for name, nudging_name in [(a, b) for a in BYTE_LEVEL for b in BYTE_LEVEL]:
        row = answer(name, nudging_name)
        row.words(row.nudging_vocabulary.encode_after("x", TEXT))
        for token in row.vocabulary.encode_after("x", TEXT):
            row.append(token)
            if not row.inside_character:
                row.nudging_ids()
    assert not caplog.records
