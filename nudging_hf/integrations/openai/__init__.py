"""Nudges a base that runs behind an OpenAI-compatible engine, with a nudging model in this process."""

from .completions import EngineError, EngineUnavailable
from .remote_base import RemoteAnswer, RemoteBase, Work

__all__ = ["EngineError", "EngineUnavailable", "RemoteAnswer", "RemoteBase", "Work"]
