"""The door: what a user's `generate` call says, checked, completed, and handed to transformers and to the decoder.

transformers merges the generation config, prepares prompts, processors and criteria, and calls the decoding loop back.
"""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel, ProcessorMixin
from transformers.generation import StoppingCriteriaList, StopStringCriteria

from .cached_lm import Prompts, Static, cached_lm
from .config import NudgingConfig
from .decoding import NudgedDecoder
from .limits import Limits
from .named_model import named_nudging_model
from .output import NudgingOutput, nudging_output, padded_sequences
from .preparation import NudgingCall, Preparation
from .transformers_private import (
    CACHE_NAMES,
    arguments_of_caller,
    check_version,
    is_prepared,
    merged_generation_config,
    pad_token_id,
    plain_generate,
    without_wrapper,
)
from .validation import (
    validate_call,
    validate_causal_lm,
    validate_multimodal_inputs,
    validate_streamer,
)
from .vocabulary import Vocabulary

# Where a Hub folder's own `generate` is called, transformers hands on how it was to be reached.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_FOLDER_ARGUMENTS = ("code_revision", "revision", "subfolder", "trust_remote_code")

_GENERATE_SIGNATURE = inspect.signature(GenerationMixin.generate)

OWN_ARGUMENTS = (
    "nudging_model",
    "nudging_tokenizer",
    "nudging_input_ids",
    "nudging_attention_mask",
    "nudging_config",
    "base_tokenizer",
)


@torch.no_grad()
def generate(*args: Any, model: PreTrainedModel | None = None, **kwargs: Any) -> NudgingOutput | torch.Tensor:
    """`model.generate(...)`, nudged: the base `model` writes, and where it is unsure the nudging model does.

    `nudging_hf.generate(model, **inputs, nudging_model=m)`, `model.generate(**inputs, nudging_model=m)` after
    `nudging_hf.register()`, and `model.generate(**inputs, custom_generate=nudging_hf.generate, nudging_model=m)` give
    the same ids. Through `custom_generate` transformers refuses `stop_strings` for want of a tokenizer, and answers
    `cache_implementation="paged"` by itself, without nudging and without a word: use another door for the first.

    Args:
        model (`PreTrainedModel`):
            The base, a decoder-only language model; also as the first positional argument. It may read images, sounds
            or videos, given as to its own `generate` (`pixel_values`, ...); the nudging model reads text alone.
        nudging_model (`PreTrainedModel` or `str`, *optional*):
            The small aligned model, or the folder or Hub name that it is loaded from, once for each base, to the
            base's device and in its dtype. Left out, the one that the base's generation config names in
            `nudging_model_name_or_path`. `None` says: generate plainly, whatever is said of nudging.
        tokenizer, nudging_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Of the base and of the nudging model; left out, they are loaded from the models' `name_or_path`.
            `base_tokenizer` is another name for the first.
        nudging_input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The nudging model's prompts, with `nudging_attention_mask` where they are padded. Left out, the text of
            the base's prompt is one user turn of the nudging tokenizer's chat template, or is taken as it is where
            the tokenizer has none; images are left out of it.
        nudge_threshold, nudge_gate, target_nudge_rate, num_nudging_tokens, takeover_on_agreement, num_draft_tokens:
            The knobs of [`NudgingConfig`], also as `nudging_config=`, a `NudgingConfig` or a dict, or as fields of a
            generation config. Keywords come first, then `nudging_config`, then the generation config.
        kwargs:
            Everything else that `generate` takes. `StoppingCriteria` are called for one row at a time, with ids of
            shape (1, length) and `scores=None`, at every token; `LogitsProcessor`s of the caller's own likewise for
            the base, also at drafted positions, so they must not keep count of their calls.

            What processors forbid, i.e. give the score −∞ by the ids before it (`bad_words_ids`, `suppress_tokens`,
            `prefix_allowed_tokens_fn`, `no_repeat_ngram_size`, one of the caller's own, ...), neither model writes.
            To find that out for the nudging model's words, they are called with scores of 0 as well. Penalties,
            finite biases, and sampling's warpers shape the base alone; the nudging model has those of its own
            generation config. `remove_invalid_values` does nothing: NaN and infinite logits are an error.

            An `eos_token_id` of the call that is none of the base's own (of `model.generation_config`) is a stop
            token: the answer ends with it, whichever model writes it. `min_new_tokens` holds it back too.
            Else only the nudging model ends an answer, by the EOS of its generation config or of its tokenizer.

            An answer ends at the last position of either model too, where its positions are learned.

    Returns:
        Ids of shape `(batch_size, length)`, or a [`NudgingOutput`] where `return_dict_in_generate=True`.

    Raises:
        ValueError: for what nudging cannot do (beam search, encoder-decoder models, caches that cannot roll back, a
            streamer for several rows, ...), for a missing tokenizer or prompt, and for values out of range. The
            message says what was given and what to give instead.
    """
    if model is None:
        if not args:
            raise ValueError("Nothing to nudge: give the base as the first argument or as `model=`.")
        model, *args = args  # type: ignore[assignment]
    check_version()
    model = without_wrapper(model)
    plain = kwargs.get("nudging_model", model) is None
    own = {name: kwargs.pop(name, None) for name in (*OWN_ARGUMENTS, *NudgingConfig.field_names())}
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
    for name in _FOLDER_ARGUMENTS:
        kwargs.pop(name, None)
    if is_prepared(kwargs.get("generation_config")):  # transformers calls, by `custom_generate=`.
        if plain:
            raise ValueError("`nudging_model=None` says not to nudge: leave out `custom_generate` too.")
        validate_causal_lm(model, "base", "model")
        generation_config, given = kwargs["generation_config"], arguments_of_caller()
        _find_nudging_model(model, own, generation_config, hub)
        validate_call(model, own["nudging_model"], generation_config, given)
        call = _call(model, own, given.get("tokenizer"), generation_config, given.get("streamer"))
        validate_streamer(call.streamer, len(args[0]))
        kwargs["nudging_call"] = call
        return _decode(model, *args, **kwargs)
    if plain:
        return plain_generate(model)(model, *args, **kwargs)

    validate_causal_lm(model, "base", "model")
    arguments = dict(_GENERATE_SIGNATURE.bind(model, *args, **kwargs).arguments)
    arguments.update(arguments.pop("kwargs", {}))
    del arguments["self"]
    tokenizer = arguments.pop("tokenizer", None)
    generation_config = merged_generation_config(model, **arguments)
    _find_nudging_model(model, own, generation_config, hub)
    validate_call(model, own["nudging_model"], generation_config, arguments)
    call = _call(model, own, tokenizer, generation_config, arguments.get("streamer"))
    prompts = arguments.get("inputs", arguments.get("input_ids"))
    rows = generation_config.num_return_sequences * (1 if prompts is None else len(prompts))
    validate_streamer(call.streamer, rows)
    if generation_config.stop_strings is not None:
        take_over_stop_strings(arguments, model, generation_config.stop_strings, call.vocabulary.tokenizer)
    return GenerationMixin.generate(model, **arguments, custom_generate=_decode, nudging_call=call)


