"""The slots of a batch's KV cache: which of them hold a token of each row. It sees no token ids.

After each pass, the rows of a batch keep different numbers of tokens. The slots of rejected tokens become *holes*,
which the attention mask excludes. Slots at the end that no row uses are cropped. When holes make up too large a share
of all slots, the cache is *realigned*: each row's keys and values move together, and all rows end at the same slot.
Most passes therefore copy nothing. A model that counts slots to measure distances, as a sliding window does, is
realigned before every pass.

Layers have spare slots after the last one, so a pass does not copy the earlier keys and values either, until the
spare slots are used up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from .cache_layers import PreallocatedLayer, gather_slots

# The cache is realigned above 1.25 times the tokens of the longest row, plus 64 slots.
_MAX_SLOTS_PER_TOKEN, _EXTRA_SLOTS = 1.25, 64


class Slots:
    """The slots of a cache that grows as it is filled.

    Args:
        rows: how many rows the batch has.
        allows_holes: whether there may be holes between the tokens of a row.
        new_cache: makes an empty cache.

    Attributes:
        cache (`Cache`): the cache that the model is given.
        count (`int`): how many slots are in use.
        lengths (`list[int]`): how many tokens each row has.
    """

    cache: Cache

    def __init__(self, rows: int, allows_holes: bool, new_cache: Callable[[], Cache]):
        self.allows_holes = allows_holes
        self._new_cache = new_cache
        self.lengths = [0] * rows
        self.count = 0
        # Which slots hold a token, bool of shape (rows, count), on the CPU; `None` where all do.
        self._used: torch.Tensor | None = None
        self._clear()

    def mask(self, width: int) -> torch.Tensor | None:
        """The attention mask of a pass over `width` new tokens: bool of shape (rows, slots), on the CPU.

        `None` where nothing is masked.
        """
        return None if self._used is None else self._mask_with_new(width)

    def record_pass(self, lengths: Sequence[int], width: int, padded_left: bool = False) -> None:
        """Records that a pass has filled `width` slots.

        Args:
            lengths: how many of the new slots hold a token, for each row. The others are padding.
            padded_left: whether the padding comes before the tokens.
        """
        if self._used is not None or min(lengths) < width:
            columns, ends = torch.arange(width), torch.tensor(lengths)[:, None]
            added = columns >= width - ends if padded_left else columns < ends
            self._used = torch.cat([self._used_slots(), added], dim=1)
        self.lengths = [n + new for n, new in zip(self.lengths, lengths, strict=True)]
        self.count += width

    def roll_back(self, rejected: Sequence[int]) -> None:
        """Removes the last `rejected[i]` tokens of each row i, and drops slots that no row uses."""
        if self._used is None and not any(rejected):
            return
        self.lengths = [n - removed for n, removed in zip(self.lengths, rejected, strict=True)]
        longest = max(self.lengths)
        if longest == 0:
            self.count, self._used = 0, None
            self._clear()
            return
        if self._used is None and min(rejected) == max(rejected):
            self._crop(rejected[0])
            return
        used = self._used_slots()
        from_end = used.flip(1).cumsum(1).flip(1)  # How many tokens a row has in this slot and later ones.
        self._used = used & (from_end > torch.tensor(rejected)[:, None])
        is_used = self._used.any(dim=0)
        self._crop(int(is_used.flip(0).int().argmax()))
        if not self.allows_holes or self.count > max_slots(longest):
            self._realign(longest)
        if self._used is not None and self._used.all():
            self._used = None

    def append_rows(self, part: Slots) -> None:
        """Copies the rows of another batch behind those of this one. All rows end at the same slot.

        A row that is longer than the slots in use moves all earlier rows to later slots.
        """
        before, added = len(self.lengths), len(part.lengths)
        longest = max(self.count, *part.lengths)
        used = torch.zeros(before + added, longest, dtype=torch.bool)
        used[:before, longest - self.count :] = self._used_slots()
        used[before:] = torch.arange(longest) >= longest - torch.tensor(part.lengths)[:, None]
        kept = [own.nonzero()[:, 0] for own in part._used_slots()]
        for i, layer in enumerate(part.cache.layers):
            if i == len(self.cache.layers):
                self.cache.layers.append(PreallocatedLayer())
            if isinstance(layer, PreallocatedLayer) and layer.is_initialized:
                self.cache.layers[i].append_rows(layer, kept, before, longest)
        self.lengths += part.lengths
        self.count = longest
        self._used = None if used.all() else used

    def drop_row(self, row: int) -> None:
        """Drops a row and moves the last row to its place."""
        for layer in self._filled_layers():
            layer.drop_row(row)
        self.lengths[row] = self.lengths[-1]
        self.lengths.pop()
        if self._used is not None:
            self._used[row] = self._used[-1]
            self._used = self._used[:-1]

    def _used_slots(self) -> torch.Tensor:
        return torch.ones(len(self.lengths), self.count, dtype=torch.bool) if self._used is None else self._used

    def _mask_with_new(self, width: int) -> torch.Tensor:
        return torch.cat([self._used_slots(), torch.ones(len(self.lengths), width, dtype=torch.bool)], dim=1)

    def _crop(self, slots: int) -> None:
        """Drops the last slots."""
        if slots:
            self._crop_cache(slots)
            self.count -= slots
            self._used = None if self._used is None else self._used[:, : self.count]

    def _realign(self, longest: int) -> None:
        """Removes the holes: each row's tokens move together, so that all rows end at the same slot."""
        assert self._used is not None
        if longest == self.count and all(
            used[self.count - n :].all() for used, n in zip(self._used, self.lengths, strict=True)
        ):
            return  # The rows are aligned already.
        # A stable sort by use puts a row's tokens after its holes, and keeps their order.
        self._gather(self._used.int().argsort(dim=1, stable=True)[:, self.count - longest :])
        self.count = longest
        self._used = torch.arange(longest) >= longest - torch.tensor(self.lengths)[:, None]

    # `StaticSlots` overrides these methods.

    def _clear(self) -> None:
        self.cache = self._new_cache()

    def _crop_cache(self, slots: int) -> None:
        for layer in self._filled_layers():
            layer.crop(-slots)

    def _gather(self, source: torch.Tensor) -> None:
        """Moves slot source[i, j] of row i to slot j, and drops all later slots."""
        for layer in self._filled_layers():
            layer.gather(source)

    def _filled_layers(self) -> list[PreallocatedLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, PreallocatedLayer) and layer.is_initialized]


