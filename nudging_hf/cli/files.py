"""What several commands read from files and write into them. It knows paths and versions, never what is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..study.prompt_files import description, read_prompts
from ..study.prompts import Prompt, built_in_prompts, spread
from .streams import say


def refuse_missing_folders(files: Mapping[str, Path | None]) -> None:
    """Raises a `ValueError` for an option whose file cannot be written, because its folder does not exist."""
    for option, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{option}: there is no folder {path.parent}.")


def prompts_of(path: Path | None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, or else the built-in ones; at most `limit` of them, spread over the file. Standard error
    is told what they are."""
    if path is None:
        prompts = built_in_prompts()
        say(f"Built-in prompts: {description(prompts)}")
    else:
        prompts, said = read_prompts(path)
        say(said)
    if limit is None or limit >= len(prompts):
        return prompts
    prompts = spread(prompts, limit)
    say(f"Taken: {description(prompts)}")
    return prompts


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON that people can read too."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions on which figures may depend."""
    import torch
    import transformers

    return {"nudging_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
