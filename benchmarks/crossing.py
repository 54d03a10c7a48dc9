"""Times the bridge between two vocabularies: what one token costs as an answer grows. It runs no model.

    python benchmarks/crossing.py                      # between the tokenizers of the mini pair
    python benchmarks/crossing.py FOLDER FOLDER ...    # between tokenizers of your own, each pair in both directions
    python benchmarks/crossing.py --quick              # a small check that it runs; do not quote its figures

The cost of a token is the time of four calls: `append` adds the token, `nudging_ids` computes what the nudging model
then reads, `words` finds the words in a lookahead of 16 of its tokens, and `draft` turns them into ids of the base. A
decoder never needs more than these four for a token, and usually needs fewer.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import transformers
from transformers import AutoTokenizer

import nudging_hf
from nudging_hf.core.answer import TwoVocabularies
from nudging_hf.core.vocabulary import Vocabulary

MINI = Path(__file__).parents[1] / "examples" / "mini" / "models"
LOOKAHEAD = 16  # The lookahead in tokens of the nudging model. It is the default.
LENGTHS = (500, 2_000, 8_000, 32_000)
TOKENS = 100  # How many tokens are timed at each length.
SECONDS = 20.0  # After this time, no further token is timed at a length.
PIECE = 500  # How many characters are encoded at once. This is not timed.


# Endless texts ------------------------------------------------------------------------------------------------------

_ENGLISH = (
    "The river rose in the night, and by morning the lower fields were under water. Nobody in the village was "
    "surprised; it happened every few years, and there were marks on the wall of the church to prove it. What did "
    'surprise them was the boat. "It isn\'t one of ours," said the miller. It had come down from the hills with '
    "its lamp still burning, 3 sacks of flour on board, and no one at the oar. "
)
_CHINESE = (
    "昨天夜里河水上涨，到了早晨，低处的田地已经被水淹没。村里没有人感到惊讶，因为每隔几年都会发生一次，"
    "教堂的墙上还留着从前的水痕。让他们惊讶的是那条船。磨坊主说：“这不是我们的船。”它从山里漂下来，"
    "灯还亮着，船上有三袋面粉，却没有人划桨。"
)
_CODE = (
    "class Ledger:\n"
    "    def __init__(self, entries: list[tuple[str, float]]):\n"
    "        self._totals: dict[str, float] = {}\n"
    "        for account, amount in entries:\n"
    "            if account not in self._totals:\n"
    "                self._totals[account] = 0.0\n"
    "            self._totals[account] += round(amount * 100) / 100  # cents\n\n"
    "    def balance(self) -> float:\n"
    "        return sum(self._totals.values())\n\n\n"
)


def _shuffled(parts: Sequence[str]) -> Iterator[str]:
    """Repeats the parts endlessly, each time in another order, so that no cache can know what comes next."""
    draw = random.Random(0)
    while True:
        yield from draw.sample(parts, len(parts))


def _letters() -> Iterator[str]:
    draw = random.Random(0)
    while True:
        yield draw.choice("etaoinshrdlu")


TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    "English": lambda: _shuffled([word + " " for word in _ENGLISH.split()]),
    "Chinese": lambda: _shuffled([*_CHINESE]),
    "code": lambda: _shuffled([line + "\n" for line in _CODE.split("\n")]),
    "one long word": _letters,
}


# Timing -------------------------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """An answer that grows by an endless text.

    Args:
        base, nudging: the vocabularies of the two models.
        text: the pieces of one of `TEXTS`.
    """

    base: Vocabulary
    nudging: Vocabulary
    text: Iterator[str]

    def __post_init__(self) -> None:
        prompts = [self._encoded(vocabulary, "Go on:\n") for vocabulary in (self.base, self.nudging)]
        self.answer = TwoVocabularies(self.base, self.nudging, *prompts)
        self._next: list[int] = []

    def cost(self, length: int, tokens: int, seconds: float) -> float:
        """Lets the answer grow to a length and times further tokens there.

        Args:
            length: the length of the answer, in tokens of the base.
            tokens: how many tokens to time.
            seconds: after this time, no further token is timed.

        Returns:
            The median time of a token in seconds.
        """
        while len(self.answer.ids) < length:
            self.answer.append(self._token())
            if len(self.answer.ids) % 100 == 0:
                self.answer.nudging_ids()  # As in decoding, the nudging model has read the text so far.
        times: list[float] = []
        while len(times) < tokens and (not times or sum(times) < seconds):
            token, lookahead = self._token(), self._lookahead()
            began = time.perf_counter()
            self.answer.append(token)
            self.answer.nudging_ids()
            self.answer.words(lookahead)
            self.answer.draft(lookahead, LOOKAHEAD)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def _token(self) -> int:
        self._fill()
        return self._next.pop(0)

    def _lookahead(self) -> list[int]:
        """What a nudging model would write that always agrees with the base."""
        self._fill()
        text = self.base.join(self._next[: 4 * LOOKAHEAD]).decode(errors="ignore")
        return self._encoded(self.nudging, text)[:LOOKAHEAD]

    def _fill(self) -> None:
        while len(self._next) < 4 * LOOKAHEAD + 1:
            piece = ""
            while len(piece) < PIECE:
                piece += next(self.text)
            self._next += self._encoded(self.base, piece)

    @staticmethod
    def _encoded(vocabulary: Vocabulary, text: str) -> list[int]:
        return vocabulary.tokenizer(text, add_special_tokens=False).input_ids


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tokenizers", nargs="*", metavar="FOLDER", help="two or more tokenizers that `AutoTokenizer` can load"
    )
    parser.add_argument("--quick", action="store_true", help="use short answers and few tokens")
    parser.add_argument(
        "--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="the kinds of text to time (default: all)"
    )
    args = parser.parse_args(argv)
    names = args.tokenizers or [str(MINI / "base"), str(MINI / "nudging")]
    if len(names) < 2:
        parser.error(f"a crossing needs two tokenizers, got {names[0]}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    loaded = {name: AutoTokenizer.from_pretrained(name, trust_remote_code=False) for name in names}
    lengths = (20, 60) if args.quick else LENGTHS
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; transformers "
        f"{transformers.__version__}, tokenizers {tokenizers.__version__}, nudging_hf {nudging_hf.__version__}.\n\n"
        f"Median milliseconds for each of {TOKENS} tokens (fewer if they take more than {SECONDS:.0f} s), by the "
        "length of the answer in tokens of the base:\n"
    )
    rows = []
    for base, nudging in itertools.permutations(names, 2):
        for kind in args.texts:
            writer = Writer(Vocabulary(loaded[base]), Vocabulary(loaded[nudging]), TEXTS[kind]())
            costs = [writer.cost(length, 5 if args.quick else TOKENS, SECONDS) for length in lengths]
            rows.append([_short(base), _short(nudging), kind, *(f"{1000 * cost:.2f}" for cost in costs)])
    print(table(["base", "nudging model", "text", *(f"{length:,}" for length in lengths)], rows))


def _short(name: str) -> str:
    """The last part of a folder's name that is not "models"."""
    return [part for part in Path(name).parts if part != "models"][-1]


if __name__ == "__main__":
    main()
