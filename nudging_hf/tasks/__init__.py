"""The paper's tasks and the safety tasks for lm-evaluation-harness. It knows their folder, never the harness."""

from pathlib import Path

FOLDER = Path(__file__).parent
