"""What stands in the documents: their blocks of code, and the commands of their consoles."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = [".", "docs", "docs/api", "benchmarks", "examples/mini", "examples/space", "hub_custom_code"]
DOCUMENTS = sorted(chain.from_iterable((ROOT / folder).glob("*.md") for folder in FOLDERS))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
BLOCK = re.compile(
    r"^(?:<!-- (?P<remark>[^\n]*?) -->\n\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A block of code of a document.

    Args:
        kind: "python", "console", ...
        text: its lines.
        remark: of a comment in front of it, which the reader does not see: "not run: ..." or "run by ...".
        line: on which line of the document its text begins.
    """

    kind: str
    text: str
    remark: str | None
    line: int


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(name: str, kind: str) -> list[Block]:
    text = text_of(name)
    found = BLOCK.finditer(text)
    blocks = [
        Block(each["kind"], each["text"], each["remark"], text.count("\n", 0, each.start("text")) + 1)
        for each in found
    ]
    return [block for block in blocks if block.kind == kind]


def commands_of(name: str, *beginning: str) -> Iterator[list[str]]:
    """The commands of a document's consoles that begin with some words, as lists of words."""
    for block in blocks_of(name, "console"):
        for line in re.findall(r"^\$ (.*(?:(?<=\\)\n.*)*)", block.text, re.MULTILINE):
            if line.startswith("curl"):  # Its body has several lines.
                continue
            words = shlex.split(line.replace("\\\n", " "), comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                if words[: len(beginning)] == list(beginning):
                    yield words[:end]
                words = words[end + 1 :]
