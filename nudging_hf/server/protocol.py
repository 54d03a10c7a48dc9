"""Requests and replies in the form of OpenAI's API. It knows fields and their values, never models or HTTP.

A field that nudging cannot honour is refused with a reason, and never ignored. A value of such a field that asks for
nothing, as `null` or a default does, is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from ..core.config import NudgingConfig

MAX_TOP_LOGPROBS = 20
_MAX_ANSWERS = 128
_MAX_STOP_STRINGS = 16
_MOST = 2**31  # Of token ids and limits.
_LEAST_TEMPERATURE = 0.001  # Scores divided by less would not be finite.
_BAN = -100  # Of `logit_bias`, by OpenAI's documentation.


class _Refusal(NamedTuple):
    """Why a field is refused, unless its value is neutral or `null`."""

    reason: str
    neutral: tuple[Any, ...] = ()


_NO_TOOLS = "the base writes plain text and cannot call tools"
_TEXT_ONLY = "prompts and answers are text"
_REFUSALS = {
    "tools": _Refusal(_NO_TOOLS, ([],)),
    "tool_choice": _Refusal(_NO_TOOLS, ("none", "auto")),
    "parallel_tool_calls": _Refusal(_NO_TOOLS, (True, False)),
    "functions": _Refusal(_NO_TOOLS, ([],)),
    "function_call": _Refusal(_NO_TOOLS, ("none", "auto")),
    "web_search_options": _Refusal(_NO_TOOLS),
    "response_format": _Refusal("answers are text, without a schema: leave it out", ({"type": "text"},)),
    "modalities": _Refusal(_TEXT_ONLY, (["text"],)),
    "audio": _Refusal(_TEXT_ONLY),
    "prediction": _Refusal("the nudging model's words are the prediction that is verified"),
    "reasoning_effort": _Refusal(
        "there is no such setting: set what the chat template takes in `chat_template_kwargs`"
    ),
    "verbosity": _Refusal("there is no such setting", ("medium",)),
    "store": _Refusal("this server stores nothing", (False,)),
    "service_tier": _Refusal("there is only one", ("auto", "default")),
    "echo": _Refusal("a reply holds the answer alone: put the prompt before it", (False,)),
    "suffix": _Refusal("the base writes from left to right and sees no text after the answer", ("",)),
}
# They tell the server who asks. An answer does not depend on them.
_NOTES = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class RequestFields(BaseModel):
    """What chat completions and completions have in common.

    `temperature=0` is greedy. Without a temperature the base's generation config decides, as in
    [`nudging_hf.generate`], and not OpenAI's default of 1.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, lt=_MOST)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: list[str] | None = None
    n: int | None = Field(None, ge=1, le=_MAX_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0)

    nudge_threshold: float | str | None = None
    nudge_gate: str | None = None
    target_nudge_rate: float | None = None
    num_nudging_tokens: int | None = None
    takeover_on_agreement: bool | None = None
    word_boundary: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        for name, (reason, neutral) in _REFUSALS.items():
            value = given.get(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                raise refusal(name, f"`{name}` is not supported: {reason}.")
        return {name: value for name, value in given.items() if name not in (*_REFUSALS, *_NOTES)}

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        stop = [stop] if isinstance(stop, str) else stop
        if stop is None:
            return None
        if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
            raise refusal("stop", f"`stop` must be a string or a list of strings that are not empty, got {stop!r}.")
        if len(stop) > _MAX_STOP_STRINGS:
            raise refusal("stop", f"`stop` may have {_MAX_STOP_STRINGS} strings, got {len(stop)}.")
        return stop

    @field_validator("temperature")
    @classmethod
    def _not_almost_greedy(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < _LEAST_TEMPERATURE:
            least = f"`temperature` must be 0, which is greedy, or at least {_LEAST_TEMPERATURE}"
            raise refusal("temperature", f"{least}, got {temperature}.")
        return temperature

    @field_validator("logit_bias")
    @classmethod
    def _bans_only(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (biases or {}).items():
            if not token.isdecimal():
                raise refusal("logit_bias", f"`logit_bias` goes by token ids, got {token!r}.")
            if bias not in (0, _BAN):
                raise refusal(
                    "logit_bias",
                    f"`logit_bias` can only ban tokens, with {_BAN}, because another bias would not bind the nudging "
                    f"model; got {bias} for token {token}.",
                )
        return biases

    @model_validator(mode="after")
    def _check_together(self) -> RequestFields:
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "`stream_options` needs `stream`: true.")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refusal("min_tokens", f"`min_tokens` ({self.min_tokens}) exceeds the limit of {self.max_tokens}.")
        knobs = self.knobs()
        for name, value in knobs.items():
            try:
                NudgingConfig(**{name: value})
            except ValueError as error:
                raise refusal(name, str(error)) from error
        return self

    def knobs(self) -> dict[str, Any]:
        """The parameters of nudging that are given."""
        given = {name: getattr(self, name, None) for name in NudgingConfig.field_names()}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def answers(self) -> int:
        """How many answers there are to each prompt."""
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def generate_arguments(self, samples_by_default: bool) -> dict[str, Any]:
        """The arguments of `generate` that the fields stand for, without prompts and lengths.

        Args:
            samples_by_default: whether answers are drawn if there is no temperature.

        Raises:
            FieldError: for settings of sampling in a greedy answer.
        """
        is_greedy = self.temperature == 0 if self.temperature is not None else not samples_by_default
        warpers: dict[str, Any] = {"top_p": self.top_p, "min_p": self.min_p}
        warpers["top_k"] = 0 if self.top_k == -1 else self.top_k
        neutral = {"top_p": 1, "min_p": 0, "top_k": 0}
        if is_greedy and self.temperature is None:
            for name, value in warpers.items():
                if value is not None and value != neutral[name]:
                    raise FieldError(name, f"`{name}` needs sampling: give a `temperature` above 0 too.")
        if is_greedy and self.answers > 1:
            raise FieldError("n", "`n` needs sampling, for greedy answers are all the same: give a `temperature`.")
        arguments: dict[str, Any] = {"do_sample": not is_greedy}
        if not is_greedy:
            arguments |= {"temperature": self.temperature, **warpers}
        arguments |= {"repetition_penalty": self.repetition_penalty, "min_new_tokens": self.min_tokens}
        if banned := sorted(int(token) for token, bias in (self.logit_bias or {}).items() if bias == _BAN):
            arguments["suppress_tokens"] = banned
        return {name: value for name, value in arguments.items() if value is not None} | self.knobs()


class ChatRequest(RequestFields):
    """The body of `/v1/chat/completions`."""

    messages: list[Any]
    max_completion_tokens: int | None = Field(None, ge=1, lt=_MOST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _merge_limits(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("max_completion_tokens") is not None:
            if given.get("max_tokens") not in (None, given["max_completion_tokens"]):
                raise refusal("max_tokens", "`max_tokens` and `max_completion_tokens` differ: give one of them.")
            return {**given, "max_tokens": given["max_completion_tokens"]}
        return given

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "`top_logprobs` needs `logprobs`: true.")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives are told at each token; `None` if there are no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def chat(self) -> list[Any]:
        """The messages, in which a developer's is the system's."""
        return [
            {**each, "role": "system"} if isinstance(each, Mapping) and each.get("role") == "developer" else each
            for each in self.messages
        ]


class CompletionRequest(RequestFields):
    """The body of `/v1/completions`. The base reads `prompt` as it is."""

    prompt: Any
    nudging_prompt: Any = None
    nudging_input_ids: Any = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> list[str] | list[list[int]]:
        texts, ids = _texts(prompt), _lists_of_ids(prompt)
        if not (texts or ids):
            what = "a string, a list of strings, a list of ids, or a list of such lists, and not be empty"
            raise refusal("prompt", f"`prompt` must be {what}, got {_quote(prompt)}.")
        return texts or ids

    @field_validator("nudging_prompt")
    @classmethod
    def _check_nudging_prompt(cls, prompt: Any) -> list[str] | None:
        if prompt is not None and not _texts(prompt):
            raise refusal("nudging_prompt", f"`nudging_prompt` must be a string or a list, got {_quote(prompt)}.")
        return None if prompt is None else _texts(prompt)

    @field_validator("nudging_input_ids")
    @classmethod
    def _check_nudging_input_ids(cls, ids: Any) -> list[list[int]] | None:
        if ids is not None and not _lists_of_ids(ids):
            what = "a list of ids, or one for each prompt"
            raise refusal("nudging_input_ids", f"`nudging_input_ids` must be {what}, got {_quote(ids)}.")
        return None if ids is None else _lists_of_ids(ids)

    @model_validator(mode="after")
    def _check_prompts_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.answers:
            raise refusal("best_of", "`best_of` is not supported: take `n` answers and choose among them.")
        if self.nudging_prompt is not None and self.nudging_input_ids is not None:
            raise refusal("nudging_prompt", "`nudging_prompt` and `nudging_input_ids` say the same: give one of them.")
        for name in ("nudging_prompt", "nudging_input_ids"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.prompt):
                raise refusal(name, f"`{name}` must be one for each of {len(self.prompt)} prompts, got {len(given)}.")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives are told at each token; `None` if there are no log-probabilities."""
        return self.logprobs


class FieldError(ValueError):
    """A field of a request has a value that is refused.

    Args:
        param: the field.
        message: the reason, for the client.
    """

    def __init__(self, param: str | None, message: str):
        super().__init__(message)
        self.param = param


def refusal(param: str, message: str) -> PydanticCustomError:
    """The error by which a model of pydantic refuses a field."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def first_error(errors: list[Any]) -> FieldError:
    """The first of pydantic's errors, with its field and in a sentence."""
    error = errors[0]
    if error["type"] == "refused":
        return FieldError(error["ctx"]["param"], error["ctx"]["message"])
    place = [str(part) for part in error["loc"] if part != "body"]
    param = place[0] if place else None
    if error["type"] == "json_invalid":
        return FieldError(None, f"The body is not valid JSON: {error.get('ctx', {}).get('error', error['msg'])}.")
    if param is None:
        return FieldError(None, "The body must be a JSON object, sent as `Content-Type: application/json`.")
    name = ".".join(place)
    if error["type"] == "extra_forbidden":
        return FieldError(name, f"There is no field `{name}`. docs/server.md lists the fields.")
    if error["type"] == "missing":
        return FieldError(name, f"The field `{name}` is missing.")
    return FieldError(param, f"`{param}`: {error['msg']}, got {_quote(error['input'])}.")


def _texts(given: Any) -> list[str]:
    """A string or a list of strings as a list; an empty list for anything else."""
    texts = [given] if isinstance(given, str) else given
    return texts if isinstance(texts, list) and all(isinstance(each, str) for each in texts) else []


def _lists_of_ids(given: Any) -> list[list[int]]:
    """A list of ids or a list of such lists as the latter; an empty list for anything else."""
    if not isinstance(given, list) or not given:
        return []
    lists = given if isinstance(given[0], list) else [given]
    are_ids = all(
        isinstance(each, list) and each and all(type(i) is int and 0 <= i < _MOST for i in each) for each in lists
    )
    return lists if are_ids else []


def _quote(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


# Replies ------------------------------------------------------------------------------------------------------------


class Reply(BaseModel):
    """Whatever is sent. The fields in `optional` are left out where they are `None`, and others are sent as `null`."""

    optional: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_optional(self, serialize: Any) -> dict[str, Any]:
        sent = serialize(self)
        return {name: value for name, value in sent.items() if value is not None or name not in self.optional}


class NudgingReport(Reply):
    """Who wrote a choice.

    Args:
        spans: the stretches of the text that the nudging model wrote, in characters (code points) of the whole
            answer: `[[start, end], ...]`. A chunk of a stream has those that lie in its own text.
        rate: the share of the answer's tokens that the nudging model wrote; once the answer has ended.
        finish_reason: why the answer ended, in the words of [`NudgingOutput`].
    """

    optional = frozenset({"rate", "finish_reason"})

    spans: list[tuple[int, int]]
    rate: float | None = None
    finish_reason: str | None = None


class TopLogprob(Reply):
    """A token with the base's log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    """A token of a chat's answer, with the base's most probable tokens there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """The log-probabilities of a chat's answer."""

    content: list[TokenLogprobs]
    refusal: None = None


class CompletionLogprobs(Reply):
    """The log-probabilities of a completion; `text_offset` is in characters of its text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Usage(Reply):
    """Tokens of the base's vocabulary. Each prompt counts once, and end marks do not count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(Reply):
    """The message of a choice."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatDelta(Reply):
    """What a chunk of a stream adds to a message."""

    optional = frozenset({"role", "content"})

    role: Literal["assistant"] | None = None
    content: str | None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(Reply):
    """An answer to a chat, or in a stream (`delta`) what is added to one."""

    optional = frozenset({"message", "delta", "nudging"})

    index: int
    message: ChatMessage | None = None
    delta: ChatDelta | None = None
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    nudging: NudgingReport | None = None


class CompletionChoice(Reply):
    """An answer to a prompt, or in a stream what is added to one."""

    optional = frozenset({"nudging"})

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    nudging: NudgingReport | None = None


class Completion(Reply):
    """A reply, or a chunk of a stream."""

    optional = frozenset({"usage"})

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice] | list[CompletionChoice]
    usage: Usage | None = None


class Model(Reply):
    """A model that can be asked."""

    optional = frozenset({"max_model_len"})

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nudging_hf"
    max_model_len: int | None = None


class ModelList(Reply):
    """All models that can be asked."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(Reply):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(Reply):
    """The reply to a request that could not be answered."""

    error: ErrorBody


def finish_reason_of(reason: str) -> FinishReason:
    """OpenAI's word for why a nudged answer ended."""
    return "length" if reason in ("length", "time") else "stop"
