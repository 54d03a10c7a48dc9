"""Text and ids, in one vocabulary and across two. The bridge knows vocabularies, never models.

Text is kept as bytes: byte-level tokens may end inside a UTF-8 character, and a word ends at the byte 0x20, which is
part of no other character. An answer is kept by `OneVocabulary` or `TwoVocabularies`; both say what the nudging model
reads, how its lookahead splits into words, and what ids a draft of it has for the base.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

from .rounds import Word
from .vocabulary import Vocabulary, to_text

SPACE = b" "
_WORD_END = re.compile(rb"(?<=\S) (?=\S)")
_LEFT_CHARACTERS = 64  # Text to the left with which a word is encoded: longer than what any tokenizer looks back.
_CHUNK_CHARACTERS = 256  # Text of a finished answer that is encoded once and for all, in pieces of about this length.
_LONGEST_CHUNK = _CHUNK_CHARACTERS + _LEFT_CHARACTERS  # In characters, where no word ends.
_CHARACTER_BYTES = 4  # Of UTF-8, at the most.
_ENDS_TRIED = 16  # Places for the end of a chunk without spaces, at the most.
_CLUSTER_CHARACTERS = 16  # Of a base character and what is written on it, at the most: more are cut.
_JOINER = "\u200d"  # Emoji are joined by it.


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

    def draft_top1_probs(
        self, draft: Sequence[int], continuation: Sequence[int], top1_probs: Sequence[float]
    ) -> list[float]:
        """The nudging model's top-1 probability at each id of a draft.

        Where a draft id spells several ids of the nudging model, it is the product over those that begin in its text.

        Args:
            draft: the first ids of the continuation, in the base's vocabulary.
            continuation: ids of the nudging model.
            top1_probs: its top-1 probability at each of them.
        """
        ends = accumulate(len(self.vocabulary.bytes_of(token)) for token in draft)
        starts = accumulate((len(self.nudging_vocabulary.bytes_of(token)) for token in continuation), initial=0)
        begun = list(zip(starts, top1_probs, strict=False))
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
    last piece is encoded anew as the text grows. A piece ends where a word does; in a text without spaces, where the
    nudging model's tokenizer ends a token too. What is encoded at once has a bound, whatever the script.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._left = _text_behind_control(self.prompt, self.vocabulary)
        self._nudging_left = _text_behind_control(self.nudging_prompt, self.nudging_vocabulary)
        self._chunks_end = 0  # Of the text, in bytes.
        self._nudging_ids: list[int] = []  # Those of the chunks, and after them those of the text that follows.
        self._num_chunk_ids = 0
        self._grew = False

    def append(self, token: int) -> None:
        super().append(token)
        self._grew = True

    def nudging_ids(self) -> list[int]:
        """The answer so far in the nudging model's vocabulary. The list changes as the answer grows: copy it."""
        if self._grew:
            while (end := self._next_chunk_end()) is not None:
                self._read_to(end)
                self._num_chunk_ids, self._chunks_end = len(self._nudging_ids), end
            self._read_to(len(self.text))
            self._grew = False
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
                self.vocabulary.tell_of_loss(word, ids, "write")
                words.append(Word(word, ids))
                left += word
                if len(left) > 2 * _CHUNK_CHARACTERS:
                    left = window(left)
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
        return to_text(bytes(self.text[max(self._character_start(step), space + 1) :]))

    def _read_to(self, end: int) -> None:
        """Encodes the text from the last chunk's end to `end`, in bytes, in the place of what was encoded there."""
        text = to_text(bytes(self.text[self._chunks_end : end]))
        ids = self.nudging_vocabulary.encode_after(self._nudging_left_of(self._chunks_end), text) if text else []
        self.nudging_vocabulary.tell_of_loss(text, ids, "read")
        self._nudging_ids[self._num_chunk_ids :] = ids

    def _nudging_left_of(self, place: int) -> str:
        """What stands before a place in the text, in bytes, for the nudging model."""
        start = self._character_start(max(0, place - _CHARACTER_BYTES * _LEFT_CHARACTERS))
        left = to_text(bytes(self.text[start:place]))
        return window(left if start else self._nudging_left + left)

    def _character_start(self, place: int) -> int:
        """The first place from this one on, in bytes, at which a character starts."""
        while self.text[place : place + 1] and 0x80 <= self.text[place] < 0xC0:
            place += 1
        return place

    def _next_chunk_end(self) -> int | None:
        """Where the next chunk ends, in bytes, where the text has got far enough to tell.

        At the first word end that makes it long enough, or before it becomes too long. More text must not tell
        otherwise: so it is told by whole characters, and by a certain number of them.
        """
        start = self._chunks_end
        most = start + _CHARACTER_BYTES * _LONGEST_CHUNK
        match = _WORD_END.search(self.text, start + _CHUNK_CHARACTERS, most + 2)  # The space and what follows it.
        if match and match.start() - start <= _LONGEST_CHUNK:
            return match.start()
        read = _LONGEST_CHUNK + _LEFT_CHARACTERS
        text = _whole_characters(self.text[start : start + _CHARACTER_BYTES * read])[:read]
        if match and match.start() <= start + _num_bytes(text[:_LONGEST_CHUNK]):
            return match.start()
        return start + _num_bytes(text[: self._end_within(text)]) if len(text) == read else None

    def _end_within(self, text: str) -> int:
        """Where a chunk of a text without spaces ends, in characters.

        Where the ids of what is before do not depend on what follows, if such a place is found.
        """
        places = [i for i in range(_CHUNK_CHARACTERS, _LONGEST_CHUNK) if not _is_joined(text, i)]
        places = places or [_CHUNK_CHARACTERS]
        places.sort(key=lambda i: _kind(text[i - 1]) == _kind(text[i]))  # First where letters or signs end.
        for place in islice(places, _ENDS_TRIED):
            left = self._nudging_left_of(self._chunks_end + _num_bytes(text[:place]))
            following = to_text(_to_bytes(text[place : place + _LEFT_CHARACTERS]))
            if self.nudging_vocabulary.encode_behind(left, following) is not None:
                return place
        return places[0]


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


