"""A server of vLLM as `nudging-hf vllm` starts it, asked by many clients at once."""

import json
import time
import urllib.error
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


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    command = vllm_command(str(models / "base"), {"model": str(models / "nudging")}, on_cpu=True)
    log = tmp_path_factory.mktemp("server") / "log"
    started = Server([*command.arguments[3:], "--max-num-seqs", "16"], log, command.environment)
    started.start()
    yield started
    started.end()


def answers(models, questions, threshold):
    """The texts of a batch in process, which are those of single runs, and who wrote them."""
    base, nudging_model = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("base", "nudging"))
    tokenizer, nudging_tokenizer = (
        AutoTokenizer.from_pretrained(models / name, padding_side="left") for name in ("base", "nudging")
    )
    inputs = tokenizer(questions, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = nudging_hf.generate(
            base,
            **inputs,
            nudging_model=nudging_model,
            tokenizer=tokenizer,
            nudging_tokenizer=nudging_tokenizer,
            nudge_threshold=threshold,
            max_new_tokens=MOST,
            return_dict_in_generate=True,
        )
    found = []
    for spans, rate, reason in zip(
        nudging_hf.spans_of(output, tokenizer), output.nudge_rate.tolist(), output.finish_reasons, strict=True
    ):
        nudged = [[span.start, span.end] for span in spans if span.nudged]
        report = {"spans": nudged, "rate": pytest.approx(rate), "finish_reason": reason}
        found.append(("".join(span.text for span in spans), report))
    return found


def ask(url, **body):
    """The reply, or the chunks of a stream, of `/v1/completions`."""
    data = json.dumps({"max_tokens": MOST, "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        if not body.get("stream"):
            return json.load(reply)
        lines = [line.removeprefix(b"data: ") for line in reply if line.startswith(b"data: {")]
        return [json.loads(line) for line in lines]


def test_a_reply_tells_who_wrote_it(server, models, questions):
    expected = answers(models, questions[:4], 0.4)
    choices = ask(server.url, prompt=questions[:4])["choices"]
    assert [(choice["text"], choice["nudging"]) for choice in choices] == expected
    nudged = [set() for _ in expected]
    for chunk in ask(server.url, prompt=questions[:4], stream=True):
        [choice] = chunk["choices"]
        for start, end in choice.get("nudging", {}).get("spans", ()):
            nudged[choice["index"]] |= set(range(start, end))
        if choice["finish_reason"]:
            _, report = expected[choice["index"]]
            assert choice["nudging"] == {**report, "spans": choice["nudging"]["spans"]}
    assert nudged == [{i for start, end in report["spans"] for i in range(start, end)} for _, report in expected]
    text, report = expected[0]
    [stopped] = ask(server.url, prompt=questions[0], stop=text.split()[2], n=1)["choices"]
    assert text.startswith(stopped["text"]) and stopped["nudging"]["finish_reason"] == "stop_string"
    size = len(stopped["text"])
    assert stopped["nudging"]["spans"] == [[a, min(b, size)] for a, b in report["spans"] if a < size]
    plain = ask(server.url, prompt=questions[0], vllm_xargs={"nudging": 0})["choices"]
    assert "nudging" not in plain[0]


def test_a_request_that_fails_in_the_worker_is_an_error(server, questions):
    bad = {"prompt": questions[0], "vllm_xargs": {"nudging_input_ids": [10**6]}}
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(server.url, **bad)
    assert error.value.code == 400 and "nudging" in json.load(error.value)["error"]["message"]
    assert [set(chunk) for chunk in ask(server.url, **bad, stream=True)] == [{"error"}]


def test_sixty_four_clients_for_a_minute(server, models, questions):
    asked = []
    for threshold in THRESHOLDS:
        for question, (text, _) in zip(questions[:12], answers(models, questions[:12], threshold), strict=True):
            knobs = {"vllm_xargs": {"nudge_threshold": threshold}}
            asked.append(Asked({"prompt": question, "max_tokens": MOST, "temperature": 0, **knobs}, text))
    counts = visit(server.url, asked, {"vllm_xargs": {"nudge_treshold": 0.5}}, clients=64, seconds=60)
    assert counts.keys() == {"right", "refused", "cancelled"} and min(counts.values()) > 10, counts
    deadline = time.monotonic() + 30
    while not _is_idle(server.url):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _is_idle(url):
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    of = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(of)]
    return len(values) == 3 and not any(values)
