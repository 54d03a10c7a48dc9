"""What nudging uses of transformers that is not public, and what differs by its version, in one place."""

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

# What a cache is called: by `generate` and most models from 5.24 on, by most models before, by some of those with a
# recurrent state before, and by RWKV. Models with code of their own keep the name that they have.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
# What `generate` of this version calls it.
CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def accepted_arguments(model: Any) -> set[str]:
    """The arguments that the model's forward pass names."""
    return set(inspect.signature(model.forward).parameters)


def cache_argument(model: Any) -> str | None:
    """The name by which the model's forward pass is given its cache; `None` where it takes none."""
    accepted = accepted_arguments(model)
    return next((name for name in CACHE_NAMES if name in accepted), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returns; `None` where it returns none."""
    there = list(output)  # A look-up by an older name would be answered, with a warning.
    return next((output[name] for name in CACHE_NAMES if name in there), None)


# The lowest and the newest minor version of transformers that the tests have been run with.
LOWEST, NEWEST = (5, 12), (5, 24)


@lru_cache(maxsize=1)
def check_version(version: str = transformers.__version__) -> None:
    """Says once that a version of transformers has not been tried.

    Args:
        version: such as "5.24.0" or "5.25.0.dev0".

    Raises:
        ImportError: for a version that is too old.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    tried = f"{'.'.join(map(str, LOWEST))} to {'.'.join(map(str, NEWEST))}"
    if (major, minor) < LOWEST:
        raise ImportError(
            f"Nudging was tried with transformers {tried}, and {version} is too old: "
            "run `pip install --upgrade transformers`."
        )
    if (major, minor) > NEWEST:
        _logger.warning(f"Nudging was tried with transformers {tried}, and not with {version}, which is installed.")


# What `generate` takes before it calls a `custom_generate` function, which is not given it.
_NOT_HANDED_ON = (
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


def arguments_of_caller() -> dict[str, Any]:
    """What the `generate` was given that is calling a `custom_generate` function, also what it keeps to itself.

    `tokenizer`, `streamer`, `assistant_model`, `synced_gpus` and others are not handed on, and of `position_ids` or a
    cache it does not say whether they are the caller's. They are read where they stand: in the frames of `generate`,
    of which the outermost, a decorator's, has the keywords as they came, and the innermost what came by position.

    Returns:
        Arguments by their names; none where no `generate` of transformers is calling.
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
    given = {name: frame.f_locals.get(name) for name in _NOT_HANDED_ON}
    while frame.f_back is not None and frame.f_back.f_code in codes[:-1]:
        frame = frame.f_back
    given.update(frame.f_locals.get("kwargs", {}))
    given.pop("custom_generate", None)
    return given


def waits_for_other_ranks(model: Any) -> bool:
    """Whether `generate` would keep several processes in step, pass by pass, without being told to."""
    return bool(model._extract_generation_mode_kwargs(None, {}, None, None, None).get("synced_gpus"))


def merged_generation_config(
    model: Any, generation_config: GenerationConfig | None = None, **kwargs: Any
) -> GenerationConfig:
    """The config that `model.generate(generation_config=generation_config, **kwargs)` would go by."""
    return model._prepare_generation_config(generation_config, **kwargs)[0]


def own_generation_config(model: Any, do_sample: bool) -> GenerationConfig:
    """The config by which a model writes on its own, special tokens prepared, lengths left to the caller.

    Args:
        do_sample: `False` makes it greedy; `True` leaves it as the model's own config says.
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
    """What a text-generation pipeline gives `generate`, of its own and of what a call gives it, and `overrides`."""
    if hasattr(pipeline, "_prepare_generate_kwargs"):  # From transformers 5.20 on.
        return pipeline._prepare_generate_kwargs(dict(generate_kwargs), **overrides)
    config = copy.deepcopy(pipeline.generation_config)
    defaults = pipeline._default_generation_config
    for name in ("max_new_tokens", "do_sample"):  # Up to 5.16 a pipeline's default goes before what the model says.
        own = getattr(pipeline.model.generation_config, name)
        if own is not None and getattr(config, name) == getattr(defaults, name):
            setattr(config, name, own)
    return {"generation_config": config, **generate_kwargs, **overrides}


# Where a patched `generate` keeps the one that it replaced.
ORIGINAL = "_nudging_hf_original"


def plain_generate(model: Any) -> Callable[..., Any]:
    """The `generate` of the model's class, as it is without nudging."""
    own = type(model).generate
    return getattr(own, ORIGINAL, own)


def token_by_token(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
    """The loop of plain greedy decoding and of sampling, given what `generate` hands a `custom_generate` function."""
    return model._sample(input_ids, **prepared)


def is_prepared(generation_config: GenerationConfig | None) -> bool:
    """Whether `generate` has prepared the config, i.e. is calling a `custom_generate` function."""
    return hasattr(generation_config, "_pad_token_tensor")


def eos_token_ids(generation_config: GenerationConfig) -> list[int]:
    """The EOS ids of a prepared config, in its order."""
    eos = generation_config._eos_token_tensor
    return [] if eos is None else eos.tolist()


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """The padding id of a prepared config; `generate` takes the first EOS where none is set."""
    pad = generation_config._pad_token_tensor
    return None if pad is None else int(pad)


def own_eos_token_ids(model: Any) -> list[int]:
    """The EOS ids of the model's own generation config, in its order, whatever a call says."""
    eos = model.generation_config.eos_token_id
    if isinstance(eos, torch.Tensor):
        eos = eos.flatten().tolist()
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens with which a model ends an answer: the EOS ids of its generation config and its tokenizer's.

    Chat models often end by a token that only one of the two names. Ids that the model has no score for are left out.
    """
    named, rows = [*own_eos_token_ids(model), tokenizer.eos_token_id], output_rows(model)
    return list(dict.fromkeys(token for token in named if token is not None and 0 <= token < rows))


def own_processors(model: Any, generation_config: GenerationConfig, input_ids: torch.Tensor) -> LogitsProcessorList:
    """The logits processors that a prepared config asks for, after a prompt of shape (1, prompt_length).

    Without the one of `remove_invalid_values`: what is no number is an error, and is said.
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
    """The processors that `generate` prepared for a batch, bound to one row, to be called with that row alone.

    Without the one of `remove_invalid_values`: what is no number is an error, and is said.
    """
    own = LogitsProcessorList()
    for processor in prepared:
        if isinstance(processor, InfNanRemoveLogitsProcessor):
            continue
        bound = copy.copy(processor)
        if isinstance(bound, PrefixConstrainedLogitsProcessor):
            # It is told the prompt's number, which several returned sequences share.
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
        else:  # Knows nothing of the batch, or is the caller's own, and the same for all rows.
            bound = processor
        own.append(bound)
    return own


def input_device(model: Any) -> torch.device:
    """The device on which a model reads its ids, also where its weights are elsewhere until they are used."""
    if model.device.type != "meta":
        return model.device
    # Offloaded by accelerate, whose hook brings the weights to where they are used.
    return torch.device(model.get_input_embeddings()._hf_hook.execution_device)


def has_no_weights(model: Any) -> bool:
    """Whether a model is on the meta device, and not because its weights are brought when they are used."""
    return model.device.type == "meta" and not hasattr(model.get_input_embeddings(), "_hf_hook")


def reads_more_than_text(model: Any) -> bool:
    """Whether images, sounds or videos may stand in the model's prompts."""
    modalities = model.input_modalities
    return any(modality != "text" for modality in ([modalities] if isinstance(modalities, str) else modalities))


def placeholder_ids(model: Any) -> set[int]:
    """The tokens in whose place a model reads images, sounds or videos, and those that begin and end such a place."""
    names = ["image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id"]
    names += ["boi_token_id", "eoi_token_id", "boi_token_index", "eoi_token_index"]
    return {token for name in names if isinstance(token := getattr(model.config, name, None), int)}


def overrides_generate(model: Any) -> bool:
    """Whether the model's class has a `generate` of its own, which `GenerationMixin.generate` does not go through."""
    return type(model).generate is not GenerationMixin.generate


def first_inputs(model: Any, input_ids: torch.Tensor, cache: Cache, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` gives a model in its first pass, which fills an empty cache.

    Args:
        input_ids: of shape (rows, width), padded on the left.
        model_kwargs: as `generate` prepared them, the cache left out.
    """
    return model.prepare_inputs_for_generation(
        input_ids, is_first_iteration=True, use_cache=True, **{CACHE: cache}, **model_kwargs
    )


def uncached_inputs(model: Any, input_ids: torch.Tensor) -> dict[str, Any]:
    """What `generate` gives a model without a cache, for ids of shape (rows, width) that are not padded."""
    mask = torch.ones_like(input_ids)
    return model.prepare_inputs_for_generation(
        input_ids, is_first_iteration=True, attention_mask=mask, **{CACHE: None}, use_cache=False
    )


def without_wrapper(model: Any) -> Any:
    """The model of transformers inside a wrapper of PEFT, whose adapters stand in its layers; others as they are.

    Raises:
        ValueError: for what PEFT does not in the layers, but to the prompt.
    """
    # While PEFT's `generate` runs, the model inside prepares its inputs by the wrapper.
    wrapper = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", model)
    peft_config = getattr(wrapper, "active_peft_config", None)
    if peft_config is None:
        return model
    if peft_config.is_prompt_learning or getattr(peft_config, "alora_invocation_tokens", None):
        raise ValueError(
            f"The adapter, {type(peft_config).__name__}, goes by places in the prompt, which nudging does not know: "
            "give an adapter of the layers, such as LoRA."
        )
    if wrapper is not model:
        return model
    inside = model.get_base_model()
    if inside.generation_config is not model.generation_config:  # The wrapper was given one of its own.
        inside.generation_config = model.generation_config  # As the wrapper's own `generate` does.
    return inside


def shared_by_ranks(model: Any, numbers: list[int]) -> list[int]:
    """Those of the first rank, where tensor parallelism has several that must do alike."""
    if (model.tp_size or 1) == 1:
        return numbers
    shared = torch.tensor(numbers, device=model.device)
    manager = getattr(model, "_mesh_manager", None)
    mesh = model._device_mesh if manager is None else manager.get_mesh("tp")  # 5.12 has no manager.
    group = mesh.get_group()
    torch.distributed.broadcast(shared, src=torch.distributed.get_global_rank(group, 0), group=group)
    return shared.tolist()


def config_layers(model: Any) -> list[Any]:
    """The empty layers of the cache that `generate` would make for the model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True)).layers


def index_goes_on() -> bool:
    """Whether a pass over several tokens goes on from an index of what to attend to: up to 5.16 it does not."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) > (5, 16)


def takes_common_cache(model: Any) -> bool:
    """Whether the model takes the cache that models have in common, and none of a class of its own (RWKV, XLNet)."""
    return cache_argument(model) is not None and model._supports_default_dynamic_cache()


def has_attention_layers_alone(model: Any) -> bool:
    """Whether the model names no layers of another kind, which keep more than keys and values, wherever that is."""
    config = model.config.get_text_config(decoder=True)
    names = ("layer_types", "layers_block_type", "block_types")
    kinds = {kind for name in names for kind in getattr(config, name, None) or ()}
    return not model._is_stateful and all("attention" in kind and "linear" not in kind for kind in kinds)


def takes_static_cache(model: Any) -> bool:
    """Whether the model attends over a cache of a fixed size; those that do are those that can be compiled over it.

    GPT-Neo does not: it takes the size of the cache for the length of the text, in plain `generate` too.
    """
    return bool(model._can_compile_fullgraph)


def states_of(layer: Any) -> list[torch.Tensor]:
    """What a linear-attention layer keeps of all rows, tensors of shape (rows, ...); none before its first pass.

    From transformers 5.14 on such a layer may have several states, by their numbers.
    """
    kept = [layer.conv_states, layer.recurrent_states]
    each = [state for states in kept for state in (states.values() if isinstance(states, dict) else [states])]
    return [state for state in each if state is not None]


def set_states(layer: Any, states: Sequence[torch.Tensor]) -> None:
    """Puts tensors in the place of those that `states_of` gives, in its order."""
    left = iter(states)
    for name in ("conv_states", "recurrent_states"):
        old = getattr(layer, name)
        if isinstance(old, dict):
            old.update({number: next(left) for number, state in old.items() if state is not None})
        elif old is not None:
            setattr(layer, name, next(left))


def has_rotary_positions(model: Any) -> bool:
    """Whether the model's positions turn its keys and queries, as the ids of positions say."""
    return getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) is not None


def tells_distances_by_positions(model: Any) -> bool:
    """Whether how far apart two tokens are is told by `position_ids` alone, never by the cache slots between them.

    So it is with rotary embeddings where no layer attends through a sliding window or in chunks.
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
    """The model's forward pass, compiled as `generate` would compile it over that cache; `None` where it would not."""
    if not model._valid_auto_compile_criteria({CACHE: cache}, generation_config):
        return None
    with _COMPILING:  # It is kept on the model: two threads would make two.
        return model.get_compiled_call(generation_config.compile_config)


def input_rows(model: Any) -> int | None:
    """How many ids the model can read: rows of its embeddings. `None` where that is not known."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embeddings, "num_embeddings", None)


def output_rows(model: Any) -> int:
    """How many tokens the model scores."""
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None) or model.config.get_text_config().vocab_size


def greatest_length(model: Any) -> int | None:
    """The number of tokens that the model can read, where its positions come from a table of so many rows.

    `None` where positions are computed (rotary embeddings, ALiBi): a model can be given more of them than it was
    trained on.
    """
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None or getattr(config, "rope_parameters", None) is not None:
        return None
    if model not in _GREATEST_LENGTHS:
        _GREATEST_LENGTHS[model] = _rows_of_position_table(model, most)
    return _GREATEST_LENGTHS[model]


_GREATEST_LENGTHS: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()
_MOST_OFFSET = 8  # Rows of a table of positions that stand before the first position; there are 2 in OPT's.


def _rows_of_position_table(model: Any, most: int) -> int | None:
    """The positions that a table holds: learned ones, or sines that are kept for so many positions and no more."""
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module is not words:
            if most <= module.num_embeddings <= most + _MOST_OFFSET:
                padding = module.padding_idx  # RoBERTa's positions begin after its padding.
                return most if module.num_embeddings > most or padding is None else most - padding - 1
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and len(buffer) == most and "pos" in name.rpartition(".")[2]:
            return most
    return None
