"""Nudging for transformers: a small aligned model guides a large base model while it writes, with no training.

Source: Fei, Razeghi, Singh, "Nudging: Inference-time Alignment of LLMs via Guided Decoding" (arXiv 2410.09300).
"""

from .chats import DEFAULT_TEMPLATE, INSTRUCTION_TEMPLATE, REASONING_TEMPLATE, chat_inputs, plain_prompt
from .core.config import NudgingConfig
from .core.gate import StopWhenUnsure, Top1Recorder
from .core.generate import generate
from .core.output import NudgingOutput
from .provenance import Span, spans_of
from .registration import register, unregister
from .streaming import MarkingStreamer
from .study import baselines
from .study.calibration import calibrate

__version__ = "0.1.0"

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
    "generate",
    "plain_prompt",
    "register",
    "spans_of",
    "unregister",
]
