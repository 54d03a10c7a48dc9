"""A server of vLLM as `nudging-hf vllm` starts it, asked by many clients at once."""

import time
import urllib.request

import pytest

pytest.importorskip("vllm")

import torch
from many_clients import Asked, visit
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import Server

import nudging_hf
from nudging_hf.integrations.vllm.launch import vllm_command

THRESHOLDS = [0.4, 0.9]
MOST = 60


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
    command = vllm_command(str(models / "base"), {"model": str(models / "nudging")}, on_cpu=True)
    server = Server([*command.arguments[3:], "--max-num-seqs", "16"], tmp_path / "log", command.environment)
    server.start()
    try:
        counts = visit(server.url, asked, {"vllm_xargs": {"nudge_treshold": 0.5}}, clients=64, seconds=60)
        assert counts.keys() == {"right", "refused", "cancelled"} and min(counts.values()) > 10, counts
        deadline = time.monotonic() + 30
        while not _is_idle(server.url):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    finally:
        server.end()


def _is_idle(url):
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    of = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(of)]
    return len(values) == 3 and not any(values)
