"""What a server asks of whoever writes its answers. It knows ids and authors, never HTTP, text or how models run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class AnswerRequest:
    """What is to be answered, and how.

    Args:
        input_ids: the base's prompt.
        nudging_input_ids: the nudging model's prompt, in its own ids. With `None` it is made from the base's prompt,
            as [`nudging_hf.generate`] makes it.
        arguments: further arguments of [`nudging_hf.generate`] by name, such as `max_new_tokens`, `temperature` and
            the fields of [`NudgingConfig`].
        n: how many answers are written to the prompt.
        seed: the seed of the draws. The answers are those of `torch.manual_seed(seed)` and `generate`. `None` takes
            a new one.
        stop: strings that end an answer once its text has one of them. The prompt does not count.
        presence_penalty, frequency_penalty: how much less a token counts because the answer has it, and each time
            that it has it: see [`CountPenalties`].
        top_logprobs: how many of the base's most probable tokens are told at each token, besides the token itself;
            `None` if no log-probabilities are wanted.
    """

    input_ids: tuple[int, ...]
    nudging_input_ids: tuple[int, ...] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None


class TokenLogprob(NamedTuple):
    """The natural logarithm of the base's probability of a token, by its raw logits."""

    token: int
    logprob: float


class Logprobs(NamedTuple):
    """What the base thought of a token of the answer, whoever wrote it.

    Args:
        logprob: of that token.
        top: of the most probable tokens, the greatest first.
    """

    logprob: float
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Chunk:
    """What has been added to an answer.

    Args:
        index: which of the `n` answers.
        ids: the new tokens, in the base's vocabulary. The base's EOS as the end mark is left out.
        nudged: for each token, whether the nudging model wrote it.
        logprobs: for each token, if they were asked for.
        finish_reason: why the answer has ended, in its last chunk: see [`NudgingOutput`].
    """

    index: int
    ids: tuple[int, ...] = ()
    nudged: tuple[bool, ...] = ()
    logprobs: tuple[Logprobs, ...] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Stats:
    """What an engine is doing, and what it has done since it began.

    Args:
        running: how many answers are being written.
        waiting: how many answers wait for a place.
        base_forward_passes, nudging_forward_passes: of both models. An engine elsewhere counts one for each token of
            the base that it has sent.
    """

    running: int = 0
    waiting: int = 0
    base_forward_passes: int = 0
    nudging_forward_passes: int = 0


class QueueFull(Exception):
    """So many answers wait that no further ones are taken."""


class Unavailable(Exception):
    """The engine takes no requests, or has given one up, because it is shutting down."""


class AnswerFailed(Exception):
    """An answer could not be written to its end. The message is for the client."""


class Answers(Protocol):
    """The answers to one request, chunk by chunk, as they are written."""

    def __aiter__(self) -> Answers: ...

    async def __anext__(self) -> Chunk:
        """Waits for the next chunk. There is none after the last chunk of each answer.

        Raises:
            AnswerFailed: if an answer failed.
            Unavailable: if the engine shut down before the answers were finished.
        """
        ...

    def close(self) -> None:
        """Gives up what is not finished. It returns at once, may be called from any task, and more than once."""
        ...


class Engine(Protocol):
    """Writes the nudged answers of many requests at once.

    Attributes:
        tokenizer, nudging_tokenizer: of the base and of the nudging model.
        context_length: how many tokens a prompt and its answer may have together; `None` if there is no limit.
        samples_by_default: whether answers are drawn where a request does not say.
        is_ready: whether it takes requests.
    """

    @property
    def tokenizer(self) -> Any: ...

    @property
    def nudging_tokenizer(self) -> Any: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def samples_by_default(self) -> bool: ...

    @property
    def is_ready(self) -> bool: ...

    async def submit(self, request: AnswerRequest) -> Answers:
        """Takes a request if it can be answered.

        Raises:
            ValueError: for what nudging refuses, with a reason for the client.
            QueueFull: if too many answers wait.
            Unavailable: if the engine is shutting down.
        """
        ...

    def stats(self) -> Stats:
        """What the engine is doing."""
        ...

    async def shutdown(self, grace: float) -> None:
        """Gives up the answers that wait, and those that are not finished after `grace` seconds. Then all is over."""
        ...
