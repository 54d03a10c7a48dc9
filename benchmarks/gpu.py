"""Checks that nudging writes on a GPU what it writes on a CPU, and times a nudged 7B-class base there.

    python benchmarks/gpu.py                        # everything, in about eight minutes on an H200
    python benchmarks/gpu.py checks passes race     # some parts only
    python benchmarks/gpu.py compiled               # the checks and races that compile
    python benchmarks/gpu.py --device cpu --tiny    # a small check that it runs; do not quote its figures

Nothing is downloaded. The checks (`gpu_checks.py`) use the mini pair. Passes and races (`gpu_race.py`) use a random
pair that writes a Markov chain (`markov.py`).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_checks import Check, MiniPair, Outcome, checks, compiled_checks
from gpu_race import FULL, TINY, Race, Row, Size, memory_is_small, pass_costs, races, run_race
from markov import MarkovPair
from tqdm import tqdm

import nudging_hf

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
PARTS = ("checks", "passes", "race", "compiled")
NO_GPU = (
    "There is no GPU here. On a GPU, this script checks that nudging writes the same as on a CPU, and times passes "
    "and races of a 7B-class base, alone and nudged. `--device cpu --tiny` runs all of it on tiny models."
)


# The report ---------------------------------------------------------------------------------------------------------


def setup_of(device: torch.device, size: Size) -> Row:
    """Everything that the figures depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nudging_hf": nudging_hf.__version__,
        **asdict(size),
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, if `nvidia-smi` is installed and reports it."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return said[0] if said else None


def markdown(figures: Row) -> str:
    """The figures as tables."""
    setup = figures["setup"]
    driver = f", driver {setup['driver']}" if setup["driver"] else ""
    lines = [
        "# Nudging on a GPU",
        "",
        f"{setup['device']}{driver}, torch {setup['torch']}, transformers {setup['transformers']}.",
    ]
    if figures["checks"]:
        lines += ["", "## Checks", ""]
        lines += _table(
            ["check", "", "found"],
            [[row["name"], "ok" if row["ok"] else "**FAILED**", row["detail"]] for row in figures["checks"]],
        )
    if figures["models"]:
        sizes = ", ".join(f"{name} {n / 1e9:.2f} billion" for name, n in figures["models"]["parameters"].items())
        lines += ["", f"Models, in {setup['dtype']}: {sizes} parameters. γ = {figures['models']['threshold']:.3f}."]
    if figures["passes"]:
        lines += ["", "## Passes", ""]
        lines += _table(
            ["model", "rows", "tokens a row", "in the cache", "ms"],
            [
                [row["model"], row["rows"], row["width"], row["context"], f"{1000 * row['seconds'][1]:.2f}"]
                for row in figures["passes"]
            ],
        )
    for race in figures["races"]:
        graphs = race["graphs"]["before"]
        note = f"Nudged tokens: {race['nudge_rate']:.1%}." + (f" Graphs compiled: {graphs}." if graphs else "")
        lines += ["", f"## {race['name'].capitalize()}", "", note, ""]
        lines += _table(
            ["", "tokens/s", "× base alone", "quartiles", "base passes/token", "nudging passes/token",
             "outside passes", "peak GiB", "of weights + caches"],
            [_race_line(row) for row in race["contestants"]],
        )  # fmt: skip
    if figures["left_out"]:
        lines += ["", f"Left out because the time was up: {'; '.join(figures['left_out'])}."]
    return "\n".join(lines) + "\n"


def _race_line(row: Row) -> list[Any]:
    passes, peak = row["passes_per_token"], row["peak_bytes"]
    low, _, high = row["quartiles"]
    return [
        row["contestant"],
        f"{row['tokens_per_second']:.1f}",
        f"{row['ratio']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{passes['base']:.3f}",
        f"{passes['nudging']:.3f}" if "nudging" in passes else "",
        f"{row['outside_passes']:.1%}",
        "" if peak is None else f"{peak / 2**30:.2f}",
        "" if peak is None else f"{peak / (row['weight_bytes'] + row['cache_bytes']):.3f}",
    ]


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells]


# The command --------------------------------------------------------------------------------------------------------


