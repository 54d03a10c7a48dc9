"""Bases with images, experts or adapters, on several devices, quantised, or divided among processes."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from running import inputs_of, nudge
from tiny import Pair, byte_bpe, other_byte_bpe, pair, prompts, tiny_model
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

import nudging_hf
from nudging_hf.core.named_model import named_nudging_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def randomised(model: PreTrainedModel, seed: int, eos: int, pad: int) -> PreTrainedModel:
    """Gives a model random float64 weights, with which its top-1 probabilities are spread over (0, 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.double().eval().requires_grad_(False).named_parameters():
            if "vision" in name or "visual" in name:
                parameter.normal_(0.0, 0.3)
            elif parameter.dim() >= 2:
                parameter.normal_(0.0, 0.4 if "embed" in name else 0.25)
    model.lm_head.weight.mul_(3)
    model.lm_head.weight[320:] = 0  # These tokens have logits of 0 and are never chosen.
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model


# Images --------------------------------------------------------------------------------------------------------------

IMAGE, VIDEO, VISION_END, VISION_START = 329, 328, 327, 326  # Beyond the tokenizer's 320 tokens.
TEXT = {**SIZES, "vocab_size": 330, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "text_config": {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    },
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**VISION, projection_dim=16)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)


def gemma3() -> PreTrainedModel:
    sliding = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    text = Gemma3TextConfig(**TEXT, **sliding, query_pre_attn_scalar=8)
    config = Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**VISION), mm_tokens_per_image=4, image_token_id=IMAGE
    )
    return Gemma3ForConditionalGeneration(config)


def paligemma() -> PreTrainedModel:
    vision = SiglipVisionConfig(**VISION, projection_dim=32)
    config = PaliGemmaConfig(
        vision_config=vision, text_config=GemmaConfig(**TEXT), image_token_id=IMAGE, projection_dim=32
    )
    return PaliGemmaForConditionalGeneration(config)


def qwen2_5_vl() -> PreTrainedModel:
    vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **QWEN))


def qwen3_vl() -> PreTrainedModel:
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, **QWEN))


VISION_MODELS = {make.__name__: make for make in (llava, gemma3, paligemma, qwen2_5_vl, qwen3_vl)}
_MADE: dict[str, PreTrainedModel] = {}


def vision_pair(kind: str, vocabularies: str) -> Pair:
    """A base that reads images and a nudging model that does not, with one vocabulary ("shared") or two."""
    tokenizer = byte_bpe()
    if kind not in _MADE:
        _MADE[kind] = randomised(VISION_MODELS[kind](), 0, tokenizer.eos_token_id, tokenizer.pad_token_id)
    other = tokenizer if vocabularies == "shared" else other_byte_bpe()
    nudging_model = tiny_model("llama", len(other), 5, other.eos_token_id, other.pad_token_id, eos_rate=0.008)
    return Pair(_MADE[kind], nudging_model, tokenizer, other)


TEXTS = ("What is on the", "Look: the quick brown fox. And", "A café is", "She said that the other one is")


def image_inputs(kind: str, chosen: Pair, rows: list[int], image_seed: int = 0, last: bool = False) -> dict:
    """The inputs of both models as a processor would make them, with a different image for each row.

    With `last`, the image comes after the text, so that the prompt ends with it.
    """
    tokenizer = chosen.tokenizer
    qwen = kind.startswith("qwen")
    image = [VISION_START, *[IMAGE] * 4] if qwen else [IMAGE] * 4
    prompts = []
    for row in rows:
        text = tokenizer.encode(TEXTS[row], add_special_tokens=False)
        prompts.append([*text, *image] if last else [*text[: row + 1], *image, *text[row + 1 :]])
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    draws = [torch.Generator().manual_seed(100 * image_seed + row) for row in rows]
    options = {"dtype": torch.float64}
    if qwen:  # The patches of all images are in one tensor.
        pixels = torch.cat([torch.randn(16, 96, generator=draw, **options) for draw in draws])
        more = {"image_grid_thw": torch.tensor([[1, 4, 4]] * len(rows)), "mm_token_type_ids": (ids == IMAGE).long()}
    else:
        pixels = torch.cat([torch.randn(1, 3, 16, 16, generator=draw, **options) for draw in draws])
        kinds = {"gemma3": (ids == IMAGE).long(), "paligemma": torch.zeros_like(ids)}
        more = {"token_type_ids": kinds[kind]} if kind in kinds else {}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        **more,
        "tokenizer": tokenizer,
        "nudging_tokenizer": chosen.nudging_tokenizer,
        "nudging_model": chosen.nudging_model,
    }


