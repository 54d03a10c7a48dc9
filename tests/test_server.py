"""The server's HTTP: fields, refusals, replies, streams and errors, with an engine that says what it is told to."""

import asyncio
import json
import re
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf
from nudging_hf.core.config import NudgingConfig
from nudging_hf.core.vocabulary import Vocabulary
from nudging_hf.pair import Pair
from nudging_hf.server.app import ServerSettings, create_app
from nudging_hf.server.engine import (
    AnswerFailed,
    Chunk,
    Logprobs,
    QueueFull,
    Stats,
    TokenLogprob,
    Unavailable,
)
from nudging_hf.server.in_process import InProcessEngine
from nudging_hf.server.protocol import ChatRequest, CompletionRequest, RequestFields

MINI = Path(nudging_hf.__file__).parents[1] / "examples" / "mini" / "models"
TOKENIZER, NUDGING_TOKENIZER = (AutoTokenizer.from_pretrained(MINI / name) for name in ("base", "nudging"))
VOCABULARY = Vocabulary(TOKENIZER)
CHAT = {"model": "pair", "messages": [{"role": "user", "content": "What is 1 + 2?"}]}
PLAIN = {"model": "pair", "prompt": "What is 1 + 2?\n"}
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY = "a secret of the tests"


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def chunks_of(text, index=0, nudged_first=True, reason="eos", top=None):
    """An answer whose first token the nudging model wrote, token by token."""
    ids = ids_of(text)
    for place, token in enumerate(ids):
        told = None if top is None else (Logprobs(-0.5, tuple(TokenLogprob(i, -1.0 - i) for i in range(3, 3 + top))),)
        yield Chunk(index, (token,), (nudged_first and place == 0,), told)
    yield Chunk(index, finish_reason=reason)


class ScriptedAnswers:
    def __init__(self, script):
        self.script = iter(script)
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = next(self.script, None)
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        if not isinstance(item, Chunk):
            await item()
            return await self.__anext__()
        await asyncio.sleep(0)
        return item

    def close(self):
        self.is_closed = True


class ScriptedEngine:
    """Answers each request with what `script` makes of it: chunks, errors that are raised, functions to wait for."""

    tokenizer, nudging_tokenizer = TOKENIZER, NUDGING_TOKENIZER

    def __init__(self, script=None, context_length=200, samples_by_default=False):
        self.script = script or self.say("The answer is 3.")
        self.context_length, self.samples_by_default = context_length, samples_by_default
        self.is_ready = True
        self.requests, self.answers = [], []

    @staticmethod
    def say(text, reason="eos"):
        def script(request):
            return [
                chunk
                for index in range(request.n)
                for chunk in chunks_of(text, index, reason=reason, top=request.top_logprobs)
            ]

        return script

    async def submit(self, request):
        self.requests.append(request)
        script = self.script(request)
        if isinstance(script, Exception):
            raise script
        self.answers.append(ScriptedAnswers(script))
        return self.answers[-1]

    def stats(self):
        return Stats(1, 2, 30, 40)

    async def shutdown(self, grace):
        self.is_ready = False


@asynccontextmanager
async def client_of(engine, **settings):
    app = create_app(engine, ServerSettings("pair", **settings))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client


def asked(path, body, engine=None, headers=None, **settings):
    """The response to one request; `body=None` gets instead of posting."""

    async def ask():
        async with client_of(engine or ScriptedEngine(), **settings) as client:
            if body is None:
                return await client.get(path, headers=headers)
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(ask())


def error_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def events_of(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def streamed(path, body, engine=None):
    """The chunks of a stream that ends well."""
    *events, last = events_of(asked(path, {**body, "stream": True}, engine))
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


# Replies ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_in_openai_s_form_with_its_authors():
    reply = asked(CHATS, CHAT).json()
    (choice,) = reply["choices"]
    assert reply["object"] == "chat.completion" and reply["model"] == "pair" and reply["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": "The answer is 3.", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    number = len(ids_of("The answer is 3."))
    first = len(TOKENIZER.decode(ids_of("The answer is 3.")[:1]))
    assert choice["nudging"] == {"spans": [[0, first]], "rate": pytest.approx(1 / number), "finish_reason": "eos"}
    prompt = len(TOKENIZER(nudging_hf.plain_prompt(CHAT["messages"]))["input_ids"])
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": number,
        "total_tokens": prompt + number,
    }


def test_a_stream_is_the_reply_in_parts():
    reply = asked(CHATS, CHAT).json()["choices"][0]
    chunks = streamed(CHATS, CHAT)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert choices[0]["delta"] == {"role": "assistant", "content": ""} and len(choices) > 3
    assert "".join(choice["delta"].get("content", "") for choice in choices) == reply["message"]["content"]
    assert [span for choice in choices[1:] for span in choice["nudging"]["spans"]] == reply["nudging"]["spans"]
    assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "stop"]
    assert choices[-1]["delta"] == {} and choices[-1]["nudging"] == {**reply["nudging"], "spans": []}
    assert not any("usage" in chunk for chunk in chunks)


