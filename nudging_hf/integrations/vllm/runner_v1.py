"""Connects nudging with vLLM's first model runner, which runs where there is no Triton, as on a CPU.

Replaced on the instance: `GPUModelRunner._sample`. The drafts come through vLLM's public hook for a proposer of one's
own, the speculative method "custom_class", whose class is `Proposer`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID

from .logprobs import raw_logprobs
from .nudger import Nudger, Request, Step, reads_prompts

METHOD = "custom_class"


class Proposer:
    """What vLLM calls for drafts. The worker connects it with the runner.

    Args:
        vllm_config: as vLLM passes it.
    """

    def __init__(self, vllm_config: Any):
        self.connection: Connection | None = None

    def load_model(self, model: Any) -> None:
        """The worker loads the nudging model."""

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """The drafts of all requests of the batch, of which some have just grown by `sampled_token_ids`."""
        if self.connection is None:  # vLLM profiles.
            return [[] for _ in sampled_token_ids]
        return self.connection.propose(sampled_token_ids)


class Connection:
    """Takes the place of a runner's sampling.

    Args:
        runner: vLLM's `GPUModelRunner`.
        nudger: decides.
    """

    def __init__(self, runner: Any, nudger: Nudger):
        self.runner = runner
        self.nudger = nudger
        self._sample_plain = runner._sample
        runner._sample = self.sample
        runner.drafter.connection = self

    def begin_pass(self, scheduler_output: Any) -> None:
        """The engine begins a step."""
        for request_id in self.nudger.request_ids:
            if request_id not in self.runner.requests or request_id in scheduler_output.finished_req_ids:
                self.nudger.forget(request_id)
        self.nudger.begin_pass(reads_prompts(scheduler_output))

    def sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        """In the place of `GPUModelRunner._sample`: nudged requests grow as the nudger decides, others as ever."""
        batch = self.runner.input_batch
        drafts_of = [0] * batch.num_reqs if spec_decode_metadata is None else spec_decode_metadata.num_draft_tokens
        drafted = [] if spec_decode_metadata is None else spec_decode_metadata.draft_token_ids.tolist()
        is_unfinished_prompt = self.runner.discard_request_mask.np
        steps: list[Step] = []
        places, starts, start, draft_start = [], [], 0, 0
        for i, (request_id, number) in enumerate(zip(batch.req_ids, drafts_of, strict=True)):
            draft = drafted[draft_start : draft_start + number]
            starts.append(start)
            is_nudged = self.nudger.is_nudged(request_id, self._request(request_id))
            if is_nudged:
                # Its draws are not vLLM's, which on a CPU cannot set back a generator that read a part of a prompt.
                batch.generators.pop(i, None)
            if is_nudged and not is_unfinished_prompt[i]:
                told = len(self.runner.requests[request_id].output_token_ids)
                steps.append(Step(request_id, told, draft, range(start, start + number + 1)))
                places.append(i)
            start, draft_start = start + number + 1, draft_start + number
        if not steps:
            return self._sample_plain(logits, spec_decode_metadata)
        wants_logprobs = batch.sampling_metadata.max_num_logprobs is not None
        raw = logits.clone() if wants_logprobs else logits  # Sampling may change them in place.
        grown = self.nudger.decide(steps, logits)
        ids = torch.full(
            (batch.num_reqs, max(drafts_of) + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32, device=logits.device
        )
        if len(steps) < batch.num_reqs:
            # Plain requests have no drafts, so that each has one position: the last of its own.
            last = [start + number for start, number in zip(starts, drafts_of, strict=True)]
            plain = self._sample_plain(logits[torch.tensor(last, device=logits.device)], None)
            ids[:, :1] = plain.sampled_token_ids
        for i, new in zip(places, grown, strict=True):
            ids[i, : len(new)] = torch.tensor(new, dtype=ids.dtype)
        return SamplerOutput(ids, self._logprobs(raw, ids, starts) if wants_logprobs else None)

    def propose(self, sampled_token_ids: list[list[int]]) -> list[list[int]]:
        """vLLM's hook: the drafts of all requests of the batch. Those of plain requests are empty."""
        request_ids = self.runner.input_batch.req_ids
        places = [
            i
            for i, (request_id, new) in enumerate(zip(request_ids, sampled_token_ids, strict=True))
            if new and self.nudger.is_nudged(request_id, self._request(request_id))
        ]
        drafts: list[list[int]] = [[] for _ in request_ids]
        for i, draft in zip(places, self.nudger.drafts([request_ids[i] for i in places]), strict=True):
            drafts[i] = draft
        return drafts

    def _request(self, request_id: str) -> Request:
        state = self.runner.requests[request_id]
        return Request(state.prompt_token_ids, state.sampling_params)

    def _logprobs(self, logits: torch.Tensor, ids: torch.Tensor, starts: list[int]) -> Any:
        """The raw logprobs of all tokens by which requests grow, and of the most probable ones.

        Args:
            logits: of shape (positions of all requests, vocab_size).
            ids: of shape (requests, tokens), with placeholders behind those by which a request grows.
            starts: each request's first row of `logits`.
        """
        number = self.runner.input_batch.sampling_metadata.max_num_logprobs
        columns = torch.arange(ids.shape[1], device=logits.device)
        rows = torch.tensor(starts, device=logits.device)[:, None] + columns
        rows = rows.clamp(max=len(logits) - 1).flatten()
        tokens = ids.flatten().clamp(min=0).to(torch.int64)
        return raw_logprobs(logits[rows], tokens, number)
