"""The in-process executor: rows times two models. It knows questions, drafts and limits, never the algorithm's rules.

`rounds` asks what the nudging model would write here and what the base's verdict is here. The executor gathers the
questions of all rows, answers those of one kind in one forward pass, and answers early: the base is fed the text *and*
what the nudging model has written after it, and the verdicts at all these positions are kept. If the answer goes on
along the nudging model's text, the next verdicts are there already; where it leaves it, what is left is dropped and
both caches roll back. The nudging model in turn reads its own text *and* a guess of what it will write, and writes as
far as the guess was right, and a token. So drafts save passes and cannot change an answer.

Sampling: a token is a function of its row's seed, its place and the distribution there, so a verdict is the same
whether it was asked for early or late. A drafted token is accepted if it is the one that is drawn, i.e. with the
base's probability p of it: the rule of speculative sampling (Leviathan et al., arXiv 2211.17192), which accepts with
min(1, p / q) and else draws from the residual, for a draft that the algorithm has read already, so that q = 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
)
from transformers.utils import logging

from .answer import OneVocabulary, TwoVocabularies
from .cached_lm import CachedLM, Reading, SeparateRows, common_prefix
from .config import ADAPTIVE, NudgingConfig
from .constraints import Constraint
from .drafting import MOST, DraftLength, Plan, Written, borrowed_draft_length
from .gate import GATES, top1_probabilities
from .prompt_lookup import guess
from .rounds import Accept, Lookahead, Question, Reply, Step, Verdict, Word
from .sampling import Positions, best_scores, choose, joined, mix, processed_scores
from .threshold import FixedThreshold, OnlineThreshold
from .transformers_private import shared_by_ranks
from .vocabulary import to_text

_USUAL_WIDTH = MOST + 16  # Tokens that a row is fed in a pass which reads no prompt, at the most.
_CHARACTER_BYTES = 4  # Of UTF-8, at the most.
_BASE_STREAM, _NUDGING_STREAM = 0, 1  # Each model draws by keys of its own.
_LEAST_BOUND = 32  # Tokens of a lookahead that are written however few the answer may still take.

logger = logging.get_logger(__name__)


class Limits:
    """The criteria that end an answer wherever it stands, in the middle of a word too.

    Args:
        criteria: as `generate` prepared them.
        base_eos: the base's EOS ids, which end no answer: it never writes one, and what the nudging model writes as a
            word is one.
        stop_tokens: the `eos_token_id` of the call, where it is none of the base's own: the answer ends with one.
    """

    def __init__(self, criteria: StoppingCriteriaList, base_eos: Sequence[int], stop_tokens: Sequence[int] = ()):
        self.stop_tokens = frozenset(stop_tokens)
        self._last_tokens: set[int] = set()
        self._lengths: list[MaxLengthCriteria] = []
        self._times: list[MaxTimeCriteria] = []
        self._others: list[Any] = []
        self.max_length: float = float("inf")
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                self.max_length = min(self.max_length, criterion.max_length)
                self._lengths.append(criterion)
            elif isinstance(criterion, MaxTimeCriteria):
                self._times.append(criterion)
            elif isinstance(criterion, EosTokenCriteria):
                self._last_tokens |= set(criterion.eos_token_id.tolist()) - set(base_eos)
            else:
                self._others.append(criterion)

    def time_is_up(self) -> bool:
        return any(time.time() - limit.initial_timestamp > limit.max_time for limit in self._times)

    def reached(self, row: Row) -> str | None:
        """Why the row ends with the token that it has just accepted, if it does."""
        if row.answer.ids[-1] in self.stop_tokens:
            return "stop_token"
        if row.answer.ids[-1] in self._last_tokens:
            return "stopping_criteria"
        for criterion in self._others:
            if criterion(row.ids(), None).all():
                return "stop_string" if isinstance(criterion, StopStringCriteria) else "stopping_criteria"
        if row.length >= self.max_length or row.is_full():
            return "length"
        for limit in self._lengths:
            if limit.max_position_embeddings is not None and row.length > limit.max_position_embeddings:
                limit(row.ids(), None)  # It warns, once, as in plain `generate`.
        return "time" if self.time_is_up() else None

    def room(self, row: Row) -> float:
        """How many tokens of the base the row's answer may still take."""
        return min(self.max_length - row.length, row.base_room - len(row.answer.ids))


