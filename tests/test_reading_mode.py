"""A model's reading mode is found from its config or by a trial."""

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
from nudging_hf.core.reading_mode import ReadingMode
from nudging_hf.core.transformers_private import cache_argument, indexer_continues_from_cache


@pytest.mark.parametrize("arch", ["llama", "gemma3", "olmo2"])
def test_a_model_with_rotary_positions_and_only_keys_and_values_needs_no_trial(arch, monkeypatch):
    model = pair(arch, 0, "shared").base
    monkeypatch.setattr(reading_mode, "_Trial", None)
    assert reading_mode.reading_mode(model) == ReadingMode()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "mpt"])
def test_rows_share_a_cache_where_masked_slots_do_not_change_the_logits(kind):
    assert reading_mode.reading_mode(tiny(kind, seed=0)) == ReadingMode()


@pytest.mark.parametrize("kind", ["bart", "marian", "trocr"])
def test_rows_do_not_share_a_cache_that_counts_positions(kind):
    assert reading_mode.reading_mode(tiny(kind, seed=0)) == ReadingMode(rows_share_cache=False)


def test_rows_do_not_share_a_cache_with_an_indexer():
    """Among tokens with equal scores, an indexer picks by their slots."""
    model = tiny("deepseek_v32", seed=0)
    if indexer_continues_from_cache():
        assert reading_mode.reading_mode(model) == ReadingMode(rows_share_cache=False)
    else:
        refused(model, "use_cache=False")


@pytest.mark.parametrize("kind", ["jamba", "mamba", "falcon_mamba"])
def test_a_pass_has_one_token_where_several_would_start_from_an_empty_state(kind):
    assert reading_mode.reading_mode(tiny(kind, seed=0)).one_token_per_pass


def test_a_state_outside_of_the_cache_is_detected():
    assert reading_mode.reading_mode(tiny("recurrent_gemma", seed=0)).cache_problem is not None


def test_a_model_without_a_cache_answers_as_with_use_cache_false():
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


def test_a_model_that_attends_to_later_tokens_is_refused():
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    refused(BertLMHeadModel(config).double().eval(), "is_decoder=True")


@pytest.mark.parametrize("kind", ["gpt_neo", "qwen3_next", "bart"])
def test_a_static_cache_is_refused_where_the_model_cannot_use_it(kind):
    refused(tiny(kind, seed=0), "leave out `cache_implementation='static'`", cache_implementation="static")


@pytest.mark.parametrize("kind", ["minimax", "deepseek_v4", "xlstm", "rwkv"])
def test_rows_do_not_share_a_cache_of_the_models_own_class(kind):
    if kind not in MODEL_TYPES:
        pytest.skip("not in this version of transformers")
    model = tiny(kind, seed=0)
    assert not reading_mode.supports_row_rollback(model)
    if kind == "deepseek_v4" and Version(transformers.__version__) < Version("5.16"):
        refused(model, "use_cache=False")
    else:
        assert reading_mode.reading_mode(model) == ReadingMode(
            rows_share_cache=False, one_token_per_pass=kind == "minimax"
        )


def test_the_refusal_of_a_cache_names_use_cache_false():
    refused(tiny("recurrent_gemma", seed=0), "use_cache=False")


def test_images_are_refused_with_a_cache_of_the_models_own_class(monkeypatch):
    base = pair("llama", 0, "shared").base
    monkeypatch.setattr(validation, "reads_more_than_text", lambda model: True)
    monkeypatch.setattr(validation, "supports_row_rollback", lambda model: False)
    with pytest.raises(ValueError, match="its own kind of cache, into which `pixel_values`"):
        validation.validate_multimodal_inputs(base, ["pixel_values"], use_cache=True, is_static=False)


def test_a_model_in_training_needs_no_trial():
    model = tiny("gpt2", seed=0).train()
    try:
        assert reading_mode.reading_mode(model).is_causal
    finally:
        model.eval()
