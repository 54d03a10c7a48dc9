"""`nudging-hf check`: whether the laws of nudging hold for a pair of one's own, and whether it is fit."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..chats import turn_template
from ..core.config import NudgingConfig
from .arguments import (
    PROMPT_FILE,
    add_base_template,
    add_gate,
    add_models,
    add_number,
    command_parser,
    load_pair,
    parameters_of,
)


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "check", run)
    add_models(parser)
    asked = parser.add_argument_group("prompts")
    asked.add_argument("--prompts", type=Path, metavar="FILE", help=f"{PROMPT_FILE} (default: built-in questions)")
    add_number(asked, "--limit", 4, "take N of the prompts, spread over the file", 2)
    add_base_template(asked)
    add_number(asked, "--max-new-tokens", 64, "the limit on an answer, in tokens")
    add_gate(parser.add_argument_group("nudging"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")


def run(args: argparse.Namespace) -> None:
    """Tells whether a pair is fit for nudging, and whether the laws hold for it: drafts, a batch, a cache and a
    streamer must not change an answer. Where rounding alone decides between two tokens, it says so, with the margin.
    Ends with one sentence, and with the exit code 1 if there is a problem."""
    from tqdm import tqdm

    from ..study.check import check_pair
    from ..study.prompt_files import read_prompts
    from ..study.prompts import built_in_prompts, spread
    from .files import refuse_missing_folders, versions, write_json

    turn_template(args.base_template)
    parameters = parameters_of(args)
    refuse_missing_folders({"--json": args.json})
    prompts = read_prompts(args.prompts)[0] if args.prompts else built_in_prompts()
    pair = load_pair(args)
    found = check_pair(
        pair.base,
        pair.nudging_model,
        pair.tokenizer,
        pair.nudging_tokenizer,
        spread(prompts, args.limit),
        nudging_config=NudgingConfig.resolve([parameters, pair.base.generation_config.to_dict()]),
        base_template=args.base_template,
        max_new_tokens=args.max_new_tokens,
        progress=partial(tqdm, unit="prompt", leave=False, file=sys.stderr),
    )
    for finding in found.findings:
        print(f"{finding.level.value:8} {finding.subject}: {finding.message}")
    print(f"\n{found.verdict}")
    if args.json is not None:
        findings = [finding._asdict() | {"level": finding.level.value} for finding in found.findings]
        models = {"base": args.base, "nudging_model": args.nudging_model}
        write_json(args.json, {"verdict": found.verdict, "findings": findings, **models, **versions()})
    if found.problems:
        raise SystemExit(1)
