"""An answer's text and ids, in one vocabulary or across two. It knows vocabularies, never models.

Text is kept as UTF-8 bytes, because byte-level tokens may end inside a character. `OneVocabulary` and
`TwoVocabularies` keep an answer; both say what the nudging model reads, how its lookahead splits into words, and which
ids of the base its text has as a draft.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

from .config import NudgingConfig
from .rounds import Word
from .vocabulary import Vocabulary, to_text
from .words import SPACE, word_starts

_WORD_END = re.compile(rb"(?<=\S) (?=\S)")
_CONTEXT_CHARACTERS = 64  # A word is encoded after this much text, more than any tokenizer looks back.
_CHUNK_CHARACTERS = 256  # Finished text is encoded once, in chunks of about this length.
_MAX_CHUNK_CHARACTERS = _CHUNK_CHARACTERS + _CONTEXT_CHARACTERS  # A chunk is no longer, even if no word ends.
_MAX_CHARACTER_BYTES = 4  # In UTF-8.
_MAX_ENDS_TRIED = 16  # This many places are tried as the end of a chunk without spaces.
_MAX_CLUSTER_CHARACTERS = 16  # A longer cluster (a letter with accents, a joined emoji) may be cut.
_FIRST_COMPARED = slice(1000, 1100)  # These ids of two vocabularies are compared before all others.
_ZERO_WIDTH_JOINER = "\u200d"  # It joins emoji into one.


class _Answer:
    """The answer so far.

    Args:
        vocabulary: the base's.
        nudging_vocabulary: the nudging model's.
        prompt: the base's prompt, ids without padding.
        nudging_prompt: the nudging model's prompt, ids without padding.
        word_boundary: the rule by which a lookahead is split into words: see [`word_starts`].

    Attributes:
        ids: the answer in the base's vocabulary.
        text: the answer in UTF-8.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        nudging_vocabulary: Vocabulary,
        prompt: list[int],
        nudging_prompt: list[int],
        word_boundary: str = NudgingConfig.word_boundary,
    ):
        self.vocabulary = vocabulary
        self.nudging_vocabulary = nudging_vocabulary
        self.prompt = prompt
        self.nudging_prompt = nudging_prompt
        self.word_boundary = word_boundary
        self.ids: list[int] = []
        self.text = bytearray()

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.text += self.vocabulary.bytes_of(token)

    def draft_top1_probs(
        self, draft: Sequence[int], continuation: Sequence[int], top1_probs: Sequence[float]
    ) -> list[float]:
        """The nudging model's top-1 probability at each id of a draft.

        If the text of a draft id covers several ids of the nudging model, its probability is the product over those
        that begin within it.

        Args:
            draft: the first ids of the continuation, in the base's vocabulary.
            continuation: the continuation in the nudging model's vocabulary.
            top1_probs: the nudging model's top-1 probability at each id of the continuation.

        Returns:
            One probability for each id of the draft.
        """
        ends = accumulate(len(self.vocabulary.bytes_of(token)) for token in draft)
        starts = accumulate((len(self.nudging_vocabulary.bytes_of(token)) for token in continuation), initial=0)
        begun = list(zip(starts, top1_probs, strict=False))
        probabilities, place = [], 0
        for end in ends:
            probability = 1.0
            while place < len(begun) and begun[place][0] < end:
                probability *= begun[place][1]
                place += 1
            probabilities.append(probability)
        return probabilities

    @property
    def inside_character(self) -> bool:
        """Whether the answer ends inside a UTF-8 character."""
        return ends_inside_character(bytes(self.text[-3:]))

    def is_one_unfinished_word(self, lookahead: Sequence[int]) -> bool:
        """Whether a lookahead (ids of the nudging model) is a single word that ends inside a character."""
        text = self.nudging_vocabulary.join(lookahead)
        return ends_inside_character(text) and not word_starts(text, self.word_boundary)


