"""Puts what `nudging-hf demo` needs of examples/mini into the wheel. All else is in setup.cfg."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MINI = Path("examples/mini")
NEEDED = "heldout.jsonl world.py models/base/* models/nudging/* models/nudging-shared/* models/large-aligned/*".split()


class BuildWithPair(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # A checkout has examples/mini itself.
            for source in (path for pattern in NEEDED for path in MINI.glob(pattern)):
                target = Path(self.build_lib, "nudging_hf/mini", source.relative_to(MINI))
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithPair})
