"""One causal LM with its KV cache, which extends and rolls back each row of a batch on its own. It knows no text."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from .cache_layers import keeps_state, new_cache
from .copied_cache import CopiedSlots
from .kv_cache import Slots, StaticSlots, borrow_static_slots, give_back_static_slots, most_slots
from .reading_mode import Rows, has_common_cache, reading_mode
from .state_cache import StatefulSlots
from .transformers_private import (
    accepted_arguments,
    cache_argument,
    cache_of,
    compiled_call,
    first_inputs,
    input_device,
    tells_distances_by_positions,
)

_MOST_UNREAD = 16  # Accepted tokens that are read again together with a draft; more are read in a pass of their own.
_MOST_LOGITS = 64  # Columns of a pass with logits, beyond which a pass is worth saving them.
# Tokens of a first pass, padding included, beyond which rows of like length make a pass of their own. From so many on
# a CPU takes as long for each further one, and padding is saved; an accelerator wants more at once.
_MOST_AT_FIRST, _MOST_AT_FIRST_ON_CPU = 2048, 256
_STATIC_WIDTHS = (1, 5, 9, 17, 33)  # Of passes over a static cache; they are few, for each is compiled.
_STATIC_STEP = 512  # Static caches have multiples of this many slots, so that prompts of many lengths take the same.
_WARM_UP = 2  # Passes of a width that take longer than others: one that compiles it, one that records a CUDA graph.


class Reading(NamedTuple):
    """What one row is to read.

    Args:
        ids: its whole text.
        keep: for how many of its last ids logits are wanted.
        settled: how many of its ids are sure to stay, where that is known: a model with a state keeps one that it had
            there or before.
    """

    ids: list[int]
    keep: int
    settled: int | None = None


class Prompts(NamedTuple):
    """Prompts that are more than ids (images, say), one for each row, as `generate` prepared them.

    Args:
        ids: each prompt's, without padding.
        input_ids: the same of shape (rows, width), padded on the left.
        model_kwargs: what else the first forward pass is given, `attention_mask` and `position_ids` among it.
    """

    ids: list[list[int]]
    input_ids: torch.Tensor
    model_kwargs: dict[str, Any]


class Static(NamedTuple):
    """How a cache is to be kept whose passes may be compiled.

    Args:
        new_tokens: about how many tokens are written at most.
        generation_config: says whether and how passes are compiled, as it does in `generate`.
    """

    new_tokens: int
    generation_config: GenerationConfig


class CachedLM:
    """A causal LM that reads texts of several rows, and reads no token of them twice.

    Args:
        model: a `PreTrainedModel` with a causal LM head.
        rows: how many rows there are; they are named 0 to rows - 1.
        use_cache: whether keys and values are kept. Without, each pass reads the whole text anew.
        prompts: what the texts begin with, where that is more than ids. It is read in a pass of its own, before the
            first, and stays in the cache, which is needed then.
        static: where the cache is to be of a fixed size.

    Attributes:
        forward_passes (`int`): how many forward passes the model has made.
        tokens_fed (`int`): how many tokens of all rows it has been fed, padding not counted.
        last_shape (`tuple[int, int]`, *optional*): rows and tokens of each, padding included, of the pass that the
            last texts took; `None` where they took several, or one that was compiled first, so that the time tells
            nothing of the next ones.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        use_cache: bool = True,
        prompts: Prompts | None = None,
        static: Static | None = None,
    ):
        self.model = model
        self.device = input_device(model)
        self._cache_argument = cache_argument(model)
        self.use_cache = use_cache and self._cache_argument is not None
        self.forward_passes = 0
        self.tokens_fed = 0
        self.last_shape: tuple[int, int] | None = None
        accepted = accepted_arguments(model)
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        self._rows = list(range(rows))  # In the order of the cache's batch dimension.
        self._fed: dict[int, list[int]] = {row: [] for row in self._rows}
        self._keeps_holes = prompts is None and tells_distances_by_positions(model)
        self._copies_cache = self.use_cache and not has_common_cache(model)
        self.keeps_state = self._copies_cache or (self.use_cache and keeps_state(model))
        self._slots: Slots | None = None  # Before the first pass, and after the last row.
        self._static = static
        self._compiled_model: Any = None  # If passes are compiled.
        self._compiled: Counter[int] = Counter()  # Such passes, by width.
        self._there = set(self._rows)  # Rows that are not released: a static cache keeps the others too.
        self._prompts = prompts
        self._fixed = dict.fromkeys(self._rows, 0)  # How many ids of a row are never rolled back.
        self._after_prompt: torch.Tensor | None = None  # The logits there, of shape (rows, 1, vocab_size).
        # By how much a position after the prompt is beyond the count of ids, of shape (..., rows, 1): images may take
        # fewer positions than they have ids, and a position may have several axes.
        self._shift: torch.Tensor | None = None

    @property
    def kind_of_cache(self) -> str:
        """Of what kind it is, for passes over another take another time."""
        return "none" if not self.use_cache else "dynamic" if self._static is None else "static"

    def unread(self, row: int, ids: list[int]) -> int:
        """How many ids of a text, of which nothing will be taken back, the row has yet to read."""
        read = common_prefix(self._fed[row], ids)
        if isinstance(self._slots, StatefulSlots):
            read = self._slots.reachable(self._rows.index(row), read)
        return len(ids) - read

    def release(self, row: int) -> None:
        """Forgets a row that will not read again."""
        self._there.remove(row)
        if not self._there:
            if isinstance(self._slots, StaticSlots):
                give_back_static_slots(self.model, self._slots)
            self._slots = None
        elif self._static is None:
            self._drop(row)

    def _drop(self, row: int) -> None:
        """Takes a row out of the cache; the last one takes its place."""
        place = self._rows.index(row)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        if self._slots is not None:
            self._slots.drop(place)

    def read(self, readings: Mapping[int, Reading]) -> dict[int, torch.Tensor]:
        """Reads texts in one forward pass, or in several where long ones are read for the first time.

        Args:
            readings: for each row that is to read, its whole text from the prompt on, without padding. What the row
                has read of another text is rolled back.

        Returns:
            for each row that wants some, the logits after its last `keep` ids, of shape (keep, vocab_size).
        """
        if self._prompts is not None:
            self._read_prompts(self._prompts)
            self._prompts = None
        rows = self._rows if self.use_cache else list(readings)
        kept = []
        for row in rows:
            fed = self._fed[row] if self.use_cache else []
            kept.append(len(fed))
            if row in readings:
                ids, keep, _ = readings[row]
                kept[-1] = max(min(common_prefix(fed, ids), len(ids) - keep), self._fixed[row])
                if isinstance(self._slots, StatefulSlots):
                    kept[-1] = self._slots.reachable(self._rows.index(row), kept[-1])
        new = {row: readings[row].ids[n:] if row in readings else [] for row, n in zip(rows, kept, strict=True)}
        width = max(map(len, new.values()))
        if self.use_cache and self._slots is None and self._static is None:
            most = _MOST_AT_FIRST_ON_CPU if self.device.type == "cpu" else _MOST_AT_FIRST
            lengths = {row: len(new[row]) for row in readings}
            if len(groups := _of_like_length(lengths, most, exactly=self.keeps_state)) > 1:
                return self._read_in_groups(readings, groups)
        if self.keeps_state:
            return self._read_in_step(readings, kept, new)
        # From column -1 on, where a prompt's own logits are wanted.
        wanted = {row: range(len(new[row]) - keep, len(new[row])) for row, (_, keep, _) in readings.items() if keep}
        first = min((each.start for each in wanted.values()), default=width - 1)
        if self.use_cache and width - first > _MOST_LOGITS and any(each.start > 0 for each in wanted.values()):
            # Prompts of very different lengths: what needs no logits is read first, so that few columns need them.
            late = [row for row, each in wanted.items() if each.start > 0]
            self.read({row: Reading(readings[row].ids[: -len(wanted[row])], 0) for row in late})
            logits_of_row = self.read(readings)
            self.last_shape = None
            return logits_of_row

        self._roll_back(kept)
        columns = []
        if first < 0:
            assert self._after_prompt is not None
            columns.append(self._after_prompt[rows])
        if width:
            columns.append(self._forward(kept, list(new.values()), width - max(0, first)))
            self.forward_passes += 1
            self.tokens_fed += sum(map(len, new.values()))
        logits = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
        if self.use_cache:
            for row in readings:
                self._fed[row] = readings[row].ids
        own = dict(zip(rows, logits.unbind(), strict=True))
        return {
            row: own[row] if len(each) == width - first else own[row][each.start - first : each.stop - first]
            for row, each in wanted.items()
        }

    def _read_in_step(
        self, readings: Mapping[int, Reading], kept: list[int], new: Mapping[int, list[int]]
    ) -> dict[int, torch.Tensor]:
        """Reads what is new, each row's after its first `kept` ids, in passes in which all rows read as many ids.

        So nothing is padded, which a state would take in. A row that has read all is left as it is by later passes.
        """
        self._roll_back(kept)
        if self._slots is None:
            self._slots = self._empty_slots(len(self._rows), self._keeps_holes)
        slots = self._slots
        assert isinstance(slots, StatefulSlots)
        place_of = {row: place for place, row in enumerate(self._rows)}
        done = dict(zip(self._rows, kept, strict=True))
        left = {row: self._stretches(readings[row], done[row]) for row in readings if new[row]}
        columns: dict[int, list[torch.Tensor]] = {row: [] for row in readings}
        if self._after_prompt is not None:
            for row, (ids, keep, _) in readings.items():
                if keep and len(ids) - keep < done[row]:
                    columns[row].append(self._after_prompt[row])
        passes = 0
        while left:
            width = min(stretches[0] for stretches in left.values())
            if slots.count and reading_mode(self.model).single_tokens:
                width = 1
            slots.begin_pass({place_of[row]: self._settled(readings[row]) for row in left})
            fed = {row: readings[row].ids[done[row] : done[row] + width] for row in left}
            first_wanted = {row: len(readings[row].ids) - readings[row].keep - done[row] for row in left}
            keep = max(1, width - max(0, min(first_wanted.values())))
            logits = self._forward([done[row] for row in self._rows], [fed.get(row, []) for row in self._rows], keep)
            self.forward_passes += 1
            self.tokens_fed += width * len(left)
            passes += 1
            for row in list(left):
                if (start := max(0, first_wanted[row])) < width:
                    columns[row].append(logits[place_of[row], logits.shape[1] - width + start :])
                done[row] += width
                self._fed[row] = readings[row].ids[: done[row]]
                left[row][0] -= width
                if not left[row][0]:
                    left[row].pop(0)
                if not left[row]:
                    del left[row]
        if passes != 1:
            self.last_shape = (len(readings), max(map(len, new.values())))
        return {row: torch.cat(each) for row, each in columns.items() if each}

    def _stretches(self, reading: Reading, done: int) -> list[int]:
        """The numbers of ids in which a row reads what is new: at once, unless much of it is settled.

        Settled ids that are read together with a draft are read again where the draft was wrong.
        """
        rest = len(reading.ids) - done
        settled = min(self._settled(reading), len(reading.ids) - reading.keep) - done
        return [settled, rest - settled] if _MOST_UNREAD < settled < rest else [rest]

    @staticmethod
    def _settled(reading: Reading) -> int:
        return len(reading.ids) if reading.settled is None else reading.settled

    def _read_in_groups(self, readings: Mapping[int, Reading], groups: list[list[int]]) -> dict[int, torch.Tensor]:
        """Reads the first texts of all rows, each group of rows in a pass of its own."""
        groups[-1] += [row for row in self._rows if row not in readings]
        rows = [row for group in groups for row in group]
        slots = self._empty_slots(len(rows), self._keeps_holes)
        slots.begin([len(readings[row].ids) if row in readings else 0 for row in rows])
        logits: dict[int, torch.Tensor] = {}
        for group in groups:
            self._rows = group
            logits |= self.read({row: readings[row] for row in group if row in readings})
            if self._slots is not None:
                slots.take_in(self._slots, rows.index(group[0]))
            self._slots = None
        self._rows, self._slots, self.last_shape = rows, slots, None
        return logits

    def _read_prompts(self, prompts: Prompts) -> None:
        """Reads all prompts as `generate` itself would: rows end at the same slot, as they do after any pass."""
        self._slots = self._empty_slots(len(prompts.ids), keeps_holes=False)
        cache = self._slots.cache
        inputs = first_inputs(self.model, prompts.input_ids.to(self.device), cache, prompts.model_kwargs)
        logits = self.model(**inputs).logits
        self._after_prompt = logits[:, -1:].to(self.device)
        self._slots.add([len(ids) for ids in prompts.ids], prompts.input_ids.shape[1], padded_left=True)
        if any(layer.is_initialized and layer.get_seq_length() != self._slots.count for layer in cache.layers):
            raise ValueError(
                f"{type(self.model).__name__} caches more than a slot for each token, which cannot be rolled back row "
                "by row: give a base that reads images in the place of tokens."
            )
        self._fixed = {row: len(ids) for row, ids in enumerate(prompts.ids)}
        self._fed = {row: prompts.ids[row] for row in self._rows}
        if (positions := inputs.get("position_ids")) is not None:
            lengths = torch.tensor([[len(ids)] for ids in prompts.ids], device=positions.device)
            self._shift = positions[..., -1:] + 1 - lengths
        self._rows = list(range(len(prompts.ids)))
        for row in set(self._rows) - self._there:  # Released before anything was read.
            self._drop(row)
        self.forward_passes += 1
        self.tokens_fed += sum(self._fixed.values())

    def _forward(self, kept: Sequence[int], new: Sequence[list[int]], logits_to_keep: int) -> torch.Tensor:
        """One pass over new ids, each row's behind its first `kept` ones.

        Rows are padded on the right, after every token that matters: on the left, padding would be a hole between a
        row's tokens, and in a first pass a position that attends to nothing, which some models answer with NaN.

        Returns:
            Logits of the last `logits_to_keep` columns, of shape (rows, logits_to_keep, vocab_size).
        """
        lengths = list(map(len, new))
        width = last = max(lengths)
        device = self.device
        call, slots = self.model, None
        if self.use_cache:
            slots = self._slots = self._slots or self._new_slots(max(kept) + width)
        is_static = isinstance(slots, StaticSlots) and width <= _STATIC_WIDTHS[-1]
        if isinstance(slots, StaticSlots):
            if is_static:
                width = _STATIC_WIDTHS[bisect_left(_STATIC_WIDTHS, width)]
                call = self._call_for(slots, width)
            slots.reserve(width)
        if call is self.model or self._compiled[width] > _WARM_UP:
            self.last_shape = (len(new), width)
        else:
            self.last_shape = None
        numbers = array("q")
        for ids in new:
            numbers.extend(ids + (ids[-1:] or [0]) * (width - len(ids)))
        for n, ids in zip(kept, new, strict=True):
            last_place = n + max(len(ids) - 1, 0)
            numbers.extend([*range(n, last_place), *[last_place] * (width - last_place + n)])
        transferred = torch.frombuffer(numbers, dtype=torch.long).to(device, non_blocking=True)  # Together.
        input_ids, position_ids = transferred.view(2, len(new), width).unbind()
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self._takes_positions:
            inputs["position_ids"] = position_ids
            if self._shift is not None:
                inputs["position_ids"] = position_ids + self._shift[..., self._rows, :]
        if self._takes_logits_to_keep:
            # All of a static pass, so that no graph depends on how many are wanted.
            inputs["logits_to_keep"] = width if is_static else logits_to_keep
        if slots is not None:
            inputs[str(self._cache_argument)] = slots.cache
            if (mask := slots.mask(width)) is not None:
                inputs["attention_mask"] = mask.to(device, non_blocking=True).long()
        output = call(**inputs, use_cache=self.use_cache)
        logits = output.logits
        if slots is not None:
            if isinstance(slots, CopiedSlots):
                slots.cache = cache_of(output)
            slots.add(lengths, width)
        if call is not self.model:
            logits = logits.clone()  # The next call may write where this one has written.
        if logits.shape[1] > logits_to_keep:
            logits = logits[:, logits.shape[1] - (width - last) - logits_to_keep :][:, :logits_to_keep]
        return logits.to(device)

    def _empty_slots(self, rows: int, keeps_holes: bool) -> Slots:
        if self._copies_cache:
            assert rows == 1, "rows share no cache of a model's own kind"
            return CopiedSlots()
        kind = StatefulSlots if self.keeps_state else Slots
        return kind(rows, keeps_holes, lambda: new_cache(self.model))

    def _new_slots(self, tokens: int) -> Slots:
        """For rows whose longest is to have so many tokens after the first pass."""
        rows = len(self._rows)
        if self._static is None:
            return self._empty_slots(rows, self._keeps_holes)
        capacity = most_slots(tokens + self._static.new_tokens) + _STATIC_WIDTHS[-1]
        capacity = math.ceil(capacity / _STATIC_STEP) * _STATIC_STEP
        slots = borrow_static_slots(self.model, rows, self._keeps_holes, capacity)
        self._compiled_model = compiled_call(self.model, slots.cache, self._static.generation_config)
        return slots

    def _call_for(self, slots: StaticSlots, width: int) -> Any:
        """The model, compiled if it is to be, for a pass of that width."""
        if self._compiled_model is None or not slots.is_allocated:  # Allocating cannot be compiled.
            return self.model
        self._compiled[width] += 1
        return self._compiled_model

    def _roll_back(self, kept: Sequence[int]) -> None:
        """Takes all but its first `kept` tokens out of each row."""
        if self._slots is not None:
            rejected = [len(self._fed[row]) - n for row, n in zip(self._rows, kept, strict=True)]
            self._slots.take_back(rejected)
            for row, n, less in zip(self._rows, kept, rejected, strict=True):
                if less:
                    self._fed[row] = self._fed[row][:n]


