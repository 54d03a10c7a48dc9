"""A remote base whose engine, a real vLLM server, is killed and started again. `make test-engines` runs it."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf
from nudging_hf.integrations.openai import RemoteBase

SETTINGS = {"max_new_tokens": 120, "nudge_threshold": 0.4}


class Server:
    """A vLLM server of a base on a port that stays its own."""

    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, log

    def start(self):
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model,
            "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32",
            "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager",
        ]  # fmt: skip
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("a") as said:  # A session of its own, so that all its processes can be killed at once.
            self.process = subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    async def ready(self):
        deadline = time.monotonic() + 400
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            await asyncio.sleep(0.5)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


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
    server = Server(models / "base", tmp_path / "log")

    async def run():
        server.start()
        await server.ready()
        async with RemoteBase(f"http://127.0.0.1:{server.port}/v1", "base", models / "base", timeout=60) as remote:
            assert (await remote.check()).context_length == 512
            answers = asyncio.create_task(remote.generate(prompts, **nudging))
            while remote.counts().base_tokens < 40 * len(prompts):
                await asyncio.sleep(0.01)
            server.kill()
            before = remote.counts().base_tokens
            await asyncio.sleep(5)
            assert not answers.done() and remote.counts().base_tokens < before + 100
            server.start()
            return await asyncio.wait_for(answers, 500)

    try:
        answers = asyncio.run(run())
    finally:
        server.kill()
    assert [answer.error for answer in answers] == [None] * len(prompts)
    assert [answer.ids for answer in answers] == expected
    assert sum(answer.requests for answer in answers) > len(prompts)
