"""What nudging is compared with: an ensemble, proxy tuning and in-context alignment. It knows logits and no gate.

Each is called as [`nudging_hf.generate`] is, and returns what plain `generate` returns. The first two run every model
at every token and mix the logits before `generate` does anything else with them: processors, temperature, stopping
criteria and streamers see a single model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMode

from ..core.answer import OneVocabulary, answer_class
from ..core.cached_lm import CachedLM, Reading, SeparateRows, cached_lm
from ..core.generate import loaded_vocabulary, take_over_stop_strings
from ..core.named_model import resolved_model
from ..core.prompts import given_prompts, guarded_ids, nudging_prompts, unpad
from ..core.transformers_private import (
    end_tokens,
    merged_generation_config,
    plain_generate,
    token_by_token,
    without_wrapper,
)
from ..core.validation import (
    shape_of,
    validate_cache,
    validate_causal_lm,
    validate_prompt_tensors,
)
from ..core.vocabulary import Vocabulary
from ..encoded_chats import padded

# In-context alignment puts this before a question, as URIAL does (arXiv 2312.01552). The wording is our own.
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

# Makes one distribution of the logits of the base and of the small models, each of shape (rows, tokens).
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
    """Decodes from the mean of the two models' next-token distributions, (p_base + p_nudging) / 2, at every token.

    Source: the ensemble that the nudging paper compares with (arXiv 2410.09300).

    Args:
        model (`PreTrainedModel`): the base.
        inputs (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The base's prompts, also as `input_ids=`.
        nudging_model (`PreTrainedModel` or `str`):
            The small aligned model, or the folder or Hub name that it is loaded from.
        tokenizer, nudging_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizers of the two models, which have one vocabulary. Each is loaded from its model's `name_or_path`
            if it is left out.
        nudging_input_ids, nudging_attention_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The nudging model's own prompts. If they are left out, the text of the base's prompt becomes one user turn
            of the nudging tokenizer's chat template, or is taken as it is where the tokenizer has none.
        kwargs:
            Everything else that the base's `generate` takes, except beams and assistants. An EOS of either model ends
            an answer.

    Returns:
        What `generate` returns: ids of shape `(batch_size, length)`, or its output class where
        `return_dict_in_generate=True`.

    Raises:
        ValueError: where the models do not share a vocabulary, for prompts that are missing or too few, and for
            what cannot be mixed (beam search, encoder-decoder models, ...).
    """
    nudging = nudging_model, nudging_tokenizer, nudging_input_ids, nudging_attention_mask
    return _generate_mixed(model, inputs, tokenizer, {"nudging": nudging}, _log_mean_probability, kwargs)


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
    """Decodes from the base's logits, shifted at every token by what alignment changed in a small model's logits.

    The logits are s_base + alpha * (s_nudging - s_unaligned). Source: Liu et al., "Tuning Language Models by Proxy"
    (arXiv 2401.08565), where alpha is 1, the small models are the expert and the anti-expert, and only the expert of
    a chat model is given its chat template.

    Args:
        unaligned_model (`PreTrainedModel` or `str`):
            The model that `nudging_model` was before its alignment, or the folder or Hub name that it is loaded from.
        alpha (`float`, *optional*, defaults to 1.0):
            How far the base's logits are shifted; 0 leaves them as they are.
        unaligned_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            It is loaded as the other tokenizers are if it is left out.
        unaligned_input_ids, unaligned_attention_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The unaligned model's prompts. If they are left out, it reads those of the base.
        model, inputs, nudging_model, tokenizer, nudging_tokenizer, nudging_input_ids, nudging_attention_mask, kwargs:
            They are those of [`ensemble`], and so are the return value and the errors.
    """
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"`alpha` must be a finite number, got {alpha!r}.")
    nudging = nudging_model, nudging_tokenizer, nudging_input_ids, nudging_attention_mask
    unaligned = unaligned_model, unaligned_tokenizer, unaligned_input_ids, unaligned_attention_mask

    def shifted(base: torch.Tensor, aligned: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return base + alpha * (aligned - before)

    small = {"nudging": nudging, "unaligned": unaligned}
    return _generate_mixed(model, inputs, tokenizer, small, shifted, kwargs)


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
    """Lets the base answer alone, after a preamble and a few examples that show what an answer looks like.

    Source: URIAL, Lin et al., "The Unlocking Spell on Base LLMs: Rethinking Alignment via In-Context Learning" (arXiv
    2312.01552). An answer ends at `STOP_STRING`, where the base begins a query of its own, or at its EOS. The string
    is left in place, as `generate` leaves any stop string; `text.partition(STOP_STRING)[0]` removes it.

    Args:
        model (`PreTrainedModel`): the base.
        inputs (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The prompts as they are given to nudging, also as `input_ids=`. The text of each becomes the query of an
            [`in_context_prompt`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The base's tokenizer; it is loaded from the base's `name_or_path` if it is left out.
        preamble (`str`, *optional*), examples (sequence of pairs of a query and its answer, *optional*):
            See [`in_context_prompt`].
        kwargs:
            Everything else that the base's `generate` takes. `max_length` counts the preamble and the examples too.

    Returns:
        What `generate` returns. `sequences` are the prompts that were given, each followed by its answer, without
        preamble and examples.

    Raises:
        ValueError: for prompts that are missing, and a tokenizer that is missing or cannot be loaded.
    """
    model = without_wrapper(model)
    input_ids = _take_prompts(inputs, kwargs)
    config = merged_generation_config(model, **kwargs)
    tokenizer = loaded_vocabulary(tokenizer, model, "tokenizer", "base").tokenizer
    queries = tokenizer.batch_decode(unpad(input_ids, kwargs.pop("attention_mask", None)), skip_special_tokens=True)
    rows = [
        guarded_ids(tokenizer, [query], lambda texts: in_context_prompt(texts[0], preamble, examples))
        for query in queries
    ]
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
    """The text that in-context alignment gives a base: the preamble, the examples, and the query.

    Args:
        query: what is asked. White space at its ends is dropped.
        preamble: the text at the head; "" leaves it out.
        examples: pairs of a query and the answer to it. They are the same whatever is asked.
    """
    shown = [f"# Query:\n{asked}\n\n# Answer:\n{answer}\n" for asked, answer in examples]
    return "\n".join([*([f"{preamble}\n"] if preamble else []), *shown, f"# Query:\n{query.strip()}\n\n# Answer:\n"])


# How models are mixed ------------------------------------------------------------------------------------------------


# A small model as a call gives it: the model, its tokenizer, its prompts and their attention mask.
_Given = tuple[Any, Any, torch.Tensor | None, torch.Tensor | None]


class _SmallModel(NamedTuple):
    """A small model whose arguments have been checked. Prompts that are `None` are made of the base's."""

    name: str
    model: Any
    vocabulary: Vocabulary
    prompts: list[list[int]] | None

    def prompts_of(self, base_prompts: list[list[int]], base: Vocabulary) -> list[list[int]]:
        """The model's prompts, one for each of the base's."""
        if self.prompts is not None:
            return self.prompts
        if self.name == "nudging":
            return nudging_prompts(base_prompts, base.tokenizer, self.vocabulary.tokenizer, one_vocabulary=True)
        return base_prompts


class _MixedLogits(LogitsProcessor):
    """Replaces the base's logits by those of the mixture. Each reader has its own prompts, one for each row."""

    def __init__(self, readers: list[tuple[CachedLM | SeparateRows, list[list[int]]]], prompt_length: int, mix: Mix):
        self.readers, self.prompt_length, self.mix = readers, prompt_length, mix

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
    model: Any,
    inputs: torch.Tensor | None,
    tokenizer: Any,
    small: dict[str, _Given],
    mix: Mix,
    arguments: dict[str, Any],
) -> Any:
    model = without_wrapper(model)
    input_ids = _take_prompts(inputs, arguments)
    config = merged_generation_config(model, **arguments)
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"Models are mixed greedily or by sampling, got {mode.value!r}: leave out `num_beams`, `assistant_model`, "
            "`prompt_lookup_num_tokens`, `penalty_alpha` and `dola_layers`."
        )
    if arguments.get("custom_generate") is not None:
        raise ValueError("`custom_generate` replaces the loop in which models are mixed: leave it out.")
    validate_causal_lm(model, "base", "model")
    vocabulary = loaded_vocabulary(tokenizer, model, "tokenizer", "base")
    use_cache = bool(config.use_cache)
    small_models = [
        _checked(name, given, model, vocabulary, len(input_ids), use_cache) for name, given in small.items()
    ]
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    arguments["eos_token_id"] = list(dict.fromkeys([*ends, *_eos_of(small_models[0], model)])) or None
    if config.stop_strings is not None:
        take_over_stop_strings(arguments, model, config.stop_strings, vocabulary.tokenizer)
    streamer = arguments.get("streamer")  # transformers keeps it from a `custom_generate` function.

    def decode(model: Any, input_ids: torch.Tensor, logits_processor: Any, **prepared: Any) -> Any:
        """The decoding loop, as transformers calls it: everything is prepared, and no token has been read."""
        base_prompts = unpad(input_ids, prepared.get("attention_mask"))
        readers = []
        for each in small_models:
            prompts = each.prompts_of(base_prompts, vocabulary)
            copies = len(input_ids) // len(prompts)  # `num_return_sequences` rows in succession share one prompt.
            lm = cached_lm(each.model, len(input_ids), bool(prepared["generation_config"].use_cache))
            readers.append((lm, [prompt for prompt in prompts for _ in range(copies)]))
        mixed = LogitsProcessorList([_MixedLogits(readers, input_ids.shape[1], mix), *logits_processor])
        return token_by_token(model, input_ids, logits_processor=mixed, streamer=streamer, **prepared)

    return GenerationMixin.generate(model, input_ids, **arguments, custom_generate=decode)


def _take_prompts(inputs: torch.Tensor | None, arguments: dict[str, Any]) -> torch.Tensor:
    """Takes the base's prompts out of a call's arguments, and returns them."""
    input_ids = arguments.pop("input_ids", None)
    if inputs is not None and input_ids is not None:
        raise ValueError("The prompts were given twice: leave out `inputs` or `input_ids`.")
    input_ids = inputs if inputs is not None else input_ids
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"`input_ids` must be a tensor of shape (batch_size, length), got {shape_of(input_ids)}.")
    return input_ids


