"""Clocks and counters around models. They know forward passes and memory, never what the models are used for."""

from __future__ import annotations

import ctypes
import functools
import gc
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
    """What one model did: forward passes, the ids that it was fed in them, padding included, and their seconds."""

    count: int = 0
    fed: int = 0
    seconds: float = 0.0


class Meter:
    """As a context manager, counts and times the forward passes of models, by wrapping the `forward` of each.

    Args:
        models: by the names that `passes` has them by.
        synchronize: called before each look at the clock, so that what a device was given is done. On a CPU a pass is
            over when it returns.

    Attributes:
        passes: of each model.
        seconds: from entering to leaving.
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
            del model.forward  # The class's own is seen again.

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _timed(self, forward: Callable[..., Any], passes: Passes) -> Callable[..., Any]:
        @functools.wraps(forward)  # The signature too, which transformers looks at.
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
    """A `Meter` of models that may be compiled, on any device.

    A model's `forward` must not be touched then: it would be compiled anew, clock and all. What is wrapped is the call
    of the model, which transformers goes through for passes that are not compiled, and the compiled call that
    `get_compiled_call` hands out. The models must have been compiled before, so that what is compiled holds no clock.
    """

    def __enter__(self) -> CallMeter:
        timed = {
            id(model): self._timed(model.__call__, self.passes[name])  # Bound to the class's own.
            for name, model in self._models.items()
        }
        self._classes = {type(model): type(model).__call__ for model in self._models.values()}
        for each, own in self._classes.items():
            each.__call__ = _through(timed, own)
        for name, model in self._models.items():
            model.get_compiled_call = self._handing_out(model.get_compiled_call, name)
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._now() - self._start
        for model in self._models.values():
            del model.get_compiled_call
        for each in self._classes:
            del each.__call__  # That of `torch.nn.Module` is seen again.

    def _handing_out(self, get_compiled_call: Callable[..., Any], name: str) -> Callable[..., Any]:
        return lambda config: self._timed(get_compiled_call(config), self.passes[name])


def _through(timed: dict[int, Callable[..., Any]], own: Callable[..., Any]) -> Callable[..., Any]:
    """A class's `__call__` that goes by `timed` for the objects that stand there, by their ids."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = timed.get(id(self))
        return own(self, *args, **kwargs) if known is None else known(*args, **kwargs)

    return call


def synchronize(device: torch.device) -> None:
    """Waits until all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """The wall clock's, from where the device has nothing to do to where it has nothing to do again."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronisations(work: Callable[[], Any]) -> Counter[str]:
    """How often a piece of work makes the host wait for the GPU, by the lines of Python at which it does."""
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
    from torch._dynamo.utils import counters  # Takes long to import.

    return counters["stats"]["unique_graphs"]


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


def weights(model: Any) -> list[torch.Tensor]:
    """Of a model whose layers may have been handed to oneDNN, which keeps theirs as buffers."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_mkldnn)]


def weight_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights(model))


def cache_bytes(model: Any, tokens: int) -> int:
    """The keys and values of that many tokens, of all rows together."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * tokens * next(model.parameters()).element_size()
