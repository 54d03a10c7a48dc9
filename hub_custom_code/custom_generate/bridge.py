"""Text and ids, in one vocabulary and across two. The bridge knows tokenizers, never models.

Text is kept as bytes: byte-level tokens may end inside a UTF-8 character, and a word ends at the byte 0x20, which is
part of no other character. An answer is kept by `OneVocabulary` or `TwoVocabularies`; both say what the nudging model
reads, how its lookahead splits into words, and what ids a draft of it has for the base.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedTokenizerFast

from .rounds import Word

SPACE = b" "
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_END = re.compile(rb"(?<=\S) (?=\S)")
_LEFT_CHARACTERS = 64  # Text to the left with which a word is encoded: longer than what any tokenizer looks back.
_CHUNK_CHARACTERS = 256  # Text of a finished answer that is encoded once and for all, in pieces of about this length.


class _Remembered(dict[int, bytes]):
    """A function of tokens, asked once for each."""

    def __init__(self, find: Callable[[int], bytes]):
        self._find = find

    def __missing__(self, token: int) -> bytes:
        self[token] = self._find(token)
        return self[token]


class Vocabulary:
    """One tokenizer: what its tokens add to a text, and how text is encoded where other text stands before it.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.control = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._added = {i: token.content for i, token in added.items()}
        self._spellings = {i: tokenizer.convert_ids_to_tokens(i) for i in self.control}
        self._scheme = _byte_scheme(tokenizer)
        self._bytes = _Remembered(self._find_bytes)
        self._anchor: list[int] | None = None
        self._encode = lru_cache(maxsize=4096)(self._tokenize)
        self._backend = tokenizer.backend_tokenizer if _is_backend_alone(tokenizer) else None

    def bytes_of(self, token: int) -> bytes:
        """What the token adds to a text, whatever stands before it; nothing for a control token."""
        return self._bytes[token]

    def join(self, ids: Sequence[int]) -> bytes:
        """The text of the ids, without control tokens."""
        return b"".join(map(self._bytes.__getitem__, ids))

    def encode_after(self, left: str, text: str) -> list[int]:
        """The ids of `text` as the tokenizer would write it after `left`, where the ids of `left` stand already.

        `encode(left) + encode(text)` is not `encode(left + text)`: `left` is encoded with and without `text`, and
        where its ids stay the same the others are those of `text`. Where they do not (`text` goes on within a word,
        and its beginning would have merged with what is there), less and less of `left` is taken.

        Args:
            left: as far as a tokenizer looks back; see `window`.
        """
        for start in _starts_of_left(left):
            if (ids := self._encode_behind(left[start:], text)) is not None:
                return ids
        alone = self._encode(text)
        ids = None
        if self.join(alone) != text.encode():  # It puts a space before a first word: let that be a line break.
            ids = self._encode_behind("\n", text)
        return list(alone) if ids is None else ids

    def _encode_behind(self, left: str, text: str) -> list[int] | None:
        """The ids of `text` behind those of `left`, where these stay the same."""
        ids, both = self._encode(left), self._encode(left + text)
        return list(both[len(ids) :]) if both[: len(ids)] == ids else None

    def _tokenize(self, text: str) -> tuple[int, ...]:
        # split_special_tokens: a control token that is spelt out is text like any other.
        backend = self._backend
        if backend is not None and backend.padding is None and backend.truncation is None:
            backend.encode_special_tokens = True  # As the call below would, which takes half as long again.
            ids = tuple(backend.encode(text, add_special_tokens=False).ids)
        else:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            ids = tuple(encoded.input_ids)
        found = [text.index(spelt) for i, spelt in self._spellings.items() if i in ids and spelt in text]
        if not found:
            return ids
        # Unigram has control tokens among its pieces, and finds them all the same: cut the first spelling in two.
        cut = min(found) + 1
        line_break = self._encode("\n")
        return self._encode(text[:cut]) + self._encode("\n" + text[cut:])[len(line_break) :]

    def _find_bytes(self, token: int) -> bytes:
        if token in self.control:
            return b""
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # Rows of the embedding matrix beyond the vocabulary.
            return b""
        if self._scheme == "ByteLevel":
            return bytes(map(_BYTE_OF_CHARACTER.__getitem__, piece))
        if self._scheme == "ByteFallback" and (match := _BYTE_FALLBACK.fullmatch(piece)):
            return bytes.fromhex(match[1])
        if self._anchor is None:  # Decoders drop the space of a first token: decode after another one.
            candidates = (*self._tokenize("a b"), *self.tokenizer.get_vocab().values())
            self._anchor = [next(i for i in candidates if i not in self.control)]
        decode = self.tokenizer.decode
        before = decode(self._anchor, clean_up_tokenization_spaces=False)
        return decode([*self._anchor, token], clean_up_tokenization_spaces=False)[len(before) :].encode()


