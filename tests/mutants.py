"""Breaks each rule of the algorithm by hand, one at a time, and runs the tests that should notice.

    python tests/mutants.py                 # all of them; exit status 1 if one survives or no longer applies
    python tests/mutants.py agreement EOS   # those whose rule contains one of these words, or whose file is one

`mutants.toml` lists the mutations. Each is applied to a temporary copy of the package. The tests are those of the
working tree, run in a process of their own against that copy until the first one fails. A mutant that hangs is
stopped, which its test reports as a failure. First the same tests must pass on the unchanged package.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "nudging_hf"
_SECONDS = 600  # After this long, a run of one mutant counts as hanging.


@dataclass(frozen=True)
class Mutant:
    """One rule broken.

    Args:
        rule: the rule, in the words of `docs/design.md`.
        file: a module of `nudging_hf/core`, without its suffix.
        old: text that occurs in it exactly once.
        new: what replaces it.
        tests: what should notice, quick tests first: files without `test_` and suffix, or single tests after "::".
    """

    rule: str
    file: str
    old: str
    new: str
    tests: list[str]

    @property
    def path(self) -> Path:
        return PACKAGE / "core" / f"{self.file}.py"

    def mutated(self) -> str:
        """The text of the module with the rule broken.

        Raises:
            ValueError: if the old text does not occur exactly once.
        """
        text = self.path.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.path}: expected once, found {count} times: {self.old!r}")
        return text.replace(self.old, self.new)


MUTANTS = [Mutant(**each) for each in tomllib.loads((TESTS / "mutants.toml").read_text())["mutants"]]


class _FirstFailure:
    """A pytest plugin that records the first test that fails."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid.removeprefix("tests/")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.name is None:
            raise RuntimeError(f"The tests cannot be collected: {report.longrepr}")


def first_failure(mutant: Mutant | None, tests: Iterable[str]) -> str | None:
    """Runs tests against a copy of the package, mutated if there is a mutant. The process cannot be used again.

    Returns:
        The first test that fails; `None` if all pass.
    """
    import pytest

    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copied = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copied)
        if mutant is not None:
            (copied / mutant.path.relative_to(PACKAGE)).write_text(mutant.mutated())
        sys.path.insert(0, folder)
        import nudging_hf

        assert Path(nudging_hf.__file__).parent == copied, "another copy of the package was imported before"
        signal.signal(signal.SIGALRM, _hangs)
        if mutant is not None:
            signal.alarm(_SECONDS)
        failure = _FirstFailure()
        named = [each.partition("::") for each in tests]
        files = [str(TESTS / f"test_{file}.py") + colons + test for file, colons, test in named]
        options = ["-x", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:terminal"]
        options += ["--assert=plain"]  # Modules that are loaded already cannot be rewritten.
        status = pytest.main([*options, "--rootdir", str(TESTS.parent), *files], plugins=[failure])
        signal.alarm(0)
    if (status == pytest.ExitCode.OK) != (failure.name is None):
        raise RuntimeError(f"pytest ended with {status!r} for {mutant}")
    return failure.name


def _hangs(*_: Any) -> None:
    raise TimeoutError(f"no end after {_SECONDS} s")


def _try(mutant: Mutant) -> tuple[Mutant, str | None]:
    return mutant, first_failure(mutant, mutant.tests)


def main(words: list[str]) -> int:
    """Runs the mutants of which the rule contains one of the words or the file is one of them, and all without words.

    Returns:
        The exit status.
    """
    chosen = [each for each in MUTANTS if not words or any(word in each.rule or word == each.file for word in words)]
    for mutant in chosen:
        mutant.mutated()
    # What the tests import besides the package is loaded once, and each mutant runs in a fork.
    sys.dont_write_bytecode = True
    import tiny  # noqa: F401
    import torch

    torch.set_num_threads(1)
    survivors = []
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        tests = dict.fromkeys(name for mutant in chosen for name in mutant.tests)
        if failed := pool.apply(first_failure, (None, tests)):
            print(f"{failed} fails on the unchanged package")
            return 1
        for number, (mutant, failed) in enumerate(pool.imap(_try, chosen), 1):
            verdict = f"killed by {failed}" if failed else f"SURVIVED {', '.join(mutant.tests)}"
            print(f"{number}/{len(chosen)} {mutant.file}: {mutant.rule} {verdict}", flush=True)
            if failed is None:
                survivors.append(mutant)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