def window(left: str) -> str:
    """The end of a text, from some words back: more than any tokenizer looks at. Words without end are cut."""
    start = left.rfind(" ", 0, max(0, len(left) - _LEFT_CHARACTERS)) + 1
    least = max(0, len(left) - _CHUNK_CHARACTERS)
    if start < least:
        start = next((i for i in range(least, least + _CLUSTER_CHARACTERS) if not _is_joined(left, i)), least)
    return left[start:]


def _text_behind_control(ids: list[int], vocabulary: Vocabulary) -> str:
    """The end of what follows the last control token."""
    last = max((i for i, token in enumerate(ids) if token in vocabulary.control), default=-1)
    return window(to_text(vocabulary.join(ids[last + 1 :])))


def _whole_characters(text: bytes | bytearray) -> str:
    """A text up to the character that it may end inside of, each byte that is no UTF-8 as a character of its own."""
    return codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(bytes(text))


def _to_bytes(characters: str) -> bytes:
    """The bytes of `_whole_characters`."""
    return characters.encode("utf-8", "surrogateescape")


def _num_bytes(characters: str) -> int:
    return len(_to_bytes(characters))


def _is_joined(text: str, place: int) -> bool:
    """Whether the character there belongs to the one before it: an accent, a joined emoji, the rest of a bad byte."""
    before, character = text[place - 1 : place], text[place]
    return (
        unicodedata.category(character)[0] == "M"
        or _JOINER in (before, character)
        or "\U0001f3fb" <= character <= "\U0001f3ff"  # Skin tones.
        or "\u1160" <= character <= "\u11ff"  # Vowels and ends of Hangul syllables.
        or ("\U0001f1e6" <= character <= "\U0001f1ff" and "\U0001f1e6" <= before <= "\U0001f1ff")  # Flags.
        or ("\udc80" <= character <= "\udcff" and "\udc80" <= before <= "\udcff")
    )


def _kind(character: str) -> str:
    if character.isalpha() or unicodedata.category(character)[0] == "M":
        return "letter"
    return "digit" if character.isdigit() else "space" if character.isspace() else "sign"
