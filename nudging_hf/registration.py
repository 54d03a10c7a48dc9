"""Teaches `model.generate` the keyword `nudging_model`, and makes it forget it again."""

from __future__ import annotations

import functools
from typing import Any

from transformers import GenerationMixin

from .generate import generate


def register() -> None:
    """Lets every model's `generate` take `nudging_model=` and the other arguments of [`nudging_hf.generate`].

    A call without `nudging_model` goes to the `generate` that was there before. Registering twice is registering once.
    Models whose class overrides `generate`, and instances whose `generate` was replaced, are not reached.
    """
    if is_registered():
        return
    original = GenerationMixin.generate

    @functools.wraps(original)
    def nudged_or_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("nudging_model") is not None:
            return generate(self, *args, **kwargs)
        kwargs.pop("nudging_model", None)
        return original(self, *args, **kwargs)

    nudged_or_plain._nudging_hf_original = original  # type: ignore[attr-defined]
    GenerationMixin.generate = nudged_or_plain


def unregister() -> None:
    """Leaves `generate` as `register` found it. Does nothing where nothing is registered."""
    if is_registered():
        GenerationMixin.generate = GenerationMixin.generate._nudging_hf_original


def is_registered() -> bool:
    """Whether `generate` takes `nudging_model=` now."""
    return hasattr(GenerationMixin.generate, "_nudging_hf_original")
