"""How a model is to be read is found out by what it does."""

import pytest
import torch
import transformers
from architectures import MODEL_TYPES, tiny
from packaging.version import Version
from running import inputs_of
from tiny import Pair, byte_bpe, pair, prompts
from transformers import BertConfig, BertLMHeadModel

import nudging_hf
from nudging_hf.core import reading_mode, validation
from nudging_hf.core.reading_mode import ReadingMode, Rows
from nudging_hf.core.transformers_private import cache_argument, index_goes_on


@pytest.mark.parametrize("arch", ["llama", "gemma3", "olmo2"])
def test_a_model_with_rotary_positions_and_keys_and_values_is_not_tried(arch, monkeypatch):
    model = pair(arch, 0, "shared").base
    monkeypatch.setattr(reading_mode, "_Trial", None)
    assert reading_mode.reading_mode(model) == ReadingMode()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "mpt"])
def test_rows_share_a_cache_where_what_is_masked_changes_nothing(kind):
    assert reading_mode.reading_mode(tiny(kind, seed=0)) == ReadingMode()


@pytest.mark.parametrize("kind", ["bart", "marian", "trocr"])
def test_rows_have_caches_of_their_own_where_positions_are_counted_by_the_cache(kind):
    assert reading_mode.reading_mode(tiny(kind, seed=0)) == ReadingMode(Rows.ALONE)


def test_rows_have_caches_of_their_own_where_an_index_picks_what_is_attended_to():
    """Among equals it picks by the slots in which they stand."""
    model = tiny("deepseek_v32", seed=0)
    if index_goes_on():
        assert reading_mode.reading_mode(model) == ReadingMode(Rows.ALONE)
    else:
        refused(model, "use_cache=False")


@pytest.mark.parametrize("kind", ["jamba", "mamba", "falcon_mamba"])
def test_a_pass_is_of_single_tokens_where_several_begin_anew(kind):
    assert reading_mode.reading_mode(tiny(kind, seed=0)).single_tokens


def test_a_state_that_is_kept_outside_of_the_cache_is_found_out():
    assert reading_mode.reading_mode(tiny("recurrent_gemma", seed=0)).trouble is not None


def test_a_model_that_takes_no_cache_reads_the_whole_text():
    """As if `use_cache=False` was said."""
    base = tiny("openai-gpt", seed=0)
    assert cache_argument(base) is None
    chosen = Pair(base, pair("llama", 0, "shared").nudging_model, byte_bpe(), byte_bpe())
    inputs = inputs_of(chosen, *prompts(chosen, 3, 0))
    expected = nudging_hf.generate(base, **inputs, max_new_tokens=8, use_cache=False)
    assert torch.equal(nudging_hf.generate(base, **inputs, max_new_tokens=8), expected)


def refused(base, match, **settings):
    chosen = Pair(base, pair("llama", 0, "shared").nudging_model, byte_bpe(), byte_bpe())
    for models in (chosen, Pair(chosen.nudging_model, base, byte_bpe(), byte_bpe())):
        inputs = inputs_of(models, *prompts(models, 1, 0))
        with pytest.raises(ValueError, match=match):
            nudging_hf.generate(models.base, **inputs, max_new_tokens=4, **settings)


@pytest.mark.parametrize("kind", ["xlnet", "roberta"])
def test_a_model_that_reads_more_than_ids_is_refused(kind):
    refused(tiny(kind, seed=0), "give a decoder-only model")


def test_a_model_that_sees_what_follows_is_refused():
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    refused(BertLMHeadModel(config).double().eval(), "is_decoder=True")


@pytest.mark.parametrize("kind", ["gpt_neo", "qwen3_next", "bart"])
def test_a_static_cache_that_would_be_read_wrongly_is_refused(kind):
    refused(tiny(kind, seed=0), "leave out `cache_implementation='static'`", cache_implementation="static")


@pytest.mark.parametrize("kind", ["minimax", "deepseek_v4", "xlstm", "rwkv"])
def test_a_row_has_a_cache_of_its_own_where_that_is_of_the_models_own_kind(kind):
    if kind not in MODEL_TYPES:
        pytest.skip("not in this version of transformers")
    model = tiny(kind, seed=0)
    assert not reading_mode.has_common_cache(model)
    if kind == "deepseek_v4" and Version(transformers.__version__) < Version("5.17"):
        refused(model, "use_cache=False")
    else:
        assert reading_mode.reading_mode(model) == ReadingMode(Rows.ALONE, single_tokens=kind == "minimax")


def test_a_cache_that_a_model_does_not_go_on_from_is_refused_with_the_mend():
    refused(tiny("recurrent_gemma", seed=0), "use_cache=False")


def test_images_are_not_read_into_a_cache_of_the_models_own_kind(monkeypatch):
    base = pair("llama", 0, "shared").base
    monkeypatch.setattr(validation, "reads_more_than_text", lambda model: True)
    monkeypatch.setattr(validation, "has_common_cache", lambda model: False)
    with pytest.raises(ValueError, match="its own kind of cache, into which `pixel_values`"):
        validation.validate_multimodal_inputs(base, ["pixel_values"], use_cache=True, is_static=False)


def test_a_model_in_training_is_not_tried():
    model = tiny("gpt2", seed=0).train()
    try:
        assert reading_mode.reading_mode(model).is_causal
    finally:
        model.eval()
