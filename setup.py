"""What setup.cfg cannot say: the README with absolute links, and the pair of `nudging-hf demo` in the wheel."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

REPOSITORY = "nudging-hf/nudging_hf"
MINI = Path("examples/mini")
NEEDED = "heldout.jsonl world.py models/base/* models/nudging/* models/nudging-shared/* models/large-aligned/*".split()
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\((?!https?://|#)([^)\s]+)\)")  # Its text may have brackets.


def absolute(link: re.Match) -> str:
    """A link of the README into this tree, as one to GitHub, because the page of PyPI has no tree."""
    picture, text, path = link.groups()
    if picture:
        return f"![{text}](https://raw.githubusercontent.com/{REPOSITORY}/main/{path})"
    return f"[{text}](https://github.com/{REPOSITORY}/blob/main/{path})"


class BuildWithPair(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # A checkout has examples/mini itself.
            for source in (path for pattern in NEEDED for path in MINI.glob(pattern)):
                target = Path(self.build_lib, "nudging_hf/mini", source.relative_to(MINI))
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(
    cmdclass={"build_py": BuildWithPair},
    long_description=LINK.sub(absolute, Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
