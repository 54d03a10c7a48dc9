"""`nudging-hf compare`: whether nudging helps a pair of models, and against what."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from .. import __version__
from ..chats import REASONING_TEMPLATE, turn_template
from ..core.config import NudgingConfig
from ..core.gate import GATES
from ..study import comparison
from ..study.analysis import Reader
from ..study.journal import Journal, digest, model_setup
from .arguments import add_base_template, add_models, load_model, load_pair, loading_bars, positive, threshold_or_auto

_DESCRIPTION = (
    "Tells whether nudging helps a pair of models, and against what: on questions with known answers, the base alone, "
    "the nudging model alone, the base nudged, an ensemble, proxy tuning, in-context alignment, and the large aligned "
    "model if there is one. Writes one table, and what it says in plain words."
)
_OF_CONTESTANTS = ("nudge_gate", "nudge_threshold")


def add_command(commands: Any) -> None:
    """Adds `compare` to the commands of `nudging-hf`."""
    parser = commands.add_parser(
        "compare", help="see whether nudging helps a pair, and against what", description=_DESCRIPTION
    )
    parser.set_defaults(run=run)
    models = add_models(parser)
    models.add_argument(
        "--shared-nudging-model",
        metavar="NAME",
        help="a second nudging model, of the base's vocabulary, where --nudging-model has another: the ensemble and "
        "proxy tuning need one, and the base is nudged by it too, so that like is compared with like",
    )
    models.add_argument(
        "--unaligned",
        metavar="NAME",
        help="what the nudging model that has the base's vocabulary was before its alignment, for proxy tuning",
    )
    models.add_argument("--large-aligned", metavar="NAME", help="what the base becomes by alignment")
    asked = parser.add_argument_group("questions")
    asked.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines: {"messages": [...], "pattern": a regular expression with one group, "answer": what its last '
        'match in a right answer holds}, with "prompt" where the base is given something else than --base-template '
        'makes of the messages, and "task" for a column of its own',
    )
    asked.add_argument("--limit", type=positive, metavar="N", help="take the first N questions of each task")
    add_base_template(asked, REASONING_TEMPLATE)
    asked.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="of an answer (default: %(default)s)"
    )
    asked.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="answered at once (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold",
        type=_gate_and_threshold,
        nargs="+",
        default=[_gate_and_threshold(f"{NudgingConfig().nudge_threshold}")],
        metavar="T",
        help="one or more: the base is unsure where its most probable token has less than this probability; GATE:T "
        f"for a gate of {', '.join(GATES)}; auto or GATE:auto for one that sets itself "
        f"(default: {NudgingConfig().nudge_threshold})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where to: table.md, results.json, and answers.jsonl, from which a run that was broken off goes on",
    )


def _gate_and_threshold(text: str) -> tuple[str, float | str]:
    gate, colon, threshold = text.rpartition(":")
    return gate if colon else NudgingConfig.nudge_gate, threshold_or_auto(threshold)


def run(args: argparse.Namespace) -> None:
    """Runs `nudging-hf compare`."""
    turn_template(args.base_template)
    knobs = [{"nudge_gate": gate, "nudge_threshold": threshold} for gate, threshold in dict.fromkeys(args.threshold)]
    for each in knobs:
        NudgingConfig(**each)  # Refused now, not after the models are loaded.
    questions = comparison.read_questions(args.prompts)
    if args.limit is not None:
        questions = comparison.first_of_each_task(questions, args.limit)
    args.out.mkdir(parents=True, exist_ok=True)
    models = _load(args)
    stored = models.base.model.generation_config.to_dict()
    configs = [NudgingConfig.resolve([each, stored]) for each in knobs]
    contestants, left_out = comparison.contestants_of(models, configs)
    setup = _setup(args, models, configs[0], questions)
    journal = Journal(args.out / "answers.jsonl", setup)
    with tqdm(total=len(contestants) * len(questions), unit="answer", leave=False, file=sys.stderr) as bar:

        def show(name: str, answered: int) -> None:
            bar.set_description(name, refresh=False)
            bar.update(answered)

        results = comparison.compare(
            contestants,
            questions,
            journal,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            progress=show,
        )
    _tell(args.out, results, left_out, setup)


def _load(args: argparse.Namespace) -> comparison.Models:
    """The models that the arguments name."""
    shown = sys.stderr.isatty()
    pair = load_pair(args, progress=shown)

    def other(option: str, name: str | None, chat: bool) -> Reader | None:
        return None if name is None else Reader(*load_model(option, name, args), chat, args.base_template)

    with loading_bars(shown):
        return comparison.Models(
            base=Reader(pair.base, pair.tokenizer, False, args.base_template),
            nudging=Reader(pair.nudging_model, pair.nudging_tokenizer, True, args.base_template),
            shared=other("--shared-nudging-model", args.shared_nudging_model, chat=True),
            unaligned=other("--unaligned", args.unaligned, chat=False),
            large_aligned=other("--large-aligned", args.large_aligned, chat=True),
        )


def _setup(
    args: argparse.Namespace,
    models: comparison.Models,
    knobs: NudgingConfig,
    questions: Sequence[comparison.Question],
) -> dict[str, Any]:
    """All on which an answer and its time depend, but for gate and threshold, which a contestant's name has."""
    return {
        **{name: reader and model_setup(reader.model) for name, reader in vars(models).items()},
        "device": str(models.base.model.device),
        "questions": len(questions),
        "questions_sha256": digest([asdict(question) for question in questions]),
        "base_template": args.base_template,
        **{name: value for name, value in asdict(knobs).items() if name not in _OF_CONTESTANTS},
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nudging_hf": __version__,
    }


def _tell(folder: Path, results: Sequence[comparison.Result], left_out: dict[str, str], setup: dict[str, Any]) -> None:
    """Prints what came of it, and writes it down."""
    table, said = comparison.table(results), comparison.sentences(results)
    said += [f"{name} is left out: {why}." for name, why in left_out.items()]
    print(table, comparison.LEGEND, "\n".join(said), sep="\n\n", end="\n\n")
    report = {"setup": setup, "contestants": comparison.as_dict(results), "left_out": left_out, "says": said}
    (folder / "results.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    listed = [f"- {sentence}" for sentence in said]
    settings = [f"- {name}: `{json.dumps(value, ensure_ascii=False)}`" for name, value in setup.items()]
    page = ["# Does nudging help here?", table, comparison.LEGEND, "\n".join(listed), "## Setup", "\n".join(settings)]
    (folder / "table.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(f"The table: {folder / 'table.md'}; its figures: {folder / 'results.json'}")
