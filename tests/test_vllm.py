"""Nudging inside vLLM, as far as it can be tested without vLLM: requests, decisions, middleware, checks, command."""

import asyncio
import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from running import KINDS, nudge, pair_with_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf
from nudging_hf import provenance
from nudging_hf.cli import main
from nudging_hf.core.transformers_private import own_eos_token_ids
from nudging_hf.hub import plain_chat_template
from nudging_hf.integrations.described_base import described_base
from nudging_hf.integrations.vllm import checks, reports
from nudging_hf.integrations.vllm.launch import PLAIN_CHAT_TEMPLATE, vllm_command
from nudging_hf.integrations.vllm.middleware import NudgingMiddleware
from nudging_hf.integrations.vllm.nudger import Nudger, Request, Step
from nudging_hf.integrations.vllm.params import CountPenalties, generate_arguments, validate_params
from nudging_hf.integrations.vllm.replies import choice_index


def sampling_params(**changes):
    """What is read of vLLM's `SamplingParams`, with its defaults for a greedy request."""
    values = {
        "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": None, "max_tokens": 24, "min_tokens": 0,
        "ignore_eos": False, "stop_token_ids": [], "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "allowed_token_ids": None, "bad_words_token_ids": None,
        "logprobs": None, "extra_args": None,
    }  # fmt: skip
    assert set(changes) <= {*values, "structured_outputs", "thinking_token_budget"}
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture(scope="module", params=KINDS)
def stored(request, tmp_path_factory):
    """A pair in folders, and prompts for its base."""
    pair, prompts, _ = pair_with_prompts("llama", request.param, seed=3, rows=6)
    folder = tmp_path_factory.mktemp(request.param)
    pair.base.save_pretrained(folder / "base")
    pair.tokenizer.save_pretrained(folder / "base")
    pair.nudging_model.save_pretrained(folder / "nudging")
    pair.nudging_tokenizer.save_pretrained(folder / "nudging")
    return pair, prompts, folder


def nudger_of(folder, options=None, **more) -> Nudger:
    options = {"model": str(folder / "nudging"), "num_draft_tokens": 4, **(options or {})}
    settings = {"max_model_len": 200, "max_rows": 4, "num_draft_tokens": 6, "device": torch.device("cpu"), **more}
    return Nudger(options, str(folder / "base"), {}, **settings)


@torch.no_grad()
def answers(nudger: Nudger, base, requests: dict[str, Request]) -> dict[str, list[int]]:
    """What an engine writes that runs all requests at each step, and stops at EOS or at `max_tokens`."""
    texts: dict[str, list[int]] = {name: [] for name in requests}
    drafts: dict[str, list[int]] = {name: [] for name in requests}
    done: dict[str, list[int]] = {}
    while texts:
        steps, rows, start = [], [], 0
        for name, text in texts.items():
            assert nudger.is_nudged(name, requests[name])
            ids = [*requests[name].prompt, *text, *drafts[name]]
            number = len(drafts[name]) + 1
            rows.append(base(torch.tensor([ids]), use_cache=False).logits[0, -number:])
            steps.append(Step(name, len(text), drafts[name], range(start, start + number)))
            start += number
        nudger.begin_pass(reads_prompts=False)
        for step, new in zip(steps, nudger.decide(steps, torch.cat(rows)), strict=True):
            assert 0 < len(new) <= len(step.draft) + 1
            texts[step.request_id] += new
        for name in list(texts):
            text, most = texts[name], requests[name].params.max_tokens
            if len(text) >= most or text[-1] in own_eos_token_ids(base):
                done[name] = text[:most]
                nudger.forget(name)
                del texts[name]
        drafts = dict(zip(texts, nudger.drafts(list(texts)), strict=True))
    return done


CHANGES = [
    {},
    {"extra_args": {"nudge_threshold": 0.7, "word_boundary": "unicode"}},
    {"extra_args": {"nudge_gate": "margin", "nudge_threshold": 0.2, "takeover_on_agreement": 0}},
    {"temperature": 1.2, "top_k": 30, "seed": 5},
    {"repetition_penalty": 1.3},
    {"min_tokens": 8},
]


