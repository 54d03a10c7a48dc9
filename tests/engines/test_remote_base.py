"""A remote base whose engine, a real vLLM server, is killed and started again. `make test-engines` runs it."""

import asyncio
import signal

import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import Server

import nudging_hf
from nudging_hf.integrations.openai import RemoteBase

SETTINGS = {"max_new_tokens": 120, "nudge_threshold": 0.4}


@pytest.mark.filterwarnings("default")
def test_a_killed_engine_costs_time_and_no_answer(models, questions, tmp_path):
    base, nudging_model = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in ("base", "nudging")
    )
    tokenizer, nudging_tokenizer = (AutoTokenizer.from_pretrained(models / name) for name in ("base", "nudging"))
    nudging = {"nudging_model": nudging_model, "nudging_tokenizer": nudging_tokenizer, **SETTINGS}
    prompts = [tokenizer(text)["input_ids"] for text in questions[:8]]
    expected = [
        nudging_hf.generate(base, torch.tensor([prompt]), tokenizer=tokenizer, **nudging)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    named = ["--model", str(models / "base"), "--served-model-name", "base", "--max-num-seqs", "8"]
    server = Server(named, tmp_path / "log")

    async def run():
        server.start()
        async with RemoteBase(f"{server.url}/v1", "base", models / "base", timeout=60) as remote:
            assert (await remote.check()).context_length == 512
            answers = asyncio.create_task(remote.generate(prompts, **nudging))
            while remote.counts().base_tokens < 40 * len(prompts):
                await asyncio.sleep(0.01)
            server.end(signal.SIGKILL)
            before = remote.counts().base_tokens
            await asyncio.sleep(5)
            assert not answers.done() and remote.counts().base_tokens < before + 100
            await asyncio.to_thread(server.start)
            return await asyncio.wait_for(answers, 500)

    try:
        answers = asyncio.run(run())
    finally:
        server.end(signal.SIGKILL)
    assert [answer.error for answer in answers] == [None] * len(prompts)
    assert [answer.ids for answer in answers] == expected
    assert sum(answer.requests for answer in answers) > len(prompts)