def test_a_stream_ends_with_the_usage_if_that_is_asked_for():
    *_, last = streamed(CHATS, CHAT | {"stream_options": {"include_usage": True}})
    assert last["choices"] == [] and last["usage"] == asked(CHATS, CHAT).json()["usage"]


def test_a_completion_and_its_stream():
    reply = asked(COMPLETIONS, PLAIN).json()
    assert reply["object"] == "text_completion" and reply["choices"][0]["text"] == "The answer is 3."
    chunks = streamed(COMPLETIONS, PLAIN)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "The answer is 3."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("reason, told", [
    ("eos", "stop"), ("stop_string", "stop"), ("stop_token", "stop"), ("stuck", "stop"), ("length", "length")
])  # fmt: skip
def test_why_an_answer_ended(reason, told):
    (choice,) = asked(CHATS, CHAT, ScriptedEngine(ScriptedEngine.say("So.", reason))).json()["choices"]
    assert choice["finish_reason"] == told and choice["nudging"]["finish_reason"] == reason


def test_several_prompts_and_answers_are_numbered():
    engine = ScriptedEngine(lambda r: [c for i in range(r.n) for c in chunks_of(f"{len(r.input_ids)} {i}.", i)])
    body = {"prompt": ["One.", "Two and three."], "n": 2, "temperature": 1.0}
    reply = asked(COMPLETIONS, body, engine).json()
    sizes = [len(TOKENIZER(prompt)["input_ids"]) for prompt in body["prompt"]]
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [
        (0, f"{sizes[0]} 0."), (1, f"{sizes[0]} 1."), (2, f"{sizes[1]} 0."), (3, f"{sizes[1]} 1.")
    ]  # fmt: skip
    assert reply["usage"]["prompt_tokens"] == sum(sizes)
    texts = [""] * 4
    for chunk in streamed(COMPLETIONS, body, engine):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in reply["choices"]]


def test_logprobs_of_a_chat():
    body = CHAT | {"logprobs": True, "top_logprobs": 2}
    content = asked(CHATS, body).json()["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == "The answer is 3."
    assert all(each["logprob"] == -0.5 and len(each["top_logprobs"]) == 2 for each in content)
    assert all(bytes(each["bytes"]).decode() == each["token"] for each in content)
    parts = [chunk["choices"][0] for chunk in streamed(CHATS, body)]
    assert [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]] == content


