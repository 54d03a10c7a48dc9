"""Measures the memory that writing an answer takes. Each unit of this scenario runs in a process of its own.

In a process that has written much before, free blocks of all sizes lie between the used ones, and a growing cache
fits into none of them. How much memory it then takes depends on chance, for nudging as for plain `generate`. So each
unit here runs in a fresh process with two settings:

- glibc returns every large block to the system when it is freed. That is its default at the start of a process, but
  it later raises its limit for "large" to save time.
- oneDNN does not keep the kernels that it compiles for each number of tokens of a pass. They take some megabytes each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
from racers import ADAPTIVE, ALONE, OWN, SHARED, Work, nudged_racer
from scenarios import Models, Row, Size, Unit, groups, measure

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),  # This is glibc's initial value, which stays fixed once it is set.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # The bars of loading models would break the benchmark's own bar.
}


def memory(size: Size, dtype: str, batch: int) -> Iterator[Unit]:
    """The peak of plain `generate` and of both pairs, on the questions of one call of the race."""

    def run_in_process() -> Row:
        command = [sys.executable, __file__, json.dumps([asdict(size), dtype, batch])]
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    yield Unit({"scenario": "memory", "dtype": dtype, "batch": batch}, run_in_process)


def peaks(size: Size, dtype: str, batch: int) -> Row:
    """The bytes of weights, caches and growth at the peak, by contestant."""
    models = Models(size.width, dtype)
    questions = groups(size, batch)[0]
    pairs = [nudged_racer(small, ADAPTIVE) for small in (SHARED, OWN)]
    lengths = None
    found = {}
    for contestant in (*pairs, ALONE):
        lms = models.of(contestant)
        contestant.write(lms, Work(questions).of_length(6))  # Memory that is allocated only once is not counted.
        row, answers = measure(contestant, lms, Work(questions, lengths=lengths, max_new_tokens=size.max_new_tokens))
        lengths = lengths or [len(answer) for answer in answers]
        found[contestant.name] = {name: row[name] for name in row if name.endswith("_bytes")}
    return {"contestants": found}


if __name__ == "__main__":
    given, dtype, batch = json.loads(sys.argv[1])
    print(json.dumps(peaks(Size(**given), dtype, batch)))
