"""The benchmark: who writes how fast, on one machine, in one process, in turn.

    python benchmarks/run.py                      # all scenarios
    python benchmarks/run.py --quick              # the same in little, to see that it runs: no figures to quote
    python benchmarks/run.py race --dtype float32 --batch-size 8
    python benchmarks/run.py passes memory agreement hopeless long

What is finished is kept in `journal.jsonl`, and a run that was broken off goes on from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import tables
import torch
import transformers
from memory import memory
from racers import DTYPES, dev_questions, widths
from scenarios import Find, Row, Size, Unit, agreement, hopeless, long_text, passes, race
from tqdm import tqdm

import nudging_hf
from nudging_hf.study.journal import Journal, digest

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SCENARIOS = ("passes", "race", "memory", "hopeless", "agreement", "long")
FULL = Size()
QUICK = Size(
    width=9,
    rounds=1,
    minutes=1.0,
    tasks=("letters",),
    max_new_tokens=64,
    repeats=2,
    noise=(0.0, 0.3),
    thresholds=(0.4,),
    short_answer=24,
    hopeless_answer=24,
    short_questions=1,
    long_answer=768,
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=f"of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a check of some minutes, with a narrower base")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=list(DTYPES),
        help="of widened models; bfloat16 and float32 by default, of many rows the former only if the CPU has it",
    )
    parser.add_argument(
        "--batch-size", nargs="+", type=int, metavar="N", help="of race and memory; 1, 8 and 32 by default"
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="letters, stories, coins, lengths; all by default")
    parser.add_argument("--questions", type=int, metavar="N", help="of each task at batch 1")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each contestant answers each question")
    parser.add_argument("--minutes", type=float, metavar="M", help="of a race, beyond which no round is begun")
    parser.add_argument("--width", type=int, metavar="K", help="of the base, in widths of the mini pair's")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; as torch chooses by default")
    parser.add_argument("--out", type=Path, help="folder of journal, JSON, tables and plot")
    parser.add_argument("--fresh", action="store_true", help="drop what an earlier run has finished")
    args = parser.parse_args(argv)
    if unknown := set(args.scenarios) - set(SCENARIOS):
        parser.error(f"no scenario {', '.join(sorted(unknown))}: there are {', '.join(SCENARIOS)}")
    return args


def jobs(args: argparse.Namespace, size: Size, find: Find) -> Iterator[Iterable[Unit]]:
    """The scenarios that are asked for, in order."""
    own = "bfloat16" if "bf16" in _cpu() else "float32"  # In which the CPU is at its best.
    dtypes = args.dtype or (["float32"] if args.quick else ["bfloat16", "float32"])
    batches = args.batch_size or ([1] if args.quick else [1, 8, 32])
    # Without instructions for bfloat16 many rows would take hours, to show what passes and one row show already.
    of_rows = dtypes if args.dtype or own == "bfloat16" else ["float32"]
    shapes = [(batch, dtype) for batch in batches for dtype in (dtypes if batch == 1 else of_rows)]
    # The longer scenarios outside the race are of one dtype.
    one = own if own in dtypes else dtypes[0]
    for scenario in args.scenarios or SCENARIOS:
        if scenario == "passes":
            yield from (passes(size, dtype) for dtype in dtypes)
        elif scenario == "race":
            for batch, dtype in shapes:
                yield race(size if batch == 1 else replace(size, rounds=min(size.rounds, 2)), dtype, batch, find)
        elif scenario == "memory":
            yield from (memory(size, dtype, batch) for batch, dtype in shapes)
        elif scenario == "agreement":
            yield agreement(size, one)
        elif scenario == "hopeless":
            yield hopeless(size, one)
        else:
            yield long_text(size)


def setup_of(size: Size) -> Row:
    """All on which a timing depends, and that one run must not mix."""
    code = [
        path.read_text()
        for folder in (HERE, Path(nudging_hf.__file__).parent)
        for path in sorted(folder.rglob("*.py"))
    ]
    what = asdict(replace(size, tasks=list(size.tasks), noise=list(size.noise), thresholds=list(size.thresholds)))
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nudging_hf": nudging_hf.__version__,
        "code": digest(code),
        "widths": widths(size.width),
        "questions": digest([question.prompt for question in dev_questions(1)]),
        # How much is asked for may grow from run to run; what a single timing is, may not.
        **{name: value for name, value in what.items() if name not in ("rounds", "minutes", "tasks", "questions")},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return f"{name} ({', '.join(known)})"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in ("rounds", "questions", "tasks", "minutes", "width")}
    size = replace(
        QUICK if args.quick else FULL, **{name: value for name, value in given.items() if value is not None}
    )
    out: Path = args.out or HERE / ("results-quick" if args.quick else "results")
    out.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        (out / "journal.jsonl").unlink(missing_ok=True)
    setup = setup_of(size)
    journal = Journal(out / "journal.jsonl", setup)
    with tqdm(unit="runs") as progress:
        for job in jobs(args, size, journal.find):
            for unit in job:
                progress.set_description(f"{unit.key['scenario']}: {unit.label}")
                journal.once(unit.key, unit.row)
                progress.update()
    figures = tables.summary(journal.results)
    text = tables.markdown(setup, figures)
    (out / "results.json").write_text(json.dumps({"setup": setup, **figures}, indent=1) + "\n")
    (out / "tables.md").write_text(text)
    tables.plot(figures, out / "results.png")
    for measured in figures["races"]:
        for small, answers in measured["differing_answers"].items():
            if answers["differing"]:
                logger.warning(
                    "ANSWERS DIFFER: %d of %d nudged answers by %s (%s, batch %d) are not those of the other draft "
                    "lengths.", answers["differing"], answers["of"], small, measured["dtype"], measured["batch"],
                )  # fmt: skip
    print(text)
    print(f"Written to {out}: journal.jsonl, results.json, tables.md, results.png")


if __name__ == "__main__":
    main()
