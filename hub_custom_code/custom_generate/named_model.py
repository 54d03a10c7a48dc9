"""Loads a nudging model that is given by its name: once for each base, on the base's device and in its dtype."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .transformers_private import commit_hash, input_device, without_wrapper


class _Entry:
    """A nudging model and its tokenizer once they are loaded, and a lock for loading and moving them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: tuple[Any, Any] | None = None


_LOADED: WeakKeyDictionary[Any, dict[str, _Entry]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def resolved_model(
    base: PreTrainedModel, given: Any, tokenizer: Any = None, hub: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """The model that an argument of a call stands for, and its tokenizer.

    Args:
        base: the base of the call.
        given: a model, or the name of one as [`named_nudging_model`] takes it. Anything else is returned as it is.
        tokenizer: the tokenizer that the call gives for the model. `None` means the one that is loaded with a name.
        hub: keywords of `from_pretrained` that say how to reach the Hub.

    Returns:
        The model, without a wrapper of PEFT, and the tokenizer. It is `None` if the call gave a model alone.

    Raises:
        ValueError: if a named model cannot be loaded.
    """
    if not isinstance(given, (str, os.PathLike)):
        return without_wrapper(given), tokenizer
    model, own_tokenizer = named_nudging_model(base, os.fspath(given), hub or {})
    return model, own_tokenizer if tokenizer is None else tokenizer


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
            options.update(subfolder=name[2:], revision=commit_hash(base))
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