class OneVocabulary(_Answer):
    """An answer of two models that share one vocabulary: both read the same ids.

    The nudging model does not read the control tokens that the base has drawn: they could end a turn of its chat.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._nudging_ids: list[int] = []

    def append(self, token: int) -> None:
        super().append(token)
        if token not in self.nudging_vocabulary.control:
            self._nudging_ids.append(token)

    def nudging_ids(self) -> list[int]:
        """The answer so far in the nudging model's vocabulary. The list changes as the answer grows."""
        return self._nudging_ids

    def is_one_unfinished_word(self, lookahead: Sequence[int]) -> bool:
        """Whether a lookahead is a single word that ends inside a character. A token is never more than one word."""
        if len(lookahead) == 1:
            return ends_inside_character(self.vocabulary.bytes_of(lookahead[0]))
        return super().is_one_unfinished_word(lookahead)

    def words(self, lookahead: Sequence[int]) -> tuple[Word, ...]:
        """Splits a lookahead into words: see [`_words_of_tokens`]."""
        return _words_of_tokens(lookahead, self.vocabulary, self.word_boundary)

    def draft(self, continuation: Sequence[int], length: int) -> list[int]:
        """The first `length` ids, for the base, of what the nudging model writes after the answer so far."""
        return list(continuation[:length])

    def count(self, continuation: Sequence[int]) -> int:
        """How many tokens of the base the answer and a continuation of it come to."""
        return len(self.ids) + len(continuation)


