"""The algorithm of nudging for one answer, as a generator. It knows words and verdicts, never models or caches.

The generator yields questions, is sent their answers, and yields what is accepted. Whoever runs it (an executor) may
answer early, late, or for many rows at once: what is asked here, and in which order, is the definition of nudging.

Source: Fei, Razeghi, Singh, "Nudging: Inference-time Alignment of LLMs via Guided Decoding" (arXiv 2410.09300), and
the API code that its authors released, from which come the first-word rule and the agreement rule.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum


class Question(Enum):
    """What the algorithm asks about the answer as it stands."""

    LOOKAHEAD = "What would the nudging model write next here?"
    VERDICT = "What would the base write next here, and how sure is it?"


@dataclass(frozen=True)
class Word:
    """One word of a lookahead: its text, the space before it included, and its ids in the base's vocabulary."""

    text: str
    ids: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return not self.text.strip(" ")


@dataclass(frozen=True)
class Lookahead:
    """The answer to `Question.LOOKAHEAD`: words, and whether the nudging model ended the answer behind them.

    `words` is empty where the base's vocabulary cannot hold anything of what the nudging model wrote.
    """

    words: tuple[Word, ...]
    ended: bool


@dataclass(frozen=True)
class Verdict:
    """The answer to `Question.VERDICT`.

    Args:
        token: the base's next token: greedy, or drawn where the base samples.
        text: what that token adds to the text; may be empty.
        is_confident: whether the base is sure enough of itself to go on, by its gate and threshold.
        is_eos: whether `token` is one of the base's EOS tokens.
        inside_character: whether the answer so far ends in an unfinished UTF-8 character.
    """

    token: int
    text: str
    is_confident: bool
    is_eos: bool
    inside_character: bool


@dataclass(frozen=True)
class Accept:
    """Tokens, in the base's vocabulary, by which the answer grows, and whether the nudging model wrote them."""

    ids: tuple[int, ...]
    nudged: bool


Step = Question | Accept
Reply = Lookahead | Verdict | None


def rounds(takeover_on_agreement: bool, agrees_beyond_word: bool = False) -> Generator[Step, Reply, str]:
    """Nudged decoding of one answer.

    Args:
        takeover_on_agreement: whether an unsure base takes over where its token begins the next nudging word.
        agrees_beyond_word: whether it may be longer than this word, if it begins the rest of the lookahead.

    Yields:
        A `Question`, to be answered by `send` with a `Lookahead` or a `Verdict`, or an `Accept`, answered by `None`.

    Returns:
        Why the answer ended: "eos", the nudging model ended it; or "stuck", neither model can go on: the base would
        end the answer, and its vocabulary holds nothing of what the nudging model would write.
    """
    while True:
        lookahead = yield Question.LOOKAHEAD
        assert isinstance(lookahead, Lookahead)
        if lookahead.ended:
            for word in lookahead.words:
                yield Accept(word.ids, nudged=True)
            return "eos"
        takeover: Verdict | None
        if lookahead.words:
            takeover = yield from _nudging_round(lookahead.words, takeover_on_agreement, agrees_beyond_word)
        else:  # No word that the base could read: there the base goes on.
            takeover = yield from _ask_base()
            if takeover.is_eos:
                return "stuck"
        if takeover is not None:
            yield from _base_phase(takeover)


def _nudging_round(
    words: tuple[Word, ...], on_agreement: bool, beyond_word: bool
) -> Generator[Step, Reply, Verdict | None]:
    """Accepts the first word, and each further one until the base takes over; returns the verdict that does so."""
    first, *further = words
    yield Accept(first.ids, nudged=True)
    for i, word in enumerate(further, start=2):
        if word.is_empty:
            continue
        verdict = yield from _ask_base()
        if verdict.is_eos:  # Only the nudging model ends an answer: it is asked afresh.
            return None
        ahead = "".join(each.text for each in words[i - 1 :]) if beyond_word else word.text
        agrees = on_agreement and verdict.text != "" and ahead.startswith(verdict.text)
        if verdict.is_confident or agrees:
            return verdict
        if i < len(words):  # The last word is set aside: the lookahead's end may have cut it.
            yield Accept(word.ids, nudged=True)
    return None


def _base_phase(verdict: Verdict) -> Generator[Step, Reply, None]:
    """Accepts the base's tokens while it is confident, and inside a character in any case; EOS never."""
    while True:
        yield Accept((verdict.token,), nudged=False)
        verdict = yield from _ask_base()
        if verdict.is_eos or not (verdict.is_confident or verdict.inside_character):
            return


def _ask_base() -> Generator[Step, Reply, Verdict]:
    verdict = yield Question.VERDICT
    assert isinstance(verdict, Verdict)
    return verdict
