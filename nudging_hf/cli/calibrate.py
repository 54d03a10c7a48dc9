"""`nudging-hf calibrate`: the threshold that suits a pair of models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chats import turn_template
from ..core.config import DEFAULT_THRESHOLDS, NudgingConfig
from ..study import report
from ..study.prompts import validate_labelled
from ..study.tables import markdown_table, percent
from .arguments import PROMPT_FILE, add_models, add_study, add_word_boundary, answer_bar, command_parser, load_pair
from .files import prompts_of, refuse_missing_folders, versions, write_json

if TYPE_CHECKING:
    from ..study import calibration


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "calibrate", run)
    add_models(parser)
    add_study(
        parser,
        "prompts",
        f"{PROMPT_FILE} (default: 20 built-in questions; some twenty of the kind that the pair is for are better)",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--gate",
        choices=tuple(DEFAULT_THRESHOLDS),
        help=f"the gate whose threshold is found (default: the one stored with the base, or else "
        f"{NudgingConfig.nudge_gate})",
    )
    add_word_boundary(search)
    aim = search.add_mutually_exclusive_group()
    aim.add_argument(
        "--target-nudge-rate",
        type=float,
        default=0.1,
        metavar="R",
        help="the share of words that the nudging model is to write (default: %(default)s)",
    )
    aim.add_argument("--by-score", action="store_true", help="most right answers; among equals, fewest nudged words")
    search.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="T",
        help="the thresholds that --by-score tries (default: nine, in steps of a tenth of the gate's range)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep every threshold that is finished in this file, and go on from it if it exists",
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="write the threshold and the curve to this file")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve into this PNG file")
    output.add_argument(
        "--save-to", type=Path, metavar="FOLDER", help="write the threshold into the generation config of this model"
    )


def run(args: argparse.Namespace) -> None:
    """Finds the threshold for a pair of models: by default the one at which a tenth of the words are nudged, and with
    --by-score the one at which most answers are right. The pair answers some prompts once for each threshold that is
    tried."""
    from ..study import calibration

    turn_template(args.base_template)
    if args.thresholds and not args.by_score:
        raise ValueError("--thresholds is for --by-score: a target nudge rate is found by bisection.")
    refuse_missing_folders({"--resume": args.resume, "--json": args.json, "--plot": args.plot})
    if args.plot is not None:
        report.require_matplotlib()
    if args.save_to is not None:
        calibration.check_model_folder(args.save_to)
    prompts = prompts_of(args.prompts)
    if args.by_score:
        validate_labelled(prompts, "--by-score")
    pair = load_pair(args)
    with answer_bar(len(prompts)) as show:
        found = calibration.calibrate(
            pair.base,
            pair.nudging_model,
            pair.tokenizer,
            pair.nudging_tokenizer,
            prompts,
            target_nudge_rate=args.target_nudge_rate,
            by_score=args.by_score,
            thresholds=args.thresholds,
            nudging_config=pair.nudging_config({"nudge_gate": args.gate, "word_boundary": args.word_boundary}),
            base_template=args.base_template,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            resume=args.resume,
            progress=lambda threshold, answered: show(f"threshold {threshold:g}", answered),
        )
    print(found.verdict, table(found), sep="\n\n", end="\n\n")
    gate = "" if found.nudge_gate == NudgingConfig.nudge_gate else f"nudge_gate = {found.nudge_gate}, "
    print(f"{gate}nudge_threshold = {found.threshold:g}")
    _write(found, len(prompts), args)


def table(found: calibration.Calibration) -> str:
    """One line for each threshold that was tried, with an arrow at the chosen one."""
    scored = found.chosen.score is not None
    rows = [
        [
            f"{point.threshold:.2f}",
            percent(point.nudge_rate),
            *([percent(point.score)] if scored else []),
            "<-" if point.threshold == found.threshold else "",
        ]
        for point in found.curve
    ]
    return markdown_table(["threshold", "nudged words", *(["right answers"] if scored else []), "chosen"], rows)


def _write(found: calibration.Calibration, prompts: int, args: argparse.Namespace) -> None:
    from ..study import calibration

    if args.json is not None:
        saved = {
            "base": args.base,
            "nudging_model": args.nudging_model,
            "prompts": prompts,
            "max_new_tokens": args.max_new_tokens,
            **found.as_dict(),
            "versions": versions(),
        }
        write_json(args.json, saved)
        print(f"The threshold and the curve: {args.json}")
    if args.plot is not None:
        args.plot.write_bytes(report.plot_calibration(found))
        print(f"The curve, drawn: {args.plot}")
    if args.save_to is not None:
        print(f"The threshold is written to {calibration.save(found, args.save_to)}")
