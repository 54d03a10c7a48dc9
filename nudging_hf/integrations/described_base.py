"""Describes a base that another program runs. It knows configs, never weights or engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel


def described_base(name_or_path: str | os.PathLike[str], **hub: Any) -> PreTrainedModel:
    """The base without its weights, on the meta device: enough for [`~core.generate.prepare`].

    Its config tells how many ids it can read and how many positions it has, and its generation config tells its EOS
    and its defaults. No weights are downloaded or read.

    Args:
        name_or_path: a folder, or a name on the Hugging Face Hub.
        hub: keywords of `from_pretrained` that say how to reach the Hub (`revision`, `token`, `cache_dir`, ...).

    Raises:
        ValueError: if it has no config there, or is no causal language model. Its own code is never run.
    """
    where = os.fspath(name_or_path)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **hub)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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
    return model.eval()
