"""Counts and times forward passes. It does not know what the models are used for."""

from __future__ import annotations

import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Passes:
    """One model's number of forward passes, the ids fed in them (including padding), and their seconds."""

    count: int = 0
    fed: int = 0
    seconds: float = 0.0


class Meter:
    """A context manager that counts and times the forward passes of models by wrapping the `forward` of each.

    Args:
        models: the models, by the names that `passes` uses.
        synchronize: is called before the clock is read, to wait until the device has done its work. On a CPU a pass is
            over when it returns, and nothing has to be waited for.

    Attributes:
        passes: the passes of each model.
        seconds: the time from entering to leaving the context.
    """

    def __init__(self, models: Mapping[str, Any], synchronize: Callable[[], None] = lambda: None):
        self._models = dict(models)
        self._synchronize = synchronize
        self.passes = {name: Passes() for name in models}
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> Meter:
        for name, model in self._models.items():
            model.forward = self._timed(model.forward, self.passes[name])
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._now() - self._start
        for model in self._models.values():
            del model.forward  # This uncovers the class's own method.

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _timed(self, forward: Callable[..., Any], passes: Passes) -> Callable[..., Any]:
        @functools.wraps(forward)  # `wraps` keeps the signature, which transformers inspects.
        def timed(*args: Any, **kwargs: Any) -> Any:
            ids = args[0] if args else kwargs["input_ids"]
            passes.count += 1
            passes.fed += ids.numel()
            start = self._now()
            result = forward(*args, **kwargs)
            passes.seconds += self._now() - start
            return result

        return timed


class CallMeter(Meter):
    """A `Meter` for models on any device whose passes may be compiled.

    Wrapping `forward` would have it compiled again, including the clock. So this meter wraps the model's `__call__`,
    which transformers uses for uncompiled passes, and the compiled call that `get_compiled_call` returns. The models
    must have been compiled before, so that no clock is compiled into them.
    """

    def __enter__(self) -> CallMeter:
        timed = {
            id(model): self._timed(model.__call__, self.passes[name])  # The class's own method, bound to the model.
            for name, model in self._models.items()
        }
        self._classes = {type(model): type(model).__call__ for model in self._models.values()}
        for each, own in self._classes.items():
            each.__call__ = _call_timed(timed, own)
        for name, model in self._models.items():
            model.get_compiled_call = self._returning_timed(model.get_compiled_call, name)
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._now() - self._start
        for model in self._models.values():
            del model.get_compiled_call
        for each in self._classes:
            del each.__call__  # This uncovers the method of `torch.nn.Module`.

    def _returning_timed(self, get_compiled_call: Callable[..., Any], name: str) -> Callable[..., Any]:
        return lambda config: self._timed(get_compiled_call(config), self.passes[name])


def _call_timed(timed: dict[int, Callable[..., Any]], own: Callable[..., Any]) -> Callable[..., Any]:
    """A class's `__call__`: it calls the function that `timed` has for the object's `id`, or `own` if it has none."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = timed.get(id(self))
        return own(self, *args, **kwargs) if known is None else known(*args, **kwargs)

    return call


def synchronisations(work: Callable[[], Any]) -> Counter[str]:
    """How often a piece of work makes the host wait for the GPU, by the line of Python that waits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(each.filename).name}:{each.lineno}"
        for each in caught
        if "called a synchronizing CUDA operation" in str(each.message)
    )


def graphs_compiled() -> int:
    """How many graphs `torch.compile` has made in this process."""
    from torch._dynamo.utils import counters  # This takes long to import.

    return counters["stats"]["unique_graphs"]


class Stopwatch:
    """A streamer that records the time at which each new token arrives.

    Attributes:
        times: the times in seconds, one for each new token.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def cache_bytes(model: Any, tokens: int) -> int:
    """The bytes of the keys and values of that many tokens. `tokens` counts the tokens of all rows."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * tokens * next(model.parameters()).element_size()
