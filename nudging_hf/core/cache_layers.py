"""The layers of a model's cache, with what rolling back needs. They know tensors, never ids or forward passes.

A layer keeps keys and values, one for each token, of which the last can be dropped (`RoomyLayer`), and with them the
keys of an index (`RoomyIndexedLayer`); or a state, in which all tokens are merged, so that an earlier one must have
been saved (the host's linear-attention layers); or both (`RoomyHybridLayer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .transformers_private import config_layers, set_states, states_of

_ROOM, _LEAST_ROOM = 1 / 16, 16  # For further slots: a share of those that are taken, and besides.


class RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, where the next ones are put without copying those that are there."""

    _count = 0  # How many slots are taken.
    _keys_room: torch.Tensor
    _values_room: torch.Tensor

    def get_seq_length(self, *args: Any) -> int:
        return self._count

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `DynamicLayer`: takes states of shape (rows, heads, new slots, head_dim), and returns those of all."""
        rows, _, width, _ = key_states.shape
        self._reserve(rows, self._count + width, key_states, value_states)
        self._keys_room[:, :, self._count : self._count + width] = key_states
        self._values_room[:, :, self._count : self._count + width] = value_states
        self._count += width
        self.keys, self.values = self._keys_room[:, :, : self._count], self._values_room[:, :, : self._count]
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """As in `DynamicLayer`, by a negative number; `keys` and `values` go by it after the next `update`."""
        if self.is_initialized:
            self._count += tokens_to_remove

    def take_in(self, part: Any, taken: Sequence[torch.Tensor], row: int, rows: int, slots: int) -> None:
        """Takes rows of another layer, `taken` of the slots of each, as its own from `row` on; all end at one slot.

        What stands before a row is 0: the mask gives it the weight 0, which would make NaN of an infinity.
        """
        self._reserve(rows, slots, part.keys, part.values)
        self._count = slots
        for room, states in ((self._keys_room, part.keys), (self._values_room, part.values)):
            _put_rows(room, states, taken, row, slots)

    def drop(self, row: int) -> None:
        """Drops a row, whose place the last one takes."""
        self._keys_room, self._values_room = _dropped(self._keys_room, row), _dropped(self._values_room, row)

    def move(self, source: torch.Tensor) -> None:
        """Makes slot j of row i what slot source[i, j] was, and drops all after them."""
        self._count = source.shape[1]
        for room in (self._keys_room, self._values_room):
            room[:, :, : self._count] = take_slots(room, source)

    def _reserve(self, rows: int, slots: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Sees to it that there is room for so many slots, of states like these."""
        if self.is_initialized and self._keys_room.shape[2] >= slots:
            return
        capacity = slots + int(_ROOM * slots) + _LEAST_ROOM
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._keys_room, self._values_room = keys[:, :, :0], values[:, :, :0]
        # One after the other, and nothing holds what was there before: there is no second copy of both at any time.
        self.keys = self._keys_room = self._grown(self._keys_room, rows, capacity)
        self.values = self._values_room = self._grown(self._values_room, rows, capacity)

    def _grown(self, room: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        grown = room.new_empty(rows, room.shape[1], capacity, room.shape[3])
        if self._count:
            grown[:, :, : self._count] = room[:, :, : self._count]
        return grown


class RoomyIndexedLayer(RoomyLayer, DynamicIndexedLayer):
    """A `RoomyLayer` with the keys of an index of what to attend to (DeepSeek-V3.2), which roll back as keys do."""

    indexer_keys: torch.Tensor
    indexer_position_ids: torch.Tensor | None  # From transformers 5.23 on.

    def __init__(self) -> None:
        DynamicIndexedLayer.__init__(self)

    def crop(self, tokens_to_remove: int) -> None:
        RoomyLayer.crop(self, tokens_to_remove)
        if tokens_to_remove:
            self._change(lambda kept: kept[:, :, :tokens_to_remove])

    def take_in(self, part: Any, taken: Sequence[torch.Tensor], row: int, rows: int, slots: int) -> None:
        super().take_in(part, taken, row, rows, slots)
        if not self.is_indexer_initialized:
            self.lazy_initialization_indexer(part.indexer_keys)
            self.indexer_keys = part.indexer_keys.new_zeros(rows, slots, part.indexer_keys.shape[2])
        _put_rows(self.indexer_keys[:, None], part.indexer_keys[:, None], taken, row, slots)
        if (positions := getattr(part, "indexer_position_ids", None)) is not None:
            if self.indexer_position_ids is None:
                self.indexer_position_ids = positions.new_zeros(len(positions), rows, slots)
            _put_rows(_slots_third(self.indexer_position_ids), _slots_third(positions), taken, row, slots)

    def drop(self, row: int) -> None:
        super().drop(row)
        self._change(lambda kept: _dropped(kept, row))

    def move(self, source: torch.Tensor) -> None:
        super().move(source)
        self._change(lambda kept: take_slots(kept, source))

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Changes what belongs to the index, as tensors of shape (rows, 1 or a position's dimensions, slots, size)."""
        if self.is_indexer_initialized:
            self.indexer_keys = change(self.indexer_keys[:, None])[:, 0]
        if (positions := getattr(self, "indexer_position_ids", None)) is not None:
            self.indexer_position_ids = change(_slots_third(positions))[..., 0].transpose(0, 1)


class RoomyHybridLayer(RoomyLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with keys and values and with a state (Falcon-H1)."""

    def __init__(self, like: Any):
        LinearAttentionAndFullAttentionLayer.__init__(self, **_number_of_states(like))


def new_cache(model: Any) -> Cache:
    """An empty cache for a model, whose rows can be rolled back.

    A layer with a sliding window is a full one here, and its window is kept by the mask: a cache that forgets what
    leaves the window could not roll back past it.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = RoomyLayer
    layers = config_layers(model)
    if any(type(layer) not in _PLAIN_LAYERS for layer in layers):
        cache.layers = [_ours(layer) for layer in layers]
    return cache


def can_roll_back(model: Any) -> bool:
    """Whether each layer of the model's cache is of a kind that is known here."""
    return all(_is_known(layer) for layer in config_layers(model))


def keeps_state(model: Any) -> bool:
    """Whether a layer of the model's cache merges all tokens into a state."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in config_layers(model))


def keeps_index(model: Any) -> bool:
    """Whether a layer of the model's cache keeps the keys of an index of what to attend to."""
    return any(isinstance(layer, DynamicIndexedLayer) for layer in config_layers(model))


_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def _is_known(layer: Any) -> bool:
    return type(layer) in (*_PLAIN_LAYERS, DynamicIndexedLayer, LinearAttentionLayer) or (
        _is_dummy(layer) or _is_hybrid(layer)
    )


def _is_dummy(layer: Any) -> bool:
    """Whether the layer keeps nothing: it has no attention, or uses the keys and values of another layer."""
    return type(layer).__name__ == "DummyLayer"  # From transformers 5.23 on.


def _is_hybrid(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionLayer) and isinstance(layer, DynamicLayer)


def _ours(layer: Any) -> Any:
    """The layer that rolls back, in the place of one of the host's that is empty."""
    if type(layer) in _PLAIN_LAYERS:
        return RoomyLayer()
    if type(layer) is DynamicIndexedLayer:
        return RoomyIndexedLayer()
    return RoomyHybridLayer(layer) if _is_hybrid(layer) else layer


def _number_of_states(layer: Any) -> dict[str, int]:
    return {"number_of_states": layer.number_of_states} if hasattr(layer, "number_of_states") else {}


class States:
    """The states of a cache's layers, of all rows, each saved and put back by rows.

    Args:
        cache: with layers that keep a state.
    """

    def __init__(self, cache: Cache):
        self._layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    def saved(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """Copies of the states of these rows, each of shape (rows, ...)."""
        return [tensor[list(rows)] for layer in self._layers for tensor in states_of(layer)]

    def put_back(self, row: int, saved: Sequence[torch.Tensor] | None, place: int = 0) -> None:
        """Gives a row the state at some place of what was saved; `None` stands for that before the first token."""
        tensors = [tensor for layer in self._layers for tensor in states_of(layer)]
        for i, tensor in enumerate(tensors):
            tensor[row] = 0.0 if saved is None else saved[i][place]

    def drop(self, row: int) -> None:
        """Drops a row, whose place the last one takes."""
        for layer in self._layers:
            set_states(layer, [_dropped(tensor, row) for tensor in states_of(layer)])


def take_in_states(layer: Any, part: Any) -> None:
    """Adds the rows of another layer with a state to those of this one, which may have none yet."""
    if own := states_of(layer):
        set_states(layer, [torch.cat(both) for both in zip(own, states_of(part), strict=True)])
    else:
        keys_and_values = ("keys", "values", "is_initialized", "_count", "_keys_room", "_values_room")
        vars(layer).update({name: value for name, value in vars(part).items() if name not in keys_and_values})


def take_slots(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """States of shape (rows, heads, slots, head_dim), with slot j of row i taken from slot source[i, j].

    One `index_select` of whole slots: `take_along_dim`, which looks up every number, is ten times slower on a CPU.
    """
    rows, heads, slots, size = states.shape
    begins = torch.arange(rows * heads, device=states.device) * slots
    source = source.to(states.device, non_blocking=True).repeat_interleave(heads, dim=0)
    flat = (begins[:, None] + source).flatten()
    return states.reshape(-1, size).index_select(0, flat).view(rows, heads, -1, size)


def _slots_third(positions: torch.Tensor) -> torch.Tensor:
    """Positions of shape (dimensions, rows, slots) as (rows, dimensions, slots, 1), in the same memory."""
    return positions.transpose(0, 1)[..., None]


def _put_rows(room: torch.Tensor, states: torch.Tensor, taken: Sequence[torch.Tensor], row: int, slots: int) -> None:
    for i, places in enumerate(taken):
        begin = slots - len(places)
        room[row + i, :, :begin] = 0.0
        room[row + i, :, begin:slots] = states[i][:, places]


def _dropped(tensor: torch.Tensor, row: int) -> torch.Tensor:
    """The tensor without one row, whose place the last one takes; the same memory."""
    tensor[row] = tensor[-1]
    return tensor[:-1]