class _Answer:
    """The answer so far: its ids in the base's vocabulary and its text.

    Args:
        vocabulary: the base's.
        nudging_vocabulary: the nudging model's.
        prompt: the base's prompt, ids without padding.
        nudging_prompt: the nudging model's.
    """

    def __init__(
        self, vocabulary: Vocabulary, nudging_vocabulary: Vocabulary, prompt: list[int], nudging_prompt: list[int]
    ):
        self.vocabulary = vocabulary
        self.nudging_vocabulary = nudging_vocabulary
        self.prompt = prompt
        self.nudging_prompt = nudging_prompt
        self.ids: list[int] = []
        self.text = bytearray()

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.text += self.vocabulary.bytes_of(token)

    def sure_of(self, draft: Sequence[int], continuation: Sequence[int], sure: Sequence[float]) -> list[float]:
        """How sure the nudging model was of each id of a draft: of all that it wrote which begins in the id's text.

        Args:
            draft: the first ids, for the base, of the continuation.
            continuation: ids of the nudging model.
            sure: how sure it was of each of them, a probability.
        """
        ends = accumulate(len(self.vocabulary.bytes_of(token)) for token in draft)
        starts = accumulate((len(self.nudging_vocabulary.bytes_of(token)) for token in continuation), initial=0)
        begun = list(zip(starts, sure, strict=False))
        found, place = [], 0
        for end in ends:
            probability = 1.0
            while place < len(begun) and begun[place][0] < end:
                probability *= begun[place][1]
                place += 1
            found.append(probability)
        return found

    @property
    def inside_character(self) -> bool:
        return ends_inside_character(bytes(self.text[-3:]))

    def is_one_unfinished_word(self, lookahead: Sequence[int]) -> bool:
        """Whether a lookahead (ids of the nudging model) is a single word that ends inside a character."""
        text = self.nudging_vocabulary.join(lookahead)
        return SPACE not in text.lstrip(SPACE) and ends_inside_character(text)


class OneVocabulary(_Answer):
    """An answer that both models read as the same ids."""

    def nudging_ids(self) -> list[int]:
        """The answer so far in the nudging model's vocabulary."""
        return self.ids

    def words(self, lookahead: Sequence[int]) -> tuple[Word, ...]:
        """The words of a lookahead. A split inside a token moves to its start, and the first token is always taken."""
        pieces = [self.vocabulary.bytes_of(token) for token in lookahead]
        starts = list(accumulate(map(len, pieces), initial=0))[:-1]  # The byte at which each token starts.
        splits = {max(bisect_right(starts, split) - 1, 1) for split in word_starts(b"".join(pieces))}
        words: list[Word] = []
        for begin, end in pairwise(sorted({0, *splits, len(pieces)})):
            text, ids = to_text(b"".join(pieces[begin:end])), tuple(lookahead[begin:end])
            if words and words[-1].is_empty and len(words) > 1:  # What moved splits left of a run of spaces.
                before, spaces = words[-2:]
                words[-2:] = [Word(before.text + spaces.text, before.ids + spaces.ids)]
            words.append(Word(text, ids))
        return tuple(words)

    def draft(self, continuation: Sequence[int], length: int) -> list[int]:
        """The first `length` ids, for the base, of what the nudging model writes after the answer so far."""
        return list(continuation[:length])

    def count(self, continuation: Sequence[int]) -> int:
        """How many tokens of the base the answer and a continuation of it come to."""
        return len(self.ids) + len(continuation)


