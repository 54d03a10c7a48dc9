"""The laws on as many random cases as one likes: `python tests/long_run.py --cases 10000 --seed 0`.

A case is a pair of tiny models, prompts and settings, all drawn from the seed and the case's number. Its answers must
be the same undrafted and drafted, in a batch and alone, and with a dynamic cache, with a static one and without a
cache, and they must be those of the oracle where the settings are such that it can tell.

Cases that hold are written to a journal, and the next run with the same seed goes on after them. A case that does not
hold is printed with the command that runs it alone, and is tried again in the next run.
"""

import argparse
import copy
import functools
import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import tiny
import torch
from running import (
    DRAFT_LENGTHS,
    KINDS,
    UNSPACED,
    ForbidTokens,
    Outcome,
    decode_with_oracle,
    nudge,
    outcomes,
    random_rule,
)
from tiny import Pair
from tqdm import tqdm
from transformers import PreTrainedModel

from nudging_hf.core.config import WORD_BOUNDARIES
from nudging_hf.study.journal import Journal

JOURNALS = Path(__file__).parent.parent / "build" / "long_run"
# Dense, with few or a single key head, with experts, with sliding windows, with attention sinks, with learned, rotary
# and linearly biased positions, and hybrids with a recurrent state.
MODEL_TYPES = (
    "arcee bamba biogpt bloom codegen cohere cohere2 deepseek_v3 dots1 ernie4_5 exaone4 falcon falcon_h1 gemma "
    "gemma3_text glm gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe helium jamba lfm2 llama minimax "
    "mistral mixtral mpt nemotron olmo2 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next "
    "smollm3 stablelm starcoder2 zamba2"
).split()
GATES = [
    ("top1", 0.0), ("top1", 0.3), ("top1", 0.5), ("top1", 0.7), ("top1", 1.01), ("entropy", 1.2), ("entropy", 2.2),
    ("margin", 0.1), ("margin", 0.3), ("rejection", 0.0), ("rejection", 0.2), ("kad", 0.4), ("top1", None),
]  # fmt: skip
_CASES_OF_A_PAIR = 8
_TARGET = 0.3


# A case --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def model_of(model_type: str, seed: int) -> PreTrainedModel:
    return architectures.tiny(model_type, seed)


@torch.no_grad()
def noisy_copy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model that writes much as `model` does, so that drafts are accepted."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in copied.parameters():
        if parameter.dim() == 2 and parameter.dtype == torch.float64:
            noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.add_(0.05 * parameter.std() * noise)
    return copied


@functools.lru_cache(maxsize=2)
def pair_of(seed: int, number: int) -> Pair:
    """A pair of which one model is of the type whose turn it is, or both are of one of `tiny.ARCHITECTURES`."""
    draw = random.Random(f"{seed} pair {number}")
    if draw.random() < 0.3:
        return tiny.pair(draw.choice(tiny.ARCHITECTURES), draw.randrange(40), draw.choice(KINDS + UNSPACED))
    model_type = MODEL_TYPES[number % len(MODEL_TYPES)]
    model, tokenizer = model_of(model_type, draw.randrange(3)), draw.choice([tiny.byte_bpe, tiny.unspaced_byte_bpe])()
    kind = draw.choice(["noisy copy", "noisy copy", "another type", "base of two", "nudging model of two"])
    if kind == "noisy copy":
        return Pair(model, noisy_copy(model, number), tokenizer, tokenizer)
    if kind == "another type":
        return Pair(model, model_of(draw.choice(MODEL_TYPES), draw.randrange(3)), tokenizer, tokenizer)
    other = tiny.pair("llama", draw.randrange(40), draw.choice(["two", "unspaced two"]))
    if kind == "base of two":
        return Pair(model, other.nudging_model, tokenizer, other.nudging_tokenizer)
    return Pair(other.base, model, other.tokenizer, tokenizer)


@dataclass
class Case:
    """One random case.

    Attributes:
        given: the prompts of both models.
        settings: the arguments of `generate`.
        samples: whether each model draws its tokens.
        oracle: further settings of the oracle; `None` if it cannot tell the answers of these settings.
    """

    pair: Pair
    given: tuple[list[list[int]], list[list[int]]]
    settings: dict[str, Any]
    samples: tuple[bool, bool]
    oracle: dict[str, Any] | None
    draw: random.Random


