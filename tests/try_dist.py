"""Builds the wheel and the source distribution, checks what they hold, and tries each as a user would: `make dist`.

Both are installed into one fresh environment, one after the other, so that torch is installed once. They are tried
from an empty folder and without the Hub. It needs git, and the extra `release`. The two files stay in dist/.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# What git has and a source distribution does not, and what setuptools adds to one.
_NOT_IN_SOURCE = (".ci/", ".github/", ".gitignore")
_ADDED_TO_SOURCE = {"PKG-INFO"}


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)  # The wheel is built from the source distribution.
    [wheel], [source] = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    _run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
    tracked = set(_run("git", "-C", ROOT, "ls-files").splitlines())
    _check_wheel(wheel, tracked)
    _check_source(source, tracked)
    with tempfile.TemporaryDirectory(prefix="try-dist-") as folder:
        venv.create(folder, with_pip=True)
        for distribution in (wheel, source):
            _try(distribution, Path(folder))
    print(f"{wheel.name} and {source.name} are in order.")


def _check_wheel(wheel: Path, tracked: set[str]) -> None:
    """A wheel has the package as git has it, the pair of the demonstration, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    names = {name.replace("nudging_hf/mini/", "examples/mini/") for name in names}
    package = {name for name in tracked if name.startswith("nudging_hf/")}
    _refuse(wheel, has=names - tracked, lacks=package - names)


def _check_source(source: Path, tracked: set[str]) -> None:
    """A source distribution has what git has, and nothing else."""
    with tarfile.open(source) as archive:
        names = {each.name.partition("/")[2] for each in archive if each.isfile() and ".egg-info/" not in each.name}
    wanted = {name for name in tracked if not name.startswith(_NOT_IN_SOURCE)}
    _refuse(source, has=names - wanted - _ADDED_TO_SOURCE, lacks=wanted - names)


def _refuse(archive: Path, has: set[str], lacks: set[str]) -> None:
    if has or lacks:
        sys.exit(f"{archive.name} has, and should not: {sorted(has)}; it lacks: {sorted(lacks)}")


def _try(distribution: Path, environment: Path) -> None:
    """Installs a distribution, uses its command, and removes it."""
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    pip = scripts / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"
    _run(*pip, "install", "--constraint", ROOT / "constraints.txt", distribution)
    with tempfile.TemporaryDirectory() as empty:

        def told_by(*command: str) -> str:
            return _run(scripts / command[0], *command[1:], folder=empty)

        version = told_by("nudging-hf", "--version").split()[-1]
        place = told_by("python", "-c", "import nudging_hf; print(nudging_hf.__file__)").strip()
        expected = distribution.name.split("-")[1].removesuffix(".tar.gz")
        if version != expected or environment not in Path(place).parents:
            sys.exit(f"{distribution.name}: version {version} of {place} was run, and not what was installed.")
        told_by("nudging-hf", "--help")
        told_by("nudging-hf", "demo", "--questions", "2")
        told_by("nudging-hf", "hub", "code", "written")
        written, own = Path(empty, "written", "custom_generate"), ROOT / "hub_custom_code" / "custom_generate"
        if {each.name: each.read_bytes() for each in written.iterdir()} != {
            each.name: each.read_bytes() for each in own.glob("*.*")
        }:
            sys.exit(f"{distribution.name}: `nudging-hf hub code` does not write {own}.")
    _run(*pip, "uninstall", "--yes", "nudging-hf")


def _run(*command: str | Path, folder: str | Path = ROOT) -> str:
    """Runs a command, and ends with what it printed where it fails."""
    print("$", " ".join(map(str, command)), flush=True)
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    alone["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nThe command above ended with {done.returncode}.")
    return done.stdout


if __name__ == "__main__":
    main()
