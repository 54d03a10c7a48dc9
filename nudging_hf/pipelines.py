"""The pipeline of the task "nudged-text-generation". It knows prompts and records, never how an answer is decoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby, takewhile
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, TextGenerationPipeline
from transformers.utils.chat_template_utils import Chat

from .chats import DEFAULT_TEMPLATE, turn_template, validate_no_surrogates
from .core.generate import generate, loaded_vocabulary
from .core.transformers_private import arguments_of_pipeline
from .encoded_chats import chat_inputs
from .pair import Pair, nudging_model_named_in
from .provenance import Alternative, Piece, Span, alternatives_of, spans

_PROMPTS = ("input_ids", "attention_mask", "nudging_input_ids", "nudging_attention_mask")
_SAID = ("nudged_mask", "base_tokens", "base_token_probs", "base_ranks")

# Arguments of the text-generation pipeline that this one refuses, and what to do instead.
_REFUSED = {
    "continue_final_message": "the nudging model begins an answer; leave it out, and let the user's message come last",
    "documents": "the base reads no chat template; write them into a message",
    "prefix": "write it in front of the prompt, or into `base_template`",
    "tools": "the base reads no chat template; write them into a message",
}
# They say how a string is encoded. The two prompts of a chat are made by `base_template` and the chat template.
_OF_STRINGS = "add_special_tokens handle_long_generation nudging_attention_mask nudging_input_ids padding".split()
_OF_STRINGS += ["tokenizer_encode_kwargs", "truncation"]


class NudgedTextGenerationPipeline(TextGenerationPipeline):
    """Text generation by a base that a small aligned model nudges where it is unsure.

    A string is the base's prompt as it is, and becomes one user turn of the nudging model's chat template. For a chat,
    the base is given [`plain_prompt`], and the nudging model its chat template: see [`chat_inputs`]. The ids are those
    that [`nudging_hf.generate`] returns for these prompts. It decodes greedily, up to 256 new tokens, unless the
    base's generation config, the constructor or a call says otherwise.

    Args:
        model (`PreTrainedModel`):
            The base, a decoder-only language model. `pipeline` takes a folder or a name on the Hub as well.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The base's tokenizer; it is loaded from the model's `name_or_path` if it is left out.
        nudging_model (`PreTrainedModel` or `str`, *optional*):
            The small aligned model, which is moved to the pipeline's device, or the folder or Hub name that it is
            loaded from, in the base's dtype. If it is left out, the base's generation config names it in
            `nudging_model_name_or_path`.
        nudging_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The nudging model's tokenizer; it is loaded from that model's `name_or_path` if it is left out.
        base_template (`str`, *optional*, defaults to [`DEFAULT_TEMPLATE`]):
            One turn of a chat as the base is given it: see [`plain_prompt`].
        kwargs:
            Arguments of [`TextGenerationPipeline`] and of [`nudging_hf.generate`], such as `nudge_threshold`; a call
            may say otherwise. `return_dict_in_generate` has no effect: `return_nudged_spans` says who wrote what.

    Raises:
        ValueError: if there is no nudging model or tokenizer, and for what nudging or this pipeline cannot do.

    Example:
        ```python
        nudging_hf.register()
        pipe = pipeline("nudged-text-generation", model=base, nudging_model=nudger)
        pipe([{"role": "user", "content": "What is 12 + 7?"}], return_nudged_spans=True)
        ```
    """

    _load_tokenizer = None  # The tokenizer is optional: a base that is given as an object may name it.
    _default_generation_config = GenerationConfig(max_new_tokens=256, do_sample=False)

    def __init__(self, model: Any, tokenizer: Any = None, **kwargs: Any):
        tokenizer = loaded_vocabulary(tokenizer, model, "tokenizer", "base").tokenizer
        super().__init__(model, tokenizer=tokenizer, **kwargs)
        if "nudging_model" not in self._forward_params:
            named = nudging_model_named_in(self.model)
            arguments = self._nudging_arguments(named, self._forward_params.get("nudging_tokenizer"))
            self._preprocess_params.update(arguments)
            self._forward_params.update(arguments)

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:
        """Answers one prompt or several.

        Args:
            text_inputs (`str`, a chat, or a list, generator or dataset of strings or of chats):
                A chat is a list of messages `{"role": ..., "content": ...}`, the last of them the user's.
            return_nudged_spans (`bool`, *optional*, defaults to `False`):
                Whether each record says who wrote what.
            return_full_text, return_tensors, num_return_sequences, batch_size, streamer, stop_sequence, ...:
                The arguments of the text-generation pipeline. A streamer takes one row at a time.
            kwargs:
                Arguments of the constructor, except the base and its tokenizer, for this call.

        Returns:
            A list of records for a single prompt, one for each of `num_return_sequences`; a list of such lists for a
            list of prompts. A record holds `generated_text`, which is the prompt (the messages of a chat) and the
            answer, or `generated_token_ids`. With `return_nudged_spans=True` it also holds `nudged_spans`: dicts with
            the `text`, `nudged`, `start`, `end` and `instead` of a [`Span`]. Joined, they are the text of the answer.

        Raises:
            ValueError: for what is no prompt, and for what [`nudging_hf.generate`] refuses.
        """
        if isinstance(text_inputs, (list, tuple)) and not text_inputs:
            raise ValueError("There is no prompt: give a string, a chat (a list of messages), or a list of either.")
        return super().__call__(text_inputs, **kwargs)

    def _sanitize_parameters(
        self, base_template: str | None = None, return_nudged_spans: bool | None = None, **parameters: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name, instead in _REFUSED.items():
            if parameters.get(name):
                raise ValueError(f"A nudged pipeline takes no `{name}`: {instead}.")
        if "nudging_model" in parameters:
            # Both are always set, because the tokenizer of the constructor does not belong to the model of a call.
            given = parameters["nudging_model"], parameters.get("nudging_tokenizer")
            parameters.update(self._nudging_arguments(*given))
        preprocess, forward, postprocess = super()._sanitize_parameters(**parameters)
        if base_template is not None:
            turn_template(base_template)  # A bad template is refused now, not at the first chat.
            preprocess["base_template"] = base_template
        if return_nudged_spans is not None:
            postprocess["return_nudged_spans"] = return_nudged_spans
        return preprocess, forward, postprocess

    def _nudging_arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Moves a nudging model to the pipeline's device; returns it and its tokenizer as keywords of `generate`."""
        if isinstance(model, torch.nn.Module):
            if getattr(model, "hf_device_map", None) is None and model.device != self.device:
                model.to(self.device)
        elif not isinstance(model, (str, os.PathLike)):
            raise ValueError(
                f"A nudged pipeline needs `nudging_model=`, a causal language model of transformers or its name, got "
                f"{'none' if model is None else type(model).__name__}: give one, name one as "
                "`nudging_model_name_or_path` in the base's generation_config.json, or take the task "
                '"text-generation", which also runs a base alone.'
            )
        pair = Pair.of(self.model, model, self.tokenizer, tokenizer)
        return {"nudging_model": pair.nudging_model, "nudging_tokenizer": pair.nudging_tokenizer}

    def preprocess(self, prompt: Any, base_template: str = DEFAULT_TEMPLATE, **parameters: Any) -> Any:
        """Both models' prompts, of shape (1, length). For a string, `generate` makes the nudging model's prompt."""
        if isinstance(prompt, str):
            validate_no_surrogates(prompt, "The prompt")
            inputs = super().preprocess(prompt, **parameters)
            if inputs["input_ids"].shape[1] == 0:
                raise ValueError("The prompt is empty: give a string of at least one token.")
            return inputs
        if not isinstance(prompt, Chat):
            raise ValueError(
                'A prompt is a string or a chat, a list of messages {"role": ..., "content": ...}, and a list holds '
                f"prompts of one kind; got {prompt!r}."
            )
        if unheeded := [name for name in _OF_STRINGS if parameters.get(name) is not None]:
            raise ValueError(
                f"`{unheeded[0]}` is for prompts that are strings, got a chat: leave it out, or give the base's "
                "prompt as a string."
            )
        inputs = chat_inputs(prompt.messages, self.tokenizer, parameters["nudging_tokenizer"], base_template)
        inputs["prompt_text"] = prompt
        return inputs

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> dict[str, Any]:
        prompts = {name: model_inputs[name] for name in _PROMPTS if name in model_inputs}
        arguments = arguments_of_pipeline(self, generate_kwargs, return_dict_in_generate=True)
        # `self.model.generate` may be another: a model class, or a folder with code of its own, may override it.
        output: Any = generate(self.model, **{"tokenizer": self.tokenizer, **prompts, **arguments})

        def by_prompt(rows: torch.Tensor) -> torch.Tensor:
            """Rows of shape (prompts * copies, length) as (prompts, copies, length)."""
            return rows.reshape(len(prompts["input_ids"]), -1, rows.shape[-1])

        return {
            "generated_sequence": by_prompt(output.sequences),
            "input_ids": prompts["input_ids"],
            "prompt_text": model_inputs["prompt_text"],
            **{name: by_prompt(output[name]) for name in _SAID},
        }

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_nudged_spans: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        skip_special_tokens: bool | None = None,
        **parameters: Any,
    ) -> list[dict[str, Any]]:
        """The records of one prompt, one for each answer."""
        said = SimpleNamespace(**{name: model_outputs.pop(name)[0] for name in _SAID})
        decoding = {
            "skip_special_tokens": True if skip_special_tokens is None else skip_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        records = super().postprocess(model_outputs, **decoding, **parameters)
        if return_nudged_spans:
            answers = model_outputs["generated_sequence"][0][:, -said.nudged_mask.shape[1] :]
            vocabulary = loaded_vocabulary(self.tokenizer, self.model, "tokenizer", "base")
            instead = alternatives_of(said, vocabulary)
            columns = (records, answers.tolist(), said.nudged_mask.tolist(), instead)
            for record, ids, nudged, others in zip(*columns, strict=True):
                found = _spans_as_decoded(ids, nudged, others, lambda ids: self.tokenizer.decode(ids, **decoding))
                record["nudged_spans"] = [asdict(span) for span in found]
        return records


def _spans_as_decoded(
    ids: list[int],
    nudged: list[bool],
    instead: list[Alternative | None],
    decode: Callable[[list[int]], str],
) -> list[Span]:
    """The spans of `decode(ids)`, which say who wrote what, and what the base would have written `instead`.

    [`spans_of`] reads the tokens one by one. Here the spans must be those of a record's text, because a tokenizer may
    decode an answer without its leading space, or clean it up. A character that is split over several tokens comes
    whole and belongs to the author of its last token.
    """
    text = decode(ids)
    pieces: list[Piece] = []
    start = 0
    for author, run in groupby(enumerate(nudged), key=lambda numbered: numbered[1]):
        places = [i for i, _ in run]
        n = 1 + places[-1]
        # An unfinished character at the end of the first n tokens is decoded to something that the text does not hold.
        end = max(start, _shared(decode(ids[:n]), text)) if n < len(ids) else len(text)
        if end > start:
            pieces.append(Piece(text[start:end], author, instead=instead[places[0]]))
        start = end
    return spans(pieces)


def _shared(text: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(text, other, strict=False)))
