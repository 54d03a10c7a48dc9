"""Runs the nudging model in vLLM's worker and decides how the engine's requests grow. It knows no runner of vLLM.

Each request is a row of an `EngineDecoder`. A runner brings the base's logits and takes the tokens by which each text
grows, and later the drafts. With tensor parallelism only the first rank has a nudging model. What it decides is shared
with the others, because the ranks must agree.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from ...core import predicting
from ...core.cached_lm import Reading, StaticCacheSettings, cached_lm
from ...core.config import ADAPTIVE, NudgingConfig
from ...core.draft_policy import DraftLength
from ...core.drafting import Drafter
from ...core.generate import prepare
from ...core.row import Row
from ...core.transformers_private import end_tokens, own_eos_token_ids
from ..described_base import described_base
from ..engine_decoder import EngineDecoder, EnginePass
from . import reports
from .params import (
    base_tokenizer,
    generate_arguments,
    hub_arguments,
    is_plain,
    nudging_arguments,
    nudging_tokenizer,
)

logger = logging.get_logger(__name__)
_Shared = TypeVar("_Shared")

OPTIONS = ("model", "tokenizer", "revision", "dtype", "num_draft_tokens", "trust_remote_code")


class Step(NamedTuple):
    """What a step of the engine has brought to one request.

    Args:
        request_id: the engine's name for it.
        told: how many tokens of the answer the engine had before the step.
        draft: the ids that the base has read after them.
        places: which rows of the step's logits are the predictions after them.
    """

    request_id: str
    told: int
    draft: Sequence[int]
    places: range


class Request(NamedTuple):
    """A request as the engine knows it.

    Args:
        prompt: the base's prompt, ids.
        params: vLLM's `SamplingParams`.
    """

    prompt: list[int]
    params: Any


class Nudger:
    """Nudging for the requests of one worker.

    Args:
        options: what vLLM's `additional_config` says under "nudging": the nudging `model`, its `tokenizer`, `revision`
            and `dtype`, `trust_remote_code`, `num_draft_tokens`, and defaults of the other fields of `NudgingConfig`.
        base: the folder or Hub name of the base.
        base_arguments: how it is loaded; see [`~params.base_arguments`].
        max_model_len: how many tokens prompt and answer can have.
        max_rows: how many requests run at once.
        num_draft_tokens: how many tokens of a draft the engine reads at most.
        device: of the worker.
        shared: returns the first rank's value on all ranks, if there are several.

    Raises:
        ValueError: for unknown options.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        base: str,
        base_arguments: Mapping[str, Any],
        max_model_len: int,
        max_rows: int,
        num_draft_tokens: int,
        device: torch.device,
        rank: int = 0,
        shared: Callable[[Any], Any] = lambda value: value,
    ):
        self.num_draft_tokens = num_draft_tokens
        self._max_model_len = max_model_len
        self._device = device
        self._is_first = rank == 0
        self._share = shared
        self._rows: dict[str, Row | _NoRow | None] = {}  # `None` for a request that asks for the base alone.
        self._report_names: dict[str, Any] = {}  # Of each request.
        self._began: float | None = None  # When the engine's present pass began, if it reads no prompts.
        settings = {name: value for name, value in options.items() if name not in OPTIONS}
        if unknown := sorted(set(settings) - set(NudgingConfig.field_names())):
            known = ", ".join((*OPTIONS, *NudgingConfig.field_names()))
            raise ValueError(f"`additional_config.nudging` may hold {known}, got {', '.join(map(repr, unknown))}.")
        if "model" not in options:
            raise ValueError('There is no nudging model: name one as `additional_config={"nudging": {"model": ...}}`.')
        self._config = NudgingConfig(**settings)
        self._draft_length = options.get("num_draft_tokens", ADAPTIVE)
        if self._is_first:
            self._load(options, base, base_arguments, max_rows)

    def _load(self, options: Mapping[str, Any], base: str, base_arguments: Mapping[str, Any], max_rows: int) -> None:
        name = options["model"]
        hub = hub_arguments(options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=options.get("dtype", "auto"), **hub)
        self._model = model.to(self._device).eval()
        self._nudging_tokenizer = nudging_tokenizer(options)
        self._tokenizer = base_tokenizer(base, base_arguments)
        of_model = {name: value for name, value in base_arguments.items() if not name.startswith("tokenizer")}
        self._base = described_base(base, self._device, **of_model)
        self._base_eos = own_eos_token_ids(self._base) or end_tokens(self._base, self._tokenizer)
        if not self._base_eos:
            raise ValueError(f"The base, {base}, has no EOS token, with which vLLM ends an answer.")
        config = self._base.generation_config
        config.eos_token_id = self._base_eos
        self._ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self._max_rows = max_rows
        self.decoder = self._new_decoder()

    def _new_decoder(self) -> EngineDecoder:
        if self._device.type == "cpu":
            nudging = cached_lm(self._model, 0)
        else:  # Its passes can be compiled, and its memory is set aside now.
            generation_config = GenerationConfig(cache_implementation="static")
            static = StaticCacheSettings(self._max_model_len, generation_config, places=self._max_rows)
            nudging = cached_lm(self._model, 0, static=static)
            nudging.admit(0)
            nudging.read({0: Reading([0], 0)})
            nudging.release(0)
        return EngineDecoder(nudging, Drafter(self._draft_length, DraftLength(), list))

    # What a runner calls.

    @torch.inference_mode()
    def is_nudged(self, request_id: str, request: Request) -> bool:
        """Whether a request is nudged. On its first call the request joins."""
        if request_id not in self._rows:
            self._rows[request_id] = self._admitted(request_id, request)
        return self._rows[request_id] is not None

    @torch.inference_mode()  # Tensors that were made in this mode can be changed in it alone.
    def forget(self, request_id: str) -> None:
        """Drops a request that has ended, was aborted, or is not known."""
        row = self._rows.pop(request_id, None)
        self._report_names.pop(request_id, None)
        if isinstance(row, Row) and row in self.decoder.rows:
            self.decoder.forget(row)

    @property
    def request_ids(self) -> list[str]:
        """The requests that have joined and were not forgotten."""
        return list(self._rows)

    def begin_pass(self, reads_prompts: bool) -> None:
        """The engine begins a pass of the base. Its time decides how much is drafted."""
        self._began = None if reads_prompts else time.perf_counter()

    @torch.inference_mode()
    def decide(self, steps: Sequence[Step], logits: torch.Tensor) -> list[list[int]]:
        """The tokens by which each request grows; at least one.

        Args:
            steps: the nudged requests of a pass, each with all its prompt read.
            logits: raw, of shape (positions of all requests, vocab_size).
        """
        return self._shared(lambda: self._decide(steps, logits)) if steps else []

    @torch.inference_mode()
    def drafts(self, request_ids: Sequence[str]) -> list[list[int]]:
        """What the base is to read next in each of these nudged requests."""
        return self._shared(lambda: self._drafts(request_ids)) if request_ids else []

    def _shared(self, compute: Callable[[], _Shared]) -> _Shared:
        return self._share(compute() if self._is_first else None)

    # On the first rank.

    def _admitted(self, request_id: str, request: Request) -> Row | _NoRow | None:
        try:
            if is_plain(request.params.extra_args):
                return None
            if not self._is_first:
                return _NoRow.OTHER_RANK
            self._report_names[request_id] = (request.params.extra_args or {}).get(reports.KEY)
            row = self._row(request)
            self.decoder.admit(row)
            return row
        except Exception as error:
            if self._is_first:
                self._tell_error(request_id, error, 400 if isinstance(error, ValueError) else 500)
            return _NoRow.FAILED

    def _row(self, request: Request) -> Row:
        prompt, params = list(request.prompt), request.params
        most = self._max_model_len - len(prompt)
        most = most if params.max_tokens is None else min(params.max_tokens, most)
        arguments = generate_arguments(params, self._ends, len(prompt), max(1, most))
        extra = {name: value for name, value in (params.extra_args or {}).items() if name != reports.KEY}
        own = nudging_arguments(extra)
        given = own.pop("nudging_input_ids", None)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            [row] = prepare(
                self._base,
                input_ids=torch.tensor([prompt], device=self._device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=self._device),
                nudging_model=self._model,
                nudging_input_ids=None if given is None else torch.tensor([given], device=self._device),
                tokenizer=self._tokenizer,
                nudging_tokenizer=self._nudging_tokenizer,
                nudging_config={**vars(self._config), **own},
                **arguments,
            ).rows
        return row

    def _decide(self, steps: Sequence[Step], logits: torch.Tensor) -> list[list[int]]:
        seconds = None if self._began is None else time.perf_counter() - self._began
        # An answer that has ended without the base's EOS ends with it in the engine, which would go on otherwise.
        grown = {step.request_id: [self._base_eos[0]] for step in steps}
        going = [(step, row) for step in steps if isinstance(row := self._rows[step.request_id], Row)]
        try:
            passes = self._passes(going, logits)
            ids = self.decoder.decide(passes, seconds, self.num_draft_tokens)
            grown |= {step.request_id: ids[row] for step, row in going if ids.get(row)}
        except Exception as error:  # Of a forward pass of the nudging model: no row of its cache can be trusted.
            for request_id, row in self._rows.items():
                if isinstance(row, Row):
                    self._rows[request_id] = _NoRow.FAILED
                    self._tell_error(request_id, error)
            self.decoder = self._new_decoder()
        for step, row in going:
            if self._rows[step.request_id] is not row:
                continue
            if row.error is not None:
                self._rows[step.request_id] = _NoRow.FAILED
                self._tell_error(step.request_id, row.error)
                self.decoder.forget(row)
            else:
                self._tell_authors(step, row)
        return [grown[step.request_id] for step in steps]

    def _passes(self, going: Sequence[tuple[Step, Row]], logits: torch.Tensor) -> dict[Row, EnginePass]:
        """What the base predicts in each row. An error of a row's logits processors ends that row alone."""
        passes = {}
        for step, row in going:
            ids = [*row.answer.ids[: step.told], *step.draft]
            raw = logits[step.places.start : step.places.stop].float()
            try:
                assert step.told == self.decoder.told(row), "the engine has lost a token, or has one too many"
                [said] = predicting.predictions(raw, [predicting.Reading(row, ids, len(step.places))])
                passes[row] = EnginePass(step.draft, said)
            except Exception as error:
                row.error = error
        return passes

    def _tell_authors(self, step: Step, row: Row) -> None:
        """Tells the API server who wrote the tokens by which a request grows in this step, and how it ends."""
        told = self.decoder.told(row)
        new = slice(step.told, min(told, len(row.answer.ids) - row.end_marks))
        ids, nudged = row.answer.ids[new], row.nudged[new]
        end = {} if row.is_open or told < len(row.answer.ids) else {"finish_reason": row.finish_reason}
        reports.tell(self._report_names[step.request_id], step.request_id, ids=ids, nudged=nudged, **end)

    def _tell_error(self, request_id: str, error: Exception, status: int = 500) -> None:
        """Tells the API server, and the log, why a request ends."""
        logger.error("Request %s of vLLM ends with an error.", request_id, exc_info=error)
        reports.tell(self._report_names.get(request_id), request_id, error=str(error), status=status)

    def _drafts(self, request_ids: Sequence[str]) -> list[list[int]]:
        rows = {name: row for name in request_ids if isinstance(row := self._rows[name], Row)}
        drafts = self.decoder.drafts(list(rows.values()), self.num_draft_tokens)
        return [drafts[rows[name]] if name in rows else [] for name in request_ids]


def reads_prompts(scheduler_output: Any) -> bool:
    """Whether a step of the engine reads a part of a prompt: more of some request than its last token and a draft."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    return bool(scheduler_output.scheduled_new_reqs) or any(
        number > 1 + len(drafts.get(request_id, ()))
        for request_id, number in scheduler_output.num_scheduled_tokens.items()
    )


class _NoRow(Enum):
    """What stands for a row where there is none."""

    OTHER_RANK = "the first rank has it"
    FAILED = "it has ended with an error"