def test_requests_grow_as_in_a_single_run(stored):
    pair, prompts, folder = stored
    nudger = nudger_of(folder)
    requests, expected = {}, {}
    for number, (prompt, changes) in enumerate(zip(prompts, CHANGES, strict=True)):
        params = sampling_params(**changes)
        requests[str(number)] = Request(prompt, params)
        settings = {"max_new_tokens": params.max_tokens, "repetition_penalty": params.repetition_penalty}
        if params.temperature:
            settings |= {"do_sample": True, "temperature": params.temperature, "top_k": params.top_k}
            torch.manual_seed(params.seed)
        if params.min_tokens:
            settings["min_new_tokens"] = params.min_tokens
        knobs = dict(params.extra_args or {})
        if "takeover_on_agreement" in knobs:
            knobs["takeover_on_agreement"] = bool(knobs["takeover_on_agreement"])
        ids = nudging_hf.generate(
            pair.base,
            torch.tensor([prompt]),
            nudging_model=pair.nudging_model,
            tokenizer=pair.tokenizer,
            nudging_tokenizer=pair.nudging_tokenizer,
            **settings,
            **knobs,
        )
        expected[str(number)] = ids[0, len(prompt) :].tolist()
    assert answers(nudger, pair.base, requests) == expected
    assert not nudger.request_ids and not nudger.decoder.rows


def test_a_given_nudging_prompt_is_used(stored):
    pair, prompts, folder = stored
    given = [7, 9, 11, 13]
    [expected] = nudge(pair, prompts[:1], [given], max_new_tokens=24)
    params = sampling_params(extra_args={"nudging_input_ids": given})
    assert answers(nudger_of(folder), pair.base, {"a": Request(prompts[0], params)}) == {"a": expected.ids}


def test_a_bad_request_ends_and_the_others_go_on(stored):
    pair, prompts, folder = stored
    nudger = nudger_of(folder)
    alone = answers(nudger, pair.base, {"a": Request(prompts[0], sampling_params())})["a"]
    requests = {
        "good": Request(prompts[0], sampling_params()),
        "bad": Request(prompts[1], sampling_params(extra_args={"nudge_threshold": "high"})),
    }
    found = answers(nudger, pair.base, requests)
    assert found == {"good": alone, "bad": own_eos_token_ids(pair.base)[:1]}


def test_a_failing_forward_pass_ends_what_runs_and_spares_what_comes(stored, monkeypatch):
    pair, prompts, folder = stored
    nudger = nudger_of(folder)
    forward = type(nudger._model).forward

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(type(nudger._model), "forward", no_memory)
    eos = own_eos_token_ids(pair.base)[:1]
    assert answers(nudger, pair.base, {"a": Request(prompts[0], sampling_params())}) == {"a": eos}
    monkeypatch.setattr(type(nudger._model), "forward", forward)
    after = answers(nudger, pair.base, {"b": Request(prompts[0], sampling_params())})
    assert after == answers(nudger_of(folder), pair.base, {"b": Request(prompts[0], sampling_params())})


def test_other_ranks_take_the_decisions_of_the_first(stored):
    """The second rank has no nudging model, and is given what the first has decided."""
    pair, prompts, folder = stored
    said = []
    first = nudger_of(folder, shared=lambda value: said.append(value) or value)
    second = nudger_of(folder, rank=1, shared=lambda value: said.pop(0))
    assert not hasattr(second, "decoder")
    request = Request(prompts[0], sampling_params())
    logits = pair.base(torch.tensor([prompts[0]]), use_cache=False).logits[0, -1:]
    for nudger in (first, second):
        assert nudger.is_nudged("a", request)
    steps = [Step("a", 0, [], range(1))]
    grown = first.decide(steps, logits)
    assert second.decide(steps, logits) == grown
    drafts = first.drafts(["a"])
    assert second.drafts(["a"]) == drafts and drafts[0]
    second.forget("a")


def test_plain_requests_are_left_alone(stored):
    _, prompts, folder = stored
    nudger = nudger_of(folder)
    assert not nudger.is_nudged("a", Request(prompts[0], sampling_params(extra_args={"nudging": 0})))
    nudger.forget("a")


