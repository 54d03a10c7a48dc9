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
from nudging_hf.cli import main
from nudging_hf.core.transformers_private import own_eos_token_ids
from nudging_hf.hub import plain_chat_template
from nudging_hf.integrations.described_base import described_base
from nudging_hf.integrations.vllm import checks
from nudging_hf.integrations.vllm.launch import PLAIN_CHAT_TEMPLATE, vllm_command
from nudging_hf.integrations.vllm.middleware import NudgingMiddleware
from nudging_hf.integrations.vllm.nudger import Nudger, Request, Step
from nudging_hf.integrations.vllm.params import CountPenalties, generate_arguments, validate_params


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


def call(path: str, body: bytes, nudging, logprobs_mode: str = "raw_logprobs"):
    """What the middleware passes on, as JSON, or its status and error."""
    passed, sent = [], []

    async def app(scope, receive, send):
        message = await receive()
        assert dict(scope["headers"])[b"content-length"] == str(len(message["body"])).encode()
        passed.append(message["body"])

    config = SimpleNamespace(
        additional_config={"nudging": {"model": str(nudging)}},
        model_config=SimpleNamespace(logprobs_mode=logprobs_mode),
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
    if passed:
        return passed[0]
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["message"]


def test_a_chat_takes_along_the_nudging_models_prompt(stored):
    pair, _, folder = stored
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is the name?"}]
    passed = json.loads(call("/v1/chat/completions", json.dumps({"messages": messages}).encode(), folder / "nudging"))
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
        ("/v1/completions", {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ("/v1/completions", {"use_beam_search": True}, "use_beam_search"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "content"),
        ("/v1/chat/completions", {"messages": [], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_bad_request_is_answered_with_400(path, body, match, stored):
    status, message = call(path, json.dumps(body).encode(), stored[2] / "nudging")
    assert status == 400 and match in message


@pytest.mark.parametrize("body", [b"no JSON here", b"[1, 2, 3, 4, 5]", b'{"vllm_xargs": {"nudging": 0}, "n": 2}'])
def test_other_bodies_are_passed_on_unchanged(body, stored):
    passed = call("/v1/completions", body, stored[2] / "nudging")
    assert passed == body or json.loads(passed) == json.loads(body)


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
