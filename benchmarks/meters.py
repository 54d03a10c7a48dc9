"""Clocks and counters around models. They know forward passes and memory, never what the models are used for."""

from __future__ import annotations

import ctypes
import functools
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Passes:
    """What one model did: forward passes, the ids that it was fed in them, padding included, and their seconds."""

    count: int = 0
    fed: int = 0
    seconds: float = 0.0


class Meter:
    """As a context manager, counts and times the forward passes of models, by wrapping the `forward` of each.

    Args:
        models: by the names that `passes` has them by. They must be on the CPU, where a pass is over when it returns.

    Attributes:
        passes: of each model.
        seconds: from entering to leaving.
    """

    def __init__(self, models: Mapping[str, Any]):
        self._models = dict(models)
        self.passes = {name: Passes() for name in models}
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> Meter:
        for name, model in self._models.items():
            model.forward = self._timed(model.forward, self.passes[name])
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start
        for model in self._models.values():
            del model.forward  # The class's own is seen again.

    @staticmethod
    def _timed(forward: Callable[..., Any], passes: Passes) -> Callable[..., Any]:
        @functools.wraps(forward)  # The signature too, which transformers looks at.
        def timed(*args: Any, **kwargs: Any) -> Any:
            ids = args[0] if args else kwargs["input_ids"]
            start = time.perf_counter()
            result = forward(*args, **kwargs)
            passes.seconds += time.perf_counter() - start
            passes.count += 1
            passes.fed += ids.numel()
            return result

        return timed


class PeakMemory:
    """As a context manager, finds by how much the process was larger at its peak than when it began.

    The kernel's high-water mark of resident memory (VmHWM) is set back to what is resident, after what Python and
    the allocator hold unused was given back; memory that they could not give back counts as there before.

    Attributes:
        extra_bytes: the difference; `None` where the kernel does not let the mark be set back.
    """

    extra_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before: int | None = _of_status("VmRSS")
        except OSError:  # No Linux, no glibc, or no right to.
            self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            self.extra_bytes = max(0, _of_status("VmHWM") - self._before)


def _of_status(name: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Stopwatch:
    """A streamer that keeps the time at which each new token arrived.

    Attributes:
        times: seconds, one for each token, the prompt left out.
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


def weight_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def cache_bytes(model: Any, tokens: int) -> int:
    """The keys and values of that many tokens, of all rows together."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * tokens * next(model.parameters()).element_size()
