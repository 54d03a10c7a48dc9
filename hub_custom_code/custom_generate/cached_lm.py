"""One causal LM with its KV cache, which extends and rolls back each row of a batch on its own. It sees no text."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from .cache_layers import has_recurrent_state, new_cache
from .copied_cache import CopiedSlots
from .kv_cache import Slots, StaticSlots, borrow_static_slots, give_back_static_slots, max_slots
from .reading_mode import reading_mode, supports_row_rollback
from .state_cache import StatefulSlots
from .transformers_private import (
    accepted_arguments,
    cache_argument,
    cache_of,
    compiled_call,
    first_inputs,
    input_device,
    uses_position_ids_only,
)

# With a recurrent state, at most so many new settled tokens share a pass with the draft after them. More are
# read in a pass of their own.
_MAX_SETTLED_WITH_DRAFT = 16
_MAX_LOGIT_COLUMNS = 64  # If a pass needs more columns of logits, a second pass is worth its time to save them.
# A prefill of more tokens, padding included, is split into passes over rows of similar length. From this size on, each
# further token takes a CPU the same time, so less padding saves time. An accelerator needs larger passes.
_MAX_PREFILL_TOKENS, _MAX_PREFILL_TOKENS_ON_CPU = 2048, 256
_STATIC_WIDTHS = (1, 5, 9, 17, 33)  # Pass widths over a static cache. They are few, because each is compiled.
_STATIC_LENGTH_STEP = 512  # Static cache lengths are multiples of this, so that prompts of many lengths share a cache.
_NUM_SLOW_PASSES = 2  # The first passes of a compiled width are slow: one compiles, one records a CUDA graph.


class Reading(NamedTuple):
    """What one row is to read.

    Args:
        ids: the row's whole text, without padding.
        keep: the number of last ids whose logits are wanted.
        settled: the number of ids that are sure to stay, if it is known. A model with a recurrent state saves the
            state there or before.
    """

    ids: list[int]
    keep: int
    settled: int | None = None


class MultimodalPrompts(NamedTuple):
    """The prompts of all rows as `generate` prepared them, where they are more than ids (with images, for example).

    Args:
        ids: the ids of each prompt, without padding.
        input_ids: the same ids with left padding, of shape (rows, width).
        model_kwargs: the other arguments of the first forward pass, such as `attention_mask` and `position_ids`.
    """

    ids: list[list[int]]
    input_ids: torch.Tensor
    model_kwargs: dict[str, Any]


class StaticCacheSettings(NamedTuple):
    """The settings of a static cache, over which passes may be compiled.

    Args:
        max_new_tokens: about how many tokens are written at most.
        generation_config: says whether and how passes are compiled, as in `generate`.
        places: how many rows there can be at once, if that is more than there are at first.
    """

    max_new_tokens: int
    generation_config: GenerationConfig
    places: int = 0


class CachedLM:
    """A causal LM that reads the texts of several rows. What a row shares with its last text is not read again.

    Args:
        model: a `PreTrainedModel` with a causal LM head.
        rows: the number of rows at first, which are numbered from 0. More can be admitted.
        use_cache: whether to use a cache. Without it, each pass reads the whole texts.
        prompts: what the texts begin with, if that is more than ids. These prompts are read in a pass of their own
            and are never rolled back, so a cache is required.
        static: the settings of a static cache, if one is wanted.

    Attributes:
        forward_passes (`int`): the number of forward passes so far.
        tokens_fed (`int`): the number of tokens that all rows have read so far, without padding.
        last_shape (`tuple[int, int]`, *optional*): rows and tokens per row, padding included, of the last `read`.
            `None` if its time says nothing about later ones: it took several passes with padding, or a pass that was
            being compiled.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        use_cache: bool = True,
        prompts: MultimodalPrompts | None = None,
        static: StaticCacheSettings | None = None,
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
        self._active_rows = set(range(rows))  # Those not released. A static cache keeps the others too.
        # In the order of the cache's batch dimension. A dynamic cache has a row from its first reading on.
        self._rows = list(range(rows)) if static is not None or prompts is not None else []
        if static is not None:  # Negative numbers stand for free places.
            self._rows += range(rows - static.places, 0)
        self._cached_ids: dict[int, list[int]] = {row: [] for row in {*self._rows, *range(rows)}}
        self._allows_holes = prompts is None and uses_position_ids_only(model)
        self._copies_cache = self.use_cache and not supports_row_rollback(model)
        self.has_recurrent_state = self._copies_cache or (self.use_cache and has_recurrent_state(model))
        self._slots: Slots | None = None  # Before the first pass and after the last row.
        self._static = static
        self._compiled_call: Any = None  # If passes are compiled.
        self._compiled_passes: Counter[int] = Counter()  # Their number for each width.
        self._prompts = prompts
        self._num_permanent: dict[int, int] = {}  # Each row's first ids that are never rolled back.
        self._prompt_logits: torch.Tensor | None = None  # After multimodal prompts, of shape (rows, 1, vocab_size).
        # The first position after a multimodal prompt minus its number of ids, of shape (..., rows, 1). An image may
        # take fewer positions than ids, and a position may have several axes.
        self._position_offset: torch.Tensor | None = None

    @property
    def cache_kind(self) -> str:
        """The kind of cache, on which the time of a pass depends."""
        return "none" if not self.use_cache else "dynamic" if self._static is None else "static"

    def num_unread(self, row: int, ids: list[int]) -> int:
        """The number of tokens that a row must read to have read this text, if none of it will be rolled back."""
        read = common_prefix(self._cached_ids[row], ids)
        if read and isinstance(self._slots, StatefulSlots):
            read = self._slots.rollback_length(self._rows.index(row), read)
        return len(ids) - read

    def admit(self, row: int) -> None:
        """Lets a new row join the others. The number of a row that was released is not used again.

        A static cache has a fixed number of places, and the new row takes a free one.
        """
        assert self._prompts is None and not self._num_permanent, "multimodal prompts are read in one pass"
        if self._static is not None and self.use_cache:
            place = next(i for i, other in enumerate(self._rows) if other not in self._active_rows)
            # The ids stay until the next reading rolls them back.
            self._cached_ids[row] = self._cached_ids.pop(self._rows[place])
            self._rows[place] = row
        else:
            self._cached_ids[row] = []
        self._active_rows.add(row)

    def release(self, row: int) -> None:
        """Forgets a row that will not read again."""
        self._active_rows.remove(row)
        if not self._active_rows and isinstance(self._slots, StaticSlots):
            give_back_static_slots(self.model, self._slots)
            self._slots = None
            self._cached_ids = {row: [] for row in self._rows}
        elif self._static is None:
            self._drop_row(row)

    def _drop_row(self, row: int) -> None:
        """Drops a row from the cache and moves the last row to its place."""
        del self._cached_ids[row]
        if row not in self._rows:
            return
        place = self._rows.index(row)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        if not self._rows:
            self._slots = None
        elif self._slots is not None:
            self._slots.drop_row(place)

    def read(self, readings: Mapping[int, Reading]) -> dict[int, torch.Tensor]:
        """Reads texts in one forward pass, or in several where long prompts or recurrent states need it.

        Args:
            readings: the whole text of each row that is to read. Whatever the row has read beyond the common prefix
                of its last text and this one is rolled back.

        Returns:
            The logits after the last `keep` ids, of shape (keep, vocab_size), for each row that wants some.
        """
        if self._prompts is not None:
            self._read_prompts(self._prompts)
            self._prompts = None
        if self.use_cache and (newcomers := [row for row in readings if row not in self._rows]):
            return self._read_with_newcomers(readings, newcomers)
        rows = self._rows if self.use_cache else list(readings)
        kept = []
        for row in rows:
            cached = self._cached_ids[row] if self.use_cache else []
            kept.append(len(cached))
            if row in readings:
                ids, keep, _ = readings[row]
                kept[-1] = max(min(common_prefix(cached, ids), len(ids) - keep), self._num_permanent.get(row, 0))
                if isinstance(self._slots, StatefulSlots):
                    kept[-1] = self._slots.rollback_length(self._rows.index(row), kept[-1])
        new = {row: readings[row].ids[n:] if row in readings else [] for row, n in zip(rows, kept, strict=True)}
        width = max(map(len, new.values()))
        if self.has_recurrent_state:
            return self._read_without_padding(readings, kept, new)
        # The columns of each row's logits. Column -1 is the end of a multimodal prompt, whose logits are kept.
        wanted = {row: range(len(new[row]) - keep, len(new[row])) for row, (_, keep, _) in readings.items() if keep}
        first = min((each.start for each in wanted.values()), default=width - 1)
        if self.use_cache and width - first > _MAX_LOGIT_COLUMNS and any(each.start > 0 for each in wanted.values()):
            # The prompts have very different lengths. All but their last tokens are read first, without logits.
            late = [row for row, each in wanted.items() if each.start > 0]
            self.read({row: Reading(readings[row].ids[: -len(wanted[row])], 0) for row in late})
            logits_of_row = self.read(readings)
            self.last_shape = None
            return logits_of_row

        self._roll_back(kept)
        columns = []
        if first < 0:
            assert self._prompt_logits is not None
            columns.append(self._prompt_logits[rows])
        if width:
            columns.append(self._forward(kept, list(new.values()), width - max(0, first)))
            self.forward_passes += 1
            self.tokens_fed += sum(map(len, new.values()))
        logits = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
        if self.use_cache:
            for row in readings:
                self._cached_ids[row] = readings[row].ids
        own = dict(zip(rows, logits.unbind(), strict=True))
        return {
            row: own[row] if len(each) == width - first else own[row][each.start - first : each.stop - first]
            for row, each in wanted.items()
        }

    def _read_without_padding(
        self, readings: Mapping[int, Reading], kept: list[int], new: Mapping[int, list[int]]
    ) -> dict[int, torch.Tensor]:
        """Reads the new ids in passes in which each row reads either the same number of ids or none.

        Padding would be merged into a recurrent state. A row that has read all its ids sits out the later passes.

        Args:
            kept: how many ids each row of the cache keeps.
            new: the ids that each row reads after them.
        """
        self._roll_back(kept)
        if self._slots is None:
            self._slots = self._empty_slots(len(self._rows), self._allows_holes)
        slots = self._slots
        assert isinstance(slots, StatefulSlots)
        place_of = {row: place for place, row in enumerate(self._rows)}
        done = dict(zip(self._rows, kept, strict=True))
        remaining = {row: self._split_reading(readings[row], done[row]) for row in readings if new[row]}
        columns: dict[int, list[torch.Tensor]] = {row: [] for row in readings}
        if self._prompt_logits is not None:
            for row, (ids, keep, _) in readings.items():
                if keep and len(ids) - keep < done[row]:
                    columns[row].append(self._prompt_logits[row])
        passes = 0
        while remaining:
            width = min(parts[0] for parts in remaining.values())
            if slots.count and reading_mode(self.model).one_token_per_pass:
                width = 1
            slots.save_before_pass({place_of[row]: self._num_settled(readings[row]) for row in remaining})
            fed = {row: readings[row].ids[done[row] : done[row] + width] for row in remaining}
            first_wanted = {row: len(readings[row].ids) - readings[row].keep - done[row] for row in remaining}
            keep = max(1, width - max(0, min(first_wanted.values())))
            logits = self._forward([done[row] for row in self._rows], [fed.get(row, []) for row in self._rows], keep)
            self.forward_passes += 1
            self.tokens_fed += width * len(remaining)
            passes += 1
            for row in list(remaining):
                if (start := max(0, first_wanted[row])) < width:
                    columns[row].append(logits[place_of[row], logits.shape[1] - width + start :])
                done[row] += width
                self._cached_ids[row] = readings[row].ids[: done[row]]
                remaining[row][0] -= width
                if not remaining[row][0]:
                    remaining[row].pop(0)
                if not remaining[row]:
                    del remaining[row]
        if passes != 1:
            self.last_shape = (len(readings), max(map(len, new.values())))
        return {row: torch.cat(each) for row, each in columns.items() if each}

    def _split_reading(self, reading: Reading, done: int) -> list[int]:
        """The numbers of new ids that a row reads in turn: all of them at once, or the settled ones first if many.

        Settled ids that share a pass with a draft must be read again if the draft is rejected.
        """
        rest = len(reading.ids) - done
        settled = min(self._num_settled(reading), len(reading.ids) - reading.keep) - done
        return [settled, rest - settled] if _MAX_SETTLED_WITH_DRAFT < settled < rest else [rest]

    @staticmethod
    def _num_settled(reading: Reading) -> int:
        return len(reading.ids) if reading.settled is None else reading.settled

    def _read_with_newcomers(self, readings: Mapping[int, Reading], newcomers: list[int]) -> dict[int, torch.Tensor]:
        """Reads the first texts of new rows in passes of their own, and then the texts of the other rows.

        New rows of similar length share a pass. Their slots are then copied behind those of the rows before them.
        """
        max_tokens = _MAX_PREFILL_TOKENS_ON_CPU if self.device.type == "cpu" else _MAX_PREFILL_TOKENS
        lengths = {row: len(readings[row].ids) for row in newcomers}
        groups = _grouped_by_length(lengths, max_tokens, same_length=self.has_recurrent_state)
        others = {row: reading for row, reading in readings.items() if row in self._rows}
        logits: dict[int, torch.Tensor] = {}
        if self._rows or len(groups) > 1:
            rows, slots = self._rows, self._slots or self._empty_slots(0, self._allows_holes)
            for group in groups:
                self._hold(group, None)
                logits |= self.read({row: readings[row] for row in group})
                assert self._slots is not None
                slots.append_rows(self._slots)
                rows = rows + group
            self._hold(rows, slots)
        else:
            self._rows = newcomers
            logits = self.read(readings)
        if others:
            logits |= self.read(others)
        if others or len(groups) > 1:
            self.last_shape = None
        return logits

    def _hold(self, rows: list[int], slots: Slots | None) -> None:
        self._rows, self._slots = rows, slots

    def _read_prompts(self, prompts: MultimodalPrompts) -> None:
        """Reads all prompts as `generate` would. They have left padding, so that all rows end at the same slot."""
        self._slots = self._empty_slots(len(prompts.ids), allows_holes=False)
        cache = self._slots.cache
        inputs = first_inputs(self.model, prompts.input_ids.to(self.device), cache, prompts.model_kwargs)
        logits = self.model(**inputs).logits
        self._prompt_logits = logits[:, -1:].to(self.device)
        self._slots.record_pass([len(ids) for ids in prompts.ids], prompts.input_ids.shape[1], padded_left=True)
        if any(layer.is_initialized and layer.get_seq_length() != self._slots.count for layer in cache.layers):
            raise ValueError(
                f"{type(self.model).__name__} caches more than one slot for each token, so its rows cannot be rolled "
                "back: give a base that reads images in the place of tokens."
            )
        self._num_permanent = {row: len(ids) for row, ids in enumerate(prompts.ids)}
        self._cached_ids = dict(enumerate(prompts.ids))
        if (positions := inputs.get("position_ids")) is not None:
            lengths = torch.tensor([[len(ids)] for ids in prompts.ids], device=positions.device)
            self._position_offset = positions[..., -1:] + 1 - lengths
        self._rows = list(range(len(prompts.ids)))
        for row in set(self._rows) - self._active_rows:  # They were released before the first pass.
            self._drop_row(row)
        self.forward_passes += 1
        self.tokens_fed += sum(self._num_permanent.values())

    def _forward(self, kept: Sequence[int], new: Sequence[list[int]], logits_to_keep: int) -> torch.Tensor:
        """Makes one forward pass over new ids, which in each row follow its first `kept` ids.

        New ids have right padding, which comes after every token that matters. Left padding would be a hole between a
        row's tokens, and in a first pass a position that attends to nothing, for which some models compute NaN.

        Returns:
            The logits of the last `logits_to_keep` columns, of shape (rows, logits_to_keep, vocab_size).
        """
        lengths = list(map(len, new))
        width = longest = max(lengths)
        device = self.device
        call, slots = self.model, None
        if self.use_cache:
            slots = self._slots = self._slots or self._new_slots(max(kept) + width)
        is_static = isinstance(slots, StaticSlots) and width <= _STATIC_WIDTHS[-1]
        if isinstance(slots, StaticSlots):
            if is_static:
                width = _STATIC_WIDTHS[bisect_left(_STATIC_WIDTHS, width)]
                if self._compiled_call is not None and slots.is_initialized:  # Allocating cannot be compiled.
                    call = self._compiled_call
                    self._compiled_passes[width] += 1
            slots.reserve(width)
        if call is self.model or self._compiled_passes[width] > _NUM_SLOW_PASSES:
            self.last_shape = (len(new), width)
        else:
            self.last_shape = None
        numbers = array("q")
        for ids in new:
            numbers.extend(ids + (ids[-1:] or [0]) * (width - len(ids)))
        for n, ids in zip(kept, new, strict=True):
            last_place = n + max(len(ids) - 1, 0)
            numbers.extend([*range(n, last_place), *[last_place] * (width - last_place + n)])
        # Ids and positions go to the device in one transfer.
        transferred = torch.frombuffer(numbers, dtype=torch.long).to(device, non_blocking=True)
        input_ids, position_ids = transferred.view(2, len(new), width).unbind()
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self._takes_positions:
            inputs["position_ids"] = position_ids
            if self._position_offset is not None:
                inputs["position_ids"] = position_ids + self._position_offset[..., self._rows, :]
        if self._takes_logits_to_keep:
            # A static pass keeps all of them, so that its graph does not depend on how many are wanted.
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
            slots.record_pass(lengths, width)
        if call is not self.model:
            logits = logits.clone()  # The next compiled call may reuse the memory of this one's output.
        if logits.shape[1] > logits_to_keep:
            logits = logits[:, logits.shape[1] - (width - longest) - logits_to_keep :][:, :logits_to_keep]
        return logits.to(device)

    def _empty_slots(self, rows: int, allows_holes: bool) -> Slots:
        if self._copies_cache:
            assert rows == 1, "rows cannot share a cache of a model's own class"
            return CopiedSlots()
        kind = StatefulSlots if self.has_recurrent_state else Slots
        return kind(rows, allows_holes, lambda: new_cache(self.model))

    def _new_slots(self, tokens: int) -> Slots:
        """Makes the slots of all rows, of which the longest will have so many tokens after the first pass."""
        rows = len(self._rows)
        if self._static is None:
            return self._empty_slots(rows, self._allows_holes)
        length = max_slots(tokens + self._static.max_new_tokens) + _STATIC_WIDTHS[-1]
        length = math.ceil(length / _STATIC_LENGTH_STEP) * _STATIC_LENGTH_STEP
        slots = borrow_static_slots(self.model, rows, self._allows_holes, length)
        self._compiled_call = compiled_call(self.model, slots.cache, self._static.generation_config)
        return slots

    def _roll_back(self, kept: Sequence[int]) -> None:
        """Rolls each row back to its first `kept` tokens."""
        if self._slots is not None:
            rejected = [len(self._cached_ids[row]) - n for row, n in zip(self._rows, kept, strict=True)]
            self._slots.roll_back(rejected)
            for row, n, removed in zip(self._rows, kept, rejected, strict=True):
                if removed:
                    self._cached_ids[row] = self._cached_ids[row][:n]


