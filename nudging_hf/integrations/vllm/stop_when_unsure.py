"""Lets vLLM (0.32) end a request by itself where the base is unsure. It knows logits and thresholds, never answers.

A remote base cancels a request where the base is unsure, and vLLM decodes a few tokens until it notices. With this
processor it decodes none in vain:

    vllm serve BASE --logits-processors nudging_hf.integrations.vllm.stop_when_unsure:StopWhenUnsure

A request asks for it by `vllm_xargs={"nudge_threshold": 0.4, "nudge_stop_id": 2}` and `stop_token_ids=[2]`: where the
base's top-1 probability is below the threshold, the stop token is the only one that is left. The probabilities that
vLLM tells (`--logprobs-mode raw_logprobs`, its default) are those from before. Other requests are left alone.

`StopWhenUnsure` is for vLLM's first runner and `StopWhenUnsureV2` for its second. vLLM is imported when one of them is
asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

_THRESHOLD, _STOP = "nudge_threshold", "nudge_stop_id"


class Stop(NamedTuple):
    """Where and with which token a request is to stop."""

    threshold: float
    stop_id: int


def stop_of(params: Any) -> Stop | None:
    """What the sampling parameters of a request ask for; `None` if they do not ask.

    Raises:
        ValueError: if a value is missing or of the wrong kind.
    """
    asked = params.extra_args or {}
    threshold, stop_id = asked.get(_THRESHOLD), asked.get(_STOP)
    if threshold is None and stop_id is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise ValueError(f"`{_THRESHOLD}` in `vllm_xargs` must be a number, got {threshold!r}.")
    if isinstance(stop_id, bool) or not isinstance(stop_id, int):
        raise ValueError(f"`{_STOP}` in `vllm_xargs` must be a token id, got {stop_id!r}.")
    if stop_id not in (params.stop_token_ids or ()):
        raise ValueError(f"`{_STOP}` in `vllm_xargs` must be one of `stop_token_ids` too, got {stop_id!r}.")
    return Stop(float(threshold), stop_id)


def force_stops(logits: torch.Tensor, thresholds: torch.Tensor, stop_ids: torch.Tensor) -> torch.Tensor:
    """Leaves the stop token alone where the base is unsure, in place.

    Args:
        logits: raw logits of shape (rows, vocab_size).
        thresholds: float32 of shape (rows,). A row with a threshold of 0 or less never stops.
        stop_ids: int64 of shape (rows,).

    Returns:
        `logits`.
    """
    unsure = (logits.float().softmax(dim=-1).amax(dim=-1) < thresholds)[:, None]
    stops = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, stop_ids[:, None], True)
    return logits.masked_fill_(unsure & ~stops, -math.inf).masked_fill_(unsure & stops, 0.0)


def __getattr__(name: str) -> Any:
    makers = {"StopWhenUnsure": _first_runner, "StopWhenUnsureV2": _second_runner}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = makers[name]()
    return made


def _first_runner() -> type:
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    class StopWhenUnsure(LogitsProcessor):
        """Knows the stops of the batch's rows."""

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
            self._stops: dict[int, Stop] = {}

        @classmethod
        def validate_params(cls, params: Any) -> None:
            stop_of(params)

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            process_dict_updates(self._stops, batch_update, lambda params, prompt, output: stop_of(params))

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            if self._stops:
                rows = torch.tensor(list(self._stops), device=logits.device)
                thresholds, stop_ids = zip(*self._stops.values(), strict=True)
                logits[rows] = force_stops(
                    logits[rows],
                    torch.tensor(thresholds, dtype=torch.float32, device=logits.device),
                    torch.tensor(stop_ids, device=logits.device),
                )
            return logits

    return StopWhenUnsure


def _second_runner() -> type:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class StopWhenUnsureV2(LogitsProcessor):
        """Knows the stops by the places of requests. With speculative decoding it sees the rows of drafts too."""

        def __init__(self, vllm_config: Any, req_states: Any):
            size, device = req_states.max_num_reqs, req_states.device
            self._thresholds = torch.zeros(size, dtype=torch.float32, device=device)
            self._stop_ids = torch.zeros(size, dtype=torch.int64, device=device)

        @classmethod
        def validate_params(cls, params: Any) -> None:
            stop_of(params)

        def add_request(self, req_idx: int, params: Any) -> bool:
            stop = stop_of(params)
            self._thresholds[req_idx] = 0.0 if stop is None else stop.threshold
            self._stop_ids[req_idx] = 0 if stop is None else stop.stop_id
            return stop is not None

        def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
            rows = ctx.expanded_idx_mapping.long()
            return force_stops(logits, self._thresholds[rows], self._stop_ids[rows])

    return StopWhenUnsureV2
