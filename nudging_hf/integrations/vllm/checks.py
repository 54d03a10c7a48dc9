"""Refuses, when a worker of vLLM starts, what nudging cannot do there. It imports nothing of vLLM."""

from __future__ import annotations

import inspect
from typing import Any

from packaging.version import Version
from transformers.utils import logging

logger = logging.get_logger(__name__)

OLDEST, NEWEST = "0.29", "0.32"  # Both were tried.

# What is replaced, called or read of each model runner: the names of its attributes, and the parameters of methods.
_PARAMETERS_V1 = {"_sample": ["logits", "spec_decode_metadata"]}
_ATTRIBUTES_V1 = ("drafter", "input_batch", "requests", "discard_request_mask")
_PARAMETERS_V2 = {
    "sample": ["hidden_states", "input_batch", "grammar_output"],
    "add_requests": ["scheduler_output"],
    "finish_requests": ["scheduler_output"],
}
_ATTRIBUTES_V2 = ("speculator", "model", "device")


def validate_config(vllm_config: Any, method: str) -> None:
    """Raises a `ValueError` for a setup in which nudging would not work or would not be the same.

    Args:
        vllm_config: vLLM's.
        method: the speculative method that keeps the place of the drafts.
    """
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"`--pipeline-parallel-size` is {parallel.pipeline_parallel_size}, and the stages of a pipeline do not "
            "share what was sampled: use `--tensor-parallel-size`."
        )
    if getattr(parallel, "data_parallel_size", 1) > 1:
        raise ValueError(
            f"`--data-parallel-size` is {parallel.data_parallel_size}, and its engines step together: start an engine "
            "for each, behind a load balancer."
        )
    if speculative is None or speculative.method != method:
        given = None if speculative is None else speculative.method
        raise ValueError(
            f"Drafts need `--speculative-config` with the method {method!r} for this model runner, got {given!r}: "
            "start vLLM with the command that `nudging-hf vllm` writes."
        )
    if vllm_config.scheduler_config.async_scheduling:
        raise ValueError(
            "Asynchronous scheduling samples before it is known who writes: give `--no-async-scheduling`."
        )
    if vllm_config.model_config.is_encoder_decoder:
        raise ValueError("The base is an encoder-decoder model: give a decoder-only one.")
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        raise ValueError("Batch-sharded sampling divides the requests among ranks: start vLLM without it.")


def validate_version(version: str) -> None:
    """Logs a warning for a version of vLLM that was not tried."""
    if not Version(OLDEST).release <= Version(version).release[:2] <= Version(NEWEST).release:
        logger.warning("vLLM %s was not tried with nudging, which knows %s to %s.", version, OLDEST, NEWEST)


def validate_runner(runner: Any, is_v2: bool) -> None:
    """Raises a `RuntimeError` if a runner of vLLM lacks what nudging replaces, calls or reads.

    Args:
        runner: vLLM's `GPUModelRunner`.
        is_v2: whether it is the second model runner.
    """
    parameters, attributes = (_PARAMETERS_V2, _ATTRIBUTES_V2) if is_v2 else (_PARAMETERS_V1, _ATTRIBUTES_V1)
    for name, expected in parameters.items():
        method = getattr(runner, name, None)
        found = None if method is None else [*inspect.signature(method).parameters]
        if found != expected:
            raise RuntimeError(_unknown(f"`{type(runner).__name__}.{name}` takes {expected}", f"it takes {found}"))
    for name in attributes:
        if not hasattr(runner, name):
            raise RuntimeError(_unknown(f"`{type(runner).__name__}` has `{name}`", "it has not"))


def _unknown(expected: str, found: str) -> str:
    return (
        f"This version of vLLM is not known to nudging: it expects that {expected}, and {found}. "
        f"Install a version from {OLDEST} to {NEWEST}, or another version of nudging-hf."
    )
