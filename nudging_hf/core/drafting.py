"""How far to draft: as far as is worth its time, by what drafts brought and passes took. It knows numbers alone.

A base pass over a draft of k tokens brings 1 + S(1) + ... + S(k) tokens, where S(i) is the chance that the first i
are all good: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), section
3. There each token has the same chance; here it is that of tokens of which the nudging model was as sure, as counted
so far, for the answer rarely leaves a model that is sure (SVIP, arXiv 2411.18462, ends drafts by that).

What is maximised is tokens a second in the long run. At a pace of λ a second is worth λ tokens, so the draft is chosen
that promises most tokens, less λ times the seconds of its pass and of the nudging model's steps that are still to be
made for it: for a ratio of sums the optimum lies where that difference does (Dinkelbach, 1967). λ is reckoned by
section 3.5 of Leviathan et al. from what was measured, and corrected by how much of it was reached so far, for
lookaheads are written beside drafts, and some of them serve as drafts. Not to draft is among the choices.

Chances and times that are not observed are taken for better, bit by bit, and so are tried again. What finding out
costs is kept in an account: the tokens of a pass are worth the seconds that they would have taken one by one. Where
drafts have taken more, by all that was saved before and a small share of the time, nothing is drafted until that share
has made up for it. So drafts that never pay cost little more than the share.

Steps that must be made however far is drafted, for a nudge, are no cost of a draft: those of a single row are as many
for each token of its answer. But of many rows one or another must write after nearly every pass, and all wait for it:
to them such steps are a cost of each pass, which longer drafts make rarer.

What was found out about two models is kept for as long as they are. Calls that run at the same time share no policy.
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

MOST = 48  # Tokens of a draft.
_FIRST = 8  # Tokens of the first draft, before any pass has been timed; in the second pass there are none.
_GUESSES = (0, 1, 2, 3, 4, 6, 8, 12, 16)
_GUESSES_A_CHOICE = 8  # How often the same number is guessed before it is chosen anew.

# Bins of how sure the nudging model was, by their upper ends, and what each is taken for until it is known better.
_SURE = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99, 0.999)
_FIRST_CHANCES = (0.3, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99, 0.995)
_FIRST_CHANCE = 0.9
_FIRST_WEIGHT = 2.0  # Of such a first chance, in tokens; it lasts.
_MEMORY = 0.99  # What a token of a draft weighs after another one, of whatever bin: answers differ.
_HOPE = 0.01  # Of a token that might have been drafted, was not, and might have been good.

_NEW = 0.15  # What a pass weighs in the mean time of such passes.
_FADE = 0.998  # What a time that was not observed becomes with each that was: it is tried again some day.
_OF_STEPS = 0.95  # What a step of the nudging model weighs after another one.
# What is reached of the pace that is reckoned: at first, what that weighs in tokens, and what a pass weighs later.
_REACHED, _REACHED_WEIGHT, _OF_PACE = 0.8, 60.0, 0.98
# What drafts may lose, in passes that draft nothing: so much for each pass, and a credit, at first and at most.
_STAKE, _CREDIT, _MOST_CREDIT = 0.02, 3.0, 16.0
_LEAST_GAIN = 0.03  # Tokens a row that a further token of the draft must promise, to be thought of.


class Share:
    """The share of tokens that were good, the last ones counting most, and few for little."""

    def __init__(self, first: float):
        self._first = first
        self._hits = self._misses = 0.0

    def fade(self, tokens: int) -> None:
        """Lets all that was observed weigh less, for so many tokens follow it."""
        weight = _MEMORY**tokens
        self._hits *= weight
        self._misses *= weight

    def observe(self, hits: float, misses: float) -> None:
        self._hits += hits
        self._misses += misses

    def hope(self) -> None:
        """Takes note that it might have been good, so that it is tried again some day."""
        self._hits += _HOPE

    def __call__(self) -> float:
        return (self._hits + _FIRST_WEIGHT * self._first) / (self._hits + self._misses + _FIRST_WEIGHT)


class Acceptance:
    """The chance that a drafted token is good, if all before it were, by how sure the nudging model was of it."""

    def __init__(self) -> None:
        self._of_any = Share(_FIRST_CHANCE)
        self._bins = [Share(chance) for chance in _FIRST_CHANCES]

    def observe(self, sure: Sequence[float], hits: int) -> None:
        """Takes note of a draft.

        Args:
            sure: the nudging model's top-1 probability at each of its tokens.
            hits: how many of them were good, from the first on.
        """
        shares = (self._of_any, *self._bins)
        if not sure:
            for each in shares:
                each.hope()
            return
        for each in shares:
            each.fade(min(hits + 1, len(sure)))
        self._of_any.observe(hits, hits < len(sure))
        for i, probability in enumerate(sure[: hits + 1]):
            self._bins[bisect_right(_SURE, probability)].observe(i < hits, i == hits)

    @property
    def of_any(self) -> float:
        """The chance of a token that is not written yet."""
        return self._of_any()

    def is_below_hope(self, sure: float) -> bool:
        """Whether a token is less likely to be good, now that it is written, than it was before."""
        return self._bins[bisect_right(_SURE, sure)]() < self._of_any()

    def survival(self, sure: Sequence[float]) -> list[float]:
        """S(1), S(2), ... of a draft at whose tokens the nudging model was so sure."""
        chances = [share() for share in self._bins]
        return list(accumulate([chances[bisect_right(_SURE, probability)] for probability in sure], mul))


class _Mean(NamedTuple):
    """Of the tokens and the seconds of passes of one size, and which of all passes was the last of them."""

    tokens: float
    seconds: float
    last: int


def _size(tokens: int) -> int:
    """Of a pass of so many tokens: 0, 1, 2, 3, ... for 1, 2, 3 to 4, 5 to 8, ..."""
    return (tokens - 1).bit_length()


class PassTime:
    """The seconds of a model's pass, by how many tokens are fed in it, padding included.

    Means over 1, 2, 3 to 4, 5 to 8, ... tokens, and straight lines between them: a CPU takes about as long for each
    further token, a GPU for none, and for a single one either may have a kernel of its own.
    """

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = {}  # By the size of the number of tokens.
        self._observed = 0
        self._known: list[tuple[float, float]] = []  # Tokens and seconds, in order; empty until it is asked for.

    def observe(self, tokens: int, seconds: float) -> None:
        size = _size(tokens)
        self._observed += 1
        mean_tokens, mean_seconds = self._faded(self._means[size]) if size in self._means else (tokens, seconds)
        self._means[size] = _Mean(
            mean_tokens + _NEW * (tokens - mean_tokens), mean_seconds + _NEW * (seconds - mean_seconds), self._observed
        )
        self._known.clear()

    def _faded(self, mean: _Mean) -> tuple[float, float]:
        return mean.tokens, mean.seconds * _FADE ** max(0, self._observed - mean.last - 1)

    def last(self, tokens: int) -> float:
        """What passes of about so many tokens took when they were last observed, however long ago."""
        mean = self._means.get(_size(tokens))
        return mean.seconds if mean else self(tokens)

    @property
    def is_known(self) -> bool:
        return bool(self._means)

    def __call__(self, tokens: float) -> float:
        if not self._known:
            self._known = sorted(map(self._faded, self._means.values()))
        known = self._known
        place = bisect_left(known, (tokens, 0.0))
        if place == 0 or len(known) == 1:
            return known[0][1]
        right = min(place, len(known) - 1)
        (few, early), (many, late) = known[right - 1 : right + 1]
        return early + max(0.0, late - early) * (tokens - few) / (many - few)


class Written(NamedTuple):
    """What the nudging model has written of one row's draft.

    Args:
        sure: its top-1 probability at each token.
        goes_on: whether it may write on.
    """

    sure: Sequence[float]
    goes_on: bool


class Plan(NamedTuple):
    """How far is drafted: rows with fewer tokens than `write` write on, and then the base reads `read` of each."""

    write: int
    read: int


class _Costs(NamedTuple):
    """What is reckoned with until the base has made another pass: a pace, and the seconds of a pass by draft."""

    pace: float
    seconds: list[float]


class DraftLength:
    """Chooses how many tokens the rows of a batch draft: one length for all, for the widest row makes the pass.

    Attributes:
        acceptance: what is known of drafts.
        guesses: of the nudging model's own passes.
    """

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.guesses = GuessLength()
        self._base_pass = PassTime()
        self._has_read_alone = False
        self._is_trial = True  # Whether the last plan was made to learn what such a pass takes.
        self._costs: dict[tuple[int, int], _Costs] = {}  # By the number of rows, and of tokens read again.
        self._accepted, self._reckoned = _REACHED * _REACHED_WEIGHT, _REACHED_WEIGHT  # Tokens of a row.
        self._seconds = 0.0  # Of a pass of the base and the steps since that were made for a draft.
        self._forced_since = 0.0  # Seconds of the steps since that were made in any case.
        self._forced = 0.0  # The mean of that, from pass to pass.
        self._pace = 0.0  # That was reckoned with for it; 0 where nothing was chosen.
        self._rows = 1  # For which it was.
        self._to_account = 0  # How many passes, by the last draft, are to be accounted for: its steps' and its own.
        self._credit = _CREDIT  # What drafts have saved, and may lose again.

    def observe_pass(self, tokens: int, seconds: float, reads_prompts: bool = False) -> None:
        """Takes note of a pass of the base in which so many tokens were fed, padding included.

        Args:
            reads_prompts: whether there were prompts among them; what such a pass takes is no matter of drafts.
        """
        if self._base_pass.is_known:
            self._forced += _NEW * (self._forced_since - self._forced)
        self._forced_since = 0.0
        self._base_pass.observe(tokens, seconds)
        self._costs.clear()
        counts = not (self._is_trial or reads_prompts)
        self._seconds = seconds + self._forced_by_pass(self._rows) if counts else 0.0

    def observe_step(self, tokens: int, seconds: float, written: float, drafts: bool) -> None:
        """Takes note of a pass of the nudging model, in which each row wrote so many tokens.

        Args:
            drafts: whether it was made for a draft alone; others are made however far is drafted.
        """
        self.guesses.observe_pass(tokens, seconds, written)
        if not drafts:
            self._forced_since += seconds
        elif self._seconds:
            self._seconds += seconds

    def observe_accepted(self, tokens: int) -> None:
        """Takes note of how many tokens of all rows were accepted since the base has last read."""
        if self._seconds and self._pace:
            self._accepted = _OF_PACE * self._accepted + tokens / self._rows
            self._reckoned = _OF_PACE * self._reckoned + self._pace * self._seconds / self._rows
            alone = self._forced_by_pass(self._rows) + self._base_pass.last(self._rows)
            saved = tokens / self._rows - self._seconds / alone if self._to_account else 0.0
            self._credit = min(_MOST_CREDIT, self._credit + saved + _STAKE)
        self._to_account = max(0, self._to_account - 1)
        self._seconds = self._pace = 0.0

    def _forced_by_pass(self, rows: int) -> float:
        """The seconds of such steps that are thought of as a pass's own; what is left goes by the answer's tokens."""
        return self._forced * (1 - 1 / rows)

    def _costs_of(self, rows: int, unread: int) -> _Costs:
        if (rows, unread) not in self._costs:
            forced = self._forced_by_pass(rows)
            seconds = [forced + self._base_pass(rows * (unread + length + 1)) for length in range(MOST + 1)]
            chance, step = self.acceptance.of_any, self.guesses.seconds_a_token
            tokens = accumulate(accumulate(repeat(chance, MOST), mul, initial=1.0))
            paces = [rows * n / (s + length * step) for length, (n, s) in enumerate(zip(tokens, seconds, strict=True))]
            self._costs[rows, unread] = _Costs(max(paces), seconds)
        return self._costs[rows, unread]

    def choose(self, rows: Sequence[Written], steps_are_free: bool = False, unread: int | None = None) -> Plan:
        """The plan that promises most tokens, less what its seconds are worth.

        Args:
            rows: of the batch.
            steps_are_free: whether the nudging model makes a pass for other rows in any case.
            unread: for a base with a state, how many accepted tokens its pass reads again beside the last one: those
                that stood with a draft of which some were rejected. `None` for a base that reads nothing twice.
        """
        if not self._base_pass.is_known:
            return Plan(_FIRST, _FIRST)
        self._is_trial = not self._has_read_alone
        if self._is_trial:
            self._has_read_alone = True
            return Plan(0, 0)
        self._rows = len(rows)
        self._pace, seconds = self._costs_of(self._rows, unread or 0)
        if self._credit < 0:
            return Plan(0, 0)
        # More than was reckoned is no pace to go by: what brought it is in the chances by now, and a pace that cannot
        # be had ends drafts that are worth their time.
        pace = self._pace * min(1.0, self._accepted / self._reckoned)
        step_cost = 0.0 if steps_are_free else pace * self.guesses.seconds_a_token
        promised, best, write, plan = 0.0, -pace * seconds[0], 0, Plan(0, 0)
        survival, read_again = 1.0, 0.0
        for length, (gain, unwritten) in enumerate(self._gains(rows), start=1):
            if unwritten > step_cost:
                gain += unwritten - step_cost
                write = length
            if gain < _LEAST_GAIN * len(rows):
                break
            promised += gain
            seconds_of_draft = seconds[length]
            if unread is not None:
                # Where it is this token that is rejected, those before it are read again.
                read_again += (survival - gain / len(rows)) * (length + unread)
                survival = gain / len(rows)
                seconds_of_draft += self._base_pass(self._rows * (1 + read_again)) - self._base_pass(self._rows)
            if (value := promised - pace * seconds_of_draft) > best:
                best, plan = value, Plan(write, length)
        if plan.read:
            self._to_account = 2
        return plan

    def _gains(self, rows: Sequence[Written]) -> Iterator[tuple[float, float]]:
        """By how many tokens of all rows each further token of the draft is good: those written, and those not."""
        of_any, written, unwritten = self.acceptance.of_any, [], []
        for row in rows:
            survival = self.acceptance.survival(row.sure[:MOST])
            more = repeat(of_any if row.goes_on else 0.0, MOST - len(survival))
            written.append(survival + [0.0] * (MOST - len(survival)))
            last = survival[-1] if survival else 1.0
            unwritten.append([0.0] * len(survival) + list(accumulate(more, mul, initial=last))[1:])
        return zip(map(sum, zip(*written, strict=True)), map(sum, zip(*unwritten, strict=True)), strict=True)


class GuessLength:
    """Chooses how many tokens the nudging model reads beyond its text, which are guessed to be what it will write.

    The formula of section 3 of Leviathan et al. as it stands, for guesses cost nothing: most tokens a second.
    """

    def __init__(self) -> None:
        self.pass_time = PassTime()
        self._share = Share(_FIRST_CHANCE)
        self._chosen: dict[int, int] = {}  # By the number of rows.
        self._asked = 0
        self._seconds = self._written = 0.0

    def observe(self, hits: int, guessed: int) -> None:
        """Takes note of a guess of so many tokens, of which the first `hits` were good."""
        if guessed:
            self._share.fade(min(hits + 1, guessed))
            self._share.observe(hits, hits < guessed)

    def observe_pass(self, tokens: int, seconds: float, written: float) -> None:
        """Takes note of a pass in which so many tokens were fed, and so many written in each row."""
        self.pass_time.observe(tokens, seconds)
        self._seconds = _OF_STEPS * self._seconds + seconds
        self._written = _OF_STEPS * self._written + written

    @property
    def seconds_a_token(self) -> float:
        """That each row takes for a token that it writes."""
        return self._seconds / self._written if self._written else 0.0

    def choose(self, rows: int) -> int:
        """How many tokens each row of a pass is to guess."""
        if not self.pass_time.is_known:
            return _FIRST
        self._asked += 1
        if self._asked % _GUESSES_A_CHOICE == 0:
            self._chosen.clear()
        if rows not in self._chosen:
            promised = list(accumulate(accumulate(repeat(self._share(), _GUESSES[-1]), mul, initial=1.0)))
            self._chosen[rows] = max(_GUESSES, key=lambda n: promised[n] / self.pass_time(rows * (n + 1)))
        if not self._chosen[rows]:
            self._share.hope()
        return self._chosen[rows]


class _Policies:
    """Those of one pair and one way of running it: as many as calls have run at the same time."""

    def __init__(self) -> None:
        self.idle: list[DraftLength] = []
        self.known: DraftLength | None = None  # A copy of what was given back, which nobody changes.
        self.given_back = 0


_POLICIES: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Hashable, _Policies]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def borrowed_draft_length(base: Any, nudging_model: Any, way: Hashable) -> Iterator[DraftLength]:
    """The policy of two models and a way of running them, with all that earlier answers have told.

    It belongs to one call until that ends. A second call at the same time, in another thread, has a policy of its own,
    which begins with what was known a while ago.

    Args:
        way: all else on which the time of a pass depends: how many rows it has, and so on.
    """
    with _LOCK:
        pairs = _POLICIES.setdefault(base, WeakKeyDictionary())
        policies = pairs.setdefault(nudging_model, {}).setdefault(way, _Policies())
        policy, known = policies.idle.pop() if policies.idle else None, policies.known
    if policy is None:
        policy = DraftLength() if known is None else copy.deepcopy(known)
    try:
        yield policy
    finally:
        with _LOCK:
            policies.given_back += 1
            if policies.given_back & (policies.given_back - 1) == 0:  # A power of 2: a copy takes time.
                policies.known = copy.deepcopy(policy)
            policies.idle.append(policy)