def test_unknown_options_are_refused(stored):
    _, _, folder = stored
    with pytest.raises(ValueError, match="'nudge_treshold'"):
        nudger_of(folder, {"nudge_treshold": 0.3})
    with pytest.raises(ValueError, match="no nudging model"):
        Nudger({}, "base", {}, 200, 4, 6, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"extra_args": {"nudge_treshold": 0.3}}, "'nudge_treshold'"),
        ({"extra_args": {"nudge_threshold": -1}}, "nudge_threshold"),
        ({"extra_args": {"nudge_gate": "top2"}}, "nudge_gate"),
        ({"extra_args": {"word_boundary": "letters"}}, "word_boundary"),
        ({"extra_args": {"nudging": 2}}, "`nudging`"),
        ({"extra_args": {"nudging_input_ids": []}}, "nudging_input_ids"),
        ({"extra_args": {"nudging_input_ids": [1, -1]}}, "nudging_input_ids"),
        ({"structured_outputs": object()}, "grammar"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ],
)
def test_what_a_request_cannot_have_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        validate_params(sampling_params(**changes))


def test_what_a_request_may_have_is_not_refused():
    for changes in [*CHANGES, {"extra_args": {"nudging": 0, "anything": 1}}, {"extra_args": {"session_id": "a"}}]:
        validate_params(sampling_params(**changes))
    validate_params(sampling_params(logprobs=3))
    with pytest.raises(ValueError, match="logprobs"):
        validate_params(sampling_params(logprobs=3), "processed_logprobs")


def test_sampling_becomes_arguments_of_generate():
    ends = {"bos_token_id": 0, "eos_token_id": [1], "pad_token_id": 2}
    params = sampling_params(
        temperature=0.5, top_p=0.9, top_k=-1, stop_token_ids=[8], ignore_eos=True,
        presence_penalty=0.5, allowed_token_ids=[3, 4], bad_words_token_ids=[[9]],
    )  # fmt: skip
    arguments = generate_arguments(params, ends, prompt_length=3, max_new_tokens=10)
    config = arguments["generation_config"]
    assert (config.temperature, config.top_p, config.top_k, config.do_sample) == (0.5, 0.9, 0, True)
    assert config.bad_words_ids == [[9]]
    assert config.eos_token_id == [1, 8] and config.min_new_tokens == 10
    assert arguments["prefix_allowed_tokens_fn"](0, None) == [3, 4]
    assert isinstance(arguments["logits_processor"][0], CountPenalties)


def test_count_penalties_are_those_of_openai():
    scores = torch.zeros(1, 6)
    penalized = CountPenalties(0.5, 0.25, prompt_length=2)(torch.tensor([[5, 5, 1, 1, 3]]), scores)
    assert penalized.tolist() == [[0, -1.0, 0, -0.75, 0, 0]] and not scores.any()


# Middleware ----------------------------------------------------------------------------------------------------------


def visit(app, path: str, body: bytes, folder, logprobs_mode: str = "raw_logprobs") -> list:
    """What the middleware sends for a request, with `app` behind it."""
    sent = []
    model_config = SimpleNamespace(
        model=str(folder / "base"), tokenizer=str(folder / "base"), logprobs_mode=logprobs_mode
    )
    config = SimpleNamespace(
        additional_config={"nudging": {"model": str(folder / "nudging")}}, model_config=model_config
    )
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-length", str(len(body)).encode())],
        "app": SimpleNamespace(state=SimpleNamespace(vllm_config=config)),
    }
    halves = iter([
        {"type": "http.request", "body": body[:9], "more_body": True},
        {"type": "http.request", "body": body[9:], "more_body": False},
    ])  # fmt: skip

    async def receive():
        return next(halves)

    async def send(message):
        sent.append(message)

    asyncio.run(NudgingMiddleware(app)(scope, receive, send))
    return sent


def call(path: str, body: bytes, folder, logprobs_mode: str = "raw_logprobs"):
    """What the middleware passes on, without the report's name, or its status and error."""
    passed = []

    async def app(scope, receive, send):
        message = await receive()
        assert dict(scope["headers"])[b"content-length"] == str(len(message["body"])).encode()
        passed.append(message["body"])

    sent = visit(app, path, body, folder, logprobs_mode)
    if not passed:
        return sent[0]["status"], json.loads(sent[1]["body"])["error"]["message"]
    said = json.loads(passed[0]) if passed[0][:1] == b"{" else {}
    if said.get("vllm_xargs", {}).pop(reports.KEY, None) is None:
        return passed[0]
    return json.dumps({name: value for name, value in said.items() if value != {}}).encode()


def test_a_chat_takes_along_the_nudging_models_prompt(stored):
    pair, _, folder = stored
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is the name?"}]
    passed = json.loads(call("/v1/chat/completions", json.dumps({"messages": messages}).encode(), folder))
    expected = nudging_hf.chat_inputs(messages, pair.tokenizer, pair.nudging_tokenizer)["nudging_input_ids"][
        0
    ].tolist()
    assert passed["vllm_xargs"] == {"nudging_input_ids": expected} and passed["add_special_tokens"] is True


