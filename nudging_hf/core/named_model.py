"""Loads a nudging model that is given by its name: once for each base, on the base's device and in its dtype."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .transformers_private import input_device


class _Entry:
    """A nudging model and its tokenizer once they are loaded, and a lock for loading and moving them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: tuple[Any, Any] | None = None


_LOADED: WeakKeyDictionary[Any, dict[str, _Entry]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def named_nudging_model(base: PreTrainedModel, name: str, hub: Mapping[str, Any]) -> tuple[Any, Any]:
    """Loads a nudging model and its tokenizer for a base, or returns them if they have been loaded.

    Args:
        base: the base. The nudging model is kept for as long as the base lives.
        name: a folder, a name on the Hugging Face Hub, or `./` and a folder in the repository that the base was
            loaded from.
        hub: keywords of `from_pretrained` that say how to reach the Hub (`token`, `cache_dir`, ...).

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: if it cannot be loaded. Its weights must be safetensors, and its own code is never run.
    """
    with _LOCK:
        named = _LOADED.setdefault(base, {}).setdefault(name, _Entry())
    # Weights that are created in inference mode could not be used for everything outside of it.
    with named.lock, torch.inference_mode(False), torch.no_grad():
        if named.loaded is None:
            named.loaded = _load(base, name, hub)
        model, tokenizer = named.loaded
        if model.device != input_device(base):  # The base has been moved.
            model.to(input_device(base))
    return model, tokenizer


def _load(base: PreTrainedModel, name: str, hub: Mapping[str, Any]) -> tuple[Any, Any]:
    where, options = name, dict(hub)
    if name.startswith("./"):
        where = base.name_or_path
        if not where:
            raise ValueError(
                f"The nudging model {name!r} is a folder beside the base, but the base was not loaded from a folder: "
                "give the model itself as `nudging_model=`."
            )
        if Path(where).is_dir():
            where = str(Path(where, name))
        else:
            options.update(subfolder=name[2:], revision=getattr(base.config, "_commit_hash", None))
    dtype = base.dtype if base.dtype.is_floating_point else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The nudging model {name!r} cannot be loaded: {error} Give the model itself as `nudging_model=`, or "
            "correct `nudging_model_name_or_path` in the base's generation_config.json."
        ) from error
    return model.to(input_device(base)), tokenizer
