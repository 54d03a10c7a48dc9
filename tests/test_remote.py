"""A base that an engine runs elsewhere writes what it writes in process, whatever fails on the way."""

import asyncio
import json
import logging
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from running import nudge, outcomes, pair_with_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf
from nudging_hf.core.generate import prepare

pytest.importorskip("openai")
from fake_engine import FakeEngine, Fault

from nudging_hf.integrations.described_base import described_base
from nudging_hf.integrations.openai import EngineError, RemoteBase, session
from nudging_hf.integrations.openai.completions import Token
from nudging_hf.integrations.vllm import stop_when_unsure

MINI = Path(__file__).parents[1] / "examples" / "mini"
TEMPLATE = "{system}\n{user}\n"
NUM_QUESTIONS = 12
NUM_TOKENS = 60
FEW = 6  # As many questions as most tests ask at the most.
KEY = "sk-very-secret-0123456789"


def load(name):
    return AutoModelForCausalLM.from_pretrained(MINI / "models" / name, dtype=torch.float64)


class Mini:
    """The mini pairs in float64, questions, and their answers in process."""

    def __init__(self):
        self.base, self.tokenizer = load("base"), AutoTokenizer.from_pretrained(MINI / "models" / "base")
        self.nudging = {name: self._nudging(name) for name in ("nudging-shared", "nudging")}
        with (MINI / "heldout.jsonl").open() as lines:
            rows = [json.loads(line) for line in lines]
        self.chats = [row["messages"] for row in rows[:: len(rows) // NUM_QUESTIONS]]
        self.known, self.answers = {}, {}

    def _nudging(self, name):
        tokenizer = AutoTokenizer.from_pretrained(MINI / "models" / name)
        return {"nudging_model": load(name), "nudging_tokenizer": tokenizer}

    def inputs(self, name, count=NUM_QUESTIONS):
        return nudging_hf.chat_inputs(
            self.chats[:count], self.tokenizer, self.nudging[name]["nudging_tokenizer"], TEMPLATE
        )

    def reference(self, name, count=FEW, **settings):
        """The ids, authors and reasons of the answers in process. The engine knows what follows them."""
        key = repr((name, sorted(settings.items())))
        if len(self.answers.get(key, ())) < count:
            self.answers[key] = self._answers(name, max(count, 1 if settings else FEW), settings)
        return self.answers[key][:count]

    def _answers(self, name, count, settings):
        inputs, answers = self.inputs(name, count), []
        output = nudging_hf.generate(
            self.base, **inputs, **self.nudging[name], tokenizer=self.tokenizer, return_dict_in_generate=True,
            **{"max_new_tokens": NUM_TOKENS} | settings,
        )  # fmt: skip
        engine = self.engine()
        width = inputs["input_ids"].shape[1]
        for i, sequence in enumerate(output.sequences):
            length = int((~output.base_top1_probs[i].isnan()).sum())
            ids = sequence[width:][:length].tolist()
            answers.append((ids, output.nudged_mask[i, :length].tolist(), output.finish_reasons[i]))
            engine.read_ahead([*inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist(), *ids])
        return answers

    def engine(self, shape="vllm", **more):
        return FakeEngine(self.base, self.tokenizer, shape, known=self.known, **more)

    def remote(self, engine, **more):
        more = {"http_client": engine.client(), **more}
        return RemoteBase("http://engine/v1", "base", MINI / "models" / "base", self.tokenizer, **more)

    def ask(self, engine, name="nudging", count=NUM_QUESTIONS, own=None, **settings):
        """The answers of a remote base that is tried before, so that faults concern the answers alone."""

        async def run():
            async with self.remote(engine, **own or {}) as base:
                faults, engine.faults = engine.faults, []
                await base.check(settings.get("nudge_gate", "top1"))
                engine.faults, engine.decoded, engine.bodies = faults, 0, []
                return await base.generate(
                    self.inputs(name, count), **self.nudging[name], **{"max_new_tokens": NUM_TOKENS} | settings
                )

        return asyncio.run(run())


@pytest.fixture(scope="module")
def mini():
    return Mini()


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(session, "_FIRST_DELAY", 0.01)


def told(answers):
    assert [answer.error for answer in answers if answer.error is not None] == []
    return [(answer.ids, answer.nudged, answer.finish_reason) for answer in answers]


# The same ids as in process


@pytest.mark.parametrize("threshold", [0.4, 0.8, 0.98])
@pytest.mark.parametrize("name", ["nudging-shared", "nudging"])
def test_a_remote_base_writes_what_it_writes_in_process(mini, name, threshold):
    reference = mini.reference(name, NUM_QUESTIONS, nudge_threshold=threshold)
    for shape, at_once, count in (("vllm", 1, 3), ("llamacpp", 8, NUM_QUESTIONS)):
        engine = mini.engine(shape)
        answers = mini.ask(engine, name, count, {"max_concurrency": at_once}, nudge_threshold=threshold)
        assert told(answers) == reference[:count]
        assert 1 <= engine.most_open <= at_once
        tokens = sum(len(answer.ids) for answer in answers)
        requests, sent = (sum(getattr(answer, of) for answer in answers) for of in ("requests", "base_tokens"))
        assert requests == len(engine.bodies) and 0.05 < requests / tokens < 0.09
        assert 0.95 < sent / tokens < 1.0
        assert engine.decoded / tokens < 1.2  # Some tokens are under way when a request is cancelled.
        assert engine.cancelled > requests / 2 and engine.open == 0


@pytest.mark.parametrize("gate", ["margin", "rejection", "kad"])
def test_gates_that_few_probabilities_decide(mini, gate):
    settings = {"nudge_gate": gate, "nudge_threshold": 0.3}
    reference = mini.reference("nudging", 4, **settings)  # The engine then knows what follows.
    assert told(mini.ask(mini.engine("names"), count=4, **settings)) == reference


def test_the_gate_of_all_probabilities_is_refused(mini):
    with pytest.raises(ValueError, match="needs the probabilities of all tokens"):
        mini.ask(mini.engine(), count=1, own={}, nudge_gate="entropy")


@pytest.mark.parametrize(
    "settings",
    [
        {"nudge_threshold": "auto", "target_nudge_rate": 0.3},
        {"takeover_on_agreement": False, "nudge_threshold": 0.9},
        {"num_nudging_tokens": 3},
        {"stop_strings": ["so", "pens"]},
        {"max_new_tokens": 1},
        {"nudge_threshold": 1.01},
    ],
)
def test_settings_mean_what_they_mean_in_process(mini, settings):
    reference = mini.reference("nudging", 5, **settings)
    assert told(mini.ask(mini.engine("vllm"), count=5, **settings)) == reference


@pytest.fixture(scope="module", params=["shared", "two"])
def unsure(request):
    """A random pair whose base would often end the text, prompts, and by thresholds its answers in process."""
    pair, *prompts = pair_with_prompts("llama", request.param, seed=3, rows=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.base.generation_config, "eos_token_id", list(range(4, 24)))
        answers = {
            threshold: outcomes(nudge(pair, *prompts, max_new_tokens=24, nudge_threshold=threshold))
            for threshold in (0.1, 0.3)
        }
        yield pair, *prompts, answers, {}


@pytest.mark.parametrize("eos", ["told", "silent"])
@pytest.mark.parametrize("shape", ["vllm", "names", "llamacpp"])
def test_random_pairs_and_the_base_s_own_eos(unsure, shape, eos):
    """Random bases are unsure in all ways: they would write EOS, control tokens and halves of characters."""
    pair, prompts, nudging_prompts, expected, known = unsure
    for threshold, reference in expected.items():
        engine = FakeEngine(pair.base, pair.tokenizer, shape, eos=eos, known=known)
        base = RemoteBase("http://x/v1", "b", pair.base, pair.tokenizer, http_client=engine.client())
        answers = base.generate_sync(
            prompts,
            nudging_prompts=nudging_prompts,
            nudging_model=pair.nudging_model,
            nudging_tokenizer=pair.nudging_tokenizer,
            max_new_tokens=24,
            nudge_threshold=threshold,
        )
        assert told(answers) == reference


def test_the_base_s_probabilities_are_told_where_it_was_asked(mini):
    inputs, settings = mini.inputs("nudging", 2), {"max_new_tokens": NUM_TOKENS}
    output = nudging_hf.generate(
        mini.base,
        **inputs,
        **mini.nudging["nudging"],
        tokenizer=mini.tokenizer,
        return_dict_in_generate=True,
        **settings,
    )
    answers = mini.ask(mini.engine(), count=2, **settings)
    for i, answer in enumerate(answers):
        known = [
            (a, b)
            for a, b in zip(answer.base_top1_probs, output.base_top1_probs[i].tolist(), strict=False)
            if not math.isnan(a)
        ]
        assert len(known) > 0.8 * len(answer.ids) and math.isnan(answer.base_top1_probs[0])
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in known)
        assert answer.text == mini.tokenizer.decode(answer.ids, skip_special_tokens=True)


# Failures


FAULTS = {
    "busy": [Fault(429, {"retry-after": "0"}), None, Fault(429)],
    "broken": [Fault(500), Fault(503), None, Fault(502)],
    "dropped": [Fault(after=0), Fault(after=2), Fault(after=5), None, Fault(after=1)],
    "within a token": [Fault(after=1, how="cut"), Fault(after=3, how="cut")],
    "ended early": [Fault(after=2, how="ended"), Fault(after=4, how="ended")],
    "an error within a stream": [Fault(after=2, how="error"), Fault(after=0, how="error")],
    "shut down": [Fault(after=2, how="abort")],
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("shape", ["vllm", "llamacpp"])
def test_failures_cost_no_answer(mini, name, shape):
    engine = mini.engine(shape)
    engine.faults = list(FAULTS[name])
    assert told(mini.ask(engine, count=4)) == mini.reference("nudging", 4)
    assert not engine.faults


def test_a_silent_engine_is_asked_again(mini):
    engine = mini.engine()
    engine.faults = [Fault(after=1, how="silent")]
    assert told(mini.ask(engine, count=2, own={"timeout": 0.3})) == mini.reference("nudging", 2)


def test_an_engine_may_be_killed_and_restarted(mini):
    async def run():
        engine = mini.engine()
        async with mini.remote(engine) as base:
            await base.check()
            task = asyncio.create_task(
                base.generate(mini.inputs("nudging", 6), **mini.nudging["nudging"], max_new_tokens=NUM_TOKENS)
            )
            while len(engine.bodies) < 12:
                await asyncio.sleep(0.001)
            engine.down = True
            engine.faults = [Fault(after=0)] * engine.open
            await asyncio.sleep(0.2)
            assert not task.done()
            engine.down = False
            return await task

    assert told(asyncio.run(run())) == mini.reference("nudging", 6)


def test_retry_after_is_obeyed(mini, monkeypatch):
    slept = []
    sleep = asyncio.sleep

    async def note(seconds):
        if seconds:
            slept.append(seconds)
        await sleep(0)

    engine = mini.engine()
    engine.faults = [Fault(429, {"retry-after": "7"}), Fault(503, {"retry-after-ms": "2500"}), Fault(500)]
    monkeypatch.setattr(session.asyncio, "sleep", note)
    assert told(mini.ask(engine, count=1)) == mini.reference("nudging", 1)
    assert 7 <= slept[0] <= 7.7 and 2.5 <= slept[1] <= 2.75 and slept[2] < 0.1


def test_a_refused_request_ends_its_own_answer(mini):
    engine = mini.engine()
    [*_, third] = mini.reference("nudging", 3)
    prompt = mini.inputs("nudging", 3)
    prompt = prompt["input_ids"][2][prompt["attention_mask"][2].bool()].tolist()
    limit = len(prompt) + len(third[0]) // 2

    def refuse(body):
        is_third = body["prompt"][: len(prompt)] == prompt and len(body["prompt"]) > limit
        return Fault(400, message=f"too long; the key is {KEY}") if is_third else None

    engine.refuses = refuse
    answers = mini.ask(engine, count=3)
    assert told(answers[:2]) == mini.reference("nudging", 3)[:2]
    assert answers[2].finish_reason == "error" and isinstance(answers[2].error, EngineError)
    assert "too long" in str(answers[2].error)
    assert answers[2].ids == third[0][: len(answers[2].ids)] != []
    assert sum("too long" in str(answer.error) for answer in answers) == 1


def test_an_error_of_any_kind_ends_its_own_answer(mini):
    calls = []

    def breaks(ids, scores):
        calls.append(ids)
        if len(calls) == 30:
            raise RuntimeError("a criterion broke")
        return torch.tensor([False])

    answers = mini.ask(mini.engine(), count=4, stopping_criteria=[breaks])
    broken = [answer for answer in answers if answer.error is not None]
    assert [str(answer.error) for answer in broken] == ["a criterion broke"]
    whole = [answer.ids for answer in answers if answer.error is None]
    assert whole == [ids for ids, _, _ in mini.reference("nudging", 4) if ids in whole] and len(whole) == 3


def test_a_prompt_that_cannot_be_read_ends_its_own_answer(mini):
    prompts = ["Question: What is 2 + 3?\n", [5, 99999], "Question: Why?\n"]
    base = mini.remote(mini.engine())
    answers = base.generate_sync(prompts, **mini.nudging["nudging"], max_new_tokens=5)
    assert [answer.finish_reason for answer in answers] == ["length", "error", "length"]
    assert "99999" in str(answers[1].error)
    with pytest.raises(ValueError, match="99999"):
        base.generate_sync([[5, 99999]], **mini.nudging["nudging"], max_new_tokens=5)


def test_an_engine_that_stays_away_is_given_up(mini):
    engine = mini.engine()
    engine.refuses = lambda body: Fault(503) if len(engine.bodies) > 3 else None
    answers = mini.ask(engine, count=2, own={"retry_for": 0.1})
    assert {answer.finish_reason for answer in answers} == {"error"}
    assert "0.1 seconds (`retry_for`) in vain" in str(answers[0].error)
    for answer, (ids, nudged, _) in zip(answers, mini.reference("nudging", 2), strict=True):  # It stays where it was.
        assert (answer.ids, answer.nudged) == (ids[: len(answer.ids)], nudged[: len(answer.ids)]) != ([], [])


# The trial


@pytest.mark.parametrize(
    ("told_by_engine", "settings", "message"),
    [
        ({"logprobs": False}, {}, "ignores `logprobs`"),
        ({"shape": "names", "ids": False}, {}, "does not tell the ids"),
        ({"shape": "llamacpp", "ids": False}, {}, "does not tell the ids"),
        ({"takes_ids": False}, {}, "but not token ids"),
        ({"greedy": False}, {}, "most probable token at temperature 0"),
        ({"most_logprobs": 1}, {"nudge_gate": "margin"}, "--max-logprobs"),
    ],
)
def test_an_engine_that_cannot_be_used_is_refused(mini, told_by_engine, settings, message):
    base = mini.remote(mini.engine(**told_by_engine))
    with pytest.raises(EngineError, match=message):
        base.generate_sync("Question: Why?\n", **mini.nudging["nudging"], max_new_tokens=3, **settings)


def test_what_the_engine_has_room_for_is_a_limit(mini):
    [(ids, nudged, _)] = mini.reference("nudging", 1)
    prompt = int(mini.inputs("nudging", 1)["attention_mask"].sum())
    engine = mini.engine(context=prompt + 40)
    [answer] = mini.ask(engine, count=1)
    assert (answer.ids, answer.nudged) == (ids[: len(answer.ids)], nudged[: len(answer.ids)])
    assert answer.finish_reason == "length" and len(answer.ids) >= 40
    assert asyncio.run(mini.remote(engine).check()).context_length == prompt + 40


def test_an_engine_with_another_tokenizer_is_refused(mini):
    other = mini.nudging["nudging"]["nudging_tokenizer"]
    base = mini.remote(mini.engine(speaks_for=other))
    with pytest.raises(EngineError, match="not those of the tokenizer"):
        asyncio.run(base.check())


def test_an_error_of_the_engine_itself_is_passed_on(mini):
    engine = mini.engine()
    engine.refuses = lambda body: Fault(404, message="no such model")
    with pytest.raises(EngineError, match="no such model"):
        asyncio.run(mini.remote(engine).check())


def test_a_token_that_the_engine_left_out_is_noticed(mini):
    base = mini.remote(mini.engine())
    row = prepare(
        described_base(MINI / "models" / "base"), **mini.inputs("nudging", 1), tokenizer=mini.tokenizer,
        **mini.nudging["nudging"], max_new_tokens=4,
    ).rows[0]  # fmt: skip
    token = mini.tokenizer(" so", add_special_tokens=False).input_ids[-1]
    own = base._vocabulary.bytes_of(token)
    assert base.requests.prediction(Token(token, -0.1, (-0.1,), token, own), row).token == token
    with pytest.raises(EngineError, match="left out a token"):
        base.requests.prediction(Token(token, -0.1, (-0.1,), token, b"\xc3" + own), row)


# Sampling


def test_sampling_is_the_engine_s(mini):
    engine = mini.engine()
    torch.manual_seed(1)
    settings = {"do_sample": True, "temperature": 1.7, "top_p": 0.9, "top_k": 7, "nudge_threshold": 0.3}
    answers = mini.ask(engine, count=2, max_new_tokens=30, **settings)
    assert told(answers)
    bodies = engine.bodies
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in bodies} == {(1.7, 0.9, 7)}
    seeds = [body["seed"] for body in bodies]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    torch.manual_seed(1)
    again = mini.ask(mini.engine(), count=2, max_new_tokens=30, **settings)
    assert told(again) == told(answers)


def test_greedy_requests_are_greedy_and_neutral(mini):
    engine = mini.engine("vllm")
    mini.ask(engine, count=1)
    for body in engine.bodies:
        assert body["temperature"] == 0 and body["repetition_penalty"] == 1 and "seed" not in body
        assert body["ignore_eos"] is True and all(isinstance(token, int) for token in body["prompt"])
    engine = mini.engine("names")
    mini.ask(engine, count=1)
    assert all("ignore_eos" not in body for body in engine.bodies)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor cannot be passed on"),
        ({"bad_words_ids": [[7]]}, "cannot be passed on"),
        ({"min_new_tokens": 3}, "cannot be passed on"),
        ({"return_dict_in_generate": True}, "RemoteAnswer"),
        ({"streamer": object()}, "call `stream`"),
        ({"nudge_threshold": -1}, "must be >= 0"),
    ],
)
def test_what_an_engine_cannot_be_told_is_refused(mini, settings, message):
    with pytest.raises(ValueError, match=message):
        mini.remote(mini.engine()).generate_sync("Why?", **mini.nudging["nudging"], max_new_tokens=3, **settings)


