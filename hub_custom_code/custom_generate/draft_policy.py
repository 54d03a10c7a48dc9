"""Chooses how far to draft, from what drafts have brought and what forward passes have taken. It knows numbers alone.

A base pass over a draft of k tokens brings 1 + S(1) + ... + S(k) tokens, where S(i) is the probability that the first
i draft tokens are all accepted: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv
2211.17192), section 3. Their model gives each token the same acceptance rate. Here a token's rate is the measured one
of tokens at which the nudging model had about the same top-1 probability, because the answer rarely leaves a nudging
model that is sure (SVIP, arXiv 2411.18462, ends drafts by that probability).

The goal is tokens per second in the long run. At a pace of λ tokens per second a second is worth λ tokens, so the
chosen draft maximizes the expected tokens minus λ times the seconds of its base pass and of the nudging model's steps
that it still needs: a ratio of sums is maximized where that difference is (Dinkelbach, 1967). λ is predicted from
measured times and rates by section 3.5 of Leviathan et al., and is multiplied by the achieved share of earlier
predictions, because lookaheads are written beside drafts and some of them serve as drafts. Not drafting is one of the
choices.

Rates and times that are no longer observed slowly become better, so that they are tried again. An account bounds what
such trials cost. Each pass is credited with the seconds that its tokens would have taken one by one; when drafts have
cost more than all earlier savings and a small share of the time, nothing is drafted until that share has made up for
the loss. Drafts that never pay therefore cost little more than that share.

Steps that must be made for a nudge, however far is drafted, are no cost of a draft: a single row makes as many of them
per token of its answer either way. In a batch one row or another must write after nearly every base pass while all
rows wait, so there these steps are a cost of each pass, and longer drafts make passes rarer.

What is learned about a pair is kept for as long as both models exist. Calls that run at the same time share no policy.
"""

from __future__ import annotations

import copy
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, repeat
from operator import mul
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

MAX_DRAFT_TOKENS = 48
_FIRST_LENGTH = 8  # Tokens of a draft before any pass has been timed. The second pass has no draft.
_GUESS_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
_GUESSES_PER_CHOICE = 8  # How many passes use the same guess length before it is chosen anew.

# Acceptance rates are kept by the nudging model's top-1 probability: the upper ends of the bins, and each bin's prior.
_BIN_ENDS = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99, 0.999)
_BIN_PRIORS = (0.3, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99, 0.995)
_RATE_PRIOR = 0.9
_PRIOR_WEIGHT = 2.0  # A prior counts as so many tokens, for good.
_RATE_DECAY = 0.99  # Each newer draft token, of whatever bin, multiplies the weight of an older one: answers differ.
_OPTIMISM = 0.01  # The weight of a token that could have been drafted, was not, and might have been accepted.

_NEW_PASS_WEIGHT = 0.15  # The weight of a pass in the mean time of passes of its size.
_MAX_SLOWDOWN = 2.0  # A pass that takes longer than so many means was held up by other work on the machine.
_STALE_TIME_DECAY = 0.998  # Old timings shrink by 0.2 % for each newer one, so that untried sizes are tried again.
_STEP_DECAY = 0.95  # Each newer step of the nudging model multiplies the weight of an older one.
# The ratio of achieved to predicted tokens: its prior, the prior's weight in tokens, and the decay for each pass.
_PACE_RATIO_PRIOR, _PACE_RATIO_WEIGHT, _PACE_RATIO_DECAY = 0.8, 60.0, 0.98
# What drafts may lose, in passes without a draft: a share of each pass, the first credit, and the greatest credit.
_STAKE, _FIRST_CREDIT, _MAX_CREDIT = 0.02, 3.0, 16.0
_MIN_GAIN = 0.03  # Accepted tokens per row that a further draft token must promise.


class DecayedRate:
    """An exponentially decayed acceptance rate with a prior."""

    def __init__(self, prior: float):
        self._prior = prior
        self._accepted = self._rejected = 0.0

    def decay(self, tokens: int) -> None:
        """Reduces the weight of all observations, because so many newer tokens follow."""
        weight = _RATE_DECAY**tokens
        self._accepted *= weight
        self._rejected *= weight

    def observe(self, accepted: float, rejected: float) -> None:
        """Adds numbers of tokens."""
        self._accepted += accepted
        self._rejected += rejected

    def add_optimism(self) -> None:
        """Raises the rate slightly, because an undrafted token might have been accepted."""
        self._accepted += _OPTIMISM

    @property
    def value(self) -> float:
        weight = self._accepted + self._rejected + _PRIOR_WEIGHT
        return (self._accepted + _PRIOR_WEIGHT * self._prior) / weight