class StaticSlots(Slots):
    """The slots of a static cache, whose tensors keep their size and their memory for compiled passes.

    Rows do not leave it, and the attention mask covers all its slots. It grows only where texts become longer than
    was foreseen; passes must then be compiled anew.

    Args:
        num_layers: how many layers the model has.
        max_cache_len: how many slots there are.
    """

    def __init__(self, rows: int, allows_holes: bool, num_layers: int, max_cache_len: int):
        self.max_cache_len = max_cache_len
        self._layers = [StaticLayer(max_cache_len) for _ in range(num_layers)]
        super().__init__(rows, allows_holes, lambda: Cache(layers=self._layers))

    def mask(self, width: int) -> torch.Tensor:
        mask = self._mask_with_new(width)
        return torch.nn.functional.pad(mask, (0, self.max_cache_len - mask.shape[1]))

    def reserve(self, width: int) -> None:
        """Makes the cache large enough for `width` more slots."""
        if self.count + width > self.max_cache_len:
            self.max_cache_len = 2 * (self.count + width)
            grown = [StaticLayer(self.max_cache_len) for _ in self._layers]
            for new, old in zip(grown, self._layers, strict=True):
                if old.is_initialized:
                    new.update(old.keys[:, :, : self.count], old.values[:, :, : self.count])
            self._layers = grown
            self.cache = Cache(layers=grown)

    @property
    def is_initialized(self) -> bool:
        """Whether the tensors are allocated."""
        return bool(self._layers[0].is_initialized)

    @property
    def is_inference(self) -> bool:
        """Whether the tensors were allocated under `torch.inference_mode`."""
        return self.is_initialized and bool(self._layers[0].keys.is_inference())

    @property
    def is_writable(self) -> bool:
        """Whether the tensors may be written to now: those of inference mode may not, outside of it."""
        return torch.is_inference_mode_enabled() or not self.is_inference

    def reset(self) -> None:
        """Removes the tokens of all rows."""
        self.roll_back(self.lengths)

    def _clear(self) -> None:
        for layer in self._layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        super()._clear()

    def _crop_cache(self, slots: int) -> None:
        for layer in self._layers:
            if layer.is_initialized:
                layer.cumulative_length.sub_(slots)

    def _gather(self, source: torch.Tensor) -> None:
        longest = source.shape[1]
        for layer in self._layers:
            if layer.is_initialized:
                layer.keys[:, :, :longest] = gather_slots(layer.keys, source)
                layer.values[:, :, :longest] = gather_slots(layer.values, source)
                layer.cumulative_length.fill_(longest)


_IDLE: WeakKeyDictionary[Any, list[StaticSlots]] = WeakKeyDictionary()
_LOCK = threading.Lock()  # Protects `_IDLE`. Borrowed slots belong to the thread that borrowed them.


def max_slots(tokens: int) -> int:
    """How many slots may be in use before a pass, where the longest row has so many tokens."""
    return int(_MAX_SLOTS_PER_TOKEN * tokens) + _EXTRA_SLOTS


def borrow_static_slots(model: Any, rows: int, allows_holes: bool, max_cache_len: int) -> StaticSlots:
    """Takes idle slots of the model, for which passes are compiled already, or makes new ones."""
    with _LOCK:
        idle = _IDLE.setdefault(model, [])
        for slots in idle:
            if len(slots.lengths) == rows and slots.max_cache_len >= max_cache_len and slots.is_writable:
                idle.remove(slots)
                return slots
    return StaticSlots(rows, allows_holes, model.config.get_text_config().num_hidden_layers, max_cache_len)


def give_back_static_slots(model: Any, slots: StaticSlots) -> None:
    """Keeps slots for a later call, and frees idle ones with as many rows and the same inference mode."""
    slots.reset()
    kind = len(slots.lengths), slots.is_inference
    with _LOCK:
        idle = _IDLE.setdefault(model, [])
        idle[:] = [other for other in idle if (len(other.lengths), other.is_inference) != kind]
        idle.append(slots)
