"""Nudging for transformers: a small aligned model guides a large base model while it writes, with no training.

Source: Fei, Razeghi, Singh, "Nudging: Inference-time Alignment of LLMs via Guided Decoding" (arXiv 2410.09300).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chats import DEFAULT_TEMPLATE, INSTRUCTION_TEMPLATE, REASONING_TEMPLATE, plain_prompt
    from .core.config import NudgingConfig
    from .core.gate import StopWhenUnsure, Top1Recorder
    from .core.generate import generate
    from .core.output import NudgingOutput
    from .encoded_chats import chat_inputs
    from .provenance import Span, spans_of
    from .registration import register, unregister
    from .streaming import MarkingStreamer
    from .study import baselines
    from .study.calibration import calibrate
    from .study.check import check_pair

__version__ = "0.1.0"

# Where the public names stand. Each is imported when it is first used, because torch takes seconds to import.
_HOMES = {
    "DEFAULT_TEMPLATE": "chats",
    "INSTRUCTION_TEMPLATE": "chats",
    "REASONING_TEMPLATE": "chats",
    "MarkingStreamer": "streaming",
    "NudgingConfig": "core.config",
    "NudgingOutput": "core.output",
    "Span": "provenance",
    "StopWhenUnsure": "core.gate",
    "Top1Recorder": "core.gate",
    "baselines": "study.baselines",
    "calibrate": "study.calibration",
    "chat_inputs": "encoded_chats",
    "check_pair": "study.check",
    "generate": "core.generate",
    "plain_prompt": "chats",
    "register": "registration",
    "spans_of": "provenance",
    "unregister": "registration",
}

__all__ = [
    "DEFAULT_TEMPLATE",
    "INSTRUCTION_TEMPLATE",
    "REASONING_TEMPLATE",
    "MarkingStreamer",
    "NudgingConfig",
    "NudgingOutput",
    "Span",
    "StopWhenUnsure",
    "Top1Recorder",
    "baselines",
    "calibrate",
    "chat_inputs",
    "check_pair",
    "generate",
    "plain_prompt",
    "register",
    "spans_of",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOMES[name]}", __name__)
    value = globals()[name] = getattr(module, name, module)  # `baselines` is a module itself.
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