def test_logprobs_of_a_completion():
    body = PLAIN | {"logprobs": 2}
    told = asked(COMPLETIONS, body).json()["choices"][0]["logprobs"]
    assert "".join(told["tokens"]) == "The answer is 3." and set(map(len, told["top_logprobs"])) <= {2, 3}
    assert told["text_offset"] == [len("".join(told["tokens"][:i])) for i in range(len(told["tokens"]))]
    assert all(top[token] == -0.5 for token, top in zip(told["tokens"], told["top_logprobs"], strict=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed(COMPLETIONS, body)]
    for name, values in told.items():
        assert [value for part in parts if part for value in part[name]] == values


def test_a_stop_string_is_left_out_and_held_back():
    text = "One.\nTwo.\n\nThree."
    engine = ScriptedEngine(ScriptedEngine.say(text, "stop_string"))
    body = PLAIN | {"stop": ["\n\n", "Four"]}
    assert asked(COMPLETIONS, body, engine).json()["choices"][0]["text"] == "One.\nTwo."
    assert engine.requests[0].stop == ("\n\n", "Four")
    seen = ""
    for chunk in streamed(COMPLETIONS, body, engine):
        seen += chunk["choices"][0]["text"]
        assert "One.\nTwo.".startswith(seen)
    assert seen == "One.\nTwo."


def test_models_health_and_version():
    (model,) = asked("/v1/models", None).json()["data"]
    assert model["id"] == "pair" and model["object"] == "model" and model["max_model_len"] == 200
    assert asked("/v1/models/pair", None).json()["id"] == "pair"
    assert error_of(asked("/v1/models/a/b", None), 404)["code"] == "model_not_found"
    assert asked("/health", None).json() == {"status": "ok"}
    engine = ScriptedEngine()
    engine.is_ready = False
    assert asked("/health", None, engine).status_code == 503
    assert asked("/version", None).json() == {"version": nudging_hf.__version__}


def test_metrics_count_requests_tokens_and_passes():
    async def ask():
        async with client_of(ScriptedEngine()) as client:
            await client.post(CHATS, json=CHAT)
            await client.post(CHATS, json=CHAT | {"tools": [{}]})
            await client.post(COMPLETIONS, json=PLAIN | {"model": "other"})
            return (await client.get("/metrics")).text

    lines = set(asyncio.run(ask()).splitlines())
    number = len(ids_of("The answer is 3."))
    assert {
        'nudging_hf_requests_total{endpoint="chat.completions",outcome="answered"} 1.0',
        'nudging_hf_requests_total{endpoint="chat.completions",outcome="refused"} 1.0',
        'nudging_hf_requests_total{endpoint="completions",outcome="refused"} 1.0',
        'nudging_hf_tokens_total{author="nudging"} 1.0',
        f'nudging_hf_tokens_total{{author="base"}} {number - 1}.0',
        "nudging_hf_answers_running 1.0",
        "nudging_hf_answers_waiting 2.0",
        'nudging_hf_forward_passes_total{model="base"} 30.0',
        'nudging_hf_forward_passes_total{model="nudging"} 40.0',
        'nudging_hf_time_to_first_token_seconds_count{endpoint="chat.completions"} 1.0',
        'nudging_hf_request_duration_seconds_count{endpoint="chat.completions"} 1.0',
    } <= lines


# What reaches the engine --------------------------------------------------------------------------------------------


def request_of(path, body, **engine):
    """What an engine is asked for by a request that is accepted."""
    engine = ScriptedEngine(**engine)
    response = asked(path, body, engine)
    assert response.status_code == 200, response.text
    (request,) = engine.requests
    return request


def test_both_prompts_of_a_chat_are_made_from_its_messages():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
    ]
    request = request_of(CHATS, {"messages": messages})
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    inputs = nudging_hf.chat_inputs(chat, TOKENIZER, NUDGING_TOKENIZER)
    assert list(request.input_ids) == inputs["input_ids"][0].tolist()
    assert list(request.nudging_input_ids) == inputs["nudging_input_ids"][0].tolist()


@pytest.mark.parametrize(
    "prompt", ["What?", ["What?"], TOKENIZER("What?")["input_ids"], [TOKENIZER("What?")["input_ids"]]]
)
def test_a_prompt_goes_to_the_base_as_it_is(prompt):
    request = request_of(COMPLETIONS, {"prompt": prompt})
    assert list(request.input_ids) == TOKENIZER("What?")["input_ids"] and request.nudging_input_ids is None


@pytest.mark.parametrize("given", [
    {"nudging_prompt": "Hm."}, {"nudging_input_ids": NUDGING_TOKENIZER("Hm.")["input_ids"]}
])  # fmt: skip
def test_the_nudging_model_may_have_a_prompt_of_its_own(given):
    request = request_of(COMPLETIONS, PLAIN | given)
    assert list(request.nudging_input_ids) == NUDGING_TOKENIZER("Hm.")["input_ids"]


