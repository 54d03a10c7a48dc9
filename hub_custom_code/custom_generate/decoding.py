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

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
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

from .bridge import OneVocabulary, TwoVocabularies, to_text
from .cached_lm import CachedLM, Reading, SeparateRows, common_prefix
from .choosing import Positions, choose, joined, mix, processed_scores
from .config import ADAPTIVE, NudgingConfig
from .drafting import MOST, DraftLength, Plan, Written, borrowed_draft_length
from .gate import GATES, top1_probabilities
from .host import shared_by_ranks
from .lookup import guess
from .rounds import Accept, Lookahead, Question, Reply, Step, Verdict
from .threshold import FixedThreshold, OnlineThreshold

_USUAL_WIDTH = MOST + 16  # Tokens that a row is fed in a pass which reads no prompt, at the most.
_CHARACTER_BYTES = 4  # Of UTF-8, at the most.
_BASE_STREAM, _NUDGING_STREAM = 0, 1  # Each model draws by keys of its own.


class Limits:
    """The criteria that end an answer wherever it stands, in the middle of a word too.

    Args:
        criteria: as `generate` prepared them.
        base_eos: the base's EOS ids, which end no answer: it never writes one, and what the nudging model writes as a
            word is one.
    """

    def __init__(self, criteria: StoppingCriteriaList, base_eos: Sequence[int]):
        self._last_tokens: set[int] = set()
        self._times: list[MaxTimeCriteria] = []
        self._others: list[Any] = []
        self.max_length: float = float("inf")
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                self.max_length = min(self.max_length, criterion.max_length)
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
        if row.answer.ids[-1] in self._last_tokens:
            return "stopping_criteria"
        for criterion in self._others:
            if criterion(row.ids(), None).all():
                return "stop_string" if isinstance(criterion, StopStringCriteria) else "stopping_criteria"
        if row.length >= self.max_length:
            return "length"
        return "time" if self.time_is_up() else None


