"""`nudging-hf compare`: whether nudging helps a pair of models, and against what."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chats import turn_template
from ..core.config import DEFAULT_THRESHOLDS, NudgingConfig
from ..study import judge
from ..study.journal import Journal, digest, model_setup
from ..study.prompt_files import description, read_prompts
from ..study.prompts import Prompt, are_labelled, first_of_each_task
from .arguments import (
    PROMPT_FILE,
    add_models,
    add_study,
    answer_bar,
    command_parser,
    gamma_of,
    load_reader,
    positive,
    threshold_or_auto,
)
from .files import versions, write_json

if TYPE_CHECKING:
    from ..study import comparison
    from ..study.reader import Reader

_FURTHER = 20  # So many questions stand on the page besides those that show most.


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "compare", run)
    models = add_models(parser)
    models.add_argument(
        "--shared-nudging-model",
        metavar="NAME",
        help="a second nudging model, which has the base's vocabulary, for a --nudging-model that has another: the "
        "ensemble and proxy tuning need one. The base is nudged by it too, so that the comparison is fair",
    )
    models.add_argument(
        "--unaligned",
        metavar="NAME",
        help="for proxy tuning, the nudging model that has the base's vocabulary, before its alignment",
    )
    models.add_argument("--large-aligned", metavar="NAME", help="the model that alignment makes of the base")
    asked = add_study(
        parser,
        "questions",
        f"{PROMPT_FILE}. Without answers, and without a judge that {judge.VARIABLE} names, quality is not measured, "
        'and the answers are put side by side on a page. "task" gives a column of its own',
        required=True,
    )
    asked.add_argument("--limit", type=positive, metavar="N", help="take the first N questions of each task")
    parser.add_argument(
        "--threshold",
        type=_gate_and_threshold,
        nargs="+",
        default=[_gate_and_threshold(f"{NudgingConfig().nudge_threshold}")],
        metavar="T",
        help="one or more: the base is unsure where its most probable token has less than this probability; GATE:T "
        f"for a gate of {', '.join(DEFAULT_THRESHOLDS)}; auto or GATE:auto for a threshold that sets itself "
        f"(default: {NudgingConfig().nudge_threshold})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder for table.md, results.json, page.html with answers side by side, and answers.jsonl, from "
        "which a run that was broken off goes on",
    )


def _gate_and_threshold(text: str) -> tuple[str, float | str]:
    gate, colon, threshold = text.rpartition(":")
    return gate if colon else NudgingConfig.nudge_gate, threshold_or_auto(threshold)


def run(args: argparse.Namespace) -> None:
    """Tells whether nudging helps a pair of models, and against what: on your questions, the base alone, the nudging
    model alone, the base nudged, an ensemble, proxy tuning, in-context alignment, and the large aligned model if
    there is one. Says what it found in one sentence, with one table, and puts the answers side by side on a page."""
    from ..study import comparison

    turn_template(args.base_template)
    gates = [{"nudge_gate": gate, "nudge_threshold": threshold} for gate, threshold in dict.fromkeys(args.threshold)]
    for each in gates:
        NudgingConfig(**each)  # It is refused now, not after the models are loaded.
    questions, said = read_prompts(args.prompts)
    print(said, file=sys.stderr)
    if args.limit is not None:
        questions = first_of_each_task(questions, args.limit)
        print(f"Taken: {description(questions)}", file=sys.stderr)
    if judge.is_wanted() and not are_labelled(questions):
        judge.validate()
    args.out.mkdir(parents=True, exist_ok=True)
    models = comparison.Models(
        base=load_reader(args, "base", chat=False),
        nudging=load_reader(args, "nudging_model"),
        shared=load_reader(args, "shared_nudging_model"),
        unaligned=load_reader(args, "unaligned", chat=False),
        large_aligned=load_reader(args, "large_aligned"),
    )
    stored = models.base.model.generation_config.to_dict()
    configs = [NudgingConfig.resolve([each, stored]) for each in gates]
    contestants, left_out = comparison.contestants_of(models, configs)
    setup = _setup(args, models, configs[0], questions)
    journal = Journal(args.out / "answers.jsonl", setup)
    with answer_bar(len(contestants) * len(questions)) as show:
        results = comparison.compare(
            contestants,
            questions,
            journal,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            progress=show,
        )
    _tell(args.out, results, left_out, setup)
    _write_page(args.out / "page.html", results, models.base, gamma_of(configs[0]) if len(configs) == 1 else None)
    print(f"The answers side by side: {args.out / 'page.html'}")


def _setup(
    args: argparse.Namespace, models: comparison.Models, config: NudgingConfig, questions: Sequence[Prompt]
) -> dict[str, Any]:
    """Everything that answers and times depend on, except gate and threshold, which are in a contestant's name."""
    return {
        **{name: reader and model_setup(reader.model) for name, reader in vars(models).items()},
        "device": str(models.base.model.device),
        "questions": len(questions),
        "questions_sha256": digest([asdict(question) for question in questions]),
        "base_template": args.base_template,
        **{name: value for name, value in asdict(config).items() if name not in ("nudge_gate", "nudge_threshold")},
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "python": platform.python_version(),
        **versions(),
    }


def _tell(folder: Path, results: Sequence[comparison.Result], left_out: dict[str, str], setup: dict[str, Any]) -> None:
    """Prints the verdict, the table and the sentences, and writes them and all figures into a folder."""
    from ..study import verdict

    head, table = verdict.of_comparison(results), verdict.table(results)
    said = verdict.sentences(results)
    said += verdict.nothing_right({result.name: result.answered for result in results})
    said += [f"{name} is left out: {why}." for name, why in left_out.items()]
    print(head, table, verdict.LEGEND, "\n".join(said), sep="\n\n", end="\n\n")
    figures = [result.as_dict(base=results[0]) for result in results]
    saved = {"setup": setup, "verdict": head, "contestants": figures, "left_out": left_out, "says": said}
    write_json(folder / "results.json", saved)
    listed = "\n".join(f"- {sentence}" for sentence in said)
    settings = "\n".join(f"- {name}: `{json.dumps(value, ensure_ascii=False)}`" for name, value in setup.items())
    parts = ["# Does nudging help here?", head, table, verdict.LEGEND, listed, "## Setup", settings]
    (folder / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"The table: {folder / 'table.md'}; its figures: {folder / 'results.json'}")


def _write_page(path: Path, results: Sequence[comparison.Result], base: Reader, gamma: float | None) -> None:
    """Writes a page with some questions, each with the answers of all contestants. `gamma` is that of all nudged ones,
    if they have one."""
    from ..study import examples

    contestants = [
        examples.Answered(each.name, each.answers, each.right, each.contestant.nudged, gamma) for each in results
    ]
    examples.write_page(path, results[0].questions, contestants, base, _FURTHER)