@pytest.mark.parametrize("fields, expected", [
    ({}, {"do_sample": False}),
    ({"temperature": 0, "top_p": 0.5}, {"do_sample": False}),
    ({"temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.1},
     {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.1}),
    ({"repetition_penalty": 1.1, "min_tokens": 2},
     {"do_sample": False, "repetition_penalty": 1.1, "min_new_tokens": 2}),
    ({"logit_bias": {"7": -100, "9": 0, "5": -100}}, {"do_sample": False, "suppress_tokens": [5, 7]}),
    ({"nudge_threshold": "auto", "nudge_gate": "margin", "target_nudge_rate": 0.2, "num_nudging_tokens": 8,
      "takeover_on_agreement": False, "word_boundary": "unicode"},
     {"do_sample": False, "nudge_threshold": "auto", "nudge_gate": "margin", "target_nudge_rate": 0.2,
      "num_nudging_tokens": 8, "takeover_on_agreement": False, "word_boundary": "unicode"}),
    ({"nudge_threshold": 0}, {"do_sample": False, "nudge_threshold": 0}),
])  # fmt: skip
def test_fields_become_arguments_of_generate(fields, expected):
    request = request_of(CHATS, CHAT | fields)
    assert {name: value for name, value in request.arguments.items() if name != "max_new_tokens"} == expected


def test_without_a_temperature_the_generation_config_decides_whether_to_sample():
    assert request_of(CHATS, CHAT | {"top_p": 0.5}, samples_by_default=True).arguments["do_sample"]
    error = error_of(asked(CHATS, CHAT | {"top_p": 0.5}))
    assert error["param"] == "top_p" and "temperature" in error["message"]


@pytest.mark.parametrize("fields, expected", [
    ({}, None), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 8}, 8),
    ({"max_tokens": 9, "max_completion_tokens": 9}, 9),
])  # fmt: skip
def test_the_limit_on_an_answer(fields, expected):
    request = request_of(CHATS, CHAT | fields, context_length=60)
    assert request.arguments["max_new_tokens"] == (expected or 60 - len(request.input_ids))
    assert request_of(COMPLETIONS, PLAIN, context_length=None).arguments["max_new_tokens"] == 1024


def test_the_documents_name_every_field_and_every_metric():
    text = (MINI.parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    fields, rest = text.partition("## Fields of a request\n")[2].split("**What is refused.**")
    accepted = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"best_of"}
    assert accepted | {"user", "metadata"} <= set(re.findall(r"`(\w+)`", fields))
    assert set(REFUSED) | {"best_of"} <= set(re.findall(r"`(\w+)`", rest.partition("## Replies")[0]))
    told = asked("/metrics", None).text
    names = {name for name in re.findall(r"^# TYPE (\w+) ", told, re.MULTILINE) if not name.endswith("_created")}
    assert names == set(re.findall(r"`(nudging_hf_\w+)`", text.partition("## Metrics\n")[2]))


def test_every_parameter_of_nudging_but_that_of_speed_is_a_field():
    assert set(NudgingConfig.field_names()) - {"num_draft_tokens"} <= set(RequestFields.model_fields)


# Refusals -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "parallel_tool_calls": "yes",
    "functions": [{}],
    "function_call": {"name": "f"},
    "web_search_options": {},
    "response_format": {"type": "json_schema"},
    "modalities": ["text", "audio"],
    "audio": {},
    "prediction": {"type": "content"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "store": True,
    "service_tier": "flex",
    "echo": True,
    "suffix": "and so on",
    "logit_bias": {"5": 3},
}
NEUTRAL = {
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "modalities": ["text"],
    "verbosity": "medium",
    "store": False,
    "service_tier": "auto",
    "logit_bias": {},
    "n": 1,
    "user": "me",
    "metadata": {"a": "b"},
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("path, body", [(CHATS, CHAT), (COMPLETIONS, PLAIN)])
def test_what_cannot_be_done_is_refused_with_a_reason(name, path, body):
    error = error_of(asked(path, body | {name: REFUSED[name]}))
    assert error["param"] == name and f"`{name}`" in error["message"] and error["type"] == "invalid_request_error"
    assert asked(path, body | {name: None}).status_code == 200


@pytest.mark.parametrize("path, body", [(CHATS, CHAT), (COMPLETIONS, PLAIN)])
def test_values_that_ask_for_nothing_are_accepted(path, body):
    assert asked(path, body | NEUTRAL).status_code == 200
    everything = ChatRequest if path == CHATS else CompletionRequest
    nulls = {name: None for name in everything.model_fields if name not in ("messages", "prompt")}
    assert asked(path, body | nulls).status_code == 200
    if path == COMPLETIONS:
        assert asked(path, body | {"best_of": 1, "echo": False, "suffix": ""}).status_code == 200


@pytest.mark.parametrize("fields, param", [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e-9}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"min_tokens": 10_000}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 2}, "n"),
    ({"n": 200, "temperature": 1}, "n"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": "high"}, "frequency_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 3]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"logit_bias": {"x": -100}}, "logit_bias"),
    ({"logit_bias": {"1000000": -100}}, "logit_bias"),
    ({"nudge_threshold": -1}, "nudge_threshold"),
    ({"nudge_threshold": "high"}, "nudge_threshold"),
    ({"nudge_gate": "mood"}, "nudge_gate"),
    ({"target_nudge_rate": 1}, "target_nudge_rate"),
    ({"num_nudging_tokens": 0}, "num_nudging_tokens"),
    ({"takeover_on_agreement": 1}, "takeover_on_agreement"),
    ({"word_boundary": "letters"}, "word_boundary"),
    ({"num_draft_tokens": 3}, "num_draft_tokens"),
    ({"best_off": 3}, "best_off"),
])  # fmt: skip
@pytest.mark.parametrize("path, body", [(CHATS, CHAT), (COMPLETIONS, PLAIN)])
def test_bad_values_are_refused_with_the_field_s_name(fields, param, path, body):
    error = error_of(asked(path, body | fields))
    assert error["param"] == param and param in error["message"]


