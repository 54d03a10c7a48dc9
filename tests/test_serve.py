"""`nudging-hf serve` with the pair in miniature, asked by OpenAI's client over a socket."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from documents import blocks_of
from transformers import AutoModelForCausalLM

import nudging_hf
from nudging_hf import cli
from nudging_hf.pair import Pair
from nudging_hf.server.serving import GracefulServer
from nudging_hf.study.prompt_files import read_labelled_prompts

pytest.importorskip("openai", reason="comes with transformers[serving]")
import openai
from fake_engine import FakeEngine
from many_clients import Asked, visit

EXAMPLE = Path(nudging_hf.__file__).parents[1] / "examples" / "mini"
MINI = EXAMPLE / "models"
TEMPLATE = "{system}\n{user}\n"
QUESTIONS = read_labelled_prompts(EXAMPLE / "heldout.jsonl")[::50]
CHAT = list(QUESTIONS[0].messages)
KEY = "a secret of the tests"
ENDLESS = {"max_tokens": 1500, "extra_body": {"min_tokens": 1500, "nudge_threshold": 1.1}}


@contextlib.contextmanager
def served(log, *options):
    """Serves the pair on a free port while the context lasts, and yields the process and the address of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", "--base", MINI / "base", "--nudging-model", MINI / "nudging", "--base-template", TEMPLATE]
    code = "import sys; from nudging_hf.cli import main; sys.exit(main())"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *arguments, "--served-model-name", "mini",
             "--port", str(port), *options],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NUDGING_HF_API_KEY": KEY},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.terminate()
        # uvicorn ends in order and then, as is usual, by the signal itself.
        assert process.wait(60) == -signal.SIGTERM, log.read_text()
        assert KEY not in log.read_text() and "Traceback" not in log.read_text(), log.read_text()


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served") / "log") as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(url):
    return client_of(url)


@pytest.fixture(scope="module")
def pair():
    return Pair.of(*(AutoModelForCausalLM.from_pretrained(MINI / name) for name in ("base", "nudging")))


@pytest.fixture(scope="module")
def nudged(pair):
    """A function that returns the answer of `nudging_hf.generate`, as text and with its authors."""

    def answer(messages=CHAT, inputs=None, seed=0, **settings):
        torch.manual_seed(seed)
        inputs = pair.inputs(messages, TEMPLATE) if inputs is None else inputs
        output = pair.generate(
            inputs, **{"max_new_tokens": 256, "do_sample": False} | settings, return_dict_in_generate=True
        )
        return nudging_hf.spans_of(output, pair.tokenizer)[0], output

    return answer


def text_of(spans):
    return "".join(span.text for span in spans)


def metrics_of(url):
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_answer_is_that_of_generate_and_says_who_wrote_it(client, nudged):
    spans, output = nudged()
    reply = client.chat.completions.create(model="mini", messages=CHAT)
    (choice,) = reply.choices
    assert choice.message.content == text_of(spans) and choice.finish_reason == "stop"
    assert choice.nudging["spans"] == [[span.start, span.end] for span in spans if span.nudged]
    assert choice.nudging["rate"] == pytest.approx(output.nudge_rate.item())
    assert choice.nudging["finish_reason"] == output.finish_reasons[0]
    assert reply.usage.completion_tokens == output.nudged_mask.shape[1] - (output.finish_reasons[0] == "eos")


