"""Static caches and compiled passes: the same answers, from few graphs."""

import pytest
import torch
from running import nudge
from tiny import pair, prompts
from transformers import CompileConfig


class CountingBackend:
    """Runs what `torch.compile` traces as it is, and counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs, **kwargs):
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, memo):  # transformers copies the config that holds it.
        return self


def compiled_by(backend) -> dict:
    """The arguments of `generate` for static caches, and passes that are compiled by a backend."""
    config = CompileConfig(backend=backend)
    config._compile_all_devices = True  # Else `generate` compiles on GPUs alone.
    return {"cache_implementation": "static", "compile_config": config}


@pytest.fixture(autouse=True)
def _nothing_is_compiled_before_or_after():
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
    assert graphs[-1] == graphs[-2]  # What is there is used again.


def test_nothing_is_compiled_where_that_is_turned_off():
    chosen = pair("llama", 0, "shared")
    backend = CountingBackend()
    nudge(chosen, *prompts(chosen, 1, 0), max_new_tokens=8, disable_compile=True, **compiled_by(backend))
    assert backend.graphs == 0