class _Seen(NamedTuple):
    """What the base says at one position."""

    token: int
    score: float
    top1: float
    logits: torch.Tensor | None
    scores: torch.Tensor | None


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
    question: Question | None = None
    nudged: list[bool] = field(default_factory=list)
    finish_reason: str | None = None
    end_marks: int = 0  # Of the answer's tokens: 1 where the base's EOS was put behind it.
    # What the base said at each position of the answer, and of the draft that it has read behind it.
    seen: list[_Seen] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    draft_sure: Sequence[float] = ()  # How sure the nudging model was of each token of that draft.
    draft_hits: int = 0
    # What the nudging model has written: its ids for a text that the answer had, a continuation, and whether EOS.
    written: list[int] = field(default_factory=list)
    written_eos: bool = False
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

    def continuation(self) -> list[int]:
        """What the nudging model has already written after the answer as it stands.

        It was drawn along the ids of another text, and is good for this one if this one's ids begin them.
        """
        context = self.answer.nudging_ids()
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
        self.written, self.written_eos, self.written_key = [], False, None
        self.written_top1.clear()

    def write(self, token: int, is_eos: bool) -> None:
        """Takes down what the nudging model writes next."""
        if is_eos:
            self.written_eos = True
            return
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
    """

    base_eos: Sequence[int]
    nudging_eos: Sequence[int]
    nudging_control: torch.Tensor
    base_samples: bool
    nudging_samples: bool
    min_new_tokens: int


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
        # On the device, so that no step waits for it to get there.
        self._no_eos = SuppressTokensLogitsProcessor(voices.nudging_eos, device=nudging.device)
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
        token, score, *_ = row.seen[place]
        if self.gate.against_nudging_model:
            top1 = row.nudging_top1()
            if top1 is None:
                return None
            score -= top1
            if self._eos_is_early(row):
                row.forget_written()
        text = to_text(row.answer.vocabulary.bytes_of(token))
        is_confident = row.threshold.is_confident(score)
        return Verdict(token, text, is_confident, token in self.voices.base_eos, row.answer.inside_character)

    def _resume(self, row: Row, answer: Lookahead | Verdict | None) -> None:
        """Answers a question, and takes what is accepted, up to the next question or the end."""
        try:
            step = row.algorithm.send(answer)
            while isinstance(step, Accept):
                for token in step.ids:
                    self._append(row, token, step.nudged)
                    if reason := self.limits.reached(row):
                        return self._finish(row, reason)
                step = next(row.algorithm)
            row.question = step
            if step is Question.LOOKAHEAD and self._eos_is_early(row):
                row.forget_written()
        except StopIteration as end:
            if end.value == "eos" and self.voices.base_eos:
                self._append(row, self.voices.base_eos[0], nudged=False)  # The end mark, nobody's word.
                row.end_marks = 1
            self._finish(row, end.value)

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
        written = row.continuation()
        length = self.config.num_nudging_tokens
        longest = length + _CHARACTER_BYTES - 1  # A single word that ends inside a character is drawn on.
        while length <= len(written):
            if length < longest and row.answer.is_one_unfinished_word(written[:length]):
                length += 1
            else:
                return Lookahead(row.answer.words(written[:length]), ended=False)
        return Lookahead(row.answer.words(written), ended=True) if row.written_eos else None

    def _must_write(self, row: Row) -> bool:
        """Whether the nudging model must write before the row's question can be answered."""
        if row.question is Question.LOOKAHEAD:
            return True  # One that is known has been answered already.
        return self.gate.against_nudging_model and row.nudging_top1() is None

    def _may_draft(self, row: Row) -> bool:
        return not row.written_eos and not self._eos_is_early(row)

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
            guesses.append(guess(text, row.left, len(row.written) - row.left_at, most) if may_end[-1] else [])
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
        tokens = choose(scores + self._never_drawn(scores), keys)
        said = zip(*_transferred(tokens, top1_probabilities(raw)), strict=True)
        written = 0
        for row, guessed in zip(rows, guesses, strict=True):
            own_said = list(islice(said, len(guessed) + 1))
            hits = self._take_down(row, guessed, own_said)
            self._policy.guesses.observe(hits, len(guessed))
            written += hits + 1
            least_sure = min(top1 for _, top1 in own_said[: hits + 1])
            if row.written_eos or self._policy.acceptance.is_below_hope(least_sure):
                self._plan = None
        if (fed := _usual_size(self.nudging)) is not None:
            self._policy.observe_step(fed, time.perf_counter() - began, written / len(rows), not self._steps_are_free)

    def _never_drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """What is added to scores so that no control token is drawn, of shape (vocab_size,)."""
        if self._control_mask is None:
            zeros = scores.new_zeros(scores.shape[-1])
            self._control_mask = zeros.index_fill(0, self.voices.nudging_control, float("-inf"))
        return self._control_mask

    def _take_down(self, row: Row, guessed: list[int], said: list[tuple[float, float]]) -> int:
        """What a row's pass of the nudging model has written: as many of the guessed tokens as it returns, and one."""
        for hits, (token, top1) in enumerate(said):
            row.written_top1[len(row.written)] = top1
            row.write(int(token), token in self.voices.nudging_eos)
            if hits == len(guessed) or row.written_eos or token != guessed[hits]:
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
        return max(0, int(min(length, self.limits.max_length - row.length - 1)))

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
        said = _transferred(tokens, self.gate.score(probabilities, tokens), probabilities.amax(dim=-1))
        if (fed := _usual_size(self.base)) is not None:
            self._policy.observe_pass(fed, time.perf_counter() - began, reads_prompts)
        recorded = zip(*said, raw, scores, strict=True)
        for row in rows:
            for _ in range(len(row.seen), len(row.read) + 1):
                token, score, top1, raw_logits, row_scores = next(recorded)
                kept = (raw_logits, row_scores) if self.record_logits else (None, None)
                row.seen.append(_Seen(int(token), score, top1, *kept))
            if row.finish_reason is not None:
                self.base.release(row.number)


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
