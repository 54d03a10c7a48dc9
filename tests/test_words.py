"""Words by UAX #29: where they begin, what more text changes, and whose they are."""

import itertools
import random
from itertools import pairwise

import oracle
import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from nudging_hf.core.words import AuthorsOfWords, word_starts
from nudging_hf.provenance import Piece, count_nudged_words

# What the rules of UAX #29 tell apart: letters, digits, signs that join them, marks, joiners, flags, and scripts.
CHARACTERS = (
    *("  ", " ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "a", "Z", "7", "_", ".", ",", ":", "'", '"', "-", "(", "%"),
    *("我", "北", "。", "，", "“", "々", "〇", "ひ", "カ", "ー", "ｶ", "\uff9e", "ก", "เ", "\u0e31", "\u0e33", "๒"),
    *("한", "글", "\u1100", "\u1161", "ع", "\u0650", "،", "٣", "\u05d0", "\u05f4", "क", "\u094d", "\u0940", "\u0301"),
    *("\u200d", "\u00ad", "👩", "🏽", "🇯", "🇵", "🅰", "\ufe0f", "\u20e3", "\ufffd", "\ue000", "\x00"),
)
TEXTS = st.lists(st.one_of(st.sampled_from(CHARACTERS), st.characters(codec="utf-8")), max_size=12).map("".join)
CUTS = st.integers(0, 40)
STRAY = st.binary(max_size=2)


def words_of(text: bytes, word_boundary: str = "unicode") -> list[bytes]:
    return [text[start:end] for start, end in pairwise([0, *word_starts(text, word_boundary), len(text)])]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我们去北京。他说：“好！”", "我|们|去|北|京。|他|说：“|好！”"),
        ("2024年5月1日", "2024|年|5|月|1|日"),
        ("東京タワーへ行きます。ｶﾞｷﾞ", "東|京|タワー|へ|行|き|ま|す。|ｶﾞｷﾞ"),
        ("ฉันกินน้ำ เก่ง", "ฉั|น|กิ|น|น้ำ| เ|ก่|ง"),
        ("나는 학교에 갑니다.", "나는| 학교에| 갑니다."),
        ("ذهب الولد، ثم عاد.", "ذهب| الولد،| ثم| عاد."),
        ("क्षत्रिय है।", "क्षत्रिय| है।"),
        ('He can\'t (really) say, "no".', 'He| can\'t| (really)| say,| "no".'),
        ("l'arte dell\u2019uomo o'er", "l'arte| dell\u2019uomo| o'er"),
        ("a well-known 3.14, 1,000.", "a| well-|known| 3.14,| 1,000."),
        ("my_var = f(x)  # it", "my_var| =| f(|x) | #| it"),
        ("好👩\u200d👩\u200d👧🇯🇵1\ufe0f\u20e3吗🏽", "好👩\u200d👩\u200d👧🇯🇵|1\ufe0f\u20e3|吗🏽"),
        ("one\ntwo\n\n- 三\r\n", "one\n|two\n\n-| 三\r\n"),
        ("。。。我", "。。。我"),
        ("\n\n", "\n\n"),
        ("  我 你 ", "  我| 你| "),
        ("e\u0301a\u200db", "e\u0301a\u200db"),
        ("", ""),
    ],
)
def test_words(text, words):
    assert [word.decode() for word in words_of(text.encode())] == words.split("|")


@given(TEXTS, STRAY, TEXTS, STRAY)
@example("好。", b"", "\uff9e", b"")  # A letter for Unicode that belongs to the sign before it.
@example(" \u200d🅰a", b"", "a", b"")
def test_words_are_those_of_an_independent_rule(text, stray, after, end):
    """Bytes that are no whole character may stand anywhere."""
    raw = text.encode() + stray + after.encode() + end
    assert word_starts(raw, "unicode") == oracle.split_points(raw, "unicode")


@given(TEXTS)
def test_spaces_split_as_before(text):
    raw = text.encode()
    assert set(word_starts(raw)) <= set(word_starts(raw, "unicode"))


