"""The slots of a batch's KV cache, and which of them hold a token of each row. It knows no ids and no forward pass.

Rows of a batch keep different numbers of tokens after each pass. The slots of what a row rejects are *holes*: the mask
leaves them out, and what all rows reject at the end is cropped. Where holes have become a share of all slots, the
cache is *realigned*: each row's keys and values are moved together, to end at the same slot. So most passes copy
nothing. Models that tell distances by counting slots, past a sliding window say, are realigned before every pass.
Nor does a pass copy what it adds to: a cache has room behind its last slot, and is copied where that is used up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from .cache_layers import RoomyLayer, take_slots

_MOST, _SPARE = 1.25, 64  # Slots a token of the longest row, and besides: with more, the cache is realigned.


class Slots:
    """A cache that grows as it is filled.

    Args:
        rows: of the batch.
        keeps_holes: whether there may be holes between the tokens of a row.
        new_cache: makes an empty cache.

    Attributes:
        cache (`Cache`): what the model is given.
        count (`int`): how many slots are taken.
    """

    cache: Cache

    def __init__(self, rows: int, keeps_holes: bool, new_cache: Callable[[], Cache]):
        self.keeps_holes = keeps_holes
        self._new_cache = new_cache
        self.lengths = [0] * rows  # Tokens of each row.
        self.count = 0
        # Which slots hold a token, of shape (rows, count), on the CPU; `None` where all do.
        self._used: torch.Tensor | None = None
        self._clear()

    def mask(self, width: int) -> torch.Tensor | None:
        """The attention mask of a pass over `width` more tokens, of shape (rows, slots), bool, on the CPU.

        `None` where nothing is to be left out.
        """
        return None if self._used is None else self._seen(width)

    def add(self, lengths: Sequence[int], width: int, padded_left: bool = False) -> None:
        """Takes note of what a pass of some width has put into the cache: rows of these lengths, and padding."""
        if self._used is not None or min(lengths) < width:
            columns, ends = torch.arange(width), torch.tensor(lengths)[:, None]
            added = columns >= width - ends if padded_left else columns < ends
            self._used = torch.cat([self._taken(), added], dim=1)
        self.lengths = [n + more for n, more in zip(self.lengths, lengths, strict=True)]
        self.count += width

    def take_back(self, rejected: Sequence[int]) -> None:
        """Takes its last tokens out of each row, that many, and drops slots that no row uses."""
        if self._used is None and not any(rejected):
            return
        self.lengths = [n - less for n, less in zip(self.lengths, rejected, strict=True)]
        longest = max(self.lengths)
        if longest == 0:
            self.count, self._used = 0, None
            self._clear()
            return
        if self._used is None and min(rejected) == max(rejected):
            self._crop(rejected[0])
            return
        used = self._taken()
        from_end = used.flip(1).cumsum(1).flip(1)  # How many tokens stand in a slot and behind it.
        self._used = used & (from_end > torch.tensor(rejected)[:, None])
        is_used = self._used.any(dim=0)
        self._crop(int(is_used.flip(0).int().argmax()))
        if not self.keeps_holes or self.count > most_slots(longest):
            self._realign(longest)
        if self._used is not None and self._used.all():
            self._used = None

    def begin(self, lengths: Sequence[int]) -> None:
        """Makes place in an empty cache for rows of these lengths, which `take_in` fills; all end at the same slot."""
        self.lengths, self.count = list(lengths), max(lengths)
        self._used = torch.arange(self.count) >= self.count - torch.tensor(self.lengths)[:, None]

    def take_in(self, part: Slots, row: int) -> None:
        """Takes the rows of another batch as its own from `row` on."""
        taken = [used.nonzero()[:, 0] for used in part._taken()]
        for i, layer in enumerate(part.cache.layers):
            if i == len(self.cache.layers):
                self.cache.layers.append(RoomyLayer())
            if isinstance(layer, RoomyLayer) and layer.is_initialized:
                self.cache.layers[i].take_in(layer, taken, row, len(self.lengths), self.count)

    def drop(self, row: int) -> None:
        """Drops a row, whose place the last one takes."""
        for layer in self._filled_layers():
            layer.drop(row)
        self.lengths[row] = self.lengths[-1]
        self.lengths.pop()
        if self._used is not None:
            self._used[row] = self._used[-1]
            self._used = self._used[:-1]

    def _taken(self) -> torch.Tensor:
        return torch.ones(len(self.lengths), self.count, dtype=torch.bool) if self._used is None else self._used

    def _seen(self, width: int) -> torch.Tensor:
        return torch.cat([self._taken(), torch.ones(len(self.lengths), width, dtype=torch.bool)], dim=1)

    def _crop(self, slots: int) -> None:
        """Drops the last slots."""
        if slots:
            self._crop_cache(slots)
            self.count -= slots
            self._used = None if self._used is None else self._used[:, : self.count]

    def _realign(self, longest: int) -> None:
        """Moves each row's tokens together, to end at the same slot."""
        assert self._used is not None
        if longest == self.count and all(
            used[self.count - n :].all() for used, n in zip(self._used, self.lengths, strict=True)
        ):
            return  # They stand so.
        # A stable sort by use puts a row's tokens behind its holes, in their order.
        self._move(self._used.int().argsort(dim=1, stable=True)[:, self.count - longest :])
        self.count = longest
        self._used = torch.arange(longest) >= longest - torch.tensor(self.lengths)[:, None]

    # What differs where the cache is of a fixed size.

    def _clear(self) -> None:
        self.cache = self._new_cache()

    def _crop_cache(self, slots: int) -> None:
        for layer in self._filled_layers():
            layer.crop(-slots)

    def _move(self, source: torch.Tensor) -> None:
        """Makes slot j of row i what slot source[i, j] was, and drops all after them."""
        for layer in self._filled_layers():
            layer.move(source)

    def _filled_layers(self) -> list[RoomyLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, RoomyLayer) and layer.is_initialized]