class End(Enum):
    """Why the nudging model writes no further after what it has written."""

    EOS = "it has ended the answer"
    BLOCKED = "the caller's processors forbid all that it may write"
    LOGITS = "its logits are no numbers"
    SCORES = "no token can be chosen by its processed scores"


class _Seen(NamedTuple):
    """What the base says at one position."""

    token: int
    score: float
    top1: float
    logits: torch.Tensor | None
    scores: torch.Tensor | None
    best: float = 0.0  # The processed score of the token: NaN or infinite where none can be chosen.


@dataclass(eq=False)
class Row:
    """One answer on its way, and what is known ahead of it.

    Args:
        number: the row's place in the batch.
        prompt: the base's as `generate` was given it, padding included, of shape (1, prompt_length).
        nudging_prompt: the nudging model's, of shape (1, nudging_prompt_length).
        answer: the answer so far.
        base_processors, nudging_processors: each model's logits processors for this row.
        seed: what its draws are made of.
        threshold: tells whether the base is confident.
        constraint: what the caller's hard processors forbid, if there are any.
        base_room: how many tokens of the base the answer may have, by the base's last position.
        nudging_room: how many tokens of the nudging model the answer may have, by that model's last position.
        nudging_rows: how many ids the nudging model can read.
        stand_in: what it reads in the place of an id that it cannot read.
    """

    number: int
    prompt: torch.Tensor
    nudging_prompt: torch.Tensor
    answer: OneVocabulary | TwoVocabularies
    base_processors: LogitsProcessorList
    nudging_processors: LogitsProcessorList
    seed: int
    threshold: FixedThreshold | OnlineThreshold
    algorithm: Generator[Step, Reply, str]
    constraint: Constraint | None = None
    base_room: float = math.inf
    nudging_room: float = math.inf
    nudging_rows: float = math.inf
    stand_in: int = 0
    question: Question | None = None
    nudged: list[bool] = field(default_factory=list)
    finish_reason: str | None = None
    end_marks: int = 0  # Of the answer's tokens: 1 where the base's EOS was put behind it.
    # What the base said at each position of the answer, and of the draft that it has read behind it.
    seen: list[_Seen] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    draft_sure: Sequence[float] = ()  # How sure the nudging model was of each token of that draft.
    draft_hits: int = 0
    # What the nudging model has written: its ids for a text that the answer had, a continuation, and why it ends.
    written: list[int] = field(default_factory=list)
    written_end: End | None = None
    written_eos: int | None = None  # Which EOS it was.
    written_best: float = 0.0  # The best score where no token could be chosen.
    written_key: int | None = None
    written_top1: dict[int, float] = field(default_factory=dict)  # How sure it was, by how many ids stood before.
    # What it had written last where the answer went another way, one id behind that place, and how many stood before.
    left: list[int] = field(default_factory=list)
    left_at: int = 0

    @property
    def length(self) -> int:
        return self.prompt.shape[1] + len(self.answer.ids)

    def ids(self) -> torch.Tensor:
        """Prompt and answer, of shape (1, length)."""
        new = torch.tensor([self.answer.ids], dtype=torch.long, device=self.prompt.device)
        return torch.cat([self.prompt, new], dim=1)

    def append(self, token: int, nudged: bool) -> None:
        place = len(self.answer.ids)
        if place < len(self.read) and self.read[place] == token:
            self.draft_hits += 1
        else:
            del self.read[place:], self.seen[place + 1 :]
        self.answer.append(token)
        self.nudged.append(nudged)
        self.threshold.take(self.answer.vocabulary.bytes_of(token), nudged)

    def is_full(self) -> bool:
        """Whether the answer has come to the last position of either model."""
        if len(self.answer.ids) >= self.base_room:
            return True
        # Hardly any token adds less than a byte, so that ids need not be counted before it is close.
        if 2 * len(self.answer.text) + len(self.answer.ids) < self.nudging_room:
            return False
        return len(self.answer.nudging_ids()) >= self.nudging_room

    def continuation(self) -> list[int]:
        """What the nudging model has already written after the answer as it stands.

        It was drawn along the ids of another text, and is good for this one if this one's ids begin them.
        """
        context = self.answer.nudging_ids()
        if self.nudging_rows < math.inf:
            context = [token if token < self.nudging_rows else self.stand_in for token in context]
        if self.written[: len(context)] != context:
            place = common_prefix(self.written, context) + 1
            if tail := self.written[place:]:
                self.left, self.left_at = tail, place
            self.forget_written()
            self.written = list(context)
        return self.written[len(context) :]

    def nudging_key(self) -> int:
        """Of the nudging model's next draw: a function of the text, so that a text is always continued alike."""
        if self.written_key is None:
            self.written_key = reduce(mix, self.written, mix(self.seed, _NUDGING_STREAM))
        return self.written_key

    def nudging_top1(self) -> float | None:
        """The nudging model's top-1 probability after the answer as it stands, if it is known."""
        return self.written_top1.get(len(self.written) - len(self.continuation()))

    def sure(self) -> list[float]:
        """The nudging model's top-1 probability at each token of its continuation."""
        ahead = len(self.continuation())
        return [self.written_top1[i] for i in range(len(self.written) - ahead, len(self.written))]

    def forget_written(self) -> None:
        self.written, self.written_end, self.written_eos, self.written_key = [], None, None, None
        self.written_top1.clear()

    def write(self, token: int) -> None:
        """Takes down what the nudging model writes next."""
        self.written.append(token)
        if self.written_key is not None:
            self.written_key = mix(self.written_key, token)


