"""One causal LM with its KV cache, which extends and rolls back each row of a batch on its own. It knows no text.

Rows of a batch keep different numbers of tokens after each pass. The slots of what a row rejects are *holes*: the mask
leaves them out, and what all rows reject at the end is cropped. Where holes have become a share of all slots, the
cache is *realigned*: each row's keys and values are moved together, to end at the same slot. So most passes copy
nothing. Models that tell distances by counting slots, past a sliding window say, are realigned before every pass.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from .host import first_inputs, input_device, tells_distances_by_positions

_MOST_LOGITS = 64  # Columns of a pass with logits, beyond which a pass is worth saving them.
_MOST_SLOTS, _SPARE_SLOTS = 1.25, 64  # A token of the longest row, and besides: with more, the cache is copied.


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
        last_width (`int`): how many tokens the widest row was fed in the last pass.
    """

    def __init__(self, model: Any, rows: int, use_cache: bool = True, prompts: Prompts | None = None):
        self.model = model
        self.device = input_device(model)
        self.use_cache = use_cache
        self.forward_passes = 0
        self.tokens_fed = 0
        self.last_width = 0
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        self._cache: DynamicCache | None = None
        self._rows = list(range(rows))  # In the order of the cache's batch dimension.
        self._fed: dict[int, list[int]] = {row: [] for row in self._rows}
        self._slots = 0  # Of the cache.
        # Which slots hold a token, of shape (rows, slots), on the CPU; `None` where all do.
        self._used: torch.Tensor | None = None
        self._keeps_holes = prompts is None and tells_distances_by_positions(model)
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
            kept = torch.tensor([i for i in range(len(self._rows) + 1) if i != place])
            self._cache.batch_select_indices(kept)
            self._used = None if self._used is None else self._used[kept]

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
            self.last_width = width
        logits = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
        if self.use_cache:
            self._add_slots(list(map(len, new.values())), width)
            for row in readings:
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
        self._add_slots([len(ids) for ids in prompts.ids], prompts.input_ids.shape[1], padded_left=True)
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
            there = torch.tensor(self._rows)
            self._cache.batch_select_indices(there)
            self._used = None if self._used is None else self._used[there]
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
        places = [[n + min(i, max(len(ids) - 1, 0)) for i in range(width)] for n, ids in zip(kept, new, strict=True)]
        input_ids, position_ids = torch.tensor([tokens, places], device=device)  # One transfer.
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self._takes_positions:
            inputs["position_ids"] = position_ids
            if self._shift is not None:
                inputs["position_ids"] = position_ids + self._shift[..., self._rows, :]
        if self._used is not None:
            new_slots = torch.ones(len(new), width, dtype=torch.bool)
            inputs["attention_mask"] = torch.cat([self._used, new_slots], dim=1).to(device, torch.long)
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = logits_to_keep
        if self.use_cache:
            # Without a config every layer is a full one, also a sliding layer, whose window is kept by the mask: a
            # cache that forgets what leaves the window could not roll back past it.
            self._cache = self._cache if self._cache is not None else DynamicCache()
            inputs["past_key_values"] = self._cache
        logits = self.model(**inputs, use_cache=self.use_cache).logits
        return logits[:, -logits_to_keep:].to(device)

    def _add_slots(self, lengths: Sequence[int], width: int, padded_left: bool = False) -> None:
        """Takes note of what a pass of some width has put into the cache: rows of these lengths, and padding."""
        before, self._slots = self._slots, self._slots + width
        if self._used is None and all(length == width for length in lengths):
            return
        columns, ends = torch.arange(width), torch.tensor(lengths)[:, None]
        new = columns >= width - ends if padded_left else columns < ends
        old = torch.ones(len(lengths), before, dtype=torch.bool) if self._used is None else self._used
        self._used = torch.cat([old, new], dim=1)

    def _roll_back(self, kept: Sequence[int]) -> None:
        """Takes all but its first `kept` tokens out of each row, and drops slots that no row uses."""
        if self._cache is None:
            return
        longest = max(kept)
        if longest == 0:
            self._cache, self._slots, self._used = None, 0, None
            return
        rejected = [len(self._fed[row]) - n for row, n in zip(self._rows, kept, strict=True)]
        for row, n in zip(self._rows, kept, strict=True):
            self._fed[row] = self._fed[row][:n]
        if self._used is None and min(rejected) == max(rejected):
            self._crop(rejected[0])
            return
        used = torch.ones(len(kept), self._slots, dtype=torch.bool) if self._used is None else self._used
        from_end = used.flip(1).cumsum(1).flip(1)  # How many tokens stand in a slot and behind it.
        self._used = used & (from_end > torch.tensor(rejected)[:, None])
        is_used = self._used.any(dim=0)
        self._crop(int(is_used.flip(0).int().argmax()))
        if not self._keeps_holes or self._slots > _MOST_SLOTS * longest + _SPARE_SLOTS:
            self._realign(kept, longest)
        if self._used is not None and self._used.all():
            self._used = None

    def _crop(self, slots: int) -> None:
        """Drops the last slots."""
        if slots:
            assert self._cache is not None
            self._cache.crop(-slots)
            self._slots -= slots
            self._used = None if self._used is None else self._used[:, : self._slots]

    def _realign(self, kept: Sequence[int], longest: int) -> None:
        """Moves each row's tokens together, to end at the same slot."""
        assert self._cache is not None and self._used is not None
        if longest == self._slots and all(
            used[self._slots - n :].all() for used, n in zip(self._used, kept, strict=True)
        ):
            return  # They stand so.
        # A stable sort by use puts a row's tokens behind its holes, in their order.
        source = self._used.int().argsort(dim=1, stable=True)[:, self._slots - longest :].to(self.device)
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.keys = _take_slots(layer.keys, source)
                layer.values = _take_slots(layer.values, source)
        self._slots = longest
        self._used = torch.arange(longest) >= longest - torch.tensor(kept)[:, None]


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
