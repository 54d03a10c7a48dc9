"""The slots of a cache that keeps a state too, in which all tokens are merged. It knows no ids and no forward pass.

The last tokens of keys and values can be dropped; of a state they cannot. So the states of a row are saved before a
pass, and a row is rolled back to where one was saved: what it had accepted after that is read again, together with
what is new. A state is of constant size, however long the text. Padding would be merged into it as well: in a pass a
row reads as many tokens as all others, or none, and then its state is put back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import Cache

from .cache_layers import RoomyLayer, States, take_in_states
from .kv_cache import Slots


class Saved(NamedTuple):
    """A row's state after so many of its tokens: what stands at `place` of `states`, or a copy of a whole cache."""

    length: int
    states: Any
    place: int = 0


class StatefulSlots(Slots):
    """A cache that grows as it is filled, some of whose layers keep a state."""

    def __init__(self, rows: int, keeps_holes: bool, new_cache: Callable[[], Cache]):
        super().__init__(rows, keeps_holes, new_cache)
        self._saved: list[list[Saved]] = [[] for _ in range(rows)]  # The last two of each row.
        self._idle: list[int] = []  # Rows that do not read in this pass, and their states before it.
        self._idle_states: list[torch.Tensor] = []

    def mask(self, width: int) -> torch.Tensor | None:
        # A model without attention would take a mask for one of the new tokens alone.
        return super().mask(width) if any(isinstance(layer, RoomyLayer) for layer in self.cache.layers) else None

    def reachable(self, row: int, most: int) -> int:
        """The greatest number of tokens, `most` at the most, to which the row can be rolled back."""
        if self.lengths[row] <= most:
            return self.lengths[row]
        return max((saved.length for saved in self._saved[row] if saved.length <= most), default=0)

    def begin_pass(self, settled: Mapping[int, int]) -> None:
        """Saves what the next pass changes and may have to be put back.

        Args:
            settled: for each row that reads in it, how many of its tokens are sure to stay. A state beyond them is
                not worth saving.
        """
        states = States(self.cache)
        self._idle = [row for row in range(len(self.lengths)) if row not in settled]
        self._idle_states = states.saved(self._idle)
        newest = {row: self._saved[row][-1].length if self._saved[row] else 0 for row in settled}
        fresh = [row for row, stays in settled.items() if newest[row] < self.lengths[row] <= stays]
        if fresh:
            kept = states.saved(fresh)
            for place, row in enumerate(fresh):
                self._saved[row] = [*self._saved[row][-1:], Saved(self.lengths[row], kept, place)]

    def add(self, lengths: Sequence[int], width: int, padded_left: bool = False) -> None:
        super().add(lengths, width, padded_left)
        states = States(self.cache)
        for place, row in enumerate(self._idle):
            states.put_back(row, self._idle_states or None, place)
        self._idle, self._idle_states = [], []

    def take_back(self, rejected: Sequence[int]) -> None:
        states = States(self.cache)
        for row, less in enumerate(rejected):
            if less:
                length = self.lengths[row] - less
                self._saved[row] = [saved for saved in self._saved[row] if saved.length <= length]
                if length:
                    saved = self._saved[row][-1]
                    assert saved.length == length, "rolled back to where no state was saved"
                    states.put_back(row, saved.states, saved.place)
                else:
                    states.put_back(row, None)
        super().take_back(rejected)

    def take_in(self, part: Slots, row: int) -> None:
        super().take_in(part, row)
        for layer, own in zip(part.cache.layers, self.cache.layers, strict=True):
            if hasattr(layer, "recurrent_states"):
                take_in_states(own, layer)

    def drop(self, row: int) -> None:
        super().drop(row)
        States(self.cache).drop(row)
        self._saved[row] = self._saved[-1]
        self._saved.pop()
