"""`nudging-hf eval`: lm-evaluation-harness with the nudged model and the paper's tasks. The arguments are its own."""

from __future__ import annotations

import argparse
import sys
from typing import Any
from unittest.mock import patch

from ..tasks import FOLDER


def add_command(commands: Any) -> None:
    # No option is ours, not even --help: every argument goes on to the harness.
    parser = commands.add_parser(
        "eval",
        add_help=False,
        prefix_chars="\0",
    )
    parser.set_defaults(run=run)
    parser.add_argument("arguments", nargs="*")


def run(args: argparse.Namespace) -> None:
    """Runs the harness. Raises an `ImportError` where it is not installed."""
    from ..integrations.lm_eval import register

    register()
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    class TaskManager(lm_eval.tasks.TaskManager):  # `--include_path` takes one folder, and that is the user's.
        def __init__(self, *args: Any, include_path: Any = None, **kwargs: Any):
            users = include_path if isinstance(include_path, (list, tuple)) else [include_path]
            super().__init__(*args, include_path=[FOLDER, *filter(None, users)], **kwargs)

    # The harness's command line takes neither as an argument.
    argv = ["lm-eval", *args.arguments]
    with patch.object(lm_eval.tasks, "TaskManager", TaskManager), patch.object(sys, "argv", argv):
        cli_evaluate()
