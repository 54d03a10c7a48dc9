"""What an engine is asked for a row, and what its tokens say. It knows rows and fields, never connections."""

from __future__ import annotations

import math
from typing import Any

from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...core.config import AUTO
from ...core.row import Prediction, Row
from ...core.vocabulary import Vocabulary
from .completions import EngineError, Token

_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


class RowRequests:
    """Translates between rows and an engine.

    Args:
        base: the base, perhaps without its weights.
        vocabulary: the base's.
        stops_when_unsure: whether the engine itself ends a request where the base is unsure.
    """

    def __init__(self, base: Any, vocabulary: Vocabulary, stops_when_unsure: bool):
        self._base, self._vocabulary, self._stops_when_unsure = base, vocabulary, stops_when_unsure

    def fields(self, row: Row) -> dict[str, Any]:
        """The fields of the requests of a row: sampling, and where the engine is to stop.

        Raises:
            ValueError: for what an engine cannot be told.
        """
        config, samples = row.request.config, row.request.rules.base_samples
        num_logprobs(config.nudge_gate)
        fields: dict[str, Any] = {"temperature": 1.0} if samples else {}
        for processor in row.base.processors:
            name = _WARPERS.get(type(processor)) if samples else None
            if name is None:
                raise ValueError(
                    f"The engine runs the base, and a {type(processor).__name__} cannot be passed on to it: leave out "
                    "the argument (or the field of the base's generation config) that asks for it."
                )
            fields[name] = getattr(processor, name)
        if self._stops_when_unsure:
            if samples or config.nudge_gate != "top1" or config.nudge_threshold == AUTO:
                raise ValueError(
                    "`stops_when_unsure` is for greedy answers, `nudge_gate='top1'` and a `nudge_threshold` that is a "
                    "number: leave it out."
                )
            fields |= self.stop_fields(float(config.nudge_threshold))
        return fields

    def stop_fields(self, threshold: float) -> dict[str, Any]:
        """With which the engine ends a request where the base is less sure than this."""
        eos = self._base.generation_config.eos_token_id
        stop = eos[0] if isinstance(eos, (list, tuple)) else eos
        stop = self._vocabulary.tokenizer.eos_token_id if stop is None else stop
        if stop is None:
            raise ValueError(
                "The base has no EOS token, with which the engine could stop: leave out `stops_when_unsure`."
            )
        return {
            "stop_token_ids": [int(stop)],
            "vllm_xargs": {"nudge_threshold": threshold, "nudge_stop_id": int(stop)},
        }

    def prediction(self, token: Token, row: Row) -> Prediction:
        """What a token of the engine says, as the base's prediction.

        Raises:
            EngineError: if the engine has left out a token before this one, or does not tell enough.
        """
        own = self._vocabulary.bytes_of(token.id)
        if token.spelling is not None and own and token.spelling != own and token.spelling.endswith(own):
            raise EngineError(
                f"The engine has left out a token before id {token.id}, as llama.cpp's server does inside of "
                "characters that take several tokens: run the base in vLLM or SGLang for such texts."
            )
        tops = token.top_logprobs
        if len(tops) < num_logprobs(row.request.config.nudge_gate):
            raise EngineError(
                f"The engine told the probabilities of {len(tops)} tokens at a place, and that is too few."
            )
        top1 = math.exp(max(tops[0], token.logprob))
        score = top1
        if row.request.config.nudge_gate == "margin":
            score = math.exp(tops[0]) - math.exp(tops[1])
        elif row.request.config.nudge_gate in ("rejection", "kad"):
            score = math.exp(token.logprob)
        chosen: int | None = token.id
        if self._stops_when_unsure:  # It has forced a stop token there, and the base's own is the most probable.
            chosen = token.top_id
            if chosen is None:
                raise EngineError("The engine does not tell the id of the most probable token: update vLLM.")
        assert chosen is not None
        return Prediction(chosen, score, top1, best=0.0)

    def untold_eos(self, row: Row) -> Prediction:
        """The base's EOS, which has ended a request of an engine that does not send it. Its probability is not told.

        Raises:
            EngineError: if the base has no EOS, or the threshold sets itself by all probabilities.
        """
        eos = row.request.rules.base_eos
        if not eos:
            raise EngineError(
                "The engine has ended the text, and the base's generation config names no EOS: give the folder or Hub "
                "name of the model that the engine runs as `base=`."
            )
        if row.request.config.nudge_threshold == AUTO:
            raise EngineError(
                "The engine does not tell how probable EOS is, and `nudge_threshold='auto'` learns from all "
                "probabilities: give a number."
            )
        return Prediction(eos[0], score=0.0, top1=0.0, best=0.0)


def num_logprobs(gate: str) -> int:
    """Of how many tokens a gate needs the probabilities.

    Raises:
        ValueError: if it needs those of all tokens.
    """
    if gate == "entropy":
        raise ValueError(
            "`nudge_gate='entropy'` needs the probabilities of all tokens, and an engine tells those of a few: take "
            "'top1', 'margin', 'rejection' or 'kad'."
        )
    return 2 if gate == "margin" else 1
