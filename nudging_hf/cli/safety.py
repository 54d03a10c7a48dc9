"""`nudging-hf safety`: how far prompts can talk nudging away."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..chats import turn_template
from ..core.config import NudgingConfig
from ..study.journal import Journal, digest, model_setup
from ..study.prompts import validate_labelled
from .arguments import (
    PROMPT_FILE,
    add_gate,
    add_models,
    add_study,
    answer_bar,
    command_parser,
    load_reader,
    parameters_of,
    positive,
)
from .files import prompts_of, versions, write_json


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "safety", run)
    add_models(parser)
    asked = add_study(
        parser, "questions", f"questions in the place of the generated ones, with answers. {PROMPT_FILE}"
    )
    asked.add_argument(
        "--limit", type=positive, default=12, metavar="N", help="ask N questions (default: %(default)s)"
    )
    add_gate(parser.add_argument_group("nudging"))
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder for table.md, results.json, and answers.jsonl, from which a run that was broken off goes on",
    )


def run(args: argparse.Namespace) -> None:
    """Tells how far prompts can talk nudging away: harmful requests and questions are asked plainly and under a
    small set of attacks, and one table says how many answers refuse or are right, and how much of them is nudged. Each
    model alone answers too."""
    from ..study import comparison, safety

    turn_template(args.base_template)
    parameters = parameters_of(args)
    asked = safety.harmful_requests()
    if args.prompts is None:
        asked += safety.generated_questions(args.limit)
    else:
        prompts = prompts_of(args.prompts, args.limit)
        validate_labelled(prompts, "The share of right answers")
        asked += safety.questions_of(prompts)
    prompts_asked = [asdict(safety.attacked(each.prompt, attack)) for each in asked for attack in ("", *safety.ADDED)]
    args.out.mkdir(parents=True, exist_ok=True)
    base, nudging = load_reader(args, "base", chat=False), load_reader(args, "nudging_model")
    config = NudgingConfig.resolve([parameters, base.model.generation_config.to_dict()])
    setup = {
        "base": model_setup(base.model),
        "nudging_model": model_setup(nudging.model),
        "prompts": len(prompts_asked),
        "prompts_sha256": digest(prompts_asked),
        "base_template": args.base_template,
        **asdict(config),
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        **versions(),
    }
    contestants, _ = comparison.contestants_of(comparison.Models(base, nudging), [config], with_rivals=False)
    journal = Journal(args.out / "answers.jsonl", setup)
    with answer_bar(len(contestants) * len(prompts_asked)) as show:
        found = safety.ask(
            contestants,
            asked,
            journal,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            progress=show,
        )
    report = safety.Report(found, next(each.name for each in contestants if each.nudged))
    _tell(args.out, report, setup)


def _tell(folder: Path, report: Any, setup: dict[str, Any]) -> None:
    """Prints the table and what it does not show, and writes them and all figures into a folder."""
    from ..study.safety import ADDED, CANNOT_SHOW, LEGEND

    limits = ["What this cannot show:", "\n".join(f"- {each}" for each in CANNOT_SHOW)]
    attacks = "\n".join(f"- {name} ({each.kind}): {each.aim}." for name, each in ADDED.items())
    print(report.sentence, report.table, LEGEND, *limits, sep="\n\n", end="\n\n")
    saved = {"setup": setup, "says": report.sentence, "rows": report.as_dict(), "cannot_show": CANNOT_SHOW}
    write_json(folder / "results.json", saved)
    settings = "\n".join(f"- {name}: `{value}`" for name, value in setup.items())
    parts = ["# Can a prompt talk nudging away?", report.sentence, report.table, LEGEND, *limits]
    parts += ["## Attacks", attacks, "## Setup", settings]
    (folder / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"The table: {folder / 'table.md'}; its figures: {folder / 'results.json'}")
