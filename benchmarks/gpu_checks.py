"""Checks that nudging writes on a device what it writes on a CPU, and that the host seldom waits for the device.

It knows the mini pair and nothing about speed. On a CPU it makes all checks that do not need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from meters import CallMeter, graphs_compiled, synchronisations
from racers import ADAPTIVE, BASE, MINI, OWN, SHARED, Work, dev_questions, nudged_output

from nudging_hf.study.reader import Reader

VOCABULARIES = {SHARED: "one vocabulary", OWN: "two vocabularies"}
DRAFTS = (0, 4, ADAPTIVE)
SEED = 7
# How often one call may wait in addition to once a pass: for prompts, control tokens and what it returns.
STARTING_SYNCHRONISATIONS = 24
STATIC = {"cache_implementation": "static"}  # On a GPU, transformers compiles passes over a static cache.
UNCOMPILED = {**STATIC, "disable_compile": True}

Answers = list[list[int]]


class Outcome(NamedTuple):
    """The result of a check."""

    ok: bool
    detail: str = ""


class MiniPair:
    """The mini pair in float32, on the CPU and on a device.

    Args:
        device: the device to check.
        tokens: the maximum number of new tokens of an answer.
    """

    def __init__(self, device: torch.device, tokens: int):
        self.tokens = tokens
        self._questions = dev_questions(1)  # One question of each of the four tasks.
        self._answers: dict[tuple[str, int], Answers] = {}
        self._on_cpu, self._on_device = (
            {name: _loaded(name, where) for name in (BASE, *VOCABULARIES)} for where in (torch.device("cpu"), device)
        )

    def models(self, small: str) -> dict[str, Any]:
        """The base and a nudging model on the device, by their names."""
        return {name: self._on_device[name].model for name in (BASE, small)}

    def expected(self, small: str, batch: int) -> Answers:
        """The CPU's answers when nothing is drafted."""
        if (small, batch) not in self._answers:
            self._answers[small, batch] = self._write(self._on_cpu, small, batch, 0)[0]
        return self._answers[small, batch]

    def write(self, small: str, batch: int, draft: int | str, **kwargs: Any) -> tuple[Answers, Any]:
        """The ids of the device's answers without padding, and the whole output of `generate`."""
        return self._write(self._on_device, small, batch, draft, **kwargs)

    def _write(
        self, lms: dict[str, Reader], small: str, batch: int, draft: int | str, **kwargs: Any
    ) -> tuple[Answers, Any]:
        work = Work(self._questions[:batch], max_new_tokens=self.tokens)
        return nudged_output(lms, work, small, draft, **kwargs)


def _loaded(name: str, device: torch.device) -> Reader:
    lm = Reader.load(MINI / "models" / name, chat=name != BASE)
    lm.model.to(device)
    return lm


Check = tuple[str, Callable[[], Outcome]]


def checks(pair: MiniPair, device: torch.device, batches: Sequence[int], static: bool) -> Iterator[Check]:
    """The checks that need no compiled passes, with their names.

    Args:
        static: whether to check static caches too.
    """
    caches: dict[str, dict[str, Any]] = {"dynamic cache": {}}
    if static:
        caches["static cache"] = UNCOMPILED
    cases = [(small, batch) for small in VOCABULARIES for batch in batches]
    for small, batch in cases:
        case = f"{VOCABULARIES[small]}, batch {batch}"
        for cache, kwargs in caches.items():
            for draft in DRAFTS:
                name = f"{case}, {cache}, {_drafts(draft)}: the CPU's answers"
                yield name, partial(same_as_on_cpu, pair, small, batch, draft, **kwargs)
            yield f"{case}, {cache}: passes are counted", partial(passes_counted, pair, small, batch, **kwargs)
        yield f"{case}: samples of a seed, for each draft length", partial(same_samples, pair, small, batch)
    if device.type != "cuda":
        return  # Without CUDA there is no way to see where the host waits.
    yield "a synchronisation is seen", partial(synchronisation_is_seen, device)
    for small, batch in cases:
        for cache, kwargs in caches.items():
            name = f"{VOCABULARIES[small]}, batch {batch}, {cache}: at most one synchronisation a pass"
            yield name, partial(few_synchronisations, pair, small, batch, **kwargs)


