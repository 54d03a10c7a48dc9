"""The slots of a cache that also keeps recurrent states. It sees no token ids.

The last tokens of keys and values can be dropped, but those merged into a recurrent state cannot. Each row's state is
therefore saved before a pass, and the row rolls back to a saved state. Tokens that were accepted after it are read
again, together with the new ones. A state has a constant size, however long the text is.

Padding would be merged into the state as well. So in each pass a row reads as many tokens as every other row, or
none; a row that reads none gets its old state back after the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import Cache

from .cache_layers import PreallocatedLayer, RecurrentStates, append_states
from .kv_cache import Slots


class SavedState(NamedTuple):
    """A row's state after its first `length` tokens.

    Args:
        length: how many tokens the state has read.
        states: copies of the states of several rows, or a copy of a whole cache.
        source_row: which of these rows it is.
    """

    length: int
    states: Any
    source_row: int = 0


class StatefulSlots(Slots):
    """The slots of a cache that grows as it is filled, some of whose layers keep a recurrent state."""

    def __init__(self, rows: int, allows_holes: bool, new_cache: Callable[[], Cache]):
        super().__init__(rows, allows_holes, new_cache)
        self._saved: list[list[SavedState]] = [[] for _ in range(rows)]  # The last two of each row.
        self._idle_rows: list[int] = []  # The rows that read nothing in this pass, and their states before it.
        self._idle_states: list[torch.Tensor] = []

    def mask(self, width: int) -> torch.Tensor | None:
        # A model without attention would take the mask to cover the new tokens alone.
        has_attention = any(isinstance(layer, PreallocatedLayer) for layer in self.cache.layers)
        return super().mask(width) if has_attention else None

    def rollback_length(self, row: int, max_length: int) -> int:
        """The greatest number of tokens, at most `max_length`, to which the row can be rolled back."""
        if self.lengths[row] <= max_length:
            return self.lengths[row]
        return max((saved.length for saved in self._saved[row] if saved.length <= max_length), default=0)

    def save_before_pass(self, settled: Mapping[int, int]) -> None:
        """Saves the states that the next pass changes and that may have to be restored.

        Args:
            settled: for each row that reads in the pass, how many of its tokens are sure to stay. A state that has
                read more than these is not worth saving.
        """
        states = RecurrentStates(self.cache)
        self._idle_rows = [row for row in range(len(self.lengths)) if row not in settled]
        self._idle_states = states.copy_of(self._idle_rows)
        if unsaved := self._unsaved(settled):
            copies = states.copy_of(unsaved)
            for index, row in enumerate(unsaved):
                self._saved[row] = [*self._saved[row][-1:], SavedState(self.lengths[row], copies, index)]

    def _unsaved(self, settled: Mapping[int, int]) -> list[int]:
        """The rows whose state has read settled tokens alone, and has not been saved at this length."""
        newest = {row: self._saved[row][-1].length if self._saved[row] else 0 for row in settled}
        return [row for row, stays in settled.items() if newest[row] < self.lengths[row] <= stays]

    def record_pass(self, lengths: Sequence[int], width: int, padded_left: bool = False) -> None:
        super().record_pass(lengths, width, padded_left)
        states = RecurrentStates(self.cache)
        for index, row in enumerate(self._idle_rows):
            states.restore(row, self._idle_states or None, index)
        self._idle_rows, self._idle_states = [], []

    def roll_back(self, rejected: Sequence[int]) -> None:
        states = RecurrentStates(self.cache)
        for row, removed in enumerate(rejected):
            if removed:
                length = self.lengths[row] - removed
                self._saved[row] = [saved for saved in self._saved[row] if saved.length <= length]
                if length:
                    saved = self._saved[row][-1]
                    assert saved.length == length, "there is no saved state of this length to roll back to"
                    states.restore(row, saved.states, saved.source_row)
                else:
                    states.restore(row, None)
        super().roll_back(rejected)

    def append_rows(self, part: Slots) -> None:
        super().append_rows(part)
        self._saved += [[] for _ in part.lengths]
        for layer, own in zip(part.cache.layers, self.cache.layers, strict=True):
            if hasattr(layer, "recurrent_states"):
                append_states(own, layer)

    def drop_row(self, row: int) -> None:
        super().drop_row(row)
        RecurrentStates(self.cache).drop_row(row)
        self._saved[row] = self._saved[-1]
        self._saved.pop()
