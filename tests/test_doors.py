"""The same pair, prompts, knobs and seed give the same ids through every door. (Served text: test_serving.py.)"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import nudging_hf
from nudging_hf import hub

ROOT = Path(__file__).parents[1]
MINI = ROOT / "examples" / "mini" / "models"
PROMPTS = [
    'Show every step on the way.\nQuestion: Join the last letters of the words "Breto", "Dal".\n',
    "Question: Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?\n",
]
SETTINGS = {
    "greedy": {"do_sample": False},
    "rarely nudged": {"do_sample": False, "nudge_threshold": 0.1, "num_draft_tokens": 3},
    "always nudged": {"do_sample": False, "nudge_threshold": 1.01, "takeover_on_agreement": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "nudge_threshold": 0.5},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return str(hub.export(MINI / "base", MINI / "nudging", tmp_path_factory.mktemp("doors") / "nudged"))


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(MINI / "base")


@pytest.fixture(scope="module")
def nudging_model():
    return AutoModelForCausalLM.from_pretrained(MINI / "nudging")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINI / "base")


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")


@pytest.fixture
def registered():
    nudging_hf.register()
    yield
    nudging_hf.unregister()


def answers(sequences, width, pad):
    """The new ids of each row, without padding."""
    return [[token for token in row[width:] if token != pad] for row in sequences]


def piped(pipe, tokenizer, inputs, **settings):
    records = pipe(PROMPTS, batch_size=len(PROMPTS), return_tensors=True, **settings)
    sequences = [record["generated_token_ids"] for (record,) in records]
    return answers(sequences, inputs.input_ids.shape[1], tokenizer.pad_token_id)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_door_gives_the_same_ids(exported, base, nudging_model, tokenizer, inputs, registered, settings):
    settings = {"max_new_tokens": 48, **settings}

    def generated(generate, **more):
        torch.manual_seed(5)
        sequences = generate(**inputs, **settings, **more)
        return answers(sequences.tolist(), inputs.input_ids.shape[1], tokenizer.pad_token_id)

    def through(task, **more):
        torch.manual_seed(5)
        return piped(pipeline(task, **more), tokenizer, inputs, **settings)

    carrying = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    given = {"nudging_model": nudging_model}
    folder = {"custom_generate": str(ROOT / "hub_custom_code"), "trust_remote_code": True}
    expected = generated(nudging_hf.generate, model=base, **given)
    doors = {
        "registered": generated(base.generate, **given),
        "callable": generated(base.generate, custom_generate=nudging_hf.generate, **given),
        "folder": generated(base.generate, **folder, **given),
        "carried": generated(carrying.generate),
        "nudged-text-generation": through("nudged-text-generation", model=base, tokenizer=tokenizer, **given),
        "text-generation": through("text-generation", model=base, tokenizer=tokenizer, **given),
        "text-generation, carried": through("text-generation", model=exported, trust_remote_code=True),
    }
    assert [name for name, ids in doors.items() if ids != expected] == []
    assert all(expected) and expected[0] != expected[1]