def test_a_stream_is_the_answer(client, nudged):
    spans, _ = nudged()
    chunks = list(client.chat.completions.create(
        model="mini", messages=CHAT, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == text_of(spans) and len(choices) > 5
    told = {place for choice in choices if choice.delta.content for first, last in choice.nudging["spans"]
            for place in range(first, last)}  # fmt: skip
    assert told == {place for span in spans if span.nudged for place in range(span.start, span.end)}
    assert chunks[-1].usage.completion_tokens > 5 and not chunks[-1].choices


def test_the_lines_of_the_server_s_page_run(url, capsys):
    [block] = blocks_of("docs/server.md", "python")
    exec(block.text.replace('"http://127.0.0.1:8000/v1"', f'"{url}/v1"').replace('"none"', repr(KEY)), {})
    assert "So the answer is 19." in capsys.readouterr().out


def test_fields_reach_generate(client, nudged):
    knobs = {"nudge_threshold": 1.01, "takeover_on_agreement": False}
    reply = client.chat.completions.create(model="mini", messages=CHAT, max_tokens=40, extra_body=knobs)
    assert reply.choices[0].message.content == text_of(nudged(**knobs, max_new_tokens=40)[0])
    assert reply.choices[0].finish_reason == "length"
    drawn = [
        client.chat.completions.create(model="mini", messages=CHAT, temperature=3, seed=seed, max_tokens=60)
        for seed in (1, 1, 2)
    ]
    texts = [reply.choices[0].message.content for reply in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == text_of(nudged(seed=1, do_sample=True, temperature=3.0, max_new_tokens=60)[0])


def test_a_plain_prompt_and_several(client, nudged, pair):
    prompts = [f"{question.messages[-1]['content']}\n" for question in QUESTIONS[:3]]
    reply = client.completions.create(model="mini", prompt=prompts, max_tokens=80, temperature=0)
    inputs = [pair.tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    expected = [text_of(nudged(inputs=each, max_new_tokens=80)[0]) for each in inputs]
    assert [choice.text for choice in reply.choices] == expected
    assert reply.usage.prompt_tokens == sum(each["input_ids"].shape[1] for each in inputs)


def test_stop_strings(client, nudged):
    whole = text_of(nudged()[0])
    stop = whole[20:23]
    for stream in (False, True):
        reply = client.chat.completions.create(model="mini", messages=CHAT, stop=[stop, "never"], stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        else:
            text = reply.choices[0].message.content
            assert (
                reply.choices[0].finish_reason == "stop" and reply.choices[0].nudging["finish_reason"] == "stop_string"
            )
        assert text == whole[: whole.index(stop)]


def test_logprobs(client, nudged):
    reply = client.chat.completions.create(model="mini", messages=CHAT, logprobs=True, top_logprobs=3, max_tokens=30)
    content = reply.choices[0].logprobs.content
    _, output = nudged(max_new_tokens=30, output_logits=True)
    ids = output.sequences[0, -len(content) :].tolist()
    for place, (token, each) in enumerate(zip(ids, content, strict=True)):
        own = output.logits[place][0].log_softmax(-1)
        assert each.logprob == pytest.approx(own[token].item(), abs=1e-3)
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(own.topk(3).values.tolist(), abs=1e-3)
    assert "".join(each.token for each in content) == reply.choices[0].message.content
    chunks = client.completions.create(model="mini", prompt="So", logprobs=2, max_tokens=9, stream=True)
    tokens = [token for chunk in chunks if (told := chunk.choices[0].logprobs) for token in told.tokens]
    assert len(tokens) == 9


def test_many_clients_at_once_get_the_answers_of_single_calls(client, nudged):
    ways = [{}, {"nudge_threshold": 0.6}, {"max_new_tokens": 20}, {"do_sample": True, "temperature": 0.8}]
    asked = [(list(question.messages), ways[i % len(ways)]) for i, question in enumerate(QUESTIONS)]

    def ask(messages, way):
        fields = {"temperature": way.get("temperature", 0), "max_tokens": way.get("max_new_tokens", 256), "seed": 7}
        knobs = {name: value for name, value in way.items() if name.startswith("nudge")}
        reply = client.chat.completions.create(model="mini", messages=messages, **fields, extra_body=knobs)
        return reply.choices[0].message.content

    with ThreadPoolExecutor(len(asked)) as clients:
        found = list(clients.map(ask, *zip(*asked, strict=True)))
    assert found == [text_of(nudged(messages, seed=7, **way)[0]) for messages, way in asked]


def test_refusals(client, url):
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="mini", messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError, match="nudge_threshold"):
        client.chat.completions.create(model="mini", messages=CHAT, extra_body={"nudge_threshold": -1}, stream=True)
    with pytest.raises(openai.BadRequestError, match="context has 2048"):
        client.completions.create(model="mini", prompt="word " * 2100)
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.chat.completions.create(model="gpt", messages=CHAT)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["mini"]


def test_a_client_that_leaves_makes_room(client, url):
    counted = 'nudging_hf_requests_total{endpoint="chat.completions",outcome="cancelled"}'
    stream = client.chat.completions.create(model="mini", messages=CHAT, stream=True, **ENDLESS)
    next(iter(stream))
    assert metrics_of(url)["nudging_hf_answers_running"] == 1
    stream.close()
    wait_until(lambda: metrics_of(url)["nudging_hf_answers_running"] == 0 and metrics_of(url)[counted] == 1)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=2).chat.completions.create(model="mini", messages=CHAT, **ENDLESS)
    wait_until(lambda: metrics_of(url)["nudging_hf_answers_running"] == 0 and metrics_of(url)[counted] == 2)


def test_back_pressure_and_an_end_in_order(tmp_path):
    with served(tmp_path / "log", "--max-requests", "1", "--max-queue", "1", "--grace", "60") as (process, url):
        client, waited = client_of(url), []

        def wait():
            try:
                client.chat.completions.create(model="mini", messages=CHAT, **ENDLESS)
            except openai.APIError as error:
                waited.append(error)

        limits = {"max_tokens": 500, "extra_body": {"min_tokens": 500, "nudge_threshold": 1.1}}
        stream = iter(client.chat.completions.create(model="mini", messages=CHAT, stream=True, **limits))
        next(stream)
        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: metrics_of(url)["nudging_hf_answers_waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="mini", messages=CHAT)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        process.send_signal(signal.SIGTERM)
        waiting.join(20)
        assert isinstance(waited[0], openai.InternalServerError) and waited[0].status_code == 503
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        process.wait(60)


def test_after_the_grace_a_running_answer_is_given_up(tmp_path):
    with served(tmp_path / "log", "--grace", "0") as (process, url):
        stream = client_of(url).chat.completions.create(model="mini", messages=CHAT, stream=True, **ENDLESS)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        process.wait(60)


@contextlib.contextmanager
def inference_engine(base, tokenizer):
    """Serves a base on a free port while the context lasts, as an inference engine does, and yields its address."""
    app = FakeEngine(base, tokenizer, context=300)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(20)


def test_the_base_may_run_elsewhere(pair, nudged, monkeypatch):
    """A client asks this server, which asks an inference engine over a socket."""
    spans, output = nudged(max_new_tokens=60)
    replies = {}

    def run(server):
        app, chat = server.config.app, {"messages": CHAT, "max_tokens": 60}

        async def ask():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as asking:
                posts = [{}, {"stream": True}, {"logprobs": True}, {"presence_penalty": 1}, {"max_tokens": 290}]
                found = await asyncio.gather(
                    *(asking.post("/v1/chat/completions", json=chat | more) for more in posts)
                )
                replies.update(zip(("whole", "stream", "logprobs", "penalty", "long"), found, strict=True))
                replies["metrics"] = await asking.get("/metrics")
                await server._engine.shutdown(0)

        asyncio.run(ask())

    monkeypatch.setattr(GracefulServer, "run", run)
    with inference_engine(pair.base, pair.tokenizer) as (engine, url):
        arguments = ["serve", "--base", MINI / "base", "--nudging-model", MINI / "nudging", "--base-url", url]
        assert cli.main([str(each) for each in arguments] + ["--base-model", "base", "--base-template", TEMPLATE]) == 0
    (choice,) = replies["whole"].json()["choices"]
    assert choice["message"]["content"] == text_of(spans)
    assert choice["nudging"]["spans"] == [[span.start, span.end] for span in spans if span.nudged]
    assert replies["whole"].json()["usage"]["completion_tokens"] == output.nudged_mask.shape[1]
    events = [json.loads(line[6:]) for line in replies["stream"].text.split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text_of(spans)
    for name, said in (("logprobs", "`logprobs`"), ("penalty", "`presence_penalty`"), ("long", "context has 300")):
        assert replies[name].status_code == 400 and said in replies[name].json()["error"]["message"]
    assert 'nudging_hf_forward_passes_total{model="base"} 0.0' not in replies["metrics"].text
    assert {body["model"] for body in engine.bodies} == {"base"}


def test_without_the_extra_an_error_names_it(monkeypatch, capsys):
    for name in ("nudging_hf.server.app", "nudging_hf.server.serving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve", "--base", str(MINI / "base"), "--nudging-model", str(MINI / "nudging")]) == 2
    assert "nudging-hf[serve]" in capsys.readouterr().err


@pytest.mark.parametrize("options, said", [
    (["--base-template", "no field"], "{user}"), (["--threshold", "-1"], "nudge_threshold"),
    (["--base", "./nowhere"], "nowhere"),
    (["--retry-for", "3"], "--base-url"),
    (["--base-url", "http://127.0.0.1:9/v1", "--num-draft-tokens", "3"], "--num-draft-tokens"),
    (["--base-url", "http://127.0.0.1:9/v1", "--retry-for", "0"], "cannot be reached"),
    (["--base-url", "http://127.0.0.1:9/v1", "--gate", "entropy"], "probabilities of all tokens"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_is_served(options, said, capsys):
    models = ["--base", str(MINI / "base"), "--nudging-model", str(MINI / "nudging")]
    assert cli.main(["serve", *models, *options]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["serve", *models, "--port", "70000"])


def test_the_key_is_no_part_of_the_help(monkeypatch, capsys):
    monkeypatch.setenv("NUDGING_HF_API_KEY", KEY)
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    said = capsys.readouterr().out
    assert KEY not in said and "NUDGING_HF_API_KEY" in said


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_sixty_four_clients_for_a_minute(elsewhere, pair, tmp_path):
    asked = []
    for prompt in QUESTIONS:
        inputs = pair.inputs([list(prompt.messages)], TEMPLATE)
        text = pair.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
        for threshold in (0.4, 0.9):
            body = {"model": "mini", "prompt": text, "max_tokens": 60, "temperature": 0, "nudge_threshold": threshold}
            ids = pair.tokenizer(text, return_tensors="pt")
            written = pair.generate(ids, nudge_threshold=threshold, max_new_tokens=60, do_sample=False)
            answer = written[0, ids["input_ids"].shape[1] :]
            asked.append(Asked(body, pair.tokenizer.decode(answer, skip_special_tokens=True)))
    with contextlib.ExitStack() as stack:
        options = ["--max-requests", "16", "--max-queue", "32"]
        if elsewhere:
            _, engine_url = stack.enter_context(inference_engine(pair.base, pair.tokenizer))
            options += ["--base-url", engine_url, "--base-model", "base"]
        _, url = stack.enter_context(served(tmp_path / "log", *options))
        counts = visit(url, asked, bad={"nudge_treshold": 0.5}, clients=64, seconds=60, key=KEY)
        assert counts.keys() == {"right", "refused", "cancelled", "busy"} and min(counts.values()) > 10, counts
        wait_until(lambda: not metrics_of(url)["nudging_hf_answers_running"])
        assert not metrics_of(url)["nudging_hf_answers_waiting"]