class Acceptance:
    """Acceptance rates of draft tokens whose predecessors are accepted, by the nudging model's top-1 probability."""

    def __init__(self) -> None:
        self._overall = DecayedRate(_RATE_PRIOR)
        self._bins = [DecayedRate(prior) for prior in _BIN_PRIORS]

    def observe(self, top1_probs: Sequence[float], accepted: int) -> None:
        """Adds a draft.

        Args:
            top1_probs: the nudging model's top-1 probability at each of its tokens.
            accepted: how many of its first tokens were accepted.
        """
        rates = (self._overall, *self._bins)
        if not top1_probs:
            for rate in rates:
                rate.add_optimism()
            return
        for rate in rates:
            rate.decay(min(accepted + 1, len(top1_probs)))
        self._overall.observe(accepted, accepted < len(top1_probs))
        for i, top1 in enumerate(top1_probs[: accepted + 1]):
            self._bin(top1).observe(i < accepted, i == accepted)

    @property
    def overall(self) -> float:
        """The rate of a token that the nudging model has not written yet."""
        return self._overall.value

    def is_below_average(self, top1: float) -> bool:
        """Whether a token with this top-1 probability is accepted less often than tokens are on the whole."""
        return self._bin(top1).value < self._overall.value

    def survival(self, top1_probs: Sequence[float]) -> list[float]:
        """S(1), S(2), ... of a draft with these top-1 probabilities."""
        rates = [each.value for each in self._bins]
        return list(accumulate([rates[bisect_right(_BIN_ENDS, top1)] for top1 in top1_probs], mul))

    def _bin(self, top1: float) -> DecayedRate:
        return self._bins[bisect_right(_BIN_ENDS, top1)]


class _MeanTime(NamedTuple):
    """The mean tokens and seconds of passes of one size, and the number of the last such pass."""

    tokens: float
    seconds: float
    last: int


def _size_class(tokens: int) -> int:
    """0, 1, 2, 3, ... for passes of 1, 2, 3 to 4, 5 to 8, ... tokens."""
    return (tokens - 1).bit_length()


class PassTime:
    """The seconds of a model's forward pass as a function of its tokens, padding included.

    It holds means over passes of 1, 2, 3 to 4, 5 to 8, ... tokens and interpolates linearly between them: a CPU takes
    about as long for each further token, a GPU takes nothing for it, and either may have a kernel of its own for a
    single token.
    """

    def __init__(self) -> None:
        self._means: dict[int, _MeanTime] = {}
        self._observed = 0
        self._points: list[tuple[float, float]] | None = None  # Tokens and seconds, sorted: what is interpolated.

    def undisturbed(self, tokens: int, seconds: float) -> float:
        """The seconds of a pass without those for which other work on the machine held it up.

        Such a pass tells nothing about others. Without this bound, one that took ten times as long could end drafts
        for hundreds of passes. If all passes of a size take longer from now on, their mean soon follows. A pass takes
        at most as long as a longer one, and in proportion to a shorter one.
        """
        means = self._means.values()
        return min([seconds, *(_MAX_SLOWDOWN * each.seconds * max(1.0, tokens / each.tokens) for each in means)])

    def observe(self, tokens: int, seconds: float) -> None:
        """Adds a pass."""
        size = _size_class(tokens)
        self._observed += 1
        mean_tokens, mean_seconds = self._decayed(self._means[size]) if size in self._means else (tokens, seconds)
        self._means[size] = _MeanTime(
            mean_tokens + _NEW_PASS_WEIGHT * (tokens - mean_tokens),
            mean_seconds + _NEW_PASS_WEIGHT * (seconds - mean_seconds),
            self._observed,
        )
        self._points = None

    def _decayed(self, mean: _MeanTime) -> tuple[float, float]:
        return mean.tokens, mean.seconds * _STALE_TIME_DECAY ** max(0, self._observed - mean.last - 1)

    def last(self, tokens: int) -> float:
        """The mean seconds of passes of about this size when the last of them was observed, without decay."""
        mean = self._means.get(_size_class(tokens))
        return mean.seconds if mean else self(tokens)

    @property
    def is_known(self) -> bool:
        return bool(self._means)

    def __call__(self, tokens: float) -> float:
        """The expected seconds of a pass."""
        if self._points is None:
            self._points = sorted(map(self._decayed, self._means.values()))
        points = self._points
        place = bisect_left(points, (tokens, 0.0))
        if place == 0 or len(points) == 1:
            return points[0][1]
        right = min(place, len(points) - 1)
        (few, early), (many, late) = points[right - 1 : right + 1]
        return early + max(0.0, late - early) * (tokens - few) / (many - few)


