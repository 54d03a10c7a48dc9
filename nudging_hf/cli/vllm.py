"""`nudging-hf vllm`: writes the command that starts vLLM with nudging, or runs it."""

from __future__ import annotations

import argparse
from typing import Any

from ..core.config import NudgingConfig
from .arguments import warn_of_threshold

_KNOBS = {"nudge_threshold": float, "nudge_gate": str, "target_nudge_rate": float, "word_boundary": str}


def add_command(commands: Any) -> None:
    """Adds `vllm` to the commands of `nudging-hf`."""
    parser = commands.add_parser(
        "vllm",
        description="Writes the command that serves a base with nudging by vLLM, or runs it. Arguments that are not "
        "listed here are vLLM's own, such as --port and --tensor-parallel-size.",
        allow_abbrev=False,
    )
    parser.add_argument("--base", required=True, metavar="NAME", help="folder or Hub name of the base")
    parser.add_argument(
        "--nudging-model", required=True, metavar="NAME", help="folder or Hub name of the nudging model"
    )
    parser.add_argument("--nudging-tokenizer", metavar="NAME", help="its tokenizer, if it lies elsewhere")
    parser.add_argument("--nudging-dtype", metavar="DTYPE", help="dtype of its weights (default: as they are stored)")
    for name, kind in _KNOBS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="VALUE", help=f"default of a request's `{name}`"
        )
    parser.add_argument(
        "--base-template", metavar="TEXT", help="how a chat becomes the base's prompt (default: the paper's)"
    )
    parser.add_argument(
        "--on-cpu",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether vLLM runs on a CPU (default: where torch finds no accelerator)",
    )
    parser.add_argument("--execute", action="store_true", help="run the command instead of printing it")
    parser.set_defaults(run=run, takes_more=True)


def run(args: argparse.Namespace) -> None:
    """Runs `nudging-hf vllm`.

    Raises:
        ValueError: for values out of range.
        FileNotFoundError: if vLLM is to run and is not installed.
    """
    import torch

    from ..integrations.vllm.launch import vllm_command

    knobs = {name: getattr(args, name) for name in _KNOBS if getattr(args, name) is not None}
    warn_of_threshold(NudgingConfig(**knobs))
    given = {"model": args.nudging_model, "tokenizer": args.nudging_tokenizer, "dtype": args.nudging_dtype, **knobs}
    on_cpu = args.on_cpu if args.on_cpu is not None else not torch.accelerator.is_available()
    command = vllm_command(
        args.base,
        {name: value for name, value in given.items() if value is not None},
        args.more,
        on_cpu=on_cpu,
        base_template=args.base_template,
    )
    if args.execute:
        command.run()
    print(command)
