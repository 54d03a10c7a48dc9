"""Both engines: each of many answers at once is that of a call of its own, and nothing is left of it.

The base of the remote one runs in an inference engine in the test's own process.
"""

import asyncio
import dataclasses
import functools
import gc
import inspect
import random
import threading
import time
import weakref
from contextlib import asynccontextmanager

import pytest
import tiny
import torch

import nudging_hf
from nudging_hf.core.vocabulary import Vocabulary
from nudging_hf.pair import Pair
from nudging_hf.server.engine import AnswerFailed, AnswerRequest, QueueFull, Unavailable
from nudging_hf.server.in_process import InProcessEngine
from nudging_hf.server.row_engine import StopText

pytest.importorskip("openai")
from fake_engine import FakeEngine, Fault

from nudging_hf.integrations.openai import RemoteBase, session
from nudging_hf.server.remote import RemoteEngine

ENGINES = ["in process", "remote"]

KNOBS = [
    {},
    {"nudge_threshold": 0.8},
    {"nudge_threshold": 0.1, "num_nudging_tokens": 4},
    {"nudge_threshold": 1.1, "takeover_on_agreement": False},
    {"nudge_gate": "entropy", "nudge_threshold": 1.5},
    {"nudge_gate": "kad"},
    {"nudge_threshold": "auto", "target_nudge_rate": 0.3},
]
WAYS = [
    {"do_sample": False},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 5},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": False, "min_new_tokens": 6},
    {"do_sample": False, "suppress_tokens": [5, 6, 7]},
    {"do_sample": False, "penalties": (0.7, 0.4)},
    {"do_sample": True, "penalties": (-0.5, 1.5)},
]
# A remote base draws by itself, and is greedy in these tests.
REMOTE_WAYS, REMOTE_KNOBS = WAYS[:1], [knobs for knobs in KNOBS if knobs.get("nudge_gate") != "entropy"]
STOPS = [(), (), ("e",), (" t", "zq")]


def pair_of(kind, seed=0):
    chosen = tiny.pair("llama", seed, kind)
    return Pair(chosen.base, chosen.tokenizer, chosen.nudging_model, chosen.nudging_tokenizer)


def some_requests(kind, number, seed, engine):
    """Requests that differ in all that a client may set."""
    chosen, draw = tiny.pair("llama", 0, kind), random.Random(seed)
    ways, knobs, logprobs = (
        (REMOTE_WAYS, REMOTE_KNOBS, [None]) if engine == "remote" else (WAYS, KNOBS, [None, None, 2])
    )
    prompts = zip(*tiny.prompts(chosen, number, seed), strict=True)
    requests = []
    for ids, nudging_ids in prompts:
        way = dict(draw.choice(ways))
        presence, frequency = way.pop("penalties", (0.0, 0.0))
        arguments = {"max_new_tokens": draw.choice([1, 5, 12, 24]), **way, **draw.choice(knobs)}
        if arguments["max_new_tokens"] < way.get("min_new_tokens", 0):
            arguments["max_new_tokens"] = 12
        requests.append(
            AnswerRequest(
                tuple(ids),
                draw.choice([None, tuple(nudging_ids)]),
                arguments,
                n=draw.choice([1, 1, 3]) if way["do_sample"] else 1,
                seed=draw.randrange(2**64),
                stop=draw.choice(STOPS),
                presence_penalty=presence,
                frequency_penalty=frequency,
                top_logprobs=draw.choice(logprobs),
            )
        )
    return requests


def penalized(presence, frequency, prompt_length):
    """The penalties by OpenAI's formula, written for one row."""

    def penalize(input_ids, scores):
        counts = torch.zeros_like(scores[0])
        for token in input_ids[0, prompt_length:].tolist():
            counts[token] += 1
        return scores - presence * (counts > 0) - frequency * counts

    return penalize