@dataclass(frozen=True)
class Voices:
    """What each model may say.

    Args:
        base_eos: the base's EOS ids; it is never confident about one. The first is the end mark.
        nudging_eos: the nudging model's EOS ids; any of them ends an answer.
        nudging_control: its control tokens, of shape (n,), EOS left out: never drawn.
        base_samples, nudging_samples: whether each draws its tokens.
        min_new_tokens: base tokens before which the nudging model may not end an answer.
        base_rows: how many ids the base can read, where a tokenizer or the nudging model has more.
        nudging_positions: how many the nudging model was trained on; beyond, it is warned once.
    """

    base_eos: Sequence[int]
    nudging_eos: Sequence[int]
    nudging_control: torch.Tensor
    base_samples: bool
    nudging_samples: bool
    min_new_tokens: int
    base_rows: float = math.inf
    nudging_positions: float = math.inf


class NudgedDecoder:
    """Writes the nudged answers of a batch.

    Args:
        base, nudging: both models, with as many rows as there are answers.
        rows: the answers to write; each ends with a `finish_reason`.
        config: every knob.
        voices: what each model may say.
        limits: what ends an answer early.
        streamer: is given each token as it is accepted, and its author where it has a `put_marked`; for a single row.
        record: whether the base is to say its top-1 probability at every token, also where nobody asked for it (at
            the cost of a pass at the end); `record_logits` keeps logits and processed scores too.
    """

    def __init__(
        self,
        base: CachedLM | SeparateRows,
        nudging: CachedLM | SeparateRows,
        rows: list[Row],
        config: NudgingConfig,
        voices: Voices,
        limits: Limits,
        streamer: Any = None,
        record: bool = False,
        record_logits: bool = False,
    ):
        self.base = base
        self.nudging = nudging
        self.rows = rows
        self.config = config
        self.gate = GATES[config.nudge_gate]
        self.voices = voices
        self.limits = limits
        self.streamer = streamer
        self.record = record
        self.record_logits = record_logits
        self._policy: DraftLength  # While it runs.
        # With one vocabulary, the nudging model may write a stop token of the caller's, which can be too early too.
        self._one_vocabulary = isinstance(rows[0].answer, OneVocabulary)
        too_early = {*voices.nudging_eos, *(limits.stop_tokens if self._one_vocabulary else ())}
        # On the device, so that no step waits for it to get there.
        self._no_eos = SuppressTokensLogitsProcessor(sorted(too_early), device=nudging.device)
        self._control_mask: torch.Tensor | None = None
        self._tokens = 0  # Of all answers, when the base has last read.
        self._plan: Plan | None = None  # How far is drafted before it reads again, if that is still so.
        self._steps_are_free = False  # To the rows that need not write: others must.

    def run(self) -> None:
        """Writes all answers to their end."""
        way = (len(self.rows), self.base.kind_of_cache)
        with borrowed_draft_length(self.base.model, self.nudging.model, way) as self._policy:
            self._run()

    def _run(self) -> None:
        for row in self.rows:
            self._resume(row, None)
        while True:
            if self.limits.time_is_up():
                for row in self._open():
                    self._finish(row, "time")
            for row in self._open():
                self._proceed(row)
            if short := self._short_rows():
                self._write(short)
            elif due := [row for row in self.rows if self._lacks_verdict(row)]:
                self._verify(due)
            else:
                break

    def _open(self) -> list[Row]:
        return [row for row in self.rows if row.finish_reason is None]

    # The algorithm's side: questions are answered as far as what is known carries.

    def _proceed(self, row: Row) -> None:
        while row.finish_reason is None and (answer := self._known_answer(row)) is not None:
            self._resume(row, answer)

    def _known_answer(self, row: Row) -> Lookahead | Verdict | None:
        if row.question is Question.LOOKAHEAD:
            return self._lookahead(row)
        place = len(row.answer.ids)
        if place >= len(row.seen):
            return None
        seen = row.seen[place]
        token, score = seen.token, seen.score
        if not math.isfinite(seen.top1):
            raise ValueError(_no_numbers("base", place, row))
        if not math.isfinite(seen.best):
            raise ValueError(_no_choice("base", seen.best, place, row))
        if self.gate.against_nudging_model:
            top1 = row.nudging_top1()
            if top1 is None:
                return None
            if not math.isfinite(top1):
                raise ValueError(_no_numbers("nudging model", place, row))
            score -= top1
            if self._eos_is_early(row):
                row.forget_written()
        text = to_text(row.answer.vocabulary.bytes_of(token))
        is_confident = row.threshold.is_confident(score)
        return Verdict(token, text, is_confident, token in self.voices.base_eos, row.answer.inside_character)

    def _resume(self, row: Row, answer: Lookahead | Verdict | None) -> None:
        """Answers a question, and takes what is accepted, up to the next question or the end."""
        step = self._next_step(row, answer)
        while isinstance(step, Accept):
            for token in step.ids:
                self._append(row, token, step.nudged)
                if reason := self.limits.reached(row):
                    return self._finish(row, reason)
            step = self._next_step(row, None)
        if isinstance(step, Question):
            row.question = step
            if step is Question.LOOKAHEAD and self._eos_is_early(row):
                row.forget_written()
            return
        if step == "eos" and self._one_vocabulary and row.written_eos in self.limits.stop_tokens:
            assert row.written_eos is not None
            self._append(row, row.written_eos, nudged=True)  # The caller's stop token, as the nudging model wrote it.
            step = "stop_token"
        elif step == "eos" and self.voices.base_eos:
            self._append(row, self.voices.base_eos[0], nudged=False)  # The end mark, nobody's word.
            row.end_marks = 1
        self._finish(row, step)

    @staticmethod
    def _next_step(row: Row, answer: Lookahead | Verdict | None) -> Step | str:
        """The algorithm's next step, or why the answer has ended.

        Alone in its `try`: a `StopIteration` of the caller's own (a criterion, a streamer) is no end of an answer.
        """
        try:
            return row.algorithm.send(answer)
        except StopIteration as end:
            return end.value

    def _append(self, row: Row, token: int, nudged: bool) -> None:
        row.append(token, nudged)
        if hasattr(self.streamer, "put_marked"):
            self.streamer.put_marked(torch.tensor([token]), nudged)
        elif self.streamer is not None:
            self.streamer.put(torch.tensor([token]))

    def _finish(self, row: Row, reason: str) -> None:
        row.finish_reason = reason
        row.algorithm.close()
        self.nudging.release(row.number)
        if not self._lacks_verdict(row):
            self.base.release(row.number)

    # The nudging model's side.

    def _lookahead(self, row: Row) -> Lookahead | None:
        """The lookahead at this point, if the nudging model has written enough for it."""
        if self._is_over(row):
            return Lookahead((), ended=True)
        written = row.continuation()
        # What the answer cannot take is not written, beyond a few; neither is what the nudging model cannot read.
        length = int(min(self.config.num_nudging_tokens, max(_LEAST_BOUND, self.limits.room(row))))
        most = row.nudging_room - (len(row.written) - len(written))
        longest = min(length + _CHARACTER_BYTES - 1, most)  # A single word that ends inside a character is drawn on.
        length = int(min(length, most))
        while length <= len(written):
            if length < longest and row.answer.is_one_unfinished_word(written[:length]):
                length += 1
            else:
                return self._takeable(row, row.answer.words(written[:length]), ended=False)
        if row.written_end is End.EOS:
            return self._takeable(row, row.answer.words(written), ended=True)
        if row.written_end is End.BLOCKED:
            return Lookahead(row.answer.words(written), ended=False)
        place = len(row.written)
        if row.written_end is End.LOGITS:
            raise ValueError(_no_numbers("nudging model", place, row))
        if row.written_end is End.SCORES:
            raise ValueError(_no_choice("nudging model", row.written_best, place, row))
        return None

    def _is_over(self, row: Row) -> bool:
        """Whether the caller's processors allow nothing but the end here, of which the nudging model need not know.

        With one vocabulary it does: they bind what it draws.
        """
        if self._one_vocabulary or row.constraint is None:
            return False
        return row.constraint.allows_only_end(row.answer.ids)

    def _takeable(self, row: Row, words: tuple[Word, ...], ended: bool) -> Lookahead:
        """The lookahead of these words as far as the base may write and read them; with one vocabulary it may.

        A word that it may not take becomes the piece that is set aside; where it is the first, there are none.
        """
        if self._one_vocabulary or (row.constraint is None and self.voices.base_rows == math.inf):
            return Lookahead(words, ended)
        ids = list(row.answer.ids)
        for i, word in enumerate(words):
            if 0 < i == len(words) - 1 and not ended:
                break  # Set aside in any case.
            allowed = self._allowed(row, ids, word.ids)
            if allowed and word.ids[allowed - 1] in self.limits.stop_tokens:
                break  # The answer ends within this word.
            if allowed < len(word.ids):
                return Lookahead(words[: i + 1] if i else (), ended=False)
            ids += word.ids
        else:
            if ended and row.constraint is not None and not row.constraint.allows_end(ids):
                ended = False
        return Lookahead(words, ended)

    def _allowed(self, row: Row, ids: list[int], more: Sequence[int]) -> int:
        """How many of the ids `more` the base may write and read after `ids`; if constrained, up to a stop token."""
        readable = next((n for n, token in enumerate(more) if token >= self.voices.base_rows), len(more))
        return readable if row.constraint is None else row.constraint.allowed_prefix(ids, more[:readable])

    def _must_write(self, row: Row) -> bool:
        """Whether the nudging model must write before the row's question can be answered."""
        if row.question is Question.LOOKAHEAD:
            return True  # One that is known has been answered already.
        return self.gate.against_nudging_model and row.nudging_top1() is None

    def _may_draft(self, row: Row) -> bool:
        return row.written_end is None and len(row.written) < row.nudging_room and not self._eos_is_early(row)

    def _lacks_text(self, row: Row, length: int) -> bool:
        """Whether it must write before the question can be answered, or answered early by a draft of that length."""
        if self._must_write(row):
            return True
        return self._may_draft(row) and len(row.continuation()) < self._within_limits(row, length)

    def _eos_is_early(self, row: Row) -> bool:
        """Whether what the nudging model writes here depends on more than the text.

        Before `min_new_tokens` its EOS is suppressed by a count of base tokens, and with two vocabularies a text does
        not tell how many it comes to. Then nothing is drafted, and each lookahead is written afresh.
        """
        return isinstance(row.answer, TwoVocabularies) and len(row.answer.ids) < self.voices.min_new_tokens

    def _write(self, rows: list[Row]) -> None:
        """Lets the nudging model write a token in each of these rows, and before it what was guessed right."""
        began = time.perf_counter()
        most = self._most_guesses()
        guesses, readings, may_end = [], {}, []
        for row in rows:
            row.continuation()  # What stands written is now along the answer's own text.
            text = [*row.answer.nudging_prompt, *row.written]
            # Where a count forbids it to end the answer, it counts token by token.
            may_end.append(not self._may_not_end(row))
            guesses.append(self._guess(row, text, most) if may_end[-1] else [])
            if len(text) > self.voices.nudging_positions:
                logger.warning_once(
                    "The nudging model reads more tokens than it was trained on, by its `max_position_embeddings` of "
                    f"{int(self.voices.nudging_positions)}: its words may be worse from there on."
                )
            settled = len(text) - len(row.continuation())
            readings[row.number] = Reading(text + guesses[-1], len(guesses[-1]) + 1, settled)
        logits = self.nudging.read(readings)
        raw = joined([logits[row.number] for row in rows]).float()
        scores = processed_scores(
            raw,
            [
                Positions(
                    row.nudging_processors if ends else LogitsProcessorList([*row.nudging_processors, self._no_eos]),
                    row.nudging_prompt,
                    chain(row.written, guessed),
                    len(guessed) + 1,
                )
                for row, guessed, ends in zip(rows, guesses, may_end, strict=True)
            ],
        )
        keys = None
        if self.voices.nudging_samples:
            keys = [
                key
                for row, guessed in zip(rows, guesses, strict=True)
                for key in accumulate(guessed, mix, initial=row.nudging_key())
            ]
        scores = scores + self._never_drawn(scores)
        if self._one_vocabulary and rows[0].constraint is not None:
            scores += self._forbidden_to_nudging_model(rows, guesses, scores)
        tokens = choose(scores, keys)
        best = best_scores(scores, tokens, is_greedy=keys is None)
        said = zip(*_transferred(tokens, top1_probabilities(raw), best), strict=True)
        written = 0
        for row, guessed in zip(rows, guesses, strict=True):
            own_said = list(islice(said, len(guessed) + 1))
            hits = self._take_down(row, guessed, own_said)
            self._policy.guesses.observe(hits, len(guessed))
            written += hits + 1
            least_sure = min(top1 for _, top1, _ in own_said[: hits + 1])
            if row.written_end is not None or self._policy.acceptance.is_below_hope(least_sure):
                self._plan = None
        if (fed := _usual_size(self.nudging)) is not None:
            self._policy.observe_step(fed, time.perf_counter() - began, written / len(rows), not self._steps_are_free)

    def _guess(self, row: Row, text: list[int], most: int) -> list[int]:
        """What the row's nudging model may write next: what it has room for, and what is not forbidden."""
        most = int(min(most, row.nudging_room - len(row.written) - 1))
        guessed = guess(text, row.left, len(row.written) - row.left_at, most)
        if guessed and row.constraint is not None and self._one_vocabulary:
            ends = next((n for n, token in enumerate(guessed) if token in self.voices.nudging_eos), len(guessed))
            return guessed[: row.constraint.allowed_prefix(self._base_ids(row), guessed[:ends])]
        return guessed

    @staticmethod
    def _base_ids(row: Row) -> list[int]:
        """With one vocabulary: the base's ids of the answer and of what the nudging model has written after it."""
        return [*row.answer.ids, *row.continuation()]

    def _never_drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """What is added to scores so that no control token is drawn, of shape (vocab_size,).

        With one vocabulary, neither is a token that the base has no row for; EOS is none of its words.
        """
        if self._control_mask is None:
            mask = scores.new_zeros(scores.shape[-1])
            if self._one_vocabulary and self.voices.base_rows < len(mask):
                mask[int(self.voices.base_rows) :] = float("-inf")
                mask[[*self.voices.nudging_eos]] = 0.0
            self._control_mask = mask.index_fill(0, self.voices.nudging_control, float("-inf"))
        return self._control_mask

    def _forbidden_to_nudging_model(
        self, rows: list[Row], guesses: list[list[int]], scores: torch.Tensor
    ) -> torch.Tensor:
        """What is added to scores so that nothing is drawn that the caller's processors forbid, of their shape.

        With one vocabulary. EOS is allowed where the base's is, or where the caller has it for a stop token.
        """
        masks = []
        for row, guessed in zip(rows, guesses, strict=True):
            assert row.constraint is not None
            ids = self._base_ids(row)
            for n in range(len(guessed) + 1):
                here = [*ids, *guessed[:n]]
                forbidden = row.constraint.forbidden(here).to(scores.device)
                mask = scores.new_zeros(scores.shape[-1])
                common = min(len(mask), len(forbidden))
                mask[:common].masked_fill_(forbidden[:common], float("-inf"))
                may_end = row.constraint.allows_end(here)
                for eos in self.voices.nudging_eos:
                    is_stop = eos in self.limits.stop_tokens and eos < common
                    mask[eos] = 0.0 if may_end or (is_stop and not forbidden[eos]) else float("-inf")
                masks.append(mask)
        return torch.stack(masks)

    def _take_down(self, row: Row, guessed: list[int], said: list[tuple[float, float, float]]) -> int:
        """What a row's pass of the nudging model has written: as many of the guessed tokens as it returns, and one."""
        for hits, (token, top1, best) in enumerate(said):
            row.written_top1[len(row.written)] = top1
            if not math.isfinite(top1):
                row.written_end = End.LOGITS
            elif not math.isfinite(best):
                is_blocked = best == -math.inf and self._one_vocabulary and row.constraint is not None
                row.written_end, row.written_best = End.BLOCKED if is_blocked else End.SCORES, best
            elif token in self.voices.nudging_eos:
                row.written_end, row.written_eos = End.EOS, int(token)
            else:
                row.write(int(token))
                if row.constraint is not None and self._one_vocabulary and token in self.limits.stop_tokens:
                    row.written_end = End.BLOCKED  # Nobody is asked what may stand after a stop token.
            if hits == len(guessed) or row.written_end is not None or token != guessed[hits]:
                break
        return hits

    def _most_guesses(self) -> int:
        """How many tokens the nudging model's next pass is to guess; none where nothing is to be drafted."""
        if not self.config.num_draft_tokens:
            return 0
        return self._alike([self._policy.guesses.choose(len(self._open()))])[0]

    def _may_not_end(self, row: Row) -> bool:
        fewest = self.voices.min_new_tokens
        return len(row.answer.ids) < fewest and row.answer.count(row.continuation()) < fewest

    def _short_rows(self) -> list[Row]:
        """The rows in which the nudging model is to write before the base reads, by the plan or by a new one.

        A plan stands while all that is written since is as sure as was hoped, for choosing takes time too.
        """
        rows = self._open()
        pressed = [self._must_write(row) for row in rows]
        if all(pressed):
            self._steps_are_free = True
            return rows  # There is nothing to choose.
        if self._plan is not None and self._steps_are_free == any(pressed):
            if short := [row for row in rows if self._lacks_text(row, self._plan.write)]:
                return short
        self._steps_are_free = any(pressed)
        self._plan = self._new_plan(rows)
        return [row for row in rows if self._lacks_text(row, self._plan.write)]

    # The base's side.

    def _lacks_verdict(self, row: Row) -> bool:
        """Whether the base must read: for a verdict, or for what is to be recorded of an answer that has ended."""
        if row.finish_reason is None:
            return row.question is Question.VERDICT and len(row.seen) <= len(row.answer.ids)
        return self.record and len(row.seen) < len(row.answer.ids)

    def _within_limits(self, row: Row, length: int) -> int:
        """How many of so many drafted tokens the base may read behind the answer."""
        return max(0, int(min(length, self.limits.room(row) - 1)))

    def _new_plan(self, rows: list[Row]) -> Plan:
        """How far these rows, all that are open, draft before the next pass of the base."""
        if self.config.num_draft_tokens != ADAPTIVE:
            return Plan(int(self.config.num_draft_tokens), int(self.config.num_draft_tokens))
        drafts = [Written(row.sure(), self._may_draft(row)) for row in rows]
        unread = None
        if self.base.keeps_state:
            texts = [[*row.answer.prompt, *row.answer.ids] for row in rows]
            behind = [self.base.unread(row.number, text) - 1 for row, text in zip(rows, texts, strict=True)]
            unread = max(0, *behind)
        return Plan(*self._alike(self._policy.choose(drafts, self._steps_are_free, unread)))

    def _alike(self, numbers: Sequence[int]) -> list[int]:
        """What was chosen by the clock, alike in all processes of tensor parallelism: they must pass alike."""
        return shared_by_ranks(self.base.model, list(numbers))

    def _verify(self, rows: list[Row]) -> None:
        """Lets the base read each row's answer and draft, and say its verdict at every position it has not read."""
        length, self._plan = self._plan.read if self._plan else 0, None
        tokens_before, self._tokens = self._tokens, sum(len(row.answer.ids) for row in self.rows)
        if not (reads_prompts := not all(row.seen for row in rows)):
            self._policy.observe_accepted(self._tokens - tokens_before)
        readings = {}
        for row in rows:
            if row.finish_reason is None:
                if self.config.num_draft_tokens:
                    self._policy.acceptance.observe(row.draft_sure, row.draft_hits)
                row.draft_hits = 0
                draft = row.answer.draft(row.continuation()[:length], self._within_limits(row, length))
                if not self._one_vocabulary:
                    draft = draft[: self._allowed(row, row.answer.ids, draft)]
                row.read = [*row.answer.ids, *draft]
                row.draft_sure = row.answer.sure_of(draft, row.continuation(), row.sure())
            else:
                row.read = row.answer.ids[:-1]
            readings[row.number] = Reading(
                [*row.answer.prompt, *row.read],
                len(row.read) + 1 - len(row.seen),
                settled=len(row.answer.prompt) + len(row.answer.ids),
            )
        began = time.perf_counter()
        logits = self.base.read(readings)
        # Processors are where the caller's ids are, which need not be where the base is.
        raw = joined([logits[row.number] for row in rows]).to(rows[0].prompt.device, torch.float32)
        scores = processed_scores(
            raw, [Positions(row.base_processors, row.prompt, row.read, readings[row.number].keep) for row in rows]
        )
        keys = None
        if self.voices.base_samples:
            keys = [
                mix(mix(row.seed, _BASE_STREAM), place)
                for row in rows
                for place in range(len(row.seen), len(row.read) + 1)
            ]
        tokens, probabilities = choose(scores, keys), raw.softmax(dim=-1)
        best = best_scores(scores, tokens, is_greedy=keys is None)
        said = _transferred(tokens, self.gate.score(probabilities, tokens), probabilities.amax(dim=-1), best)
        if (fed := _usual_size(self.base)) is not None:
            self._policy.observe_pass(fed, time.perf_counter() - began, reads_prompts)
        recorded = zip(*said, raw, scores, strict=True)
        for row in rows:
            for _ in range(len(row.seen), len(row.read) + 1):
                token, score, top1, best_score, raw_logits, row_scores = next(recorded)
                if not self.record_logits:
                    raw_logits = row_scores = None
                row.seen.append(_Seen(int(token), score, top1, raw_logits, row_scores, best_score))
            if row.finish_reason is not None:
                for place, seen in enumerate(row.seen[: len(row.answer.ids)]):
                    if not math.isfinite(seen.top1):
                        raise ValueError(_no_numbers("base", place, row))
                self.base.release(row.number)


