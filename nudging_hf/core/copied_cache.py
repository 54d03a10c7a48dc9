"""A cache of which nothing is known but that the model goes on from it. It knows no ids and no forward pass.

A model that makes a cache of its own kind (MiniMax, xLSTM, RWKV, DeepSeek-V4) is given one for each row. It is copied
before a pass whose tokens may be rejected, and rolled back to a copy: what was accepted after that is read again,
together with what is new. A copy takes as long as reading so much memory; a forward pass reads the weights besides.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .state_cache import Saved, StatefulSlots


class CopiedSlots(StatefulSlots):
    """The cache of a single row, which the model makes in its first pass."""

    cache: Any  # `None` before that pass.

    def __init__(self) -> None:
        super().__init__(rows=1, keeps_holes=False, new_cache=lambda: None)

    def mask(self, width: int) -> torch.Tensor | None:
        return None

    def begin_pass(self, settled: Mapping[int, int]) -> None:
        """Copies the cache, unless it holds tokens that are not sure to stay, or there is such a copy."""
        newest = self._saved[0][-1].length if self._saved[0] else 0
        if newest < self.count <= settled[0]:
            self._saved[0] = [*self._saved[0][-1:], Saved(self.count, copy.deepcopy(self.cache))]

    def add(self, lengths: Sequence[int], width: int, padded_left: bool = False) -> None:
        self.count += lengths[0]
        self.lengths = [self.count]

    def take_back(self, rejected: Sequence[int]) -> None:
        if not rejected[0]:
            return
        self.count -= rejected[0]
        self.lengths = [self.count]
        self._saved[0] = [saved for saved in self._saved[0] if saved.length <= self.count]
        self.cache = None
        if self.count:
            saved = self._saved[0].pop()  # It is copied again before the next pass, which changes it.
            assert saved.length == self.count, "rolled back to where no copy was made"
            self.cache = saved.states
