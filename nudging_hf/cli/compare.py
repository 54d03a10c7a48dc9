"""`nudging-hf compare`: whether nudging helps a pair of models, and against what."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..chats import turn_template
from ..core.config import NudgingConfig
from ..core.gate import GATES
from ..study import comparison
from ..study.journal import Journal, digest, model_setup
from ..study.prompts import Prompt, first_of_each_task, read_labelled_prompts
from .arguments import add_models, add_study, answer_bar, command_parser, load_reader, positive, threshold_or_auto
from .files import versions, write_json


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
        'JSON lines: {"messages": [...], "pattern": a regular expression with one group, "answer": what its last '
        'match in a right answer holds}, with "prompt" if the base is given something else than --base-template '
        'makes of the messages, and "task" for a column of its own',
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
        f"for a gate of {', '.join(GATES)}; auto or GATE:auto for a threshold that sets itself "
        f"(default: {NudgingConfig().nudge_threshold})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder for table.md, results.json, and answers.jsonl, from which a run that was broken off goes on",
    )


def _gate_and_threshold(text: str) -> tuple[str, float | str]:
    gate, colon, threshold = text.rpartition(":")
    return gate if colon else NudgingConfig.nudge_gate, threshold_or_auto(threshold)


def run(args: argparse.Namespace) -> None:
    """Tells whether nudging helps a pair of models, and against what: on questions with known answers, the base
    alone, the nudging model alone, the base nudged, an ensemble, proxy tuning, in-context alignment, and the large
    aligned model if there is one. Writes one table, and says in plain words what it shows."""
    turn_template(args.base_template)
    gates = [{"nudge_gate": gate, "nudge_threshold": threshold} for gate, threshold in dict.fromkeys(args.threshold)]
    for each in gates:
        NudgingConfig(**each)  # It is refused now, not after the models are loaded.
    questions = read_labelled_prompts(args.prompts)
    if args.limit is not None:
        questions = first_of_each_task(questions, args.limit)
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
    """Prints the table and the sentences, and writes them and all figures into a folder."""
    table, said = comparison.table(results), comparison.sentences(results)
    said += [f"{name} is left out: {why}." for name, why in left_out.items()]
    print(table, comparison.LEGEND, "\n".join(said), sep="\n\n", end="\n\n")
    figures = [result.as_dict(base=results[0]) for result in results]
    write_json(folder / "results.json", {"setup": setup, "contestants": figures, "left_out": left_out, "says": said})
    listed = "\n".join(f"- {sentence}" for sentence in said)
    settings = "\n".join(f"- {name}: `{json.dumps(value, ensure_ascii=False)}`" for name, value in setup.items())
    page = ["# Does nudging help here?", table, comparison.LEGEND, listed, "## Setup", settings]
    (folder / "table.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(f"The table: {folder / 'table.md'}; its figures: {folder / 'results.json'}")
