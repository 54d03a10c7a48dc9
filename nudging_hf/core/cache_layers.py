"""Cache layers that can roll back single rows. This module sees tensors, never token ids or forward passes.

There are three kinds of layers:

- A `PreallocatedLayer` keeps keys and values, one slot for each token. It rolls back by dropping the last slots. A
  `PreallocatedIndexedLayer` also keeps the keys of an indexer.
- A linear-attention layer of transformers merges all tokens into a recurrent state. It rolls back only to a state that
  was saved (see `RecurrentStates`).
- A `PreallocatedHybridLayer` keeps both.
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

# A new buffer has more slots than are needed: this share of the needed slots, and this many more.
_SPARE_SHARE, _MIN_SPARE_SLOTS = 1 / 16, 16


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` whose buffers have spare slots, so that an update does not copy the earlier keys and values."""

    _count = 0  # How many slots are in use.
    _key_buffer: torch.Tensor  # Both buffers have shape (rows, heads, capacity, head_dim).
    _value_buffer: torch.Tensor

    def get_seq_length(self, *args: Any) -> int:
        return self._count

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states of shape (rows, heads, new slots, head_dim) and returns the states of all slots."""
        rows, _, width, _ = key_states.shape
        self._reserve(rows, self._count + width, key_states, value_states)
        self._key_buffer[:, :, self._count : self._count + width] = key_states
        self._value_buffer[:, :, self._count : self._count + width] = value_states
        self._count += width
        self.keys, self.values = self._key_buffer[:, :, : self._count], self._value_buffer[:, :, : self._count]
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last slots. As in `DynamicLayer`, the number is negative.

        `keys` and `values` show the change after the next `update`.
        """
        if self.is_initialized:
            self._count += tokens_to_remove

    def append_rows(self, part: Any, kept: Sequence[torch.Tensor], before: int, slots: int) -> None:
        """Copies the rows of another layer behind the rows of this one, all to end at the last slot.

        The slots before a row are set to 0. The mask gives them the weight 0, but 0 times infinity would be NaN.

        Args:
            part: the other layer.
            kept: for each of its rows, the slots to copy.
            before: how many rows this layer has.
            slots: how many slots it has afterwards.
        """
        self._key_buffer = _with_rows(self._key_buffer if before else None, self._count, part.keys, kept, slots)
        self._value_buffer = _with_rows(self._value_buffer if before else None, self._count, part.values, kept, slots)
        if not self.is_initialized:
            self.lazy_initialization(part.keys, part.values)
        self._count = slots
        self.keys, self.values = self._key_buffer, self._value_buffer

    def drop_row(self, row: int) -> None:
        """Drops a row and moves the last row to its place."""
        self._key_buffer, self._value_buffer = _drop_row(self._key_buffer, row), _drop_row(self._value_buffer, row)

    def gather(self, source: torch.Tensor) -> None:
        """Moves slot source[i, j] of row i to slot j, and drops all later slots."""
        self._count = source.shape[1]
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[:, :, : self._count] = gather_slots(buffer, source)

    def _reserve(self, rows: int, slots: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes the buffers large enough for so many slots of states like these."""
        if self.is_initialized and self._key_buffer.shape[2] >= slots:
            return
        capacity = slots + _spare(slots)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._key_buffer, self._value_buffer = keys[:, :, :0], values[:, :, :0]
        # One after the other, with no reference to the old keys: at no time are there second copies of both.
        self.keys = self._key_buffer = self._grown(self._key_buffer, rows, capacity)
        self.values = self._value_buffer = self._grown(self._value_buffer, rows, capacity)

    def _grown(self, buffer: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        grown = buffer.new_empty(rows, buffer.shape[1], capacity, buffer.shape[3])
        if self._count:
            grown[:, :, : self._count] = buffer[:, :, : self._count]
        return grown


class PreallocatedIndexedLayer(PreallocatedLayer, DynamicIndexedLayer):
    """A `PreallocatedLayer` that also keeps the keys of an indexer, which selects the tokens to attend to.

    DeepSeek-V3.2 has one. The indexer's keys roll back as the attention keys do.
    """

    indexer_keys: torch.Tensor
    indexer_position_ids: torch.Tensor | None  # From transformers 5.23 on.

    def __init__(self) -> None:
        DynamicIndexedLayer.__init__(self)

    def crop(self, tokens_to_remove: int) -> None:
        PreallocatedLayer.crop(self, tokens_to_remove)
        if tokens_to_remove:
            self._update_indexer(lambda states: states[:, :, :tokens_to_remove])

    def append_rows(self, part: Any, kept: Sequence[torch.Tensor], before: int, slots: int) -> None:
        count = self._count
        super().append_rows(part, kept, before, slots)
        own = self.indexer_keys[:, None] if before else None
        if not self.is_indexer_initialized:
            self.lazy_initialization_indexer(part.indexer_keys)
        self.indexer_keys = _with_rows(own, count, part.indexer_keys[:, None], kept, slots, spare=0)[:, 0]
        if (positions := getattr(part, "indexer_position_ids", None)) is not None:
            of_rows = None if self.indexer_position_ids is None else _rows_first(self.indexer_position_ids)
            joined = _with_rows(of_rows, count, _rows_first(positions), kept, slots, spare=0)
            self.indexer_position_ids = joined[..., 0].transpose(0, 1)

    def drop_row(self, row: int) -> None:
        super().drop_row(row)
        self._update_indexer(lambda states: _drop_row(states, row))

    def gather(self, source: torch.Tensor) -> None:
        super().gather(source)
        self._update_indexer(lambda states: gather_slots(states, source))

    def _update_indexer(self, update: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `update` to the indexer's tensors, viewed with shape (rows, 1 or position axes, slots, size)."""
        if self.is_indexer_initialized:
            self.indexer_keys = update(self.indexer_keys[:, None])[:, 0]
        if (positions := getattr(self, "indexer_position_ids", None)) is not None:
            self.indexer_position_ids = update(_rows_first(positions))[..., 0].transpose(0, 1)


class PreallocatedHybridLayer(PreallocatedLayer, LinearAttentionAndFullAttentionLayer):
    """A `PreallocatedLayer` that also keeps a recurrent state (Falcon-H1).

    Args:
        template: the empty layer of transformers that this one replaces.
    """

    def __init__(self, template: Any):
        # Before transformers 5.14 a layer has a single state, and no such argument.
        has_number = hasattr(template, "number_of_states")
        arguments = {"number_of_states": template.number_of_states} if has_number else {}
        LinearAttentionAndFullAttentionLayer.__init__(self, **arguments)


def new_cache(model: Any) -> Cache:
    """Makes an empty cache for a model, whose rows can be rolled back.

    A sliding-window layer becomes a full one, because a layer that forgets what leaves the window could not roll back
    past it. The attention mask keeps the window.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = PreallocatedLayer
    layers = config_layers(model)
    if any(type(layer) not in _PLAIN_LAYERS for layer in layers):
        cache.layers = [_with_rollback(layer) for layer in layers]
    return cache


def can_roll_back(model: Any) -> bool:
    """Whether this module can roll back every layer of the model's cache."""
    return all(_is_supported(layer) for layer in config_layers(model))


def has_recurrent_state(model: Any) -> bool:
    """Whether a layer of the model's cache merges all tokens into a recurrent state."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in config_layers(model))


def has_indexer(model: Any) -> bool:
    """Whether a layer of the model's cache keeps the keys of an indexer, which selects the tokens to attend to."""
    return any(isinstance(layer, DynamicIndexedLayer) for layer in config_layers(model))


_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def _is_supported(layer: Any) -> bool:
    return type(layer) in (*_PLAIN_LAYERS, DynamicIndexedLayer, LinearAttentionLayer) or (
        _is_dummy(layer) or _is_hybrid(layer)
    )


def _is_dummy(layer: Any) -> bool:
    """Whether the layer keeps nothing: it has no attention, or uses the keys and values of another layer."""
    return type(layer).__name__ == "DummyLayer"  # From transformers 5.23 on.


def _is_hybrid(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionLayer) and isinstance(layer, DynamicLayer)


def _with_rollback(layer: Any) -> Any:
    """The layer of this module that replaces an empty layer of transformers, or that layer where none is needed."""
    if type(layer) in _PLAIN_LAYERS:
        return PreallocatedLayer()
    if type(layer) is DynamicIndexedLayer:
        return PreallocatedIndexedLayer()
    return PreallocatedHybridLayer(layer) if _is_hybrid(layer) else layer


class RecurrentStates:
    """The recurrent states of all layers of a cache, which are saved and restored row by row."""

    def __init__(self, cache: Cache):
        self._layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    def copy_of(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """Copies of the states of these rows, each of shape (rows, ...)."""
        return [tensor[list(rows)] for layer in self._layers for tensor in states_of(layer)]

    def restore(self, row: int, saved: Sequence[torch.Tensor] | None, index: int = 0) -> None:
        """Restores a row's state from row `index` of a copy; `None` stands for the state before the first token."""
        tensors = [tensor for layer in self._layers for tensor in states_of(layer)]
        for i, tensor in enumerate(tensors):
            tensor[row] = 0.0 if saved is None else saved[i][index]

    def drop_row(self, row: int) -> None:
        """Drops a row and moves the last row to its place."""
        for layer in self._layers:
            set_states(layer, [_drop_row(tensor, row) for tensor in states_of(layer)])


def append_states(layer: Any, part: Any) -> None:
    """Appends the rows of another layer's recurrent state to those of this layer, which may have none yet."""
    if own := states_of(layer):
        set_states(layer, [torch.cat(both) for both in zip(own, states_of(part), strict=True)])
    else:
        keys_and_values = ("keys", "values", "is_initialized", "_count", "_key_buffer", "_value_buffer")
        vars(layer).update({name: value for name, value in vars(part).items() if name not in keys_and_values})


def gather_slots(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Takes slot j of row i from slot source[i, j], in states of shape (rows, heads, slots, head_dim).

    One `index_select` copies whole slots. `take_along_dim`, which looks up every number, is ten times slower on a CPU.
    """
    rows, heads, slots, size = states.shape
    starts = torch.arange(rows * heads, device=states.device) * slots
    source = source.to(states.device, non_blocking=True).repeat_interleave(heads, dim=0)
    flat = (starts[:, None] + source).flatten()
    return states.reshape(-1, size).index_select(0, flat).view(rows, heads, -1, size)


def _rows_first(positions: torch.Tensor) -> torch.Tensor:
    """A view of positions of shape (axes, rows, slots) that has shape (rows, axes, slots, 1), as states have."""
    return positions.transpose(0, 1)[..., None]


def _with_rows(
    buffer: torch.Tensor | None,
    count: int,
    states: torch.Tensor,
    kept: Sequence[torch.Tensor],
    slots: int,
    spare: int | None = None,
) -> torch.Tensor:
    """A larger buffer, in which the rows of `states` follow those of `buffer`. All rows end at slot `slots`.

    Args:
        buffer: of shape (rows, heads, capacity, head_dim), or `None` for no rows.
        count: how many of its slots are in use.
        states: of shape (new rows, heads, slots, head_dim).
        kept: for each new row, the slots to copy.
        slots: how many slots are in use afterwards.
        spare: how many slots the result has behind them. By default as many as a new buffer has.
    """
    before = 0 if buffer is None else len(buffer)
    spare = _spare(slots) if spare is None else spare
    grown = states.new_empty(before + len(states), states.shape[1], slots + spare, states.shape[3])
    if buffer is not None:
        grown[:before, :, : slots - count] = 0
        grown[:before, :, slots - count : slots] = buffer[:, :, :count]
    for i, places in enumerate(kept, start=before):
        start = slots - len(places)
        grown[i, :, :start] = 0
        grown[i, :, start:slots] = states[i - before][:, places]
    return grown


def _spare(slots: int) -> int:
    return int(_SPARE_SHARE * slots) + _MIN_SPARE_SLOTS


def _drop_row(tensor: torch.Tensor, row: int) -> torch.Tensor:
    """Overwrites a row with the last one, and returns a view without the last one."""
    tensor[row] = tensor[-1]
    return tensor[:-1]
