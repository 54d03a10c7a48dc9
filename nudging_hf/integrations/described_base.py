"""Describes a base that another program runs. It knows configs, never weights or engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel


def described_base(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    **hub: Any,
) -> PreTrainedModel:
    """The base without its weights, on the meta device: enough for [`~core.generate.prepare`].

    Its config tells how many ids it can read and how many positions it has, and its generation config tells its EOS
    and its defaults. No weights are downloaded or read.

    Args:
        name_or_path: a folder, or a name on the Hugging Face Hub.
        device: where its prompts and its logits will be.
        trust_remote_code: whether the code of its repository may be run.
        hub: keywords of `from_pretrained` that say how to reach the Hub (`revision`, `token`, `cache_dir`, ...).

    Raises:
        ValueError: if it has no config there, or is no causal language model.
    """
    where = os.fspath(name_or_path)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **hub)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base {where!r} cannot be described: {error} Give the folder or the Hub name whose config.json is "
            "that of the model which the engine runs."
        ) from error
    if not Path(where).is_dir() or Path(where, "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(where, **hub)
        except OSError:  # The repository has none, and transformers has made one of the config.
            pass
    # transformers warns of prompts that are on another device than the model.
    own = type(model)
    model.__class__ = type(own.__name__, (own,), {"device": torch.device(device), "__module__": own.__module__})
    return model.eval()
