"""`nudging-hf demo`: a pair of models at work, and measured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.config import NudgingConfig
from ..study import demo
from ..study.prompts import Prompt, first_of_each_task
from ..terminal import TerminalWriter, nudges_told
from .arguments import (
    add_color,
    add_number,
    add_threshold,
    answer_bar,
    command_parser,
    loading_bars,
    warn_of_threshold,
)
from .files import refuse_missing_folders, versions, write_json

if TYPE_CHECKING:
    from ..study.comparison import Models, Result
    from ..study.reader import Answer

_SHOWN = 300  # The characters of an answer that are shown where a model rambles.


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "demo", run)
    parser.add_argument(
        "--pair",
        type=Path,
        metavar="FOLDER",
        help="the models and their questions (default: examples/mini, here or as it was installed)",
    )
    add_number(parser, "--questions", 50, "measured a task; 0: none", least=0)
    add_number(parser, "--examples", 1, "answers shown a task", least=0)
    add_threshold(parser)
    add_number(parser, "--batch-size", 50, "questions answered at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and answers to this file")
    add_color(parser)


def run(args: argparse.Namespace) -> None:
    """Shows what nudging does with a pair of models. First some questions: what the base says alone, what the nudging
    model says alone, and what the base says when it is nudged, with the words of the nudging model in colour. Then, on
    questions with known answers, how often each of them is right."""
    began = time.monotonic()
    warn_of_threshold(NudgingConfig(nudge_threshold=args.threshold))  # One out of range is refused now.
    refuse_missing_folders({"--json": args.json})
    folder = args.pair if args.pair is not None else demo.find_folder()
    questions = demo.read_questions(folder)
    examples = first_of_each_task(questions, args.examples)
    with TerminalWriter.of_stdout(args.color) as ink:
        ink.write(f"The pair of {folder}: a base model, and a small aligned model.\n", False)
        ink.write("When both write, ", False)
        ink.write("words like these", True)
        ink.write(" are the small model's, and all others the base's.\n", False)
    if examples:
        _show_question(examples[0])  # Before torch is imported, which takes seconds.
    import torch

    from ..study import verdict

    if args.pair is None:
        torch.set_num_threads(1)  # Models as small as these gain nothing from a second thread.
    with loading_bars(False):
        models = demo.load(folder)
    for number, question in enumerate(examples):
        if number:
            _show_question(question)
        nudged = _show_answers(models, question, args)
        if not number:
            print("", *nudges_told(nudged.pieces), sep="\n", flush=True)
    results: list[Result] = []
    try:
        _compare(models, first_of_each_task(questions, args.questions), args, results)
    finally:  # After an interrupt, what was finished is shown all the same.
        seconds = time.monotonic() - began
        if results:
            print(f"\nAnswers to {len(results[0].questions)} questions, {args.batch_size} at once:\n")
            if any(result.contestant.nudged for result in results):
                print(verdict.of_comparison(results), end="\n\n")
            print(verdict.table(results), verdict.LEGEND, sep="\n\n", end="\n\n")
            for sentence in verdict.sentences(results):
                print(sentence)
        if args.json is not None:
            _write_json(folder, results, seconds, args)
        print(f"This took {seconds:.0f} s.")


def _show_question(question: Prompt) -> None:
    print(f"\n[{question.task}] {question.question}", flush=True)


def _show_answers(models: Models, question: Prompt, args: argparse.Namespace) -> Answer:
    """Shows what each model answers alone, and then the nudged answer while it is written, and returns that."""
    from ..streaming import MarkingStreamer
    from ..study.reader import nudged_answers

    for name, reader in (("The base alone", models.base), ("The small model alone", models.nudging)):
        [answer] = reader.answers([question], demo.MAX_NEW_TOKENS)
        text = " ".join(answer.text.split())
        with TerminalWriter.of_stdout(args.color) as ink:
            ink.write(f"\n{name}:\n", False)
            ink.write(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...", reader is models.nudging)
        _mark(question, answer)
    print("\nThe base, nudged by the small model:", flush=True)
    config = NudgingConfig(nudge_threshold=args.threshold)
    with TerminalWriter.of_stdout(args.color) as ink:
        streamer = MarkingStreamer(models.base.tokenizer, ink.write)
        [answer] = nudged_answers(models.base, models.nudging, config, [question], demo.MAX_NEW_TOKENS, streamer)
    _mark(question, answer)
    return answer


def _mark(question: Prompt, answer: Answer) -> None:
    given = question.answer_in(answer.text)
    mark = "right" if question.is_right(answer.text) else f"wrong, it is {question.answer}"
    print(f"-> {'no answer' if given is None else given}: {mark}", flush=True)


def _compare(models: Models, questions: Sequence[Prompt], args: argparse.Namespace, results: list[Result]) -> None:
    """Lets one contestant after the other answer, and appends its result to `results` when it has finished."""
    if not questions:
        return
    from ..study import comparison
    from ..study.journal import Journal

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