class DraftProgress(NamedTuple):
    """What the nudging model has written of one row's draft.

    Args:
        top1_probs: its top-1 probability at each token.
        limit: how many tokens the draft can have. It is reached where the nudging model may not write on.
    """

    top1_probs: Sequence[float]
    limit: float

    def is_shorter_than(self, length: int) -> bool:
        """Whether the nudging model can and must write on for a draft of this length."""
        return len(self.top1_probs) < min(length, self.limit)


class Plan(NamedTuple):
    """The nudging model writes until each row has `write` tokens, then the base reads the first `read` of each."""

    write: int
    read: int


class _Costs(NamedTuple):
    """The predicted pace in tokens per second, and the seconds of a base pass for each length of the draft."""

    pace: float
    seconds: list[float]


class _Choice(NamedTuple):
    """The last choice: for how many rows, at which predicted pace, and whether any token is drafted."""

    rows: int
    pace: float
    has_draft: bool


class _OpenPass(NamedTuple):
    """A base pass whose tokens are not yet counted.

    Args:
        rows, pace: as in the choice that it carried out.
        seconds: of the pass and of the steps that were made for its draft.
        has_draft: whether there were such steps or a draft.
    """

    rows: int
    pace: float
    seconds: float
    has_draft: bool


class DraftLength:
    """Chooses how many tokens the rows of a batch draft: one length for all, because the widest row makes the pass.

    Attributes:
        acceptance: the acceptance rates.
        guesses: chooses how far the nudging model guesses its own text.
    """

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.guesses = GuessLength()
        self._base_pass = PassTime()
        self._has_timed_single_tokens = False
        self._costs: dict[tuple[int, int], _Costs] = {}  # By the numbers of rows and of tokens that are read again.
        # Tokens per row, as they were achieved and predicted.
        self._achieved = _PACE_RATIO_PRIOR * _PACE_RATIO_WEIGHT
        self._predicted = _PACE_RATIO_WEIGHT
        self._choice: _Choice | None = None
        self._draft_seconds = 0.0  # Of steps since the last base pass that were made for a draft.
        self._forced_seconds = 0.0  # Of all other steps since then.
        self._mean_forced_seconds = 0.0
        self._open_pass: _OpenPass | None = None
        self._credit = _FIRST_CREDIT  # What drafts have saved and may lose again.

    def observe_pass(self, tokens: int, seconds: float, reads_prompts: bool = False) -> None:
        """Adds a base pass, which carries out the last choice.

        Args:
            tokens: fed in it, padding included.
            reads_prompts: whether prompts were among the tokens. Such a pass tells nothing about drafts.
        """
        if self._base_pass.is_known:
            self._mean_forced_seconds += _NEW_PASS_WEIGHT * (self._forced_seconds - self._mean_forced_seconds)
        seconds = self._base_pass.undisturbed(tokens, seconds)
        self._base_pass.observe(tokens, seconds)
        self._costs.clear()
        choice, self._choice = self._choice, None
        if choice is None or reads_prompts:
            self._open_pass = None
        else:
            has_draft = choice.has_draft or self._draft_seconds > 0
            seconds += self._draft_seconds + self._forced_per_pass(choice.rows)
            self._open_pass = _OpenPass(choice.rows, choice.pace, seconds, has_draft)
        self._draft_seconds = self._forced_seconds = 0.0

    def observe_step(self, tokens: int, seconds: float, written: float, drafts: bool) -> None:
        """Adds a pass of the nudging model.

        Args:
            tokens: fed in it, padding included.
            written: how many tokens each row wrote.
            drafts: whether the pass was made for drafts alone, and not for a row that had to write.
        """
        seconds = self.guesses.pass_time.undisturbed(tokens, seconds)
        self.guesses.observe_pass(tokens, seconds, written)
        if drafts:
            self._draft_seconds += seconds
        else:
            self._forced_seconds += seconds

    def observe_accepted(self, tokens: int) -> None:
        """Adds how many tokens all rows have accepted from the last base pass until the next one is due."""
        if self._open_pass is None:
            return
        rows, pace, seconds, has_draft = self._open_pass
        self._open_pass = None
        self._achieved = _PACE_RATIO_DECAY * self._achieved + tokens / rows
        self._predicted = _PACE_RATIO_DECAY * self._predicted + pace * seconds / rows
        without_draft = self._forced_per_pass(rows) + self._base_pass.last(rows)
        saved = tokens / rows - seconds / without_draft if has_draft else 0.0
        self._credit = min(_MAX_CREDIT, self._credit + saved + _STAKE)

    def _forced_per_pass(self, rows: int) -> float:
        """The seconds of forced steps that count as a cost of a pass; the rest goes with the tokens of the answer."""
        return self._mean_forced_seconds * (1 - 1 / rows)

    def _costs_of(self, rows: int, reread: int) -> _Costs:
        if (rows, reread) not in self._costs:
            forced = self._forced_per_pass(rows)
            seconds = [forced + self._base_pass(rows * (reread + n + 1)) for n in range(MAX_DRAFT_TOKENS + 1)]
            rate, step = self.acceptance.overall, self.guesses.seconds_per_token
            tokens = accumulate(accumulate(repeat(rate, MAX_DRAFT_TOKENS), mul, initial=1.0))
            paces = [rows * t / (s + n * step) for n, (t, s) in enumerate(zip(tokens, seconds, strict=True))]
            self._costs[rows, reread] = _Costs(max(paces), seconds)
        return self._costs[rows, reread]

    def choose(self, rows: Sequence[DraftProgress], steps_are_free: bool = False, reread: int | None = None) -> Plan:
        """Chooses the plan that promises most tokens, minus what its seconds are worth.

        Args:
            rows: of the batch.
            steps_are_free: whether another row forces a pass of the nudging model anyway, and drafting rides along.
            reread: for a base with a recurrent state, how many accepted tokens its pass reads again besides the last
                one, because they were read together with rejected ones. `None` for a base that reads no token twice.
        """
        if not self._base_pass.is_known:
            return Plan(_FIRST_LENGTH, _FIRST_LENGTH)
        if not self._has_timed_single_tokens:
            self._has_timed_single_tokens = True
            self._choice = None  # This pass only learns what such a pass takes.
            return Plan(0, 0)
        pace, seconds = self._costs_of(len(rows), reread or 0)
        plan = self._best_plan(rows, steps_are_free, reread, pace, seconds) if self._credit >= 0 else Plan(0, 0)
        self._choice = _Choice(len(rows), pace, plan.read > 0)
        return plan

    def _best_plan(
        self,
        rows: Sequence[DraftProgress],
        steps_are_free: bool,
        reread: int | None,
        pace: float,
        seconds: Sequence[float],
    ) -> Plan:
        """The plan of `choose`, where drafts may be tried.

        Args:
            pace: the predicted tokens per second.
            seconds: of a base pass, for each length of the draft.
        """
        # A pace that exceeded its prediction does not count: the rates have learned its cause by now, and a pace that
        # is out of reach would end drafts that are worth their time.
        pace *= min(1.0, self._achieved / self._predicted)
        step_cost = 0.0 if steps_are_free else pace * self.guesses.seconds_per_token
        expected, best, write, plan = 0.0, -pace * seconds[0], 0, Plan(0, 0)
        survival, expected_rereads = 1.0, 0.0
        for length, (gain, unwritten_gain) in enumerate(self._gains(rows), start=1):
            if unwritten_gain > step_cost:
                gain += unwritten_gain - step_cost
                write = length
            if gain < _MIN_GAIN * len(rows):
                break
            expected += gain
            seconds_of_draft = seconds[length]
            if reread is not None:
                # If this token is the one that is rejected, those before it are read again.
                expected_rereads += (survival - gain / len(rows)) * (length + reread)
                survival = gain / len(rows)
                seconds_of_draft += self._base_pass(len(rows) * (1 + expected_rereads)) - self._base_pass(len(rows))
            if (value := expected - pace * seconds_of_draft) > best:
                best, plan = value, Plan(write, length)
        return plan

    def _gains(self, rows: Sequence[DraftProgress]) -> Iterator[tuple[float, float]]:
        """Expected accepted tokens gained by each further draft position: by written tokens, and by unwritten ones."""
        rate, written, unwritten = self.acceptance.overall, [], []
        for top1_probs, limit in rows:
            survival = self.acceptance.survival(top1_probs[:MAX_DRAFT_TOKENS])
            missing = int(max(0, min(limit, MAX_DRAFT_TOKENS) - len(survival)))
            last = survival[-1] if survival else 1.0
            more = list(accumulate(repeat(rate, missing), mul, initial=last))[1:]
            end = [0.0] * (MAX_DRAFT_TOKENS - len(survival) - missing)
            written.append(survival + [0.0] * missing + end)
            unwritten.append([0.0] * len(survival) + more + end)
        return zip(map(sum, zip(*written, strict=True)), map(sum, zip(*unwritten, strict=True)), strict=True)


