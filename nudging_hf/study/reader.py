"""Models that answer prompts and read the answers of others. It knows prompts and ids, never files or figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..chats import DEFAULT_TEMPLATE
from ..core.answer import OneVocabulary, answer_class
from ..core.config import NudgingConfig
from ..core.gate import top1_probabilities
from ..core.transformers_private import end_tokens, input_device, plain_generate
from ..core.vocabulary import Vocabulary
from ..encoded_chats import chat_inputs, padded, plain_ids
from ..pair import Pair, load_model
from ..provenance import Alternative, Piece, count_nudged_words, pieces_of, spans, text_of
from .prompts import Prompt


@dataclass(frozen=True)
class Answer:
    """One answer, in values that JSON has. Words are those of the `word_boundary` that it is made with.

    Args:
        text: the answer.
        ids: the tokens of the model that wrote it (the base, if it was nudged), without the end mark.
        finished: whether a model ended it. Otherwise the limit on its length did.
        words: how many words the text has.
        nudged_words: of how many words the nudging model wrote at least a character.
        nudged_tokens: how many tokens the nudging model wrote.
        pieces: the text in pieces, which say who wrote them; none if one model wrote it alone.
    """

    text: str
    ids: list[int]
    finished: bool
    words: int
    nudged_words: int = 0
    nudged_tokens: int = 0
    pieces: list[Piece] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        pieces: Sequence[Piece],
        ids: list[int],
        finished: bool,
        nudged_tokens: int = 0,
        word_boundary: str = NudgingConfig.word_boundary,
    ) -> Answer:
        """An answer whose words are counted from its pieces."""
        nudged_words, words = count_nudged_words(pieces, word_boundary)
        return cls(text_of(pieces), ids, finished, words, nudged_words, nudged_tokens, list(pieces))

    @classmethod
    def of_one_model(
        cls, text: str, ids: list[int], finished: bool, word_boundary: str = NudgingConfig.word_boundary
    ) -> Answer:
        """An answer that one model wrote without nudging."""
        return cls(text, ids, finished, words=count_nudged_words([Piece(text, False)], word_boundary)[1])

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Answer:
        """The inverse of `asdict`, whose values may have been JSON in between."""
        pieces = [
            Piece(text, nudged, top1, None if instead is None else Alternative(**instead))
            for text, nudged, top1, instead in row["pieces"]
        ]
        answer = cls(**{**row, "pieces": pieces})
        if not isinstance(answer.text, str) or not all(type(each.text) is str for each in pieces):
            raise ValueError(f"The text of an answer must be text, got {answer.text!r:.200}.")
        return answer

    @property
    def nudged_spans(self) -> list[list[int]]:
        """Where the nudging model wrote, as [start, end] in characters of the text."""
        return [[span.start, span.end] for span in spans(self.pieces) if span.nudged]

    @property
    def tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.ids)


class Prediction(NamedTuple):
    """A model's greedy token at one place of an answer: its bytes, whether it is an EOS, and its probability."""

    token: int
    text: bytes
    ends: bool
    top1: float