def single_answers(pair, request):
    """Ids, authors and reasons of the answers to a request, by a call of its own."""
    if request.seed is not None:
        torch.manual_seed(request.seed)
    inputs = {"input_ids": torch.tensor([request.input_ids])}
    if request.nudging_input_ids is not None:
        inputs["nudging_input_ids"] = torch.tensor([request.nudging_input_ids])
    if request.stop:
        inputs["stopping_criteria"] = [StopText(Vocabulary(pair.tokenizer), request.stop, len(request.input_ids))]
    penalties = request.presence_penalty, request.frequency_penalty
    if any(penalties):
        inputs["logits_processor"] = [penalized(*penalties, len(request.input_ids))]
    output = pair.generate(
        inputs,
        **request.arguments,
        num_return_sequences=request.n,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = []
    for row, reason in enumerate(output.finish_reasons):
        length = int((~output.base_top1_probs[row].isnan()).sum()) - (reason == "eos")
        ids = output.sequences[row, len(request.input_ids) :][:length].tolist()
        logprobs = [output.logits[place][row].log_softmax(-1) for place in range(length)]
        reason = "stop_string" if reason == "stopping_criteria" else reason
        answers.append((ids, output.nudged_mask[row, :length].tolist(), reason, logprobs))
    return answers


async def read(answers, n=1):
    """Ids, authors, reasons and log-probabilities of the answers to a request, as they come."""
    found = [([], [], [], []) for _ in range(n)]
    async for chunk in answers:
        assert len(chunk.ids) == len(chunk.nudged) and not found[chunk.index][2]
        for part, new in zip(found[chunk.index], (chunk.ids, chunk.nudged, (), chunk.logprobs or ()), strict=True):
            part.extend(new)
        if chunk.finish_reason is not None:
            found[chunk.index][2].append(chunk.finish_reason)
    return [(ids, nudged, *reasons, logprobs) for ids, nudged, reasons, logprobs in found]


def remote_engine(pair, inference, max_running=8, **settings):
    base = RemoteBase(
        "http://engine/v1", "base", pair.base, pair.tokenizer, max_concurrency=max_running, timeout=20,
        http_client=inference.client(),
    )  # fmt: skip
    return RemoteEngine(base, pair.nudging_model, pair.nudging_tokenizer, **settings)


@functools.cache
def known(kind):
    """What the inference engines of these tests have computed."""
    return {}


@asynccontextmanager
async def engine_of(pair, engine="in process", inference=None, pause=0.0, **settings):
    if engine == "remote":
        inference = inference or FakeEngine(pair.base, pair.tokenizer, known=known(id(pair.base)), pause=pause)
        made = remote_engine(pair, inference, **settings)
    else:
        made = InProcessEngine(pair, **settings)
    try:
        yield made
    finally:
        await made.shutdown(0)
        assert not any(thread.name.startswith("nudging-decoder") for thread in threading.enumerate())
        assert made.stats().running == made.stats().waiting == 0
        assert inference is None or inference.open == 0


def holds_nothing(engine):
    """Whether an engine that writes no answer has let go of them all."""
    if isinstance(engine, InProcessEngine):
        return engine._decoder is None
    [[writer, *_]] = engine._base._session()._writers.values()
    return not (engine._tasks or writer.decoder.rows or writer.decoder.nudging._cached_ids)


async def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def compare(request, found, expected):
    for (ids, nudged, reason, told), (its, own_nudged, own_reason, logprobs) in zip(found, expected, strict=True):
        assert (ids, nudged, reason) == (its, own_nudged, own_reason)
        if request.top_logprobs is None:
            assert told == []
            continue
        for token, each, own in zip(ids, told, logprobs, strict=True):
            assert each.logprob == pytest.approx(own[token].item(), abs=1e-5)
            values, best = own.topk(request.top_logprobs)
            assert [alternative.token for alternative in each.top] == best.tolist()
            assert [alternative.logprob for alternative in each.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["shared", "two"])
@pytest.mark.parametrize(("engine", "seed"), [*(("in process", seed) for seed in range(3)), ("remote", 3)])
def test_many_answers_at_once_are_those_of_single_calls(kind, engine, seed):
    pair, requests = pair_of(kind), some_requests(kind, 14, seed, engine)
    expected = [single_answers(pair, request) for request in requests]
    running = []

    async def answer(served, number, request):
        await asyncio.sleep(random.Random(number).random() / 5)
        answers = await served.submit(request)
        running.append(served.stats().running)
        return await read(answers, request.n)

    async def run():
        async with engine_of(pair, engine, max_running=4) as served:
            found = await asyncio.gather(*(answer(served, *each) for each in enumerate(requests)))
            stats = served.stats()
            assert stats.running == stats.waiting == 0 and stats.base_forward_passes and stats.nudging_forward_passes
            return found

    for request, found, own in zip(requests, asyncio.run(run()), expected, strict=True):
        compare(request, found, own)
    assert 2 <= max(running) <= 4


def test_without_a_seed_each_answer_is_another_and_torch_s_generator_is_left_alone():
    pair = pair_of("shared")
    prompt = tuple(tiny.prompts(tiny.pair("llama", 0, "shared"), 1, 0)[0][0])
    # The base writes nearly all, and any token is likely, so that two answers are hardly ever the same.
    arguments = {"do_sample": True, "temperature": 5.0, "nudge_threshold": 0, "max_new_tokens": 30}
    request = AnswerRequest(prompt, arguments=arguments)
    before = torch.get_rng_state()

    async def run():
        async with engine_of(pair) as engine:
            return [await read(await engine.submit(request)) for _ in range(4)]

    assert len({tuple(answers[0][0]) for answers in asyncio.run(run())}) == 4
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["shared", "two"])
def test_stop_strings_end_an_answer_where_generate_ends_it(kind):
    """Strings of one character, for one that begins in the prompt would end the answer of `generate` earlier."""
    pair, stop, ends = pair_of(kind), ["e", "o"], set()
    for ids, _ in zip(*tiny.prompts(tiny.pair("llama", 0, kind), 8, 3), strict=True):
        inputs = {"input_ids": torch.tensor([ids])}
        by_text = StopText(Vocabulary(pair.tokenizer), tuple(stop), len(ids))
        settings = {"max_new_tokens": 24, "return_dict_in_generate": True}
        own = pair.generate(inputs, stopping_criteria=[by_text], **settings)
        theirs = pair.generate(inputs, stop_strings=stop, **settings)
        assert own.sequences.tolist() == theirs.sequences.tolist()
        ends.add((theirs.finish_reasons[0], theirs.nudged_mask.shape[1]))
    assert sum(reason == "stop_string" for reason, _ in ends) > 1  # At several places.


