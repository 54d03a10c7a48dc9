"""The scenarios. Each is a list of units of work, which are done one after another.

A unit has a unique key, which is a JSON object. Units know clocks, and nothing of files or tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from meters import Meter, Stopwatch, cache_bytes
from racers import (
    ADAPTIVE,
    ALONE,
    BASE,
    OWN,
    RACERS,
    SHARED,
    LMs,
    Racer,
    Work,
    base_alone,
    contradicting,
    dev_questions,
    load,
    nudged,
    nudged_output,
    nudged_racer,
    widths,
)
from transformers import DynamicCache
from widen import with_noise

from nudging_hf.core.transformers_private import CACHE
from nudging_hf.study.bench import quartiles
from nudging_hf.study.demo import MAX_NEW_TOKENS
from nudging_hf.study.journal import digest
from nudging_hf.study.meters import PeakMemory, weight_bytes, weights
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.reader import Reader

Key = dict[str, Any]
Row = dict[str, Any]

PASS_WIDTHS = (1, 2, 3, 5, 9, 17, 33)
FAR_WIDTHS = (1, 5, 9, 17, 33)
BATCH_SHAPES = ((8, 1), (8, 5), (8, 9), (32, 1), (32, 5))  # The number of rows, and the tokens of each row.
CONTEXTS = (128, 4096)
ENOUGH_SECONDS = 6.0  # A kind of pass that has taken this long is timed no more than three times.
NOISE = (0.0, 0.15, 0.2, 0.25, 1.0)
THRESHOLDS = (0.2, 0.4, 0.6)
LONG_BIN = 256


@dataclass(frozen=True)
class Size:
    """How much of everything to do.

    Args:
        width: the width of the base; see `widths`.
        questions: the questions of each task at batch size 1. A larger batch has a question for each row, and takes
            equally many from each task.
        rounds: how often each contestant answers each question.
        minutes: the time for one race. After the first round, no round begins that would probably end later.
        tasks: the names of the tasks; all tasks if empty.
        max_new_tokens: the limit of a nudged answer.
        repeats: how often each kind of pass is timed.
        noise, thresholds: the settings of the agreement scenario.
        short_answer: the number of new tokens where only the cost matters, and not the answer.
        short_questions: the number of questions there.
        hopeless_answer, long_answer: the number of new tokens in these scenarios.
    """

    width: int = 18
    questions: int = 1
    rounds: int = 3
    minutes: float = 30.0
    tasks: Sequence[str] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    repeats: int = 7
    noise: Sequence[float] = NOISE
    thresholds: Sequence[float] = THRESHOLDS
    short_answer: int = 64
    short_questions: int = 2
    hopeless_answer: int = 160
    long_answer: int = 4096


class Unit(NamedTuple):
    """One piece of work with its key."""

    key: Key
    work: Callable[[], Row]

    def row(self) -> Row:
        """Does the work, and returns its key and its figures in one row."""
        return {**self.key, **self.work()}

    @property
    def label(self) -> str:
        """What the progress bar says of the unit."""
        return str(self.key.get("contestant", self.key["scenario"]))


Find = Callable[[Key], Row | None]


@dataclass
class Models:
    """The models in one dtype. Each is loaded when it is first used."""

    width: int
    dtype: str
    loaded: LMs = field(default_factory=dict)

    def __getitem__(self, name: str) -> Reader:
        if name not in self.loaded:
            self.loaded[name] = load(name, widths(self.width)[name], self.dtype)
        return self.loaded[name]

    def of(self, contestant: Racer) -> LMs:
        return {name: self[name] for name in contestant.models}


def measure(contestant: Racer, lms: LMs, work: Work) -> tuple[Row, list[list[int]]]:
    """Lets a contestant write once. Returns what it took, and the ids of the answers."""
    prompts = [work.prompts(lm)[0].numel() for lm in lms.values()]
    with PeakMemory() as memory, Meter({name: lm.model for name, lm in lms.items()}) as meter:
        answers = contestant.write(lms, work)
    large, *small = [meter.passes[name] for name in contestant.models]
    slots = len(answers) * max(map(len, answers))
    caches = sum(cache_bytes(lm.model, slots + prompt) for lm, prompt in zip(lms.values(), prompts, strict=True))
    row = {
        "seconds": meter.seconds,
        "lengths": [len(answer) for answer in answers],
        "answers": [digest(answer)[:12] for answer in answers],
        "large": {"passes": large.count, "fed": large.fed, "seconds": large.seconds},
        "small": {
            "passes": sum(each.count for each in small),
            "fed": sum(each.fed for each in small),
            "seconds": sum(each.seconds for each in small),
        },
        "extra_bytes": memory.extra_bytes,
        "weight_bytes": sum(weight_bytes(lm.model) for lm in lms.values()),
        "cache_bytes": caches,
    }
    return row, answers


# The race -----------------------------------------------------------------------------------------------------------


def groups(size: Size, batch: int) -> list[list[Prompt]]:
    """The questions of each call."""
    drawn: dict[str, list[Prompt]] = {}
    for question in dev_questions(max(size.questions, batch)):
        if not size.tasks or question.task in size.tasks:
            drawn.setdefault(question.task, []).append(question)
    if not drawn:
        raise ValueError(f"`tasks` must name some of letters, stories, coins and lengths, got {list(size.tasks)}.")
    turns = [question for turn in zip(*drawn.values(), strict=True) for question in turn]
    return [[question] for question in turns[: size.questions * len(drawn)]] if batch == 1 else [turns[:batch]]


def race(size: Size, dtype: str, batch: int, find: Find) -> Iterator[Unit]:
    """Lets every contestant answer the same questions in turn."""
    models = Models(size.width, dtype)
    runners = [each for each in RACERS if each.in_batches or batch == 1]
    calls = groups(size, batch)
    key = {"scenario": "race", "dtype": dtype, "batch": batch}
    answered: set[str] = set()  # The calls that both pairs have answered in this run.

    def lengths(call: str, questions: list[Prompt]) -> Row:
        """The lengths of the nudged answers, which the others write too. This is not timed and warms everything up."""
        if not answered:
            for each in runners:
                each.write(models.of(each), Work(questions).of_length(6))
        answered.add(call)
        asked = Work(questions, max_new_tokens=size.max_new_tokens)
        shared, own = (nudged_racer(small, ADAPTIVE) for small in (SHARED, OWN))
        own.write(models.of(own), asked)
        return {"lengths": [len(answer) for answer in shared.write(models.of(shared), asked)]}

    def run(contestant: Racer, call: str, questions: list[Prompt], own: Row) -> Row:
        if call not in answered:  # The lengths come from an earlier run, and this one is not warmed up.
            lengths(call, questions)
        work = Work(questions, lengths=own["lengths"], max_new_tokens=size.max_new_tokens)
        return measure(contestant, models.of(contestant), work)[0]

    start, slowest = time.monotonic(), 0.0
    for turn in range(size.rounds):
        begun = time.monotonic()
        if turn and begun - start + slowest > 60 * size.minutes:
            break
        for questions in calls:
            call = digest([question.prompt for question in questions])[:12]
            call_key = {**key, "call": call, "task": questions[0].task if batch == 1 else "all"}
            own_key = {**call_key, "contestant": "lengths"}
            yield Unit(own_key, partial(lengths, call, questions))
            own = find(own_key)
            assert own is not None
            for i in range(len(runners)):
                runner = runners[(i + turn) % len(runners)]  # No contestant always follows the same one.
                yield Unit(
                    {**call_key, "round": turn, "contestant": runner.name},
                    partial(run, runner, call, questions, own),
                )
        slowest = max(slowest, time.monotonic() - begun)


# Passes -------------------------------------------------------------------------------------------------------------


def passes(size: Size, dtype: str) -> Iterator[Unit]:
    """The quartiles of the seconds of one forward pass, by rows, tokens a row, and tokens in the cache."""
    models = Models(size.width, dtype)
    shapes = [(BASE, 1, width, CONTEXTS[0]) for width in PASS_WIDTHS]
    shapes += [(BASE, 1, width, CONTEXTS[1]) for width in FAR_WIDTHS]
    shapes += [(BASE, rows, width, CONTEXTS[0]) for rows, width in BATCH_SHAPES]
    shapes += [(name, 1, width, context) for name in (SHARED, OWN) for width in (1, 4) for context in CONTEXTS]
    shapes += [(name, rows, 1, CONTEXTS[0]) for name in (SHARED, OWN) for rows in (8, 32)]

    def all_shapes() -> Row:
        seconds: dict[tuple[str, int, int, int], list[float]] = {shape: [] for shape in shapes}
        caches: dict[tuple[str, int, int], DynamicCache] = {}
        for turn in range(size.repeats + 1):
            for name, rows, width, context in shapes:
                taken = seconds[name, rows, width, context]
                if len(taken) >= 3 and sum(taken) > ENOUGH_SECONDS:
                    continue
                model = models[name].model
                if (name, rows, context) not in caches:
                    caches[name, rows, context] = random_cache(model, rows, context)
                took = timed_pass(model, caches[name, rows, context], rows, width, context)
                if turn:  # The first turn warms up.
                    taken.append(took)
        return {
            "passes": [
                {"model": name, "rows": rows, "width": width, "context": context, "seconds": quartiles(each)}
                for (name, rows, width, context), each in seconds.items()
            ],
            "parameters": {
                name: sum(map(torch.Tensor.numel, weights(models[name].model))) for name in (BASE, SHARED, OWN)
            },
        }

    yield Unit({"scenario": "passes", "dtype": dtype}, all_shapes)


def random_cache(model: Any, rows: int, context: int) -> DynamicCache:
    """A cache of random keys and values. A pass over them costs as much as over those of a text."""
    cache = DynamicCache()
    config = model.config
    shape = (rows, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).to(model.dtype), torch.randn(shape).to(model.dtype), layer)
    return cache


@torch.no_grad()
def timed_pass(model: Any, cache: DynamicCache, rows: int, width: int, context: int) -> float:
    """Runs one pass, restores the cache, and returns the seconds that the pass took."""
    ids = torch.randint(2, model.config.vocab_size, (rows, width))
    positions = torch.arange(context, context + width).expand(rows, -1)
    start = time.perf_counter()
    model(input_ids=ids, position_ids=positions, **{CACHE: cache}, use_cache=True)
    took = time.perf_counter() - start
    cache.crop(-width)
    return took


# Weaker pairs -------------------------------------------------------------------------------------------------------


def agreement(size: Size, dtype: str) -> Iterator[Unit]:
    """The speed-up as a function of how often the nudging model would have written the answer's next token itself."""
    questions = dev_questions(1)[: size.short_questions]
    base = Models(size.width, dtype)
    runner = nudged_racer(SHARED, ADAPTIVE)
    for share in size.noise:
        noisy: LMs = {}

        def run(share: float, threshold: float, question: Prompt, noisy: LMs = noisy) -> Row:
            if not noisy:
                noisy[SHARED] = load(SHARED, widths(size.width)[SHARED], dtype, lambda lm: with_noise(lm.model, share))
            lms = {BASE: base[BASE], SHARED: noisy[SHARED]}
            work = Work([question], threshold, max_new_tokens=size.short_answer)
            for name in (BASE, SHARED):  # Reads both models' weights, so that every timing starts in the same state.
                timed_pass(lms[name].model, random_cache(lms[name].model, 1, 8), 1, 1, 8)
            row, (answer,) = measure(runner, lms, work)
            alone, _ = measure(ALONE, {BASE: lms[BASE]}, replace(work, lengths=[len(answer)]))
            _, output = nudged_output(lms, work, SHARED, ADAPTIVE)  # Not timed: the output costs extra reading.
            return {
                **row,
                "alone_seconds": alone["seconds"],
                "agreement": own_share(noisy[SHARED], question, answer),
                "nudge_rate": output.nudge_rate.item(),
            }

        for threshold in size.thresholds:
            for call, question in enumerate(questions):
                yield Unit(
                    {"scenario": "agreement", "dtype": dtype, "noise": share, "threshold": threshold, "call": call},
                    lambda share=share, threshold=threshold, question=question, run=run: run(
                        share, threshold, question
                    ),
                )