@pytest.mark.parametrize("fields, param", [
    ({"messages": "Hi."}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": "Hi."}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "Hi.", "tool_calls": [{}]}]}, "messages"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"chat_template": "{% for i in x %}"}}, "chat_template_kwargs"),
    ({"nudging_prompt": "Hm."}, "nudging_prompt"),
    ({"prompt": "Hm."}, "prompt"),
])  # fmt: skip
def test_bad_values_of_a_chat(fields, param):
    assert error_of(asked(CHATS, CHAT | fields))["param"] == param


@pytest.mark.parametrize("fields, param", [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"nudging_prompt": 3}, "nudging_prompt"),
    ({"nudging_prompt": ["a", "b"]}, "nudging_prompt"),
    ({"nudging_prompt": ""}, "nudging_prompt"),
    ({"nudging_input_ids": ["a"]}, "nudging_input_ids"),
    ({"nudging_input_ids": [[3], [4]]}, "nudging_input_ids"),
    ({"nudging_input_ids": [3], "nudging_prompt": "a"}, "nudging_prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 3}, "best_of"),
    ({"messages": []}, "messages"),
])  # fmt: skip
def test_bad_values_of_a_completion(fields, param):
    assert error_of(asked(COMPLETIONS, PLAIN | fields))["param"] == param


@pytest.mark.parametrize("path, body, param", [(CHATS, CHAT, "messages"), (COMPLETIONS, PLAIN, "prompt")])
def test_what_does_not_fit_into_the_context_is_refused(path, body, param):
    length = len(request_of(path, body).input_ids)
    for fields, context in (({}, length), ({"max_tokens": 5}, length + 4)):
        error = error_of(asked(path, body | fields, ScriptedEngine(context_length=context)))
        assert error["code"] == "context_length_exceeded" and error["param"] == param
        assert str(context) in error["message"] and str(length) in error["message"]
    assert asked(path, body | {"max_tokens": 5}, ScriptedEngine(context_length=length + 5)).status_code == 200


def test_a_body_that_is_no_json_object():
    async def ask():
        async with client_of(ScriptedEngine()) as client:
            return [
                await client.post(CHATS, content=content, headers={"content-type": "application/json"})
                for content in (b"{", b"[]", b"", b"3", b'{"messages": "\\ud800"}', b"\xff")
            ]

    for response in asyncio.run(ask()):
        error_of(response)


def test_an_unknown_model_path_or_method():
    for path, body in ((CHATS, CHAT), (COMPLETIONS, PLAIN)):
        error = error_of(asked(path, body | {"model": "gpt"}), 404)
        assert error["code"] == "model_not_found" and "gpt" in error["message"]
        error_of(asked(path, None), 405)
    error_of(asked("/v1/edits", {}), 404)


def test_the_key_is_asked_for_before_anything_else(caplog, capsys):
    with caplog.at_level("DEBUG"):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
        ):
            for path, body in ((CHATS, CHAT), (COMPLETIONS, {}), ("/v1/models", None)):
                response = asked(path, body, headers=headers, api_key=KEY)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer" and KEY not in response.text
        assert asked(CHATS, CHAT, headers={"Authorization": f"Bearer {KEY}"}, api_key=KEY).status_code == 200
        assert asked("/health", None, api_key=KEY).status_code == 200
    assert KEY not in caplog.text and KEY not in capsys.readouterr().err
    assert KEY not in repr(ServerSettings("pair", api_key=KEY))


