"""One answer in progress: the answer itself, what the base has said of it, and what the nudging model wrote ahead.

A row knows ids, probabilities and places. It does not know how a model is run, nor the rules of the algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList

from .answer import OneVocabulary, TwoVocabularies
from .cached_lm import common_prefix
from .config import NudgingConfig
from .constraints import Constraint
from .gate import Confidence
from .limits import Limits
from .rounds import Question, Reply, Step
from .sampling import fold_in
from .token_rules import TokenRules

_NUDGING_STREAM = 1  # The nudging model's draws use keys of their own.


class Prediction(NamedTuple):
    """What the base says at one position.

    Args:
        token: its next token, greedy or drawn.
        score: of the gate.
        top1: its top-1 probability.
        best: the processed score of the token. It is NaN or infinite where no token can be chosen.
        probability: of the token, by the raw logits; NaN where an engine does not tell it.
        logits, scores: raw and processed, of shape (vocab_size,), where they are recorded.
        rank: the rank of the answer's token by the raw logits, from 1 on, once it is known; see [`rank_accepted`].
    """

    token: int
    score: float
    top1: float
    best: float
    probability: float = math.nan
    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    rank: int | None = None


class Predictions:
    """What the base has said at the positions of an answer and of the draft that it has read after the answer.

    Attributes:
        read: the ids that the base has read after the prompt, as far as the answer agrees with them.
        draft_top1_probs: the nudging model's top-1 probability at each token of the last draft.
    """

    def __init__(self) -> None:
        self.read: list[int] = []
        self.draft_top1_probs: Sequence[float] = ()
        self._draft_start = 0
        self._said: list[Prediction] = []
        self._num_ranked = 0

    def __len__(self) -> int:
        return len(self._said)

    def __getitem__(self, place: int) -> Prediction:
        """The prediction of the answer's token at a place."""
        return self._said[place]

    @property
    def accepted(self) -> int:
        """How many tokens of the last draft the answer has accepted, once it has passed all of them."""
        return len(self.read) - self._draft_start

    def forget_logits(self, place: int) -> None:
        """Drops the recorded logits and scores of a token. Those of a long answer would fill the memory."""
        self._said[place] = self._said[place]._replace(logits=None, scores=None)
        self._num_ranked = max(self._num_ranked, place + 1)  # Without logits there is nothing to rank it by.

    def unranked(self, length: int) -> range:
        """The places, in an answer of this length, of the tokens that are still to be ranked."""
        return range(self._num_ranked, min(length, len(self._said)))

    def set_rank(self, place: int, rank: int) -> None:
        """Records the rank of the answer's token at a place. Those before it are not asked for again."""
        self._said[place] = self._said[place]._replace(rank=rank)
        self._num_ranked = place + 1

    def start_pass(self, answer: Sequence[int], draft: Sequence[int], draft_top1_probs: Sequence[float]) -> None:
        """The base reads the answer and a draft."""
        self.read = [*answer, *draft]
        self.draft_top1_probs = draft_top1_probs
        self._draft_start = len(answer)

    def add(self, prediction: Prediction) -> None:
        """The base has predicted the next position."""
        self._said.append(prediction)

    def read_by_engine(
        self, answer: Sequence[int], told: int, draft: Sequence[int], said: Sequence[Prediction]
    ) -> None:
        """An engine has read the first `told` ids of the answer and a draft after them, and predicted from there on.

        What the answer already has beyond them counts as far as the draft begins with it.
        """
        assert len(self._said) >= told, "a token was told that the base has not predicted"
        self.read = [*answer[:told], *draft]
        self._said[told:] = said
        for place in range(told, len(answer)):
            self.accept(place, answer[place])

    def accept(self, place: int, token: int) -> None:
        """The answer has this token at this place. If the base has read another one there, the rest is void."""
        if self.read[place : place + 1] != [token]:
            del self.read[place:], self._said[place + 1 :]


class WritingEnd(Enum):
    """Why the nudging model writes no further after what it has written."""

    EOS = "it has ended the answer"
    BLOCKED = "the caller's logits processors forbid all that it may write"
    LOGITS = "its logits are NaN or infinite"
    SCORES = "no token can be chosen by its processed scores"