@torch.no_grad()
def own_share(lm: Reader, question: Prompt, answer: list[int]) -> float:
    """The share of an answer's tokens that the model would have written itself after the tokens before them."""
    prompt, _ = lm.padded_prompts([question])
    ids = torch.cat([prompt, torch.tensor([answer])], dim=1)
    own = lm.model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].argmax(dim=-1)
    return (own == torch.tensor(answer)).float().mean().item()


def hopeless(size: Size, dtype: str) -> Iterator[Unit]:
    """A pair that drafting cannot help: the base is always confident, and the nudging model's words are replaced."""
    questions = dev_questions(1)[: size.short_questions]
    models = Models(size.width, dtype)
    runners = [ALONE, *(nudged_racer(small, draft) for small in (SHARED, OWN) for draft in (ADAPTIVE, 0))]
    warm = False

    def run(contestant: Racer, question: Prompt) -> Row:
        nonlocal warm
        for name in (SHARED, OWN):
            if name not in models.loaded:
                factor = widths(size.width)[name]
                models.loaded[name] = load(name, factor, dtype, contradicting)
        work = Work([question], threshold=0.0).of_length(size.hopeless_answer)
        if not warm:
            for each in runners:
                each.write(models.of(each), work.of_length(6))
            warm = True
        return measure(contestant, models.of(contestant), work)[0]

    for turn in range(size.rounds):
        for call, question in enumerate(questions):
            for i in range(len(runners)):
                runner = runners[(i + turn) % len(runners)]
                key = {"scenario": "hopeless", "dtype": dtype, "round": turn, "call": call, "contestant": runner.name}
                yield Unit(key, lambda who=runner, asked=question: run(who, asked))


