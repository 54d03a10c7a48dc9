"""Static caches and compiled passes give the same answers from few graphs."""

import contextlib

import pytest
import torch
from running import nudge
from tiny import pair, prompts
from transformers import CompileConfig, GenerationConfig

from nudging_hf.core import kv_cache


class CountingBackend:
    """A backend of `torch.compile` that runs graphs as they were traced, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs, **kwargs):
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, memo):  # transformers copies the config that contains the backend.
        return self


def compiled_by(backend) -> dict:
    """The arguments of `generate` for static caches and passes that a backend compiles."""
    config = CompileConfig(backend=backend)
    config._compile_all_devices = True  # Otherwise `generate` compiles only on GPUs.
    return {"cache_implementation": "static", "compile_config": config}


@pytest.fixture(autouse=True)
def _reset_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["shared", "two"])
def test_compiled_passes_give_the_same_answers_from_few_graphs(kind):
    chosen = pair("llama", 0, kind)
    backend = CountingBackend()
    graphs = []
    for seed in range(3):
        settings = {"max_new_tokens": 24, "nudge_threshold": 0.2, "num_draft_tokens": 4}
        asked = prompts(chosen, 1, seed)
        plain, compiled = nudge(chosen, *asked, **settings), nudge(chosen, *asked, **settings, **compiled_by(backend))
        assert [(r.ids, r.nudged, r.reason) for r in compiled] == [(r.ids, r.nudged, r.reason) for r in plain]
        graphs.append(backend.graphs)
    assert 0 < graphs[-1] <= 4
    assert graphs[-1] == graphs[-2]  # The last call reuses the graphs of earlier ones.


def test_nothing_is_compiled_with_disable_compile():
    chosen = pair("llama", 0, "shared")
    backend = CountingBackend()
    nudge(chosen, *prompts(chosen, 1, 0), max_new_tokens=8, disable_compile=True, **compiled_by(backend))
    assert backend.graphs == 0


@pytest.mark.parametrize("kind", ["shared", "two"])
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"stop_strings": ["e"]}], ids=str)
def test_calls_in_and_out_of_inference_mode_can_alternate(kind, settings):
    kv_cache._IDLE.clear()
    chosen = pair("llama", 2, kind)
    asked = prompts(chosen, 2, 0)
    answers = []
    for inference in (True, False, True, True, False, False, True):
        with torch.inference_mode() if inference else contextlib.nullcontext():
            results = nudge(chosen, *asked, max_new_tokens=6, num_nudging_tokens=4, **settings)
        answers.append([(result.ids, result.nudged) for result in results])
    assert all(answer == answers[0] for answer in answers)


def test_a_failed_call_does_not_change_the_next_answer(monkeypatch):
    chosen = pair("llama", 0, "shared")
    asked, settings = prompts(chosen, 1, 0), {"max_new_tokens": 8, "cache_implementation": "static"}
    expected = nudge(chosen, *asked, **settings)

    def fails(ids, scores, **kwargs):
        if ids.shape[1] > len(asked[0][0]) + 3:
            raise KeyboardInterrupt
        return torch.tensor([False])

    with pytest.raises(KeyboardInterrupt):
        nudge(chosen, *asked, **settings, stopping_criteria=[fails])
    assert nudge(chosen, *asked, **settings) == expected


@pytest.mark.skipif(not hasattr(GenerationConfig(), "max_cache_len"), reason="from transformers 5.24 on")
def test_a_static_cache_is_at_least_max_cache_len_long():
    kv_cache._IDLE.clear()
    chosen = pair("llama", 0, "shared")
    asked, settings = prompts(chosen, 1, 0), {"max_new_tokens": 4, "cache_implementation": "static"}
    expected = nudge(chosen, *asked, **settings)
    assert nudge(chosen, *asked, **settings, max_cache_len=3000) == expected
    for model in (chosen.base, chosen.nudging_model):
        [kept] = kv_cache._IDLE[model]
        assert kept.max_cache_len >= 3000
    kept_keys = kv_cache._IDLE[chosen.base][0].cache.layers[0].keys
    assert nudge(chosen, *asked, **{**settings, "max_new_tokens": 300}, min_new_tokens=300)
    # The cache was reused, so nothing was compiled again.
    assert kv_cache._IDLE[chosen.base][0].cache.layers[0].keys is kept_keys