class TwoVocabularies(_Answer):
    """An answer of two models with different vocabularies, which exchange text.

    The base's ids are those that it emitted, and nudging words encoded into its vocabulary. The ids that the nudging
    model reads are a pure function of the text. The text is encoded in chunks of about 256 characters, each after the
    text before it, so that only the last chunk is encoded anew as the text grows. A chunk ends where a word ends,
    or in a text without spaces where the nudging model's tokenizer ends a token too. The amount of text that is
    encoded at once is bounded, whatever the script.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._prompt_context = _text_after_control(self.prompt, self.vocabulary)
        self._nudging_prompt_context = _text_after_control(self.nudging_prompt, self.nudging_vocabulary)
        self._chunks_end = 0  # Where the finished chunks end in the text, in bytes.
        self._nudging_ids: list[int] = []  # The ids of the chunks, then those of the text after them.
        self._num_chunk_ids = 0
        self._is_stale = False
        self.vocabulary.announce_losses()
        self.nudging_vocabulary.announce_losses()

    def append(self, token: int) -> None:
        super().append(token)
        self._is_stale = True

    def nudging_ids(self) -> list[int]:
        """The answer so far in the nudging model's vocabulary. The list changes as the answer grows."""
        if self._is_stale:
            while (end := self._find_chunk_end()) is not None:
                self._encode_to(end)
                self._num_chunk_ids, self._chunks_end = len(self._nudging_ids), end
            self._encode_to(len(self.text))
            self._is_stale = False
        return self._nudging_ids

    def is_one_unfinished_word(self, lookahead: Sequence[int]) -> bool:
        """Whether a lookahead is a single word that ends inside a character."""
        text = self.nudging_vocabulary.join(lookahead)
        words = self._words_of_whole(text) if ends_inside_character(text) else None
        return len(words) == 1 if words else super().is_one_unfinished_word(lookahead)

    def words(self, lookahead: Sequence[int]) -> tuple[Word, ...]:
        """Splits a lookahead into words. A word for which the base has no ids is joined with the word after it.

        With the rule "space", each word is encoded on its own. With "unicode" that would split the base's tokens, of
        which one often has several words: there the lookahead is encoded as a whole, and split as with one vocabulary.
        """
        text = self.nudging_vocabulary.join(lookahead)
        if words_of_whole := self._words_of_whole(text):
            return words_of_whole
        context = self._base_context()
        words: list[Word] = []
        start = 0
        for end in (*word_starts(text, self.word_boundary), len(text)):
            word = to_text(text[start:end])
            ids = tuple(self.vocabulary.encode_after(context, word))
            if ids or (end == len(text) and words):
                self.vocabulary.warn_if_lossy(word, ids)
                words.append(Word(word, ids))
                context += to_text(self.vocabulary.join(ids))  # As the base will read it.
                if len(context) > 2 * _CHUNK_CHARACTERS:
                    context = recent_context(context)
                start = end
        return tuple(words)

    def _words_of_whole(self, lookahead: bytes) -> tuple[Word, ...]:
        """The words of a lookahead that is encoded as a whole; none with "space", or if the base's ids lose text."""
        if self.word_boundary == "space":
            return ()
        text = to_text(lookahead)
        ids = self.vocabulary.encode_after(self._base_context(), text)
        if self.vocabulary.join(ids) != text.encode():
            return ()
        return _words_of_tokens(ids, self.vocabulary, self.word_boundary)

    def draft(self, continuation: Sequence[int], length: int) -> list[int]:
        """The first `length` ids, for the base, of what the nudging model writes after the answer so far.

        The text is encoded in one piece. If its words have other ids on their own, the draft is wrong there and only
        costs time.
        """
        text = to_text(self.nudging_vocabulary.join(continuation))
        return self.vocabulary.encode_after(self._base_context(), text)[:length]

    def count(self, continuation: Sequence[int]) -> int:
        """How many tokens of the base the answer and a continuation of it come to."""
        return len(self.ids) + sum(len(word.ids) for word in self.words(continuation))

    def _base_context(self) -> str:
        """The text before the next word, as far as the base's tokenizer looks back.

        Its start moves in steps, so that an encode is often found in the cache after the text has grown.
        """
        step = (len(self.text) // _CONTEXT_CHARACTERS - 1) * _CONTEXT_CHARACTERS
        if step <= 0:
            return self._prompt_context + to_text(bytes(self.text))
        space = self.text.find(SPACE, step, step + _CONTEXT_CHARACTERS // 2)
        return to_text(bytes(self.text[max(self._character_start(step), space + 1) :]))

    def _encode_to(self, end: int) -> None:
        """Encodes the text from the last chunk's end to the byte `end`, and replaces the ids after the chunks."""
        text = to_text(bytes(self.text[self._chunks_end : end]))
        ids = self.nudging_vocabulary.encode_after(self._nudging_context_at(self._chunks_end), text) if text else []
        self.nudging_vocabulary.warn_if_lossy(text, ids)
        self._nudging_ids[self._num_chunk_ids :] = ids

    def _nudging_context_at(self, place: int) -> str:
        """The nudging model's text before a byte of the answer, as far as its tokenizer looks back."""
        start = self._character_start(max(0, place - _MAX_CHARACTER_BYTES * _CONTEXT_CHARACTERS))
        context = to_text(bytes(self.text[start:place]))
        return recent_context(context if start else self._nudging_prompt_context + context)

    def _character_start(self, place: int) -> int:
        """The first byte from `place` on at which a character starts."""
        while self.text[place : place + 1] and 0x80 <= self.text[place] < 0xC0:
            place += 1
        return place

    def _find_chunk_end(self) -> int | None:
        """Where the next chunk ends, in bytes; `None` while the text is too short to decide.

        The chunk ends at the first word end that makes it long enough, or before it becomes too long. Later text must
        not change the decision, so it is made on whole characters and on a fixed number of them.
        """
        start = self._chunks_end
        limit = start + _MAX_CHARACTER_BYTES * _MAX_CHUNK_CHARACTERS
        match = _WORD_END.search(self.text, start + _CHUNK_CHARACTERS, limit + 2)  # The space and the byte after it.
        if match and match.start() - start <= _MAX_CHUNK_CHARACTERS:
            return match.start()
        read = _MAX_CHUNK_CHARACTERS + _CONTEXT_CHARACTERS
        text = _decode_whole_characters(self.text[start : start + _MAX_CHARACTER_BYTES * read])[:read]
        if match and match.start() <= start + _num_bytes(text[:_MAX_CHUNK_CHARACTERS]):
            return match.start()
        return start + _num_bytes(text[: self._find_end_without_spaces(text)]) if len(text) == read else None

    def _find_end_without_spaces(self, text: str) -> int:
        """Where a chunk of a text without spaces ends, in characters.

        It prefers a place at which the ids of the text before do not depend on the text after.
        """
        places = [i for i in range(_CHUNK_CHARACTERS, _MAX_CHUNK_CHARACTERS) if not _continues_cluster(text, i)]
        places = places or [_CHUNK_CHARACTERS]
        # Prefer the end of a run of letters, digits or signs.
        places.sort(key=lambda i: _character_class(text[i - 1]) == _character_class(text[i]))
        for place in islice(places, _MAX_ENDS_TRIED):
            context = self._nudging_context_at(self._chunks_end + _num_bytes(text[:place]))
            following = to_text(_encode_characters(text[place : place + _CONTEXT_CHARACTERS]))
            if self.nudging_vocabulary.encode_suffix(context, following) is not None:
                return place
        return places[0]


def answer_class(
    vocabulary: Vocabulary, nudging_vocabulary: Vocabulary
) -> type[OneVocabulary] | type[TwoVocabularies]:
    """`OneVocabulary` if the models can exchange ids, else `TwoVocabularies`.

    They can if the nudging model's vocabulary contains the base's with the same ids and adds only control tokens,
    because control tokens are never exchanged.
    """
    tokenizer, nudging_tokenizer = vocabulary.tokenizer, nudging_vocabulary.tokenizer
    few = [token for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))[_FIRST_COMPARED])) if token]
    if nudging_tokenizer.convert_tokens_to_ids(few) != tokenizer.convert_tokens_to_ids(few):
        return TwoVocabularies  # A few tokens tell most vocabularies apart, in a fraction of the time.
    ours, theirs = tokenizer.get_vocab(), nudging_tokenizer.get_vocab()
    holds = all(theirs.get(token) == i for token, i in ours.items())
    extra_is_control = all(i in nudging_vocabulary.control for token, i in theirs.items() if token not in ours)
    return OneVocabulary if holds and extra_is_control else TwoVocabularies


