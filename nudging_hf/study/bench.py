"""Whether nudging is faster here: the base alone, the base nudged, and assisted generation, timed in turn.

It knows models, prompts and clocks, never files or terminals. Prompts are answered one at a time and greedily. All
contestants write as many tokens as the nudged answer has, because a base that is not aligned seldom ends an answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from ..core.config import NudgingConfig
from ..core.transformers_private import plain_generate
from .meters import PeakMemory, seconds_of, weight_bytes
from .prompts import Prompt
from .reader import Reader, inputs_of_both, pair_of, share_vocabulary

BASE, NUDGED, ASSISTED = "base alone", "nudged", "assisted generation"

Row = dict[str, Any]
# Writes an answer of so many tokens to a prompt, and returns how many it wrote.
Write = Callable[[Prompt, int], int]


# The race -----------------------------------------------------------------------------------------------------------


def exactly(tokens: int) -> dict[str, Any]:
    """The arguments of `generate` with which a model writes so many tokens greedily."""
    return {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}


def nudged(base: Reader, nudging: Reader, config: NudgingConfig, prompt: Prompt, tokens: int) -> int:
    """Writes a nudged answer of at most so many tokens, and returns how many it has."""
    inputs = inputs_of_both(base, nudging, [prompt], tokens)
    out = pair_of(base, nudging).generate(inputs, nudging_config=config)
    return out.shape[1] - inputs["input_ids"].shape[1]


def alone(base: Reader, arguments: dict[str, Any], prompt: Prompt, tokens: int) -> int:
    """Writes an answer of the base alone. `arguments` are further ones of `generate`."""
    plain_generate(base.model)(base.model, **{**base.inputs([prompt], tokens), **exactly(tokens)}, **arguments)
    return tokens


def assistance(base: Reader, nudging: Reader) -> dict[str, Any]:
    """The arguments of assisted generation, in which the nudging model drafts and the text is the base's own.

    Raises:
        ValueError: if transformers cannot tell that the two have different vocabularies.
    """
    rows = [each.model.config.get_text_config().vocab_size for each in (base, nudging)]
    if share_vocabulary(base, nudging) and rows[0] == rows[1]:
        return {"assistant_model": nudging.model}
    if rows[0] == rows[1]:
        raise ValueError("the vocabularies differ and have one size, which transformers takes for one vocabulary")
    tokenizers = {"tokenizer": base.tokenizer, "assistant_tokenizer": nudging.tokenizer}
    return {"assistant_model": nudging.model, **tokenizers}


def bench(
    base: Reader,
    nudging: Reader,
    config: NudgingConfig,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    rounds: int = 3,
    progress: Callable[[str, int], None] = lambda contestant, answered: None,
) -> Bench:
    """Lets the contestants answer each prompt in turn, `rounds` times.

    Args:
        max_new_tokens: the limit on a nudged answer, in tokens of the base.
        progress: is called with a contestant's name and 1 after each of its answers.
    """
    device = base.model.device
    write_nudged = partial(nudged, base, nudging, config)
    contestants: dict[str, Write] = {BASE: partial(alone, base, {}), NUDGED: write_nudged}
    left_out = {}
    try:
        assisted = partial(alone, base, assistance(base, nudging))
        assisted(prompts[0], 8)
        contestants[ASSISTED] = assisted
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:  # transformers has not tried every pair.
        left_out[ASSISTED] = str(error).strip().partition("\n")[0] or type(error).__name__
    rows = []
    for call, prompt in enumerate(prompts):
        tokens = write_nudged(prompt, max_new_tokens)  # This is not timed, and warms up.
        if call == 0:
            alone(base, {}, prompt, 8)
        for turn in range(rounds):
            for name, write in contestants.items():
                with PeakMemory(device) as memory:
                    seconds = seconds_of(partial(write, prompt, tokens), device)
                times = {"seconds": seconds, "lengths": [tokens], "extra_bytes": memory.extra_bytes}
                rows.append({"contestant": name, "call": call, "round": turn, **times})
                progress(name, 1)
    weights = {"base": weight_bytes(base.model), "nudging model": weight_bytes(nudging.model)}
    return Bench(rows, left_out, weights, str(device))


# The figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What was timed.

    Args:
        rows: for each answer its contestant, the number of its prompt (`call`) and of its round, its seconds, its
            tokens (`lengths`), and by how many bytes more memory was in use at its peak.
        left_out: the contestants that could not take part, and why.
        weights: the bytes of the weights of both models.
        device: where the base ran.
    """

    rows: list[Row]
    left_out: dict[str, str]
    weights: dict[str, int]
    device: str

    def figures(self) -> list[Row]:
        """For each contestant what [`rate_against`] tells against the base alone, and its memory at the peak."""
        found = []
        for name in dict.fromkeys(row["contestant"] for row in self.rows):
            own = self.of(name)
            weights = self.weights["base"] + (self.weights["nudging model"] if name != BASE else 0)
            extra = [row["extra_bytes"] for row in own]
            peak = None if None in extra else weights + max(extra)
            found.append({"contestant": name, **rate_against(own, self.of(BASE)), "peak_bytes": peak})
        return found

    def of(self, contestant: str) -> list[Row]:
        """The rows of a contestant."""
        return [row for row in self.rows if row["contestant"] == contestant]

    def sentence(self) -> str:
        """Whether nudging is faster here, and what it costs in memory."""
        against = [BASE, *([ASSISTED] if self.of(ASSISTED) else [])]
        told = " and ".join(_told(rate_against(self.of(NUDGED), self.of(other)), other) for other in against)
        prompts = len(by_call(self.rows))
        peaks = {each["contestant"]: each["peak_bytes"] for each in self.figures()}
        memory = ""
        if peaks[BASE] and peaks[NUDGED]:
            memory = f", with {peaks[NUDGED] / peaks[BASE]:.2f} times the memory of the base alone"
        return f"On {self.device}, with {prompts} prompts one at a time, the nudged base is {told}{memory}."


