"""The in-process executor: it answers the questions of all rows with as few forward passes as it can.

It knows questions, drafts and limits, never the rules of the algorithm. The algorithm in `rounds` asks what the
nudging model would write next and what the base's verdict is. The executor gathers the questions of all rows, answers
those of one kind in one forward pass, and answers early: the base reads the answer *and* what the nudging model has
written after it, and the predictions at all these positions are kept. If the answer continues along the nudging
model's text, its next verdicts are known already. If it does not, the rest is dropped and both caches roll back. The
nudging model in turn reads its own text *and* a guess of what it will write, keeps what was guessed right, and writes
one more token. So drafts save forward passes and cannot change an answer.

Each step plans, runs one forward pass of one model, and takes in what the pass has said.

Sampling: a token is a function of its row's seed, its place and the distribution there, so a verdict is the same
whether it is asked for early or late. A draft token is accepted if it is the token that is drawn, that is, with the
base's probability p of it. This is the rule of speculative sampling (Leviathan et al., arXiv 2211.17192), which
accepts with probability min(1, p / q) and otherwise draws from the residual, for a draft that is already fixed, so
that q = 1.
"""

from __future__ import annotations

import math
import time
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor
from transformers.utils import logging

from .answer import TwoVocabularies
from .cached_lm import CachedLM, Reading, SeparateRows
from .config import NudgingConfig
from .draft_policy import MAX_DRAFT_TOKENS, DraftProgress, borrowed_draft_length
from .drafting import Drafter
from .gate import GATES, top1_probabilities
from .limits import Limits
from .prompt_lookup import guess
from .rounds import Accept, Lookahead, Question, Reply, Step, Verdict
from .row import Prediction, Row, WritingEnd
from .sampling import Positions, best_scores, choose, fold_in, joined, processed_scores
from .token_rules import TokenRules
from .transformers_private import shared_by_ranks
from .vocabulary import to_text

_MAX_USUAL_WIDTH = MAX_DRAFT_TOKENS + 16  # Tokens per row of a pass that reads no prompt, at most.
_MAX_CHARACTER_BYTES = 4  # In UTF-8.
_MIN_LOOKAHEAD_BOUND = 32  # A lookahead may have this many tokens however few the answer can still take.
_BASE_STREAM = 0  # The base's draws use keys of their own.

logger = logging.get_logger(__name__)


class _Write(NamedTuple):
    """The nudging model writes a token in each of these rows.

    Args:
        is_forced: whether some row must write, so that the others draft for free.
    """

    rows: list[Row]
    is_forced: bool


class _Read(NamedTuple):
    """The base reads these rows, and drafts of up to so many tokens."""

    rows: list[Row]
    draft_length: int


