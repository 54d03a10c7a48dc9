"""Tiny random models of the causal architectures of transformers. This module knows nothing of nudging."""

import inspect
from typing import Any

import torch
from tiny import byte_bpe
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": 512,
    "d_model": 32,
    "ffn_dim": 64,
    "num_heads": 4,
    "num_layers": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 8,
    "is_decoder": True,
    # Linear attention and indexers.
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "index_topk": 6,
    "index_head_dim": 16,
    "index_n_heads": 16,  # With few heads, many scores are 0, and the order of equal scores is undefined.
}
_ALTERNATING = ["linear_attention", "full_attention"] * 2
# The names of Mamba layers, and of attention layers in the same model, depend on the version of transformers.
_HAS_MAMBA_TYPE = "mamba" in ALLOWED_LAYER_TYPES
_MAMBA, _ATTENTION = ("mamba", "attention") if _HAS_MAMBA_TYPE else ("linear_attention", "full_attention")
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
_MLA = {"head_dim": None, "num_key_value_heads": 4}

# What an architecture needs besides `_SIZES`. `None` keeps the architecture's default size.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": {"num_hidden_layers": 3},
    "codegen": {"rotary_dim": 4},
    "cohere2_moe": {"num_hidden_layers": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "indexed_attention"],
        "sliding_window": 8,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "v_head_dim")},
    },
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 6,
        "intermediate_size": [64] * 6,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "num_experts": None,
        "moe_intermediate_size": None,
    },
    "gemma4_unified_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "d_rel": 8,
        "rel_extent": 16,
        "local_layer_ids": [0],
        "unpadded_vocab_size": 320,
    },
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "d_rel": 8,
        "rel_extent": 16,
        "unpadded_vocab_size": 320,
    },
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "d_rel": 8,
        "rel_extent": 16,
        "unpadded_vocab_size": 320,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "lara_mini": {"num_hidden_layers": 4},
    "longcat_flash": {
        "num_layers": 1,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "qk_head_dim": 16,
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
    },
    "mimo_v2_flash": {"num_hidden_layers": 2},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 3,
        "dense_intermediate_size": 64,
        "rotary_dim": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "modernbert-decoder": {"num_hidden_layers": 3, "local_attention": 8},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "feed_forward_size": 64,
        "attention_head_size": 8,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "sarvam_mla": {"num_key_value_heads": 4},
    "xglm": {"attention_heads": 4, "num_layers": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "num_hidden_layers": 4, "router_hidden_size": 16},
    "bailing_hybrid": {
        "num_hidden_layers": 4,
        "layer_types": _ALTERNATING,
        "num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], "layer_types": None, **_MAMBA2},
    "deepseek_v32": {"num_hidden_layers": 3, **_MLA},
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 16,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
        "index_topk": 3,
        "head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA2},
    "falcon_mamba": {"state_size": 8},
    "glm_moe_dsa": {"num_hidden_layers": 3, **_MLA},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": [_MAMBA, _ATTENTION] * 2, **_MAMBA2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "num_hidden_layers": 4,
        "layer_types": _ALTERNATING,
        "num_key_value_heads": 4,
        "head_dim": None,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 4},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 2},
    "minimax": {"num_hidden_layers": 4, "layer_types": _ALTERNATING, "block_size": 4},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": [_MAMBA, "moe", _ATTENTION, "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 32,
        "mamba_ssm_cache_dtype": "float64",
    },
    "olmo_hybrid": {"num_hidden_layers": 4, "layer_types": _ALTERNATING},
    "qwen3_5_text": {"num_hidden_layers": 4, "layer_types": _ALTERNATING},
    "qwen3_5_moe_text": {"num_hidden_layers": 4, "layer_types": _ALTERNATING},
    "qwen3_next": {"num_hidden_layers": 4, "layer_types": _ALTERNATING},
    "qwen4_exp_text": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 6,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8, "sliding_window": None, "head_dim": None},
    "rwkv": {"attention_hidden_size": 32, "context_length": 512, "rescale_every": 0},
    "xlstm": {
        "hidden_size": 128,
        "num_heads": 4,
        "chunkwise_kernel": "chunkwise--native_autograd",
        "inference_state_dtype": "float32",
        "autocast_kernel_dtype": "float32",
        "head_dim": None,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": [_MAMBA, "hybrid"] * 2,
        "num_key_value_heads": 4,
        "head_dim": None,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": [_MAMBA, "hybrid"] * 2,
        "num_key_value_heads": 4,
        "head_dim": None,
        "n_mamba_heads": 4,
    },
}


