"""How a model is to be read so that a cache changes nothing, told by its config or found out by trying.

It knows ids and logits, never text. A model with rotary positions and nothing but keys and values in its cache is
read like all of its kind. What another one does (learned positions, positions counted by its cache, a state, an index)
is tried once for each model, in a few passes over a few tokens, and compared with one pass over the same tokens.
"""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .cache_layers import can_roll_back, keeps_index, keeps_state, new_cache
from .transformers_private import (
    accepted_arguments,
    cache_argument,
    cache_of,
    has_attention_layers_alone,
    has_rotary_positions,
    index_goes_on,
    input_device,
    takes_common_cache,
    uncached_inputs,
)

# Differences of logits, as shares of the greatest one, that are rounding: some layers compute in float32 whatever the
# model's dtype. Where something is wrong, they differ by more in any dtype.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 2e-3}
_COARSE_ROUNDING = 5e-2

# What a forward pass raises for shapes, dtypes or arguments that it cannot take.
_MISFITS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class Rows(Enum):
    """Which rows of a batch may share a cache."""

    TOGETHER = "All: what stands before a row, or between its tokens, is masked."
    ALONE = "None: positions are counted from the beginning of the cache, so that nothing may stand before a row."


class ReadingMode(NamedTuple):
    """How a model is to be read.

    Args:
        rows: which rows may share a cache.
        single_tokens: whether a pass that goes on from a state may hold one token alone. Jamba and Mamba, and more
            models on older versions of transformers, begin anew with the first of several.
        trouble: why the cache cannot be used at all; `None` where it can, or where there is none.
        is_causal: whether what the model says after a token depends on the ids of this one and earlier ones alone.
    """

    rows: Rows = Rows.TOGETHER
    single_tokens: bool = False
    trouble: str | None = None
    is_causal: bool = True


_FOUND: WeakKeyDictionary[Any, ReadingMode] = WeakKeyDictionary()


def has_common_cache(model: Any) -> bool:
    """Whether the model takes a cache whose rows can be rolled back; one of another kind is copied whole."""
    return takes_common_cache(model) and can_roll_back(model)


def reading_mode(model: Any) -> ReadingMode:
    """How the model is to be read where it has a cache."""
    if model.training:  # Dropout tells nothing of a model: the safest is assumed.
        can_share = "position_ids" in accepted_arguments(model) and has_common_cache(model)
        rows = Rows.TOGETHER if can_share else Rows.ALONE
        return ReadingMode(rows, single_tokens=True)
    if model not in _FOUND:
        _FOUND[model] = _find(model)
    return _FOUND[model]


@torch.no_grad()
def _find(model: Any) -> ReadingMode:
    is_common = has_common_cache(model)
    if has_rotary_positions(model) and "position_ids" in accepted_arguments(model):
        if is_common and has_attention_layers_alone(model) and not keeps_index(model):
            return ReadingMode()
    try:
        trial = _Trial(model)
    except torch.cuda.OutOfMemoryError:
        raise
    except _MISFITS:
        return ReadingMode(is_causal=False)
    if not (trial.is_read_as_ids() and trial.is_causal()):
        return ReadingMode(is_causal=False)
    if cache_argument(model) is None:
        return ReadingMode()
    if keeps_index(model) and not index_goes_on():
        return ReadingMode(trouble="in this version of transformers its index goes wrong, which a later one mends")
    # What an index picks among equals depends on the slots in which they stand.
    rows = Rows.ALONE if keeps_index(model) or not is_common else Rows.TOGETHER
    if keeps_state(model) or not is_common:
        if trial.goes_on_from(3, by_one=True):
            return ReadingMode(rows, single_tokens=not trial.goes_on_from(3, by_one=False))
    elif rows is Rows.TOGETHER and trial.goes_on_behind_padding():
        return ReadingMode()
    elif trial.goes_on_from(3, by_one=False):
        return ReadingMode(Rows.ALONE)
    return ReadingMode(trouble="it does not go on from what is in it as it does without a cache")


class _Trial:
    """A few tokens, and what a model says after them without a cache."""

    def __init__(self, model: Any):
        self.model = model
        rows = model.get_input_embeddings().num_embeddings
        self.ids = torch.tensor([[rows * share // 16 for share in (3, 7, 5, 2, 8, 4)]], device=input_device(model))
        self.expected = self.model(**self._inputs(self.ids), use_cache=False).logits[:, -1].float()

    def is_read_as_ids(self) -> bool:
        """Whether it says the same where it is given ids alone, and where it is given what `generate` gives it.

        XLNet is given masks besides; RoBERTa counts positions in another way than `generate` does.
        """
        for inputs in ({"input_ids": self.ids, "use_cache": False}, uncached_inputs(self.model, self.ids)):
            try:
                if not self._is_expected(self.model(**inputs).logits[:, -1].float()):
                    return False
            except _MISFITS:
                return False
        return True

    def is_causal(self) -> bool:
        """Whether it says the same after the tokens where others follow."""
        inputs = self._inputs(torch.cat([self.ids, self.ids.flip(1)], dim=1))
        found = self.model(**inputs, use_cache=False).logits[:, self.ids.shape[1] - 1].float()
        return self._is_expected(found)

    def goes_on_from(self, first: int, by_one: bool) -> bool:
        """Whether after so many tokens a cache, and no other, holds all that the next ones need."""
        width = 1 if by_one else self.ids.shape[1] - first
        try:
            _, begun = self._read(self.ids[:, :first], self._new_cache())
            cache = begun
            if not has_common_cache(self.model):
                cache = copy.deepcopy(begun)
                self._read(self.ids.flip(1)[:, :1], begun, first)  # What changes the cache leaves the copy as it is.
            self._read(self.ids.flip(1)[:, :first], self._new_cache())  # What is kept outside of the cache is lost.
            for start in range(first, self.ids.shape[1], width):
                found, cache = self._read(self.ids[:, start : start + width], cache, start)
        except _MISFITS:
            return False
        return self._is_expected(found)

    def goes_on_behind_padding(self) -> bool:
        """Whether it is the same where slots that are masked stand before the first token."""
        cache = new_cache(self.model)
        mask = torch.tensor([[0, 0] + [1] * self.ids.shape[1]], device=self.ids.device)
        try:
            self._read(self.ids[:, :3], cache)
            for layer in cache.layers:
                layer.move(torch.tensor([[0, 0, 0, 1, 2]]))
            return self._is_expected(self._read(self.ids[:, 3:], cache, 3, attention_mask=mask)[0])
        except _MISFITS:
            return False

    def _new_cache(self) -> Any:
        """An empty one; `None` where the model makes one of its own kind."""
        return new_cache(self.model) if has_common_cache(self.model) else None

    def _read(self, ids: torch.Tensor, cache: Any, start: int = 0, **more: Any) -> tuple[torch.Tensor, Any]:
        """What it says after the last of these ids, and the cache that the next pass is to be given."""
        more[str(cache_argument(self.model))] = cache
        output = self.model(**self._inputs(ids, start), **more, use_cache=True)
        return output.logits[:, -1].float(), cache if has_common_cache(self.model) else cache_of(output)

    def _inputs(self, ids: torch.Tensor, start: int = 0) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": ids}
        if "position_ids" in accepted_arguments(self.model):
            inputs["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        return inputs

    def _is_expected(self, found: torch.Tensor) -> bool:
        tolerance = _ROUNDING.get(self.model.dtype, _COARSE_ROUNDING) * self.expected.abs().max()
        return bool((found - self.expected).abs().max() <= tolerance)