def test_the_prompt_has_no_stop_strings():
    vocabulary = Vocabulary(tiny.byte_bpe())
    ids = [vocabulary.tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "c", "dab")]
    criterion = StopText(vocabulary, ("ab", "bc"), len(ids[0]))
    assert not criterion(torch.tensor([ids[0]]), None)
    assert not criterion(torch.tensor([ids[0] + ids[1]]), None)
    assert criterion(torch.tensor([ids[0] + ids[1] + ids[2]]), None)


def long_request(number=400, **fields):
    """A request for an answer that only its limit ends."""
    prompt = tuple(tiny.prompts(tiny.pair("llama", 0, "shared"), 3, 0)[0][2])
    return AnswerRequest(prompt, arguments={"do_sample": False, "max_new_tokens": number} | fields)


@pytest.mark.parametrize("engine", ENGINES)
def test_whoever_leaves_makes_room_and_leaves_nothing(engine):
    pair = pair_of("shared")
    rows = []

    async def run():
        async with engine_of(pair, engine, pause=0.02, max_running=2) as served:
            prepare = served._prepare
            served._prepare = lambda request: [rows.append(weakref.ref(row)) or row for row in prepare(request)]
            first, second = await served.submit(long_request(900)), await served.submit(long_request(900))
            await anext(first)
            third, fourth = await served.submit(long_request(20)), await served.submit(long_request(900))
            assert served.stats().running == 2 and served.stats().waiting == 2
            fourth.close()
            first.close()
            assert (await read(third))[0][2] == "length"
            assert served.stats().running == 1 and served.stats().waiting == 0
            second.close()
            second.close()
            with pytest.raises(StopAsyncIteration):
                await anext(second)
            await until(lambda: served.stats().running == 0 and holds_nothing(served))
            del first, second, third, fourth
            gc.collect()
            assert len(rows) == 4 and not any(row() for row in rows)
            passes = served.stats()
            assert (await read(await served.submit(long_request(20))))[0][2] == "length"
            assert served.stats().base_forward_passes > passes.base_forward_passes

    asyncio.run(run())


