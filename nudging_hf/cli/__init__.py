"""The command line: `nudging-hf`. It knows arguments, terminals and exit codes, never how an answer is written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import analyze, calibrate, chat, compare, demo, eval, generate, hub, serve, vllm
from .arguments import first_line
from .streams import escaping_output, open_closed_streams, refuse_undecoded_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `nudging-hf` with the given arguments, or those of the process.

    Returns:
        The exit code: 0, or 2 for an error that the user can fix, or 130 after an interrupt.

    Raises:
        SystemExit: for `--help`, `--version` and arguments that cannot be parsed.
    """
    open_closed_streams()
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        refuse_undecoded_arguments(given)
        with escaping_output():
            parser = _parser()
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nudging-hf",
        description="Nudging: a small aligned model writes the words where a large base model is unsure.",
    )
    parser.add_argument("--version", action="version", version=f"nudging-hf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (generate, chat, serve, demo, eval, hub, calibrate, analyze, compare, vllm):
        command.add_command(commands)
    return parser
