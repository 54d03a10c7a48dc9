"""Times passes and races of a random pair on a device. It knows how long things take, never whether they are right.

Seconds are wall-clock time between two moments at which the device has finished all its work. In the timed runs
nothing is wrapped around a contestant's models. One more run is metered: each call of a model is counted and timed,
and the host waits for the device before and after it. The time of a pass thus includes both the time in which Python
launches the work and the time of the work itself, and *outside passes* is the rest of that run. A compiled pass is
timed around the compiled call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_checks import STATIC, Outcome
from markov import MarkovPair
from meters import CallMeter, cache_bytes, graphs_compiled
from racers import ADAPTIVE, BASE_ALONE
from transformers import DynamicCache

import nudging_hf
from nudging_hf.core.transformers_private import CACHE
from nudging_hf.study.bench import quartiles, rate_against
from nudging_hf.study.meters import PeakMemory, seconds_of, synchronize, weight_bytes

MAX_MEMORY = 1.05  # The highest peak that passes the check, as a multiple of weights and caches.
_FEW_TOKENS = 8

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much of everything to do.

    Args:
        base, nudging: the sizes of the race's models, as arguments of `LlamaConfig`.
        dtype: the dtype of the race's models, by its name in torch.
        agreements: the shares of tokens after which the race's models agree. All contestants race at the first.
        batches: the numbers of rows of a call. All contestants race at the first; those that can write only one row
            do not race at the others.
        rounds: how often each contestant writes, each time with other prompts.
        widths, contexts: for the timed passes of one row: the tokens of a pass, and the tokens in the cache before it.
        batch_widths: the tokens that each row has in the timed passes of several rows.
        repeats: how often each pass is timed.
        check_batches: the numbers of rows in the checks of the mini pair.
        check_tokens: the maximum number of new tokens in those checks.
    """

    base: dict[str, int]
    nudging: dict[str, int]
    vocab_size: int
    dtype: str
    agreements: Sequence[float]
    batches: Sequence[int]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    widths: Sequence[int]
    contexts: Sequence[int]
    batch_widths: Sequence[int]
    repeats: int
    check_batches: Sequence[int]
    check_tokens: int


def llama(hidden: int, layers: int, heads: int, key_value_heads: int, mlp: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": 8192,
    }


FULL = Size(
    base=llama(4096, 32, 32, 32, 11008),  # The shape of Llama-2 7B.
    nudging=llama(896, 24, 14, 2, 4864),  # The shape of Qwen2.5 0.5B.
    vocab_size=32000,
    dtype="bfloat16",
    agreements=(0.85, 0.95, 0.7),
    batches=(1, 8),
    prompt_tokens=32,
    new_tokens=96,
    rounds=3,
    widths=(1, 5, 9, 17, 33),
    contexts=(128, 4096),
    batch_widths=(1, 5, 9),
    repeats=20,
    check_batches=(1, 4),
    check_tokens=120,
)
TINY = Size(
    base=llama(128, 2, 4, 4, 128),
    nudging=llama(64, 1, 2, 2, 64),
    vocab_size=400,
    dtype="float32",
    agreements=(0.85, 0.7),
    batches=(1, 2),
    prompt_tokens=4,
    new_tokens=12,
    rounds=2,
    widths=(1, 5),
    contexts=(16, 32),
    batch_widths=(1,),
    repeats=2,
    check_batches=(1, 2),
    check_tokens=12,
)


# Passes -------------------------------------------------------------------------------------------------------------


def pass_costs(pair: MarkovPair, size: Size) -> list[Row]:
    """The quartiles of the seconds of an uncompiled forward pass over random keys and values, by its shape."""
    shapes = [("base", 1, width, context) for context in size.contexts for width in size.widths]
    shapes += [("base", size.batches[-1], width, size.contexts[0]) for width in size.batch_widths]
    shapes += [("nudging", 1, 1, context) for context in size.contexts]
    shapes += [("nudging", size.batches[-1], 1, size.contexts[0])]
    return [
        {"model": name, "rows": rows, "width": width, "context": context, "seconds": quartiles(seconds)}
        for name, rows, width, context in shapes
        for seconds in [pass_seconds(getattr(pair, name), rows, width, context, size.repeats)]
    ]


@torch.no_grad()
def pass_seconds(model: Any, rows: int, width: int, context: int, repeats: int) -> list[float]:
    """The seconds of each of `repeats` passes over `width` tokens a row, with `context` tokens in the cache."""
    config, device = model.config, model.device
    cache = DynamicCache()
    shape = (rows, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2)), layer)
    ids = torch.full((rows, width), config.vocab_size - 1, device=device)
    positions = torch.arange(context, context + width, device=device).expand(rows, -1)

    def one_pass() -> None:
        model(input_ids=ids, position_ids=positions, **{CACHE: cache}, use_cache=True)

    found = []
    for _ in range(repeats + 2):
        found.append(seconds_of(one_pass, device))
        cache.crop(-width)
    return found[2:]  # The first ones warm up.


