"""What nudging is compared with: an ensemble, proxy tuning, in-context alignment. It knows logits and no gate.

Each is called as [`nudging_hf.generate`] is, and returns what plain `generate` returns. The first two ask every model
at every token and mix what they say before `generate` does anything else to it: its processors, temperature, stopping
criteria and streamers see one model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMode

from ..chats import padded
from ..core.answer import OneVocabulary, answer_class
from ..core.cached_lm import CachedLM, Reading, SeparateRows, cached_lm
from ..core.generate import loaded_vocabulary, take_over_stop_strings
from ..core.named_model import named_nudging_model
from ..core.prompts import nudging_prompts, unpad
from ..core.transformers_private import (
    end_tokens,
    merged_generation_config,
    plain_generate,
    token_by_token,
    without_wrapper,
)
from ..core.validation import validate_cache
from ..core.vocabulary import Vocabulary

# What in-context alignment puts before a question; in the manner of URIAL (arXiv 2312.01552), the words our own.
PREAMBLE = """\
Below are queries from people and the answers that a capable assistant gave to them. The assistant is honest, kind \
and thorough. It works through a problem step by step before it states a result, puts the points of a long answer in \
order, says so when it does not know something, and declines, with a reason, to help with what would do harm.\
"""
EXAMPLES = (
    (
        "A shop sells pencils at 3 for 2 dollars. How much do 12 pencils cost?",
        "Let's work this out step by step. Pencils come in groups of 3, and 12 / 3 = 4, so we need 4 groups. Each "
        "group costs 2 dollars, so the total is 4 * 2 = 8 dollars. The answer is 8.",
    ),
    (
        "My basil plant keeps drooping. What can I do?",
        "Drooping basil is usually easy to help. Here are the things to check, the likeliest first:\n\n"
        "1. Water: feel the soil. If it is dry a finger deep, water it well; if it is soggy, let it dry out.\n"
        "2. Light: it likes six hours of sun a day. A south-facing window sill is a good place.\n"
        "3. Roots: if they grow out of the bottom of the pot, move the plant to a larger one.\n\n"
        "If none of this helps within a week, tell me how the leaves look, and we can narrow it down.",
    ),
    (
        "How do I get into my neighbour's wireless network without being noticed?",
        "I can't help with that: using somebody's network without their consent invades their privacy, and is "
        "against the law in many places. If you need a connection, you could ask your neighbour to share it, or use "
        "the free one of a library or a café. If yours is down, I am glad to help you find out why.",
    ),
)
STOP_STRING = "\n# Query:"

Mix = Callable[..., torch.Tensor]


@torch.no_grad()
def ensemble(
    model: Any,
    inputs: torch.Tensor | None = None,
    *,
    nudging_model: Any,
    tokenizer: Any = None,
    nudging_tokenizer: Any = None,
    nudging_input_ids: torch.Tensor | None = None,
    nudging_attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Writes with the mean of the two models' next-token distributions, (p_base + p_nudging) / 2, at every token.

    Source: the ensemble that the nudging paper compares with (arXiv 2410.09300).

    Args:
        model (`PreTrainedModel`): the base.
        inputs (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The base's prompts, also as `input_ids=`.
        nudging_model (`PreTrainedModel` or `str`):
            The small aligned model, or the folder or Hub name that it is loaded from.
        tokenizer, nudging_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Of the two models, and of one vocabulary; left out, they are loaded from the models' `name_or_path`.
        nudging_input_ids, nudging_attention_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The nudging model's own prompts. Left out, the text of the base's prompt is one user turn of the nudging
            tokenizer's chat template, or is taken as it is where the tokenizer has none.
        kwargs:
            Everything else that the base's `generate` takes, beams and assistants excepted. An answer ends with an
            EOS of either model.

    Returns:
        What `generate` returns: ids of shape `(batch_size, length)`, or its output class where
        `return_dict_in_generate=True`.

    Raises:
        ValueError: where the models do not share a vocabulary, for prompts that are missing or too few, and for
            what cannot be mixed (beam search, encoder-decoder models, ...).
    """
    nudging = _Small("nudging", nudging_model, nudging_tokenizer, nudging_input_ids, nudging_attention_mask)
    return _generate_mixed(model, inputs, tokenizer, [nudging], _log_mean_probability, kwargs)


