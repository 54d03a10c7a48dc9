"""`nudging-hf hub`: models and code for the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .arguments import add_base_template, add_gate, command_parser, drafts, loading_bars, parameters_of, positive


def add_command(commands: Any) -> None:
    hub = commands.add_parser("hub", description="Models and code for the Hugging Face Hub.")
    actions = hub.add_subparsers(title="actions", required=True, metavar="ACTION")
    parser = command_parser(actions, "export", _export, help="write a model folder that nudges by itself")
    parser.add_argument("out", metavar="OUT", help="the folder to be written")
    name: dict[str, Any] = {"required": True, "metavar": "NAME"}
    parser.add_argument("--base", **name, help="the large base model: a folder, or a name on the Hugging Face Hub")
    parser.add_argument(
        "--nudging-model",
        **name,
        help="the small aligned model: a folder, which is copied, or a name on the Hub, which is recorded",
    )
    add_base_template(parser)
    parser.add_argument(
        "--license", metavar="ID", help="of the weights, such as apache-2.0 (default: what the models' cards say)"
    )
    parser.add_argument(
        "--base-models",
        nargs="+",
        metavar="NAME",
        help="the models' names on the Hub, for the card (default: those above, and what the folders' cards name)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model folder")
    nudging = parser.add_argument_group("nudging", "Only the options that are given are recorded.")
    add_gate(nudging)
    nudging.add_argument("--num-nudging-tokens", type=positive, metavar="N")
    nudging.add_argument("--takeover-on-agreement", action=argparse.BooleanOptionalAction)
    nudging.add_argument("--num-draft-tokens", type=drafts, metavar="N")

    parser = command_parser(actions, "code", _code, help="put the code into a folder")
    parser.add_argument("folder", metavar="FOLDER")

    parser = command_parser(actions, "push", _push, help="upload a folder")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("repo_id", metavar="REPO_ID", help="such as owner/name")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--revision", metavar="BRANCH", help="created if there is none (default: the main one)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and upload nothing")


def _export(args: argparse.Namespace) -> None:
    """Writes a model folder that nudges by itself if it is loaded with trust_remote_code=True: the base, the nudging
    model (or its name on the Hub), the code, and a model card."""
    from ..hub import export

    with loading_bars(sys.stderr.isatty()):
        out = export(
            args.base,
            args.nudging_model,
            args.out,
            base_template=args.base_template,
            overwrite=args.overwrite,
            license=args.license,
            base_models=args.base_models,
            **parameters_of(args),
        )
    _print_files(out)


def _code(args: argparse.Namespace) -> None:
    """Writes FOLDER/custom_generate, so that FOLDER, or the repository that it is pushed to, can be given as
    custom_generate=. Python files there are replaced, and marked lists in FOLDER/README.md are brought up to date;
    nothing else is touched."""
    from ..hub import write_code

    print(write_code(args.folder))


def _push(args: argparse.Namespace) -> None:
    """Uploads a folder to a model repository on the Hub, which is created if there is none. It uses the token that
    `hf auth login` stores."""
    from ..hub import push, validate_repo_name

    if args.dry_run:
        validate_repo_name(args.repo_id)
        _print_files(args.folder)
    else:
        print(push(args.folder, args.repo_id, private=args.private, revision=args.revision))


def _print_files(folder: str | Path) -> None:
    from ..hub import files_to_push

    files = files_to_push(folder)
    for path, size in files.items():
        print(f"{_size(size):>10}  {path}")
    print(f"{_size(sum(files.values())):>10}  {len(files)} files in {folder}")


def _size(count: float) -> str:
    """A number of bytes, such as "8.0 MB"."""
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} B"
