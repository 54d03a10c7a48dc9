"""Nudging models that are given by their names."""

import copy
import gc
import re

import pytest
import tiny
import torch
from running import inputs_of
from transformers import AutoModelForCausalLM, GenerationConfig

import nudging_hf
from nudging_hf.core import named_model


@pytest.fixture
def pair():
    whole = tiny.pair("llama", 1, "two")
    base = copy.deepcopy(whole.base)  # Nothing has been loaded for this base yet.
    return tiny.Pair(base, whole.nudging_model, whole.tokenizer, whole.nudging_tokenizer)


@pytest.fixture
def folder(pair, tmp_path):
    """A folder with the nudging model and its tokenizer."""
    pair.nudging_model.save_pretrained(tmp_path / "nudging")
    pair.nudging_tokenizer.save_pretrained(tmp_path / "nudging")
    return tmp_path / "nudging"


@pytest.fixture
def inputs(pair):
    given = inputs_of(pair, *tiny.prompts(pair, 2, seed=0)) | {"max_new_tokens": 12}
    return {name: value for name, value in given.items() if not name.startswith("nudging_")}


@pytest.fixture
def expected(pair, inputs):
    models = {"nudging_model": pair.nudging_model, "nudging_tokenizer": pair.nudging_tokenizer}
    return nudging_hf.generate(pair.base, **inputs, **models)


def test_a_name_gives_the_same_answers_as_the_model(pair, folder, inputs, expected):
    assert torch.equal(nudging_hf.generate(pair.base, **inputs, nudging_model=str(folder)), expected)
    assert torch.equal(nudging_hf.generate(pair.base, **inputs, nudging_model=folder), expected)


def test_the_generation_config_may_name_the_nudging_model(pair, folder, inputs, expected):
    pair.base.generation_config.nudging_model_name_or_path = str(folder)
    assert torch.equal(nudging_hf.generate(pair.base, **inputs), expected)
    config = GenerationConfig(**pair.base.generation_config.to_diff_dict())
    del pair.base.generation_config.nudging_model_name_or_path
    del inputs["max_new_tokens"]
    config.max_new_tokens = 12
    assert torch.equal(nudging_hf.generate(pair.base, **inputs, generation_config=config), expected)


def test_the_call_takes_precedence_over_the_config(pair, inputs, expected):
    pair.base.generation_config.nudging_model_name_or_path = "./nowhere"
    given = {"nudging_model": pair.nudging_model, "nudging_tokenizer": pair.nudging_tokenizer}
    assert torch.equal(nudging_hf.generate(pair.base, **inputs, **given), expected)


def test_a_relative_name_is_a_folder_beside_the_base(pair, folder, inputs, expected):
    pair.base.save_pretrained(folder.parent)
    base = AutoModelForCausalLM.from_pretrained(folder.parent)
    assert torch.equal(nudging_hf.generate(base, **inputs, nudging_model="./nudging"), expected)


def test_a_named_model_is_loaded_once_per_base_and_freed_with_it(pair, folder, inputs, monkeypatch):
    loads = []
    load = named_model._load
    monkeypatch.setattr(named_model, "_load", lambda *args: loads.append(args[1]) or load(*args))
    for _ in range(2):
        nudging_hf.generate(pair.base, **inputs, nudging_model=str(folder))
    assert loads == [str(folder)]
    model, _ = named_model.named_nudging_model(pair.base, str(folder), {})
    assert model.dtype == pair.base.dtype == torch.float64 and loads == [str(folder)]
    half = copy.deepcopy(pair.base).bfloat16()
    assert named_model.named_nudging_model(half, str(folder), {})[0].dtype == torch.bfloat16
    before = len(named_model._LOADED)
    del half
    gc.collect()
    assert len(named_model._LOADED) == before - 1


def test_none_generates_plainly(pair, folder, inputs):
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "max_new_tokens")}
    expected = pair.base.generate(**plain)
    for name in (None, str(folder)):
        pair.base.generation_config.nudging_model_name_or_path = name
        given = {"nudging_model": None, "nudge_threshold": 0.4, "nudging_input_ids": None}
        assert torch.equal(nudging_hf.generate(pair.base, **plain, **given), expected)
        nudging_hf.register()
        try:
            assert torch.equal(pair.base.generate(**plain, **given), expected)
        finally:
            nudging_hf.unregister()


def test_a_registered_base_whose_config_names_one_is_nudged(pair, folder, inputs, expected):
    pair.base.generation_config.nudging_model_name_or_path = str(folder)
    nudging_hf.register()
    try:
        assert torch.equal(pair.base.generate(**inputs), expected)
    finally:
        nudging_hf.unregister()


def test_a_callable_loads_a_named_model_too(pair, folder, inputs, expected):
    inputs["base_tokenizer"] = inputs.pop("tokenizer")
    given = {"custom_generate": nudging_hf.generate, "nudging_model": str(folder)}
    assert torch.equal(pair.base.generate(**inputs, **given), expected)
    with pytest.raises(ValueError, match="leave out `custom_generate`"):
        pair.base.generate(**inputs, custom_generate=nudging_hf.generate, nudging_model=None)
    with pytest.raises(ValueError, match="There is no nudging model"):
        pair.base.generate(**inputs, custom_generate=nudging_hf.generate)


def test_a_relative_name_needs_a_base_from_a_folder(pair, inputs):
    with pytest.raises(ValueError, match="the base was not loaded from a folder"):
        nudging_hf.generate(pair.base, **inputs, nudging_model="./nudging")


NOT_NAMES = ["--no-such", "../../no/such", "http://localhost/no", "no\0such", "no\nsuch", "~", "", "/dev/null"]


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such/name", *NOT_NAMES])
def test_a_model_that_cannot_be_loaded_is_refused(pair, inputs, name):
    with pytest.raises(ValueError, match=f"(?s){re.escape(repr(name))} cannot be loaded.*`nudging_model=`"):
        nudging_hf.generate(pair.base, **inputs, nudging_model=name, local_files_only=True)
    pair.base.generation_config.nudging_model_name_or_path = name
    with pytest.raises(ValueError, match=r"correct `nudging_model_name_or_path` in the base's generation_config.json"):
        nudging_hf.generate(pair.base, **inputs, local_files_only=True)


@pytest.mark.parametrize("name", [5, True, [], {}, ["a"], b"a"])
def test_a_config_that_names_no_model_is_refused(pair, inputs, name):
    pair.base.generation_config.nudging_model_name_or_path = name
    with pytest.raises(ValueError, match="`nudging_model` must be a causal language model of transformers, got"):
        nudging_hf.generate(pair.base, **inputs)


def test_absurd_lengths_in_a_config_change_nothing(pair, inputs, expected):
    given = {"nudging_model": pair.nudging_model, "nudging_tokenizer": pair.nudging_tokenizer}
    for name in ("num_nudging_tokens", "num_draft_tokens"):
        setattr(pair.base.generation_config, name, 10**400)
    nudging_hf.generate(pair.base, **inputs, **given)
    del pair.base.generation_config.num_nudging_tokens
    assert torch.equal(nudging_hf.generate(pair.base, **inputs, **given), expected)


def test_pickled_weights_are_refused(pair, folder, inputs):
    torch.save(pair.nudging_model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        nudging_hf.generate(pair.base, **inputs, nudging_model=str(folder))
