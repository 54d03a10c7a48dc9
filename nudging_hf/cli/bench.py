"""`nudging-hf bench`: whether nudging is faster here, with a pair and prompts of one's own."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from ..chats import turn_template
from ..core.config import NudgingConfig
from ..study.tables import markdown_table
from .arguments import (
    PROMPT_FILE,
    add_base_template,
    add_gate,
    add_models,
    add_number,
    answer_bar,
    command_parser,
    load_reader,
    parameters_of,
)
from .files import prompts_of, refuse_missing_folders, versions, write_json


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "bench", run)
    add_models(parser)
    asked = parser.add_argument_group("prompts")
    asked.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=f"{PROMPT_FILE} (default: built-in questions)",
    )
    add_number(asked, "--limit", 5, "take N of the prompts, spread over the file")
    add_base_template(asked)
    add_number(asked, "--max-new-tokens", 256, "the limit on an answer, in tokens")
    add_number(asked, "--rounds", 3, "how often each prompt is answered")
    add_gate(parser.add_argument_group("nudging"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")


def run(args: argparse.Namespace) -> None:
    """Tells whether nudging is faster here: the base alone, the base nudged, and assisted generation (in which the
    small model drafts what the base writes) answer some prompts one at a time and in turn, with equally many tokens.
    Prints their speed, their memory, and one sentence."""
    from ..study.bench import bench

    turn_template(args.base_template)
    parameters = parameters_of(args)
    refuse_missing_folders({"--json": args.json})
    prompts = prompts_of(args.prompts, args.limit)
    base, nudging = load_reader(args, "base", chat=False), load_reader(args, "nudging_model")
    config = NudgingConfig.resolve([parameters, base.model.generation_config.to_dict()])
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.setLevel(logging.ERROR)  # Assisted generation warns of what it does itself.
    with answer_bar(3 * args.rounds * len(prompts)) as show:
        settings = {"max_new_tokens": args.max_new_tokens, "rounds": args.rounds}
        found = bench(base, nudging, config, prompts, **settings, progress=show)
    figures = found.figures()
    print(markdown_table(["", "tokens/s", "× base alone", "quartiles", "peak memory"], list(map(_cells, figures))))
    print(f"\n{found.sentence()}")
    for name, why in found.left_out.items():
        print(f"Left out: {name}, because {why}.")
    if args.json is not None:
        setup = {"base": args.base, "nudging_model": args.nudging_model, "dtype": str(base.model.dtype), **settings}
        write_json(
            args.json, {"setup": setup | versions(), "says": found.sentence(), **vars(found), "figures": figures}
        )
        print(f"All figures: {args.json}")


def _cells(row: dict[str, Any]) -> list[str]:
    low, _, high = row["quartiles"]
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
    rates = [f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
    return [row["contestant"], *rates, peak]
