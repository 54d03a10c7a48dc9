"""Loads and calls a base and a nudging model, each with its tokenizer. It knows chats, never how to decode."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from .chats import DEFAULT_TEMPLATE, Message
from .core.config import NudgingConfig
from .core.generate import generate, loaded_vocabulary
from .core.named_model import resolved_model
from .core.transformers_private import input_device
from .encoded_chats import chat_inputs


@dataclass(frozen=True)
class Pair:
    """Two causal language models of transformers, each with its tokenizer."""

    base: Any
    tokenizer: Any
    nudging_model: Any
    nudging_tokenizer: Any

    @classmethod
    def of(cls, base: Any, nudging_model: Any, tokenizer: Any = None, nudging_tokenizer: Any = None) -> Pair:
        """The pair of a base and a nudging model, or the folder or Hub name of one.

        A named nudging model is loaded to the base's device and in its dtype, and a tokenizer that is left out from
        its model's `name_or_path`.

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
        base_template: str = DEFAULT_TEMPLATE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchEncoding:
        """The prompts of both models for one chat or several, on the base's device: see [`chat_inputs`]."""
        prompts = chat_inputs(chats, self.tokenizer, self.nudging_tokenizer, base_template, chat_template_kwargs)
        return prompts.to(input_device(self.base))

    def generate(self, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
        """What [`nudging_hf.generate`] returns for this pair and the prompts that [`Pair.inputs`] makes."""
        return generate(self.base, **{**self.arguments, **inputs, **kwargs})

    def nudging_config(self, given: Mapping[str, Any]) -> NudgingConfig:
        """The parameters of nudging that were given, and for all others those of the base's generation config."""
        return NudgingConfig.resolve([given, self.base.generation_config.to_dict()])


def nudging_model_named_in(base: Any) -> str | None:
    """The nudging model that the base's generation config names, if it names one."""
    return getattr(base.generation_config, "nudging_model_name_or_path", None)


def is_folder(name: str, whose: str) -> bool:
    """Whether a model is a folder; otherwise it is on the Hub. `whose` is what an error calls the model.

    Raises:
        ValueError: for the path of a folder that does not exist. A name on the Hub has one slash at most.
    """
    if Path(name).is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name:
        raise ValueError(f"{whose}: there is no folder {name}{_similar_folder(name)}.")
    return False


def _similar_folder(name: str) -> str:
    """The end of a sentence that names a folder which may have been meant, or "" where none is similar."""
    path = Path(name).expanduser()
    siblings = [each.name for each in path.parent.glob("*/")] if path.parent.is_dir() else []
    similar = get_close_matches(path.name, siblings, n=1)
    return f", but there is {path.parent / similar[0]}" if similar else ""


def load_model(name: str | os.PathLike[str], whose: str, **options: Any) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        name: a folder, or a name on the Hugging Face Hub.
        whose: what an error calls the model, such as "The base" or an option of the command line.
        options: keywords of `from_pretrained` for the model. `trust_remote_code` is for the tokenizer too.

    Raises:
        ValueError: if one of them cannot be loaded.
    """
    name = os.fspath(name)
    here = "" if is_folder(name, whose) else f"there is no folder {name} here{_similar_folder(name)}, and the Hub: "
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.get("trust_remote_code"))
        return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{whose}: cannot load {name}: {here}{str(error).strip()} It must be a causal language model that "
            "transformers knows, with its tokenizer, and best with its weights as safetensors, as `save_pretrained` "
            "writes them."
        ) from error
