"""Times work and measures memory. It does not know what the models are used for."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CPU = torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done all its work."""
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).synchronize()


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """The wall-clock seconds that a piece of work takes, including what it leaves the device to do."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


class PeakMemory:
    """A context manager that measures by how much the memory in use was larger at its peak than on entering.

    On a GPU it is the memory that torch's allocator reports, and elsewhere that of the process. There, on entering,
    Python and the allocator return unused memory to the system, and the kernel's high-water mark of resident memory
    (VmHWM) is reset to what is resident then. Memory that they could not return counts as present before.

    Attributes:
        extra_bytes: the difference in bytes; `None` if the kernel does not allow resetting the mark, and on an
            accelerator that is no GPU of CUDA.
    """

    extra_bytes: int | None = None

    def __init__(self, device: torch.device = _CPU):
        self._device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._before: int | None = None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        if self._device.type != "cpu":
            return self
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("VmRSS")
        except OSError:
            pass  # The system is not Linux, has no glibc, or does not permit it.
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None and self._device.type == "cuda":
            self.extra_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._before is not None:
            self.extra_bytes = max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(name: str) -> int:
    """A size that the kernel reports of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def weights(model: Any) -> list[torch.Tensor]:
    """The weights of a model, including those that are buffers because oneDNN computes their layers."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_mkldnn)]


def weight_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights(model))