@given(TEXTS, STRAY, TEXTS, CUTS)
@example("can'", b"", "t", 4)
@example("3.", b"", "14", 2)
@example("ท", b"", "\u0e33", 3)
def test_more_text_changes_the_last_word_alone(text, stray, after, cut):
    """The words before it stay, so they may be accepted before more is known. A run of spaces alone may go on."""
    whole = text.encode() + stray + after.encode()
    begun = whole[:cut]
    for boundary in ("space", "unicode"):
        starts, all_starts = word_starts(begun, boundary), word_starts(whole, boundary)
        if starts:
            assert [start for start in all_starts if start < starts[-1]] == starts[:-1]
            assert starts[-1] in all_starts or not begun[starts[-1] :].strip(b" ")


@given(TEXTS, TEXTS)
def test_a_new_lookahead_from_a_word_on_has_the_same_words(text, after):
    whole = (text + after).encode()
    for boundary in ("space", "unicode"):
        starts = word_starts(whole, boundary)
        for i, start in enumerate(starts):
            assert word_starts(whole[start:], boundary) == [later - start for later in starts[i + 1 :]]


@given(TEXTS)
@example("a🇯a")
def test_no_cluster_is_split_and_no_sign_starts_a_word(text):
    """But for a space, "_" and the like, and letters that Unicode takes for signs."""
    raw = text.encode()
    clusters = itertools.accumulate(len(cluster.encode()) for cluster in regex.findall(r"\X", text))
    starts = [start for start in word_starts(raw, "unicode") if raw[start : start + 1] != b" "]
    assert set(starts) <= set(clusters)
    for start in starts:
        assert regex.match(r"[\p{L}\p{N}\p{WB=ExtendNumLet}\p{WB=ALetter}\p{WB=Format}]", raw[start:].decode())


def pieces_of(text: bytes, seed: int) -> list[tuple[bytes, bool]]:
    draw, pieces = random.Random(seed), []
    while text:
        length = draw.choice([1, 1, 2, 3, 7])
        pieces.append((text[:length], draw.random() < 0.4))
        text = text[length:]
    return pieces


@given(TEXTS, st.integers(0, 99))
def test_the_words_that_have_ended_do_not_depend_on_how_the_text_came(text, seed):
    """They are those of the text so far, but for its last one."""
    pieces = pieces_of(text.encode(), seed)
    counter, found, read, authors = AuthorsOfWords("unicode"), [], b"", b""
    for piece, nudged in pieces:
        found += counter.read(piece, nudged)
        read, authors = read + piece, authors + bytes([nudged]) * len(piece)
        bounds = [0, *oracle.split_points(read, "unicode")]
        ended = [(start, end) for start, end in pairwise(bounds) if read[start:end].strip()]
        ink = [[i for i in range(*span) if read[i : i + 1].strip()] for span in ended]
        assert found == [any(authors[i] for i in range(places[0], places[-1] + 1)) for places in ink]


def test_an_endless_word_is_counted_as_it_grows():
    """What a token costs does not grow with the word. By spaces it is one word, which is not kept as it grows."""
    ended = {}
    for boundary in ("space", "unicode"):
        counter = AuthorsOfWords(boundary)
        ended[boundary] = [word for _ in range(1000) for word in counter.read(b"....", False)]
        assert len(counter._text) <= 300
        ended[boundary] += counter.read(b"x y", True)
    assert ended["space"] == [True] and len(ended["unicode"]) == 16


@pytest.mark.parametrize(
    ("word_boundary", "counted"), [("space", (2, 2)), ("unicode", (3, 6))], ids=["space", "unicode"]
)
def test_nudged_words_are_counted_by_the_same_rule(word_boundary, counted):
    pieces = [Piece("我们", True), Piece("去北京。 ", False), Piece("O", True), Piece("K ", False)]
    assert count_nudged_words(pieces, word_boundary) == counted
