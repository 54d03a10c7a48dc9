"""Tests a nudged model that `transformers serve` serves, with OpenAI's client, and the example of it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from serving import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf
from nudging_hf import hub

openai = pytest.importorskip("openai", reason="comes with transformers[serving]")

EXAMPLES = Path(__file__).parents[1] / "examples"
MINI = EXAMPLES / "mini" / "models"
TEMPLATE = "{system}\n{user}\n"
CHAT = [
    {"role": "system", "content": "Answer the question and show every step on the way."},
    {"role": "user", "content": 'Question: Join the last letters of the words "Breto", "Dal".'},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("served") / "nudged"
    return hub.export(MINI / "base", MINI / "nudging", out, base_template=TEMPLATE, nudge_threshold=0.4)


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder, folder.parent / "log") as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none")


@pytest.fixture(scope="module")
def completions(client):
    return client.chat.completions


@pytest.fixture(scope="module")
def nudged(folder):
    """A function that returns the answer of `nudging_hf.generate` to the chat."""
    lms = [(AutoModelForCausalLM.from_pretrained(f), AutoTokenizer.from_pretrained(f)) for f in (
        MINI / "base", MINI / "nudging")]  # fmt: skip
    (base, tokenizer), (nudging_model, nudging_tokenizer) = lms
    inputs = tokenizer(nudging_hf.plain_prompt(CHAT, TEMPLATE), return_tensors="pt")

    def answer(**settings):
        torch.manual_seed(settings.pop("seed", 0))
        ids = nudging_hf.generate(
            base,
            **inputs,
            tokenizer=tokenizer,
            nudging_model=nudging_model,
            nudging_tokenizer=nudging_tokenizer,
            **{"max_new_tokens": 256, "do_sample": False} | settings,
        )
        return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    return answer


def asked(completions, folder, **fields):
    return completions.create(model=str(folder), messages=CHAT, **fields).choices[0].message.content


def parameters(**fields):
    return {"extra_body": {"generation_config": json.dumps({"max_new_tokens": 256, "do_sample": False} | fields)}}


def test_an_answer_is_nudged(completions, folder, nudged):
    answer = asked(completions, folder)
    assert answer == nudged()
    assert '"ol"' in answer  # The answer was nudged, because the base alone answers with another question.


def test_a_stream_is_the_answer(completions, folder, nudged):
    chunks = completions.create(model=str(folder), messages=CHAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == nudged()


def test_completions_and_responses_are_nudged_too(client, folder, nudged):
    prompt = nudging_hf.plain_prompt(CHAT, TEMPLATE)
    assert client.completions.create(model=str(folder), prompt=prompt, max_tokens=256).choices[0].text == nudged()
    assert client.responses.create(model=str(folder), input=CHAT, stream=False).output_text == nudged()


def test_a_request_may_set_parameters(completions, folder, nudged):
    unsure = asked(completions, folder, **parameters(nudge_threshold=1.01, takeover_on_agreement=False))
    assert unsure == nudged(nudge_threshold=1.01, takeover_on_agreement=False) != nudged()


def test_limits_and_stop_strings_apply(completions, folder, nudged):
    assert asked(completions, folder, max_tokens=9) == nudged(max_new_tokens=9)
    assert asked(completions, folder, stop=["see"]) == nudged(stop_strings=["see"])


def test_a_sample_is_repeatable_by_its_seed(completions, folder):
    drawn = [
        asked(completions, folder, seed=seed, temperature=1.5, **parameters(do_sample=True, temperature=1.5))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_refused_request_gets_an_error_and_the_server_keeps_running(completions, folder, nudged):
    with pytest.raises(openai.APIError):
        asked(completions, folder, **parameters(nudge_threshold=-1))
    assert asked(completions, folder) == nudged()


def test_the_example_talks_to_the_server(url, folder, nudged, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serving_client.py", "--url", url, "--model", str(folder)])
    runpy.run_path(str(EXAMPLES / "serving_client.py"), run_name="__main__")
    assert "So the answer is 19." in capsys.readouterr().out