@pytest.mark.parametrize("engine", ENGINES)
def test_too_many_are_turned_away(engine):
    async def run():
        async with engine_of(pair_of("shared"), engine, pause=0.02, max_running=1, max_waiting=1) as served:
            taken = [await served.submit(long_request(900)) for _ in range(2)]
            with pytest.raises(QueueFull):
                await served.submit(long_request())
            with pytest.raises(ValueError, match="room for 2"):
                await served.submit(AnswerRequest((1,), n=3))
            taken[0].close()
            await until(lambda: served.stats().waiting == 0)
            (await served.submit(long_request(900))).close()

    asyncio.run(run())


@pytest.mark.parametrize("engine", ENGINES)
def test_what_generate_refuses_is_refused_and_takes_no_place(engine):
    async def run():
        async with engine_of(pair_of("shared"), engine, max_running=1, max_waiting=0) as served:
            for _ in range(3):
                with pytest.raises(ValueError, match="nudge_threshold"):
                    await served.submit(long_request(nudge_threshold=-1))
                with pytest.raises(ValueError, match="has the id"):
                    await served.submit(AnswerRequest((10**6,), arguments={"max_new_tokens": 3}))
            assert (await read(await served.submit(long_request(9))))[0][2] == "length"

    asyncio.run(run())


def forbids_everything_after(number):
    def forbid(input_ids, scores):
        return torch.full_like(scores, float("nan")) if input_ids.shape[1] > number else scores

    return forbid


def test_an_error_of_one_answer_ends_that_answer_alone(caplog):
    pair = pair_of("shared")
    bad = long_request(30, nudge_threshold=0.0)
    bad.arguments["logits_processor"] = [forbids_everything_after(len(bad.input_ids) + 5)]
    expected = single_answers(pair, long_request(30))

    async def run():
        async with engine_of(pair) as engine:
            good, failing = await engine.submit(long_request(30)), await engine.submit(bad)
            with pytest.raises(AnswerFailed, match="logits processors"):
                await read(failing)
            compare(long_request(30), await read(good), expected)
            assert engine.stats().running == 0

    asyncio.run(run())
    assert "An answer failed" in caplog.text


def test_after_a_pass_that_failed_the_engine_goes_on(monkeypatch, caplog):
    pair = pair_of("shared")
    expected = single_answers(pair, long_request(30))
    forward, broken = pair.base.forward, threading.Event()

    def failing(*args, **kwargs):
        if broken.is_set():
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    failing.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(pair.base, "forward", failing)

    async def run():
        async with engine_of(pair, max_running=2) as engine:
            taken = [await engine.submit(long_request(900)) for _ in range(2)]
            await anext(taken[0])
            broken.set()
            for answers in taken:
                with pytest.raises(AnswerFailed, match="RuntimeError"):
                    await read(answers)
            broken.clear()
            assert engine.is_ready
            compare(long_request(30), await read(await engine.submit(long_request(30))), expected)

    asyncio.run(run())
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("engine", ENGINES)
def test_at_the_end_running_answers_are_finished_and_waiting_ones_given_up(engine):
    async def run():
        async with engine_of(pair_of("shared"), engine, pause=0.01, max_running=1) as served:
            running, waiting = await served.submit(long_request(150)), await served.submit(long_request(60))
            await anext(running)
            ending = asyncio.ensure_future(served.shutdown(30))
            with pytest.raises(Unavailable):
                await read(waiting)
            with pytest.raises(Unavailable):
                await served.submit(long_request())
            assert not served.is_ready
            assert (await read(running))[0][2] == "length"
            await asyncio.wait_for(ending, 5)

    asyncio.run(run())


@pytest.mark.parametrize("engine", ENGINES)
def test_at_the_end_of_the_grace_running_answers_are_given_up(engine):
    async def run():
        async with engine_of(pair_of("shared"), engine, pause=0.01, max_running=1) as served:
            running = await served.submit(long_request(900))
            await anext(running)
            await served.shutdown(0.05)
            with pytest.raises(Unavailable):
                await read(running)

    asyncio.run(run())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_defaults_of_the_server_hold_where_a_request_does_not_say(engine):
    pair = pair_of("shared")
    requests = [long_request(40), long_request(40, nudge_threshold=0.2)]
    often = long_request(40, nudge_threshold=1.1)

    async def run():
        parameters = {"nudge_threshold": 1.1, "num_draft_tokens": 0}
        async with engine_of(pair, engine, parameters=parameters) as served:
            return [await read(await served.submit(request)) for request in requests]

    found = asyncio.run(run())
    compare(often, found[0], single_answers(pair, often))
    compare(requests[1], found[1], single_answers(pair, requests[1]))
    assert nudging_hf.NudgingConfig().nudge_threshold == 0.4