def _signature() -> inspect.Signature:
    """transformers hands a `custom_generate` function those arguments of its own that its signature names."""
    names = (*OWN_ARGUMENTS, *NudgingConfig.field_names())
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    parameters = inspect.signature(generate).parameters
    return inspect.Signature([parameters["args"], parameters["model"], *own, parameters["kwargs"]])


generate.__signature__ = _signature()  # type: ignore[attr-defined]


def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    nudging_call: NudgingCall,
    logits_processor: Any,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    **model_kwargs: Any,
) -> NudgingOutput | torch.Tensor:
    """The decoding loop, as transformers calls it: everything is prepared, and no token has been read.

    transformers hands a loop those of `generate`'s arguments that its signature names: `attention_mask`, named, would
    come twice.
    """
    attention_mask, use_cache = model_kwargs.get("attention_mask"), model_kwargs.pop("use_cache")
    for name in CACHE_NAMES:
        model_kwargs.pop(name, None)  # Empty: `CachedLM` makes its own.
    is_static = use_cache and generation_config.cache_implementation == "static"
    of_text = {"attention_mask", "position_ids", "logits_to_keep"}
    more = sorted(name for name, value in model_kwargs.items() if name not in of_text and value not in (None, {}))
    if more:
        validate_multimodal_inputs(model, more, use_cache, is_static)
    batch, pad = input_ids.shape[0], pad_token_id(generation_config)
    if batch > 1 and pad is None:
        raise ValueError(f"{batch} answers must be padded to one length: set `pad_token_id`, or the base's EOS.")
    call = nudging_call
    prepared = Preparation(
        model, call, input_ids, attention_mask, logits_processor, generation_config, has_placeholders=bool(more)
    )
    rows, rules = prepared.rows, prepared.rules
    full = generation_config.return_dict_in_generate
    scores, logits = full and generation_config.output_scores, full and generation_config.output_logits
    longest = max(generation_config.max_length, getattr(generation_config, "max_cache_len", None) or 0)
    static = Static(longest - input_ids.shape[1], generation_config) if is_static else None
    prompts = Prompts(prepared.prompts, input_ids, model_kwargs) if more else None
    base = cached_lm(model, batch, use_cache, prompts, static)
    nudging = cached_lm(call.nudging_model, batch, use_cache, static=static)
    NudgedDecoder(
        base,
        nudging,
        rows,
        call.config,
        rules,
        Limits(stopping_criteria, rules.base_eos, rules.stop_tokens),
        streamer=call.streamer,
        record=full,
        record_logits=scores or logits,
    ).run()
    if call.streamer is not None:
        call.streamer.end()
    sequences = padded_sequences(input_ids, rows, pad)
    return nudging_output(sequences, rows, base, nudging, scores, logits) if full else sequences


