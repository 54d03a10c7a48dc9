"""Teaches `model.generate` the keyword `nudging_model` and `pipeline` a task, and makes them forget both again."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.pipelines import PIPELINE_REGISTRY

from .generate import generate
from .host import ORIGINAL

TASK = "nudged-text-generation"


def register() -> None:
    """Lets every model's `generate` take `nudging_model=` and the other arguments of [`nudging_hf.generate`].

    `pipeline("nudged-text-generation", model=..., nudging_model=...)` makes a [`NudgedTextGenerationPipeline`] from
    now on; `pipeline("text-generation", ...)` takes the arguments of `generate` as well.
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
    PIPELINE_REGISTRY.supported_tasks[TASK] = {
        # By its name, as transformers' own: `register_pipeline` would have `save_pretrained` copy our code.
        "impl": "nudging_hf.pipelines.NudgedTextGenerationPipeline",
        "pt": (AutoModelForCausalLM,),
        "type": "text",
    }


def unregister() -> None:
    """Leaves `generate` and the tasks as `register` found them. Does nothing where nothing is registered."""
    if is_registered():
        PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
        GenerationMixin.generate = getattr(GenerationMixin.generate, ORIGINAL)


def is_registered() -> bool:
    """Whether `generate` takes `nudging_model=` now."""
    return hasattr(GenerationMixin.generate, ORIGINAL)