def _words_of_tokens(ids: Sequence[int], vocabulary: Vocabulary, word_boundary: str) -> tuple[Word, ...]:
    """Splits ids into words. A split inside a token moves to its start, but not to the first token's.

    The rule "unicode" splits no character either, so there a token that starts inside a character is passed over.
    """
    pieces = [vocabulary.bytes_of(token) for token in ids]
    joined = b"".join(pieces)
    starts = list(accumulate(map(len, pieces), initial=0))[:-1]  # The byte at which each token starts.
    places = list(range(1, len(pieces)))  # The tokens with which a word may start.
    if word_boundary != "space":
        places = [i for i in places if not ends_inside_character(joined[max(0, starts[i] - 3) : starts[i]])]
    splits = {
        places[max(bisect_right(places, split, key=lambda i: starts[i]) - 1, 0)]
        for split in word_starts(joined, word_boundary)
        if places
    }
    words: list[Word] = []
    for begin, end in pairwise(sorted({0, *splits, len(pieces)})):
        text, own = to_text(b"".join(pieces[begin:end])), tuple(ids[begin:end])
        # Splits that moved within a run of spaces can leave an empty word, which joins the word before it.
        if words and words[-1].is_empty and len(words) > 1:
            before, spaces = words[-2:]
            words[-2:] = [Word(before.text + spaces.text, before.ids + spaces.ids)]
        words.append(Word(text, own))
    return tuple(words)


def ends_inside_character(text: bytes) -> bool:
    """Whether the text ends in the incomplete beginning of a UTF-8 character. Invalid bytes begin no character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text[-3:])
    begun = decoder.getstate()[0]
    # Python waits for the third byte of a surrogate, although no byte makes it a valid character.
    return begun != b"" and not b"\xed\xa0" <= begun <= b"\xed\xbf"


def recent_context(context: str) -> str:
    """The last words of a text, more of it than any tokenizer looks back. An endless word is cut."""
    start = context.rfind(" ", 0, max(0, len(context) - _CONTEXT_CHARACTERS)) + 1
    least = max(0, len(context) - _CHUNK_CHARACTERS)
    if start < least:
        start = next(
            (i for i in range(least, least + _MAX_CLUSTER_CHARACTERS) if not _continues_cluster(context, i)), least
        )
    return context[start:]


def _text_after_control(ids: list[int], vocabulary: Vocabulary) -> str:
    """The end of the text after the last control token of a prompt."""
    last = max((i for i, token in enumerate(ids) if token in vocabulary.control), default=-1)
    return recent_context(to_text(vocabulary.join(ids[last + 1 :])))


def _decode_whole_characters(text: bytes | bytearray) -> str:
    """Decodes UTF-8 without an incomplete character at the end. Each invalid byte becomes a character of its own."""
    return codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(bytes(text))


def _encode_characters(characters: str) -> bytes:
    """The inverse of `_decode_whole_characters`."""
    return characters.encode("utf-8", "surrogateescape")


def _num_bytes(characters: str) -> int:
    return len(_encode_characters(characters))


def _continues_cluster(text: str, place: int) -> bool:
    """Whether the character at `place` belongs to the one before it: an accent, part of an emoji, an invalid byte."""
    before, character = text[place - 1 : place], text[place]
    return (
        unicodedata.category(character)[0] == "M"
        or _ZERO_WIDTH_JOINER in (before, character)
        or "\U0001f3fb" <= character <= "\U0001f3ff"  # Skin tones.
        or "\u1160" <= character <= "\u11ff"  # Vowels and ends of Hangul syllables.
        or ("\U0001f1e6" <= character <= "\U0001f1ff" and "\U0001f1e6" <= before <= "\U0001f1ff")  # Flags.
        or ("\udc80" <= character <= "\udcff" and "\udc80" <= before <= "\udcff")
    )


def _character_class(character: str) -> str:
    if character.isalpha() or unicodedata.category(character)[0] == "M":
        return "letter"
    return "digit" if character.isdigit() else "space" if character.isspace() else "sign"