# Streams, cancelling, keys


def test_a_stream_is_the_answer_with_its_authors(mini):
    async def run():
        engine = mini.engine()
        inputs = mini.inputs("nudging", 1)
        async with mini.remote(engine) as base:
            pieces = [
                piece
                async for piece in base.stream(
                    inputs["input_ids"][0].tolist(),
                    nudging_prompt=inputs["nudging_input_ids"][0].tolist(),
                    **mini.nudging["nudging"],
                    max_new_tokens=NUM_TOKENS,
                )
            ]
        return pieces

    pieces = asyncio.run(run())
    [(ids, nudged, _)] = mini.reference("nudging", 1)
    assert "".join(text for text, _ in pieces) == mini.tokenizer.decode(ids, skip_special_tokens=True)
    assert pieces[0][1] and {by for _, by in pieces} == {True, False} and len(pieces) > 10
    assert sum(by for _, by in pieces) <= sum(nudged)


def test_who_leaves_cancels_the_request(mini):
    async def run():
        engine = mini.engine()
        async with mini.remote(engine) as base:
            stream = base.stream("Question: Why?\n", **mini.nudging["nudging"], max_new_tokens=NUM_TOKENS)
            async for _ in stream:
                if engine.open:
                    break
            await stream.aclose()
            assert engine.open == 0
            task = asyncio.create_task(
                base.generate(mini.inputs("nudging", 5), **mini.nudging["nudging"], max_new_tokens=NUM_TOKENS)
            )
            while not engine.open:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.open == 0
            [[writer, *_]] = base._session()._writers.values()
            await writer.close()
            assert not writer.decoder.rows and not writer.decoder.nudging._cached_ids

    asyncio.run(run())