def _find_nudging_model(
    model: PreTrainedModel, own: dict[str, Any], generation_config: Any, hub: Mapping[str, Any]
) -> None:
    """Puts the nudging model that is only named, and its tokenizer, in its place among the call's own arguments."""
    given = own["nudging_model"]
    if given is None:
        given = getattr(generation_config, "nudging_model_name_or_path", None)
    if isinstance(given, (str, os.PathLike)):
        own["nudging_model"], tokenizer = named_nudging_model(model, os.fspath(given), hub)
        if own["nudging_tokenizer"] is None:
            own["nudging_tokenizer"] = tokenizer
    elif given is not None:
        own["nudging_model"] = without_wrapper(given)


def _knobs(nudging_config: Any) -> Mapping[str, Any]:
    """The knobs that `nudging_config=` sets."""
    if nudging_config is None:
        return {}
    # By its name: the class that a Hub folder carries and that of the installed package are two.
    knobs = vars(nudging_config) if type(nudging_config).__name__ == NudgingConfig.__name__ else nudging_config
    if not isinstance(knobs, Mapping):
        raise ValueError(f"`nudging_config` must be a `NudgingConfig` or a dict, got {type(nudging_config).__name__}.")
    if unknown := sorted(set(knobs) - set(NudgingConfig.field_names())):
        raise ValueError(
            f"`nudging_config` knows {', '.join(NudgingConfig.field_names())}, got {', '.join(map(repr, unknown))}."
        )
    return knobs


def _call(
    model: PreTrainedModel, own: Mapping[str, Any], tokenizer: Any, generation_config: Any, streamer: Any = None
) -> NudgingCall:
    """What the call says of nudging, completed: tokenizers loaded, knobs resolved."""
    nudging_model = own["nudging_model"]
    tokenizer = tokenizer if tokenizer is not None else own["base_tokenizer"]
    ids, mask = own["nudging_input_ids"], own["nudging_attention_mask"]
    if ids is not None and (not isinstance(ids, torch.Tensor) or ids.ndim != 2):
        raise ValueError(f"`nudging_input_ids` must be a tensor of shape (batch_size, length), got {_shape(ids)}.")
    if mask is not None and (ids is None or not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        raise ValueError(
            f"`nudging_attention_mask` must have the shape of `nudging_input_ids`, {_shape(ids)}, got {_shape(mask)}."
        )
    return NudgingCall(
        nudging_model=nudging_model,
        vocabulary=loaded_vocabulary(tokenizer, model, "tokenizer", "base"),
        nudging_vocabulary=loaded_vocabulary(
            own["nudging_tokenizer"], nudging_model, "nudging_tokenizer", "nudging model"
        ),
        nudging_input_ids=ids,
        nudging_attention_mask=mask,
        config=NudgingConfig.resolve([own, _knobs(own["nudging_config"]), generation_config.to_dict()]),
        streamer=streamer,
    )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def loaded_vocabulary(tokenizer: Any, model: PreTrainedModel, argument: str, whose: str) -> Vocabulary:
    """The vocabulary of a tokenizer, or where it is `None` of the one that the model's `name_or_path` names.

    Args:
        tokenizer: of transformers, or a processor that holds one.
        argument, whose: how an error calls the tokenizer and the model.

    Raises:
        ValueError: for what is no tokenizer, and where none can be loaded.
    """
    if tokenizer is None:
        revision = getattr(model.config, "_commit_hash", None)  # Of what came from the Hub.
        tokenizer = _load_tokenizer(model.name_or_path, revision, argument, whose)
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    if not callable(getattr(tokenizer, "convert_ids_to_tokens", None)):
        raise ValueError(f"`{argument}` must be a tokenizer of transformers, got {type(tokenizer).__name__}.")
    return _vocabulary_of(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _load_tokenizer(name_or_path: str, revision: str | None, argument: str, whose: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"No tokenizer was given for the {whose}, and none could be loaded from its `name_or_path`, "
            f"{name_or_path!r}: pass `{argument}=`."
        ) from error


@lru_cache(maxsize=8)
def _vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """One `Vocabulary` for each tokenizer, for as long as no token is added to it: what it finds out is kept."""
    return Vocabulary(tokenizer)


# transformers keeps what it finds out of stop strings, the last eight, for all threads, and does not lock it.
_STOP_STRINGS = threading.Lock()


def take_over_stop_strings(arguments: dict[str, Any], model: Any, stop_strings: Any, tokenizer: Any) -> None:
    """Makes a stopping criterion of them: transformers has no tokenizer to hand when it calls the decoding loop."""
    criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
    with _STOP_STRINGS:
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    arguments["stopping_criteria"] = criteria
    if arguments.get("generation_config") is not None:
        arguments["generation_config"] = copy.deepcopy(arguments["generation_config"])
        arguments["generation_config"].stop_strings = None
    if "stop_strings" in arguments or model.generation_config.stop_strings is not None:
        arguments["stop_strings"] = None