class TwoVocabularies(_Answer):
    """An answer whose ids differ between the models: they meet in its text.

    The base keeps the ids it emitted, and nudging words are encoded into them. What the nudging model reads is a pure
    function of the text: pieces of about 256 characters, each encoded after what stands before it, so that only the
    last piece is encoded anew as the text grows.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._left = _text_behind_control(self.prompt, self.vocabulary)
        self._nudging_left = _text_behind_control(self.nudging_prompt, self.nudging_vocabulary)
        self._chunks_end = 0  # Of the text, in bytes.
        self._chunk_ids: list[int] = []
        self._nudging_ids: list[int] | None = []

    def append(self, token: int) -> None:
        super().append(token)
        self._nudging_ids = None

    def nudging_ids(self) -> list[int]:
        """The answer so far in the nudging model's vocabulary."""
        if self._nudging_ids is None:
            while (end := self._next_chunk_end()) is not None:
                self._chunk_ids += self._encode_for_nudging(end)
                self._chunks_end = end
            self._nudging_ids = self._chunk_ids + self._encode_for_nudging(len(self.text))
        return self._nudging_ids

    def words(self, lookahead: Sequence[int]) -> tuple[Word, ...]:
        """The words of a lookahead; a word for which the base has no ids is joined with the word after it."""
        text = self.nudging_vocabulary.join(lookahead)
        left = self._base_left()
        words: list[Word] = []
        start = 0
        for end in (*word_starts(text), len(text)):
            word = to_text(text[start:end])
            ids = tuple(self.vocabulary.encode_after(left, word))
            if ids or (end == len(text) and words):
                words.append(Word(word, ids))
                left += word
                start = end
        return tuple(words)

    def draft(self, continuation: Sequence[int], length: int) -> list[int]:
        """The first `length` ids, for the base, of what the nudging model writes after the answer so far.

        Encoded in one piece: where words on their own have other ids, the draft is wrong there, and costs that.
        """
        text = to_text(self.nudging_vocabulary.join(continuation))
        return self.vocabulary.encode_after(self._base_left(), text)[:length]

    def count(self, continuation: Sequence[int]) -> int:
        """How many tokens of the base the answer and a continuation of it come to."""
        return len(self.ids) + sum(len(word.ids) for word in self.words(continuation))

    def _base_left(self) -> str:
        """What stands before the next word for the base, as far as its tokenizer looks back.

        Where it begins moves in steps: what was encoded for a text is often asked for again when that has grown.
        """
        step = (len(self.text) // _LEFT_CHARACTERS - 1) * _LEFT_CHARACTERS
        if step <= 0:
            return self._left + to_text(bytes(self.text))
        space = self.text.find(SPACE, step, step + _LEFT_CHARACTERS // 2)
        return to_text(bytes(self.text[max(step, space + 1) :]))

    def _encode_for_nudging(self, end: int) -> list[int]:
        text = to_text(bytes(self.text[self._chunks_end : end]))
        start = max(0, self._chunks_end - 4 * _LEFT_CHARACTERS)
        left = to_text(bytes(self.text[start : self._chunks_end]))
        left = window(left if start else self._nudging_left + left)
        return self.nudging_vocabulary.encode_after(left, text) if text else []

    def _next_chunk_end(self) -> int | None:
        """The first word end that makes the next piece long enough, where the text has got that far."""
        match = _WORD_END.search(self.text, self._chunks_end + _CHUNK_CHARACTERS)
        return match.start() if match else None


def answer_class(
    vocabulary: Vocabulary, nudging_vocabulary: Vocabulary
) -> type[OneVocabulary] | type[TwoVocabularies]:
    """`OneVocabulary` where the models may exchange ids.

    They may where the nudging model's vocabulary holds the base's, id by id, and adds control tokens alone: those
    never cross.
    """
    ours, theirs = vocabulary.tokenizer.get_vocab(), nudging_vocabulary.tokenizer.get_vocab()
    holds = all(theirs.get(token) == i for token, i in ours.items())
    extra_is_control = all(i in nudging_vocabulary.control for token, i in theirs.items() if token not in ours)
    return OneVocabulary if holds and extra_is_control else TwoVocabularies


def word_starts(text: bytes) -> list[int]:
    """Where each word but the first starts in a lookahead, in bytes: at the space before it.

    Leading spaces belong to the first word; of a run of spaces the last belongs to the word after it. A trailing
    space starts an empty word.
    """
    lead = len(text) - len(text.lstrip(SPACE))
    return [i for i in range(lead, len(text)) if text[i : i + 1] == SPACE and text[i + 1 : i + 2] != SPACE]


def ends_inside_character(text: bytes) -> bool:
    """Whether the text ends in a proper beginning of a UTF-8 character. Bytes that are no UTF-8 are not inside one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text[-3:])
    begun = decoder.getstate()[0]
    # Python waits for the third byte of a surrogate, though none makes it a character.
    return begun != b"" and not b"\xed\xa0" <= begun <= b"\xed\xbf"


def to_text(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def window(left: str) -> str:
    """The end of a text, from some words back: more than any tokenizer looks at."""
    return left[left.rfind(" ", 0, max(0, len(left) - _LEFT_CHARACTERS)) + 1 :]


def _text_behind_control(ids: list[int], vocabulary: Vocabulary) -> str:
    """The end of what follows the last control token."""
    last = max((i for i, token in enumerate(ids) if token in vocabulary.control), default=-1)
    return window(to_text(vocabulary.join(ids[last + 1 :])))


def _starts_of_left(left: str) -> Iterator[int]:
    """Where to begin with the text on the left: with all of it, at the last word, then ever later within it."""
    if left:
        yield 0
        yield from range(max(left.rstrip(" ").rfind(" "), 0), len(left))


def _is_backend_alone(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer does nothing to a text but what its `tokenizers.Tokenizer` does."""
    kinds = type(tokenizer).__mro__
    if PreTrainedTokenizerFast not in kinds:
        return False
    own = kinds[: kinds.index(PreTrainedTokenizerFast)]
    return not any(name in vars(kind) for kind in own for name in ("__call__", "_encode_plus", "_convert_encoding"))


def _byte_scheme(tokenizer: Any) -> str | None:
    """How the tokenizer writes single bytes: "ByteLevel" (GPT-2's characters), "ByteFallback" (<0xNN>), or not."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    types = {part["type"] for part in [state, *state.get("decoders", [])]}
    return next((scheme for scheme in ("ByteLevel", "ByteFallback") if scheme in types), None)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
