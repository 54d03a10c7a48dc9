"""Checks the laws of nudging on a pair of one's own, and whether the pair is fit. It knows answers and logits.

An answer may depend on how it was computed: passes of another width round otherwise, and where two tokens, or the
base's score and its threshold, are as close as that, another token is taken. Such a *near-tie* is no fault of the
software. Therefore each difference is followed to the place where the two answers part: there both models read the
same ids in two ways, and the margins on which the answer depends are compared with the rounding between these ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from ..chats import DEFAULT_TEMPLATE
from ..core.answer import answer_class
from ..core.cached_lm import Reading, cached_lm, common_prefix
from ..core.config import AUTO, DEFAULT_THRESHOLDS, NudgingConfig
from ..core.gate import GATES, top1_probabilities
from ..core.generate import loaded_vocabulary
from ..pair import Pair
from .fitness import Finding, Level, fitness
from .prompts import Prompt, built_in_prompts, spread
from .records import prompts_of

_LAWS = ("drafted = undrafted", "batch = singles", "cached = recomputed", "streamed = returned")
_LAST = 32  # So many tokens before the place at which two answers part may have decided which words stand there.
_NEAR = 4.0  # A margin of at most so many times the rounding is a near-tie.
# Rounding up to these shares of the greatest logit is usual; more is an error of the model's cache.
_USUAL_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-3}
_USUAL_ROUNDING_OF_HALF = 5e-2
_MANY_NUDGES, _FEW_NUDGES = 0.6, 0.01


@dataclass
class Check:
    """All that was found out about a pair.

    Args:
        findings: in the order in which they were made.
        answers: how many answers the laws were tried on.
    """

    findings: list[Finding]
    answers: int

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level is Level.PROBLEM]

    @property
    def verdict(self) -> str:
        """One sentence."""
        if problems := self.problems:
            return f"The pair is not in order: {'; '.join(f'{each.subject}: {each.message}' for each in problems)}"
        ties = sum(each.subject in _LAWS and each.level is Level.NOTE for each in self.findings)
        with_ties = f", apart from near-ties in {ties} of {len(_LAWS)} laws" if ties else ""
        return f"The pair is in order: the laws hold in {self.answers} answers{with_ties}."


def check_pair(
    base: Any,
    nudging_model: Any,
    tokenizer: Any = None,
    nudging_tokenizer: Any = None,
    prompts: Iterable[Any] | None = None,
    *,
    nudging_config: NudgingConfig | None = None,
    base_template: str = DEFAULT_TEMPLATE,
    max_new_tokens: int = 64,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Check:
    """Finds out whether a pair is fit for nudging, and whether the laws of nudging hold for it.

    Each prompt is answered greedily by itself without drafts, with drafts and a streamer, and without a cache, and
    then all prompts in a batch.

    Args:
        base, nudging_model: the large base and the small aligned model.
        tokenizer, nudging_tokenizer: the tokenizer of each; by default those that their models' `name_or_path` names.
        prompts: two or more; see [`~study.records.prompts_of`]. If they are left out, four of [`built_in_prompts`].
        nudging_config: the parameters of nudging; by default those of the base's generation config. A threshold that
            sets itself is replaced by its gate's default, because the margin to it is not known.
        base_template: how a chat becomes the base's prompt: see [`plain_prompt`].
        max_new_tokens: the limit on an answer, in tokens of the base.
        progress: wraps the prompts while they are answered, as `tqdm` does.

    Raises:
        ValueError: for fewer than two prompts, and for a pair that nudging refuses.

    Example:
        ```python
        found = nudging_hf.check_pair(base, nudger, prompts=prompts, max_new_tokens=16)
        assert not found.problems, found.verdict
        ```
    """
    asked = spread(built_in_prompts(), 4) if prompts is None else prompts_of(prompts)
    if len(asked) < 2:
        raise ValueError(f"`prompts` must be two or more, so that there is a batch, got {len(asked)}.")
    pair = Pair.of(base, nudging_model, tokenizer, nudging_tokenizer)
    findings = list(fitness(pair))
    if any(finding.level is Level.PROBLEM for finding in findings):
        return Check(findings, answers=0)
    laws = _Laws(pair, asked, base_template, max_new_tokens, nudging_config)
    laws.run(progress)
    return Check([*findings, *laws.findings()], answers=len(asked))


class _Collected(BaseStreamer):
    """A streamer that keeps the ids of an answer. The first that come are those of the prompt."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        """All ids are there already."""

    @property
    def ids(self) -> list[int]:
        return [token for part in self.parts[1:] for token in part]


class _Laws:
    """Tries the laws on some prompts."""

    def __init__(
        self,
        pair: Pair,
        prompts: Sequence[Prompt],
        base_template: str,
        max_new_tokens: int,
        config: NudgingConfig | None,
    ):
        self.pair = pair
        self.config = config or pair.nudging_config({})
        if self.config.nudge_threshold == AUTO:  # The margin to a cutoff that moves is not known.
            self.config = replace(self.config, nudge_threshold=DEFAULT_THRESHOLDS[self.config.nudge_gate])
        self._settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "nudging_config": self.config}
        self._chats, self._template = [prompt.messages for prompt in prompts], base_template
        self._differences: dict[str, list[str]] = {law: [] for law in _LAWS}
        self._faults: set[str] = set()
        self._rates: list[float] = []
        self._reasons: list[str] = []

    def run(self, progress: Callable[[Sequence[Any]], Iterable[Any]]) -> None:
        """Writes each answer in all ways."""
        undrafted = []
        for number, chat in enumerate(progress(self._chats)):
            inputs = self.pair.inputs([chat], self._template)
            streamer = _Collected()
            [plain] = self._write(inputs, num_draft_tokens=0)
            [drafted] = self._write(inputs, streamer=streamer, num_draft_tokens=16)
            [recomputed] = self._write(inputs, use_cache=False)
            self._compare("drafted = undrafted", number, inputs, plain, drafted)
            self._compare("cached = recomputed", number, inputs, drafted, recomputed)
            if streamer.ids != drafted:
                self._faults.add("streamed = returned")
                self._differences["streamed = returned"].append(f"prompt {number + 1}: the streamer got other ids")
            undrafted.append((inputs, plain))
        batch = self._write(self.pair.inputs(self._chats, self._template), keeps_figures=True)
        for number, ((inputs, plain), own) in enumerate(zip(undrafted, batch, strict=True)):
            self._compare("batch = singles", number, inputs, plain, own)

    def findings(self) -> Iterable[Finding]:
        """What was found out about the laws and about the answers."""
        for law, differences in self._differences.items():
            if not differences:
                yield Finding(law, Level.FINE, "holds.")
            else:
                level = Level.PROBLEM if law in self._faults else Level.NOTE
                yield Finding(law, level, f"{differences[0]} ({len(differences)} of {len(self._chats)} answers).")
        rate = sum(self._rates) / len(self._rates)
        words = f"{rate:.0%} of the tokens at γ = {self.config.nudge_threshold}"
        if rate > _MANY_NUDGES:
            yield Finding(
                "nudge rate", Level.NOTE, f"{words}: the small model writes most of it; `calibrate` finds γ."
            )
        elif rate < _FEW_NUDGES:
            yield Finding("nudge rate", Level.NOTE, f"{words}: nudging changes next to nothing; `calibrate` finds γ.")
        else:
            yield Finding("nudge rate", Level.FINE, f"{words}.")
        ended = self._reasons.count("eos")
        message = f"{ended} of {len(self._reasons)} within {self._settings['max_new_tokens']} tokens."
        yield Finding("answers that ended", Level.FINE if ended else Level.NOTE, message)

    def _write(self, inputs: Any, keeps_figures: bool = False, **more: Any) -> list[list[int]]:
        """The answers without padding."""
        output = self.pair.generate(inputs, **{**self._settings, **more}, return_dict_in_generate=True)
        if keeps_figures:
            self._rates += output.nudge_rate.tolist()
            self._reasons += output.finish_reasons
        lengths = (~output.base_top1_probs.isnan()).sum(dim=1).tolist()
        start = inputs["input_ids"].shape[1]
        return [row[start : start + n].tolist() for row, n in zip(output.sequences, lengths, strict=True)]

    def _compare(self, law: str, number: int, inputs: Any, one: list[int], other: list[int]) -> None:
        if one == other:
            return
        place = common_prefix(one, other)
        margin = _Parting(self.pair, inputs, one[:place], self.config).nearest()
        told = f"prompt {number + 1} parts at token {place + 1}: {margin}"
        if margin.is_near_tie:
            self._differences[law].append(told)
        else:  # A fault is told before near-ties.
            self._differences[law].insert(0, told)
            self._faults.add(law)


class _Margin(NamedTuple):
    """How close a decision was.

    Args:
        what: was decided.
        size: by how much, in logits or in the gate's score.
        rounding: how much the same value differs between two ways of computing it.
        is_usual: whether the rounding is what the dtype explains.
    """

    what: str
    size: float
    rounding: float
    is_usual: bool

    @property
    def is_near_tie(self) -> bool:
        return self.is_usual and self.size <= _NEAR * self.rounding

    def __str__(self) -> str:
        if not self.is_usual:
            return f"a fault: {self.what} differs by {self.rounding:.2g} between two ways of reading the same ids"
        if self.is_near_tie:
            return f"a near-tie: {self.what} has a margin of {self.size:.2g}, and rounding makes {self.rounding:.2g}"
        return f"a fault: the smallest margin is {self.size:.2g} ({self.what}), and rounding makes {self.rounding:.2g}"


class _Parting:
    """The place where two answers part: what both models say there, computed in two ways.

    Args:
        inputs: the prompts of both models.
        ids: the answer up to that place.
    """

    def __init__(self, pair: Pair, inputs: Any, ids: list[int], config: NudgingConfig):
        ours = loaded_vocabulary(pair.tokenizer, pair.base, "tokenizer", "base")
        theirs = loaded_vocabulary(pair.nudging_tokenizer, pair.nudging_model, "nudging_tokenizer", "nudging model")
        prompts = inputs["input_ids"][0].tolist(), inputs["nudging_input_ids"][0].tolist()
        answer = answer_class(ours, theirs)(ours, theirs, *prompts)
        for token in ids:
            answer.append(token)
        self._pair, self._config = pair, config
        self._base_text = [*prompts[0], *ids]
        self._nudging_text = [*prompts[1], *answer.nudging_ids()]

    @torch.no_grad()
    def nearest(self) -> _Margin:
        """The decision that was closest, measured by its rounding."""
        margins = [*self._of_base(), *self._of_nudging_model()]
        unusual = [margin for margin in margins if not margin.is_usual]
        return unusual[0] if unusual else min(margins, key=lambda each: each.size / max(each.rounding, 1e-300))

    def _of_base(self) -> Iterable[_Margin]:
        whole, split, is_usual = _read_in_two_ways(self._pair.base, self._base_text)
        yield _closest_tokens("the base's choice", whole, split, is_usual)
        gate = GATES[self._config.nudge_gate]
        tokens = whole.argmax(dim=-1)
        scores, other = (gate.scores(logits.float().softmax(dim=-1), tokens) for logits in (whole, split))
        rounding = float((scores - other).abs().max())
        if gate.against_nudging_model:  # Only at the end do both models stand at the same text.
            said = cached_lm(self._pair.nudging_model, 1).read({0: Reading(self._nudging_text, 1)})[0]
            scores = scores[-1:] - top1_probabilities(said)
        size = float((scores - gate.cutoff(float(self._config.nudge_threshold))).abs().min())
        yield _Margin("the base's score at its gate", size, max(rounding, torch.finfo(torch.float32).eps), is_usual)

    def _of_nudging_model(self) -> Iterable[_Margin]:
        model = self._pair.nudging_model
        lm, text = cached_lm(model, 1), list(self._nudging_text)
        for _ in range(self._config.num_nudging_tokens):  # The lookahead that decides what comes next.
            text.append(int(lm.read({0: Reading(text, 1)})[0][-1].argmax()))
        whole, split, is_usual = _read_in_two_ways(model, text)
        yield _closest_tokens("the nudging model's choice", whole, split, is_usual)


def _read_in_two_ways(model: Any, text: list[int]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The logits after the last tokens of a text, read in one pass and token by token, and whether they nearly agree.

    Returns:
        Two tensors of shape (tokens, vocab_size) in float32 or float64.
    """
    keep = min(_LAST, len(text) - 1)
    whole = cached_lm(model, 1).read({0: Reading(text, keep)})[0]
    lm = cached_lm(model, 1)
    parts = [lm.read({0: Reading(text[: len(text) - keep + i + 1], 1)})[0] for i in range(keep)]
    whole, split = (
        logits if logits.dtype == torch.float64 else logits.float() for logits in (whole, torch.cat(parts))
    )
    share = float((whole - split).abs().max() / whole.abs().max())
    return whole, split, share <= _USUAL_ROUNDING.get(model.dtype, _USUAL_ROUNDING_OF_HALF)


def _closest_tokens(what: str, whole: torch.Tensor, split: torch.Tensor, is_usual: bool) -> _Margin:
    best = whole.topk(2, dim=-1).values
    return _Margin(what, float((best[:, 0] - best[:, 1]).min()), float((whole - split).abs().max()), is_usual)