def answers(chosen: Pair, inputs: dict, **settings) -> tuple[list, list, list]:
    """The ids, nudged masks and finish reasons of each row, without padding."""
    output = nudging_hf.generate(chosen.base, **inputs, return_dict_in_generate=True, **settings)
    lengths = (~output.base_top1_probs.isnan()).sum(dim=1).tolist()
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    ids = [row[:n] for row, n in zip(new, lengths, strict=True)]
    return ids, [row[:n] for row, n in zip(output.nudged_mask.tolist(), lengths, strict=True)], output.finish_reasons


def plain_inputs(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if "nudging" not in name and name != "tokenizer"}


def continued(kind: str, inputs: dict, ids: list[int]) -> dict:
    """The plain inputs of a single row, with `ids` after the prompt."""
    more = plain_inputs(inputs)
    new = torch.tensor([ids], dtype=torch.long)
    more["input_ids"] = torch.cat([more["input_ids"], new], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", int(kind == "paligemma"))):
        if name in more:
            more[name] = torch.cat([more[name], torch.full_like(new, value)], dim=1)
    return more


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_at_threshold_zero_the_base_continues_as_plain_generate_with_the_image(kind):
    chosen = vision_pair(kind, "shared")
    found = 0
    for row in range(3):
        inputs = image_inputs(kind, chosen, [row])
        [[ids], [nudged], _] = answers(chosen, inputs, nudge_threshold=0, max_new_tokens=24, min_new_tokens=24)
        first = nudged.index(False)
        begun = continued(kind, inputs, ids[:first])
        left = 24 - first
        own = chosen.base.generate(**begun, max_new_tokens=left, min_new_tokens=left, do_sample=False)
        assert ids[first:] == own[0, begun["input_ids"].shape[1] :].tolist()
        assert not any(nudged[first:])
        found += left
    assert found > 40


@torch.no_grad()
@pytest.mark.parametrize(("kind", "vocabularies"), [*zip(VISION_MODELS, ["two", "shared"] * 3, strict=False)])
def test_the_logits_of_the_base_are_those_of_a_plain_pass(kind, vocabularies):
    chosen = vision_pair(kind, vocabularies)
    inputs = image_inputs(kind, chosen, [0, 1, 2])
    output = nudging_hf.generate(
        chosen.base, **inputs, max_new_tokens=20, nudge_threshold=0.5, return_dict_in_generate=True, output_logits=True
    )
    assert output.nudged_mask.any() and not output.nudged_mask.all()
    other = nudging_hf.generate(
        chosen.base,
        **image_inputs(kind, chosen, [0, 1, 2], image_seed=1),
        max_new_tokens=20,
        nudge_threshold=0.5,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert (other.logits[0] - output.logits[0]).abs().max() > 1e-3  # Another image gives other logits.
    for row in range(3):
        n = int((~output.base_top1_probs[row].isnan()).sum())
        alone = image_inputs(kind, chosen, [row])
        begun = continued(kind, alone, output.sequences[row, inputs["input_ids"].shape[1] :][: n - 1].tolist())
        whole = chosen.base(**begun, use_cache=False).logits[0, alone["input_ids"].shape[1] - 1 :].float()
        said = torch.stack([step[row] for step in output.logits[:n]])
        torch.testing.assert_close(said, whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.base_top1_probs[row, :n], whole.softmax(-1).amax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "vocabularies"), [*zip(VISION_MODELS, ["shared", "two"] * 3, strict=False)])
def test_with_images_drafted_is_sequential_and_batch_is_singles(kind, vocabularies):
    chosen = vision_pair(kind, vocabularies)
    rows = [3, 0, 2]
    settings = {"nudge_threshold": 0.4, "max_new_tokens": 20}
    together = answers(chosen, image_inputs(kind, chosen, rows), **settings)
    assert answers(chosen, image_inputs(kind, chosen, rows), num_draft_tokens=0, **settings) == together
    authors = [author for row in together[1] for author in row]
    assert any(authors) and not all(authors)
    for i, row in enumerate(rows):
        alone = answers(chosen, image_inputs(kind, chosen, [row]), **settings)
        assert [each[0] for each in alone] == [each[i] for each in together]


def test_a_prompt_may_end_with_its_image():
    """The image's last token is not read again as if it were text."""
    chosen = vision_pair("llava", "shared")
    inputs = image_inputs("llava", chosen, [0, 1], last=True)
    settings = {"max_new_tokens": 20, "nudge_threshold": 0.5, "return_dict_in_generate": True, "output_logits": True}
    output = nudging_hf.generate(chosen.base, **inputs, **settings)
    plain = chosen.base.generate(
        **plain_inputs(inputs), max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    torch.testing.assert_close(output.logits[0], plain.logits[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_several_sampled_answers_share_an_image(kind):
    chosen = vision_pair(kind, "shared")
    settings = {"max_new_tokens": 12, "do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(3)
    output = nudging_hf.generate(chosen.base, **image_inputs(kind, chosen, [0, 1]), **settings, num_return_sequences=2)
    torch.manual_seed(3)
    twice = nudging_hf.generate(chosen.base, **image_inputs(kind, chosen, [0, 0, 1, 1]), **settings)
    assert torch.equal(output.sequences, twice.sequences)
    torch.testing.assert_close(output.logits[0], twice.logits[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_a_vision_base_also_reads_plain_text(kind):
    chosen = vision_pair(kind, "shared")
    base_prompts, nudging_prompts = prompts(chosen, 3, 1)
    settings = {"max_new_tokens": 20, "nudge_threshold": 0.4}
    results = nudge(chosen, base_prompts, nudging_prompts, **settings)
    for prompt, nudging_prompt, result in zip(base_prompts, nudging_prompts, results, strict=True):
        expected = oracle.decode(*vars(chosen).values(), prompt, nudging_prompt, threshold=0.4, max_new_tokens=20)
        assert result.ids == expected.ids


@pytest.mark.parametrize("vocabularies", ["shared", "two"])
def test_a_derived_nudging_prompt_contains_no_images(vocabularies):
    chosen = vision_pair("llava", vocabularies)
    inputs = image_inputs("llava", chosen, [1])
    text = chosen.nudging_tokenizer(TEXTS[1], return_tensors="pt").input_ids
    template, chosen.nudging_tokenizer.chat_template = chosen.nudging_tokenizer.chat_template, None
    try:
        left_out = answers(chosen, inputs, max_new_tokens=16)
        assert left_out == answers(chosen, {**inputs, "nudging_input_ids": text}, max_new_tokens=16)
    finally:
        chosen.nudging_tokenizer.chat_template = template


def test_images_are_read_through_every_way_of_calling():
    chosen = vision_pair("qwen3_vl", "shared")
    inputs = image_inputs("qwen3_vl", chosen, [0, 1])
    expected = nudging_hf.generate(chosen.base, **inputs, max_new_tokens=12)
    nudging_hf.register()
    try:
        assert torch.equal(chosen.base.generate(**inputs, max_new_tokens=12), expected)
    finally:
        nudging_hf.unregister()
    called = {name: value for name, value in inputs.items() if name != "tokenizer"}
    called["base_tokenizer"] = chosen.tokenizer
    by_callable = chosen.base.generate(**called, custom_generate=nudging_hf.generate, max_new_tokens=12)
    assert torch.equal(by_callable, expected)


class WithOwnGenerate(LlavaForConditionalGeneration):
    def generate(self, *args, **kwargs):
        raise AssertionError("nudging must not call this")


def test_inputs_that_the_base_cannot_read_are_refused():
    chosen = vision_pair("llava", "shared")
    inputs = image_inputs("llava", chosen, [0])
    with pytest.raises(ValueError, match="leave out `use_cache=False`"):
        nudging_hf.generate(chosen.base, **inputs, max_new_tokens=4, use_cache=False)
    with pytest.raises(ValueError, match="leave out `cache_implementation='static'`"):
        nudging_hf.generate(chosen.base, **inputs, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="its own `generate`"):
        nudging_hf.generate(WithOwnGenerate(chosen.base.config).double(), **inputs, max_new_tokens=4)
    config = GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=1, eos_token_id=1, bos_token_id=None)
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="reads text alone"):
        nudging_hf.generate(
            GPT2LMHeadModel(config),
            **{**text, "input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])},
            token_type_ids=torch.tensor([[0, 1]]),
            max_new_tokens=4,
        )


# Experts -------------------------------------------------------------------------------------------------------------

EXPERTS = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**{**TEXT, "vocab_size": 320}, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**{**TEXT, "vocab_size": 320}, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    ),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_laws_hold_for_experts(kind):
    tokenizer = byte_bpe()
    base = randomised(EXPERTS[kind](), 1, tokenizer.eos_token_id, tokenizer.pad_token_id)
    base.set_experts_implementation("eager")  # The grouped implementation does not support float64.
    nudging_model = tiny_model("llama", 320, 5, tokenizer.eos_token_id, tokenizer.pad_token_id, eos_rate=0.008)
    chosen = Pair(base, nudging_model, tokenizer, tokenizer)
    given = prompts(chosen, 4, 0)
    for threshold in (0.2, 0.5):
        settings = {"max_new_tokens": 20, "nudge_threshold": threshold}
        results = nudge(chosen, *given, **settings)
        for i, (prompt, nudging_prompt) in enumerate(zip(*given, strict=True)):
            expected = oracle.decode(
                *vars(chosen).values(), prompt, nudging_prompt, threshold=threshold, max_new_tokens=20
            )
            assert (results[i].ids, results[i].nudged) == (expected.ids, expected.nudged)


# Devices -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reference():
    """A pair, its inputs, the settings, and the expected ids."""
    chosen = pair("llama", 0, "two")
    inputs = inputs_of(chosen, *prompts(chosen, 3, 0))
    settings = {"max_new_tokens": 16, "nudge_threshold": 0.5, "no_repeat_ngram_size": 3}
    return chosen, inputs, settings, nudging_hf.generate(chosen.base, **inputs, **settings)


SPLIT = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # Older versions see "meta" as its device.
@pytest.mark.parametrize("which", ["base", "nudging_model"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloaded_weights_give_the_same_ids(reference, how, which, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    chosen, inputs, settings, expected = reference
    models = {"base": chosen.base, "nudging_model": chosen.nudging_model}
    models[which] = copy.deepcopy(models[which])
    if how == "cpu_offload":
        accelerate.cpu_offload(models[which], execution_device=torch.device("cpu"))
    elif how == "disk_offload":
        accelerate.disk_offload(models[which], tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(models[which], SPLIT, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert models[which].device.type == "meta"
    inputs["nudging_model"] = models["nudging_model"]
    assert torch.equal(nudging_hf.generate(models["base"], **inputs, **settings), expected)


def test_a_named_nudging_model_is_not_offloaded_with_its_base(reference, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    chosen, *_ = reference
    chosen.nudging_model.save_pretrained(tmp_path)
    chosen.nudging_tokenizer.save_pretrained(tmp_path)
    base = accelerate.cpu_offload(copy.deepcopy(chosen.base), execution_device=torch.device("cpu"))
    for _ in range(2):
        model, _ = named_nudging_model(base, str(tmp_path), {})
        assert model.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("which", ["base", "nudging_model"])
@pytest.mark.parametrize("ids_on", ["cpu", "cuda"])
def test_two_devices_give_the_same_ids(reference, which, ids_on):
    chosen, inputs, settings, expected = reference
    models = {"base": chosen.base, "nudging_model": chosen.nudging_model}
    models[which] = copy.deepcopy(models[which]).cuda()
    inputs = {name: value.to(ids_on) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    inputs["nudging_model"] = models["nudging_model"]
    if which == "nudging_model" and ids_on == "cuda":
        pytest.skip("plain generate warns about it")
    output = nudging_hf.generate(models["base"], **inputs, **settings, return_dict_in_generate=True)
    assert torch.equal(output.sequences.cpu(), expected)


# Adapters ------------------------------------------------------------------------------------------------------------


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads this attribute.
@pytest.mark.parametrize("which", ["base", "nudging_model"])
def test_an_adapter_gives_the_ids_of_the_merged_model(reference, which):
    config = lora()
    import peft

    chosen, inputs, settings, without = reference
    models = {"base": chosen.base, "nudging_model": chosen.nudging_model}
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(models[which]), config, autocast_adapter_dtype=False).double().eval()
    models[which] = copy.deepcopy(wrapped).merge_and_unload()
    inputs["nudging_model"] = models["nudging_model"]
    expected = nudging_hf.generate(models["base"], **inputs, **settings)
    assert expected.shape != without.shape or not torch.equal(expected, without)
    models[which] = wrapped
    inputs["nudging_model"] = models["nudging_model"]
    assert torch.equal(nudging_hf.generate(models["base"], **inputs, **settings), expected)
    nudging_hf.register()
    try:
        assert torch.equal(models["base"].generate(**inputs, **settings), expected)
    finally:
        nudging_hf.unregister()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads this attribute.
def test_an_adapter_that_transformers_loads_gives_the_ids_of_the_merged_model(reference, tmp_path):
    config = lora()
    import peft

    chosen, inputs, settings, _ = reference
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(chosen.base), config, autocast_adapter_dtype=False).double().eval()
    wrapped.save_pretrained(tmp_path)
    expected = nudging_hf.generate(wrapped.merge_and_unload(), **inputs, **settings)
    base = copy.deepcopy(chosen.base)
    base.load_adapter(str(tmp_path))
    assert torch.equal(nudging_hf.generate(base.double().eval(), **inputs, **settings), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads this attribute.
@pytest.mark.parametrize("door", ["function", "registered"])
def test_a_prompt_adapter_is_refused(reference, door):
    peft = pytest.importorskip("peft")
    chosen, inputs, settings, _ = reference
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(copy.deepcopy(chosen.base), config)
    nudging_hf.register()
    try:
        with pytest.raises(ValueError, match="adapter of the layers"):
            if door == "function":
                nudging_hf.generate(wrapped, **inputs, **settings)
            else:
                wrapped.generate(**inputs, **settings)
    finally:
        nudging_hf.unregister()


# Quantised weights ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes warns that it computes in float16.
@pytest.mark.parametrize("bits", [4, 8])
def test_the_laws_hold_for_quantised_weights(reference, bits, tmp_path, monkeypatch):
    layers = pytest.importorskip("bitsandbytes.nn.modules")
    # Its kernel for CPUs with AVX512_BF16 does not support matrices narrower than a block of 64 weights.
    monkeypatch.setattr(layers, "has_avx512bf16", lambda: False)
    chosen, *_ = reference
    chosen.base.save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    base = type(chosen.base).from_pretrained(
        tmp_path, quantization_config=quantised, dtype=torch.float32, device_map="cpu"
    )
    assert any(not parameter.is_floating_point() for parameter in base.parameters())
    given = Pair(base, chosen.nudging_model, chosen.tokenizer, chosen.nudging_tokenizer)
    [prompt, *_], [nudging_prompt, *_] = prompts(chosen, 3, 0)
    [result] = nudge(given, [prompt], [nudging_prompt], max_new_tokens=16, nudge_threshold=0.1)
    expected = oracle.decode(*vars(given).values(), prompt, nudging_prompt, threshold=0.1, max_new_tokens=16)
    assert (result.ids, result.nudged) == (expected.ids, expected.nudged)
    assert not all(result.nudged)


# Several processes ---------------------------------------------------------------------------------------------------

TENSOR_PARALLEL = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM
import nudging_hf
from nudging_hf.core.transformers_private import tensor_parallel_group
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from running import inputs_of
from tiny import Pair, pair, prompts
chosen = pair("llama", 0, "shared")
base = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
assert tensor_parallel_group(base).size() == 2
inputs = inputs_of(chosen, *prompts(chosen, 3, 0))
answers = []
for settings in ({}, {"do_sample": True}):
    torch.manual_seed(7 + int(os.environ["RANK"]))  # Each rank has another seed, and that of the first one counts.
    output = nudging_hf.generate(base, **inputs, max_new_tokens=16, nudge_threshold=0.5, **settings)
    answers.append(output.tolist())
with open(f"{folder}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump(answers, file)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_tensor_parallel_ranks_answer_as_one_process(tmp_path):
    chosen = pair("llama", 0, "shared")
    chosen.base.save_pretrained(tmp_path)
    (tmp_path / "script.py").write_text(TENSOR_PARALLEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [*run, tmp_path / "script.py", tmp_path, here],
        env={**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    inputs = inputs_of(chosen, *prompts(chosen, 3, 0))
    for settings, answer in zip(({}, {"do_sample": True}), ranks[0], strict=True):
        torch.manual_seed(7)
        alone = nudging_hf.generate(chosen.base, **inputs, max_new_tokens=16, nudge_threshold=0.5, **settings)
        assert alone.tolist() == answer
