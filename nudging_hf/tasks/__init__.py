"""The paper's tasks for lm-evaluation-harness. It knows where their YAML files lie, never the harness."""

from pathlib import Path

FOLDER = Path(__file__).parent
