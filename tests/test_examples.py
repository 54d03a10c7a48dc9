"""Every program of `examples/` runs as it stands, on the pair in miniature.

`serving_client.py` is tested in test_serving.py, `memory.py` in test_docs.py, and the Space in test_space.py.
"""

import runpy
import sys
from pathlib import Path

import pytest

import nudging_hf

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {"memory.py", "serving_client.py"}


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            nudging_hf.unregister()
        return capsys.readouterr().out

    return run


WHAT_IS_SHOWN = {
    "quickstart.py": ["So the answer is 19.", 'The nudging model wrote: ["Let\'s"', "forward passes"],
    "batch.py": ["So the answer is 19.", '"ol"', "ended by eos", "for all 4 answers"],
    "streaming.py": ["⟦Let's⟧ go", "nudging model: 'Let'", "base:          ' go'", "\n\nLet's go"],
    "chat.py": ["> Join", "⟦Let's⟧ go", 'answer is "ol".', "> Breto has", "answer is 25."],
    "pipeline.py": ["So the answer is 19.", 'nudged: ["Let\'s"', "nudging_model=None: 'Question: "],
    "remote_base.py": ["⟦Let⟧⟦'s⟧ go", "So the answer is 19.", '"ol"', " nudged; ", "; eos)"],
    "hub_export.py": ["custom_generate/generate.py", "Nudged: Let's go", "The base alone: Question: "],
}


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(WHAT_IS_SHOWN) | ELSEWHERE


@pytest.mark.parametrize("name", WHAT_IS_SHOWN)
def test_an_example_runs(name, run):
    out = run(name)
    assert [text for text in WHAT_IS_SHOWN[name] if text not in out] == []
