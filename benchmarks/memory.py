"""What memory it takes to write an answer: a scenario whose units each run in a process of their own.

A process in which much was written before has free blocks of all sizes between those that are in use. A cache that
grows fits into none of them: how much memory it costs there is chance, for nudging as for plain `generate`. So what
is measured here is written in a fresh process, where glibc hands every large block back when it is freed: it begins
so, but to be quick it raises what it calls large as it goes. Nor does oneDNN keep the kernels there that it compiles
for each number of tokens that a pass has, some megabytes for each.
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
    "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),  # With which glibc begins; given, it stays so.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # Those of loading too, which would break the benchmark's own.
}


def memory(size: Size, dtype: str, batch: int) -> Iterator[Unit]:
    """The peak of plain `generate` and of both pairs, on the questions of one call of the race."""

    def in_a_process() -> Row:
        command = [sys.executable, __file__, json.dumps([asdict(size), dtype, batch])]
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    yield Unit({"scenario": "memory", "dtype": dtype, "batch": batch}, in_a_process)


def peaks(size: Size, dtype: str, batch: int) -> Row:
    """Bytes at the peak, by contestant."""
    models = Models(size.width, dtype)
    questions = groups(size, batch)[0]
    pairs = [nudged_racer(small, ADAPTIVE) for small in (SHARED, OWN)]
    lengths = None
    found = {}
    for contestant in (*pairs, ALONE):
        lms = models.of(contestant)
        contestant.write(lms, Work(questions).of_length(6))  # What is loaded once is not counted.
        row, answers = measure(contestant, lms, Work(questions, lengths=lengths, max_new_tokens=size.max_new_tokens))
        lengths = lengths or [len(answer) for answer in answers]
        found[contestant.name] = {name: row[name] for name in row if name.endswith("_bytes")}
    return {"contestants": found}


if __name__ == "__main__":
    given, dtype, batch = json.loads(sys.argv[1])
    print(json.dumps(peaks(Size(**given), dtype, batch)))
