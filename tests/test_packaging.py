"""What a wheel is built of: a description whose links lead somewhere without a tree, and a pair that is small."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_script(monkeypatch):
    """The globals of setup.py, and what it gives to `setup`."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: given.update(keywords))
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py"), given


def test_every_link_of_the_description_is_absolute_and_leads_into_the_tree(setup_script):
    described, readme = setup_script[1]["long_description"], (ROOT / "README.md").read_text(encoding="utf-8")
    own = "https://(?:github|raw.githubusercontent).com/nudging-hf/nudging_hf/(?:blob/)?main/"
    found = re.findall(rf"\]\({own}([^)#]+)[^)]*\)", described)
    assert all((ROOT / path).exists() for path in found) and "docs/design.md" in found
    assert "](https://raw.githubusercontent.com/nudging-hf/nudging_hf/main/docs/nudged.png)" in described
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", described) if not link.startswith("https://")] == []
    assert re.sub(own, "", described) == re.sub(own, "", readme)


def test_the_wheel_has_what_the_demo_loads_and_stays_below_25_megabytes(setup_script):
    script, _ = setup_script
    files = [path for pattern in script["NEEDED"] for path in script["MINI"].glob(pattern)]
    assert sum(path.stat().st_size for path in files) < 20e6
    names = {path.relative_to(script["MINI"]).as_posix() for path in files}
    assert {"heldout.jsonl", "world.py", "models/base/model.safetensors", "models/nudging/tokenizer.json"} <= names
