"""Which tokens each model may write. The rules know ids, words and the caller's constraints, never forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.generation import SuppressTokensLogitsProcessor

from .constraints import Constraint
from .rounds import Lookahead, Word

_NEVER = float("-inf")


@dataclass(eq=False)
class TokenRules:
    """The rules of one call, the same for all its rows.

    Args:
        base_eos: the base's EOS ids. The base is never confident about one. The first is the end mark.
        nudging_eos: the nudging model's EOS ids. Any of them ends an answer.
        nudging_control: its control tokens without EOS, of shape (n,). They are never drawn.
        stop_tokens: the `eos_token_id` of the call where it is none of the base's own. It ends an answer.
        base_samples, nudging_samples: whether each model draws its tokens.
        min_new_tokens: tokens of the base before which the nudging model may not end an answer.
        base_num_ids: how many ids the base can read, where a tokenizer or the nudging model has more.
        nudging_positions: how many positions the nudging model was trained on. It is warned about once beyond them.
        one_vocabulary: whether both models read the same ids.
    """

    base_eos: Sequence[int]
    nudging_eos: Sequence[int]
    nudging_control: torch.Tensor
    stop_tokens: Sequence[int]
    base_samples: bool
    nudging_samples: bool
    min_new_tokens: int
    one_vocabulary: bool
    base_num_ids: float = math.inf
    nudging_positions: float = math.inf
    _never_drawn: torch.Tensor | None = field(default=None, init=False)
    _no_end: SuppressTokensLogitsProcessor | None = field(default=None, init=False)

    def num_allowed(self, constraint: Constraint | None, ids: list[int], more: Sequence[int]) -> int:
        """How many of the ids `more` the base may write and read after `ids`. A constraint stops at a stop token."""
        readable = next((n for n, token in enumerate(more) if token >= self.base_num_ids), len(more))
        return readable if constraint is None else constraint.allowed_prefix(ids, more[:readable])

    def restricted(
        self, constraint: Constraint | None, ids: Sequence[int], words: tuple[Word, ...], ended: bool
    ) -> Lookahead:
        """The lookahead of these words after the answer `ids`, up to what the base may not write or read.

        With one vocabulary the nudging model draws nothing else. With two, a forbidden word becomes the piece that is
        set aside, and if it is the first word, there are no words.
        """
        if self.one_vocabulary or (constraint is None and self.base_num_ids == math.inf):
            return Lookahead(words, ended)
        ids = list(ids)
        for i, word in enumerate(words):
            if 0 < i == len(words) - 1 and not ended:
                break  # The last word is set aside in any case.
            allowed = self.num_allowed(constraint, ids, word.ids)
            if allowed and word.ids[allowed - 1] in self.stop_tokens:
                break  # The answer ends within this word.
            if allowed < len(word.ids):
                return Lookahead(words[: i + 1] if i else (), ended=False)
            ids += word.ids
        else:
            if ended and constraint is not None and not constraint.allows_end(ids):
                ended = False
        return Lookahead(words, ended)

    def allows_only_end(self, constraint: Constraint | None, ids: Sequence[int]) -> bool:
        """Whether the caller's processors allow nothing but the end here, without asking the nudging model.

        With one vocabulary they bind what the nudging model draws, and it is asked.
        """
        return not self.one_vocabulary and constraint is not None and constraint.allows_only_end(ids)

    def never_drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """What is added to the nudging model's scores so that it draws no control token, of shape (vocab_size,).

        With one vocabulary the same holds for tokens that the base cannot read, except EOS, which is no word.
        """
        if self._never_drawn is None:
            mask = scores.new_zeros(scores.shape[-1])
            if self.one_vocabulary and self.base_num_ids < len(mask):
                mask[int(self.base_num_ids) :] = _NEVER
                mask[[*self.nudging_eos]] = 0.0
            self._never_drawn = mask.index_fill(0, self.nudging_control, _NEVER)
        return self._never_drawn

    @property
    def no_end(self) -> SuppressTokensLogitsProcessor:
        """The processor with which the nudging model cannot end an answer too early.

        With one vocabulary it may write a stop token of the caller's, and that can be too early too.
        """
        if self._no_end is None:
            too_early = {*self.nudging_eos, *(self.stop_tokens if self.one_vocabulary else ())}
            self._no_end = SuppressTokensLogitsProcessor(sorted(too_early), device=str(self.nudging_control.device))
        return self._no_end

    def forbidden(self, constraint: Constraint, ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        """What is added to the nudging model's scores after `ids` so that it draws nothing that is forbidden.

        This is for one vocabulary. EOS is allowed where the base's is, or where the caller has it as a stop token.

        Returns:
            A tensor of shape (vocab_size,).
        """
        forbidden = constraint.forbidden(ids).to(scores.device)
        mask = scores.new_zeros(scores.shape[-1])
        common = min(len(mask), len(forbidden))
        mask[:common].masked_fill_(forbidden[:common], _NEVER)
        may_end = constraint.allows_end(ids)
        for eos in self.nudging_eos:
            is_stop = eos in self.stop_tokens and eos < common
            mask[eos] = 0.0 if may_end or (is_stop and not forbidden[eos]) else _NEVER
        return mask