class Reader:
    """A causal LM that answers prompts and reads the answers of others.

    Args:
        model, tokenizer: a model of transformers and its tokenizer.
        chat: whether prompts go through its chat template, if it has one; otherwise it is given the base's prompt.
        base_template: the template of the base's prompt, where a [`Prompt`] does not say what that is.

    Attributes:
        word_boundary: how the words of the model's own answers are counted.
    """

    def __init__(self, model: Any, tokenizer: Any, chat: bool, base_template: str = DEFAULT_TEMPLATE):
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.eos = set(end_tokens(model, tokenizer))
        self.word_boundary = NudgingConfig.word_boundary
        self._chat = chat and bool(tokenizer.chat_template)
        self._base_template = base_template

    @classmethod
    def load(cls, folder: str | Path, chat: bool = True) -> Reader:
        """The model of a folder, in float32."""
        return cls(*load_model(folder, "The model", dtype=torch.float32), chat)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up the shorter answers of a batch."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.eos, default=0)

    def text(self, answer: Sequence[int]) -> str:
        """The text of an answer's ids."""
        return self.vocabulary.join(answer).decode("utf-8", errors="replace")

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The model's prompt in its own vocabulary."""
        if self._chat:
            inputs = chat_inputs(prompt.messages, self.tokenizer, self.tokenizer)
            return inputs["nudging_input_ids"][0].tolist()
        if prompt.prompt is not None:
            return self.tokenizer(prompt.prompt)["input_ids"]
        return plain_ids(self.tokenizer, prompt.messages, self._base_template)

    def padded_prompts(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask of shape (batch, length), on the device where the model reads them."""
        ids, mask = padded([self.prompt_ids(prompt) for prompt in prompts], self.tokenizer)
        return ids.to(input_device(self.model)), mask.to(input_device(self.model))

    def inputs(self, prompts: Sequence[Prompt], max_new_tokens: int) -> dict[str, Any]:
        """The arguments of `generate` with which the model answers greedily."""
        ids, mask = self.padded_prompts(prompts)
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": self.pad_token_id}
        return {"input_ids": ids, "attention_mask": mask, **settings}

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """The greedy answers that the model writes alone."""
        inputs = self.inputs(prompts, max_new_tokens)
        sequences = plain_generate(self.model)(self.model, **inputs, eos_token_id=sorted(self.eos) or None)
        return self.answers_of(sequences[:, inputs["input_ids"].shape[1] :], self.eos)

    def answers_of(self, new: torch.Tensor, ends: set[int]) -> list[Answer]:
        """New tokens of shape (batch, length) as answers, each up to the first token of `ends`."""
        answers = []
        for row in new.tolist():
            end = next((i for i, token in enumerate(row) if token in ends), None)
            finished = end is not None
            answers.append(Answer.of_one_model(self.text(row[:end]), row[:end], finished, self.word_boundary))
        return answers

    @torch.no_grad()
    def predictions(self, prompt: list[int], answer: list[int], text: bytes) -> dict[int, Prediction]:
        """What the model would write wherever one of its own tokens starts in an answer, by byte of the text.

        The answer is read in one forward pass. A tokenizer may not keep the text (lower case, accents), and the text
        may be no whole UTF-8. The ids are then not those of the text, and places after the first token that differs
        are left out.

        Args:
            prompt, answer: ids of the model's own vocabulary.
            text: the text of the answer.
        """
        if not answer:
            return {}
        ids = torch.tensor([prompt + answer], device=input_device(self.model))
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        tokens, top1 = logits.argmax(dim=-1).tolist(), top1_probabilities(logits).tolist()
        found = {}
        start = 0
        for written, greedy, probability in zip(answer, tokens, top1, strict=True):
            added = self.vocabulary.bytes_of(written)
            if added:
                adds = self.vocabulary.bytes_of(greedy)
                found[start] = Prediction(greedy, adds, greedy in self.eos, probability)
            if not text.startswith(added, start):
                break
            start += len(added)
        return found


def pair_of(base: Reader, nudging: Reader) -> Pair:
    """The pair that two readers make."""
    return Pair(base.model, base.tokenizer, nudging.model, nudging.tokenizer)


def share_vocabulary(base: Reader, other: Reader) -> bool:
    """Whether another model has the base's vocabulary."""
    return answer_class(base.vocabulary, other.vocabulary) is OneVocabulary


def inputs_of_both(base: Reader, nudging: Reader, prompts: Sequence[Prompt], max_new_tokens: int) -> dict[str, Any]:
    """The arguments of `generate` with which a pair answers greedily, without the models and tokenizers."""
    ids, mask = nudging.padded_prompts(prompts)
    return {**base.inputs(prompts, max_new_tokens), "nudging_input_ids": ids, "nudging_attention_mask": mask}


def nudged_answers(
    base: Reader,
    nudging: Reader,
    config: NudgingConfig | Mapping[str, Any],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    streamer: Any = None,
) -> list[Answer]:
    """The greedy answers of the base, nudged. What `config` leaves out is taken from the base's generation config."""
    inputs, pair = inputs_of_both(base, nudging, prompts, max_new_tokens), pair_of(base, nudging)
    out = pair.generate(inputs, nudging_config=config, streamer=streamer, return_dict_in_generate=True)
    word_boundary = pair.nudging_config(vars(config) if isinstance(config, NudgingConfig) else config).word_boundary
    answers = []
    new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    lengths = (~out.base_top1_probs.isnan()).sum(dim=1).tolist()
    columns = (new, lengths, out.nudged_mask.tolist(), pieces_of(out, base.tokenizer), out.finish_reasons)
    for row, length, nudged, pieces, reason in zip(*columns, strict=True):
        ids = row[:length]
        while ids and ids[-1] in base.eos:  # This is the end mark: the base itself never ends an answer.
            ids.pop()
        answers.append(Answer.of(pieces, ids, reason == "eos", sum(nudged), word_boundary))
    return answers