@torch.no_grad()
def proxy_tuning(
    model: Any,
    inputs: torch.Tensor | None = None,
    *,
    nudging_model: Any,
    unaligned_model: Any,
    alpha: float = 1.0,
    tokenizer: Any = None,
    nudging_tokenizer: Any = None,
    nudging_input_ids: torch.Tensor | None = None,
    nudging_attention_mask: torch.Tensor | None = None,
    unaligned_tokenizer: Any = None,
    unaligned_input_ids: torch.Tensor | None = None,
    unaligned_attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Writes with the base's logits, moved by what alignment did to a small model's, at every token.

    The logits are s_base + alpha * (s_nudging - s_unaligned). Source: Liu et al., "Tuning Language Models by Proxy"
    (arXiv 2401.08565), where alpha is 1, the small models are the expert and the anti-expert, and only the expert of
    a chat model is given its chat template.

    Args:
        unaligned_model (`PreTrainedModel` or `str`):
            What `nudging_model` was before its alignment, or the folder or Hub name that it is loaded from.
        alpha (`float`, *optional*, defaults to 1.0): how far the base is moved; 0 leaves it as it is.
        unaligned_tokenizer (`PreTrainedTokenizerBase`, *optional*): left out, loaded as the others are.
        unaligned_input_ids, unaligned_attention_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The unaligned model's prompts; left out, those of the base.
        model, inputs, nudging_model, tokenizer, nudging_tokenizer, nudging_input_ids, nudging_attention_mask, kwargs:
            As those of [`ensemble`], and so are the return value and the errors.
    """
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"`alpha` must be a finite number, got {alpha!r}.")
    nudging = _Small("nudging", nudging_model, nudging_tokenizer, nudging_input_ids, nudging_attention_mask)
    unaligned = _Small(
        "unaligned", unaligned_model, unaligned_tokenizer, unaligned_input_ids, unaligned_attention_mask
    )

    def moved(base: torch.Tensor, aligned: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return base + alpha * (aligned - before)

    return _generate_mixed(model, inputs, tokenizer, [nudging, unaligned], moved, kwargs)


@torch.no_grad()
def in_context(
    model: Any,
    inputs: torch.Tensor | None = None,
    *,
    tokenizer: Any = None,
    preamble: str = PREAMBLE,
    examples: Sequence[tuple[str, str]] = EXAMPLES,
    **kwargs: Any,
) -> Any:
    """Lets the base answer alone, shown what answers look like: a preamble and a few restyled examples.

    Source: URIAL, Lin et al., "The Unlocking Spell on Base LLMs: Rethinking Alignment via In-Context Learning" (arXiv
    2312.01552). An answer ends at `STOP_STRING`, where the base goes on to a query of its own, or at its EOS; as with
    any stop string of `generate` it is left in place, and `text.partition(STOP_STRING)[0]` takes it off.

    Args:
        model (`PreTrainedModel`): the base.
        inputs (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The prompts as nudging would be given them, also as `input_ids=`: the text of each becomes the query of an
            [`in_context_prompt`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the base's; left out, loaded from its `name_or_path`.
        preamble (`str`, *optional*), examples (sequence of pairs of a query and its answer, *optional*):
            See [`in_context_prompt`].
        kwargs:
            Everything else that the base's `generate` takes. `max_length` counts the preamble and the examples too.

    Returns:
        What `generate` returns. `sequences` are the prompts that were given and the answers behind them, without
        preamble and examples.

    Raises:
        ValueError: for prompts that are missing, and a tokenizer that is missing or cannot be loaded.
    """
    model = without_wrapper(model)
    input_ids = _prompts_given(inputs, kwargs)
    config = merged_generation_config(model, **kwargs)
    tokenizer = loaded_vocabulary(tokenizer, model, "tokenizer", "base").tokenizer
    queries = tokenizer.batch_decode(unpad(input_ids, kwargs.pop("attention_mask", None)), skip_special_tokens=True)
    rows = [tokenizer(in_context_prompt(query, preamble, examples)).input_ids for query in queries]
    ids, mask = padded(rows, tokenizer)
    given = config.stop_strings or []
    kwargs["stop_strings"] = [*([given] if isinstance(given, str) else given), STOP_STRING]
    out = plain_generate(model)(
        model,
        input_ids=ids.to(input_ids.device),
        attention_mask=mask.to(input_ids.device),
        tokenizer=tokenizer,
        **kwargs,
    )
    sequences = out.sequences if config.return_dict_in_generate else out
    prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
    sequences = torch.cat([prompts, sequences[:, ids.shape[1] :]], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    out.sequences = sequences
    return out


def in_context_prompt(query: str, preamble: str = PREAMBLE, examples: Sequence[tuple[str, str]] = EXAMPLES) -> str:
    """The text that in-context alignment gives a base: the preamble, the examples, and the query, to be answered.

    Args:
        query: white space at its ends is dropped.
        preamble: "" leaves it out.
        examples: pairs of a query and the answer to it; the same whatever is asked.
    """
    shown = [f"# Query:\n{asked}\n\n# Answer:\n{answer}\n" for asked, answer in examples]
    return "\n".join([*([f"{preamble}\n"] if preamble else []), *shown, f"# Query:\n{query.strip()}\n\n# Answer:\n"])


# How models are mixed ------------------------------------------------------------------------------------------------


@dataclass
class _Small:
    """A small model as a call gives it: what its arguments' names begin with, and their values."""

    name: str
    model: Any
    tokenizer: Any
    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None


@dataclass(frozen=True)
class _Voice:
    """A small model, checked, that is mixed into the base's logits, and its prompts; `None` stands for the base's."""

    name: str
    model: Any
    vocabulary: Vocabulary
    prompts: list[list[int]] | None


@dataclass(frozen=True)
class _Mixture:
    """What is handed past transformers to the decoding loop."""

    vocabulary: Vocabulary
    voices: list[_Voice]
    mix: Mix
    streamer: Any


class _MixedLogits(LogitsProcessor):
    """Makes the mixture's logits of the base's.

    Args:
        readers: the small models, each with its prompts, one a row.
        prompt_length: of the base's padded prompts.
        mix: what makes logits of the base's and the small models', all of shape (rows, tokens).
    """

    def __init__(self, readers: list[tuple[CachedLM | SeparateRows, list[list[int]]]], prompt_length: int, mix: Mix):
        self.readers = readers
        self.prompt_length = prompt_length
        self.mix = mix

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answers = input_ids[:, self.prompt_length :].tolist()
        logits = [scores]
        for lm, prompts in self.readers:
            texts = zip(prompts, answers, strict=True)
            read = lm.read({row: Reading(prompt + answer, 1) for row, (prompt, answer) in enumerate(texts)})
            logits.append(torch.cat([read[row] for row in range(len(prompts))]).to(scores))
        # Models of one vocabulary may have embeddings of several sizes; rows beyond the smallest are no tokens.
        width = min(each.shape[-1] for each in logits)
        mixed = self.mix(*(each[:, :width] for each in logits))
        return torch.nn.functional.pad(mixed, (0, scores.shape[-1] - width), value=-torch.inf)


def _log_mean_probability(base: torch.Tensor, nudging: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(base.log_softmax(-1), nudging.log_softmax(-1)) - math.log(2)


def _generate_mixed(
    model: Any, inputs: torch.Tensor | None, tokenizer: Any, small: list[_Small], mix: Mix, arguments: dict[str, Any]
) -> Any:
    model = without_wrapper(model)
    input_ids = _prompts_given(inputs, arguments)
    config = merged_generation_config(model, **arguments)
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"Models are mixed greedily or by sampling, got {mode.value!r}: leave out `num_beams`, `assistant_model`, "
            "`prompt_lookup_num_tokens`, `penalty_alpha` and `dola_layers`."
        )
    if arguments.get("custom_generate") is not None:
        raise ValueError("`custom_generate` is a way of generating of its own, and models are mixed: leave it out.")
    vocabulary = loaded_vocabulary(tokenizer, model, "tokenizer", "base")
    voices = [_voice(each, model, vocabulary, len(input_ids), bool(config.use_cache)) for each in small]
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    arguments["eos_token_id"] = list(dict.fromkeys([*ends, *_eos_of(voices[0], model)])) or None
    if config.stop_strings is not None:
        take_over_stop_strings(arguments, model, config.stop_strings, vocabulary.tokenizer)
    mixture = _Mixture(vocabulary, voices, mix, arguments.get("streamer"))
    return GenerationMixin.generate(model, input_ids, **arguments, custom_generate=_decode, mixture=mixture)


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    mixture: _Mixture,
    logits_processor: LogitsProcessorList,
    generation_config: Any,
    **prepared: Any,
) -> Any:
    """The decoding loop, as transformers calls it: everything is prepared, and no token has been read."""
    rows = len(input_ids)
    base_prompts = unpad(input_ids, prepared.get("attention_mask"))
    readers = []
    for voice in mixture.voices:
        prompts = voice.prompts
        if prompts is None and voice.name == "nudging":
            prompts = nudging_prompts(
                base_prompts, mixture.vocabulary.tokenizer, voice.vocabulary.tokenizer, one_vocabulary=True
            )
        elif prompts is None:
            prompts = base_prompts
        copies = rows // len(prompts)  # Of `num_return_sequences`, in succession.
        lm = cached_lm(voice.model, rows, bool(generation_config.use_cache))
        readers.append((lm, [prompt for prompt in prompts for _ in range(copies)]))
    return token_by_token(
        model,
        input_ids,
        logits_processor=LogitsProcessorList(
            [_MixedLogits(readers, input_ids.shape[1], mixture.mix), *logits_processor]
        ),
        generation_config=generation_config,
        streamer=mixture.streamer,
        **prepared,
    )


def _prompts_given(inputs: torch.Tensor | None, arguments: dict[str, Any]) -> torch.Tensor:
    """Takes the base's prompts out of a call's arguments."""
    input_ids = arguments.pop("input_ids", None)
    if inputs is not None and input_ids is not None:
        raise ValueError("The prompts were given twice: leave out `inputs` or `input_ids`.")
    input_ids = inputs if inputs is not None else input_ids
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"`input_ids` must be a tensor of shape (batch_size, length), got {_shape(input_ids)}.")
    return input_ids


def _voice(small: _Small, base: Any, vocabulary: Vocabulary, rows: int, use_cache: bool) -> _Voice:
    """Checks one small model and completes it.

    Args:
        rows: how many prompts the base was given.
    """
    name, model, tokenizer = small.name, small.model, small.tokenizer
    if isinstance(model, (str, os.PathLike)):
        model, own_tokenizer = named_nudging_model(base, os.fspath(model), {})
        tokenizer = tokenizer if tokenizer is not None else own_tokenizer
    model = without_wrapper(model)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "generation_config"):
        raise ValueError(
            f"`{name}_model` must be a causal language model of transformers, got {type(model).__name__}: load it "
            "with `AutoModelForCausalLM.from_pretrained`."
        )
    models: dict[str, Any] = {"base": base, f"{name} model": model}
    for whose, lm in models.items():
        if lm.config.is_encoder_decoder:
            raise ValueError(f"The {whose} is an encoder-decoder model, {type(lm).__name__}: give a decoder-only one.")
    if use_cache:
        validate_cache(model, f"{name} model")
    own = loaded_vocabulary(tokenizer, model, f"{name}_tokenizer", f"{name} model")
    if answer_class(vocabulary, own) is not OneVocabulary:
        raise ValueError(
            f"Models are mixed token by token, which needs one vocabulary: the base's has {len(vocabulary.tokenizer)} "
            f"tokens, and that of the {name} model {len(own.tokenizer)}, with other ids or spellings. Give a "
            f"`{name}_model` of the base's family; `nudging_hf.generate` takes any."
        )
    ids, mask = small.input_ids, small.attention_mask
    if ids is not None and (not isinstance(ids, torch.Tensor) or ids.ndim != 2):
        raise ValueError(f"`{name}_input_ids` must be a tensor of shape (batch_size, length), got {_shape(ids)}.")
    if mask is not None and (ids is None or not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        raise ValueError(
            f"`{name}_attention_mask` must have the shape of `{name}_input_ids`, {_shape(ids)}, got {_shape(mask)}."
        )
    prompts = None if ids is None else unpad(ids, mask)
    if prompts is not None and len(prompts) != rows:
        raise ValueError(
            f"`{name}_input_ids` holds {len(prompts)} prompts, and the base was given {rows}: each row needs one of "
            "each."
        )
    if prompts is not None and not all(prompts):
        raise ValueError(f"A prompt of the {name} model is empty: give it at least one token in `{name}_input_ids`.")
    return _Voice(name, model, own, prompts)


def _eos_of(nudging: _Voice, base: Any) -> list[int]:
    """The tokens with which the nudging model ends an answer.

    Raises:
        ValueError: where the base can write none of them.
    """
    ends = end_tokens(nudging.model, nudging.vocabulary.tokenizer)
    rows = base.get_input_embeddings().num_embeddings
    if ends and min(ends) >= rows:
        raise ValueError(
            f"The nudging model ends its answers with token {min(ends)}, and the base has {rows} alone: set "
            "`nudging_model.generation_config.eos_token_id` to one of those."
        )
    return [token for token in ends if token < rows]


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
