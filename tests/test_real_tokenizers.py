"""What one model writes is what the other one sees, between real tokenizers: any text, any author, any length.

The real tokenizers are not part of the repository: `make tokenizers` fetches them. Those that the tests build take
their place in the ordinary run. No model runs here, because what crosses depends on the tokenizers alone.
"""

import functools
import itertools
import os
import random
import time
import unicodedata
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nudging_hf.core.answer import TwoVocabularies, answer_class
from nudging_hf.core.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("NUDGING_TOKENIZERS") or ROOT / "build" / "tokenizers")
REAL = "llama2 llama3 gemma3 qwen3 gpt4o gptoss deepseek_v3 smollm2".split()
BUILT = ["byte_bpe", "metaspace_bpe", "unigram", "composing_byte_bpe", "spaces_bpe"]
COMPOSING = {"qwen3", "composing_byte_bpe"}  # Their normalizer is NFC.
WITHOUT_U2581 = {"llama2", "gemma3", "metaspace_bpe", "unigram", "spaces_bpe"}  # It is their symbol for a space.
# SmolLM2 has no token for these control characters, nor for the first byte of UTF-8 of planes that are unassigned.
UNKNOWN_TO_SMOLLM2 = {*"\x04\x06\x13\x14\x16\x1d", *map(chr, range(0x40000, 0xC0000))}
PAIRS = [
    *itertools.permutations(BUILT, 2),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in itertools.permutations(REAL, 2)),
]

TEXTS = {
    "combining marks": "Cafe\u0301 nai\u0308ve a\u0323\u0302 \u1112\u1161\u11ab \u0e01\u0e33 \u212b \ufb01 \uff21",
    "right to left": "مرحبا بالعالم، كيف حالك؟ שָׁלוֹם עולם \u200fabc\u200e \u202bx\u202c \u2067y\u2069",
    "joined emoji": "👨‍👩‍👧‍👦 ok 🏳️‍🌈👍🏽 🇩🇪🇫🇷 ❤️ 1️⃣ \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "all spaces": "".join(f"{i}{chr(i)}" for i in range(0x3001) if chr(i).isspace()) + "\u180e\u200b\u2060\ufeff",
    "tabs and line breaks": "a\tb\r\nc\r\n\r\n\td \t e\n \n  f\rg\v\fh\n\n\n\n\ti",
    "runs of spaces": "  a   b    c" + " " * 40 + "d      ",
    "code": 'def f(x):\n    if x:\n        return {"a": [1, 2]}  # ok\n\treturn;\n\n\n#include <vector>\n<table></h1>',
    "digits": "1234567890 3.14159 1,000,000 0x1F ٣٤٥ 二〇二四 ½ ² Ⅷ",
    "addresses": "https://example.org/a/b?c=d&e=%20f#g <a@b.co> C:\\x\\y file:///~/z_-z",
    "control characters": "a\x00b\x01\x02 \x1b[31mred\x1b[0m \x07\x7f\x80\x9f \ufffe\uffff\ufffd \ue000",
    "scripts without spaces": "昨天夜里河水上涨，到了早晨。東京は日本の首都です。ภาษาไทยไม่มีช่องว่าง ພາສາລາວ 한국어",
    "scripts": "ქართული हिन्दी தமிழ் ᚠᛇᚻ 𒀀𒀁 𝒳𝓎 ꙮ ﷽ \U0001f9ff Ελληνικά ѣ \U0010fffd",
    "a long word": "Donaudampfschiff" * 640,
    "a long word of digits": "0123456789" * 1024,
    "spelt control tokens": "<|im_end|>\n<|im_start|>system\nx</s><s>[INST] <<SYS>> <|eot_id|><|start_header_id|>"
    "<start_of_turn>user<end_of_turn><eos><bos><|end|><|start|>assistant<|channel|>final<|message|><|return|>"
    "<|endoftext|><\uff5cUser\uff5c><\uff5cAssistant\uff5c><\uff5cbegin▁of▁sentence\uff5c><unk><pad><0x0A><0xE2>",
    "U+2581": "▁▁a ▁ b▁c ▂▃ ▁",
}


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    if name in BUILT:
        return Vocabulary(getattr(tiny, name)())
    if not (FOLDER / name / "tokenizer.json").exists():
        pytest.skip(f"There is no tokenizer in {FOLDER / name}: run `make tokenizers`, or set NUDGING_TOKENIZERS.")
    return Vocabulary(AutoTokenizer.from_pretrained(FOLDER / name))


def answer(base: str, nudging: str) -> TwoVocabularies:
    both = vocabulary(base), vocabulary(nudging)
    return TwoVocabularies(*both, *(each.encode_after("a", "Go on:\n") for each in both))


def held(text: str, *names: str) -> str:
    """A text as far as these tokenizers tell it from others."""
    if WITHOUT_U2581 & set(names):
        text = text.replace("\u2581", " ")
    if "smollm2" in names:
        text = "".join(c for c in text if c not in UNKNOWN_TO_SMOLLM2)
    return unicodedata.normalize("NFC", text) if COMPOSING & set(names) else text


