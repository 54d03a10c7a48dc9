"""Connects nudging with vLLM's second model runner, the default on GPUs.

Replaced on the instance: `GPUModelRunner.sample` and `speculator.propose`. Wrapped: `add_requests` and
`finish_requests`. This runner has no proposers of one's own, so the method "ngram" keeps the place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from .logprobs import raw_logprobs
from .nudger import Nudger, Request, Step, reads_prompts

METHOD = "ngram"


@dataclass
class _Known:
    """A request that the runner has: what was asked, and the tokens by which it has grown."""

    request: Request
    output: list[int] = field(default_factory=list)


class Connection:
    """Takes the place of a runner's sampling and drafting.

    Args:
        runner: vLLM's `GPUModelRunner`.
        nudger: decides.
    """

    def __init__(self, runner: Any, nudger: Nudger):
        self.runner = runner
        self.nudger = nudger
        self._known: dict[str, _Known] = {}
        self._sample_plain, runner.sample = runner.sample, self.sample
        runner.speculator.propose = self.propose
        self._add_requests, runner.add_requests = runner.add_requests, self.add_requests
        self._finish_requests, runner.finish_requests = runner.finish_requests, self.finish_requests

    def begin_pass(self, scheduler_output: Any) -> None:
        """The engine begins a step."""
        self.nudger.begin_pass(reads_prompts(scheduler_output))

    def add_requests(self, scheduler_output: Any) -> None:
        """Notes what new requests ask for. A request that was preempted comes again, and keeps its answer."""
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id not in self._known:
                self._known[new.req_id] = _Known(Request(list(new.prompt_token_ids), new.sampling_params))
        self._add_requests(scheduler_output)

    def finish_requests(self, scheduler_output: Any) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self._known.pop(request_id, None)
            self.nudger.forget(request_id)
        self._finish_requests(scheduler_output)

    def sample(
        self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """In the place of `GPUModelRunner.sample`: nudged requests grow as the nudger decides, others as ever."""
        batch = input_batch
        nudged = self._nudged(batch)
        if not nudged:
            return self._plain(hidden_states, batch, grammar_output)
        logits = self.runner.model.compute_logits(hidden_states[batch.logits_indices])
        read = batch.input_ids[batch.logits_indices.long()].tolist()
        ends = batch.cu_num_logits_np.tolist()
        steps = [
            Step(
                request_id,
                len(self._known[request_id].output),
                read[ends[i] + 1 : ends[i + 1]],
                range(ends[i], ends[i + 1]),
            )
            for i, request_id in nudged.items()
        ]
        grown = dict(zip(nudged, self.nudger.decide(steps, logits), strict=True))
        width = int((batch.cu_num_logits_np[1:] - batch.cu_num_logits_np[:-1]).max())
        device = logits.device
        ids = torch.zeros(batch.num_reqs, width, dtype=torch.int64, device=device)
        sampled = torch.zeros(batch.num_reqs, dtype=torch.int32, device=device)
        rejected = torch.zeros(batch.num_reqs, dtype=torch.int32, device=device)
        num_nans = None
        if self._has_plain(batch, nudged):
            output, plain_sampled, plain_rejected = self._sample_plain(hidden_states, batch, grammar_output)
            plain_ids = output.sampled_token_ids
            ids[:, : plain_ids.shape[1]] = plain_ids[:, :width]
            sampled, rejected, num_nans = plain_sampled.clone(), plain_rejected.clone(), output.num_nans
        for i, new in grown.items():
            ids[i, : len(new)] = torch.tensor(new, device=device)
            sampled[i] = len(new)
            rejected[i] = ends[i + 1] - ends[i] - len(new)
        self._note(batch, ids, sampled)
        logprobs = self._logprobs(logits, ids, sampled.tolist(), ends, batch)
        output = SamplerOutput(ids, logprobs, num_nans, sampled, rejected)
        return output, sampled, rejected

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In the place of the speculator's: drafts of shape (requests, draft length). They are filled with zeros."""
        width = self.nudger.num_draft_tokens
        drafts = torch.zeros(input_batch.num_reqs, width, dtype=torch.int64, device=self.runner.device)
        rows = {
            i: request_id
            for i, request_id in enumerate(input_batch.req_ids)
            if request_id in self._known
            and self._known[request_id].output
            and self.nudger.is_nudged(request_id, self._known[request_id].request)
        }
        for i, draft in zip(rows, self.nudger.drafts(list(rows.values())), strict=True):
            drafts[i, : len(draft)] = torch.tensor(draft, dtype=torch.int64)
        return drafts

    def _nudged(self, batch: Any) -> dict[int, str]:
        """The nudged requests of a batch whose prompt has been read, by their places."""
        ends = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens
        is_read = (ends >= batch.prefill_len_np).tolist()
        return {
            i: request_id
            for i, request_id in enumerate(batch.req_ids)
            if is_read[i]
            and request_id in self._known
            and self.nudger.is_nudged(request_id, self._known[request_id].request)
        }

    def _has_plain(self, batch: Any, nudged: dict[int, str]) -> bool:
        return any(
            i not in nudged and not self.nudger.is_nudged(request_id, self._known[request_id].request)
            for i, request_id in enumerate(batch.req_ids)
            if request_id in self._known
        )

    def _plain(self, hidden_states: torch.Tensor, batch: Any, grammar_output: Any) -> Any:
        output, sampled, rejected = self._sample_plain(hidden_states, batch, grammar_output)
        self._note(batch, output.sampled_token_ids, sampled)
        return output, sampled, rejected

    def _note(self, batch: Any, ids: torch.Tensor, sampled: torch.Tensor) -> None:
        numbers = sampled.tolist()
        for request_id, new, number in zip(batch.req_ids, ids.tolist(), numbers, strict=True):
            if request_id in self._known:
                self._known[request_id].output += new[:number]

    def _logprobs(
        self, logits: torch.Tensor, ids: torch.Tensor, sampled: list[int], ends: list[int], batch: Any
    ) -> Any:
        """The raw logprobs of all tokens by which requests grow, if some request wants them.

        Args:
            logits: of shape (positions of all requests, vocab_size).
            ids: of shape (requests, tokens), of which the first `sampled` of each request count.
            ends: where the positions of each request begin, and where the last ones end.
        """
        dims = self.runner.sampler.get_logprobs_dims(batch.idx_mapping_np, include_token_ids=False)
        if dims is None:
            return None
        tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        for row, number, start in zip(ids, sampled, ends[:-1], strict=True):
            tokens[start : start + number] = row[:number]
        logprobs = raw_logprobs(logits, tokens, dims[0])
        return logprobs._replace(cu_num_generated_tokens=ends) if len(logits) != batch.num_reqs else logprobs
