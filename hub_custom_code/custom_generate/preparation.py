"""Makes the rows of a call from what transformers has prepared. It checks prompts and runs no forward pass."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import MinNewTokensLengthLogitsProcessor, StoppingCriteriaList

from .answer import OneVocabulary, TwoVocabularies, answer_class
from .config import NudgingConfig
from .constraints import (
    Constraint,
    hard_processors,
    validate_base_processors,
    validate_nudging_generation_config,
)
from .gate import Confidence
from .limits import Limits
from .prompts import given_prompts, nudging_prompts, unpad
from .rounds import rounds
from .row import Request, Row, Side
from .sampling import new_seeds
from .token_rules import TokenRules
from .transformers_private import (
    end_tokens,
    eos_token_ids,
    greatest_length,
    input_device,
    input_rows,
    output_rows,
    own_eos_token_ids,
    own_generation_config,
    own_processors,
    pad_token_id,
    placeholder_ids,
    processors_of_row,
    shared_by_ranks,
)
from .vocabulary import Vocabulary

_answer_class = lru_cache(maxsize=8)(answer_class)


@dataclass(frozen=True)
class NudgingCall:
    """The checked arguments of a call that concern nudging. transformers passes them on to the decoding loop.

    Args:
        nudging_model: the nudging model.
        vocabulary, nudging_vocabulary: the base's and the nudging model's.
        nudging_input_ids: the nudging model's prompts, of shape (batch_size, length). `None` if none were given.
        nudging_attention_mask: their mask, of the same shape, or `None`.
        config: the parameters of nudging.
        streamer: the caller's streamer, or `None`.
    """

    nudging_model: PreTrainedModel
    vocabulary: Vocabulary
    nudging_vocabulary: Vocabulary
    nudging_input_ids: torch.Tensor | None
    nudging_attention_mask: torch.Tensor | None
    config: NudgingConfig
    streamer: Any = None

    @property
    def answer_class(self) -> type[OneVocabulary] | type[TwoVocabularies]:
        return _answer_class(self.vocabulary, self.nudging_vocabulary)

    @property
    def one_vocabulary(self) -> bool:
        return self.answer_class is OneVocabulary


class Preparation:
    """Prepares the rows and the rules of a call.

    Args:
        model: the base.
        call: the arguments of the call that concern nudging.
        input_ids: the base's prompts as `generate` prepared them, of shape (batch_size, prompt_length).
        attention_mask: their mask, of the same shape, or `None` if they are not padded.
        logits_processor, stopping_criteria, generation_config: as `generate` prepared them.
        has_placeholders: whether the base's prompts have placeholders for images, sounds or videos.

    Attributes:
        prompts: the base's prompts, ids without padding.
        rules: which tokens each model may write.
        rows: the answers to write.

    Raises:
        ValueError: if prompts are missing, empty or too long or have ids that a model cannot read, or if there are
            logits processors that nudging cannot obey.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        call: NudgingCall,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        has_placeholders: bool,
    ):
        self._model, self._call, self._config = model, call, generation_config
        self._nudging_config = own_generation_config(call.nudging_model, bool(generation_config.do_sample))
        placeholders = placeholder_ids(model)
        self.prompts = unpad(input_ids, attention_mask)
        given = self._nudging_prompts(placeholders)
        validate_base_processors(logits_processor)
        validate_nudging_generation_config(self._nudging_config)
        validate_prompts(self.prompts, model, "base", "tokenizer", placeholders if has_placeholders else set())
        validate_prompts(given, call.nudging_model, "nudging model", "nudging_tokenizer")
        self.rules = self._token_rules(input_ids.shape[1])
        records = bool(generation_config.return_dict_in_generate)
        self._request = Request(
            config=call.config,
            rules=self.rules,
            limits=Limits(stopping_criteria, self.rules.base_eos, self.rules.stop_tokens),
            streamer=call.streamer,
            records=records,
            records_logits=records and bool(generation_config.output_scores or generation_config.output_logits),
        )
        self.rows = self._rows(given, self._processor_prompts(input_ids), input_ids, logits_processor)

    def _nudging_prompts(self, placeholders: set[int]) -> list[list[int]]:
        """The nudging model's prompts, one for each row. `num_return_sequences` successive rows share one.

        If they are made from the base's prompts, placeholders for images are left out.
        """
        call, copies = self._call, self._config.num_return_sequences
        if call.nudging_input_ids is not None:
            rows = len(self.prompts) // copies
            given = given_prompts(call.nudging_input_ids, call.nudging_attention_mask, rows, "nudging")
            return [prompt for prompt in given for _ in range(copies)]
        made = nudging_prompts(
            [[token for token in prompt if token not in placeholders] for prompt in self.prompts],
            call.vocabulary.tokenizer,
            call.nudging_vocabulary.tokenizer,
            one_vocabulary=call.one_vocabulary,
        )
        if not all(made):
            raise ValueError("A prompt of the nudging model is empty: give at least one token in `nudging_input_ids`.")
        return made

    def _token_rules(self, prompt_length: int) -> TokenRules:
        call, config = self._call, self._config
        model, tokenizer = call.nudging_model, call.nudging_vocabulary.tokenizer
        num_scored = output_rows(model)
        nudging_eos = end_tokens(model, tokenizer)
        if not nudging_eos:
            raise ValueError(
                "The nudging model has no EOS token, but only it can end an answer: set "
                f"`nudging_model.generation_config.eos_token_id` to an id below {num_scored}, which it can write."
            )
        control = sorted(i for i in call.nudging_vocabulary.control if i < num_scored and i not in nudging_eos)
        base_eos = own_eos_token_ids(self._model)
        base_num_ids = input_rows(self._model) or math.inf
        ids_for_base = num_scored if call.one_vocabulary else len(call.vocabulary.tokenizer)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return TokenRules(
            base_eos=base_eos,
            nudging_eos=nudging_eos,
            nudging_control=torch.tensor(control, dtype=torch.long, device=input_device(model)),
            stop_tokens=[token for token in eos_token_ids(config) if token not in base_eos],
            base_samples=bool(config.do_sample),
            nudging_samples=bool(self._nudging_config.do_sample),
            min_new_tokens=max(config.min_new_tokens or 0, (config.min_length or 0) - prompt_length),
            one_vocabulary=call.one_vocabulary,
            base_num_ids=base_num_ids if ids_for_base > base_num_ids else math.inf,
            nudging_positions=positions or math.inf,
        )

    def _processor_prompts(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The base's prompts as logits processors see them.

        Processors may index the scores by the padding id. If the base has no row for it, each prompt's first id stands
        in for padding.
        """
        pad = pad_token_id(self._config)
        if pad is None or pad < (input_rows(self._model) or math.inf):
            return input_ids
        first = torch.tensor([[ids[0]] for ids in self.prompts], device=input_ids.device)
        return torch.where(input_ids == pad, first, input_ids)

    def _rows(
        self,
        nudging_prompts: list[list[int]],
        shown: torch.Tensor,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
    ) -> list[Row]:
        call, batch = self._call, len(self.prompts)
        num_ids = self._nudging_num_ids()
        seeds = shared_by_ranks(self._model, new_seeds(batch)) if self.rules.base_samples else [0] * batch
        rows = []
        for i, (prompt, nudging_prompt) in enumerate(zip(self.prompts, nudging_prompts, strict=True)):
            processors = self._base_processors(logits_processor, i, input_ids)
            nudging_ids = torch.tensor([nudging_prompt], device=input_device(call.nudging_model))
            rows.append(
                Row(
                    number=i,
                    request=self._request,
                    answer=call.answer_class(
                        call.vocabulary, call.nudging_vocabulary, prompt, nudging_prompt, call.config.word_boundary
                    ),
                    base=Side(shown[i : i + 1], processors, _room(self._model, prompt)),
                    nudging=Side(
                        nudging_ids,
                        own_processors(call.nudging_model, self._nudging_config, nudging_ids),
                        _room(call.nudging_model, nudging_prompt),
                        num_ids=num_ids,
                        stand_in=self.rules.nudging_eos[0],  # The nudging model never writes it as a word.
                    ),
                    seed=seeds[i],
                    confidence=Confidence.of_answer(call.config),
                    algorithm=rounds(
                        call.config.takeover_on_agreement, agrees_beyond_word=call.config.word_boundary != "space"
                    ),
                    constraint=self._constraint(processors, shown[i : i + 1]),
                )
            )
        return rows

    def _base_processors(
        self, logits_processor: LogitsProcessorList, row: int, input_ids: torch.Tensor
    ) -> LogitsProcessorList:
        processors = processors_of_row(logits_processor, row, len(self.prompts))
        min_new_tokens, ends = self.rules.min_new_tokens, eos_token_ids(self._config)
        if min_new_tokens and (missed := [token for token in self.rules.base_eos if token not in ends]):
            # transformers suppresses only the call's EOS, but the base's own EOS must not come too early either.
            processors.insert(0, _suppress_until(min_new_tokens, missed, input_ids))
        return processors

    def _nudging_num_ids(self) -> float:
        """How many ids the nudging model can read; infinity if it can never be given an id that it cannot read."""
        call = self._call
        num_ids = input_rows(call.nudging_model) or math.inf
        given = output_rows(self._model) if call.one_vocabulary else len(call.nudging_vocabulary.tokenizer)
        return num_ids if given > num_ids else math.inf

    def _constraint(self, processors: LogitsProcessorList, prompt: torch.Tensor) -> Constraint | None:
        """What a row's hard processors forbid; `None` if it has no hard processors."""
        rules = self.rules
        hard = hard_processors(processors)
        if rules.min_new_tokens and rules.stop_tokens and not rules.one_vocabulary:
            hard.append(_suppress_until(rules.min_new_tokens, rules.stop_tokens, prompt))
        if not hard:
            return None
        ends = rules.base_eos or rules.stop_tokens
        return Constraint(hard, prompt, output_rows(self._model), ends, rules.stop_tokens)


def validate_prompts(
    prompts: list[list[int]], model: Any, whose: str, argument: str, placeholders: Collection[int] = ()
) -> None:
    """Raises a `ValueError` if a prompt has an id that the model cannot read, or leaves no room for an answer.

    Args:
        prompts: ids without padding.
        model: the model that reads them.
        whose, argument: how the error calls the model, and the argument that gives its tokenizer.
        placeholders: ids that are not looked up in the embeddings.
    """
    rows, most = input_rows(model) or math.inf, greatest_length(model) or math.inf
    for number, ids in enumerate(prompts):
        wrong = next((token for token in ids if not 0 <= token < rows and token not in placeholders), None)
        if wrong is not None:
            raise ValueError(
                f"The {whose}'s prompt in row {number} has the id {wrong}, but the model has embeddings only for the "
                f"ids from 0 to {int(rows) - 1}: give the model's own tokenizer as `{argument}=`, or make room for "
                "added tokens with `resize_token_embeddings(len(tokenizer))`."
            )
        if len(ids) >= most:
            raise ValueError(
                f"The {whose}'s prompt in row {number} has {len(ids)} tokens, but the model has only {int(most)} "
                "positions, which leaves no room for an answer: give a shorter prompt, or a model with more positions."
            )


def _room(model: Any, prompt: list[int]) -> float:
    """How many tokens fit after a prompt, up to the model's last position."""
    return (greatest_length(model) or math.inf) - len(prompt)


def _suppress_until(
    min_new_tokens: int, tokens: Sequence[int], prompts: torch.Tensor
) -> MinNewTokensLengthLogitsProcessor:
    """A processor that forbids these tokens until the answer has `min_new_tokens` tokens."""
    return MinNewTokensLengthLogitsProcessor(
        prompts.shape[1], min_new_tokens, torch.tensor(tokens, device=prompts.device), device=str(prompts.device)
    )