class NudgedDecoder:
    """Writes the nudged answers of a batch.

    Args:
        base, nudging: both models, with as many rows as there are answers.
        rows: the answers to write. Each ends with a `finish_reason`.
        config: every parameter of nudging.
        rules: which tokens each model may write.
        limits: what ends an answer early.
        streamer: receives each token when it is accepted, and its author if it has a `put_marked`; for a single row.
        record: whether the base says its top-1 probability at every token, also where the algorithm did not ask for
            it, at the cost of one more pass at the end.
        record_logits: whether logits and processed scores are kept too.
    """

    def __init__(
        self,
        base: CachedLM | SeparateRows,
        nudging: CachedLM | SeparateRows,
        rows: list[Row],
        config: NudgingConfig,
        rules: TokenRules,
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
        self.rules = rules
        self.limits = limits
        self.streamer = streamer
        self.record = record
        self.record_logits = record_logits
        # With one vocabulary the nudging model may write a stop token of the caller's, and that can be too early too.
        too_early = {*rules.nudging_eos, *(rules.stop_tokens if rules.one_vocabulary else ())}
        self._no_eos = SuppressTokensLogitsProcessor(sorted(too_early), device=nudging.device)

    def run(self) -> None:
        """Writes all answers to their end."""
        setting = (len(self.rows), self.base.cache_kind)
        with borrowed_draft_length(self.base.model, self.nudging.model, setting) as policy:
            drafter = Drafter(self.config.num_draft_tokens, policy, self._synced_across_ranks)
            for row in self.rows:
                self._resume(row, None)
            self._take_in()
            while (work := self._plan(drafter)) is not None:
                if isinstance(work, _Write):
                    self._write(work, drafter)
                else:
                    self._read(work, drafter)
                self._take_in()

    # Plan: which model makes the next pass, and for which rows.

    def _plan(self, drafter: Drafter) -> _Write | _Read | None:
        rows = self._open_rows()
        forced = [row for row in rows if self._must_write(row)]
        if rows and len(forced) == len(rows):
            return _Write(rows, is_forced=True)
        if rows and not forced and drafter.awaits_verification:
            drafts = [(row.predictions.draft_top1_probs, row.predictions.accepted) for row in rows]
            drafter.verified(drafts, self._answer_tokens())
        draft_length = 0
        if rows:
            progress = [self._progress(row) for row in rows]
            plan = drafter.plan(progress, steps_are_free=bool(forced), reread=lambda: self._reread(rows))
            draft_length = plan.read
            unfinished = [
                row
                for row, each in zip(rows, progress, strict=True)
                if row in forced or each.is_shorter_than(plan.write)
            ]
            if unfinished:
                return _Write(unfinished, is_forced=bool(forced))
        due = [row for row in self.rows if self._needs_base(row)]
        return _Read(due, draft_length) if due else None

    def _open_rows(self) -> list[Row]:
        return [row for row in self.rows if row.is_open]

    def _answer_tokens(self) -> int:
        return sum(len(row.answer.ids) for row in self.rows)

    def _must_write(self, row: Row) -> bool:
        """Whether the row's question cannot be answered before the nudging model has written."""
        if row.question is Question.LOOKAHEAD:
            return True  # A lookahead that is known has been answered already.
        return self.gate.against_nudging_model and row.ahead.first_top1 is None

    def _progress(self, row: Row) -> DraftProgress:
        written = row.ahead.top1_probs
        may_write_on = (
            row.ahead.end is None
            and len(row.ahead.all_ids) < row.nudging.room
            and not self._lookahead_depends_on_count(row)
        )
        return DraftProgress(written, self._max_draft(row) if may_write_on else len(written))

    def _max_draft(self, row: Row) -> float:
        """How many draft tokens the base can read after the answer, within its limits."""
        return max(0.0, self.limits.room(row) - 1)

    def _reread(self, rows: list[Row]) -> int | None:
        if not self.base.has_recurrent_state:
            return None
        unread = [self.base.num_unread(row.number, [*row.answer.prompt, *row.answer.ids]) for row in rows]
        return max(0, max(unread) - 1)

    def _needs_base(self, row: Row) -> bool:
        """Whether the base must read: for a verdict, or to record predictions of an answer that has ended."""
        known = len(row.predictions)
        if row.is_open:
            return row.question is Question.VERDICT and known <= len(row.answer.ids)
        return self.record and known < len(row.answer.ids)

    def _synced_across_ranks(self, numbers: list[int]) -> list[int]:
        return shared_by_ranks(self.base.model, numbers)

    # Take in: each row's questions are answered as far as what is known carries.

    def _take_in(self) -> None:
        if self.limits.time_is_up():
            for row in self._open_rows():
                self._finish(row, "time")
        for row in self._open_rows():
            self._advance(row)

    def _advance(self, row: Row) -> None:
        while row.is_open:
            if row.question is Question.LOOKAHEAD:
                row.realign()
                answer: Lookahead | Verdict | None = self._lookahead(row)
            else:
                if self.gate.against_nudging_model:
                    row.realign()
                answer = self._decide_verdict(row)
            if answer is None:
                return row.realign()
            self._resume(row, answer)

    def _resume(self, row: Row, answer: Lookahead | Verdict | None) -> None:
        """Answers the row's question and accepts what follows, up to the next question or the end."""
        step = _next_step(row, answer)
        while isinstance(step, Accept):
            for token in step.ids:
                self._append(row, token, step.nudged)
                if reason := self.limits.finish_reason(row):
                    return self._finish(row, reason)
            step = _next_step(row, None)
        if isinstance(step, Question):
            row.question = step
            if step is Question.LOOKAHEAD and self._lookahead_depends_on_count(row):
                row.ahead.forget()
            return
        if step == "eos" and self.rules.one_vocabulary and row.ahead.eos in self.rules.stop_tokens:
            assert row.ahead.eos is not None
            self._append(row, row.ahead.eos, nudged=True)  # The nudging model wrote the caller's stop token.
            step = "stop_token"
        elif step == "eos" and self.rules.base_eos:
            self._append(row, self.rules.base_eos[0], nudged=False)  # The end mark is nobody's word.
            row.end_marks = 1
        self._finish(row, step)

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
        if not self._needs_base(row):
            self.base.release(row.number)

    def _lookahead(self, row: Row) -> Lookahead | None:
        """The lookahead at this point, if the nudging model has written enough for it."""
        answer, ahead = row.answer, row.ahead
        if self.rules.allows_only_end(row.constraint, answer.ids):
            return Lookahead((), ended=True)
        # The nudging model writes no more than the answer can take, beyond a few tokens, nor more than it can read.
        length = int(min(self.config.num_nudging_tokens, max(_MIN_LOOKAHEAD_BOUND, self.limits.room(row))))
        most = row.nudging.room - ahead.context
        # A single word that ends inside a character is written on.
        longest = min(length + _MAX_CHARACTER_BYTES - 1, most)
        length = int(min(length, most))
        written = ahead.ids
        while length <= len(written):
            if length < longest and answer.is_one_unfinished_word(written[:length]):
                length += 1
            else:
                words = answer.words(written[:length])
                return self.rules.restricted(row.constraint, answer.ids, words, ended=False)
        if ahead.end is WritingEnd.EOS:
            return self.rules.restricted(row.constraint, answer.ids, answer.words(written), ended=True)
        if ahead.end is WritingEnd.BLOCKED:
            return Lookahead(answer.words(written), ended=False)
        if ahead.end is WritingEnd.LOGITS:
            raise ValueError(_bad_logits("nudging model", len(ahead.all_ids), row))
        if ahead.end is WritingEnd.SCORES:
            raise ValueError(_no_choice("nudging model", ahead.best_score, len(ahead.all_ids), row))
        return None

    def _decide_verdict(self, row: Row) -> Verdict | None:
        """Decides on the base's next token, if the base has read so far, and for some gates the nudging model."""
        place = len(row.answer.ids)
        if place >= len(row.predictions):
            return None
        prediction, top1 = row.predictions[place], None
        if not math.isfinite(prediction.top1):
            raise ValueError(_bad_logits("base", place, row))
        if not math.isfinite(prediction.best):
            raise ValueError(_no_choice("base", prediction.best, place, row))
        if self.gate.against_nudging_model:
            top1 = row.ahead.first_top1
            if top1 is None:
                return None
            if not math.isfinite(top1):
                raise ValueError(_bad_logits("nudging model", place, row))
            if self._lookahead_depends_on_count(row):
                row.ahead.forget()
        return Verdict(
            token=prediction.token,
            text=to_text(row.answer.vocabulary.bytes_of(prediction.token)),
            is_confident=row.confidence.decide(prediction.score, top1),
            is_eos=prediction.token in self.rules.base_eos,
            inside_character=row.answer.inside_character,
        )

    def _lookahead_depends_on_count(self, row: Row) -> bool:
        """Whether what the nudging model writes here depends on more than the text.

        Before `min_new_tokens` tokens of the base its EOS is suppressed, and with two vocabularies a text does not
        tell how many these are. Then nothing is drafted, and each lookahead is written anew.
        """
        return isinstance(row.answer, TwoVocabularies) and len(row.answer.ids) < self.rules.min_new_tokens

    # Run: a pass of the nudging model.

    def _write(self, work: _Write, drafter: Drafter) -> None:
        """Lets the nudging model write a token in each row, and before it whatever was guessed right."""
        began = time.perf_counter()
        rows = work.rows
        # While a token count forbids it to end the answer, it writes one token at a time.
        may_end = [not self._may_not_end(row) for row in rows]
        guess_length = drafter.guess_length(len(self._open_rows()))
        guesses, readings = [], {}
        for row, ends in zip(rows, may_end, strict=True):
            text = [*row.answer.nudging_prompt, *row.ahead.all_ids]
            guesses.append(self._guess(row, text, guess_length) if ends else [])
            readings[row.number] = self._nudging_reading(row, text, guesses[-1])
        logits = self.nudging.read(readings)
        raw = joined([logits[row.number] for row in rows]).float()
        scores = self._nudging_scores(rows, guesses, may_end, raw)
        keys = None
        if self.rules.nudging_samples:
            keys = [
                key
                for row, guessed in zip(rows, guesses, strict=True)
                for key in accumulate(guessed, fold_in, initial=row.ahead.key())
            ]
        tokens = choose(scores, keys)
        best = best_scores(scores, tokens, is_greedy=keys is None)
        said = zip(*_numbers(tokens, top1_probabilities(raw), best), strict=True)
        outcomes, least_top1 = [], []
        for row, guessed in zip(rows, guesses, strict=True):
            own_said = list(islice(said, len(guessed) + 1))
            accepted = self._accept_guesses(row, guessed, own_said)
            outcomes.append((accepted, len(guessed)))
            least_top1.append(min(top1 for _, top1, _ in own_said[: accepted + 1]))
        drafter.wrote(outcomes, least_top1, has_ended=any(row.ahead.end is not None for row in rows))
        if (fed := _usual_size(self.nudging)) is not None:
            written = sum(accepted + 1 for accepted, _ in outcomes) / len(rows)
            drafter.time_step(fed, time.perf_counter() - began, written, work.is_forced)

    def _nudging_reading(self, row: Row, text: list[int], guessed: list[int]) -> Reading:
        if len(text) > self.rules.nudging_positions:
            logger.warning_once(
                "The nudging model reads more tokens than it was trained on, by its `max_position_embeddings` of "
                f"{int(self.rules.nudging_positions)}: its words may be worse from there on."
            )
        return Reading(text + guessed, len(guessed) + 1, settled=len(row.answer.nudging_prompt) + row.ahead.context)

    def _guess(self, row: Row, text: list[int], most: int) -> list[int]:
        """A guess of what the nudging model writes next, within its room and the caller's constraints."""
        ahead = row.ahead
        most = int(min(most, row.nudging.room - len(ahead.all_ids) - 1))
        guessed = guess(text, ahead.abandoned, ahead.tokens_since, most)
        if guessed and row.constraint is not None and self.rules.one_vocabulary:
            ends = next((n for n, token in enumerate(guessed) if token in self.rules.nudging_eos), len(guessed))
            return guessed[: row.constraint.allowed_prefix([*row.answer.ids, *ahead.ids], guessed[:ends])]
        return guessed

    def _nudging_scores(
        self, rows: list[Row], guesses: list[list[int]], may_end: list[bool], raw: torch.Tensor
    ) -> torch.Tensor:
        """The nudging model's processed scores at all positions, of shape (positions of all rows, vocab_size)."""
        scores = processed_scores(
            raw,
            [
                Positions(
                    row.nudging.processors if ends else LogitsProcessorList([*row.nudging.processors, self._no_eos]),
                    row.nudging.prompt,
                    chain(row.ahead.all_ids, guessed),
                    len(guessed) + 1,
                )
                for row, guessed, ends in zip(rows, guesses, may_end, strict=True)
            ],
        )
        scores = scores + self.rules.never_drawn(scores)
        if not (self.rules.one_vocabulary and rows[0].constraint is not None):
            return scores
        masks = []
        for row, guessed in zip(rows, guesses, strict=True):
            assert row.constraint is not None
            ids = [*row.answer.ids, *row.ahead.ids, *guessed]
            begin = len(ids) - len(guessed)
            masks += [self.rules.forbidden(row.constraint, ids[:end], scores) for end in range(begin, len(ids) + 1)]
        return scores + torch.stack(masks)

    def _accept_guesses(self, row: Row, guessed: list[int], said: list[tuple[float, float, float]]) -> int:
        """Keeps the confirmed guesses and one new token, and returns how many guesses were confirmed."""
        ahead = row.ahead
        is_bound = self.rules.one_vocabulary and row.constraint is not None
        for accepted, (number, top1, best) in enumerate(said):
            token = int(number)
            if not math.isfinite(top1):
                ahead.finish(WritingEnd.LOGITS, top1)
            elif not math.isfinite(best):
                blocked = best == -math.inf and is_bound
                ahead.finish(WritingEnd.BLOCKED if blocked else WritingEnd.SCORES, top1, best=best)
            elif token in self.rules.nudging_eos:
                ahead.finish(WritingEnd.EOS, top1, eos=token)
            else:
                ahead.write(token, top1)
                if is_bound and token in self.rules.stop_tokens:
                    ahead.finish(WritingEnd.BLOCKED)  # Processors are not asked what may stand after a stop token.
            if accepted == len(guessed) or ahead.end is not None or token != guessed[accepted]:
                break
        return accepted

    def _may_not_end(self, row: Row) -> bool:
        fewest = self.rules.min_new_tokens
        return len(row.answer.ids) < fewest and row.answer.count(row.ahead.ids) < fewest

    # Run: a pass of the base.

    def _read(self, work: _Read, drafter: Drafter) -> None:
        """Lets the base read each row's answer and draft, and predict at every position that it has not read."""
        rows = work.rows
        reads_prompts = not all(len(row.predictions) for row in rows)
        drafter.read(self._answer_tokens())
        for row in rows:
            self._start_pass(row, work.draft_length)
        readings = {row.number: self._base_reading(row) for row in rows}
        began = time.perf_counter()
        logits = self.base.read(readings)
        # Logits processors work where the caller's ids are, which need not be where the base is.
        device = rows[0].base.prompt.device
        raw = joined([logits[row.number] for row in rows]).to(device, torch.float32)
        scores = processed_scores(
            raw,
            [
                Positions(row.base.processors, row.base.prompt, row.predictions.read, readings[row.number].keep)
                for row in rows
            ],
        )
        keys = None
        if self.rules.base_samples:
            keys = [
                fold_in(fold_in(row.seed, _BASE_STREAM), place)
                for row in rows
                for place in range(len(row.predictions), len(row.predictions.read) + 1)
            ]
        tokens, probabilities = choose(scores, keys), raw.softmax(dim=-1)
        best = best_scores(scores, tokens, is_greedy=keys is None)
        said = _numbers(tokens, self.gate.scores(probabilities, tokens), probabilities.amax(dim=-1), best)
        if (fed := _usual_size(self.base)) is not None:
            drafter.time_pass(fed, time.perf_counter() - began, reads_prompts)
        predictions = zip(*said, raw, scores, strict=True)
        for row in rows:
            for token, score, top1, best_score, row_logits, row_scores in islice(
                predictions, readings[row.number].keep
            ):
                recorded = (row_logits, row_scores) if self.record_logits else ()
                row.predictions.add(Prediction(int(token), score, top1, best_score, *recorded))
            if not row.is_open:
                self._check_recorded(row)
                self.base.release(row.number)

    def _start_pass(self, row: Row, draft_length: int) -> None:
        answer = row.answer
        if not row.is_open:
            return row.predictions.start_pass(answer.ids[:-1], (), ())
        continuation = row.ahead.ids
        draft = answer.draft(continuation[:draft_length], int(min(draft_length, self._max_draft(row))))
        if not self.rules.one_vocabulary:
            draft = draft[: self.rules.num_allowed(row.constraint, answer.ids, draft)]
        row.predictions.start_pass(
            answer.ids, draft, answer.draft_top1_probs(draft, continuation, row.ahead.top1_probs)
        )

    @staticmethod
    def _base_reading(row: Row) -> Reading:
        prompt, read = row.answer.prompt, row.predictions.read
        keep = len(read) + 1 - len(row.predictions)
        return Reading([*prompt, *read], keep, settled=len(prompt) + len(row.answer.ids))

    @staticmethod
    def _check_recorded(row: Row) -> None:
        for place in range(len(row.answer.ids)):
            if not math.isfinite(row.predictions[place].top1):
                raise ValueError(_bad_logits("base", place, row))


def _next_step(row: Row, answer: Reply) -> Step | str:
    """The algorithm's next step, or why the answer has ended.

    The call stands alone in its `try`, because a `StopIteration` of a caller's criterion or streamer ends no answer.
    """
    try:
        return row.algorithm.send(answer)
    except StopIteration as end:
        return end.value


def _bad_logits(whose: str, place: int, row: Row) -> str:
    """The error message for logits that are NaN or infinite."""
    return (
        f"The {whose}'s logits are NaN or infinite at {_where(whose, place, row)}: load the {whose} in another dtype "
        "(float16 overflows where bfloat16 and float32 do not), and look at its weights. `remove_invalid_values` does "
        "not help: such logits do not tell how sure a model is."
    )


def _no_choice(whose: str, best: float, place: int, row: Row) -> str:
    """The error message for logits processors that leave no token to choose."""
    what = "forbid every token (all scores are −∞)" if best == -math.inf else "make a score NaN or +∞"
    which = "`logits_processor` and the generation config" if whose == "base" else "`nudging_model.generation_config`"
    return f"The {whose}'s logits processors {what} at {_where(whose, place, row)}: look at those of {which}."


def _where(whose: str, place: int, row: Row) -> str:
    own = " (in its own vocabulary)" if whose != "base" and isinstance(row.answer, TwoVocabularies) else ""
    return f"token {place + 1} of the answer{own} in row {row.number}"


def _numbers(*tensors: torch.Tensor) -> list[list[float]]:
    """The numbers of tensors of one shape, in one transfer from their device.

    They pass as float32, which holds whole numbers up to 2**24, more than any vocabulary has.
    """
    if tensors[0].device.type == "cpu":  # There is nothing to wait for.
        return [each.tolist() for each in tensors]
    return torch.stack([each.float() for each in tensors]).tolist()


def _usual_size(lm: CachedLM | SeparateRows) -> int | None:
    """The tokens of its last pass, padding included, if others like it will follow.

    `None` for a pass that read a prompt or was compiled first.
    """
    if lm.last_shape is None or lm.last_shape[1] > _MAX_USUAL_WIDTH:
        return None
    return lm.last_shape[0] * lm.last_shape[1]
