"""`nudging-hf analyze`: the paper's observations, made on a pair of models."""

from __future__ import annotations

import argparse
import subprocess
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
from ..study import analysis, calibration, demo, report
from ..study.journal import Journal, digest
from .arguments import add_base_template, add_models, load_model, load_pair, loading_bars, positive

_DESCRIPTION = (
    "Makes the paper's observations on a base, a nudging model and, if there is one, a large aligned model: how sure "
    "the base is, where it and the aligned model disagree, what a threshold catches of that, whether the small model "
    "can stand in for the large one, and what each threshold makes of the answers. Writes a page, its plots and its "
    "tables into a folder. Without models and prompts, those of examples/mini."
)


def add_command(commands: Any) -> None:
    """Adds `analyze` to the commands of `nudging-hf`."""
    parser = commands.add_parser("analyze", help="look into a pair of models", description=_DESCRIPTION)
    parser.set_defaults(run=run)
    models = add_models(parser, required=False)
    models.add_argument(
        "--large-aligned",
        metavar="NAME",
        help="what the base becomes by alignment; without one, positions are those of the nudged answers",
    )
    asked = parser.add_argument_group("prompts")
    asked.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a question a line, or JSON lines: {"messages": [...]}, with "prompt" where the base is given something '
        'else than --base-template makes of it, and "pattern" and "answer" where the right answer is known (default: '
        "the dev questions of examples/mini for its own models, and 20 built-in questions for others)",
    )
    asked.add_argument("--limit", type=positive, metavar="N", help="take N of the prompts, spread over the file")
    add_base_template(asked, REASONING_TEMPLATE)
    measured = parser.add_argument_group("measurements")
    measured.add_argument(
        "--thresholds",
        type=float,
        nargs="*",
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        metavar="P",
        help="at which answers are nudged and counted; none: leave this out (default: 0.1 to 0.9)",
    )
    measured.add_argument(
        "--threshold",
        type=float,
        default=NudgingConfig().nudge_threshold,
        metavar="P",
        help="of the answers that positions are those of, without --large-aligned (default: %(default)s)",
    )
    measured.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="of an answer (default: %(default)s)"
    )
    measured.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="answered at once (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where to; what is finished there is kept in units.jsonl, and not done again",
    )


def run(args: argparse.Namespace) -> None:
    """Runs `nudging-hf analyze`."""
    turn_template(args.base_template)
    thresholds = sorted(set(args.thresholds))
    for threshold in (*thresholds, args.threshold):
        NudgingConfig(nudge_threshold=threshold)  # Refused now, not after the models have answered.
    report.require_matplotlib()
    args.out.mkdir(parents=True, exist_ok=True)
    _choose_models_and_prompts(args)
    prompts = calibration.read_prompts(args.prompts) if args.prompts else calibration.built_in_prompts()
    prompts = spread(prompts, args.limit or len(prompts))
    journal = Journal(args.out / "units.jsonl", _settings(args, prompts))
    done = _measure(args, prompts, thresholds, journal)
    tables = analysis.tables(prompts, done)
    page = report.write(args.out, tables, _about(args))
    for what, paper, here in report.paper_comparison(tables):
        print(f"{what}: {here} (the paper: {paper})")
    print(f"The report: {page}")


def spread(prompts: Sequence[calibration.Prompt], count: int) -> list[calibration.Prompt]:
    """`count` of the prompts, or all, at even distances: a file goes task by task."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _choose_models_and_prompts(args: argparse.Namespace) -> None:
    """Puts the models and questions of examples/mini in the place of what was left out."""
    given = [option for option in ("base", "nudging_model", "large_aligned") if getattr(args, option) is not None]
    if given:
        if missing := {"base", "nudging_model"} - set(given):
            option = "--" + min(missing).replace("_", "-")
            raise ValueError(f"{option} is missing: name both models, or none for those of examples/mini.")
        return
    folder = demo.find_pair()
    args.base, args.nudging_model = str(folder / "models/base"), str(folder / "models/nudging")
    args.large_aligned = str(folder / "models/large-aligned")
    if args.prompts is None:
        args.prompts = args.out / "dev.jsonl"
        subprocess.run([sys.executable, folder / "world.py", "--dev", args.prompts], check=True)


def _measure(
    args: argparse.Namespace, prompts: Sequence[calibration.Prompt], thresholds: Sequence[float], journal: Journal
) -> dict[analysis.Unit, list[dict[str, Any]]]:
    """All units: those of the journal, and the others, which are written there as they finish."""
    shown = sys.stderr.isatty()
    pair = load_pair(args, progress=shown)
    large = None
    if args.large_aligned is not None:
        with loading_bars(shown):
            large = analysis.Reader(*load_model("--large-aligned", args.large_aligned, args), True, args.base_template)
    work = analysis.Analysis(
        base=analysis.Reader(pair.base, pair.tokenizer, False, args.base_template),
        nudging=analysis.Reader(pair.nudging_model, pair.nudging_tokenizer, True, args.base_template),
        large=large,
        prompts=prompts,
        threshold=args.threshold,
        thresholds=thresholds,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    units = work.units()
    finished = {analysis.Unit(**row["unit"]): row["rows"] for row in journal.rows}
    done = {unit: finished[unit] for unit in units if unit in finished}
    with tqdm(units, initial=len(done), unit="unit", leave=False, file=sys.stderr) as bar:
        for unit in units:
            if unit not in done:
                gamma = "" if unit.threshold is None else f", γ = {unit.threshold:g}"
                bar.set_description(unit.kind + gamma)
                done[unit] = work.measure(unit)
                journal.add({"unit": asdict(unit), "rows": done[unit]})
                bar.update()
    return done


def _settings(args: argparse.Namespace, prompts: Sequence[calibration.Prompt]) -> dict[str, Any]:
    return {
        "base": args.base,
        "nudging_model": args.nudging_model,
        "large_aligned": args.large_aligned,
        "dtype": args.dtype,
        "prompts": digest([asdict(prompt) for prompt in prompts]),
        "base_template": args.base_template,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "versions": {
            "nudging_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _about(args: argparse.Namespace) -> dict[str, str]:
    return {
        "base": args.base,
        "nudging model": args.nudging_model,
        "large aligned": args.large_aligned or "none",
        "prompts": str(args.prompts or "built-in"),
        "at most": f"{args.max_new_tokens} new tokens",
        "made by": f"nudging_hf {__version__}, transformers {transformers.__version__}",
    }