class GuessLength:
    """Chooses how many tokens the nudging model reads beyond its text, as a guess of what it will write.

    It uses the formula of section 3 of Leviathan et al. unchanged, because guesses cost nothing: most tokens per
    second.
    """

    def __init__(self) -> None:
        self.pass_time = PassTime()
        self._rate = DecayedRate(_RATE_PRIOR)
        self._chosen: dict[int, int] = {}  # By the number of rows.
        self._choices = 0
        self._seconds = self._written = 0.0

    def observe(self, accepted: int, guessed: int) -> None:
        """Adds a guess of so many tokens, of which the first `accepted` were right."""
        if guessed:
            self._rate.decay(min(accepted + 1, guessed))
            self._rate.observe(accepted, accepted < guessed)

    def observe_pass(self, tokens: int, seconds: float, written: float) -> None:
        """Adds a pass over so many tokens, in which each row wrote so many."""
        self.pass_time.observe(tokens, seconds)
        self._seconds = _STEP_DECAY * self._seconds + seconds
        self._written = _STEP_DECAY * self._written + written

    @property
    def seconds_per_token(self) -> float:
        """The seconds in which each row writes a token."""
        return self._seconds / self._written if self._written else 0.0

    def choose(self, rows: int) -> int:
        """Chooses how many tokens each row of the next pass guesses."""
        if not self.pass_time.is_known:
            return _FIRST_LENGTH
        self._choices += 1
        if self._choices % _GUESSES_PER_CHOICE == 0:
            self._chosen.clear()
        if rows not in self._chosen:
            expected = list(accumulate(accumulate(repeat(self._rate.value, _GUESS_LENGTHS[-1]), mul, initial=1.0)))
            self._chosen[rows] = max(_GUESS_LENGTHS, key=lambda n: expected[n] / self.pass_time(rows * (n + 1)))
        if not self._chosen[rows]:
            self._rate.add_optimism()
        return self._chosen[rows]