# The race -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A task for a contestant: to write so many new tokens after prompts of shape (rows, prompt_tokens)."""

    pair: MarkovPair
    ids: torch.Tensor
    new_tokens: int
    threshold: float

    @property
    def common(self) -> Row:
        """Arguments of every `generate`. EOS is never the most probable token, so no answer ends early."""
        return {
            "attention_mask": torch.ones_like(self.ids),
            "do_sample": False,
            "max_new_tokens": self.new_tokens,
        }


def alone(call: Call, **kwargs: Any) -> torch.Tensor:
    return call.pair.base.generate(call.ids, **call.common, **kwargs)


def assisted(call: Call) -> torch.Tensor:
    return alone(call, assistant_model=call.pair.nudging)


def nudged(call: Call, draft: int | str, **kwargs: Any) -> Any:
    return nudging_hf.generate(
        call.pair.base,
        input_ids=call.ids,
        tokenizer=call.pair.tokenizer,
        nudging_model=call.pair.nudging,
        nudging_tokenizer=call.pair.tokenizer,
        nudging_input_ids=call.ids,
        nudge_threshold=call.threshold,
        num_draft_tokens=draft,
        **call.common,
        **kwargs,
    )


@torch.no_grad()
def stepping_both(call: Call) -> torch.Tensor:
    """Lets both models read each token and takes the token of one of them.

    Every token is a whole word, so no word has to be finished. Everything stays on the device, and the host never
    waits for it. Loops that step both models usually do wait.
    """
    models = (call.pair.base, call.pair.nudging)
    caches = [DynamicCache() for _ in models]
    ids, fed = call.ids, call.ids
    for step in range(call.new_tokens):
        base, nudging = (
            model(input_ids=fed, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
            for model, cache in zip(models, caches, strict=True)
        )
        top1, token = base.float().softmax(dim=-1).max(dim=-1)
        if step:
            token = torch.where(top1 < call.threshold, nudging.argmax(dim=-1), token)
        else:
            token = nudging.argmax(dim=-1)
        fed = token[:, None]
        ids = torch.cat([ids, fed], dim=1)
    return ids


@dataclass(frozen=True)
class Runner:
    """A contestant: one way to write.

    Args:
        name: the name in the tables.
        write: writes, and returns ids of shape (rows, prompt_tokens + new_tokens).
        models: the names of the models that it uses.
        one_row: whether it can write only one row at a time.
        warm_up: whole calls to make before anything is timed, so that nothing has to be compiled in the timed rounds.
            If empty, `write` writes a few tokens.
    """

    name: str
    write: Callable[[Call], torch.Tensor]
    models: tuple[str, ...] = ("base", "nudging")
    one_row: bool = False
    warm_up: tuple[Callable[[Call], torch.Tensor], ...] = ()


ALONE = Runner(BASE_ALONE, alone, ("base",))
NUDGED = Runner("nudged", partial(nudged, draft=ADAPTIVE))
ASSISTED = Runner("assisted generation", assisted, one_row=True)
FIELD = [
    ALONE,
    NUDGED,
    Runner("nudged, nothing drafted", partial(nudged, draft=0)),
    *(Runner(f"nudged, drafts of {k}", partial(nudged, draft=k)) for k in (4, 8, 16)),
    ASSISTED,
    Runner("both models at every token", stepping_both),
]
FEW = [ALONE, NUDGED, ASSISTED]
COMPILED = [
    ALONE,
    Runner(
        "base alone, static and compiled",
        partial(alone, **STATIC),
        ("base",),
        warm_up=(partial(alone, **STATIC),) * 2,
    ),
    Runner(
        "nudged, static and compiled",
        partial(nudged, draft=ADAPTIVE, **STATIC),
        warm_up=tuple(partial(nudged, draft=k, **STATIC) for k in (0, 4, 8, 16, 32, ADAPTIVE)),
    ),
]


class Race(NamedTuple):
    """The contestants of a race, and the agreement and batch size that they race at."""

    agreement: float
    batch: int
    runners: list[Runner]

    @property
    def is_compiled(self) -> bool:
        return self.runners is COMPILED

    @property
    def name(self) -> str:
        kind = ", compiled" if self.is_compiled else ""
        return f"race at agreement {self.agreement:g}, batch {self.batch}{kind}"


def races(size: Size) -> list[Race]:
    """All races, the most informative first, because time may run out.

    Compiled races of the same batch size follow one another, so that their graphs can be shared.
    """
    first, *others = size.agreements
    one, *batches = size.batches
    found = [Race(first, one, FIELD), *(Race(share, one, COMPILED) for share in size.agreements)]
    found += [Race(first, batch, FIELD) for batch in batches]
    found += [Race(share, batch, FEW) for batch in size.batches for share in others]
    return found + [Race(share, batch, COMPILED) for batch in batches for share in size.agreements]


def run_race(
    pair: MarkovPair,
    threshold: float,
    race: Race,
    size: Size,
    is_over: Callable[[], bool],
    tell: Callable[[str], None],
) -> Row:
    """Lets all contestants write in turn with the same prompts, and then meters one run of each.

    Each round begins with another contestant.

    Args:
        threshold: γ.
        is_over: returns whether the time is up, so that no further round begins.
        tell: is called with the name of the contestant that runs.

    Returns:
        For each contestant the seconds of each round, its rate and its ratio to the base alone, the figures of the
        metered run, and the seconds of the warm-up, which compiles. For the race, the share of nudged tokens, and how
        many graphs were compiled before the rounds and during them. The latter make the times invalid.
    """
    pair.agree(race.agreement)
    device = pair.base.device
    runners = [each for each in race.runners if race.batch == 1 or not each.one_row]

    calls = [
        Call(pair, pair.prompts(race.batch, size.prompt_tokens, seed=turn), size.new_tokens, threshold)
        for turn in range(size.rounds)
    ]

    def write(runner: Runner, turn: int) -> None:
        ids = runner.write(calls[turn])
        expected = (race.batch, size.prompt_tokens + size.new_tokens)
        if tuple(ids.shape) != expected:
            raise RuntimeError(f"{runner.name} wrote ids of shape {tuple(ids.shape)}, not {expected}.")

    graphs = [graphs_compiled()]
    warming: dict[str, float] = {}
    for runner in runners:
        tell(f"{runner.name}, warming up")
        if runner.warm_up:
            calls_before = [partial(write_all, calls[0]) for write_all in runner.warm_up]
        else:
            calls_before = [partial(runner.write, replace(calls[0], new_tokens=_FEW_TOKENS))]
        warming[runner.name] = sum(seconds_of(each, device) for each in calls_before)
    graphs.append(graphs_compiled())
    timed: dict[str, list[Row]] = {each.name: [] for each in runners}
    lengths = [size.new_tokens] * race.batch
    for turn in range(size.rounds):
        if turn and is_over():
            break
        for i in range(len(runners)):
            runner = runners[(i + turn) % len(runners)]  # No contestant always follows the same one.
            tell(f"{runner.name}, round {turn + 1}")
            seconds = seconds_of(partial(write, runner, turn), device)
            timed[runner.name].append({"call": turn, "round": turn, "seconds": seconds, "lengths": lengths})
    graphs.append(graphs_compiled())
    found = []
    for runner in runners:
        tell(f"{runner.name}, metered")
        own = timed[runner.name]
        found.append({
            "contestant": runner.name,
            "warm_up_seconds": warming[runner.name],
            "seconds": [row["seconds"] for row in own],
            **rate_against(own, timed[ALONE.name]),
            **metered(pair, runner, partial(write, runner, 0), race.batch, size),
        })  # fmt: skip
    output = nudged(calls[0], ADAPTIVE, return_dict_in_generate=True)
    return {
        "agreement": race.agreement,
        "batch": race.batch,
        "nudge_rate": output.nudge_rate.mean().item(),
        "graphs": {"before": graphs[1] - graphs[0], "in_rounds": graphs[2] - graphs[1]},
        "contestants": found,
    }


def metered(pair: MarkovPair, runner: Runner, write: Callable[[], None], batch: int, size: Size) -> Row:
    """The passes, their seconds, and the peak memory of one run.

    The peak is the weights of the models that the contestant uses plus the most that it allocated beyond them. It is
    `None` without a GPU, whose allocator reports it, and for compiled contestants, whose caches and graphs stay
    allocated between calls.
    """
    models = {name: getattr(pair, name) for name in runner.models}
    device = pair.base.device
    with PeakMemory(device) as memory, CallMeter(models, partial(synchronize, device)) as meter:
        write()
    weights = sum(map(weight_bytes, models.values()))
    peak = None
    if device.type == "cuda" and runner not in COMPILED[1:]:
        peak = weights + memory.extra_bytes
    new, slots = batch * size.new_tokens, batch * (size.prompt_tokens + size.new_tokens)
    in_passes = sum(passes.seconds for passes in meter.passes.values())
    return {
        "passes": {name: asdict(passes) for name, passes in meter.passes.items()},
        "passes_per_token": {name: passes.count / new for name, passes in meter.passes.items()},
        "metered_seconds": meter.seconds,
        "outside_passes": 1 - in_passes / meter.seconds,
        "weight_bytes": weights,
        "cache_bytes": sum(cache_bytes(model, slots) for model in models.values()),
        "peak_bytes": peak,
    }


def memory_is_small(race: Row) -> Outcome:
    """Whether the nudged contestant's peak is at most `MAX_MEMORY` times its weights and caches."""
    row = next(each for each in race["contestants"] if each["contestant"] == NUDGED.name)
    weights, caches, peak = row["weight_bytes"], row["cache_bytes"], row["peak_bytes"]
    share = peak / (weights + caches)
    detail = f"{share:.3f} of weights and caches; without the weights, {(peak - weights) / caches:.2f} of the caches"
    return Outcome(share <= MAX_MEMORY, detail)
