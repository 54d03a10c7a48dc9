"""Adds the keyword `nudging_model` to `model.generate` and a task to `pipeline`, and removes both again."""

from __future__ import annotations

import functools
import threading
from typing import Any

from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.pipelines import PIPELINE_REGISTRY

from .core.generate import generate
from .core.transformers_private import ORIGINAL
from .pipelines import NudgedTextGenerationPipeline

TASK = "nudged-text-generation"

_LOCK = threading.Lock()


def register() -> None:
    """Makes every model's `generate` accept `nudging_model=` and the other arguments of [`nudging_hf.generate`].

    From then on `pipeline("nudged-text-generation", model=..., nudging_model=...)` makes a
    [`NudgedTextGenerationPipeline`], and `pipeline("text-generation", ...)` accepts the arguments of `generate` too.
    A model whose generation config names a nudging model is nudged without `nudging_model=`. All other calls go to the
    original `generate`. Registering twice has no further effect. Models whose class overrides `generate`, and
    instances whose `generate` was replaced, are not affected.
    """
    with _LOCK:
        if not is_registered():
            _register()


def _register() -> None:
    original = GenerationMixin.generate

    @functools.wraps(original)
    def nudged_or_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is generate and kwargs.get("nudging_model", self) is not None:
            # Called directly, it sees every argument, and can obey or refuse it. transformers would hide some.
            del kwargs["custom_generate"]
            return generate(self, *args, **kwargs)
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        # Either config may name a nudging model: transformers fills what the given one leaves open from the model's.
        named = [getattr(each, "nudging_model_name_or_path", None) for each in (given, self.generation_config)]
        if kwargs.get("custom_generate") is None and ("nudging_model" in kwargs or any(named)):
            return generate(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(nudged_or_plain, ORIGINAL, original)
    GenerationMixin.generate = nudged_or_plain
    PIPELINE_REGISTRY.supported_tasks[TASK] = {
        # This avoids `register_pipeline`, with which `save_pretrained` would copy our code.
        "impl": NudgedTextGenerationPipeline,
        "pt": (AutoModelForCausalLM,),
        "type": "text",
    }


def unregister() -> None:
    """Restores `generate` and the tasks as they were before `register`. Without a registration it does nothing."""
    with _LOCK:
        if is_registered():
            PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
            GenerationMixin.generate = getattr(GenerationMixin.generate, ORIGINAL)


def is_registered() -> bool:
    """Whether `generate` accepts `nudging_model=` now."""
    return hasattr(GenerationMixin.generate, ORIGINAL)
