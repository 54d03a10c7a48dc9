"""Every program of `examples/` runs as it stands, on the pair in miniature. (`serving_client.py`: test_serving.py.)"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import nudging_hf

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {"serving_client.py"}


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


ASK_THE_SPACE = """
import json, runpy, sys
from gradio_client import Client

app = runpy.run_path(sys.argv[1])
address = app["demo"].launch(prevent_thread_lock=True, quiet=True)[1]
print(json.dumps(Client(address, verbose=False).predict(app["QUESTIONS"][0], 0.4, api_name="/answer")))
"""


def test_the_space_answers():
    pytest.importorskip("gradio")
    command = [sys.executable, "-c", ASK_THE_SPACE, str(EXAMPLES / "space" / "app.py")]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    pieces, figures = json.loads(done.stdout.splitlines()[-1])
    text = "".join(piece["token"] for piece in pieces)
    assert "So the answer is 19." in text and "of the tokens are the nudging model's" in figures
    assert pieces[0] == {"token": "Let's", "class_or_confidence": "nudging model"}