class SeparateRows:
    """Rows with a cache each, for a model whose rows cannot share one. It is used like a [`CachedLM`].

    Args:
        model: a `PreTrainedModel` with a causal LM head.
        rows: the number of rows, which are numbered from 0.
    """

    cache_kind = "separate"

    def __init__(self, model: Any, rows: int):
        self.model = model
        self._lms = {row: CachedLM(model, 1) for row in range(rows)}
        self.device = input_device(model)
        self.has_recurrent_state = CachedLM(model, 0).has_recurrent_state
        self.last_shape: tuple[int, int] | None = None
        self.forward_passes = 0
        self.tokens_fed = 0

    def num_unread(self, row: int, ids: list[int]) -> int:
        """See [`CachedLM.num_unread`]."""
        return self._lms[row].num_unread(0, ids)

    def admit(self, row: int) -> None:
        """Lets a new row join the others."""
        self._lms[row] = CachedLM(self.model, 1)

    def release(self, row: int) -> None:
        """Forgets a row that will not read again."""
        del self._lms[row]

    def read(self, readings: Mapping[int, Reading]) -> dict[int, torch.Tensor]:
        """Reads texts as [`CachedLM.read`] does, with a forward pass for each row."""
        logits = {}
        for row, reading in readings.items():
            lm = self._lms[row]
            passes, fed = lm.forward_passes, lm.tokens_fed
            own = lm.read({0: reading})
            self.forward_passes += lm.forward_passes - passes
            self.tokens_fed += lm.tokens_fed - fed
            if reading.keep:
                logits[row] = own[0]
        shapes = [self._lms[row].last_shape for row in readings]
        self.last_shape = None if None in shapes else (len(shapes), max(shape[1] for shape in shapes if shape))
        return logits


