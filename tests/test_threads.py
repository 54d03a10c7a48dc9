"""Threads that share a pair get the answers of single calls, and never change the user's objects, even briefly."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from running import inputs_of, state_of
from transformers import GenerationMixin

import nudging_hf
from nudging_hf.core import kv_cache, named_model

THREADS = 8
WAYS = [
    {},
    {"nudge_threshold": 0.8},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "nudge_threshold": 0.8},
    {"nudge_threshold": 0.2, "return_dict_in_generate": True},
    {"stop_strings": ["e", " t"]},
]


@pytest.fixture(autouse=True)
def _frequent_thread_switches():
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


class Watch(threading.Thread):
    """Compares a state with its first value every 2 ms."""

    def __init__(self, look):
        super().__init__()
        self.look, self.before = look, look()
        self.ended = threading.Event()
        self.looks, self.seen = 0, []

    def run(self):
        while not self.ended.wait(0.002):
            self.looks += 1
            if (now := self.look()) != self.before:
                self.seen.append(now)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()


@pytest.mark.parametrize(("kind", "number"), [("shared", 8), ("two", 32)])
def test_threads_that_share_a_pair_get_the_answers_of_single_calls(kind, number):
    pair = tiny.pair("llama", 3, kind)
    calls = []
    for i in range(number):
        inputs = inputs_of(pair, *tiny.prompts(pair, 1 + (i % 4 == 3), i))
        calls.append({**inputs, **WAYS[i % len(WAYS)], "max_new_tokens": 6, "num_nudging_tokens": 3})

    def answer(i):
        output = nudging_hf.generate(pair.base, **calls[i])
        return output.tolist() if isinstance(output, torch.Tensor) else output.sequences.tolist()

    def answers(begin):
        return [(i, answer(i)) for i in ((begin + i) % number for i in range(number))]

    # Each thread begins with another call, so that all kinds of calls run at the same time.
    begins = [thread * number // THREADS for thread in range(THREADS)]
    with Watch(lambda: state_of(pair)) as watch:
        alone = [answer(i) for i in range(number)]
        with ThreadPoolExecutor(THREADS) as pool:
            together = [each for found in pool.map(answers, begins) for each in found]
    assert len(together) == THREADS * number
    assert [i for i, ids in together if ids != alone[i]] == []
    assert watch.looks and watch.seen == []


def test_threads_load_a_named_model_once(tmp_path, monkeypatch):
    pair = tiny.pair("llama", 1, "two")
    base, loads = torch.nn.Module(), []
    base.device, base.dtype = torch.device("cpu"), torch.float64
    pair.nudging_model.save_pretrained(tmp_path)
    pair.nudging_tokenizer.save_pretrained(tmp_path)
    load = named_model._load
    monkeypatch.setattr(named_model, "_load", lambda *args: loads.append(args[1]) or load(*args))
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda _: named_model.named_nudging_model(base, str(tmp_path), {}), range(THREADS)))
    assert loads == [str(tmp_path)]
    assert {id(model) for model, _ in found} == {id(found[0][0])}


def test_threads_never_share_borrowed_slots():
    model = tiny.pair("llama", 0, "shared").base
    meet = threading.Barrier(THREADS)

    def borrowed(_):
        meet.wait()
        return kv_cache.borrow_static_slots(model, 3, False, 64)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(20):
            found = list(pool.map(borrowed, range(THREADS)))
            assert len(set(map(id, found))) == THREADS
            for each in found:
                kv_cache.give_back_static_slots(model, each)
            assert sum(len(each.lengths) == 3 for each in kv_cache._IDLE[model]) == 1


def test_threads_register_once():
    before = GenerationMixin.generate
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(20):
            list(pool.map(lambda _: nudging_hf.register(), range(THREADS)))
            nudging_hf.unregister()
            assert GenerationMixin.generate is before
