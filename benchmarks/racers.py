"""The racers: each writes answers to the same questions in its own way. They know models, never clocks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from widen import hand_to_onednn, widened

import nudging_hf
from nudging_hf.core.transformers_private import CACHE
from nudging_hf.study import baselines
from nudging_hf.study.bench import BASE as BASE_ALONE
from nudging_hf.study.bench import exactly
from nudging_hf.study.demo import MAX_NEW_TOKENS
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.reader import Reader, pair_of

MINI = Path(__file__).parents[1] / "examples" / "mini"
BASE, LARGE = "base", "large-aligned"
OWN, SHARED, UNALIGNED = "nudging", "nudging-shared", "nudging-shared-unaligned"
THRESHOLD = 0.4

# For passes of several tokens, torch's float32 linear layers use MKL, which is slow on some CPUs. This is oneDNN.
ONEDNN = "float32-onednn"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, ONEDNN: torch.float32}

ADAPTIVE = "adaptive"
LMs = dict[str, Reader]


def dev_questions(per_task: int, skip: int = 0) -> list[Prompt]:
    """The first dev questions of each task of the mini pair, task by task, after those that are skipped."""
    sys.path.insert(0, str(MINI))
    import world

    drawn: dict[str, list[Prompt]] = {}
    for problem in world.problem_set("dev", world.DEV_SEED, world.DEV_ROWS_PER_TASK):
        drawn.setdefault(problem.task, []).append(Prompt(**world.row(problem)))
    return [question for questions in drawn.values() for question in questions[skip : skip + per_task]]


def load(name: str, factor: int, dtype: str, change: Callable[[Reader], Any] | None = None) -> Reader:
    """A model of the mini pair, widened, in one of `DTYPES`. If `change` is given, its result is widened instead."""
    lm = Reader.load(MINI / "models" / name)
    model = lm.model if change is None else change(lm)
    wide = Reader(widened(model, factor).to(DTYPES[dtype]), lm.tokenizer, chat=True)
    if dtype == ONEDNN:
        hand_to_onednn(wide.model)
    return wide


@torch.no_grad()
def contradicting(lm: Reader) -> Any:
    """A copy of the model that writes only tokens that begin a word, each in place of another, so it rarely agrees.

    Each of its words is thus one token, after which it is the base's turn. A model of random weights would not do: its
    words may never end, and then the base would have nothing to write.
    """
    model = copy.deepcopy(lm.model)
    texts = lm.tokenizer.batch_decode([[i] for i in range(model.config.vocab_size)])
    words = torch.tensor([i for i, text in enumerate(texts) if text.startswith(" ") and text.strip()])
    head = torch.zeros_like(model.lm_head.weight)
    head[words] = model.lm_head.weight[words.roll(len(words) // 2)]
    model.lm_head.weight = torch.nn.Parameter(head)  # A new parameter, so that a tied embedding stays as it was.
    return model


def widths(width: int) -> dict[str, int]:
    """How wide each model becomes. A pass of a nudging model then costs about 1/15 of a pass of the base."""
    small = max(1, width * 2 // 3)
    return {BASE: width, LARGE: width, SHARED: small, UNALIGNED: small, OWN: width}


@dataclass(frozen=True)
class Work:
    """A task for a contestant: which questions to answer, at which threshold, and how much to write.

    Args:
        questions: the questions, one for each row.
        threshold: γ.
        lengths: for each row, how many tokens a contestant that never ends an answer writes. It is the length of a
            nudged answer to the same question.
        max_new_tokens: the limit of a nudged answer, which ends by itself.
    """

    questions: Sequence[Prompt]
    threshold: float = THRESHOLD
    lengths: Sequence[int] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    _prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def prompts(self, lm: Reader) -> tuple[torch.Tensor, torch.Tensor]:
        """The questions as a model reads them: `input_ids` and `attention_mask`. They are encoded once, untimed."""
        if id(lm) not in self._prompts:
            self._prompts[id(lm)] = lm.padded_prompts(self.questions)
        return self._prompts[id(lm)]

    def inputs_of_both(self, base: Reader, nudging: Reader) -> dict[str, torch.Tensor]:
        """The questions as the two models of a pair read them, as arguments of `generate`."""
        ids, mask = self.prompts(base)
        nudging_ids, nudging_mask = self.prompts(nudging)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "nudging_input_ids": nudging_ids,
            "nudging_attention_mask": nudging_mask,
        }

    def of_length(self, tokens: int) -> Work:
        """The same task with another number of tokens for every row."""
        return replace(self, max_new_tokens=tokens, lengths=[tokens] * len(self.questions))

    @property
    def fixed(self) -> dict[str, Any]:
        """Arguments of `generate` for greedy answers of exactly the length of the longest row."""
        return exactly(max(self.lengths))


Write = Callable[[LMs, Work], list[list[int]]]


@dataclass(frozen=True)
class Racer:
    """One way to write an answer.

    Args:
        name: its name in tables.
        models: the names of the models that it uses, the large one first.
        write: writes, and returns the ids of each row's answer, without padding.
        draft: for nudged answers, the name of the nudging model and the draft length.
        in_batches: whether it races in batches too. Some can write only one row, and others show nothing new there.
    """

    name: str
    models: tuple[str, ...]
    write: Write
    draft: tuple[str, int | str] | None = None
    in_batches: bool = True


def nudged(lms: LMs, work: Work, small: str, draft: int | str, **kwargs: Any) -> list[list[int]]:
    """The ids of each row's answer, without padding."""
    return _generate(lms, work, small, draft, **kwargs)[0]


