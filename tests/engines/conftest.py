"""The mini pair with heads that vLLM's attention takes, and what its answers are in process."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
MINI = ROOT / "examples" / "mini"
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with `base`, `nudging` (a vocabulary of its own) and `nudging-shared` (the base's vocabulary)."""
    from widen import with_larger_heads

    folder = tmp_path_factory.mktemp("models")
    for name, head_dim in (("base", 64), ("nudging", 32), ("nudging-shared", 32)):
        model = AutoModelForCausalLM.from_pretrained(MINI / "models" / name, dtype=torch.float32)
        with_larger_heads(model, head_dim).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(MINI / "models" / name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Fifty held-out questions as the base's prompts."""
    lines = (MINI / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:: len(lines) // 50]][:50]
