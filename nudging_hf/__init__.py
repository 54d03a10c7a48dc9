"""Nudging for transformers: a small aligned model guides a large base model while it writes, with no training.

Source: Fei, Razeghi, Singh, "Nudging: Inference-time Alignment of LLMs via Guided Decoding" (arXiv 2410.09300).
"""

from .config import NudgingConfig
from .gate import StopWhenUnsure, Top1Recorder
from .generate import generate
from .output import NudgingOutput
from .registration import register, unregister
from .streaming import MarkingStreamer

__version__ = "0.1.0"

__all__ = [
    "MarkingStreamer",
    "NudgingConfig",
    "NudgingOutput",
    "StopWhenUnsure",
    "Top1Recorder",
    "generate",
    "register",
    "unregister",
]