def test_several_calls_share_a_loop_and_a_nudging_model(mini):
    async def run():
        async with mini.remote(mini.engine()) as base:
            calls = [
                base.generate(mini.inputs("nudging", 4), **mini.nudging["nudging"], max_new_tokens=NUM_TOKENS)
                for _ in range(2)
            ]
            both = await asyncio.gather(*calls)
            assert len(base._session()._writers) == 1
            return both

    reference = mini.reference("nudging", 4)
    assert [told(answers) for answers in asyncio.run(run())] == [reference, reference]


def test_the_key_is_sent_and_never_shown(mini, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    engine, headers = mini.engine(), []
    engine.refuses = lambda body: Fault(401, message=f"wrong key {KEY}")

    async def note(request):
        headers.append(request.headers["authorization"])

    client = engine.client(event_hooks={"request": [note]})
    base = mini.remote(engine, http_client=client, api_key_variable="MY_KEY")
    with pytest.raises(EngineError, match="wrong key") as caught:
        asyncio.run(base.check())
    assert headers[0] == f"Bearer {KEY}"
    error: BaseException | None = caught.value
    while error is not None:
        assert KEY not in f"{error} {error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert KEY not in repr(base) and KEY not in repr(vars(base)) and KEY not in caplog.text
    assert "password" not in repr(RemoteBase("http://me:password@host/v1", "b", mini.base, mini.tokenizer))


# A base that is only described, and an engine that stops by itself


def test_rows_of_a_described_base_are_those_of_the_base(mini):
    described = described_base(MINI / "models" / "base")
    assert not any(each.device.type != "meta" for each in described.parameters()) and described.device.type == "cpu"
    assert described.generation_config.to_dict() == mini.base.generation_config.to_dict()
    settings = {**mini.inputs("nudging", 3), **mini.nudging["nudging"], "tokenizer": mini.tokenizer}
    settings |= {"do_sample": True, "temperature": 1.5, "eos_token_id": [5, 0], "max_new_tokens": 9}
    rows = []
    for model in (described, mini.base):
        torch.manual_seed(0)
        rows.append(prepare(model, **settings).rows)
    for one, other in zip(*rows, strict=True):
        assert (one.seed, one.room, one.answer.prompt) == (other.seed, other.room, other.answer.prompt)
        assert one.base.prompt.device.type == "cpu" and torch.equal(one.base.prompt, other.base.prompt)
        assert [type(each) for each in one.base.processors] == [type(each) for each in other.base.processors]
        rules, others = one.request.rules, other.request.rules
        assert (rules.base_eos, rules.stop_tokens, rules.base_num_ids) == (
            others.base_eos, others.stop_tokens, others.base_num_ids,
        )  # fmt: skip
    with pytest.raises(ValueError, match="meta device"):
        nudging_hf.generate(described, **settings)


def test_a_base_that_is_not_there_cannot_be_described(tmp_path):
    with pytest.raises(ValueError, match="cannot be described"):
        described_base(tmp_path)


@pytest.mark.parametrize("threshold", [0.4, 0.98])
def test_an_engine_may_stop_by_itself(mini, threshold):
    engine = mini.engine(stops=True)
    reference = mini.reference("nudging", 8, nudge_threshold=threshold)
    answers = mini.ask(engine, own={"stops_when_unsure": True}, count=8, nudge_threshold=threshold)
    assert told(answers) == reference
    sent = sum(answer.base_tokens for answer in answers)
    assert engine.decoded <= 1.01 * sent  # Nothing is under way when it stops.


def test_an_engine_that_does_not_stop_by_itself_is_refused(mini):
    base = mini.remote(mini.engine(), stops_when_unsure=True)
    with pytest.raises(EngineError, match="--logits-processors"):
        asyncio.run(base.check())
    with pytest.raises(ValueError, match="greedy answers"):
        base.generate_sync("Why?", **mini.nudging["nudging"], max_new_tokens=3, do_sample=True)


def params(stop_token_ids=(2,), **extra):
    return types.SimpleNamespace(extra_args=extra, stop_token_ids=list(stop_token_ids))


def test_what_a_request_asks_of_the_processor():
    assert stop_when_unsure.stop_of(params()) is None
    assert stop_when_unsure.stop_of(types.SimpleNamespace(extra_args=None, stop_token_ids=None)) is None
    assert stop_when_unsure.stop_of(params(nudge_threshold=0.4, nudge_stop_id=2)) == (0.4, 2)
    for wrong in ({"nudge_threshold": "0.4", "nudge_stop_id": 2}, {"nudge_threshold": 0.4}, {"nudge_stop_id": 2}):
        with pytest.raises(ValueError, match="vllm_xargs"):
            stop_when_unsure.stop_of(params(**wrong))
    with pytest.raises(ValueError, match="stop_token_ids"):
        stop_when_unsure.stop_of(params((), nudge_threshold=0.4, nudge_stop_id=2))


def test_the_stop_token_alone_is_left_where_the_base_is_unsure():
    torch.manual_seed(0)
    logits = torch.randn(64, 9) * 3
    top1 = logits.softmax(-1).amax(-1)
    thresholds, stops = torch.rand(64), torch.randint(9, (64,))
    forced = stop_when_unsure.force_stops(logits.clone(), thresholds, stops)
    unsure = top1 < thresholds
    assert unsure.any() and not unsure.all()
    assert torch.equal(forced[~unsure], logits[~unsure])
    assert torch.equal(forced[unsure].argmax(-1), stops[unsure])
    assert (forced[unsure].softmax(-1).amax(-1) == 1).all()


@pytest.fixture
def _vllm(monkeypatch):
    """As much of vLLM as the processors import."""

    def update(entries, batch_update, new_state):
        for index, request in batch_update:
            if (state := new_state(request, None, [])) is not None:
                entries[index] = state

    for name, members in {
        "vllm.v1.sample.logits_processor": {"LogitsProcessor": object},
        "vllm.v1.sample.logits_processor.builtin": {"process_dict_updates": update},
        "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": object},
    }.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        vars(sys.modules[name]).update(members)
    yield
    for name in ("StopWhenUnsure", "StopWhenUnsureV2"):
        vars(stop_when_unsure).pop(name, None)


@pytest.mark.usefixtures("_vllm")
def test_the_processors_of_both_runners():
    logits = torch.tensor([[1.0, 1.0, 0.0], [9.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    asks = params(nudge_threshold=0.5, nudge_stop_id=2)
    first = stop_when_unsure.StopWhenUnsure(None, torch.device("cpu"), False)
    assert not first.is_argmax_invariant() and torch.equal(first.apply(logits.clone()), logits)
    first.update_state([(0, asks), (1, asks), (2, params())])
    second = stop_when_unsure.StopWhenUnsureV2(None, types.SimpleNamespace(max_num_reqs=8, device="cpu"))
    assert [second.add_request(place, each) for place, each in ((5, asks), (1, asks), (3, params()))] == [1, 1, 0]
    context = types.SimpleNamespace(expanded_idx_mapping=torch.tensor([5, 1, 3], dtype=torch.int32))
    for forced in (first.apply(logits.clone()), second.apply(logits.clone(), context)):
        assert forced.argmax(-1).tolist() == [2, 0, 0] and torch.equal(forced[1:], logits[1:])
    assert stop_when_unsure.StopWhenUnsure is type(first)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = stop_when_unsure.Other