# A base elsewhere


@pytest.mark.parametrize(("fields", "arguments", "message"), [
    ({"top_logprobs": 2}, {}, "`logprobs` cannot be had"),
    ({"presence_penalty": 0.5}, {}, "`presence_penalty` and"),
    ({}, {"min_new_tokens": 3}, "cannot be passed on"),
    ({}, {"repetition_penalty": 1.2}, "cannot be passed on"),
    ({}, {"suppress_tokens": [5]}, "cannot be passed on"),
    ({}, {"nudge_gate": "entropy"}, "probabilities of all tokens"),
    ({}, {"nudge_gate": "margin"}, "--max-logprobs"),
])  # fmt: skip
def test_what_a_base_elsewhere_cannot_do_is_refused_and_takes_no_place(fields, arguments, message):
    pair = pair_of("shared")
    inference = FakeEngine(pair.base, pair.tokenizer, most_logprobs=1)

    async def run():
        async with engine_of(pair, "remote", inference, max_running=1, max_waiting=0) as served:
            for _ in range(2):
                with pytest.raises(ValueError, match=message):
                    await served.submit(dataclasses.replace(long_request(**arguments), **fields))

    asyncio.run(run())


def test_a_base_elsewhere_that_fails_costs_time_or_its_own_answer(monkeypatch, caplog):
    monkeypatch.setattr(session, "_FIRST_DELAY", 0.01)
    pair, number = pair_of("shared"), 60
    expected = single_answers(pair, long_request(number))
    inference = FakeEngine(pair.base, pair.tokenizer, known=known(id(pair.base)))

    async def run():
        async with engine_of(pair, "remote", inference, max_running=8) as served:
            await served._base.check()
            inference.faults = [Fault(503), Fault(after=3), Fault(429), Fault(after=1, how="error"), Fault(after=2)]
            answers = [read(await served.submit(long_request(number))) for _ in range(6)]
            for found in await asyncio.gather(*answers):
                compare(long_request(number), found, expected)
            assert not inference.faults
            inference.refuses = lambda body: Fault(400, message="too long") if len(body["prompt"]) > 40 else None
            with pytest.raises(AnswerFailed, match="too long"):
                await read(await served.submit(long_request(number)))
            inference.refuses = lambda body: None
            compare(long_request(number), await read(await served.submit(long_request(number))), expected)
            inference.down, served._base._retry_for = True, 0.2
            with pytest.raises(AnswerFailed, match="in vain"):
                await read(await served.submit(long_request(number)))
            inference.down = False
            compare(long_request(number), await read(await served.submit(long_request(number))), expected)

    asyncio.run(run())
    assert "An answer failed" in caplog.text


def test_a_base_elsewhere_draws_n_answers_by_their_seeds():
    pair = pair_of("shared")
    drawn = long_request(12, do_sample=True, temperature=3.0, nudge_threshold=0.0)

    async def run():
        async with engine_of(pair, "remote") as served:
            asked = [dataclasses.replace(drawn, n=3, seed=seed) for seed in (1, 1, 2)]
            return [await read(await served.submit(request), 3) for request in asked]

    first, again, other = asyncio.run(run())
    assert first == again != other and len({tuple(ids) for ids, *_ in first}) == 3


def test_penalties_reach_the_base():
    often, rarely = (dataclasses.replace(long_request(40, nudge_threshold=0.0), **fields) for fields in (
        {}, {"presence_penalty": 2.0, "frequency_penalty": 2.0}))  # fmt: skip
    pair = pair_of("shared")

    async def run():
        async with engine_of(pair) as served:
            return [(await read(await served.submit(request)))[0][0] for request in (often, rarely)]

    plain, penalized_ids = asyncio.run(run())
    assert len(set(penalized_ids)) > len(set(plain))