# Long text ----------------------------------------------------------------------------------------------------------


def long_text(size: Size) -> Iterator[Unit]:
    """Seconds per token as an answer grows. The mini pair is not widened, runs in float32, and ends at the limit."""
    models = Models(1, "float32")
    question = dev_questions(1)[0]
    n = size.long_answer
    work = Work([question]).of_length(n)

    def written(write: Callable[..., Any]) -> Row:
        lms = {BASE: models[BASE], SHARED: models[SHARED]}
        write(lms, work.of_length(32))  # This warms up.
        watch = Stopwatch()
        with Meter({name: lm.model for name, lm in lms.items()}) as meter:
            write(lms, work, streamer=watch)
        marks = watch.times[::LONG_BIN] + watch.times[-1:]
        return {
            "tokens": [min((i + 1) * LONG_BIN, n - 1) for i in range(len(marks) - 1)],
            "seconds": [late - early for early, late in pairwise(marks)],
            "total": meter.seconds,
            "large": meter.passes[BASE].count,
            "small": meter.passes[SHARED].count,
            "in_passes": sum(each.seconds for each in meter.passes.values()),
        }

    def endless(lms: LMs, work: Work, draft: int | str, **kwargs: Any) -> list[list[int]]:
        return nudged(lms, work, SHARED, draft, min_new_tokens=work.max_new_tokens, **kwargs)

    runners: dict[str, Callable[..., Any]] = {ALONE.name: base_alone}
    runners |= {nudged_racer(SHARED, draft).name: partial(endless, draft=draft) for draft in (ADAPTIVE, 0)}
    for turn in range(size.rounds):
        for name, write in runners.items():
            key = {"scenario": "long", "round": turn, "contestant": name}
            yield Unit(key, lambda write=write: written(write))
