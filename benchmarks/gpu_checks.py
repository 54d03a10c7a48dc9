"""What is checked on a device: nudging writes there what it writes on a CPU, and seldom makes the host wait.

It knows the mini pair, and nothing of how fast anything is. On a CPU, all that a CPU can tell is checked.
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
STARTING_SYNCHRONISATIONS = 24  # Of one call, besides one a pass: prompts, control tokens, what is returned.
STATIC = {"cache_implementation": "static"}  # On a GPU, transformers compiles the passes over it.
UNCOMPILED = {**STATIC, "disable_compile": True}

Answers = list[list[int]]


class Outcome(NamedTuple):
    """What came of a check."""

    ok: bool
    detail: str = ""


class MiniPair:
    """The mini pair in float32, on the CPU and on a device.

    Args:
        device: on which it is checked.
        tokens: new tokens of an answer, at most.
    """

    def __init__(self, device: torch.device, tokens: int):
        self.tokens = tokens
        self._questions = dev_questions(1)  # One of each of four tasks.
        self._answers: dict[tuple[str, int], Answers] = {}
        self._on_cpu, self._on_device = (
            {name: _loaded(name, where) for name in (BASE, *VOCABULARIES)} for where in (torch.device("cpu"), device)
        )

    def models(self, small: str) -> dict[str, Any]:
        """The base and a nudging model on the device, by their names."""
        return {name: self._on_device[name].model for name in (BASE, small)}

    def expected(self, small: str, batch: int) -> Answers:
        """The CPU's answers, drafting nothing."""
        if (small, batch) not in self._answers:
            self._answers[small, batch] = self._write(self._on_cpu, small, batch, 0)[0]
        return self._answers[small, batch]

    def write(self, small: str, batch: int, draft: int | str, **kwargs: Any) -> tuple[Answers, Any]:
        """The device's answers, ids without padding, and all that `generate` returned."""
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
    """What is to be checked, by names; nothing that is compiled.

    Args:
        static: whether static caches are to be checked too.
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
        return  # Nothing tells where the host waits.
    yield "a synchronisation is seen", partial(synchronisation_is_seen, device)
    for small, batch in cases:
        for cache, kwargs in caches.items():
            name = f"{VOCABULARIES[small]}, batch {batch}, {cache}: at most one synchronisation a pass"
            yield name, partial(few_synchronisations, pair, small, batch, **kwargs)


def compiled_checks(pair: MiniPair, device: torch.device, batches: Sequence[int]) -> Iterator[Check]:
    """What is to be checked of passes that are compiled, which takes long: with one vocabulary alone."""
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
    """Whether the answers are those expected, and where each first is not."""
    differing = []
    for row, (ours, theirs) in enumerate(zip(answers, expected, strict=True)):
        if ours != theirs:
            shared = min(len(ours), len(theirs))
            place = next((i for i in range(shared) if ours[i] != theirs[i]), shared)
            differing.append(f"row {row} differs from its token {place} on, of {len(theirs)}")
    return Outcome(not differing, "; ".join(differing))


def same_samples(pair: MiniPair, small: str, batch: int) -> Outcome:
    """Whether the answers that are drawn by one seed are the same for all draft lengths."""
    drawn = []
    for draft in DRAFTS:
        torch.manual_seed(SEED)
        drawn.append(pair.write(small, batch, draft, do_sample=True)[0])
    outcomes = {draft: compared(answers, drawn[0]) for draft, answers in zip(DRAFTS, drawn, strict=True)}
    differing = [f"{_drafts(draft)}: {outcome.detail}" for draft, outcome in outcomes.items() if not outcome.ok]
    return Outcome(not differing, "; ".join(differing))


def passes_counted(pair: MiniPair, small: str, batch: int, draft: int | str = ADAPTIVE, **kwargs: Any) -> Outcome:
    """Whether the meter sees as many passes as `generate` says that there were."""
    models = pair.models(small)
    with CallMeter(models) as meter:
        output = pair.write(small, batch, draft, **kwargs)[1]
    seen = [meter.passes[name].count for name in models]
    told = [output.base_forward_passes, output.nudging_forward_passes]
    return Outcome(seen == told, "" if seen == told else f"seen {seen}, told {told}")


def same_when_compiled(pair: MiniPair, small: str, batch: int) -> Outcome:
    """Whether compiled passes come to the CPU's answers; says how many graphs were compiled for them."""
    before = graphs_compiled()
    outcome = same_as_on_cpu(pair, small, batch, 4, **STATIC)
    return Outcome(outcome.ok, "; ".join(filter(None, [f"{graphs_compiled() - before} graphs", outcome.detail])))


def synchronisation_is_seen(device: torch.device) -> Outcome:
    seen = synchronisations(torch.ones(1, device=device).item).total()
    return Outcome(seen == 1, f"{seen} seen of 1")


def few_synchronisations(
    pair: MiniPair, small: str, batch: int, draft: int | str = ADAPTIVE, **kwargs: Any
) -> Outcome:
    """Whether the host waits at most once for each pass of either model, and a few times for a call."""
    pair.write(small, batch, draft, **kwargs)  # What happens the first time only does not count.
    outputs: list[Any] = []
    where = synchronisations(lambda: outputs.append(pair.write(small, batch, draft, **kwargs)[1]))
    passes = outputs[0].base_forward_passes + outputs[0].nudging_forward_passes
    most = ", ".join(f"{times} at {line}" for line, times in where.most_common(6))
    told = f"{where.total()} in {passes} passes" + (f": {most}" if most else "")
    return Outcome(where.total() <= passes + STARTING_SYNCHRONISATIONS, told)