def _told(rate: Row, other: str) -> str:
    low, _, high = rate["quartiles"]
    if low <= 1 <= high:
        return f"about as fast as {other} ({rate['ratio']:.2f} times, quartiles {low:.2f} to {high:.2f})"
    return f"{'faster' if low > 1 else 'slower'} than {other} ({rate['ratio']:.2f} times as fast)"


def rate_against(rows: Sequence[Row], others: Sequence[Row]) -> Row:
    """How much faster one contestant wrote than another, in tokens per second, on the calls that both answered.

    A rate is the sum of tokens over the sum of seconds. The tokens and seconds of a call are the medians of its
    rounds. `ratio` is the ratio of the two rates. `quartiles` are those of the ratios of single runs, which are paired
    by call and round.
    """
    own, reference = by_call(rows), by_call(others)
    calls = sorted(own.keys() & reference.keys())
    rates = [
        sum(median_of(side[call], tokens_of) for call in calls)
        / sum(median_of(side[call], itemgetter("seconds")) for call in calls)
        for side in (own, reference)
    ]
    pairs = [
        tokens_of(mine) / mine["seconds"] * theirs["seconds"] / tokens_of(theirs)
        for call in calls
        for mine in own[call]
        for theirs in reference[call]
        if mine.get("round") == theirs.get("round")
    ]
    return {"tokens_per_second": rates[0], "ratio": rates[0] / rates[1], "quartiles": quartiles(pairs)}


def by_call(rows: Iterable[Row]) -> dict[Any, list[Row]]:
    calls: dict[Any, list[Row]] = {}
    for row in rows:
        calls.setdefault(row["call"], []).append(row)
    return calls


def tokens_of(row: Row) -> float:
    return sum(row["lengths"])


def median_of(rows: Sequence[Row], value: Any) -> float:
    return statistics.median(map(value, rows))


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")