class StaticSlots(Slots):
    """A cache whose tensors stay where they are, and of the size that they are, for passes that are compiled.

    Rows do not leave it, and passes are told of all its slots. It grows only where the texts become longer than was
    foreseen, for which passes must be compiled anew.

    Args:
        layers: of the model.
        capacity: how many slots there are.
    """

    def __init__(self, rows: int, keeps_holes: bool, layers: int, capacity: int):
        self.capacity = capacity
        self._layers = [StaticLayer(capacity) for _ in range(layers)]
        super().__init__(rows, keeps_holes, lambda: Cache(layers=self._layers))

    def mask(self, width: int) -> torch.Tensor:
        seen = self._seen(width)
        return torch.nn.functional.pad(seen, (0, self.capacity - seen.shape[1]))

    def reserve(self, width: int) -> None:
        """Sees to it that `width` more slots are there."""
        if self.count + width > self.capacity:
            self.capacity = 2 * (self.count + width)
            grown = [StaticLayer(self.capacity) for _ in self._layers]
            for new, old in zip(grown, self._layers, strict=True):
                if old.is_initialized:
                    new.update(old.keys[:, :, : self.count], old.values[:, :, : self.count])
            self._layers = grown
            self.cache = Cache(layers=grown)

    @property
    def is_allocated(self) -> bool:
        return bool(self._layers[0].is_initialized)

    @property
    def is_of_inference_mode(self) -> bool:
        """Whether its tensors were made under `torch.inference_mode`."""
        return self.is_allocated and bool(self._layers[0].keys.is_inference())

    @property
    def is_usable(self) -> bool:
        """Whether its tensors may be written to in the mode that torch is in."""
        return torch.is_inference_mode_enabled() or not self.is_of_inference_mode

    def restart(self) -> None:
        """Forgets all rows."""
        self.take_back(self.lengths)

    def _clear(self) -> None:
        for layer in self._layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        super()._clear()

    def _crop_cache(self, slots: int) -> None:
        for layer in self._layers:
            if layer.is_initialized:
                layer.cumulative_length.sub_(slots)

    def _move(self, source: torch.Tensor) -> None:
        longest = source.shape[1]
        for layer in self._layers:
            if layer.is_initialized:
                layer.keys[:, :, :longest] = take_slots(layer.keys, source)
                layer.values[:, :, :longest] = take_slots(layer.values, source)
                layer.cumulative_length.fill_(longest)


_IDLE: WeakKeyDictionary[Any, list[StaticSlots]] = WeakKeyDictionary()
_LOCK = threading.Lock()  # Of `_IDLE`: what a thread has borrowed is its own.


def most_slots(tokens: int) -> int:
    """How many slots are taken at most before a pass, where no row is longer than that."""
    return int(_MOST * tokens) + _SPARE


def borrow_static_slots(model: Any, rows: int, keeps_holes: bool, capacity: int) -> StaticSlots:
    """Those that an earlier text of the model has left, as compiled passes know them, or new ones."""
    with _LOCK:
        idle = _IDLE.setdefault(model, [])
        for slots in idle:
            # What was made in inference mode cannot be written to outside of it.
            if len(slots.lengths) == rows and slots.capacity >= capacity and slots.is_usable:
                idle.remove(slots)
                return slots
    return StaticSlots(rows, keeps_holes, model.config.get_text_config().num_hidden_layers, capacity)


def give_back_static_slots(model: Any, slots: StaticSlots) -> None:
    """Leaves them to a later text; others of as many rows and of the same mode are let go."""
    slots.restart()
    kind = len(slots.lengths), slots.is_of_inference_mode
    with _LOCK:
        idle = _IDLE.setdefault(model, [])
        idle[:] = [other for other in idle if (len(other.lengths), other.is_of_inference_mode) != kind]
        idle.append(slots)
