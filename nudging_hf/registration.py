"""Teaches `model.generate` the keyword `nudging_model`, and makes it forget it again."""

from __future__ import annotations

import functools
from typing import Any

from transformers import GenerationMixin

from .generate import generate
from .host import ORIGINAL


def register() -> None:
    """Lets every model's `generate` take `nudging_model=` and the other arguments of [`nudging_hf.generate`].

    A model whose generation config names a nudging model is nudged without it. All other calls go to the `generate`
    that was there before. Registering twice is registering once.
    Models whose class overrides `generate`, and instances whose `generate` was replaced, are not reached.
    """
    if is_registered():
        return
    original = GenerationMixin.generate

    @functools.wraps(original)
    def nudged_or_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.generation_config
        nudged = "nudging_model" in kwargs or getattr(config, "nudging_model_name_or_path", None) is not None
        if nudged and kwargs.get("custom_generate") is None:
            return generate(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(nudged_or_plain, ORIGINAL, original)
    GenerationMixin.generate = nudged_or_plain


def unregister() -> None:
    """Leaves `generate` as `register` found it. Does nothing where nothing is registered."""
    if is_registered():
        GenerationMixin.generate = getattr(GenerationMixin.generate, ORIGINAL)


def is_registered() -> bool:
    """Whether `generate` takes `nudging_model=` now."""
    return hasattr(GenerationMixin.generate, ORIGINAL)