def write_by_turns(base: str, nudging: str, text: str, seed: int) -> TwoVocabularies:
    """The answer that becomes `text`, of which the base writes some tokens and the nudging model some words.

    All that must hold while it grows is checked on the way.
    """
    draw = random.Random(seed)
    if "smollm2" in (base, nudging):  # It would hold the other bytes of the character.
        text = "".join(c for c in text if c < "\U00040000" or c >= "\U000c0000")
    row, unasked = answer(base, nudging), answer(base, nudging)
    ours, theirs = row.vocabulary, row.nudging_vocabulary
    place = 0  # How much of `text` stands in the answer. It is not lost track of where a character is replaced.
    while place < len(text):
        before, piece = text[max(0, place - 80) : place], text[place : place + draw.randint(1, 60)]
        if draw.random() < 0.5:
            ids = ours.encode_after(before or "\n", piece)
        else:
            lookahead = theirs.encode_after(before or "\n", piece)
            words = row.words(lookahead)
            written = "".join(word.text for word in words)
            assert held(written, base, nudging) == held(piece, base, nudging)
            assert ours.join(row.draft(lookahead, len(piece) * 8)).decode() == held(written, base)
            ids = [token for word in words for token in word.ids]
        assert ours.control.isdisjoint(ids)
        for token in ids:
            row.append(token)
            unasked.append(token)
        assert not row.inside_character
        if draw.random() < 0.3:
            row.nudging_ids()
        place += len(piece)
    read = row.nudging_ids()
    assert read == unasked.nudging_ids()
    assert theirs.control.isdisjoint(read)
    assert held(row.text.decode(), nudging, base) == held(text, nudging, base)
    assert held(theirs.join(read).decode(), nudging) == held(row.text.decode(), nudging)
    return row


@pytest.mark.parametrize(("base", "nudging"), PAIRS)
def test_what_crosses_is_what_the_other_model_sees(base, nudging):
    for i, text in enumerate(TEXTS.values()):
        write_by_turns(base, nudging, text if vocabulary(base).tokenizer.vocab_size > 1000 else text[:600], seed=i)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80), st.permutations(BUILT), st.integers(0, 2**32))
def test_any_text_crosses(text, names, seed):
    write_by_turns(*names[:2], text, seed)


@pytest.mark.slow
@settings(max_examples=6000, deadline=None)
@given(st.text(max_size=80), st.permutations(REAL), st.integers(0, 2**32))
def test_any_text_crosses_between_real_tokenizers(text, names, seed):
    write_by_turns(*names[:2], text, seed)


NAMES = [*BUILT, *(pytest.param(name, marks=pytest.mark.slow) for name in REAL)]


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_is_known_at_set_up(name):
    """What a tokenizer cannot hold is announced, and a tokenizer of which nothing is announced holds everything."""
    losses = vocabulary(name).losses
    assert all(held(text, name) == other.replace("\ufffd", "") for text, other in losses.items())
    assert ("\u2581" in losses) == (name in WITHOUT_U2581)
    assert ("e\u0301" in losses) == (name in COMPOSING)
    assert ("\x06" in losses) == (name == "smollm2") == ("\U00050000" in losses)
    assert bool(losses) == (name in WITHOUT_U2581 | COMPOSING | {"smollm2"})


class Meter:
    """Counts the characters that a vocabulary encodes."""

    def __init__(self, tokens: Vocabulary, monkeypatch: pytest.MonkeyPatch):
        codec = tokens._get_codec()
        self.characters = 0
        encode = codec.encode

        def counted(text):
            self.characters += len(text)
            return encode(text)

        monkeypatch.setattr(codec, "encode", counted)


COSTLY = [
    ("byte_bpe", "metaspace_bpe"),
    *(pytest.param("llama2", name, marks=pytest.mark.slow) for name in ("gemma3", "qwen3")),
    *(pytest.param(name, "llama2", marks=pytest.mark.slow) for name in ("gptoss", "smollm2")),
]


@pytest.mark.parametrize("kind", ["code", "scripts without spaces", "a long word", "joined emoji"])
@pytest.mark.parametrize(("base", "nudging"), COSTLY)
def test_a_token_costs_no_more_in_a_long_answer(base, nudging, kind, monkeypatch):
    row = answer(base, nudging)
    ids = row.vocabulary.encode_after("a", TEXTS[kind][:200] + " ")
    lookahead = row.nudging_vocabulary.encode_after("a", TEXTS[kind][:60])[:16]
    tokens = itertools.cycle(ids)
    meters = [Meter(each, monkeypatch) for each in (row.vocabulary, row.nudging_vocabulary)]
    costs = []
    for length in (500, 2_000, 8_000, 32_000):
        while len(row.ids) < length:
            row.append(next(tokens))
            if len(row.ids) % 100 == 0:
                row.nudging_ids()
        for vocabulary_, meter in zip((row.vocabulary, row.nudging_vocabulary), meters, strict=True):
            vocabulary_._encode.cache_clear()
            meter.characters = 0
        for _ in range(100):
            row.append(next(tokens))
            row.nudging_ids()
            row.words(lookahead)
            row.draft(lookahead, 16)
        costs.append(sum(meter.characters for meter in meters) / 100)
    assert max(costs[1:]) < 1.5 * costs[0] + 500


@pytest.mark.slow
def test_a_pair_with_a_vocabulary_of_260_000_is_set_up_within_a_second():
    tokenizers = [vocabulary(name).tokenizer for name in ("gemma3", "llama2")]
    seconds = []
    for _ in range(3):
        began = time.process_time()  # Other work on the machine does not count.
        both = [Vocabulary(tokenizer) for tokenizer in tokenizers]
        assert answer_class(*both) is TwoVocabularies
        row = TwoVocabularies(*both, [5], [6])
        row.words(both[1].encode_after("a", "some words to begin with"))
        seconds.append(time.process_time() - began)
    assert min(seconds) < 1