# The architectures that are left out, and why.
_COMPOSITE = "its language model is a model type of its own"
LEFT_OUT = {
    "blt": "reads bytes in patches, with further models for the patches",
    "dots3_note": _COMPOSITE,
    "emu3": "also has an image model, and no type for the language model alone",
    "fuyu": "also has an image model; its language model is a persimmon",
    "gemma3": _COMPOSITE,
    "gemma3n": _COMPOSITE,
    "gemma4": _COMPOSITE,
    "gemma4_assistant": "reads the hidden states of another model",
    "gemma4_unified": _COMPOSITE,
    "gemma4_unified_assistant": "reads the hidden states of another model",
    "git": "also has an image model",
    "got_ocr2": "also has an image model; its language model is a qwen2",
    "inkling2_loop_text": "mixes float32 with the dtype it is given",
    "inkling2_text": "mixes float32 with the dtype it is given",
    "llama4": _COMPOSITE,
    "mllama": "also has an image model",
    "moshi": "also has audio models",
    "moss_transcribe_diarize": "also has an audio model",
    "musicgen": "generates audio, several tokens at a time",
    "musicgen_melody": "generates audio, several tokens at a time",
    "phi4_multimodal": "also has image and audio models; its language model is a phi3",
    "qwen3_5": _COMPOSITE,
    "qwen3_5_moe": _COMPOSITE,
    "qwen4_exp": _COMPOSITE,
    "xglm": "fills float32 scores with the lowest number of the dtype it is given",
}
MODEL_TYPES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT)

# Standard deviations of the layers' weights and of the token embeddings.
_LAYER_STD = 0.25
_EMBEDDING_STD = 1.0
# Smaller where the model scales embeddings up or layers down, so that logits depend on more than the last token.
_SMALLER_EMBEDDINGS = dict.fromkeys(
    (
        "ctrl",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
        "minicpm3",
        "vaultgemma",
        "zamba",
    ),
    0.2,
)
_MAX_PARAMETERS = 5_000_000


def _config(model_type: str) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    named = set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map)
    tokenizer = byte_bpe()
    sizes = {name: size for name, size in _SIZES.items() if name in named}
    if getattr(config_class, "sliding_window", 0) is None:
        sizes.pop("sliding_window", None)
    if "qk_rope_head_dim" in named:  # Heads have two sizes, and there are as many key heads as query heads.
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= _OVERRIDES.get(model_type, {})
    sizes = {name: size for name, size in sizes.items() if size is not None}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return config_class(vocab_size=len(tokenizer), **sizes, **ids, tie_word_embeddings=False)


def tiny(model_type: str, seed: int) -> PreTrainedModel:
    """A random causal LM of 1 to 6 small layers, in float64 and eval mode, with the vocabulary of `byte_bpe`.

    Args:
        model_type: one of `MODEL_TYPES`.
        seed: the seed of its weights.
    """
    config = _config(model_type)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if count > _MAX_PARAMETERS:
        raise ValueError(f"{model_type} has {count} parameters: expected at most {_MAX_PARAMETERS}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        embeddings = model.get_input_embeddings().weight
        embedding_std = _SMALLER_EMBEDDINGS.get(model_type, _EMBEDDING_STD)
        for name, parameter in model.named_parameters():
            is_weight = parameter.dim() == 2 or (parameter.dim() == 3 and "experts" in name)
            if is_weight and not name.endswith("A_log"):  # A_log is the decay rate of a state.
                parameter.data.normal_(0.0, embedding_std if parameter is embeddings else _LAYER_STD)
    model.requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # Other implementations do not support float64.
    ids = {"eos_token_id": byte_bpe().eos_token_id, "pad_token_id": byte_bpe().pad_token_id}
    model.generation_config = GenerationConfig(**ids)
    _sharpen(model)
    return model


@torch.no_grad()
def _sharpen(model: PreTrainedModel) -> None:
    """Scales the head so that half of the top-1 probabilities are above 0.45 and few choices are control tokens."""
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return
    head.weight[list(byte_bpe().all_special_ids)] *= 0.5
    ids = torch.randint(3, len(byte_bpe()), (16, 10), generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # A soft cap on the logits weakens the effect, so scaling is repeated.
        logits = model(ids, use_cache=False).logits[:, 4:].double()
        steps = [2.0 ** (step / 4) for step in range(-24, 25)]
        sharp = [step for step in steps if (step * logits).softmax(-1).amax(-1).median() >= 0.45]
        scale = sharp[0] if sharp else steps[-1]
        head.weight.mul_(scale)
        if abs(scale - 1) < 0.3:
            break
