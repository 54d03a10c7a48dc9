"""Plans the drafts of one call and learns from their outcome. It knows progress and numbers, never text or models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .config import ADAPTIVE
from .draft_policy import MAX_DRAFT_TOKENS, DraftLength, DraftProgress, Plan

_MAX_USUAL_WIDTH = MAX_DRAFT_TOKENS + 16  # Tokens per row of a pass that reads no prompt, at most.
Shape = tuple[int, int]  # Rows and tokens per row of a forward pass, padding included.


class Drafter:
    """Plans the drafts of one call and learns from their outcome.

    Args:
        num_draft_tokens: as in `NudgingConfig`: a fixed length, or `"adaptive"`.
        policy: chooses adaptive lengths, and learns in any case.
        synced_across_ranks: returns the first rank's numbers in all processes of tensor parallelism, whose clocks
            differ and whose passes must not.
    """

    def __init__(
        self, num_draft_tokens: int | str, policy: DraftLength, synced_across_ranks: Callable[[list[int]], list[int]]
    ):
        self._fixed = None if num_draft_tokens == ADAPTIVE else int(num_draft_tokens)
        self._policy = policy
        self._synced = synced_across_ranks
        self._plan: Plan | None = None  # It stands until it is carried out or the draft disappoints.
        self._steps_are_free = False  # Whether that was so when the plan was made.
        self._outcomes: Sequence[tuple[Sequence[float], int]] = ()  # Of the last drafts, until the rates learn them.
        self._tokens_at_pass: int | None = None  # Tokens of all answers at the last base pass, until it is judged.

    @property
    def drafts_nothing(self) -> bool:
        return self._fixed == 0

    def plan(self, rows: Sequence[DraftProgress], steps_are_free: bool, reread: Callable[[], int | None]) -> Plan:
        """Plans how far these rows draft before the next base pass.

        An earlier plan stands while some row must write on for it.

        Args:
            rows: the progress of all open rows.
            steps_are_free: whether another row forces a pass of the nudging model anyway.
            reread: tells how many accepted tokens the base's pass must read again; see [`DraftLength.choose`].
        """
        if self._fixed is not None:
            return Plan(self._fixed, self._fixed)
        if self._plan is not None and self._steps_are_free == steps_are_free:
            if any(row.is_shorter_than(self._plan.write) for row in rows):
                return self._plan
        self._plan = Plan(*self._synced(list(self._policy.choose(rows, steps_are_free, reread()))))
        self._steps_are_free = steps_are_free
        return self._plan

    def guess_length(self, rows: int) -> int:
        """Chooses how many tokens the nudging model guesses in its next pass, in which so many rows take part."""
        return 0 if self.drafts_nothing else self._synced([self._policy.guesses.choose(rows)])[0]

    def wrote(self, guesses: Sequence[tuple[int, int]], least_top1: Sequence[float], has_ended: bool) -> None:
        """Learns from a pass of the nudging model.

        Args:
            guesses: for each row, how many tokens were guessed right, and how many were guessed.
            least_top1: for each row, the least top-1 probability among the tokens that it has written.
            has_ended: whether it can write no further in some row.
        """
        for accepted, guessed in guesses:
            self._policy.guesses.observe(accepted, guessed)
        if has_ended or any(map(self._policy.acceptance.is_below_average, least_top1)):
            self._plan = None  # Less was written than the plan expected.

    def time_step(self, shape: Shape | None, seconds: float, written: float, is_forced: bool) -> None:
        """Learns what a pass of the nudging model took; see [`DraftLength.observe_step`].

        Args:
            shape: of the pass, or `None` if its time says nothing about later ones.
        """
        if shape is not None and shape[1] <= _MAX_USUAL_WIDTH:
            self._policy.observe_step(shape[0] * shape[1], seconds, written, drafts=not is_forced)

    def time_pass(self, shape: Shape | None, seconds: float, reads_prompts: bool) -> None:
        """Learns what a base pass took; see [`DraftLength.observe_pass`].

        Args:
            shape: as in `time_step`.
        """
        if shape is not None and shape[1] <= _MAX_USUAL_WIDTH:
            self._policy.observe_pass(shape[0] * shape[1], seconds, reads_prompts)

    def read(self, answer_tokens: int) -> None:
        """Takes note that the base reads, at so many tokens of all answers.

        The acceptance rates learn a draft's outcome now, after the next draft was planned. A rejection lowers them for
        a moment, but the draft after it is accepted as often as others: with rates that learned it before planning,
        the mini pair made 7 % more base passes.
        """
        self._plan = None
        if not self.drafts_nothing:
            for top1_probs, accepted in self._outcomes:
                self._policy.acceptance.observe(top1_probs, accepted)
        self._outcomes = ()
        self._tokens_at_pass = answer_tokens

    @property
    def awaits_verification(self) -> bool:
        """Whether the outcome of the last base pass is not learned yet."""
        return self._tokens_at_pass is not None

    def verified(self, drafts: Sequence[tuple[Sequence[float], int]], answer_tokens: int) -> None:
        """Learns what the last base pass has brought, when all open rows wait for the next one.

        Args:
            drafts: for each open row, the nudging model's top-1 probability at each draft token, and how many of
                these tokens were accepted.
            answer_tokens: how many tokens all answers have now.
        """
        assert self._tokens_at_pass is not None
        self._outcomes = drafts
        self._policy.observe_accepted(answer_tokens - self._tokens_at_pass)
        self._tokens_at_pass = None
