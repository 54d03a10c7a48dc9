"""Every knob of nudging, once, validated. It knows numbers, never models or text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class NudgingConfig:
    """How a base model is nudged.

    Each field is also a keyword of `generate` and may stand in a model's `generation_config.json`.

    Args:
        nudge_threshold (`float`, defaults to 0.4):
            γ of the paper (arXiv 2410.09300): the base is confident where its top-1 probability is at least this.
            0 never nudges a base that has begun to write; above 1 the nudging model writes wherever it can. The paper
            takes 0.4 for Llama-2 and 0.3 for Gemma-2 and OLMo.
        num_nudging_tokens (`int`, defaults to 16):
            The length of a lookahead, in tokens of the nudging model's vocabulary.
        takeover_on_agreement (`bool`, defaults to `True`):
            Whether the base takes over also where it is unsure but its token begins the next nudging word.
        num_draft_tokens (`int` or `"adaptive"`, defaults to `"adaptive"`):
            How many tokens of the nudging model's continuation the base verifies in one forward pass, in tokens of
            the base's vocabulary. A matter of speed alone: the answer is the same for every value. 0 drafts nothing.

    Raises:
        ValueError: if a field has a value of the wrong kind or out of range.
    """

    nudge_threshold: float = 0.4
    num_nudging_tokens: int = 16
    takeover_on_agreement: bool = True
    num_draft_tokens: int | str = ADAPTIVE

    def __post_init__(self) -> None:
        threshold = self.nudge_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
            raise ValueError(f"`nudge_threshold` must be a finite number such as 0.4, got {threshold!r}.")
        if threshold < 0:
            raise ValueError(f"`nudge_threshold` is compared with a probability and must be >= 0, got {threshold!r}.")
        if not _is_int(self.num_nudging_tokens) or self.num_nudging_tokens < 1:
            raise ValueError(f"`num_nudging_tokens` must be an integer >= 1, got {self.num_nudging_tokens!r}.")
        if not isinstance(self.takeover_on_agreement, bool):
            raise ValueError(f"`takeover_on_agreement` must be True or False, got {self.takeover_on_agreement!r}.")
        drafts = self.num_draft_tokens
        if drafts != ADAPTIVE and (not _is_int(drafts) or drafts < 0):  # type: ignore[operator]
            raise ValueError(f"`num_draft_tokens` must be an integer >= 0 or {ADAPTIVE!r}, got {drafts!r}.")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all knobs, in order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def resolve(cls, sources: Iterable[Mapping[str, Any]]) -> NudgingConfig:
        """The config in which each knob has the value of the first source that sets it (to anything but `None`)."""
        values: dict[str, Any] = {}
        for source in sources:
            for name in cls.field_names():
                if source.get(name) is not None:
                    values.setdefault(name, source[name])
        return cls(**values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