def cached_lm(
    model: Any,
    rows: int,
    use_cache: bool = True,
    prompts: MultimodalPrompts | None = None,
    static: StaticCacheSettings | None = None,
) -> CachedLM | SeparateRows:
    """Makes a [`CachedLM`] with these arguments, or [`SeparateRows`] for a model whose rows cannot share a cache."""
    use_cache = use_cache and cache_argument(model) is not None
    if use_cache and prompts is None and not reading_mode(model).rows_share_cache:
        return SeparateRows(model, rows)
    return CachedLM(model, rows, use_cache, prompts, static)


def _grouped_by_length(lengths: Mapping[int, int], max_tokens: int, same_length: bool) -> list[list[int]]:
    """Groups rows, longest first, so that each group has at most `max_tokens` tokens, padding included.

    A row that is longer than that has a group of its own.

    Args:
        lengths: the number of tokens of each row.
        same_length: whether the rows of a group must have the same length.
    """
    groups: list[list[int]] = []
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        longest = lengths[groups[-1][0]] if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= max_tokens
        if fits and (not same_length or lengths[row] == longest):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def common_prefix(a: list[int], b: list[int]) -> int:
    """The length of the common prefix of two lists of ids. Slices are compared, which is faster than a loop."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return bisect_left(range(1, shorter + 1), True, key=lambda n: a[:n] != b[:n])