class Run:
    """One run, which does one piece of work after another and writes the files anew after each.

    A piece that raises counts as a failed check, and the others are still done: GPUs are often rented by the minute,
    and one error should not cost the rest of the figures.

    Args:
        device: where to run.
        size: how much to do.
        minutes: after this time, no further piece and no further round of a race begins.
        folder: the folder for `results.json` and `tables.md`.
        progress: a progress bar of `tqdm`.

    Attributes:
        figures: all results so far.
    """

    def __init__(self, device: torch.device, size: Size, minutes: float, folder: Path, progress: Any):
        self.device = device
        self.size = size
        self.figures: Row = {
            "setup": setup_of(device, size), "checks": [], "models": {}, "passes": [], "races": [], "left_out": []
        }  # fmt: skip
        self._folder = folder
        self._progress = progress
        self._end = time.monotonic() + 60 * minutes
        self._compiled_batch: int | None = None  # The batch size of the last compiled race.

    @cached_property
    def _mini(self) -> MiniPair:
        return MiniPair(self.device, self.size.check_tokens)

    @cached_property
    def _pair(self) -> MarkovPair:
        size = self.size
        pair = MarkovPair(size.base, size.nudging, size.vocab_size, self.device, getattr(torch, size.dtype))
        self.figures["models"] = {
            "parameters": {name: getattr(pair, name).num_parameters() for name in ("base", "nudging")},
            "threshold": pair.threshold(),
        }
        return pair

    def run(self, parts: Sequence[str], static: bool) -> None:
        """Does the given parts, the most informative ones first. `static` says whether to use static caches."""
        batches = self.size.check_batches
        compiled = "compiled" in parts and static
        if "checks" in parts:
            self._pieces(checks(self._mini, self.device, batches, static))
        if "passes" in parts:
            self._piece("passes are timed", self._passes)
        first, *others = races(self.size)
        if "race" in parts:
            self._race(first)
        if compiled:
            self._pieces(compiled_checks(self._mini, self.device, batches))
        for race in others:
            if compiled if race.is_compiled else "race" in parts:
                self._race(race)
        self.write()

    def write(self) -> None:
        """Writes both files anew."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "results.json").write_text(json.dumps(self.figures, indent=1) + "\n")
        (self._folder / "tables.md").write_text(markdown(self.figures))

    def _is_over(self) -> bool:
        return time.monotonic() > self._end

    def _pieces(self, found: Iterable[Check]) -> None:
        for name, work in found:
            self._piece(name, work)

    def _piece(self, name: str, work: Callable[[], Outcome]) -> bool:
        """Does a piece of work unless time is up, reports and records its outcome, and returns whether it is ok."""
        if self._is_over():
            self.figures["left_out"].append(name)
            return False
        self._tell(name)
        try:
            outcome = work()
        except Exception as error:
            logger.exception("%s: raised", name)
            outcome = Outcome(False, f"{type(error).__name__}: {error}".splitlines()[0])
        self._progress.write(
            f"{'ok' if outcome.ok else 'FAILED':<7} {name}" + (f" ({outcome.detail})" if outcome.detail else "")
        )
        self.figures["checks"].append({"name": name, **outcome._asdict()})
        self._progress.update()
        self.write()
        return outcome.ok

    def _tell(self, what: str) -> None:
        self._progress.set_description(what)

    def _passes(self) -> Outcome:
        self.figures["passes"] = pass_costs(self._pair, self.size)
        return Outcome(True)

    def _race(self, race: Race) -> None:
        def tell(who: str) -> None:
            self._tell(f"{race.name}: {who}")

        def work() -> Outcome:
            pair = self._pair
            if race.is_compiled and race.batch != self._compiled_batch:
                torch.compiler.reset()  # Graphs compiled for another batch size count towards torch's limit.
                self._compiled_batch = race.batch
            gc.collect()
            found = run_race(pair, self.figures["models"]["threshold"], race, self.size, self._is_over, tell)
            self.figures["races"].append({"name": race.name, **found})
            late = found["graphs"]["in_rounds"]
            return Outcome(not late, f"{late} graphs were compiled during the timed rounds" if late else "")

        done = self._piece(race.name, work)
        peaks = done and self.figures["races"][-1]["contestants"][-1]["peak_bytes"]
        if peaks:
            self._piece(f"{race.name}: peak memory", partial(memory_is_small, self.figures["races"][-1]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"one of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", default="cuda", help="where to run; `cpu` needs --tiny")
    parser.add_argument("--tiny", action="store_true", help="use tiny models, to check that everything runs")
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave out static caches")
    parser.add_argument("--minutes", type=float, default=7.0, metavar="M", help="start nothing new after M minutes")
    parser.add_argument("--out", type=Path, help="the folder for results.json and tables.md")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if torch.device(args.device).type != "cuda" and not args.tiny:
        parser.error(f"--device {args.device} would take hours: give --tiny too")
    args.out = args.out or HERE / ("results-quick/gpu" if args.tiny else "results-gpu")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the requested parts and returns the exit status: 1 if anything failed, otherwise 0."""
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with tqdm(unit="pieces") as progress:
        run = Run(device, TINY if args.tiny else FULL, args.minutes, args.out, progress)
        run.run(args.parts or PARTS, args.static)
    print(markdown(run.figures))
    print(f"Written to {args.out}: results.json, tables.md")
    failed = [row["name"] for row in run.figures["checks"] if not row["ok"]]
    if failed:
        print(f"FAILED: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