def _checked(name: str, given: _Given, base: Any, vocabulary: Vocabulary, rows: int, use_cache: bool) -> _SmallModel:
    """Checks a small model, and completes it with its vocabulary and prompts. `vocabulary` is the base's.

    Raises:
        ValueError: if it is no causal language model, has another vocabulary than the base, or not `rows` prompts.
    """
    model, tokenizer, input_ids, attention_mask = given
    model, tokenizer = resolved_model(base, model, tokenizer)
    validate_causal_lm(model, f"{name} model", f"{name}_model")
    if use_cache:
        validate_cache(model, f"{name} model")
    own = loaded_vocabulary(tokenizer, model, f"{name}_tokenizer", f"{name} model")
    if answer_class(vocabulary, own) is not OneVocabulary:
        raise ValueError(
            f"Models are mixed token by token, which needs one vocabulary: the base's has {len(vocabulary.tokenizer)} "
            f"tokens, and that of the {name} model {len(own.tokenizer)}, with other ids or spellings. Give a "
            f"`{name}_model` of the base's family; `nudging_hf.generate` takes any."
        )
    validate_prompt_tensors(input_ids, attention_mask, name)
    prompts = None if input_ids is None else given_prompts(input_ids, attention_mask, rows, name)
    return _SmallModel(name, model, own, prompts)


def _eos_of(nudging: _SmallModel, base: Any) -> list[int]:
    """The tokens with which the nudging model ends an answer.

    Raises:
        ValueError: if the base can write none of them.
    """
    ends = end_tokens(nudging.model, nudging.vocabulary.tokenizer)
    rows = base.get_input_embeddings().num_embeddings
    if ends and min(ends) >= rows:
        raise ValueError(
            f"The nudging model ends its answers with token {min(ends)}, and the base has only {rows}: set "
            "`nudging_model.generation_config.eos_token_id` to one of those."
        )
    return [token for token in ends if token < rows]
