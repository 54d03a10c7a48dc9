"""A base that another program runs: its config and its tokenizer, without its weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel


def described_base(name_or_path: str, device: torch.device | str = "cpu", **hub_arguments: Any) -> PreTrainedModel:
    """A causal LM on the meta device, with the config and the generation config of a model that runs elsewhere.

    [`~core.generate.prepare`] takes it in the place of the base.

    Args:
        name_or_path: the folder or Hub name of the base.
        device: where its prompts and logits will be.
        hub_arguments: `revision`, `token`, `trust_remote_code`, ... as for `from_pretrained`.

    Raises:
        OSError: if there is no config.
    """
    config = AutoConfig.from_pretrained(name_or_path, **hub_arguments)
    trust = {name: value for name, value in hub_arguments.items() if name == "trust_remote_code"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **trust)
    try:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub_arguments)
    except OSError:  # It has none. transformers makes one of the config, as `from_pretrained` does.
        pass
    model.name_or_path = name_or_path
    # transformers warns of prompts that are on another device than the model.
    own = type(model)
    model.__class__ = type(own.__name__, (own,), {"device": torch.device(device), "__module__": own.__module__})
    return model.eval()
