"""Tensor parallelism inside vLLM: two worker processes, of which the first has the nudging model."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import ENVIRONMENT

import nudging_hf

ASK = """
import json, sys

from vllm import LLM, SamplingParams, TokensPrompt

from nudging_hf.integrations.vllm.launch import vllm_command

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    options = {"model": given["nudging"]}
    arguments = vllm_command("", options, on_cpu=True).arguments
    drafts = json.loads(arguments[arguments.index("--speculative-config") + 1])
    llm = LLM(
        given["base"], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4, tensor_parallel_size=2,
        async_scheduling=False, disable_log_stats=True, speculative_config=drafts,
        worker_cls="nudging_hf.integrations.vllm.worker.NudgingCPUWorker", additional_config={"nudging": options},
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in given["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=80), use_tqdm=False)
    print("ANSWERS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.filterwarnings("default")
def test_answers_of_two_ranks_are_those_in_process(models, questions, tmp_path):
    base, nudging_model = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in ("base", "nudging")
    )
    tokenizer, nudging_tokenizer = (AutoTokenizer.from_pretrained(models / name) for name in ("base", "nudging"))
    prompts = [tokenizer(text)["input_ids"] for text in questions[:6]]
    expected = [
        nudging_hf.generate(
            base,
            torch.tensor([prompt]),
            nudging_model=nudging_model,
            tokenizer=tokenizer,
            nudging_tokenizer=nudging_tokenizer,
            max_new_tokens=80,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    given = {"base": str(models / "base"), "nudging": str(models / "nudging"), "prompts": prompts}
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    environment = {**os.environ, **ENVIRONMENT, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(given)], env=environment, capture_output=True, text=True, timeout=600
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("ANSWERS ")) == expected
