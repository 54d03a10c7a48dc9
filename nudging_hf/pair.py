"""A base and a nudging model with their tokenizers, and how they are called. It knows chats, never how to decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchEncoding

from .chats import REASONING_TEMPLATE, Message, chat_inputs
from .core.config import NudgingConfig
from .core.generate import generate, loaded_vocabulary
from .core.named_model import resolved_model
from .core.transformers_private import input_device


@dataclass(frozen=True)
class Pair:
    """Two models in their places, and their tokenizers.

    Args:
        base, nudging_model: causal language models of transformers.
        tokenizer, nudging_tokenizer: the tokenizer of each.
    """

    base: Any
    tokenizer: Any
    nudging_model: Any
    nudging_tokenizer: Any

    @classmethod
    def of(cls, base: Any, nudging_model: Any, tokenizer: Any = None, nudging_tokenizer: Any = None) -> Pair:
        """A pair of a base and a nudging model, or the name of one.

        Args:
            base: a model.
            nudging_model: a model, or the folder or Hub name that it is loaded from, to the base's device and in its
                dtype.
            tokenizer, nudging_tokenizer: each is loaded from its model's `name_or_path` if it is left out.

        Raises:
            ValueError: if a model or a tokenizer cannot be loaded.
        """
        nudging_model, nudging_tokenizer = resolved_model(base, nudging_model, nudging_tokenizer)
        own = loaded_vocabulary(nudging_tokenizer, nudging_model, "nudging_tokenizer", "nudging model").tokenizer
        return cls(base, loaded_vocabulary(tokenizer, base, "tokenizer", "base").tokenizer, nudging_model, own)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the base's `generate` that stand for the rest of the pair."""
        return {
            "tokenizer": self.tokenizer,
            "nudging_model": self.nudging_model,
            "nudging_tokenizer": self.nudging_tokenizer,
        }

    def inputs(
        self,
        chats: Sequence[Message] | Sequence[Sequence[Message]],
        base_template: str = REASONING_TEMPLATE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchEncoding:
        """The prompts of both models for one chat or several, on the base's device: see [`chat_inputs`]."""
        prompts = chat_inputs(chats, self.tokenizer, self.nudging_tokenizer, base_template, chat_template_kwargs)
        return prompts.to(input_device(self.base))

    def generate(self, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
        """What [`nudging_hf.generate`] returns for this pair.

        Args:
            inputs: the prompts of both models, as [`Pair.inputs`] makes them.
            kwargs: everything else that `generate` takes.
        """
        return generate(self.base, **{**self.arguments, **inputs, **kwargs})

    def nudging_config(self, given: Mapping[str, Any]) -> NudgingConfig:
        """The parameters of nudging that were given, and for all others those of the base's generation config."""
        return NudgingConfig.resolve([given, self.base.generation_config.to_dict()])


def nudging_model_named_in(base: Any) -> str | None:
    """The nudging model that the base's generation config names, if it names one."""
    return getattr(base.generation_config, "nudging_model_name_or_path", None)
