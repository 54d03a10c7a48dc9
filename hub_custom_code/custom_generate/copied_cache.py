"""A cache of a model's own class, which is rolled back by copying it whole. It sees no token ids.

A model that makes its own kind of cache (MiniMax, xLSTM, RWKV, DeepSeek-V4) has one for each row. The cache is copied
before a pass whose tokens may be rejected, and a rollback restores the copy. Tokens that were accepted after the copy
are read again, together with the new ones. A copy takes as long as reading that much memory; a forward pass also
reads the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .state_cache import SavedState, StatefulSlots


class CopiedSlots(StatefulSlots):
    """The cache of a single row, which the model makes in its first pass."""

    cache: Any  # `None` before that pass.

    def __init__(self) -> None:
        super().__init__(rows=1, allows_holes=False, new_cache=lambda: None)

    def mask(self, width: int) -> torch.Tensor | None:
        return None

    def save_before_pass(self, settled: Mapping[int, int]) -> None:
        """Copies the cache, unless it holds tokens that may be rejected or has been copied at this length."""
        if self._unsaved(settled):
            self._saved[0] = [*self._saved[0][-1:], SavedState(self.count, copy.deepcopy(self.cache))]

    def record_pass(self, lengths: Sequence[int], width: int, padded_left: bool = False) -> None:
        self.count += lengths[0]
        self.lengths = [self.count]

    def roll_back(self, rejected: Sequence[int]) -> None:
        if not rejected[0]:
            return
        self.count -= rejected[0]
        self.lengths = [self.count]
        self._saved[0] = [saved for saved in self._saved[0] if saved.length <= self.count]
        self.cache = None
        if self.count:
            saved = self._saved[0].pop()  # The next pass changes it, and copies it again before that.
            assert saved.length == self.count, "there is no copy of this length to roll back to"
            self.cache = saved.states
