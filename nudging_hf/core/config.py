"""Every parameter of nudging, defined once and validated. It knows numbers, never models or text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard, cast

ADAPTIVE = "adaptive"
AUTO = "auto"
# The gates and their default thresholds; see the `gate` module.
DEFAULT_THRESHOLDS = {"top1": 0.4, "entropy": 2.0, "margin": 0.2, "rejection": 0.2, "kad": 0.4}
WORD_BOUNDARIES = ("space", "unicode")  # See the `words` module.


@dataclass(frozen=True)
class NudgingConfig:
    """How a base model is nudged.

    Each field is also a keyword of `generate` and may stand in a model's `generation_config.json`.

    Args:
        nudge_threshold (`float` or `"auto"`, defaults to that of the gate, 0.4 for `"top1"`):
            γ of the paper (arXiv 2410.09300): the base is confident where its top-1 probability is at least γ.
            With 0, the base is never nudged after the first word. Above 1, the nudging model writes wherever it can.
            The paper uses 0.4 for Llama-2 and 0.3 for Gemma-2 and OLMo. `"auto"` takes the number that is stored with
            the model for this gate and target, as `nudging-hf calibrate` stores it. If there is none, each answer
            adjusts its own threshold (see [`~gate.OnlineCutoff`]).
        nudge_gate (`str`, defaults to `"top1"`):
            Which score of the base is compared with the threshold: `"top1"` (the paper's), `"entropy"`, `"margin"`,
            `"rejection"` or `"kad"`. The `gate` module has their formulas and sources. With `"entropy"` and
            `"rejection"` a *greater* threshold nudges less.
        target_nudge_rate (`float`, defaults to 0.1):
            The share of words, in (0, 1), that the threshold `"auto"` aims at.
        num_nudging_tokens (`int`, defaults to 16):
            The length of a lookahead, in tokens of the nudging model's vocabulary.
        takeover_on_agreement (`bool`, defaults to `True`):
            Whether the base takes over also where it is unsure but its token begins the next nudging word.
        word_boundary (`str`, defaults to `"space"`):
            Where a word of the nudging model begins: `"space"`, at a space alone, as in the paper; or `"unicode"`, at
            the word boundaries of UAX #29 as well, for languages that are written without spaces. A target nudge rate
            is then a share of these words.
        num_draft_tokens (`int` or `"adaptive"`, defaults to `"adaptive"`):
            How many tokens of the nudging model's continuation the base verifies in one forward pass, in tokens of
            the base's vocabulary. It changes the speed alone: the answer is the same for every value. With 0, nothing
            is drafted, and the nudging model does not guess its own text either.

    Raises:
        ValueError: if a field has a value of the wrong kind or out of range.
    """

    nudge_threshold: float | str = cast("float | str", None)  # It is replaced by the gate's default.
    nudge_gate: str = "top1"
    target_nudge_rate: float = 0.1
    num_nudging_tokens: int = 16
    takeover_on_agreement: bool = True
    word_boundary: str = "space"
    num_draft_tokens: int | str = ADAPTIVE

    def __post_init__(self) -> None:
        if not isinstance(self.nudge_gate, str) or self.nudge_gate not in DEFAULT_THRESHOLDS:
            raise ValueError(f"`nudge_gate` must be one of {', '.join(DEFAULT_THRESHOLDS)}, got {self.nudge_gate!r}.")
        threshold: object = self.nudge_threshold
        if threshold is None:
            threshold = DEFAULT_THRESHOLDS[self.nudge_gate]
            object.__setattr__(self, "nudge_threshold", threshold)
        if threshold != AUTO:
            if not _is_finite(threshold):
                raise ValueError(
                    f"`nudge_threshold` must be a finite number such as 0.4, or {AUTO!r}, got {threshold!r}."
                )
            if threshold < 0:
                raise ValueError(f"`nudge_threshold` must be >= 0, got {threshold!r}.")
        if not _is_finite(self.target_nudge_rate) or not 0 < self.target_nudge_rate < 1:
            raise ValueError(
                f"`target_nudge_rate` is a share of words and must be in (0, 1), got {self.target_nudge_rate!r}."
            )
        if not _is_int(self.num_nudging_tokens) or self.num_nudging_tokens < 1:
            raise ValueError(f"`num_nudging_tokens` must be an integer >= 1, got {self.num_nudging_tokens!r}.")
        if not isinstance(self.takeover_on_agreement, bool):
            raise ValueError(f"`takeover_on_agreement` must be True or False, got {self.takeover_on_agreement!r}.")
        if self.word_boundary not in WORD_BOUNDARIES:
            raise ValueError(f"`word_boundary` must be {' or '.join(WORD_BOUNDARIES)}, got {self.word_boundary!r}.")
        drafts: object = self.num_draft_tokens
        if drafts != ADAPTIVE and (not _is_int(drafts) or drafts < 0):
            raise ValueError(f"`num_draft_tokens` must be an integer >= 0 or {ADAPTIVE!r}, got {drafts!r}.")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all parameters, in order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def resolve(cls, sources: Iterable[Mapping[str, Any]]) -> NudgingConfig:
        """The config in which each parameter has the value of the first source that sets it to anything but `None`.

        A threshold belongs to the gate of its source, which is the default gate if the source names none. If an
        earlier source has chosen another gate, the threshold is ignored. In the same way, a number that stands in for
        "auto" belongs to a target and to what counts as a word.
        """
        given = [
            {name: source[name] for name in cls.field_names() if source.get(name) is not None} for source in sources
        ]
        values: dict[str, Any] = {}
        for source in given:
            values = source | values
        values.pop("nudge_threshold", None)
        gate = values.get("nudge_gate", cls.nudge_gate)
        aim = {name: values.get(name, getattr(cls, name)) for name in ("target_nudge_rate", "word_boundary")}
        if (threshold := _threshold(given, gate, aim)) is not None:
            values["nudge_threshold"] = threshold
        return cls(**values)


def _threshold(sources: list[dict[str, Any]], gate: str, aim: dict[str, Any]) -> Any:
    """The threshold of the first source that sets one. For "auto", a later source may have a calibrated number."""
    is_auto = gate_is_chosen = False
    for source in sources:
        threshold = source.get("nudge_threshold")
        if gate_is_chosen and source.get("nudge_gate", NudgingConfig.nudge_gate) != gate:
            threshold = None
        if threshold == AUTO:
            is_auto = True
        elif threshold is not None:
            if not is_auto or all(source.get(name, getattr(NudgingConfig, name)) == aim[name] for name in aim):
                return threshold
        gate_is_chosen = gate_is_chosen or "nudge_gate" in source
    return AUTO if is_auto else None


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