# Errors of the engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, status", [
    (ValueError("that will not do"), 400), (QueueFull("full"), 429), (Unavailable("closing"), 503),
    (AnswerFailed("broken"), 500), (KeyError("secret"), 500),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_status(error, status, stream):
    for script in (lambda _: error, lambda _: [error]):
        engine = ScriptedEngine(script)
        response = asked(CHATS, CHAT | {"stream": stream}, engine)
        told = error_of(response, status)
        assert (told["message"] == str(error)) != isinstance(error, KeyError) and "secret" not in told["message"]
        assert ("retry-after" in response.headers) == (status == 429)
        assert all(answers.is_closed for answers in engine.answers)


def test_an_error_in_a_stream_is_its_last_event():
    engine = ScriptedEngine(lambda _: [*list(chunks_of("The"))[:-1], AnswerFailed("broken")])
    *_, last = events_of(asked(CHATS, CHAT | {"stream": True}, engine))
    assert json.loads(last)["error"]["message"] == "broken"
    assert engine.answers[0].is_closed


def test_if_one_of_several_prompts_is_not_taken_the_others_are_given_up():
    engine = ScriptedEngine()
    say = engine.script
    engine.script = lambda request: QueueFull("full") if len(engine.requests) == 3 else say(request)
    error_of(asked(COMPLETIONS, {"prompt": ["a", "b", "c", "d"]}, engine), 429)
    assert len(engine.answers) == 2 and all(answers.is_closed for answers in engine.answers)


def test_whoever_leaves_is_not_answered_to_the_end():
    """Before the first token, and in the middle of a stream."""

    async def leave(stream, tokens):
        async def forever():
            await asyncio.sleep(60)

        engine = ScriptedEngine(lambda _: [*list(chunks_of("The answer"))[:tokens], forever])
        app = create_app(engine, ServerSettings("pair"))
        body = json.dumps(CHAT | {"stream": stream}).encode()
        messages = [{"type": "http.request", "body": body}]
        gone, sent = asyncio.Event(), []

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": CHATS, "raw_path": CHATS.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "server": ("server", 80), "scheme": "http",
            "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0"},
        }  # fmt: skip
        serving = asyncio.ensure_future(app(scope, receive, send))
        while not engine.answers or sum(b"data:" in each.get("body", b"") for each in sent) < tokens:
            await asyncio.sleep(0.01)
        gone.set()
        await asyncio.wait_for(serving, 5)
        assert engine.answers[0].is_closed
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.get("/metrics")).text

    for stream, tokens in ((False, 0), (True, 0), (True, 2)):
        counted = 'nudging_hf_requests_total{endpoint="chat.completions",outcome="cancelled"} 1.0'
        assert counted in asyncio.run(leave(stream, tokens))


# With models ---------------------------------------------------------------------------------------------------------

ODD = [-1, 0, 1, 2**40, 10**30, 1e-300, 0.5, 1e300, "", "auto", "x", [], {}, True, [1], ["a"], [[3]], {"a": 1}, [None]]


@pytest.fixture(scope="module")
def mini():
    return Pair.of(*(AutoModelForCausalLM.from_pretrained(MINI / name) for name in ("base", "nudging")))


@pytest.mark.parametrize("path, body", [(CHATS, CHAT), (COMPLETIONS, PLAIN)])
def test_no_value_of_a_field_makes_the_server_fail(mini, path, body):
    """Each field with many odd values, by itself and in a sampled answer."""
    form = ChatRequest if path == CHATS else CompletionRequest
    fields = sorted({*form.model_fields, *REFUSED} - {"model"})
    tried = [{name: value, **way} for name in fields for value in ODD for way in ({}, {"temperature": 0.7})]

    async def ask_all():
        engine = InProcessEngine(mini, max_running=32, max_waiting=len(tried) * 8)
        async with client_of(engine) as client:
            replies = await asyncio.gather(
                *(client.post(path, json={**body, "max_tokens": 2, **more}) for more in tried)
            )
        for more, reply in zip(tried, replies, strict=True):
            assert reply.status_code in (200, 400), (more, reply.text)
        return [reply.status_code for reply in replies]

    statuses = asyncio.run(ask_all())
    assert statuses.count(200) > 100 and statuses.count(400) > 100
