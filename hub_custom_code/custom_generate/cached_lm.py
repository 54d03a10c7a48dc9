"""One causal LM with its KV cache, which extends and rolls back each row of a batch on its own. It knows no text.

Rows of a batch keep different numbers of tokens after each pass. What a row rejects is removed by *realignment*: its
keys and values are moved to the right by what it rejects beyond the least of all rows, and the least is cropped.
Every row then ends at the same slot, without holes: masking rejected slots would be wrong past a sliding window,
which counts cache slots.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from .host import first_inputs, input_device

_MOST_LOGITS = 64  # Columns of a pass with logits, beyond which a pass is worth saving them.


class Reading(NamedTuple):
    """What one row is to read: its whole text, and for how many of its last ids logits are wanted."""

    ids: list[int]
    keep: int


class Prompts(NamedTuple):
    """Prompts that are more than ids (images, say), one for each row, as `generate` prepared them.

    Args:
        ids: each prompt's, without padding.
        input_ids: the same of shape (rows, width), padded on the left.
        model_kwargs: what else the first forward pass is given, `attention_mask` and `position_ids` among it.
    """

    ids: list[list[int]]
    input_ids: torch.Tensor
    model_kwargs: dict[str, Any]


class CachedLM:
    """A causal LM that reads texts of several rows, and reads no token of them twice.

    Args:
        model: a `PreTrainedModel` with a causal LM head.
        rows: how many rows there are; they are named 0 to rows - 1.
        use_cache: whether keys and values are kept. Without, each pass reads the whole text anew.
        prompts: what the texts begin with, where that is more than ids. It is read in a pass of its own, before the
            first, and stays in the cache, which is needed then.

    Attributes:
        forward_passes (`int`): how many forward passes the model has made.
        tokens_fed (`int`): how many tokens of all rows it has been fed, padding not counted.
    """

    def __init__(self, model: Any, rows: int, use_cache: bool = True, prompts: Prompts | None = None):
        self.model = model
        self.device = input_device(model)
        self.use_cache = use_cache
        self.forward_passes = 0
        self.tokens_fed = 0
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        self._cache: DynamicCache | None = None
        self._rows = list(range(rows))  # In the order of the cache's batch dimension.
        self._fed: dict[int, list[int]] = {row: [] for row in self._rows}
        self._slots = 0  # Of the cache; each row's text ends `self._junk[row]` slots before its end.
        self._junk = dict.fromkeys(self._rows, 0)
        self._prompts = prompts
        self._fixed = dict.fromkeys(self._rows, 0)  # How many ids of a row are never rolled back.
        self._after_prompt: torch.Tensor | None = None  # The logits there, of shape (rows, 1, vocab_size).
        # By how much a position after the prompt is beyond the count of ids, of shape (..., rows, 1): images may take
        # fewer positions than they have ids, and a position may have several axes.
        self._shift: torch.Tensor | None = None

    def release(self, row: int) -> None:
        """Forgets a row that will not read again."""
        place = self._rows.index(row)
        del self._rows[place]
        if not self._rows:
            self._cache = None
        elif self._cache is not None:
            kept = [i for i in range(len(self._rows) + 1) if i != place]
            self._cache.batch_select_indices(torch.tensor(kept))

    def read(self, readings: Mapping[int, Reading]) -> dict[int, torch.Tensor]:
        """Reads texts in one forward pass.

        Args:
            readings: for each row that is to read, its whole text from the prompt on, without padding. What the row
                has read of another text is rolled back.

        Returns:
            for each row that wants some, the logits after its last `keep` ids, of shape (keep, vocab_size).
        """
        if self._prompts is not None:
            self._read_prompts(self._prompts)
            self._prompts = None
        rows = self._rows if self.use_cache else list(readings)
        kept = []
        for row in rows:
            fed = self._fed[row] if self.use_cache else []
            kept.append(len(fed))
            if row in readings:
                ids, keep = readings[row]
                kept[-1] = max(min(_common_prefix(fed, ids), len(ids) - keep), self._fixed[row])
        new = {row: readings[row].ids[n:] if row in readings else [] for row, n in zip(rows, kept, strict=True)}
        width = max(map(len, new.values()))
        # From column -1 on, where a prompt's own logits are wanted.
        wanted = {row: range(len(new[row]) - keep, len(new[row])) for row, (_, keep) in readings.items() if keep}
        first = min((each.start for each in wanted.values()), default=width - 1)
        if self.use_cache and width - first > _MOST_LOGITS and any(each.start > 0 for each in wanted.values()):
            # Prompts of very different lengths: what needs no logits is read first, so that few columns need them.
            late = [row for row, each in wanted.items() if each.start > 0]
            self.read({row: Reading(readings[row].ids[: -len(wanted[row])], 0) for row in late})
            return self.read(readings)

        self._roll_back(kept)
        columns = []
        if first < 0:
            assert self._after_prompt is not None
            columns.append(self._after_prompt[rows])
        if width:
            columns.append(self._forward(kept, list(new.values()), width - max(0, first)))
            self.forward_passes += 1
            self.tokens_fed += sum(map(len, new.values()))
        logits = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
        if self.use_cache:
            self._slots += width
            for row in rows:
                self._junk[row] = width - len(new[row])
                if row in readings:
                    self._fed[row] = readings[row].ids
        return {
            row: logits[i, wanted[row].start - first : wanted[row].stop - first]
            for i, row in enumerate(rows)
            if row in wanted
        }

    def _read_prompts(self, prompts: Prompts) -> None:
        """Reads all prompts as `generate` itself would: rows end at the same slot, as they do after any pass."""
        self._cache = DynamicCache()
        inputs = first_inputs(self.model, prompts.input_ids.to(self.device), self._cache, prompts.model_kwargs)
        logits = self.model(**inputs).logits
        self._after_prompt = logits[:, -1:].to(self.device)
        self._slots = prompts.input_ids.shape[1]
        if any(layer.is_initialized and layer.get_seq_length() != self._slots for layer in self._cache.layers):
            raise ValueError(
                f"{type(self.model).__name__} caches more than a slot for each token, which cannot be rolled back row "
                "by row: give a base that reads images in the place of tokens."
            )
        self._fixed = {row: len(ids) for row, ids in enumerate(prompts.ids)}
        self._fed = {row: prompts.ids[row] for row in self._rows}
        if (positions := inputs.get("position_ids")) is not None:
            lengths = torch.tensor([[len(ids)] for ids in prompts.ids], device=positions.device)
            self._shift = positions[..., -1:] + 1 - lengths
        if len(self._rows) < len(prompts.ids):  # Some were released before anything was read.
            self._cache.batch_select_indices(torch.tensor(self._rows))
        self.forward_passes += 1
        self.tokens_fed += sum(self._fixed.values())

    def _forward(self, kept: Sequence[int], new: Sequence[list[int]], logits_to_keep: int) -> torch.Tensor:
        """One pass over new ids, each row's behind its first `kept` ones.

        Rows are padded on the right, after every token that matters: on the left, padding would be a hole between a
        row's tokens, and in a first pass a position that attends to nothing, which some models answer with NaN.

        Returns:
            Logits of the last `logits_to_keep` columns, of shape (rows, logits_to_keep, vocab_size).
        """
        width = max(map(len, new))
        device = self.device
        tokens = [ids + [ids[-1] if ids else 0] * (width - len(ids)) for ids in new]
        inputs: dict[str, Any] = {"input_ids": torch.tensor(tokens, device=device)}
        begins = torch.tensor(kept, device=device)[:, None]
        if self._takes_positions:
            lasts = torch.tensor([max(len(ids) - 1, 0) for ids in new], device=device)[:, None]
            inputs["position_ids"] = begins + torch.arange(width, device=device).minimum(lasts)
            if self._shift is not None:
                inputs["position_ids"] = inputs["position_ids"] + self._shift[..., self._rows, :]
        if any(n < self._slots for n in kept):
            slots = torch.arange(self._slots + width, device=device)
            inputs["attention_mask"] = (slots >= self._slots - begins).long()
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = logits_to_keep
        if self.use_cache:
            # Without a config every layer is a full one, also a sliding layer, whose window is kept by the mask: a
            # cache that forgets what leaves the window could not roll back past it.
            self._cache = self._cache if self._cache is not None else DynamicCache()
            inputs["past_key_values"] = self._cache
        logits = self.model(**inputs, use_cache=self.use_cache).logits
        return logits[:, -logits_to_keep:].to(device)

    def _roll_back(self, kept: Sequence[int]) -> None:
        """Realigns the cache, so that each row ends with its first `kept` tokens, and drops slots that no row uses."""
        if self._cache is None:
            return
        slots = max(kept)
        if slots == 0:
            self._cache, self._slots = None, 0
            return
        rejected = [self._junk[row] + len(self._fed[row]) - n for row, n in zip(self._rows, kept, strict=True)]
        least = min(rejected)
        if max(rejected) == least and self._slots - least == slots:  # No row is ragged: nothing need move.
            self._cache.crop(-least)
        else:
            device = self.device
            ends = self._slots - torch.tensor(rejected, device=device)
            source = (ends[:, None] - slots + torch.arange(slots, device=device)).clamp(min=0)
            for layer in self._cache.layers:
                if layer.is_initialized:
                    layer.keys = _take_slots(layer.keys, source)
                    layer.values = _take_slots(layer.values, source)
        self._slots = slots
        for row, n in zip(self._rows, kept, strict=True):
            self._fed[row] = self._fed[row][:n]
            self._junk[row] = 0


def _take_slots(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """States of shape (rows, heads, slots, head_dim), with slot j of row i taken from slot source[i, j].

    One `index_select` of whole slots: `take_along_dim`, which looks up every number, is ten times slower on a CPU.
    """
    rows, heads, slots, size = states.shape
    begins = torch.arange(rows * heads, device=states.device) * slots
    flat = begins[:, None] + source.to(states.device).repeat_interleave(heads, dim=0)
    return states.reshape(-1, size).index_select(0, flat.flatten()).view(rows, heads, -1, size)


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids the two lists begin with in common; by slices, which compare faster than a loop."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return bisect_left(range(1, most + 1), True, key=lambda n: a[:n] != b[:n])
