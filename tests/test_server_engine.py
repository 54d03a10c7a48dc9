"""The engine in the process: each of many answers at once is that of a call of its own, and nothing is left of it."""

import asyncio
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
]
STOPS = [(), (), ("e",), (" t", "zq")]


def pair_of(kind, seed=0):
    chosen = tiny.pair("llama", seed, kind)
    return Pair(chosen.base, chosen.tokenizer, chosen.nudging_model, chosen.nudging_tokenizer)


def some_requests(kind, number, seed):
    """Requests that differ in all that a client may set."""
    chosen, draw = tiny.pair("llama", 0, kind), random.Random(seed)
    prompts = zip(*tiny.prompts(chosen, number, seed), strict=True)
    requests = []
    for ids, nudging_ids in prompts:
        way = draw.choice(WAYS)
        arguments = {"max_new_tokens": draw.choice([1, 5, 12, 40]), **way, **draw.choice(KNOBS)}
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
                top_logprobs=draw.choice([None, None, 2]),
            )
        )
    return requests


def single_answers(pair, request):
    """Ids, authors and reasons of the answers to a request, by a call of its own."""
    if request.seed is not None:
        torch.manual_seed(request.seed)
    inputs = {"input_ids": torch.tensor([request.input_ids])}
    if request.nudging_input_ids is not None:
        inputs["nudging_input_ids"] = torch.tensor([request.nudging_input_ids])
    if request.stop:
        inputs["stopping_criteria"] = [StopText(Vocabulary(pair.tokenizer), request.stop, len(request.input_ids))]
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


@asynccontextmanager
async def engine_of(pair, **settings):
    engine = InProcessEngine(pair, **settings)
    try:
        yield engine
    finally:
        await engine.shutdown(0)
        assert not any(thread.name.startswith("nudging-decoder") for thread in threading.enumerate())


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
@pytest.mark.parametrize("seed", range(3))
def test_many_answers_at_once_are_those_of_single_calls(kind, seed):
    pair, requests = pair_of(kind), some_requests(kind, 14, seed)
    expected = [single_answers(pair, request) for request in requests]

    running = []

    async def answer(engine, number, request):
        await asyncio.sleep(random.Random(number).random() / 5)
        return await read(await engine.submit(request), request.n)

    async def run():
        async with engine_of(pair, max_running=4) as engine:
            step = engine._step
            engine._step = lambda decoder: (step(decoder), running.append(len(engine._running)))
            found = await asyncio.gather(*(answer(engine, *each) for each in enumerate(requests)))
            stats = engine.stats()
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
    prompt = tuple(tiny.prompts(tiny.pair("llama", 0, "shared"), 1, 0)[0][0])
    arguments = {"do_sample": False, "max_new_tokens": number, "min_new_tokens": number}
    return AnswerRequest(prompt, arguments=arguments | fields)


def test_whoever_leaves_makes_room_and_leaves_nothing():
    pair = pair_of("shared")
    rows = []

    async def run():
        async with engine_of(pair, max_running=2) as engine:
            prepare = engine._prepare
            engine._prepare = lambda request: [rows.append(weakref.ref(row)) or row for row in prepare(request)]
            first, second = await engine.submit(long_request(4000)), await engine.submit(long_request(4000))
            await anext(first)
            third, fourth = await engine.submit(long_request(20)), await engine.submit(long_request(4000))
            assert engine.stats().running == 2 and engine.stats().waiting == 2
            fourth.close()
            first.close()
            assert (await read(third))[0][2] == "length"
            assert engine.stats().running == 1 and engine.stats().waiting == 0
            second.close()
            second.close()
            with pytest.raises(StopAsyncIteration):
                await anext(second)
            await until(lambda: engine.stats().running == 0 and engine._decoder is None)
            del first, second, third, fourth
            gc.collect()
            assert len(rows) == 4 and not any(row() for row in rows)
            passes = engine.stats()
            assert (await read(await engine.submit(long_request(20))))[0][2] == "length"
            assert engine.stats().base_forward_passes > passes.base_forward_passes

    asyncio.run(run())


def test_too_many_are_turned_away():
    async def run():
        async with engine_of(pair_of("shared"), max_running=1, max_waiting=1) as engine:
            taken = [await engine.submit(long_request(4000)) for _ in range(2)]
            with pytest.raises(QueueFull):
                await engine.submit(long_request())
            with pytest.raises(ValueError, match="room for 2"):
                await engine.submit(AnswerRequest((1,), n=3))
            taken[0].close()
            await until(lambda: engine.stats().waiting == 0)
            (await engine.submit(long_request(4000))).close()

    asyncio.run(run())


def test_what_generate_refuses_is_refused_and_takes_no_place():
    async def run():
        async with engine_of(pair_of("shared"), max_running=1, max_waiting=0) as engine:
            for _ in range(3):
                with pytest.raises(ValueError, match="nudge_threshold"):
                    await engine.submit(long_request(nudge_threshold=-1))
                with pytest.raises(ValueError, match="has the id"):
                    await engine.submit(AnswerRequest((10**6,), arguments={"max_new_tokens": 3}))
            assert (await read(await engine.submit(long_request(9))))[0][2] == "length"

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
            taken = [await engine.submit(long_request(4000)) for _ in range(2)]
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


def test_at_the_end_running_answers_are_finished_and_waiting_ones_given_up():
    async def run():
        engine = InProcessEngine(pair_of("shared"), max_running=1)
        running, waiting = await engine.submit(long_request(600)), await engine.submit(long_request(60))
        await anext(running)
        ending = asyncio.ensure_future(engine.shutdown(30))
        with pytest.raises(Unavailable):
            await read(waiting)
        with pytest.raises(Unavailable):
            await engine.submit(long_request())
        assert not engine.is_ready
        assert (await read(running))[0][2] == "length"
        await asyncio.wait_for(ending, 5)
        await engine.shutdown(0)

    asyncio.run(run())


def test_at_the_end_of_the_grace_running_answers_are_given_up():
    async def run():
        engine = InProcessEngine(pair_of("shared"), max_running=1)
        running = await engine.submit(long_request(4000))
        await anext(running)
        await engine.shutdown(0.05)
        with pytest.raises(Unavailable):
            await read(running)

    asyncio.run(run())


def test_the_defaults_of_the_server_hold_where_a_request_does_not_say():
    pair = pair_of("shared")
    requests = [long_request(40), long_request(40, nudge_threshold=0.2)]
    often = long_request(40, nudge_threshold=1.1)

    async def run():
        async with engine_of(pair, parameters={"nudge_threshold": 1.1, "num_draft_tokens": 0}) as engine:
            return [await read(await engine.submit(request)) for request in requests]

    found = asyncio.run(run())
    compare(often, found[0], single_answers(pair, often))
    compare(requests[1], found[1], single_answers(pair, requests[1]))
    assert nudging_hf.NudgingConfig().nudge_threshold == 0.4
