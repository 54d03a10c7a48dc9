"""`nudging-hf calibrate`: the threshold that suits a pair of models."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from .. import __version__
from ..chats import REASONING_TEMPLATE, turn_template
from ..core.config import NudgingConfig
from ..core.gate import GATES
from ..study import calibration, report
from .arguments import add_base_template, add_models, load_pair, positive

_DESCRIPTION = (
    "Finds the threshold for a pair of models. By default the one at which a tenth of the words are nudged, on some "
    "prompts that the pair answers once for each threshold that is tried; with --by-score the one at which most "
    "answers are right."
)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `calibrate` to the commands of `nudging-hf`."""
    parser = commands.add_parser("calibrate", help="find the threshold for a pair", description=_DESCRIPTION)
    parser.set_defaults(run=run)
    add_models(parser)
    asked = parser.add_argument_group("prompts")
    asked.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a question a line, or JSON lines: {"messages": [...]}, with "prompt" where the base is given something '
        'else than --base-template makes of it, and "pattern" and "answer" for --by-score (default: 20 built-in '
        "questions; better, some twenty of the kind that the pair is for)",
    )
    add_base_template(asked, REASONING_TEMPLATE)
    asked.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="of an answer (default: %(default)s)"
    )
    asked.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="answered at once (default: %(default)s)"
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--gate",
        choices=tuple(GATES),
        help=f"whose threshold to find (default: what is stored with the base, or else {NudgingConfig.nudge_gate})",
    )
    aim = search.add_mutually_exclusive_group()
    aim.add_argument(
        "--target-nudge-rate",
        type=float,
        default=0.1,
        metavar="R",
        help="the share of words that the nudging model is to write (default: %(default)s)",
    )
    aim.add_argument("--by-score", action="store_true", help="the most right answers; of equals the fewest nudges")
    search.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="T",
        help="those that --by-score tries (default: "
        + " ".join(f"{each:g}" for each in calibration.default_thresholds(NudgingConfig.nudge_gate))
        + f" for {NudgingConfig.nudge_gate})",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep every threshold that is finished in this file, and go on from it if it is there",
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="write the threshold and the curve to this file")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve into this PNG file")
    output.add_argument(
        "--save-to", type=Path, metavar="FOLDER", help="write the threshold into the generation config of this model"
    )


def run(args: argparse.Namespace) -> None:
    """Runs `nudging-hf calibrate`."""
    _refuse_early(args)
    prompts = calibration.read_prompts(args.prompts) if args.prompts else calibration.built_in_prompts()
    pair = load_pair(args, progress=sys.stderr.isatty())
    with tqdm(total=len(prompts), unit="answer", leave=False, file=sys.stderr) as bar:

        def show(threshold: float, answered: int) -> None:
            if bar.n == bar.total:
                bar.reset()
            bar.set_description(f"threshold {threshold:g}", refresh=False)
            bar.update(answered)

        found = calibration.calibrate(
            pair.base,
            pair.nudging_model,
            pair.tokenizer,
            pair.nudging_tokenizer,
            prompts,
            target_nudge_rate=args.target_nudge_rate,
            by_score=args.by_score,
            thresholds=args.thresholds,
            nudging_config=pair.nudging_config({} if args.gate is None else {"nudge_gate": args.gate}),
            base_template=args.base_template,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            resume=args.resume,
            progress=show,
        )
    print(table(found), end="\n\n")
    gate = "" if found.nudge_gate == NudgingConfig.nudge_gate else f"nudge_gate = {found.nudge_gate}, "
    print(f"{gate}nudge_threshold = {found.threshold:g}")
    if not found.warnings:  # These have been logged, to standard error.
        print(found.verdict)
    _write(found, len(prompts), args)


def _refuse_early(args: argparse.Namespace) -> None:
    """Refuses now what would else be refused after the models have answered."""
    turn_template(args.base_template)
    if args.thresholds and not args.by_score:
        raise ValueError("--thresholds is for --by-score: a target nudge rate is found by bisection.")
    for option, path in (("--resume", args.resume), ("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{option}: there is no folder {path.parent}.")
    if args.plot is not None:
        report.require_matplotlib()
    if args.save_to is not None:
        calibration.check_model_folder(args.save_to)


def table(found: calibration.Calibration) -> str:
    """One line a threshold that was tried, with an arrow at the one that was taken."""
    scored = found.chosen.score is not None
    lines = ["threshold  nudged words" + ("  right answers" if scored else "")]
    for point in found.curve:
        line = f"{point.threshold:9.2f}  {point.nudge_rate:12.1%}"
        if point.score is not None:
            line += f"  {point.score:13.1%}"
        lines.append(line + ("  <-" if point.threshold == found.threshold else ""))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _write(found: calibration.Calibration, prompts: int, args: argparse.Namespace) -> None:
    if args.json is not None:
        saved = {
            "base": args.base,
            "nudging_model": args.nudging_model,
            "prompts": prompts,
            "max_new_tokens": args.max_new_tokens,
            **found.as_dict(),
            "versions": {
                "nudging_hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        args.json.write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"The threshold and the curve: {args.json}")
    if args.plot is not None:
        args.plot.write_bytes(report.plot_calibration(found))
        print(f"The curve, drawn: {args.plot}")
    if args.save_to is not None:
        print(f"The threshold is written to {calibration.save(found, args.save_to)}")