def nudged_output(
    lms: LMs, work: Work, small: str, draft: int | str, **kwargs: Any
) -> tuple[list[list[int]], nudging_hf.NudgingOutput]:
    """The ids, and the whole output of `generate`. For the latter, the base also reads an answer's last tokens."""
    return _generate(lms, work, small, draft, return_dict_in_generate=True, **kwargs)


def _generate(lms: LMs, work: Work, small: str, draft: int | str, **kwargs: Any) -> tuple[list[list[int]], Any]:
    base, nudging = lms[BASE], lms[small]
    settings = {
        "nudge_threshold": work.threshold,
        "num_draft_tokens": draft,
        "do_sample": False,
        "max_new_tokens": work.max_new_tokens,
    }
    inputs = work.inputs_of_both(base, nudging)
    out = pair_of(base, nudging).generate(inputs, **{**settings, **kwargs})
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    rows, eos = sequences[:, inputs["input_ids"].shape[1] :].tolist(), base.tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows], out


def base_alone(lms: LMs, work: Work, **kwargs: Any) -> list[list[int]]:
    """Plain `generate`. As always, all rows are written to the length of the longest. Each counts with its own."""
    ids, mask = work.prompts(lms[BASE])
    out = lms[BASE].model.generate(input_ids=ids, attention_mask=mask, **work.fixed, **kwargs)
    return _rows(out, ids, work)


def large_aligned(lms: LMs, work: Work) -> list[list[int]]:
    ids, mask = work.prompts(lms[LARGE])
    return _rows(lms[LARGE].model.generate(input_ids=ids, attention_mask=mask, **work.fixed), ids, work)


def assisted(lms: LMs, work: Work) -> list[list[int]]:
    """Assisted generation of transformers, with its defaults: the small model drafts, the text is the base's own."""
    return base_alone(lms, work, assistant_model=lms[SHARED].model)


def mixed(lms: LMs, work: Work, mix: Callable[..., torch.Tensor], unaligned: bool) -> list[list[int]]:
    base, nudging = lms[BASE], lms[SHARED]
    more: dict[str, Any] = {}
    if unaligned:
        more = {"unaligned_model": lms[UNALIGNED].model, "unaligned_tokenizer": lms[UNALIGNED].tokenizer}
    inputs = work.inputs_of_both(base, nudging)
    out = mix(base.model, **inputs, **pair_of(base, nudging).arguments, **more, **work.fixed)
    return _rows(out, inputs["input_ids"], work)


@torch.no_grad()
def stepping_both(lms: LMs, work: Work) -> list[list[int]]:
    """The usual implementation of nudging: both models read each token, and one of them chooses the next.

    A nudging word ends where the nudging model's next token begins with a space. Both models keep their caches, and
    each step transfers data from the device once.
    """
    base, nudging = lms[BASE], lms[SHARED]
    fed = {"base": work.prompts(base)[0], "nudging": work.prompts(nudging)[0]}
    models = {"base": base.model, "nudging": nudging.model}
    caches = {name: DynamicCache() for name in models}
    begins_word = [
        text.startswith(" ") for text in base.tokenizer.batch_decode([[i] for i in range(len(base.tokenizer))])
    ]
    eos = [nudging.tokenizer.eos_token_id, base.tokenizer.eos_token_id]
    answer: list[int] = []
    nudges = True
    while len(answer) < work.lengths[0]:
        logits = {
            name: model(input_ids=fed[name], **{CACHE: caches[name]}, use_cache=True, logits_to_keep=1).logits[0, -1]
            for name, model in models.items()
        }
        top1, token = logits["base"].float().softmax(dim=-1).max(dim=-1)
        logits["nudging"][eos] = float("-inf")
        said = torch.stack([top1.double(), token.double(), logits["nudging"].argmax().double()]).tolist()
        confident = said[0] >= work.threshold and int(said[1]) not in eos
        word_goes_on = nudges and answer and not begins_word[int(said[2])]
        nudges = bool(not answer or word_goes_on or not confident)
        answer.append(int(said[2] if nudges else said[1]))
        fed = dict.fromkeys(models, torch.tensor([answer[-1:]]))
    return [answer]


def _rows(sequences: torch.Tensor, ids: torch.Tensor, work: Work) -> list[list[int]]:
    new = sequences[:, ids.shape[1] :].tolist()
    return [row[:n] for row, n in zip(new, work.lengths, strict=True)]


def nudged_racer(small: str, draft: int | str) -> Racer:
    name = "nudged, " + ("two vocabularies" if small == OWN else "one vocabulary")
    name += "" if draft == ADAPTIVE else f", {'nothing drafted' if draft == 0 else f'drafts of {draft}'}"
    few = draft in (ADAPTIVE, 0, 4, 8) if small == SHARED else draft == ADAPTIVE
    return Racer(name, (BASE, small), partial(nudged, small=small, draft=draft), (small, draft), few)


ALONE = Racer(BASE_ALONE, (BASE,), base_alone)
RACERS = [
    ALONE,
    *(nudged_racer(SHARED, draft) for draft in (ADAPTIVE, 0, 4, 8, 16, 32)),
    *(nudged_racer(OWN, draft) for draft in (ADAPTIVE, 8, 16, 32)),
    Racer("assisted generation", (BASE, SHARED), assisted, in_batches=False),
    Racer("both models at every token", (BASE, SHARED), stepping_both, in_batches=False),
    Racer("ensemble", (BASE, SHARED), partial(mixed, mix=baselines.ensemble, unaligned=False), in_batches=False),
    Racer(
        "proxy tuning",
        (BASE, SHARED, UNALIGNED),
        partial(mixed, mix=baselines.proxy_tuning, unaligned=True),
        in_batches=False,
    ),
    Racer("large aligned model alone", (LARGE,), large_aligned),
]