@pytest.mark.parametrize(
    ("path", "body", "match"),
    [
        ("/v1/completions", {"vllm_xargs": {"nudge_treshold": 1}}, "nudge_treshold"),
        ("/v1/completions", {"vllm_xargs": {"nudge_threshold": "x"}}, "nudge_threshold"),
        ("/v1/completions", {"vllm_xargs": [1]}, "vllm_xargs"),
        ("/v1/completions", {"vllm_xargs": {"nudging_report": "abcdefgh/" + "0" * 32}}, "'nudging_report'"),
        ("/v1/completions", {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ("/v1/completions", {"use_beam_search": True}, "use_beam_search"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "content"),
        ("/v1/chat/completions", {"messages": [], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_bad_request_is_answered_with_400(path, body, match, stored):
    status, message = call(path, json.dumps(body).encode(), stored[2])
    assert status == 400 and match in message


@pytest.mark.parametrize("body", [b"no JSON here", b"[1, 2, 3, 4, 5]", b'{"vllm_xargs": {"nudging": 0}, "n": 2}'])
def test_other_bodies_are_passed_on_unchanged(body, stored):
    passed = call("/v1/completions", body, stored[2])
    assert passed == body or json.loads(passed) == json.loads(body)


# Who wrote what, and errors ------------------------------------------------------------------------------------------


class Engine:
    """Stands for vLLM behind the middleware: it answers prompts of ids through a `Nudger`, in pieces if it streams.

    Args:
        edit: what becomes of each text, as stop strings and `echo` change it.
        spoil: what makes the parameters of the answers that fail.
    """

    def __init__(self, stored, edit=lambda text: text, spoil=lambda place, params: params):
        self.pair, _, self.folder = stored
        self.edit, self.spoil = edit, spoil

    async def __call__(self, scope, receive, send):
        body = json.loads((await receive())["body"])
        number, requests = body.get("n", 1), {}
        for i, prompt in enumerate(body["prompt"]):
            for j in range(number):
                params = sampling_params(
                    temperature=body.get("temperature", 0.0),
                    seed=body.get("seed", 0) + j,
                    extra_args=body["vllm_xargs"],
                )
                name = f"cmpl-name-of-it-{i}-0a1b2c3d"
                requests[f"{j}_{name}" if number > 1 else name] = Request(prompt, self.spoil(i * number + j, params))
        written = answers(nudger_of(self.folder), self.pair.base, requests)
        texts = [self.edit(self.text(written[name])) for name in requests]
        if not body.get("stream"):
            choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
            await self.send(send, b"application/json", [json.dumps({"choices": choices}).encode()])
        else:
            await self.send(send, b"text/event-stream", [*self.events(texts), b"data: [DONE]\n\n"])

    def text(self, ids):
        reader = provenance.PieceReader(self.pair.tokenizer)
        return provenance.text_of([*(piece for token in ids for piece in reader.read(token, False)), *reader.finish()])

    def events(self, texts):
        for start in range(0, max(map(len, texts)) + 1, 3):
            for i, text in enumerate(texts):
                if start <= len(text):
                    reason = "stop" if start + 3 > len(text) else None
                    choice = {"index": i, "text": text[start : start + 3], "finish_reason": reason}
                    yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
        yield b'data: {"choices": [], "usage": {}}\n\n'

    async def send(self, send, kind, pieces):
        body = b"".join(pieces)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for start in range(0, len(body), 50):  # Pieces are not events.
            await send({"type": "http.response.body", "body": body[start : start + 50], "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def ask(engine, **body):
    """The status, and the reply or all events of a stream."""
    start, *rest = visit(engine, "/v1/completions", json.dumps(body).encode(), engine.folder)
    sent = b"".join(message["body"] for message in rest)
    if not body.get("stream"):
        assert dict(start["headers"])[b"content-length"] == str(len(sent)).encode()
        return start["status"], json.loads(sent)
    events = [event.removeprefix(b"data: ") for event in sent.split(b"\n\n")]
    assert events[-2:] == [b"[DONE]", b""]
    return start["status"], [json.loads(event) for event in events[:-2]]


def joined(events, number):
    """The choices of a stream."""
    choices = [{"index": i, "text": "", "nudging": {"spans": []}} for i in range(number)]
    for event in events:
        for choice in event["choices"]:
            whole, report = choices[choice["index"]], choice.get("nudging", {})
            for start, end in report.get("spans", ()):
                assert len(whole["text"]) <= start < end <= len(whole["text"] + choice["text"])
                provenance.add_stretch(spans := whole["nudging"]["spans"], start, end)
                spans[-1] = list(spans[-1])
            whole["nudging"] |= {name: report[name] for name in ("rate", "finish_reason") if name in report}
            whole |= {"text": whole["text"] + choice["text"], "finish_reason": choice["finish_reason"]}
    return choices


def in_process(pair, prompt, **settings):
    """Text and report of a single run."""
    output = nudging_hf.generate(
        pair.base,
        torch.tensor([prompt]),
        nudging_model=pair.nudging_model,
        tokenizer=pair.tokenizer,
        nudging_tokenizer=pair.nudging_tokenizer,
        max_new_tokens=24,
        return_dict_in_generate=True,
        **settings,
    )
    [found] = nudging_hf.spans_of(output, pair.tokenizer)
    report = {
        "spans": [[span.start, span.end] for span in found if span.nudged],
        "rate": pytest.approx(output.nudge_rate.item()),
        "finish_reason": output.finish_reasons[0],
    }
    return "".join(span.text for span in found), report


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_tells_who_wrote_it(stored, stream):
    pair, prompts, _ = stored
    expected = []
    for prompt in prompts[:3]:
        for seed in (5, 6):
            torch.manual_seed(seed)
            expected.append(in_process(pair, prompt, do_sample=True, temperature=0.8, top_k=0))
    body = {"prompt": prompts[:3], "n": 2, "temperature": 0.8, "seed": 5}
    status, reply = ask(Engine(stored), **body, stream=stream)
    choices = joined(reply, 6) if stream else reply["choices"]
    assert status == 200 and [(each["text"], each["nudging"]) for each in choices] == expected
    assert len({report["rate"].expected for _, report in expected}) > 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_vllm_cuts_or_changes_is_told_as_far_as_it_can_be(stored, stream):
    pair, prompts, _ = stored
    text, report = in_process(pair, prompts[0])
    size = len(text) // 2
    [cut] = _choices(ask(Engine(stored, lambda text: text[:size]), prompt=prompts[:1], stream=stream)[1], stream)
    assert cut["nudging"]["spans"] == [[a, min(b, size)] for a, b in report["spans"] if a < size]
    assert cut["nudging"]["finish_reason"] == report["finish_reason"] and 0 < cut["nudging"]["rate"] <= 1
    [echoed] = _choices(ask(Engine(stored, lambda text: f"!{text}"), prompt=prompts[:1], stream=stream)[1], stream)
    assert echoed["nudging"] == {**report, "spans": []} if stream else {**report, "spans": None}


def _choices(reply, stream):
    return joined(reply, 1) if stream else reply["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_fails_is_an_error(stored, stream):
    _, prompts, _ = stored

    def spoil(place, params):
        if place == 1:
            params.extra_args = {**params.extra_args, "nudge_threshold": "high"}
        return params

    status, reply = ask(Engine(stored, spoil=spoil), prompt=prompts[:3], stream=stream)
    if not stream:
        assert status == 400 and "nudge_threshold" in reply["error"]["message"] and reply["error"]["code"] == 400
        return
    [error] = [event["error"] for event in reply if "error" in event]
    assert error["type"] == "invalid_request_error" and "nudge_threshold" in error["message"]
    choices = joined([event for event in reply if "error" not in event], 3)
    assert [each["nudging"].get("finish_reason") is None for each in choices] == [False, True, False]


def test_a_failing_forward_pass_is_an_error(stored, monkeypatch):
    class NoMemory(Engine):
        async def __call__(self, *args):
            with monkeypatch.context() as patch:
                patch.setattr(type(self.pair.nudging_model), "forward", self.forward)
                await super().__call__(*args)

        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("no memory")

    status, reply = ask(NoMemory(stored), prompt=stored[1][:2])
    assert status == 500 and reply["error"]["message"] == "no memory"


@pytest.mark.parametrize(
    ("request_id", "index"),
    [
        ("cmpl-a-0-0a1b2c3d", 0), ("cmpl-a-2-12345678", 6), ("1_cmpl-a-1-0a1b2c3d", 4), ("cmpl-a-2", 6),
        ("2_chatcmpl-a-1-0a1b2c3d", 2), ("chatcmpl-7-3", 0), ("2_cmpl-cmpl-5-1-deadbeef", 5), ("other", 0),
    ],
)  # fmt: skip
def test_a_request_of_the_engine_is_a_choice_of_the_reply(request_id, index):
    assert choice_index(request_id, 3) == index


def test_a_report_is_written_only_where_one_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = reports.Reports()
    report = made.new()
    reports.tell(report.name, "a", ids=[1])
    assert list(report.news()) == [{"request": "a", "ids": [1]}] and not list(report.news())
    reports.tell(report.name, "b", error="x\ny")
    assert list(report.news()) == [{"request": "b", "error": "x\ny"}]
    other = tmp_path / "other"
    other.write_text("")
    (tmp_path / f"nudging-hf-vllm-{report.name[:8]}" / ("0" * 32)).symlink_to(other)
    for name in (None, 7, "", "../other", f"{report.name[:8]}/../other", str(other), f"{report.name[:8]}/{'0' * 32}"):
        reports.tell(name, "a")
    assert not other.read_text()
    report.close()
    reports.tell(report.name, "a", ids=[2])  # The client has left.
    assert [path.name for path in tmp_path.glob("*/*")] == ["0" * 32]
    del made, report
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


# Checks and the command ----------------------------------------------------------------------------------------------


def config_of(method="custom_class", asynchronous=False, pipeline=1, data=1):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline, data_parallel_size=data),
        speculative_config=method and SimpleNamespace(method=method),
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        model_config=SimpleNamespace(is_encoder_decoder=False),
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pipeline": 2}, "pipeline"),
        ({"data": 2}, "data-parallel"),
        ({"method": "ngram"}, "custom_class"),
        ({"method": None}, "custom_class"),
        ({"asynchronous": True}, "no-async-scheduling"),
    ],
)
def test_a_setup_that_would_not_work_is_refused(changes, match):
    checks.validate_config(config_of(), "custom_class")
    with pytest.raises(ValueError, match=match):
        checks.validate_config(config_of(**changes), "custom_class")


def test_a_runner_that_is_not_known_is_refused():
    class Runner:
        drafter = input_batch = requests = discard_request_mask = None

        def _sample(self, logits, spec_decode_metadata):
            """As in the versions that were tried."""

    checks.validate_runner(Runner(), is_v2=False)
    Runner._sample = lambda self, logits, metadata, more: None
    with pytest.raises(RuntimeError, match="_sample"):
        checks.validate_runner(Runner(), is_v2=False)
    with pytest.raises(RuntimeError, match="not known"):
        checks.validate_runner(Runner(), is_v2=True)


def test_the_command_names_everything(capsys):
    arguments = vllm_command("B", {"model": "A"}, ["--port", "80"], on_cpu=False).arguments
    assert arguments[:3] == ["vllm", "serve", "B"] and arguments[-2:] == ["--port", "80"]
    assert json.loads(arguments[arguments.index("--speculative-config") + 1])["method"] == "ngram"
    given = ["vllm", "--base", "B", "--nudging-model", "A", "--nudge-threshold", "0.3", "--on-cpu", "--port", "80"]
    assert main(given) == 0
    printed = shlex.split(capsys.readouterr().out)
    assert printed[0] == "VLLM_USE_V2_MODEL_RUNNER=0" and printed[-2:] == ["--port", "80"]
    options = json.loads(printed[printed.index("--additional-config") + 1])
    assert options == {"nudging": {"model": "A", "nudge_threshold": 0.3}}
    assert main([*given[:6], "-1"]) == 2
    assert "nudge_threshold" in capsys.readouterr().err


def test_the_chat_template_is_the_plain_prompts():
    assert PLAIN_CHAT_TEMPLATE.read_text() == plain_chat_template()


def test_a_described_base_has_no_weights(stored):
    pair, _, folder = stored
    described = described_base(str(folder / "base"))
    assert {each.device.type for each in described.parameters()} == {"meta"}
    assert described.config.vocab_size == pair.base.config.vocab_size and described.device.type == "cpu"
    assert described.generation_config.eos_token_id == pair.base.generation_config.eos_token_id
    assert isinstance(described, type(AutoModelForCausalLM.from_pretrained(folder / "base")))
    assert AutoTokenizer.from_pretrained(folder / "base").get_vocab() == pair.tokenizer.get_vocab()
