"""Finds out how a model must be read so that its cache does not change its logits. It sees ids and logits, never text.

Models with rotary positions whose cache holds nothing but keys and values all behave in the same way, so their config
is enough. Any other model (learned positions, positions counted by the cache, a recurrent state, an indexer) is tried
once: a few passes over a few tokens are compared with one pass over the same tokens without a cache.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .cache_layers import can_roll_back, has_indexer, has_recurrent_state, new_cache
from .transformers_private import (
    accepted_arguments,
    cache_argument,
    cache_of,
    has_no_weights,
    has_only_attention_layers,
    has_rotary_positions,
    indexer_continues_from_cache,
    input_device,
    supports_dynamic_cache,
    uncached_inputs,
)

# Differences of logits up to these shares of the greatest logit are rounding, because some layers compute in float32
# whatever the model's dtype. An actual error makes a greater difference in any dtype.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3}
_COARSE_TOLERANCE = 5e-2

# What a forward pass raises for shapes, dtypes or arguments that it does not accept.
_FORWARD_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class ReadingMode(NamedTuple):
    """How a model must be read.

    Args:
        rows_share_cache: whether the rows of a batch may share a cache, in which slots before a row and between its
            tokens are masked. They may not where the model counts positions from the start of the cache.
        one_token_per_pass: whether a pass that continues from a recurrent state must hold a single token. Jamba and
            Mamba, and more models on older versions of transformers, start from an empty state when given several.
        cache_problem: why the cache cannot be used at all; `None` where it can, or where the model has none.
        is_causal: whether the logits after a token depend only on the ids up to and including it.
    """

    rows_share_cache: bool = True
    one_token_per_pass: bool = False
    cache_problem: str | None = None
    is_causal: bool = True


_FOUND: WeakKeyDictionary[Any, ReadingMode] = WeakKeyDictionary()


def supports_row_rollback(model: Any) -> bool:
    """Whether the model takes a cache whose rows can be rolled back. Any other cache is copied whole."""
    return supports_dynamic_cache(model) and can_roll_back(model)


def reading_mode(model: Any) -> ReadingMode:
    """How the model must be read with its cache. A model without weights is never read."""
    if has_no_weights(model):
        return ReadingMode()
    if model.training:  # Dropout makes a trial meaningless, so the safest mode is assumed.
        can_share = "position_ids" in accepted_arguments(model) and supports_row_rollback(model)
        return ReadingMode(can_share, one_token_per_pass=True)
    if model not in _FOUND:
        _FOUND[model] = _find(model)
    return _FOUND[model]


@torch.no_grad()
def _find(model: Any) -> ReadingMode:
    can_roll_back_rows = supports_row_rollback(model)
    if has_rotary_positions(model) and "position_ids" in accepted_arguments(model):
        if can_roll_back_rows and has_only_attention_layers(model) and not has_indexer(model):
            return ReadingMode()
    try:
        trial = _Trial(model)
    except torch.cuda.OutOfMemoryError:
        raise
    except _FORWARD_ERRORS:
        return ReadingMode(is_causal=False)
    if not (trial.depends_on_ids_only() and trial.is_causal()):
        return ReadingMode(is_causal=False)
    if cache_argument(model) is None:
        return ReadingMode()
    if has_indexer(model) and not indexer_continues_from_cache():
        return ReadingMode(cache_problem="a later version of transformers is needed to use its cached indexer")
    # Among tokens with equal scores, an indexer picks by their slots, so other rows would change the choice.
    may_share = can_roll_back_rows and not has_indexer(model)
    if has_recurrent_state(model) or not can_roll_back_rows:
        if trial.continues_from_cache(3, one_token_per_pass=True):
            several = trial.continues_from_cache(3, one_token_per_pass=False)
            return ReadingMode(may_share, one_token_per_pass=not several)
    elif may_share and trial.ignores_masked_slots():
        return ReadingMode()
    elif trial.continues_from_cache(3, one_token_per_pass=False):
        return ReadingMode(rows_share_cache=False)
    return ReadingMode(cache_problem="the model computes other logits with it than without it")


class _Trial:
    """A few tokens, and the model's logits after them without a cache."""

    def __init__(self, model: Any):
        self.model = model
        rows = model.get_input_embeddings().num_embeddings
        self.ids = torch.tensor([[rows * share // 16 for share in (3, 7, 5, 2, 8, 4)]], device=input_device(model))
        self.expected = self.model(**self._inputs(self.ids), use_cache=False).logits[:, -1].float()

    def depends_on_ids_only(self) -> bool:
        """Whether ids alone give the same logits as the inputs that `generate` prepares.

        `generate` gives XLNet masks as well, and counts RoBERTa's positions in another way than RoBERTa does.
        """
        for inputs in ({"input_ids": self.ids, "use_cache": False}, uncached_inputs(self.model, self.ids)):
            try:
                if not self._is_expected(self.model(**inputs).logits[:, -1].float()):
                    return False
            except _FORWARD_ERRORS:
                return False
        return True

    def is_causal(self) -> bool:
        """Whether the logits after the tokens stay the same when other tokens follow."""
        inputs = self._inputs(torch.cat([self.ids, self.ids.flip(1)], dim=1))
        found = self.model(**inputs, use_cache=False).logits[:, self.ids.shape[1] - 1].float()
        return self._is_expected(found)

    def continues_from_cache(self, start: int, one_token_per_pass: bool) -> bool:
        """Whether a cache of the first `start` tokens holds everything that later passes need.

        Between the passes the model reads other tokens into another cache. Anything that it keeps outside of the
        cache is overwritten by that.
        """
        width = 1 if one_token_per_pass else self.ids.shape[1] - start
        try:
            _, original = self._read(self.ids[:, :start], self._new_cache())
            cache = original
            if not supports_row_rollback(self.model):
                cache = copy.deepcopy(original)
                self._read(self.ids.flip(1)[:, :1], original, start)  # Changing the original must not change the copy.
            self._read(self.ids.flip(1)[:, :start], self._new_cache())
            for place in range(start, self.ids.shape[1], width):
                found, cache = self._read(self.ids[:, place : place + width], cache, place)
        except _FORWARD_ERRORS:
            return False
        return self._is_expected(found)

    def ignores_masked_slots(self) -> bool:
        """Whether masked slots before the first token leave the logits as they are."""
        cache = new_cache(self.model)
        mask = torch.tensor([[0, 0] + [1] * self.ids.shape[1]], device=self.ids.device)
        try:
            self._read(self.ids[:, :3], cache)
            for layer in cache.layers:
                layer.gather(torch.tensor([[0, 0, 0, 1, 2]]))
            return self._is_expected(self._read(self.ids[:, 3:], cache, 3, attention_mask=mask)[0])
        except _FORWARD_ERRORS:
            return False

    def _new_cache(self) -> Any:
        """An empty cache; `None` where the model makes a cache of its own class."""
        return new_cache(self.model) if supports_row_rollback(self.model) else None

    def _read(self, ids: torch.Tensor, cache: Any, start: int = 0, **more: Any) -> tuple[torch.Tensor, Any]:
        """Runs a forward pass, and returns the logits after the last id and the cache for the next pass."""
        more[str(cache_argument(self.model))] = cache
        output = self.model(**self._inputs(ids, start), **more, use_cache=True)
        return output.logits[:, -1].float(), cache if supports_row_rollback(self.model) else cache_of(output)

    def _inputs(self, ids: torch.Tensor, start: int = 0) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": ids}
        if "position_ids" in accepted_arguments(self.model):
            inputs["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        return inputs

    def _is_expected(self, found: torch.Tensor) -> bool:
        tolerance = _TOLERANCE.get(self.model.dtype, _COARSE_TOLERANCE) * self.expected.abs().max()
        return bool((found - self.expected).abs().max() <= tolerance)
