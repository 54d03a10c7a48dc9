"""`nudging-hf analyze`: the paper's observations, made on a pair of models."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..chats import turn_template
from ..core.config import NudgingConfig
from ..study import demo, report
from ..study.journal import Journal, digest
from ..study.prompts import Prompt
from .arguments import PROMPT_FILE, add_models, add_study, command_parser, load_reader, positive
from .files import prompts_of, versions

if TYPE_CHECKING:
    from ..study import analysis


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "analyze", run)
    models = add_models(parser, required=False)
    models.add_argument(
        "--large-aligned",
        metavar="NAME",
        help="the model that alignment makes of the base; without one, positions are those of the nudged answers",
    )
    asked = add_study(
        parser,
        "prompts",
        f"{PROMPT_FILE} (default: the dev questions of examples/mini for its own models, and 20 built-in questions "
        "for others)",
    )
    asked.add_argument("--limit", type=positive, metavar="N", help="take N of the prompts, spread over the file")
    measured = parser.add_argument_group("measurements")
    measured.add_argument(
        "--thresholds",
        type=float,
        nargs="*",
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        metavar="P",
        help="the thresholds at which nudged answers are counted; without any, none are (default: 0.1 to 0.9)",
    )
    measured.add_argument(
        "--threshold",
        type=float,
        default=NudgingConfig().nudge_threshold,
        metavar="P",
        help="the threshold of the answers whose positions are taken without --large-aligned (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder of the results; work that is finished is kept there in units.jsonl, and is not done again",
    )


def run(args: argparse.Namespace) -> None:
    """Makes the paper's observations on a base, a nudging model and, if there is one, a large aligned model: how sure
    the base is, where it and the aligned model disagree, what a threshold catches of that, whether the small model can
    stand in for the large one, and how good the answers are at each threshold. Writes a page, its plots and its tables
    into a folder, and another page with example answers side by side. If models and prompts are left out, it takes
    those of examples/mini."""
    from ..study import analysis, examples

    turn_template(args.base_template)
    thresholds = sorted(set(args.thresholds))
    for threshold in (*thresholds, args.threshold):
        NudgingConfig(nudge_threshold=threshold)  # It is refused now, not after the models have answered.
    report.require_matplotlib()
    args.out.mkdir(parents=True, exist_ok=True)
    _choose_models_and_prompts(args)
    prompts = prompts_of(args.prompts, args.limit)
    journal = Journal(args.out / "units.jsonl", _settings(args, prompts))
    work = analysis.Analysis(
        base=load_reader(args, "base", chat=False),
        nudging=load_reader(args, "nudging_model"),
        large=load_reader(args, "large_aligned"),
        prompts=prompts,
        threshold=args.threshold,
        thresholds=thresholds,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    measured = _measure(work, journal)
    tables = analysis.tables(prompts, measured)
    page = report.write(args.out, tables, _about(args))
    examples.write_page(args.out / "page.html", prompts, analysis.examples(prompts, measured), work.base)
    print(tables["verdict"], *tables["nothing_right"], sep="\n", end="\n\n")
    for what, paper, here in report.paper_comparison(tables):
        print(f"{what}: {here} (the paper: {paper})")
    print(f"The report: {page}")
    print(f"Example answers side by side: {args.out / 'page.html'}")


def _choose_models_and_prompts(args: argparse.Namespace) -> None:
    """Puts the models and questions of examples/mini in the place of those that were left out."""
    given = [option for option in ("base", "nudging_model", "large_aligned") if getattr(args, option) is not None]
    if given:
        if missing := {"base", "nudging_model"} - set(given):
            option = "--" + min(missing).replace("_", "-")
            raise ValueError(f"{option} is missing: name both models, or none for those of examples/mini.")
        return
    folder = demo.find_folder()
    args.base, args.nudging_model = str(folder / "models/base"), str(folder / "models/nudging")
    args.large_aligned = str(folder / "models/large-aligned")
    if args.prompts is None:
        args.prompts = args.out / "dev.jsonl"
        subprocess.run([sys.executable, folder / "world.py", "--dev", args.prompts], check=True)


def _measure(work: analysis.Analysis, journal: Journal) -> dict[analysis.Unit, list[dict[str, Any]]]:
    """The rows of all units. Those that the journal holds are not measured again."""
    from tqdm import tqdm

    measured = {}
    with tqdm(work.units(), unit="unit", leave=False, file=sys.stderr) as bar:
        for unit in bar:
            gamma = "" if unit.threshold is None else f", γ = {unit.threshold:g}"
            bar.set_description(unit.kind + gamma)
            measured[unit] = journal.once(asdict(unit), partial(work.measure, unit))
    return measured


def _settings(args: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    options = ("base", "nudging_model", "large_aligned", "dtype", "base_template", "max_new_tokens", "batch_size")
    return {
        **{option: getattr(args, option) for option in options},
        "prompts": digest([asdict(prompt) for prompt in prompts]),
        "versions": versions(),
    }


def _about(args: argparse.Namespace) -> dict[str, str]:
    return {
        "base": args.base,
        "nudging model": args.nudging_model,
        "large aligned": args.large_aligned or "none",
        "prompts": str(args.prompts or "built-in"),
        "at most": f"{args.max_new_tokens} new tokens",
        "made by": f"nudging_hf {__version__}, transformers {versions()['transformers']}",
    }