class WrittenAhead:
    """What the nudging model has written after an answer. `realign` fits it to an answer that has changed.

    All ids are of the nudging model. It wrote along the ids of an earlier text of the answer, and what it wrote
    continues the present answer if the ids of the present one are their beginning.

    Args:
        seed: of the row's draws.

    Attributes:
        context: how many ids the answer has.
        end: why the nudging model can write no further, if it cannot.
        eos: the EOS token that it wrote, where that is the reason.
        best_score: the best processed score, where no token could be chosen.
        held_back_at: the row's `untold_tokens` when `min_new_tokens` first kept EOS from being drawn, if it did.
        abandoned: what it had last written where the answer went another way, from one id after the divergence on.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._ids: list[int] = []
        self._top1: dict[int, float] = {}  # Its top-1 probability, by the number of ids that stood before.
        self._key: int | None = None
        self._abandoned_at = 0
        self.context = 0
        self.end: WritingEnd | None = None
        self.eos: int | None = None
        self.best_score = 0.0
        self.held_back_at: int | None = None
        self.abandoned: list[int] = []

    @property
    def all_ids(self) -> list[int]:
        """The answer and the continuation."""
        return self._ids

    @property
    def ids(self) -> list[int]:
        """The continuation of the answer."""
        return self._ids[self.context :]

    @property
    def top1_probs(self) -> list[float]:
        """The nudging model's top-1 probability at each token of the continuation."""
        return [self._top1[place] for place in range(self.context, len(self._ids))]

    @property
    def first_top1(self) -> float | None:
        """The nudging model's top-1 probability at the position after the answer, if it is known."""
        return self._top1.get(self.context)

    @property
    def tokens_since(self) -> int:
        """How many ids stand after the place where the abandoned ones were left."""
        return len(self._ids) - self._abandoned_at

    def key(self) -> int:
        """The key of the next draw, a function of the text: a text always continues in the same way."""
        if self._key is None:
            self._key = reduce(fold_in, self._ids, fold_in(self._seed, _NUDGING_STREAM))
        return self._key

    def realign(self, context: Sequence[int]) -> None:
        """The answer has these ids now. What does not continue them is abandoned."""
        if self._ids[: len(context)] != context:
            divergence = common_prefix(self._ids, list(context))
            if tail := self._ids[divergence + 1 :]:
                self.abandoned, self._abandoned_at = tail, divergence + 1
            self.forget()
            self._ids = list(context)
        self.context = len(context)

    def forget(self) -> None:
        """Drops everything; `realign` puts the answer in again."""
        self._ids, self._key, self.end, self.eos, self.context = [], None, None, None, 0
        self.held_back_at = None
        self._top1.clear()

    def write(self, token: int, top1: float) -> None:
        """The nudging model has written a token with this top-1 probability."""
        self._top1[len(self._ids)] = top1
        self._ids.append(token)
        if self._key is not None:
            self._key = fold_in(self._key, token)

    def finish(self, end: WritingEnd, top1: float | None = None, eos: int | None = None, best: float = 0.0) -> None:
        """The nudging model can write no further, where its top-1 probability is this."""
        if top1 is not None:
            self._top1[len(self._ids)] = top1
        self.end, self.eos, self.best_score = end, eos, best


@dataclass(frozen=True)
class Side:
    """What one of the two models is given for a row.

    Args:
        prompt: ids of shape (1, prompt_length), as logits processors are shown them. The base's is padded.
        processors: the model's logits processors for this row.
        room: how many tokens of the model can stand after its prompt, up to its last position.
        num_ids: how many ids the model can read.
        stand_in: what it reads in place of an id that it cannot read.
    """

    prompt: torch.Tensor
    processors: LogitsProcessorList
    room: float = math.inf
    num_ids: float = math.inf
    stand_in: int = 0

    def readable(self, ids: list[int]) -> list[int]:
        """The ids with stand-ins for those that the model cannot read."""
        if self.num_ids == math.inf:
            return ids
        return [token if token < self.num_ids else self.stand_in for token in ids]


