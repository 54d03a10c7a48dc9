"""The door: checks and completes what a `generate` call says, and hands it to transformers and to the decoder.

transformers merges the generation config, prepares prompts, logits processors and stopping criteria, and calls the
decoding loop back.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel, ProcessorMixin
from transformers.generation import StoppingCriteriaList, StopStringCriteria

from .arguments import OWN_ARGUMENTS, GenerateArguments
from .cached_lm import MultimodalPrompts, StaticCacheSettings, cached_lm
from .config import NudgingConfig
from .decoding import NudgedDecoder
from .draft_policy import borrowed_draft_length
from .drafting import Drafter
from .named_model import resolved_model
from .output import NudgingOutput, nudging_output, padded_sequences
from .preparation import NudgingCall, Preparation
from .transformers_private import (
    CACHE_NAMES,
    arguments_of_caller,
    check_version,
    commit_hash,
    is_prepared,
    merged_generation_config,
    pad_token_id,
    plain_generate,
    shared_by_ranks,
    without_wrapper,
)
from .validation import (
    validate_call,
    validate_causal_lm,
    validate_multimodal_inputs,
    validate_prompt_tensors,
    validate_streamer,
)
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from typing_extensions import Unpack

# If a Hub folder's own `generate` is called, transformers passes on how the folder was to be loaded.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_FOLDER_ARGUMENTS = ("code_revision", "revision", "subfolder", "trust_remote_code")

_GENERATE_SIGNATURE = inspect.signature(GenerationMixin.generate)


@torch.no_grad()
def generate(
    *args: Any, model: PreTrainedModel | None = None, **kwargs: Unpack[GenerateArguments]
) -> NudgingOutput | torch.Tensor:
    """Nudged `model.generate(...)`: the base `model` writes, and the nudging model writes where the base is unsure.

    `nudging_hf.generate(model, **inputs, nudging_model=m)`, `model.generate(**inputs, nudging_model=m)` after
    `nudging_hf.register()`, and `model.generate(**inputs, custom_generate=nudging_hf.generate, nudging_model=m)` give
    the same ids. Through `custom_generate` transformers refuses `stop_strings`, because it does not pass on a
    tokenizer, and answers `cache_implementation="paged"` itself, without nudging and without a warning.

    Args:
        model (`PreTrainedModel`):
            The base, a decoder-only language model. It may also be the first positional argument. It may read images,
            sounds or videos, given as to its own `generate` (`pixel_values`, ...). The nudging model reads only text.
        nudging_model (`PreTrainedModel` or `str`, *optional*):
            The small aligned model, or the folder or Hub name from which it is loaded once for each base, to the
            base's device and in its dtype. By default it is the one that the base's generation config names in
            `nudging_model_name_or_path`. `None` means plain generation, whatever else is said about nudging.
        tokenizer, nudging_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizers of the base and of the nudging model. By default they are loaded from the models'
            `name_or_path`. `base_tokenizer` is another name for the first.
        nudging_input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The nudging model's prompts, with `nudging_attention_mask` where they are padded. By default the text of
            the base's prompt, without images, becomes one user turn of the nudging tokenizer's chat template. If the
            tokenizer has no template, the text is used as it is.
        nudge_threshold, nudge_gate, ..., num_draft_tokens:
            The fields of [`NudgingConfig`]. They may also come as `nudging_config=`, a `NudgingConfig` or a dict, or
            as fields of a generation config. Keywords take precedence, then `nudging_config`, then the generation
            config.
        kwargs:
            Everything else that `generate` takes; see [`~arguments.GenerateArguments`]. `StoppingCriteria` are called
            for one row at a time, at every token, with ids of shape (1, length) and `scores=None`. The caller's own
            `LogitsProcessor`s are also called for one row at a time, at draft positions too, so they must not count
            their calls.

            A token is forbidden if logits processors give it the score −∞ because of the ids before it, as
            `bad_words_ids`, `suppress_tokens`, `prefix_allowed_tokens_fn` and `no_repeat_ngram_size` do, or a
            processor of the caller's own. Neither model writes a forbidden token. To find out what is forbidden to
            the nudging model, the processors are also called with scores of 0. Penalties, finite biases and
            sampling's warpers act on the base alone; the nudging model has those of its own generation config.
            `remove_invalid_values` has no effect, because NaN and infinite logits are an error.

            An `eos_token_id` of the call that is none of the base's own (in `model.generation_config`) is a stop
            token: the answer ends with it, whichever model writes it, and `min_new_tokens` suppresses it too.
            Otherwise only the nudging model ends an answer, by the EOS of its generation config or of its tokenizer.

            An answer also ends at the last position of either model if the model's positions are learned.

    Returns:
        Ids of shape `(batch_size, length)`, or a [`NudgingOutput`] if `return_dict_in_generate=True`.

    Raises:
        ValueError: for what nudging cannot do (beam search, encoder-decoder models, a streamer for several rows,
            ...), for a missing tokenizer or prompt, and for values out of range. The message says what was given and
            what to give instead.
    """
    if model is None:
        if not args:
            raise ValueError("Nothing to nudge: give the base as the first argument or as `model=`.")
        model, args = args[0], args[1:]
    check_version()
    model = without_wrapper(model)
    is_plain = kwargs.get("nudging_model", model) is None
    own, hub, arguments = _divided(kwargs)
    if is_prepared(arguments.get("generation_config")):  # transformers calls, because of `custom_generate=`.
        if is_plain:
            raise ValueError("`nudging_model=None` says not to nudge: leave out `custom_generate` too.")
        validate_causal_lm(model, "base", "model")
        given = arguments_of_caller()
        arguments["nudging_call"] = _checked_call(model, own, hub, arguments["generation_config"], given, len(args[0]))
        return _decode(model, *args, **arguments)
    if is_plain:
        return plain_generate(model)(model, *args, **arguments)

    validate_causal_lm(model, "base", "model")
    return _through_transformers(model, args, arguments, own, hub, loop=_decode)


@torch.no_grad()
def prepare(model: PreTrainedModel, *args: Any, **kwargs: Unpack[GenerateArguments]) -> Preparation:
    """Prepares the answers that [`generate`] would write with the same arguments, for an executor of one's own.

    The base makes no forward pass. So it may be on the meta device, where it has a config and no weights. Then
    `nudging_model` must be a model and not its name.

    Returns:
        Its `rows` are not begun. Each is the row that `generate` would write, and has the same random seed.

    Raises:
        ValueError: as `generate`, and for prompts with images, sounds or videos.
    """
    check_version()
    model = without_wrapper(model)
    validate_causal_lm(model, "base", "model", needs_weights=False)
    own, hub, arguments = _divided(kwargs)
    return _through_transformers(model, args, arguments, own, hub, loop=_prepare)


def _divided(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Nudging's own arguments of a call, how a model that is only named is loaded, and the arguments of `generate`."""
    arguments = {name: value for name, value in kwargs.items() if name not in _FOLDER_ARGUMENTS}
    own = {name: arguments.pop(name, None) for name in (*OWN_ARGUMENTS, *NudgingConfig.field_names())}
    hub = {name: arguments.pop(name) for name in _HUB_ARGUMENTS if arguments.get(name) is not None}
    return own, hub, arguments


