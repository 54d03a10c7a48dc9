"""Runs the benchmark: measures how fast each contestant writes, in turn, in one process on one machine.

    python benchmarks/run.py                      # all scenarios
    python benchmarks/run.py --quick              # a small check that it runs; do not quote its figures
    python benchmarks/run.py race --dtype float32 --batch-size 8
    python benchmarks/run.py passes memory agreement hopeless long

Finished units are kept in `journal.jsonl`, from which an interrupted run continues.
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
    parser.add_argument(
        "scenarios", nargs="*", metavar="scenario", help=f"one of {', '.join(SCENARIOS)} (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="check in some minutes that it runs, with a narrower base"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=list(DTYPES),
        help="dtypes of the widened models (default: bfloat16 and float32; batches in bfloat16 only if the CPU has "
        "instructions for it)",
    )
    parser.add_argument(
        "--batch-size", nargs="+", type=int, metavar="N", help="batch sizes of race and memory (default: 1 8 32)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="letters, stories, coins or lengths (default: all)")
    parser.add_argument("--questions", type=int, metavar="N", help="questions of each task at batch size 1")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each contestant answers each question")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no further round of a race after M minutes")
    parser.add_argument("--width", type=int, metavar="K", help="width of the base, in multiples of the mini pair's")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="the folder for the journal, figures, tables and plot")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier run has finished")
    args = parser.parse_args(argv)
    if unknown := set(args.scenarios) - set(SCENARIOS):
        parser.error(f"unknown scenario {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    return args


def jobs(args: argparse.Namespace, size: Size, find: Find) -> Iterator[Iterable[Unit]]:
    """The requested scenarios, in order."""
    fastest = "bfloat16" if "bf16" in _cpu() else "float32"
    dtypes = args.dtype or (["float32"] if args.quick else ["bfloat16", "float32"])
    batches = args.batch_size or ([1] if args.quick else [1, 8, 32])
    # On a CPU without bfloat16 instructions, batches in bfloat16 would take hours and show nothing new.
    batch_dtypes = dtypes if args.dtype or fastest == "bfloat16" else ["float32"]
    shapes = [(batch, dtype) for batch in batches for dtype in (dtypes if batch == 1 else batch_dtypes)]
    # The longer scenarios outside the race run in one dtype only.
    one = fastest if fastest in dtypes else dtypes[0]
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
    """Everything that a timing depends on. A journal refuses to mix runs that differ in it."""
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
        # A later run may ask for more timings, but each single timing must stay the same.
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
                    "ANSWERS DIFFER: %d of %d answers nudged by %s (%s, batch %d) are not those of the other draft "
                    "lengths.", answers["differing"], answers["of"], small, measured["dtype"], measured["batch"],
                )  # fmt: skip
    print(text)
    print(f"Written to {out}: journal.jsonl, results.json, tables.md, results.png")


if __name__ == "__main__":
    main()
