"""What is fuzzed: the algorithm of one answer, and the bridge between two vocabularies.

A target reads bytes as choices, and raises an `AssertionError` where a rule of `docs/design.md` is broken.
"""

from itertools import pairwise
from typing import Any

import tiny

from nudging_hf.core.answer import OneVocabulary, TwoVocabularies, ends_inside_character
from nudging_hf.core.config import WORD_BOUNDARIES
from nudging_hf.core.rounds import Accept, Lookahead, Question, Verdict, Word, rounds
from nudging_hf.core.vocabulary import Vocabulary, to_text
from nudging_hf.core.words import word_starts

_LOSSLESS = ("byte_bpe", "other_byte_bpe", "metaspace_bpe", "unigram")
_PIECES = (
    " ",
    "  ",
    "\n",
    "a",
    "the",
    "7",
    "é",
    "e\u0301",
    "你好",
    "😀",
    "\u200d",
    "🇩🇪",
    "\u0e33",
    "\u2028",
    "\t",
    "\x00",
)
_VOCABULARIES = {name: Vocabulary(tokenizer()) for name, tokenizer in tiny.TOKENIZERS.items()}
_SPELT = sorted({token for each in _VOCABULARIES.values() for token in each.tokenizer.all_special_tokens})


class Choices:
    """Bytes as numbers and texts. When they are used up, every number is 0."""

    def __init__(self, data: bytes):
        self._data = data
        self._place = 0

    @property
    def are_left(self) -> bool:
        return self._place < len(self._data)

    def number(self, below: int) -> int:
        taken = self._data[self._place : self._place + 2 if below > 256 else self._place + 1]
        self._place += len(taken)
        return int.from_bytes(taken, "big") % below

    def one_of(self, options: Any) -> Any:
        return options[self.number(len(options))]

    def text(self, most: int) -> str:
        """Some of `_PIECES`, control tokens that are spelt out, and any characters."""
        parts = []
        for _ in range(self.number(most + 1)):
            kind = self.number(8)
            if kind == 0:
                parts.append(self.one_of(_SPELT))
            elif kind == 1:
                parts.append(chr(self.number(0x10000)).encode("utf-8", "replace").decode())
            else:
                parts.append(self.one_of(_PIECES))
        return "".join(parts)


# The algorithm of one answer ----------------------------------------------------------------------------------------


def check_rounds(data: bytes) -> None:
    """Answers the questions of one answer by chance, and checks each rule on all that was asked and accepted."""
    take = Choices(data)
    on_agreement, beyond_word = bool(take.number(2)), bool(take.number(2))
    algorithm, reply, events = rounds(on_agreement, beyond_word), None, []
    while take.are_left:
        try:
            step = algorithm.send(reply)
        except StopIteration as end:
            events.append(end.value)
            break
        reply = None
        if step is Question.LOOKAHEAD:
            reply = Lookahead(tuple(_word(take, i) for i in range(take.number(5))), ended=take.number(8) == 0)
        elif step is Question.VERDICT:
            flags = take.number(16)
            text = take.one_of(("", " ", "a", " a", "b", " b", "  "))
            reply = Verdict(take.number(100), text, flags % 4 == 0, flags % 5 == 4, flags % 3 == 2)
        events.append(step if reply is None else reply)
    if events:
        assert isinstance(events[0], Lookahead), "an answer begins with the nudging model"
    phase: str | None = None
    words: tuple[Word, ...] = ()
    nudged: list[Word] = []
    for event, following in pairwise(events):
        if isinstance(event, Lookahead):
            phase, words, nudged = "end" if event.ended else "round", event.words, []
            if not words:
                assert following == "eos" if event.ended else isinstance(following, Verdict)
        elif isinstance(event, Accept) and event.nudged:
            assert phase != "base"
            left = [word for i, word in enumerate(words) if i >= _position(words, nudged)]
            due = left if phase == "end" or not nudged else [word for word in left if not word.is_empty]
            assert event.ids == due[0].ids, "words are accepted in order, and no empty one after the first"
            assert phase == "end" or due[0] is not words[-1] or len(words) == 1, "the last piece is set aside"
            nudged.append(due[0])
        elif isinstance(event, Accept):
            phase = "base"
        elif isinstance(event, Verdict):
            if event.is_eos:
                assert isinstance(following, Lookahead) or (following == "stuck" and not words)
                continue
            if phase == "round" and words:
                asked = next(word for word in words[_position(words, nudged) :] if not word.is_empty)
                rest = words[next(i for i, word in enumerate(words) if word is asked) :]
                ahead = "".join(word.text for word in rest) if beyond_word else asked.text
                agrees = on_agreement and event.text != "" and ahead.startswith(event.text)
                takes_over = event.is_confident or agrees
            else:
                takes_over = phase == "round" or event.is_confident or event.inside_character
            is_taken = following == Accept((event.token,), nudged=False)
            assert is_taken == takes_over, "the base writes exactly where it may"
            if not takes_over:
                assert isinstance(following, Lookahead) or (phase == "round" and following == Accept(asked.ids, True))
        if following == "eos":
            assert phase == "end" and nudged == list(words), "all the text before EOS is accepted"


