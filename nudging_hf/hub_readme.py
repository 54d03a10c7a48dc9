"""The lists in the README of a code folder, made from the package's own docs. It knows docstrings, never models.

A list stands between `<!-- NAME -->` and `<!-- end of NAME -->`; everything else in the README is the author's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from .core.config import NudgingConfig
from .core.generate import generate
from .core.transformers_private import LOWEST, NEWEST
from .core.validation import UNSUPPORTED


def refresh_lists(readme: Path) -> None:
    """Brings the lists of a README up to date. A README without lists, or none at all, stays as it is."""
    if readme.is_file():
        old = readme.read_text(encoding="utf-8")
        new = _LIST.sub(lambda found: f"<!-- {found[1]} -->{LISTS[found[1]]()}<!-- end of {found[1]} -->", old)
        if new != old:
            readme.write_text(new, encoding="utf-8", newline="\n")


def _arguments() -> str:
    """A table of the arguments that `generate` takes besides those of transformers."""
    rows = []
    about_fields = ""
    fields = NudgingConfig.field_names()
    for names, text in documented_arguments(generate).items():
        if names == fields:
            about_fields = text
        elif names not in (("model",), ("kwargs",)):
            rows.append([", ".join(f"`{name}`" for name in names), "", text])
    for (name,), text in documented_arguments(NudgingConfig).items():
        rows.append([f"`{name}`", f"`{getattr(NudgingConfig(), name)!r}`", text])
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n" + "\n".join(["| argument | default | |", "|---|---|---|", *lines, "", about_fields]) + "\n"


def _refused() -> str:
    """The arguments that are refused, those with the same remedy together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED.items():
        if name != "custom_generate":  # The folder itself is given as this argument.
            by_reason.setdefault(reason, []).append(f"`{name}`")
    return "\n" + "".join(f"- {', '.join(names)}: {reason}.\n" for reason, names in by_reason.items())


def _versions() -> str:
    return " to ".join(".".join(map(str, version)) for version in (LOWEST, NEWEST))


LISTS: dict[str, Callable[[], str]] = {"arguments": _arguments, "refused": _refused, "versions": _versions}

_LIST = re.compile(rf"<!-- ({'|'.join(LISTS)}) -->.*?<!-- end of \1 -->", re.DOTALL)
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*)(?: \(.*\))?:(.*)")


def documented_arguments(documented: object) -> dict[tuple[str, ...], str]:
    """The entries of the section "Args:" of a docstring: names, and what is said about them, on one line."""
    entries: dict[tuple[str, ...], list[str]] = {}
    for line in (inspect.getdoc(documented) or "").partition("\nArgs:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if entry := _ENTRY.fullmatch(line):
            said = entries[tuple(entry[1].split(", "))] = [entry[2].strip()]
        elif line.strip():
            said.append(line.strip())
    # Links to other docs become plain names.
    return {names: re.sub(r"\[`~?([^`]*)`\]", r"`\1`", " ".join(said).strip()) for names, said in entries.items()}