def compiled_checks(pair: MiniPair, device: torch.device, batches: Sequence[int]) -> Iterator[Check]:
    """The checks of compiled passes, with one vocabulary only, because compiling takes long."""
    for batch in batches:
        name = f"{VOCABULARIES[SHARED]}, batch {batch}, static cache, compiled"
        yield f"{name}: the CPU's answers", partial(same_when_compiled, pair, SHARED, batch)
        yield f"{name}: passes are counted", partial(passes_counted, pair, SHARED, batch, draft=4, **STATIC)
        if device.type == "cuda":
            what = f"{name}: at most one synchronisation a pass"
            yield what, partial(few_synchronisations, pair, SHARED, batch, draft=4, **STATIC)


def _drafts(draft: int | str) -> str:
    return "adaptive" if draft == ADAPTIVE else f"drafts of {draft}"


def same_as_on_cpu(pair: MiniPair, small: str, batch: int, draft: int | str, **kwargs: Any) -> Outcome:
    return compared(pair.write(small, batch, draft, **kwargs)[0], pair.expected(small, batch))


def compared(answers: list[list[int]], expected: list[list[int]]) -> Outcome:
    """Whether the answers are the expected ones. The detail says where each other answer first differs."""
    differing = []
    for row, (ours, theirs) in enumerate(zip(answers, expected, strict=True)):
        if ours != theirs:
            shared = min(len(ours), len(theirs))
            place = next((i for i in range(shared) if ours[i] != theirs[i]), shared)
            differing.append(f"row {row} differs from its token {place} on, of {len(theirs)}")
    return Outcome(not differing, "; ".join(differing))


def same_samples(pair: MiniPair, small: str, batch: int) -> Outcome:
    """Whether the answers sampled with one seed are the same for all draft lengths."""
    drawn = []
    for draft in DRAFTS:
        torch.manual_seed(SEED)
        drawn.append(pair.write(small, batch, draft, do_sample=True)[0])
    outcomes = {draft: compared(answers, drawn[0]) for draft, answers in zip(DRAFTS, drawn, strict=True)}
    differing = [f"{_drafts(draft)}: {outcome.detail}" for draft, outcome in outcomes.items() if not outcome.ok]
    return Outcome(not differing, "; ".join(differing))


def passes_counted(pair: MiniPair, small: str, batch: int, draft: int | str = ADAPTIVE, **kwargs: Any) -> Outcome:
    """Whether the meter counts as many passes as `generate` reports."""
    models = pair.models(small)
    with CallMeter(models) as meter:
        output = pair.write(small, batch, draft, **kwargs)[1]
    seen = [meter.passes[name].count for name in models]
    reported = [output.base_forward_passes, output.nudging_forward_passes]
    return Outcome(seen == reported, "" if seen == reported else f"counted {seen}, reported {reported}")


def same_when_compiled(pair: MiniPair, small: str, batch: int) -> Outcome:
    """Whether compiled passes give the CPU's answers. The detail says how many graphs were compiled."""
    before = graphs_compiled()
    outcome = same_as_on_cpu(pair, small, batch, 4, **STATIC)
    return Outcome(outcome.ok, "; ".join(filter(None, [f"{graphs_compiled() - before} graphs", outcome.detail])))


def synchronisation_is_seen(device: torch.device) -> Outcome:
    seen = synchronisations(torch.ones(1, device=device).item).total()
    return Outcome(seen == 1, f"{seen} seen of 1")


def few_synchronisations(
    pair: MiniPair, small: str, batch: int, draft: int | str = ADAPTIVE, **kwargs: Any
) -> Outcome:
    """Whether the host waits at most once for each pass of either model, plus a few times for each call."""
    pair.write(small, batch, draft, **kwargs)  # Waits that happen only in the first call do not count.
    outputs: list[Any] = []
    where = synchronisations(lambda: outputs.append(pair.write(small, batch, draft, **kwargs)[1]))
    passes = outputs[0].base_forward_passes + outputs[0].nudging_forward_passes
    most = ", ".join(f"{times} at {line}" for line, times in where.most_common(6))
    detail = f"{where.total()} in {passes} passes" + (f": {most}" if most else "")
    return Outcome(where.total() <= passes + STARTING_SYNCHRONISATIONS, detail)
