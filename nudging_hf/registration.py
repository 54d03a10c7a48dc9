"""Teaches `model.generate` the keyword `nudging_model` and `pipeline` a task, and makes them forget both again."""

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
    """Lets every model's `generate` take `nudging_model=` and the other arguments of [`nudging_hf.generate`].

    `pipeline("nudged-text-generation", model=..., nudging_model=...)` makes a [`NudgedTextGenerationPipeline`] from
    now on; `pipeline("text-generation", ...)` takes the arguments of `generate` as well.
    A model whose generation config names a nudging model is nudged without it. All other calls go to the `generate`
    that was there before. Registering twice is registering once.
    Models whose class overrides `generate`, and instances whose `generate` was replaced, are not reached.
    """
    with _LOCK:
        if not is_registered():
            _register()


def _register() -> None:
    original = GenerationMixin.generate

    @functools.wraps(original)
    def nudged_or_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is generate and kwargs.get("nudging_model", self) is not None:
            # Here nothing is kept from it yet: it can heed, or refuse, all that was given.
            del kwargs["custom_generate"]
            return generate(self, *args, **kwargs)
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        # Either may name one: what the given config does not say is taken from the model's.
        named = [getattr(each, "nudging_model_name_or_path", None) for each in (given, self.generation_config)]
        if kwargs.get("custom_generate") is None and ("nudging_model" in kwargs or any(named)):
            return generate(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(nudged_or_plain, ORIGINAL, original)
    GenerationMixin.generate = nudged_or_plain
    PIPELINE_REGISTRY.supported_tasks[TASK] = {
        # Put here by hand: `register_pipeline` would have `save_pretrained` copy our code.
        "impl": NudgedTextGenerationPipeline,
        "pt": (AutoModelForCausalLM,),
        "type": "text",
    }


def unregister() -> None:
    """Leaves `generate` and the tasks as `register` found them. Does nothing where nothing is registered."""
    with _LOCK:
        if is_registered():
            PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
            GenerationMixin.generate = getattr(GenerationMixin.generate, ORIGINAL)


def is_registered() -> bool:
    """Whether `generate` takes `nudging_model=` now."""
    return hasattr(GenerationMixin.generate, ORIGINAL)