@dataclass(frozen=True)
class Request:
    """What a caller has asked for. The answers of one call share it.

    Args:
        config: every parameter of nudging.
        rules: which tokens each model may write.
        limits: what ends an answer early.
        streamer: receives each token when it is accepted, and its author if it has a `put_marked`.
        records: whether the base says at every token how sure it is, what it would have written and how it ranks the
            token, also where the algorithm did not ask it, at the cost of one more pass at the end.
        records_logits: whether logits and processed scores are kept too.
    """

    config: NudgingConfig
    rules: TokenRules
    limits: Limits
    streamer: Any = None
    records: bool = False
    records_logits: bool = False


@dataclass(eq=False)
class Row:
    """One answer in progress.

    Args:
        number: the row's number in the caches of both models.
        request: what the caller has asked for.
        answer: the answer so far.
        base, nudging: what each model is given.
        seed: of the row's draws.
        confidence: decides whether the base is confident.
        algorithm: the generator of [`rounds`].
        constraint: what the caller's logits processors forbid, if they can forbid anything.

    Attributes:
        question: what the algorithm asks at present.
        nudged: for each token of the answer, whether the nudging model wrote it.
        finish_reason: why the answer has ended, if it has.
        error: the exception that has ended it, if one did.
        end_marks: 1 if the base's EOS was appended as the end mark, else 0.
        predictions: what the base has said.
        ahead: what the nudging model has written after the answer.
    """

    number: int
    request: Request
    answer: OneVocabulary | TwoVocabularies
    base: Side
    nudging: Side
    seed: int
    confidence: Confidence
    algorithm: Generator[Step, Reply, str]
    constraint: Constraint | None = None
    question: Question | None = field(default=None, init=False)
    nudged: list[bool] = field(default_factory=list, init=False)
    finish_reason: str | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    end_marks: int = field(default=0, init=False)
    predictions: Predictions = field(default_factory=Predictions, init=False)
    ahead: WrittenAhead = field(init=False)

    def __post_init__(self) -> None:
        self.ahead = WrittenAhead(self.seed)

    @property
    def length(self) -> int:
        """Tokens of the base's prompt, padding included, and of the answer."""
        return self.base.prompt.shape[1] + len(self.answer.ids)

    @property
    def is_open(self) -> bool:
        return self.finish_reason is None

    @property
    def is_full(self) -> bool:
        """Whether the answer has reached the last position of either model."""
        if len(self.answer.ids) >= self.base.room:
            return True
        # Hardly any token adds less than a byte, so the nudging model's ids need not be counted before that.
        if 2 * len(self.answer.text) + len(self.answer.ids) < self.nudging.room:
            return False
        return len(self.answer.nudging_ids()) >= self.nudging.room

    @property
    def room(self) -> float:
        """How many more tokens of the base's vocabulary the answer can have."""
        return min(self.request.limits.room(self.length), self.base.room - len(self.answer.ids))

    @property
    def untold_tokens(self) -> int:
        """How many tokens of the answer its ids in the nudging model's vocabulary do not tell of."""
        told = self.answer.nudging_ids() if isinstance(self.answer, OneVocabulary) else ()
        return len(self.answer.ids) - len(told)

    def limit_reached(self) -> str | None:
        """The limit that ends the answer with its last token, if one does."""
        return self.request.limits.finish_reason(self.answer.ids[-1], self.length, self.is_full, self.ids)

    def ids(self) -> torch.Tensor:
        """Prompt and answer, of shape (1, length)."""
        new = torch.tensor([self.answer.ids], dtype=torch.long, device=self.base.prompt.device)
        return torch.cat([self.base.prompt, new], dim=1)

    def append(self, token: int, nudged: bool) -> None:
        """Accepts a token of the base's vocabulary."""
        self.predictions.accept(len(self.answer.ids), token)
        self.answer.append(token)
        self.nudged.append(nudged)
        self.confidence.observe_text(self.answer.vocabulary.bytes_of(token), nudged)

    def realign(self) -> None:
        """Fits what the nudging model wrote ahead to the answer as it stands."""
        self.ahead.realign(self.nudging.readable(self.answer.nudging_ids()))