def case_of(seed: int, number: int) -> Case:
    pair = pair_of(seed, number // _CASES_OF_A_PAIR)
    draw = random.Random(f"{seed} case {number}")
    given = tiny.prompts(pair, draw.choice([1, 2, 2, 3]), draw.randrange(1000))
    gate, threshold = draw.choice(GATES)
    plain = {
        "max_new_tokens": draw.choice([1, 5, 12, 12, 20]),
        "num_nudging_tokens": draw.choice([1, 4, 8, 16]),
        "takeover_on_agreement": draw.random() < 0.7,
        "word_boundary": draw.choice(WORD_BOUNDARIES),
    }
    settings = {**plain, "nudge_gate": gate, "nudge_threshold": "auto" if threshold is None else threshold}
    if threshold is None:
        settings["target_nudge_rate"] = _TARGET
    target = _TARGET if threshold is None else None
    oracle: dict[str, Any] | None = {**plain, "nudge_gate": gate, "nudge_threshold": threshold, "target": target}
    samples = (draw.random() < 0.3, draw.random() < 0.3)
    if any(samples):
        oracle = None
        settings |= draw.choice([{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}]) if samples[0] else {}
        settings["do_sample"] = True
    one_vocabulary = pair.tokenizer.get_vocab() == pair.nudging_tokenizer.get_vocab()
    eos, size = pair.tokenizer.eos_token_id, len(pair.tokenizer)
    if draw.random() < 0.2:
        settings["min_new_tokens"] = min(settings["max_new_tokens"], draw.choice([1, 8]))
        oracle = {**oracle, "min_new_tokens": settings["min_new_tokens"]} if oracle and one_vocabulary else None
    is_plain = "min_new_tokens" not in settings
    kind = draw.choice(["none"] * 4 + ["forbid", "stop tokens", "stop strings", "bad words", "ngrams", "penalty"])
    ordinary = [i for i in range(size) if i not in pair.tokenizer.all_special_ids]
    if kind == "forbid":
        ends_from = max(7, settings.get("min_new_tokens", 0))  # Before it, EOS is forbidden too.
        rule = random_rule(eos, size, number, (0.02, 0.2), ends_from)
        settings["logits_processor"] = [ForbidTokens(max(map(len, given[0])), rule)]
        oracle = {**oracle, "forbidden": rule} if oracle and is_plain and len(given[0]) == 1 else None
    elif kind == "stop tokens":
        settings["eos_token_id"] = draw.sample(ordinary, size // 10)
        oracle = {**oracle, "stop_tokens": settings["eos_token_id"]} if oracle and is_plain else None
    elif kind == "stop strings":
        settings["stop_strings"], oracle = draw.sample(["e", " t", "th", "\n", "o ", "12"], 2), None
    elif kind == "bad words":
        settings["bad_words_ids"] = [[i] for i in draw.sample(ordinary, 9)] + [draw.sample(ordinary, 2)]
        oracle = None
    elif kind == "ngrams":
        settings["no_repeat_ngram_size"], oracle = 2, None
    elif kind == "penalty":
        settings["repetition_penalty"], oracle = 1.3, None
    return Case(pair, given, settings, samples, oracle, draw)


def check(seed: int, number: int) -> str:
    """Writes the answers of a case in every way.

    Returns:
        How the answers were written, in a few words.

    Raises:
        AssertionError: if two ways differ.
    """
    case = case_of(seed, number)
    own_config = case.pair.nudging_model.generation_config
    own_config.do_sample = case.samples[1]
    try:
        return _check(case)
    finally:
        own_config.do_sample = False


def _check(case: Case) -> str:
    prompts, nudging_prompts = case.given
    drafts = iter(case.draw.sample(DRAFT_LENGTHS[1:], 4))

    def answers(rows: Iterable[int], **more: Any) -> list[Outcome]:
        torch.manual_seed(1)
        chosen = [prompts[i] for i in rows], [nudging_prompts[i] for i in rows]
        return outcomes(nudge(case.pair, *chosen, **case.settings, **more))

    every = range(len(prompts))
    undrafted = answers(every, num_draft_tokens=0)
    found = {"drafted": answers(every, num_draft_tokens=next(drafts))}
    ways = ["sampled" if any(case.samples) else "greedy"]
    found["uncached"] = answers(every, use_cache=False, num_draft_tokens=next(drafts))
    if case.draw.random() < 0.5:
        try:
            found["static"] = answers(every, cache_implementation="static", num_draft_tokens=next(drafts))
            ways.append("static")
        except ValueError as refusal:  # A cache that a model cannot use is refused with a reason.
            if "cache_implementation" not in str(refusal):
                raise
    for way, got in found.items():
        assert got == undrafted, f"{way}: {got} != {undrafted}"
    # A processor of the caller's own counts the padding of its batch. A row alone has the seed of a batch's first row.
    if len(prompts) > 1 and "logits_processor" not in case.settings:
        row = 0 if any(case.samples) else case.draw.randrange(len(prompts))
        [alone] = answers([row], num_draft_tokens=next(drafts))
        assert alone == undrafted[row], f"row {row} alone: {alone} != {undrafted[row]}"
        ways.append("alone")
    if case.oracle is not None:
        row = case.draw.randrange(len(prompts))
        expected = decode_with_oracle(case.pair, prompts[row], nudging_prompts[row], **case.oracle)
        assert outcomes([expected]) == [undrafted[row]], f"oracle: {outcomes([expected])} != {undrafted[row]}"
        ways.append("oracle")
    return " ".join(ways)


# The run -------------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Runs the cases that the command line asks for, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases (default: %(default)s)")
    parser.add_argument("--case", type=int, help="run this case alone, without the journal")
    parser.add_argument("--journal", type=Path, help="where finished cases are kept (default: build/long_run)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.case is not None:
        print(check(given.seed, given.case))
        return 0
    path = given.journal or JOURNALS / f"seed-{given.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(path, {"seed": given.seed})
    failed, ways = [], Counter()
    with tqdm(range(given.cases), unit="case", mininterval=1.0) as bar:
        for number in bar:
            try:
                ways.update(journal.once({"case": number}, lambda number=number: check(given.seed, number)).split())
            except Exception as error:  # Whatever a case raises, the others are tried.
                failed.append(number)
                bar.write(f"case {number} {type(error).__name__}: {error}"[:2000])
                bar.write(f"    python tests/long_run.py --seed {given.seed} --case {number}")
            bar.set_postfix(failed=len(failed))
    print(f"{given.cases - len(failed)} of {given.cases} cases hold ({dict(ways)}); failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
