"""The private API of transformers that nudging uses, and the differences between its versions."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

_logger = logging.getLogger(__name__)
_COMPILING = threading.Lock()

# The names of the cache argument: `cache` in `generate` and most models from 5.24 on, `past_key_values` in most models
# before, `cache_params` in some older models with a recurrent state, and `state` in RWKV. Models with remote code keep
# their names.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
# The name that `generate` of this version uses.
CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def accepted_arguments(model: Any) -> set[str]:
    """The names of the arguments of the model's forward pass."""
    return set(inspect.signature(model.forward).parameters)


def cache_argument(model: Any) -> str | None:
    """The name of the forward pass's cache argument; `None` where it takes no cache."""
    accepted = accepted_arguments(model)
    return next((name for name in CACHE_NAMES if name in accepted), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returns; `None` where it returns none."""
    names = list(output)  # `name in output` would also find deprecated names, with a warning.
    return next((output[name] for name in CACHE_NAMES if name in names), None)


# The lowest and the highest minor version of transformers on which the tests have passed.
LOWEST, NEWEST = (5, 12), (5, 24)


@lru_cache(maxsize=1)
def check_version(version: str = transformers.__version__) -> None:
    """Warns once if this version of transformers is newer than any that has been tested.

    Args:
        version: a version such as "5.24.0" or "5.25.0.dev0".

    Raises:
        ImportError: if the version is too old.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    tested = f"{'.'.join(map(str, LOWEST))} to {'.'.join(map(str, NEWEST))}"
    if (major, minor) < LOWEST:
        raise ImportError(
            f"Nudging was tested with transformers {tested}, and {version} is too old: "
            "run `pip install --upgrade transformers`."
        )
    if (major, minor) > NEWEST:
        _logger.warning(f"Nudging was tested with transformers {tested}, but {version} is installed.")


# Arguments of `generate` that it does not pass on to a `custom_generate` function.
_WITHHELD_ARGUMENTS = (
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


def arguments_of_caller() -> dict[str, Any]:
    """The arguments of the `generate` call that is calling a `custom_generate` function.

    `generate` does not pass on `tokenizer`, `streamer`, `assistant_model`, `synced_gpus` and others, nor does it tell
    whether `position_ids` or a cache came from the caller. So this function reads the stack frames of `generate`: the
    outermost, which belongs to a decorator, has the keyword arguments as they were given, and the innermost has those
    that were given by position.

    Returns:
        The arguments by name; an empty dictionary where no `generate` of transformers is calling.
    """
    codes, function = [], GenerationMixin.generate
    while function is not None:
        codes.append(function.__code__)
        function = getattr(function, "__wrapped__", None)
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not codes[-1]:
        frame = frame.f_back
    if frame is None:
        return {}
    given = {name: frame.f_locals.get(name) for name in _WITHHELD_ARGUMENTS}
    while frame.f_back is not None and frame.f_back.f_code in codes[:-1]:
        frame = frame.f_back
    given.update(frame.f_locals.get("kwargs", {}))
    given.pop("custom_generate", None)
    return given


def waits_for_other_ranks(model: Any) -> bool:
    """Whether `generate` would set `synced_gpus` by itself, which keeps the passes of several processes in sync."""
    return bool(model._extract_generation_mode_kwargs(None, {}, None, None, None).get("synced_gpus"))


def merged_generation_config(
    model: Any, generation_config: GenerationConfig | None = None, **kwargs: Any
) -> GenerationConfig:
    """The config that `model.generate(generation_config=generation_config, **kwargs)` would use."""
    return model._prepare_generation_config(generation_config, **kwargs)[0]


def own_generation_config(model: Any, do_sample: bool) -> GenerationConfig:
    """The model's own generation config, with special tokens prepared and without a minimum length or a forced EOS.

    Args:
        model: a causal language model.
        do_sample: `False` makes the config greedy; `True` keeps what the model's own config says.
    """
    config = merged_generation_config(model)
    config.do_sample = bool(config.do_sample and do_sample)
    config.min_length = config.min_new_tokens = config.forced_eos_token_id = None
    model._prepare_special_tokens(config, device=input_device(model))
    return config


def commit_hash(model: Any) -> str | None:
    """The commit of the Hub repository that a model was loaded from; `None` where it came from elsewhere."""
    return getattr(model.config, "_commit_hash", None)


def byte_of_character() -> dict[str, int]:
    """The byte that each character stands for in a byte-level vocabulary (GPT-2's table)."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def arguments_of_pipeline(pipeline: Any, generate_kwargs: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The arguments that a text-generation pipeline gives `generate`: its own, a call's, and `overrides`."""
    if hasattr(pipeline, "_prepare_generate_kwargs"):  # From transformers 5.20 on.
        return pipeline._prepare_generate_kwargs(dict(generate_kwargs), **overrides)
    config = copy.deepcopy(pipeline.generation_config)
    defaults = pipeline._default_generation_config
    for name in ("max_new_tokens", "do_sample"):  # Up to 5.16 a pipeline's default overrides the model.
        own = getattr(pipeline.model.generation_config, name)
        if own is not None and getattr(config, name) == getattr(defaults, name):
            setattr(config, name, own)
    return {"generation_config": config, **generate_kwargs, **overrides}


# The attribute in which a patched `generate` keeps the original.
ORIGINAL = "_nudging_hf_original"


def plain_generate(model: Any) -> Callable[..., Any]:
    """The `generate` of the model's class without nudging."""
    own = type(model).generate
    return getattr(own, ORIGINAL, own)


def token_by_token(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
    """Runs plain greedy decoding or sampling with the arguments that `generate` gives a `custom_generate` function."""
    return model._sample(input_ids, **prepared)


def is_prepared(generation_config: GenerationConfig | None) -> bool:
    """Whether `generate` has prepared the config, as it does before it calls a `custom_generate` function."""
    return hasattr(generation_config, "_pad_token_tensor")


def eos_token_ids(generation_config: GenerationConfig) -> list[int]:
    """The EOS ids of a prepared config, in its order."""
    eos = generation_config._eos_token_tensor
    return [] if eos is None else eos.tolist()


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """The padding id of a prepared config. `generate` has set it to the first EOS if there was none."""
    pad = generation_config._pad_token_tensor
    return None if pad is None else int(pad)


def own_eos_token_ids(model: Any) -> list[int]:
    """The EOS ids of the model's own generation config, in its order. A call does not change them."""
    eos = model.generation_config.eos_token_id
    if isinstance(eos, torch.Tensor):
        eos = eos.flatten().tolist()
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens with which a model ends an answer: the EOS ids of its generation config and of its tokenizer.

    Many chat models end with a token that only one of the two names. Ids for which the model has no logit are omitted.
    """
    named, rows = [*own_eos_token_ids(model), tokenizer.eos_token_id], output_rows(model)
    return list(dict.fromkeys(token for token in named if token is not None and 0 <= token < rows))


def own_processors(model: Any, generation_config: GenerationConfig, input_ids: torch.Tensor) -> LogitsProcessorList:
    """The logits processors that a prepared config asks for, except that of `remove_invalid_values`.

    NaN and infinite logits are reported as errors, so they must not be removed.

    Args:
        model: the model whose logits are processed.
        generation_config: a prepared config.
        input_ids: the prompt, of shape (1, prompt_length).
    """
    prepared = model._get_logits_processor(
        generation_config=generation_config,
        input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids,
        device=input_ids.device,
        model_kwargs={"attention_mask": torch.ones_like(input_ids)},
    )
    return LogitsProcessorList(each for each in prepared if not isinstance(each, InfNanRemoveLogitsProcessor))


def processors_of_row(prepared: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """The logits processors for one row of a batch, except that of `remove_invalid_values`.

    NaN and infinite logits are reported as errors, so they must not be removed.

    Args:
        prepared: the processors that `generate` prepared for the whole batch. They are not changed.
        row: the row to which copies are bound. They are called with this row alone.
        rows: the number of rows of the batch.
    """
    own = LogitsProcessorList()
    for processor in prepared:
        if isinstance(processor, InfNanRemoveLogitsProcessor):
            continue
        bound = copy.copy(processor)
        if isinstance(bound, PrefixConstrainedLogitsProcessor):
            # The caller's function takes the number of the prompt, which several returned sequences share.
            allowed, prompt = bound._prefix_allowed_tokens_fn, row // bound._num_beams
            bound._prefix_allowed_tokens_fn = lambda _, ids, allowed=allowed, prompt=prompt: allowed(prompt, ids)
            bound._num_beams = 1
        elif isinstance(bound, RepetitionPenaltyLogitsProcessor):
            if isinstance(bound.prompt_ignore_length, torch.Tensor):
                bound.prompt_ignore_length = bound.prompt_ignore_length[row : row + 1]
        elif isinstance(bound, EncoderRepetitionPenaltyLogitsProcessor):
            prompt = row * bound.encoder_input_ids.shape[0] // rows
            bound.encoder_input_ids = bound.encoder_input_ids[prompt : prompt + 1]
        elif isinstance(bound, EncoderNoRepeatNGramLogitsProcessor):
            bound.generated_ngrams = bound.generated_ngrams[row * bound.batch_size // rows :]
            bound.batch_size = 1
        else:  # It does not depend on the batch, or is the caller's and the same for all rows.
            bound = processor
        own.append(bound)
    return own


def input_device(model: Any) -> torch.device:
    """The device on which a model expects its ids, also where its weights are offloaded."""
    if model.device.type != "meta":
        return model.device
    # accelerate has offloaded the weights. Its hook knows the device on which they are used.
    return torch.device(model.get_input_embeddings()._hf_hook.execution_device)


def has_no_weights(model: Any) -> bool:
    """Whether a model is on the meta device and its weights are not merely offloaded."""
    first = next(model.parameters(), None)  # `model.device` may say where a base without weights is run.
    is_on_meta = first is not None and first.device.type == "meta"
    return is_on_meta and not hasattr(model.get_input_embeddings(), "_hf_hook")


def reads_more_than_text(model: Any) -> bool:
    """Whether the model's prompts may contain images, sounds or videos."""
    modalities = model.input_modalities
    return any(modality != "text" for modality in ([modalities] if isinstance(modalities, str) else modalities))


def placeholder_ids(model: Any) -> set[int]:
    """The placeholder tokens of images, sounds and videos, and the tokens that begin and end such a place."""
    names = ["image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id"]
    names += ["boi_token_id", "eoi_token_id", "boi_token_index", "eoi_token_index"]
    return {token for name in names if isinstance(token := getattr(model.config, name, None), int)}


def overrides_generate(model: Any) -> bool:
    """Whether the model's class overrides `GenerationMixin.generate`."""
    return type(model).generate is not GenerationMixin.generate


def first_inputs(model: Any, input_ids: torch.Tensor, cache: Cache, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `generate` gives a model in its first forward pass.

    Args:
        model: a causal language model.
        input_ids: ids of shape (rows, width), with left padding.
        cache: the empty cache that the pass fills.
        model_kwargs: the other arguments, as `generate` prepared them.
    """
    return model.prepare_inputs_for_generation(
        input_ids, is_first_iteration=True, use_cache=True, **{CACHE: cache}, **model_kwargs
    )


def uncached_inputs(model: Any, input_ids: torch.Tensor) -> dict[str, Any]:
    """The arguments that `generate` gives a model without a cache, for unpadded ids of shape (rows, width)."""
    mask = torch.ones_like(input_ids)
    return model.prepare_inputs_for_generation(
        input_ids, is_first_iteration=True, attention_mask=mask, **{CACHE: None}, use_cache=False
    )


def without_wrapper(model: Any) -> Any:
    """The model of transformers inside a PEFT wrapper, whose layers contain the adapters. Other models are returned.

    Raises:
        ValueError: if the adapter changes the prompt, or depends on places in it.
    """
    # While PEFT's `generate` runs, the inner model's `prepare_inputs_for_generation` is a method of the wrapper.
    wrapper = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", model)
    peft_config = getattr(wrapper, "active_peft_config", None)
    if peft_config is None:
        return model
    if peft_config.is_prompt_learning or getattr(peft_config, "alora_invocation_tokens", None):
        raise ValueError(
            f"The adapter, {type(peft_config).__name__}, changes the prompt or depends on places in it, which nudging "
            "does not support: give an adapter of the layers, such as LoRA."
        )
    if wrapper is not model:
        return model
    inside = model.get_base_model()
    if inside.generation_config is not model.generation_config:  # The caller has set the wrapper's config.
        inside.generation_config = model.generation_config  # PEFT's `generate` does the same.
    return inside


def tensor_parallel_group(model: Any) -> Any:
    """The process group among which tensor parallelism divides a model; `None` if it is not divided.

    transformers 5.19 and later have a mesh manager. The size is in `tp_size` in 5.12, and only in the config in 5.16.
    """
    if (manager := getattr(model, "_mesh_manager", None)) is not None:
        return manager.get_mesh("tp").get_group() if (model.tp_size or 1) > 1 else None
    mesh = getattr(model, "_device_mesh", None)
    size = model.tp_size or getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
    if mesh is None or size == 1:
        return None
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def shared_by_ranks(model: Any, numbers: list[int]) -> list[int]:
    """Broadcasts the first rank's numbers to all ranks of a tensor-parallel model, which must act in sync."""
    group = tensor_parallel_group(model)
    if group is None:
        return numbers
    shared = torch.tensor(numbers, device=model.device)
    torch.distributed.broadcast(shared, src=torch.distributed.get_global_rank(group, 0), group=group)
    return shared.tolist()


def config_layers(model: Any) -> list[Any]:
    """Empty layers such as those of the cache that `generate` would make for the model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True)).layers


def indexer_continues_from_cache() -> bool:
    """Whether a pass over several tokens uses the indexer keys in the cache. Up to transformers 5.16 it does not."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) > (5, 16)


def supports_dynamic_cache(model: Any) -> bool:
    """Whether the model takes a `DynamicCache`. RWKV and XLNet, for example, have caches of their own classes."""
    return cache_argument(model) is not None and model._supports_default_dynamic_cache()


def has_only_attention_layers(model: Any) -> bool:
    """Whether the config names only attention layers. Other layers keep more than keys and values somewhere."""
    config = model.config.get_text_config(decoder=True)
    names = ("layer_types", "layers_block_type", "block_types")
    kinds = {kind for name in names for kind in getattr(config, name, None) or ()}
    return not model._is_stateful and all("attention" in kind and "linear" not in kind for kind in kinds)


def takes_static_cache(model: Any) -> bool:
    """Whether the model can use a static cache. It can if its forward pass can be compiled over one.

    GPT-Neo cannot: it mistakes the size of the cache for the length of the text, in plain `generate` too.
    """
    return bool(model._can_compile_fullgraph)


def states_of(layer: Any) -> list[torch.Tensor]:
    """The states of a linear-attention layer, tensors of shape (rows, ...). There are none before its first pass.

    From transformers 5.14 on, a layer may have several states, in a dictionary by number.
    """
    kept = [layer.conv_states, layer.recurrent_states]
    each = [state for states in kept for state in (states.values() if isinstance(states, dict) else [states])]
    return [state for state in each if state is not None]


def set_states(layer: Any, states: Sequence[torch.Tensor]) -> None:
    """Replaces the tensors that `states_of` returns, in the same order."""
    remaining = iter(states)
    for name in ("conv_states", "recurrent_states"):
        old = getattr(layer, name)
        if isinstance(old, dict):
            old.update({number: next(remaining) for number, state in old.items() if state is not None})
        elif old is not None:
            setattr(layer, name, next(remaining))


def has_rotary_positions(model: Any) -> bool:
    """Whether the model has rotary position embeddings."""
    return getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) is not None


def uses_position_ids_only(model: Any) -> bool:
    """Whether attention measures distances by `position_ids` only, so that gaps in the cache do not matter.

    This holds for rotary embeddings if no layer has a sliding window or attends in chunks.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or []
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return (
        has_rotary_positions(model)
        and all(layer == "full_attention" for layer in layers)
        and (bool(layers) or not any(windows))
    )


def compiled_call(model: Any, cache: Cache, generation_config: GenerationConfig) -> Callable[..., Any] | None:
    """The model's forward pass, compiled as `generate` would compile it for this cache; `None` if it would not."""
    if not model._valid_auto_compile_criteria({CACHE: cache}, generation_config):
        return None
    with _COMPILING:  # It is stored on the model. Without the lock, two threads could compile it twice.
        return model.get_compiled_call(generation_config.compile_config)


def input_rows(model: Any) -> int | None:
    """The number of ids that the model can read, from its input embeddings. `None` if it is not known."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embeddings, "num_embeddings", None)


def output_rows(model: Any) -> int:
    """The size of the model's logits: the number of tokens that it can choose from."""
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None) or model.config.get_text_config().vocab_size


def greatest_length(model: Any) -> int | None:
    """The greatest number of tokens that the model can read, where its positions come from a table.

    `None` where positions are computed (rotary embeddings, ALiBi), so that a model can read more tokens than it was
    trained on.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "rope_parameters", None) is not None:
        return None
    if model not in _GREATEST_LENGTHS:
        _GREATEST_LENGTHS[model] = _num_table_positions(model, positions)
    return _GREATEST_LENGTHS[model]


_GREATEST_LENGTHS: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()
_MAX_TABLE_OFFSET = 8  # Rows of a position table before the first position. OPT has 2.


def _num_table_positions(model: Any, positions: int) -> int | None:
    """The number of positions in the model's table, which holds learned embeddings or precomputed sines.

    Args:
        model: a causal language model.
        positions: its `max_position_embeddings`, by which the table is recognized.
    """
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module is not words:
            if positions <= module.num_embeddings <= positions + _MAX_TABLE_OFFSET:
                padding = module.padding_idx  # RoBERTa's positions begin after its padding id.
                return positions if module.num_embeddings > positions or padding is None else positions - padding - 1
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and len(buffer) == positions and "pos" in name.rpartition(".")[2]:
            return positions
    return None
