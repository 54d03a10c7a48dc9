"""What the documents say about the tree is true: links resolve, modules and parameters are named, the snippet runs."""

import re
from itertools import chain
from pathlib import Path

import pytest

import nudging_hf
from nudging_hf import NudgingConfig
from nudging_hf.core.arguments import OWN_ARGUMENTS

ROOT = Path(__file__).parents[1]
MINI = ROOT / "examples" / "mini" / "models"
FOLDERS = [".", "docs", "benchmarks", "examples", "examples/mini", "hub_custom_code"]
DOCUMENTS = sorted(chain.from_iterable((ROOT / folder).glob("*.md") for folder in FOLDERS))
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def anchors_of(document):
    """The anchors that GitHub gives to headings: lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in LINK.findall(FENCED.sub("", document.read_text(encoding="utf-8"))):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_readme_is_short():
    assert len(text_of("README.md").encode()) <= 9000


def test_the_design_names_every_module_of_the_core():
    modules = {path.stem for path in (ROOT / "nudging_hf" / "core").glob("*.py")} - {"__init__"}
    tree = text_of("docs/design.md").partition("\n## The tree\n")[2]
    assert modules <= set(re.findall(r"^\| `(\w+)` \|", tree, re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "docs/doors.md"])
def test_every_argument_is_named(document):
    arguments = {*OWN_ARGUMENTS, *NudgingConfig.field_names()} - {"base_tokenizer"}
    named = re.findall(r"^\| (`.+?`) \|", text_of(document), re.MULTILINE)
    assert arguments <= set(re.findall(r"`(\w+)`", " ".join(named)))


def test_the_lines_of_the_readme_run(capsys):
    """With the pair in miniature in the place of the one that it names."""
    lines = re.search(r"^```python\n(.*?)^```", text_of("README.md"), re.MULTILINE | re.DOTALL).group(1)
    for named, folder in {"OLMo-2-1124-7B": "base", "OLMo-2-0425-1B-Instruct": "nudging"}.items():
        assert f'"allenai/{named}"' in lines
        lines = lines.replace(f'"allenai/{named}"', repr(str(MINI / folder)))
    try:
        exec(lines, {})
    finally:
        nudging_hf.unregister()
    written = capsys.readouterr().out
    assert written.startswith("Question: Why is the sky blue?") and len(written.split("\n", 1)[1]) > 20


def test_the_hook_runs_the_ruff_of_the_checks():
    (hook,) = re.findall(r"^ *rev: v(\S+)$", text_of(".pre-commit-config.yaml"), re.MULTILINE)
    assert f"\nruff=={hook}\n" in text_of("constraints.txt")
