"""`nudging-hf demo`: a pair of models at work, and measured."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from .. import __version__
from ..core.config import NudgingConfig
from ..study import comparison, demo
from ..terminal import TerminalWriter
from .arguments import add_color, add_threshold, count, loading_bars, positive

_DESCRIPTION = (
    "Shows what nudging does with a pair of models: some answers, with the words of the nudging model in colour, and "
    "then, on questions with known answers, how often each model alone and both together are right."
)


def add_command(commands: Any) -> None:
    """Adds `demo` to the commands of `nudging-hf`."""
    parser = commands.add_parser("demo", help="see a pair of models at work, and measured", description=_DESCRIPTION)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--pair",
        type=Path,
        metavar="FOLDER",
        help="the models and their questions (default: examples/mini, here or where the package lies)",
    )
    parser.add_argument(
        "--questions", type=count, default=50, metavar="N", help="measured a task; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--examples", type=count, default=1, metavar="N", help="answers shown a task (default: %(default)s)"
    )
    add_threshold(parser)
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=50,
        metavar="N",
        help="questions answered at once (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and answers to this file")
    add_color(parser)


def run(args: argparse.Namespace) -> None:
    """Runs `nudging-hf demo`."""
    began = time.monotonic()
    NudgingConfig(nudge_threshold=args.threshold)  # Refused now, not after the models that answer alone.
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {args.json.parent}.")
    folder = args.pair if args.pair is not None else demo.find_pair()
    print(f"Loading the models of {folder} ...", file=sys.stderr)
    with loading_bars(False):
        pair = demo.Pair.load(folder)
    _show_examples(pair, args)
    results: list[demo.Result] = []
    try:
        _evaluate(pair, args, results)
    finally:  # After an interrupt, what was finished is shown all the same.
        seconds = time.monotonic() - began
        _show_results(results, args)
        if args.json is not None:
            _write_json(folder, results, seconds, args)
        print(f"This took {seconds:.0f} s.")


def _show_examples(pair: demo.Pair, args: argparse.Namespace) -> None:
    questions = comparison.first_of_each_task(pair.questions, args.examples)
    if questions:
        with TerminalWriter.of_stdout(args.color) as ink:
            ink.write("In the answers below ", False)
            ink.write("words like these", True)
            ink.write(" are the nudging model's, and all others the base's.\n", False)
    for question in questions:
        print(f"\n[{question.task}] {question.text}", flush=True)
        with TerminalWriter.of_stdout(args.color) as ink:
            answer = demo.stream_answer(pair, question, args.threshold, ink.write)
        given = "no answer" if answer.given is None else answer.given
        print("-> " + (f"{given}: right" if answer.correct else f"{given}: wrong, it is {question.answer}"))


def _evaluate(pair: demo.Pair, args: argparse.Namespace, results: list[demo.Result]) -> None:
    """Lets all contestants answer; `results` holds those that have finished, also after an interrupt."""
    questions = comparison.first_of_each_task(pair.questions, args.questions)
    if not questions:
        return
    contestants = demo.contestants(pair)
    with tqdm(total=len(contestants) * len(questions), unit="answer", leave=False, file=sys.stderr) as bar:
        for contestant in contestants:
            bar.set_description(contestant.name)
            results.append(demo.evaluate(contestant, questions, args.threshold, args.batch_size, bar.update))


def _show_results(results: Sequence[demo.Result], args: argparse.Namespace) -> None:
    if not results:
        return
    print(f"\nRight answers, of {args.questions} questions a task; the share of words that the nudging model wrote;")
    print(f"forward passes of the large and of the small model, each for up to {args.batch_size} answers at once:\n")
    print(demo.table(results), end="\n\n")
    for sentence in demo.summary(results):
        print(sentence)


def _write_json(folder: Path, results: Sequence[demo.Result], seconds: float, args: argparse.Namespace) -> None:
    report = {
        "pair": str(folder),
        "nudge_threshold": args.threshold,
        "questions_per_task": args.questions,
        "batch_size": args.batch_size,
        "max_new_tokens": demo.MAX_NEW_TOKENS,
        "versions": {
            "nudging_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": round(seconds, 1),
        "contestants": demo.as_dict(results),
    }
    args.json.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"All figures and answers: {args.json}")