def _through_transformers(
    model: PreTrainedModel,
    args: tuple[Any, ...],
    arguments: dict[str, Any],
    own: Mapping[str, Any],
    hub: Mapping[str, Any],
    loop: Callable[..., Any],
) -> Any:
    """Lets transformers prepare a call and hand it to a loop, whose result is returned.

    Args:
        args, arguments: of `generate`.
        own: nudging's own arguments.
        hub: how a model that is only named is loaded from the Hub.
        loop: called as [`_decode`] is.
    """
    arguments = _by_name(model, args, arguments)
    generation_config = merged_generation_config(
        model, **{name: value for name, value in arguments.items() if name != "tokenizer"}
    )
    prompts = arguments.get("inputs", arguments.get("input_ids"))
    rows = generation_config.num_return_sequences * (1 if prompts is None else len(prompts))
    call = _checked_call(model, own, hub, generation_config, arguments, rows)
    arguments.pop("tokenizer", None)
    if generation_config.stop_strings is not None:
        take_over_stop_strings(arguments, model, generation_config.stop_strings, call.vocabulary.tokenizer)
    return GenerationMixin.generate(model, **arguments, custom_generate=loop, nudging_call=call)


def _by_name(model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of plain `generate` by their names."""
    arguments = dict(_GENERATE_SIGNATURE.bind(model, *args, **kwargs).arguments)
    arguments.update(arguments.pop("kwargs", {}))
    del arguments["self"]
    return arguments


def _signature() -> inspect.Signature:
    """The signature that `inspect` sees: transformers passes a `custom_generate` function what its signature names."""
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
    """The decoding loop as transformers calls it, when everything is prepared and no token has been read.

    transformers passes those arguments of `generate` that a loop's signature names, and the rest in `model_kwargs`. If
    `attention_mask` were named here, it would come twice.
    """
    call = nudging_call
    use_cache = model_kwargs.pop("use_cache")
    for name in CACHE_NAMES:
        model_kwargs.pop(name, None)  # Empty: `CachedLM` makes its own.
    is_static = use_cache and generation_config.cache_implementation == "static"
    more = _more_than_text(model_kwargs)
    if more:
        validate_multimodal_inputs(model, more, use_cache, is_static)
    batch, pad = input_ids.shape[0], pad_token_id(generation_config)
    if batch > 1 and pad is None:
        raise ValueError(f"{batch} answers must be padded to one length: set `pad_token_id`, or the base's EOS.")
    prepared = Preparation(
        model,
        call,
        input_ids,
        model_kwargs.get("attention_mask"),
        logits_processor,
        stopping_criteria,
        generation_config,
        has_placeholders=bool(more),
    )
    longest = max(generation_config.max_length, getattr(generation_config, "max_cache_len", None) or 0)
    static = StaticCacheSettings(longest - input_ids.shape[1], generation_config) if is_static else None
    prompts = MultimodalPrompts(prepared.prompts, input_ids, model_kwargs) if more else None
    base = cached_lm(model, batch, use_cache, prompts, static)
    nudging = cached_lm(call.nudging_model, batch, use_cache, static=static)
    with borrowed_draft_length(model, call.nudging_model, (batch, base.cache_kind)) as policy:
        drafter = Drafter(call.config.num_draft_tokens, policy, lambda numbers: shared_by_ranks(model, numbers))
        NudgedDecoder(base, nudging, drafter, prepared.rows).run()
    if call.streamer is not None:
        call.streamer.end()
    sequences = padded_sequences(input_ids, prepared.rows, pad)
    if not generation_config.return_dict_in_generate:
        return sequences
    scores, logits = generation_config.output_scores, generation_config.output_logits
    return nudging_output(sequences, prepared.rows, base, nudging, scores, logits, pad)


def _prepare(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    nudging_call: NudgingCall,
    logits_processor: Any,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    **model_kwargs: Any,
) -> Preparation:
    """What [`_decode`] would run; see there."""
    model_kwargs.pop("use_cache")
    for name in CACHE_NAMES:
        model_kwargs.pop(name, None)
    if more := _more_than_text(model_kwargs):
        raise ValueError(f"Only text can be prepared, got {', '.join(map(repr, more))}: call `generate` instead.")
    attention_mask = model_kwargs.get("attention_mask")
    return Preparation(
        model,
        nudging_call,
        input_ids,
        attention_mask,
        logits_processor,
        stopping_criteria,
        generation_config,
        has_placeholders=False,
    )


def _more_than_text(model_kwargs: Mapping[str, Any]) -> list[str]:
    """The names of the arguments with which the base reads more than text."""
    of_text = {"attention_mask", "position_ids", "logits_to_keep"}
    return sorted(name for name, value in model_kwargs.items() if name not in of_text and value not in (None, {}))


def _checked_call(
    model: PreTrainedModel,
    own: Mapping[str, Any],
    hub: Mapping[str, Any],
    generation_config: Any,
    arguments: Mapping[str, Any],
    rows: int,
) -> NudgingCall:
    """What the call says about nudging, with tokenizers loaded and parameters resolved.

    Args:
        model: the base.
        own: nudging's own arguments.
        hub: how a model that is only named is loaded from the Hub.
        generation_config: as `generate` merges it.
        arguments: the other arguments of `generate`, by the names that the caller gave them.
        rows: how many answers there will be.

    Raises:
        ValueError: for what nudging cannot do, and for arguments of the wrong kind.
    """
    given = own["nudging_model"]
    if given is None:
        given = getattr(generation_config, "nudging_model_name_or_path", None)
    nudging_model, nudging_tokenizer = resolved_model(model, given, own["nudging_tokenizer"], hub)
    validate_call(model, nudging_model, generation_config, arguments)
    tokenizer = arguments.get("tokenizer")
    tokenizer = tokenizer if tokenizer is not None else own["base_tokenizer"]
    ids, mask = own["nudging_input_ids"], own["nudging_attention_mask"]
    validate_prompt_tensors(ids, mask, "nudging")
    call = NudgingCall(
        nudging_model=nudging_model,
        vocabulary=loaded_vocabulary(tokenizer, model, "tokenizer", "base"),
        nudging_vocabulary=loaded_vocabulary(nudging_tokenizer, nudging_model, "nudging_tokenizer", "nudging model"),
        nudging_input_ids=ids,
        nudging_attention_mask=mask,
        config=NudgingConfig.resolve([own, _parameters(own["nudging_config"]), generation_config.to_dict()]),
        streamer=arguments.get("streamer"),
    )
    validate_streamer(call.streamer, rows)
    return call


def _parameters(nudging_config: Any) -> Mapping[str, Any]:
    """The parameters that `nudging_config=` sets."""
    if nudging_config is None:
        return {}
    # The class is compared by its name: a Hub folder carries one, and the installed package has another.
    is_config = type(nudging_config).__name__ == NudgingConfig.__name__
    parameters = vars(nudging_config) if is_config else nudging_config
    if not isinstance(parameters, Mapping):
        raise ValueError(f"`nudging_config` must be a `NudgingConfig` or a dict, got {type(nudging_config).__name__}.")
    if unknown := sorted(set(parameters) - set(NudgingConfig.field_names())):
        raise ValueError(
            f"`nudging_config` knows {', '.join(NudgingConfig.field_names())}, got {', '.join(map(repr, unknown))}."
        )
    return parameters


def loaded_vocabulary(tokenizer: Any, model: PreTrainedModel, argument: str, whose: str) -> Vocabulary:
    """The vocabulary of a tokenizer, or if that is `None`, of the tokenizer that the model's `name_or_path` names.

    Args:
        tokenizer: of transformers, or a processor that holds one.
        argument, whose: how an error calls the tokenizer and the model.

    Raises:
        ValueError: for an object that is no tokenizer, and if none can be loaded.
    """
    if tokenizer is None:
        tokenizer = _load_tokenizer(model.name_or_path, commit_hash(model), argument, whose)
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
    """One `Vocabulary` for each tokenizer, which keeps what it computes until a token is added to the tokenizer."""
    return Vocabulary(tokenizer)


# transformers caches what it computes for the last eight stop strings, for all threads and without a lock.
_STOP_STRINGS = threading.Lock()


def take_over_stop_strings(arguments: dict[str, Any], model: Any, stop_strings: Any, tokenizer: Any) -> None:
    """Replaces stop strings by a stopping criterion, because transformers does not pass a tokenizer to the loop."""
    criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
    with _STOP_STRINGS:
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    arguments["stopping_criteria"] = criteria
    if arguments.get("generation_config") is not None:
        arguments["generation_config"] = copy.deepcopy(arguments["generation_config"])
        arguments["generation_config"].stop_strings = None
    if "stop_strings" in arguments or model.generation_config.stop_strings is not None:
        arguments["stop_strings"] = None
