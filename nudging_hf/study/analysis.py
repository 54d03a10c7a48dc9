"""What a pair of models is like, position by position and threshold by threshold. It knows models, prompts and
distributions, never files or plots.

The observations are those of the nudging paper (arXiv 2410.09300). They are made along answers that an aligned model
wrote: the large aligned model's greedy ones, or, where there is none, the nudged ones. All models read the same
answer, teacher-forced, each in its own vocabulary and after its own prompt.

*Positions* are the base's tokens of an answer that add text; the end mark is none. At a position the base has its
top-1 probability p and its greedy token. A model is *compared* there if a token starts at the same byte of the answer
in its own vocabulary too: with one vocabulary that is so everywhere. Two greedy tokens *agree*

- with one vocabulary, if they are the same token;
- across vocabularies, if the text of one, which is not empty, is a prefix of the text of the other;
- in any case, if both end the answer, and never if only one does.

The aligned model's greedy token is the large one's, or, where there is none, the nudging model's. A position where the
base does not agree with it is *alignment-related*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch

from ..chats import REASONING_TEMPLATE, chat_inputs, padded, plain_prompt
from ..core.answer import OneVocabulary, answer_class
from ..core.gate import top1_probabilities
from ..core.generate import generate
from ..core.transformers_private import end_tokens, input_device, plain_generate
from ..core.vocabulary import Vocabulary
from ..provenance import count_nudged_words, pieces_of
from .calibration import Prompt

BINS = tuple(i / 10 for i in range(11))  # The paper's: tenths of the base's top-1 probability; 1 is in the last.
THRESHOLDS = tuple(i / 20 for i in range(1, 21))  # At which it is counted what a threshold would catch.


@dataclass(frozen=True)
class Answer:
    """One answer. Words are what stands between white space, tokens those of the model that wrote, without end mark.

    Args:
        finished: whether the model ended it, and not the limit on its length.
        nudged_words, nudged_tokens: how many of them the nudging model wrote; 0 where a model wrote alone.
    """

    text: str
    finished: bool
    words: int
    tokens: int
    nudged_words: int = 0
    nudged_tokens: int = 0


@dataclass(frozen=True)
class Positions:
    """What the models would say along one answer, at each of the base's positions.

    Args:
        top1: the base's top-1 probability.
        differs: whether the position is alignment-related; `None` where the aligned model is not compared.
        small_agrees: whether the nudging model agrees with the large aligned one; `None` where one of them is not
            compared, and where there is no large one.
    """

    top1: list[float]
    differs: list[bool | None]
    small_agrees: list[bool | None]


class Verdict(NamedTuple):
    """What a model would say at one place of an answer.

    Args:
        token: its greedy token.
        text: the bytes that the token adds.
        ends: whether the token is an EOS of the model.
        top1: its probability.
    """

    token: int
    text: bytes
    ends: bool
    top1: float


class Reader:
    """A causal LM that writes answers and reads those of others.

    Args:
        model, tokenizer: of transformers.
        chat: whether it is asked by its chat template, if it has one; else it is given the base's prompt.
        base_template: what makes the base's prompt where a [`~calibration.Prompt`] does not say it.
    """

    def __init__(self, model: Any, tokenizer: Any, chat: bool, base_template: str = REASONING_TEMPLATE):
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.eos = set(end_tokens(model, tokenizer))
        self._chat = chat and bool(tokenizer.chat_template)
        self._base_template = base_template

    @property
    def pad_token_id(self) -> int:
        """What stands behind the shorter answers of a batch."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.eos, default=0)

    def text(self, answer: Sequence[int]) -> str:
        """The text of an answer's ids."""
        return self.vocabulary.join(answer).decode("utf-8", errors="replace")

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """What it is asked, in its own vocabulary."""
        if self._chat:
            inputs = chat_inputs(prompt.messages, self.tokenizer, self.tokenizer)
            return inputs["nudging_input_ids"][0].tolist()
        text = plain_prompt(prompt.messages, self._base_template) if prompt.prompt is None else prompt.prompt
        return self.tokenizer(text)["input_ids"]

    def padded_prompts(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask of shape (batch, length), where the model reads them."""
        ids, mask = padded([self.prompt_ids(prompt) for prompt in prompts], self.tokenizer)
        return ids.to(input_device(self.model)), mask.to(input_device(self.model))

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[tuple[list[int], bool]]:
        """Its own greedy answers: ids without the end mark, and whether it ended them."""
        ids, mask = self.padded_prompts(prompts)
        sequences = plain_generate(self.model)(
            self.model,
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=self.pad_token_id,
        )
        answers = []
        for new in sequences[:, ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(new) if token in self.eos), None)
            answers.append((new[:end], end is not None))
        return answers

    @torch.no_grad()
    def verdicts(self, prompt: list[int], answer: list[int], text: bytes) -> dict[int, Verdict]:
        """What it would say at each place of an answer where a token of its own starts, by byte of the text.

        One forward pass for one answer. Where the ids are not those of the text, as its tokenizer does not keep it
        (lower case, accents) or it is no whole UTF-8, places behind the first token that differs are left out.

        Args:
            prompt, answer: ids of its own vocabulary.
            text: the answer's.
        """
        if not answer:
            return {}
        ids = torch.tensor([prompt + answer], device=input_device(self.model))
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        tokens, top1 = logits.argmax(dim=-1).tolist(), top1_probabilities(logits).tolist()
        found = {}
        start = 0
        for written, greedy, probability in zip(answer, tokens, top1, strict=True):
            added = self.vocabulary.bytes_of(written)
            if added:
                adds = self.vocabulary.bytes_of(greedy)
                found[start] = Verdict(greedy, adds, greedy in self.eos, probability)
            if not text.startswith(added, start):
                break
            start += len(added)
        return found


def agree(one: Verdict, other: Verdict, one_vocabulary: bool) -> bool:
    """Whether two greedy tokens agree: see the head of the module."""
    if one.ends or other.ends:
        return one.ends and other.ends
    if one_vocabulary:
        return one.token == other.token
    shorter, longer = sorted((one.text, other.text), key=len)
    return bool(shorter) and longer.startswith(shorter)


@dataclass(frozen=True)
class Unit:
    """A piece of the work that is done at once.

    Args:
        kind: "along" (answers of the aligned model, and positions along them), "nudged", "base" or "nudging model"
            (answers of one model alone).
        start: the number of its first prompt.
        threshold: of nudged answers; `None` for answers of one model alone.
    """

    kind: str
    start: int
    threshold: float | None = None


class Analysis:
    """The measurements, in units.

    Args:
        base, nudging: the pair.
        large: the large aligned model, or `None`: then positions are those of the nudged answers.
        prompts: one or more.
        threshold: γ of the nudged answers that positions are those of, where there is no large aligned model.
        thresholds: those at which nudged answers are measured.
        batch_size: prompts a unit.
        max_new_tokens: of an answer, in tokens of the model that writes it, or of the base.
    """

    def __init__(
        self,
        base: Reader,
        nudging: Reader,
        large: Reader | None,
        prompts: Sequence[Prompt],
        threshold: float,
        thresholds: Sequence[float],
        batch_size: int,
        max_new_tokens: int,
    ):
        self._base, self._nudging, self._large = base, nudging, large
        self._prompts = prompts
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._kinds: list[tuple[str, float | None]] = [("along", threshold if large is None else None)]
        self._kinds += [("nudged", gamma) for gamma in thresholds]
        if are_labelled(prompts):
            self._kinds += [("base", None), ("nudging model", None)]
        writer = large or base
        readers = [reader for reader in (base, nudging, large) if reader is not None]
        self._reads = {reader: answer_class(writer.vocabulary, reader.vocabulary) for reader in readers}
        self._one_vocabulary = {
            (one, other): any(
                answer_class(*both) is OneVocabulary  # Either may have control tokens of its own.
                for both in ((one.vocabulary, other.vocabulary), (other.vocabulary, one.vocabulary))
            )
            for one, other in combinations([base, nudging, *([large] if large is not None else [])], 2)
        }

    def units(self) -> list[Unit]:
        """All of them, each independent of the others."""
        starts = range(0, len(self._prompts), self._batch_size)
        return [Unit(kind, start, threshold) for kind, threshold in self._kinds for start in starts]

    def measure(self, unit: Unit) -> list[dict[str, Any]]:
        """What a unit comes to, as JSON: one row a prompt, an [`Answer`] and, along it, [`Positions`].

        Raises:
            ValueError: for prompts that a chat template or nudging refuses.
        """
        prompts = self._prompts[unit.start : unit.start + self._batch_size]
        if unit.threshold is not None:
            written = self._nudged(prompts, unit.threshold)
            writer = self._base
        else:
            alone = {"along": self._large, "base": self._base, "nudging model": self._nudging}[unit.kind]
            assert alone is not None
            writer = alone
            written = self._alone(writer, prompts)
        rows = [{"answer": asdict(answer)} for _, answer in written]
        if unit.kind == "along":
            for row, prompt, (ids, _) in zip(rows, prompts, written, strict=True):
                row["positions"] = asdict(self._positions(writer, prompt, ids))
        return rows

    def _alone(self, writer: Reader, prompts: Sequence[Prompt]) -> list[tuple[list[int], Answer]]:
        answers = []
        for ids, finished in writer.answers(prompts, self._max_new_tokens):
            text = writer.text(ids)
            answers.append((ids, Answer(text, finished, words=len(text.split()), tokens=len(ids))))
        return answers

    def _nudged(self, prompts: Sequence[Prompt], threshold: float) -> list[tuple[list[int], Answer]]:
        base, nudging = self._base, self._nudging
        ids, mask = base.padded_prompts(prompts)
        nudging_ids, nudging_mask = nudging.padded_prompts(prompts)
        out: Any = generate(
            base.model,
            input_ids=ids,
            attention_mask=mask,
            tokenizer=base.tokenizer,
            nudging_model=nudging.model,
            nudging_tokenizer=nudging.tokenizer,
            nudging_input_ids=nudging_ids,
            nudging_attention_mask=nudging_mask,
            nudge_threshold=threshold,
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            pad_token_id=base.pad_token_id,
            return_dict_in_generate=True,
        )
        answers = []
        new = out.sequences[:, ids.shape[1] :].tolist()
        lengths = (~out.base_top1_probs.isnan()).sum(dim=1).tolist()
        columns = (new, lengths, out.nudged_mask.tolist(), pieces_of(out, base.tokenizer), out.finish_reasons)
        for row, length, nudged, pieces, reason in zip(*columns, strict=True):
            written = row[:length]
            while written and written[-1] in base.eos:  # The end mark: the base itself never ends an answer.
                written.pop()
            nudged_words, words = count_nudged_words(pieces)
            text = "".join(piece.text for piece in pieces)
            answer = Answer(text, reason == "eos", words, len(written), nudged_words, sum(nudged))
            answers.append((written, answer))
        return answers

    def _positions(self, writer: Reader, prompt: Prompt, ids: list[int]) -> Positions:
        """What the models would say along an answer of `writer`, `ids`."""
        text = writer.vocabulary.join(ids)
        seen = {}
        for reader, reading in self._reads.items():
            own_prompt = reader.prompt_ids(prompt)
            answer = reading(writer.vocabulary, reader.vocabulary, writer.prompt_ids(prompt), own_prompt)
            for token in ids:
                answer.append(token)
            seen[reader] = reader.verdicts(own_prompt, answer.nudging_ids(), text)

        def agreement(one: Reader, other: Reader, place: int) -> bool | None:
            if place not in seen[one] or place not in seen[other]:
                return None
            return agree(seen[one][place], seen[other][place], self._one_vocabulary[one, other])

        base, small, large = self._base, self._nudging, self._large
        differs: list[bool | None] = []
        small_agrees: list[bool | None] = []
        for place in seen[base]:
            agrees = agreement(base, large or small, place)
            differs.append(None if agrees is None else not agrees)
            small_agrees.append(None if large is None else agreement(small, large, place))
        return Positions([verdict.top1 for verdict in seen[base].values()], differs, small_agrees)


def are_labelled(prompts: Iterable[Prompt]) -> bool:
    """Whether the right answer to every prompt is known."""
    return all(prompt.is_labelled for prompt in prompts)


# Tables -------------------------------------------------------------------------------------------------------------


def tables(prompts: Sequence[Prompt], measured: Mapping[Unit, list[dict[str, Any]]]) -> dict[str, Any]:
    """What all units come to.

    Args:
        prompts: those of the analysis.
        measured: each unit's rows, as [`Analysis.measure`] gives them, in any order.

    Returns:
        For JSON; shares are of 1, and `None` where they would be shares of nothing. `along` says whose answers
        positions are those of, and how many; `bins` has a row a tenth of the base's top-1 probability; `thresholds`
        what p < γ would catch; `agreement` where the nudging model and the large aligned one agree; `curve` the
        nudged answers at each γ that was measured; `alone` the accuracy of each model alone.
    """
    answers: dict[tuple[str, float | None], list[Answer]] = {}
    along: list[Positions] = []
    for unit in sorted(measured, key=lambda unit: (unit.kind, unit.threshold or 0.0, unit.start)):
        rows = measured[unit]
        answers.setdefault((unit.kind, unit.threshold), []).extend(Answer(**row["answer"]) for row in rows)
        along += [Positions(**row["positions"]) for row in rows if "positions" in row]
    top1 = [p for row in along for p in row.top1]
    differs = [verdict for row in along for verdict in row.differs]
    small_agrees = [verdict for row in along for verdict in row.small_agrees]
    (threshold,) = [gamma for kind, gamma in answers if kind == "along"]
    large = threshold is None

    def accuracy(kind: str, gamma: float | None = None) -> float | None:
        if (kind, gamma) not in answers or not are_labelled(prompts):
            return None
        return _mean(
            prompt.is_right(answer.text) for prompt, answer in zip(prompts, answers[kind, gamma], strict=True)
        )

    return {
        "prompts": len(prompts),
        "along": {
            "writer": "large aligned" if large else "nudged",
            "threshold": threshold,
            "positions": len(top1),
            "compared": sum(verdict is not None for verdict in differs),
            "alignment_related": sum(verdict is True for verdict in differs),
            "disagreement": _mean(differs),
            "unfinished": sum(not answer.finished for answer in answers["along", threshold]),
        },
        "bins": _bins(top1, differs, small_agrees),
        "thresholds": [_caught(gamma, top1, differs, small_agrees) for gamma in THRESHOLDS],
        "agreement": {
            "alignment_related": _mean([a for a, d in zip(small_agrees, differs, strict=True) if d]),
            "elsewhere": _mean([a for a, d in zip(small_agrees, differs, strict=True) if d is False]),
            "alignment_related_compared": sum(
                a is not None and d is True for a, d in zip(small_agrees, differs, strict=True)
            ),
        },
        "curve": [
            {
                "threshold": gamma,
                "accuracy": accuracy("nudged", gamma),
                "nudged_words": _share(sum(a.nudged_words for a in its), sum(a.words for a in its)),
                "nudged_tokens": _share(sum(a.nudged_tokens for a in its), sum(a.tokens for a in its)),
                "unfinished": sum(not a.finished for a in its),
            }
            for (kind, gamma), its in answers.items()
            if kind == "nudged"
        ],
        "alone": {
            "base": accuracy("base"),
            "nudging model": accuracy("nudging model"),
            "large aligned": accuracy("along") if large else None,
        },
    }


def _bins(
    top1: Sequence[float], differs: Sequence[bool | None], small_agrees: Sequence[bool | None]
) -> list[dict[str, Any]]:
    rows = []
    for low, high in pairwise(BINS):
        inside = [i for i, p in enumerate(top1) if low <= p and (p < high or high == BINS[-1])]
        small = [small_agrees[i] for i in inside if differs[i]]
        rows.append({
            "from": low,
            "to": high,
            "positions": len(inside),
            "share": _share(len(inside), len(top1)),
            "compared": sum(differs[i] is not None for i in inside),
            "disagreement": _mean([differs[i] for i in inside]),
            "small_compared": sum(agrees is not None for agrees in small),
            "small_agreement": _mean(small),
        })  # fmt: skip
    return rows


def _caught(
    gamma: float, top1: Sequence[float], differs: Sequence[bool | None], small_agrees: Sequence[bool | None]
) -> dict[str, Any]:
    """What a nudge wherever p < γ would come to."""
    below = [i for i, p in enumerate(top1) if p < gamma]
    return {
        "threshold": gamma,
        "positions": _share(len(below), len(top1)),
        "caught": _share(sum(differs[i] is True for i in below), sum(verdict is True for verdict in differs)),
        "disagreement": _mean([differs[i] for i in below]),
        "small_agreement": _mean([small_agrees[i] for i in below if differs[i]]),
    }


def _mean(marks: Iterable[bool | None]) -> float | None:
    """The share that is true, of those that are known."""
    known = [mark for mark in marks if mark is not None]
    return _share(sum(known), len(known))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