class _Policies:
    """The policies of one pair and one setting: as many as calls have run at the same time."""

    def __init__(self) -> None:
        self.idle: list[DraftLength] = []
        self.known: DraftLength | None = None  # A copy of one that was returned. Nobody changes it.
        self.returned = 0


_POLICIES: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Hashable, _Policies]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def borrowed_draft_length(base: Any, nudging_model: Any, setting: Hashable) -> Iterator[DraftLength]:
    """Lends the policy of a pair, which knows what earlier answers have taught.

    The policy belongs to one call until that call ends. A call that runs at the same time in another thread gets a
    policy of its own, which starts from a recent copy.

    Args:
        setting: everything else on which the time of a pass depends, such as the number of rows.
    """
    with _LOCK:
        pairs = _POLICIES.setdefault(base, WeakKeyDictionary())
        policies = pairs.setdefault(nudging_model, {}).setdefault(setting, _Policies())
        policy, known = policies.idle.pop() if policies.idle else None, policies.known
    if policy is None:
        policy = DraftLength() if known is None else copy.deepcopy(known)
    try:
        yield policy
    finally:
        with _LOCK:
            policies.returned += 1
            if policies.returned & (policies.returned - 1) == 0:  # Copying takes time: only at powers of 2.
                policies.known = copy.deepcopy(policy)
            policies.idle.append(policy)
