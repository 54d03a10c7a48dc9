# PYTHON_ARGCOMPLETE_OK
"""The command line: `nudging-hf`. It knows arguments, terminals and exit codes, never how an answer is written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .arguments import first_line
from .streams import escaping_output, open_closed_streams, refuse_undecoded_arguments

# The commands. Each has a module of its name, which is imported when the command is given.
COMMANDS = {
    "demo": "see a pair of tiny models at work, and measured",
    "generate": "answer a prompt",
    "chat": "chat with a pair of models",
    "compare": "see whether nudging helps a pair, and against what",
    "check": "see whether a pair is fit, and whether the laws of nudging hold for it",
    "bench": "see whether nudging is faster here",
    "calibrate": "find the threshold for a pair",
    "analyze": "look into a pair of models",
    "safety": "see how far prompts can talk nudging away",
    "eval": "run lm-evaluation-harness with --model nudging_hf and the paper's tasks",
    "serve": "serve a pair to clients of OpenAI's API",
    "vllm": "write the command that serves a base with nudging by vLLM",
    "hub": "models and code for the Hugging Face Hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `nudging-hf` with the given arguments, or those of the process.

    Returns:
        The exit code: 0, or 2 for an error that the user can fix, or 130 after an interrupt.

    Raises:
        SystemExit: for `--help`, `--version` and arguments that cannot be parsed.
    """
    complete()
    open_closed_streams()
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        refuse_undecoded_arguments(given)
        with escaping_output():
            parser = _parser(given)
            args, more = parser.parse_known_args(given)
            if more and not getattr(args, "takes_more", False):
                parser.error(f"unrecognized arguments: {' '.join(more)}")
            args.more = more
            args.run(args)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("nudging-hf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # The program that reads the output, such as `head`, has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"nudging-hf: error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of some arguments. It knows the options of the command that they begin with, and all names."""
    parser = argparse.ArgumentParser(
        prog="nudging-hf",
        description="Nudging: a small aligned model writes the words where a large base model is unsure.",
    )
    parser.add_argument("--version", action="version", version=f"nudging-hf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    chosen = next((word for word in given if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        if name == chosen:
            import_module(f".{name}", __name__).add_command(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser


def complete() -> None:
    """Answers a shell that asks by way of argcomplete what may come next, and ends the process; else does nothing."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(_parser(os.environ["COMP_LINE"].split()))
