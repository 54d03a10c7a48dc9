"""A server of vLLM as `nudging-hf vllm` starts it, asked by many clients at once."""

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

import torch
from many_clients import Asked, visit
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf
from nudging_hf.integrations.vllm.launch import vllm_command

THRESHOLDS = [0.4, 0.9]
MOST = 60


@contextlib.contextmanager
def served(models, folder, *more):
    """Serves the pair while the context lasts, and yields the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ["--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", *more]
    command = vllm_command(str(models / "base"), {"model": str(models / "nudging")}, more, on_cpu=True)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / "log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, *command.arguments[1:]],
            env={**os.environ, **command.environment, **environment},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def answers(models, questions, threshold):
    """The texts of a batch in process, which are those of single runs."""
    base, nudging_model = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("base", "nudging"))
    tokenizer, nudging_tokenizer = (
        AutoTokenizer.from_pretrained(models / name, padding_side="left") for name in ("base", "nudging")
    )
    inputs = tokenizer(questions, return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = nudging_hf.generate(
            base,
            **inputs,
            nudging_model=nudging_model,
            tokenizer=tokenizer,
            nudging_tokenizer=nudging_tokenizer,
            nudge_threshold=threshold,
            max_new_tokens=MOST,
        )
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_sixty_four_clients_for_a_minute(models, questions, tmp_path):
    asked = []
    for threshold in THRESHOLDS:
        for question, text in zip(questions[:12], answers(models, questions[:12], threshold), strict=True):
            knobs = {"vllm_xargs": {"nudge_threshold": threshold}}
            asked.append(Asked({"prompt": question, "max_tokens": MOST, "temperature": 0, **knobs}, text))
    with served(models, tmp_path, "--max-num-seqs", "16") as url:
        counts = visit(url, asked, bad={"vllm_xargs": {"nudge_treshold": 0.5}}, clients=64, seconds=60)
        print(counts)
        assert counts.keys() == {"right", "refused", "cancelled"} and min(counts.values()) > 10
        deadline = time.monotonic() + 30
        while not _is_idle(url):
            assert time.monotonic() < deadline
            time.sleep(0.5)


def _is_idle(url):
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    of = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(of)]
    return len(values) == 3 and not any(values)