def _word(take: Choices, place: int) -> Word:
    text = take.one_of((" a", " ab", " b", "  ", " ", "a"))
    return Word(text, (1000 + place, len(text)))


def _position(words: tuple[Word, ...], nudged: list[Word]) -> int:
    """The place in a lookahead after the words that were accepted. Words are told apart by their place."""
    return 1 + max((i for i, word in enumerate(words) for other in nudged if word is other), default=-1)


# The bridge ---------------------------------------------------------------------------------------------------------


def check_bridge(data: bytes) -> None:
    """Writes one answer by both models, and checks what crosses between their vocabularies."""
    take = Choices(data)
    name, nudging_name = take.one_of(list(tiny.TOKENIZERS)), take.one_of(list(tiny.TOKENIZERS))
    base, nudging = _VOCABULARIES[name], _VOCABULARIES[nudging_name]
    kind = OneVocabulary if name == nudging_name else TwoVocabularies
    boundary = take.one_of(WORD_BOUNDARIES)
    prompts = ([*base.encode_after("", take.text(3))], [*nudging.encode_after("", take.text(3))])
    row, unasked = kind(base, nudging, *prompts, boundary), kind(base, nudging, *prompts, boundary)
    while take.are_left:
        if take.number(3) == 0:  # The base writes any token that is no control token.
            new = [take.one_of(sorted(set(range(len(base.tokenizer))) - base.control))]
        else:
            lookahead = [*nudging.encode_after(take.text(2), take.text(6))]
            if take.number(2):
                lookahead.append(take.one_of(sorted(set(range(len(nudging.tokenizer))) - nudging.control)))
            words = row.words(lookahead)
            _check_words(row, lookahead, words, is_lossless=name in _LOSSLESS)
            new = [token for word in words[: take.number(4)] for token in word.ids]
        for token in new:
            row.append(token)
            unasked.append(token)
        if take.number(2):
            _check_reading(row, nudging_name in _LOSSLESS)
    assert row.nudging_ids() == unasked.nudging_ids(), "the nudging model's ids are a function of the text"


def _check_words(row: Any, lookahead: list[int], words: tuple[Word, ...], is_lossless: bool) -> None:
    raw = row.nudging_vocabulary.join(lookahead)
    if isinstance(row, OneVocabulary):
        assert [token for word in words for token in word.ids] == lookahead
        assert all(word.ids for word in words)
    else:
        assert all(row.vocabulary.control.isdisjoint(_known(row.vocabulary, word.ids)) for word in words)
        bounds = [0, *word_starts(raw, row.word_boundary), len(raw)]
        split = [to_text(raw[start:end]) for start, end in pairwise(bounds)]
        if is_lossless:
            if row.word_boundary == "space":
                assert [word.text for word in words] == [each for each in split if each]
            else:  # A word starts at a token, so that several may be one.
                assert "".join(word.text for word in words) == to_text(raw) and len(words) <= len(split)
            assert all(_crossed(row.vocabulary, word.ids, word.text) for word in words)
        else:
            assert "".join(split).startswith("".join(word.text for word in words))
    for draft in (row.draft(lookahead, 3), row.draft(lookahead, 100)):
        probabilities = row.draft_top1_probs(draft, lookahead, [0.5] * len(lookahead))
        assert len(probabilities) == len(draft) and all(0 < each <= 1 for each in probabilities)
    assert len(row.draft(lookahead, 3)) <= 3
    assert row.is_one_unfinished_word(lookahead) <= ends_inside_character(raw)
    assert row.count(lookahead) == len(row.ids) + sum(len(word.ids) for word in words)


def _check_reading(row: Any, is_lossless: bool) -> None:
    ids, text = list(row.nudging_ids()), to_text(bytes(row.text))
    assert bytes(row.text) == row.vocabulary.join(row.ids)
    assert row.inside_character == ends_inside_character(bytes(row.text))
    if isinstance(row, OneVocabulary):
        assert ids == [token for token in row.ids if token not in row.nudging_vocabulary.control]
        return
    assert row.nudging_vocabulary.control.isdisjoint(_known(row.nudging_vocabulary, ids)), "a control token crossed"
    if is_lossless:
        assert _crossed(row.nudging_vocabulary, ids, text)


def _known(vocabulary: Vocabulary, ids: Any) -> set[int]:
    """The ids without the one for unknown text, which is a control token and stands for lost text."""
    return set(ids) - {vocabulary.tokenizer.unk_token_id}


def _crossed(vocabulary: Vocabulary, ids: Any, text: str) -> bool:
    """Whether the ids have the text. SentencePiece has one symbol for U+2581 and the space."""
    return to_text(vocabulary.join(ids)).replace("\u2581", " ") == text.replace("\u2581", " ")


TARGETS = {"rounds": check_rounds, "bridge": check_bridge}
