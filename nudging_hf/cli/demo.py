"""`nudging-hf demo`: a pair of models at work, and measured."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.config import NudgingConfig
from ..streaming import MarkingStreamer
from ..study import comparison, demo
from ..study.comparison import Models, Result
from ..study.journal import Journal
from ..study.prompts import Prompt, first_of_each_task
from ..study.reader import nudged_answers
from ..terminal import TerminalWriter
from .arguments import add_color, add_number, add_threshold, answer_bar, command_parser, loading_bars
from .files import refuse_missing_folders, versions, write_json


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "demo", run)
    parser.add_argument(
        "--pair",
        type=Path,
        metavar="FOLDER",
        help="the models and their questions (default: examples/mini, here or where the package lies)",
    )
    add_number(parser, "--questions", 50, "measured a task; 0: none", least=0)
    add_number(parser, "--examples", 1, "answers shown a task", least=0)
    add_threshold(parser)
    add_number(parser, "--batch-size", 50, "questions answered at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and answers to this file")
    add_color(parser)


def run(args: argparse.Namespace) -> None:
    """Shows what nudging does with a pair of models: some answers, with the words of the nudging model in colour, and
    then, on questions with known answers, how often each model alone and both together are right."""
    began = time.monotonic()
    NudgingConfig(nudge_threshold=args.threshold)  # It is refused now, not after the models have answered alone.
    refuse_missing_folders({"--json": args.json})
    folder = args.pair if args.pair is not None else demo.find_folder()
    print(f"Loading the models of {folder} ...", file=sys.stderr)
    with loading_bars(False):
        models, questions = demo.load(folder)
    _show_examples(models, first_of_each_task(questions, args.examples), args)
    results: list[Result] = []
    try:
        _compare(models, first_of_each_task(questions, args.questions), args, results)
    finally:  # After an interrupt, what was finished is shown all the same.
        seconds = time.monotonic() - began
        if results:
            print(f"\nAnswers to {len(results[0].questions)} questions, {args.batch_size} at once:\n")
            print(comparison.table(results), comparison.LEGEND, sep="\n\n", end="\n\n")
            for sentence in comparison.sentences(results):
                print(sentence)
        if args.json is not None:
            _write_json(folder, results, seconds, args)
        print(f"This took {seconds:.0f} s.")


def _show_examples(models: Models, questions: Sequence[Prompt], args: argparse.Namespace) -> None:
    if questions:
        with TerminalWriter.of_stdout(args.color) as ink:
            ink.write("In the answers below ", False)
            ink.write("words like these", True)
            ink.write(" are the nudging model's, and all others the base's.\n", False)
    config = NudgingConfig(nudge_threshold=args.threshold)
    for question in questions:
        print(f"\n[{question.task}] {question.question}", flush=True)
        with TerminalWriter.of_stdout(args.color) as ink:
            streamer = MarkingStreamer(models.base.tokenizer, ink.write)
            [answer] = nudged_answers(models.base, models.nudging, config, [question], demo.MAX_NEW_TOKENS, streamer)
        given = question.answer_in(answer.text)
        verdict = "right" if question.is_right(answer.text) else f"wrong, it is {question.answer}"
        print(f"-> {'no answer' if given is None else given}: {verdict}")


def _compare(models: Models, questions: Sequence[Prompt], args: argparse.Namespace, results: list[Result]) -> None:
    """Lets one contestant after the other answer, and appends its result to `results` when it has finished."""
    if not questions:
        return
    config = NudgingConfig(nudge_threshold=args.threshold)
    contestants, _ = comparison.contestants_of(models, [config], with_rivals=False)
    settings: dict[str, Any] = {"max_new_tokens": demo.MAX_NEW_TOKENS, "batch_size": args.batch_size}
    with answer_bar(len(contestants) * len(questions)) as show:
        for contestant in contestants:
            show(contestant.name, 0)
            results += comparison.compare([contestant], questions, Journal(None, {}), **settings, progress=show)


def _write_json(folder: Path, results: Sequence[Result], seconds: float, args: argparse.Namespace) -> None:
    report = {
        "pair": str(folder),
        "nudge_threshold": args.threshold,
        "questions_per_task": args.questions,
        "batch_size": args.batch_size,
        "max_new_tokens": demo.MAX_NEW_TOKENS,
        "versions": versions(),
        "seconds": round(seconds, 1),
        "contestants": [demo.as_dict(result, base=results[0]) for result in results],
    }
    write_json(args.json, report)
    print(f"All figures and answers: {args.json}")