class SeparateRows:
    """Texts of several rows, each with a cache of its own. To its callers it is a `CachedLM`.

    Args:
        model, rows: as of a [`CachedLM`].
    """

    kind_of_cache = "separate"

    def __init__(self, model: Any, rows: int):
        self.model = model
        self._lms = {row: CachedLM(model, 1) for row in range(rows)}
        self.device = input_device(model)
        self.keeps_state = any(lm.keeps_state for lm in self._lms.values())
        self.last_shape: tuple[int, int] | None = None

    @property
    def forward_passes(self) -> int:
        return sum(lm.forward_passes for lm in self._lms.values())

    @property
    def tokens_fed(self) -> int:
        return sum(lm.tokens_fed for lm in self._lms.values())

    def unread(self, row: int, ids: list[int]) -> int:
        """As [`CachedLM.unread`]."""
        return self._lms[row].unread(0, ids)

    def release(self, row: int) -> None:
        """Forgets a row that will not read again."""
        self._lms[row].release(0)

    def read(self, readings: Mapping[int, Reading]) -> dict[int, torch.Tensor]:
        """As [`CachedLM.read`], in a pass for each row."""
        logits = {}
        for row, reading in readings.items():
            own = self._lms[row].read({0: reading})
            if reading.keep:
                logits[row] = own[0]
        shapes = [self._lms[row].last_shape for row in readings]
        self.last_shape = None if None in shapes else (len(shapes), max(shape[1] for shape in shapes if shape))
        return logits


def cached_lm(
    model: Any, rows: int, use_cache: bool = True, prompts: Prompts | None = None, static: Static | None = None
) -> CachedLM | SeparateRows:
    """A [`CachedLM`] with these arguments, or where the rows of a model may not share a cache its like."""
    use_cache = use_cache and cache_argument(model) is not None
    if use_cache and prompts is None and reading_mode(model).rows is Rows.ALONE:
        return SeparateRows(model, rows)
    return CachedLM(model, rows, use_cache, prompts, static)


def _of_like_length(lengths: Mapping[int, int], most: int, exactly: bool) -> list[list[int]]:
    """Rows, longest first, in groups that come to at most so many tokens, padding included; a longer row is alone.

    Args:
        exactly: whether the rows of a group must be of the same length.
    """
    groups: list[list[int]] = []
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= most and (not exactly or lengths[row] == longest):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids the two lists begin with in common; by slices, which compare faster than a loop."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return bisect_left(range(1, most + 1), True, key=lambda n: a[:n] != b[:n])