def _no_numbers(whose: str, place: int, row: Row) -> str:
    """What is said where a model's logits are NaN or infinite."""
    return (
        f"The {whose}'s logits are NaN or infinite at {_where(whose, place, row)}: load the {whose} in another dtype "
        "(float16 overflows where bfloat16 and float32 do not), and look at its weights. `remove_invalid_values` does "
        "not mend it: how sure a model is cannot be told of such logits."
    )


def _no_choice(whose: str, best: float, place: int, row: Row) -> str:
    """What is said where processors leave no token to choose."""
    what = "forbid every token (all scores are −∞)" if best == -math.inf else "make a score NaN or +∞"
    which = "`logits_processor` and the generation config" if whose == "base" else "`nudging_model.generation_config`"
    return f"The {whose}'s logits processors {what} at {_where(whose, place, row)}: look at those of {which}."


def _where(whose: str, place: int, row: Row) -> str:
    own = " (in its own vocabulary)" if whose != "base" and isinstance(row.answer, TwoVocabularies) else ""
    return f"token {place + 1} of the answer{own} in row {row.number}"


def _transferred(*of_positions: torch.Tensor) -> list[list[float]]:
    """The numbers of tensors of one shape, in one transfer from the device that they are on.

    As float32, which holds whole numbers up to 2**24, more than any vocabulary has.
    """
    if of_positions[0].device.type == "cpu":  # Where nothing is to be waited for.
        return [each.tolist() for each in of_positions]
    return torch.stack([each.float() for each in of_positions]).tolist()


def _usual_size(lm: CachedLM | SeparateRows) -> int | None:
    """The tokens of its last pass, padding included, if others like it will follow: a prompt is read once, and
    compiled once."""
    if lm.last_shape is None or lm.last_shape[1] > _USUAL_WIDTH:
        return None
    return lm.last_shape[0] * lm.last_shape[1]
