"""Fuzzes one target, guided by the coverage of the package: `python tests/fuzz/run.py rounds 60`.

It ends after so many seconds, or at the first finding, whose bytes are printed for [`test_fuzz`]. Choices that reach
new code are kept in `build/fuzz/`, and the next run begins with them.
"""

import sys
from pathlib import Path

try:
    import atheris
except ImportError as error:
    sys.exit(f"{error}: install the extra `fuzz` (pip install 'nudging-hf[fuzz]'), or call `make fuzz`")

TESTS = Path(__file__).parent.parent
CORPORA = TESTS.parent / "build" / "fuzz"


def main(name: str, seconds: str) -> None:
    sys.path.insert(0, str(TESTS))
    import transformers  # noqa: F401  What is imported here is not instrumented.

    with atheris.instrument_imports(include=["nudging_hf"]):
        import nudging_hf.core.answer
        import nudging_hf.core.rounds  # noqa: F401
    from targets import TARGETS

    def target(data: bytes) -> None:
        try:
            TARGETS[name](data)
        except Exception:
            print(f"FOUND {name}: {data!r}", flush=True)
            raise

    corpus = CORPORA / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-max_len=400", "-timeout=60", f"-artifact_prefix={corpus}-"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
