"""Tasks for lm-evaluation-harness: the paper's and those of safety. It knows where they lie, never the harness."""

from pathlib import Path

FOLDER = Path(__file__).parent
