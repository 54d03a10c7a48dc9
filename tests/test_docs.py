"""What the documents say about the tree is true: links resolve, modules and parameters are named, the snippet runs."""

import ast
import inspect
import json
import re
import shlex
from itertools import chain
from pathlib import Path

import pytest

import nudging_hf
from nudging_hf import NudgingConfig, calibrate, chat_inputs, cli, hub, plain_prompt
from nudging_hf.core.arguments import OWN_ARGUMENTS
from nudging_hf.hub import plain_chat_template
from nudging_hf.pair import Pair, load_model
from nudging_hf.pipelines import NudgedTextGenerationPipeline
from nudging_hf.study.reader import Reader

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
    assert written.startswith("Question: Mido has 12 pens.") and "So the answer is 19." in written


def commands_of(document, name):
    """The commands `nudging-hf NAME` of a document's consoles, as lists of arguments."""
    blocks = re.findall(r"^```console\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [
        shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ nudging-hf")
    ]
    return [command[1:] for command in commands if command[1] == name]


@pytest.fixture
def generate(capsys, monkeypatch, tmp_path):
    """Runs a command of the documents that asks the pair in miniature, and returns the answer with its marks."""

    def run(arguments):
        monkeypatch.chdir(tmp_path)
        models = [str(ROOT / each) if each.startswith("examples/") else each for each in arguments]
        assert cli.main([*models, "--marks", "--quiet"]) == 0
        return capsys.readouterr().out

    return run


def test_the_picture_and_its_command_show_the_pair_s_right_answer(generate):
    [command] = commands_of("docs/doors.md", "generate")
    answer = generate(command)
    assert "So⟧ the answer is 19." in answer
    named = re.search(r"words are highlighted: (.*?)\. The nudging", text_of("README.md")).group(1)
    assert re.findall(r"⟦(.*?)⟧", answer) == re.findall('"(.*?)"', named)


def test_the_first_example_of_the_help_is_answered_rightly(generate, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = capsys.readouterr().out.partition("for example, in a checkout of the project:\n")[2]
    assert "So⟧ the answer is 19." in generate(shlex.split(shown.replace("\\\n", " "))[1:])


def test_the_questions_of_the_server_s_page_are_answered_rightly():
    """By its route; `test_serve.py` compares the server's answers with those of a call."""
    pair = Pair(*load_model(MINI / "base", "base"), *load_model(MINI / "nudging", "nudging model"))
    text = text_of("docs/server.md")
    body = json.loads(re.search(r"-d '(\{.*?\})'\n", text, re.DOTALL).group(1))
    asked = ast.literal_eval(re.search(r"^question = (\{.*?^\})", text, re.MULTILINE | re.DOTALL).group(1))
    for chat in (body["messages"], [asked]):
        inputs = pair.inputs(chat)
        ids = pair.generate(inputs, nudge_threshold=0.4, max_new_tokens=200, do_sample=False)
        assert "So the answer is 19." in pair.tokenizer.decode(ids[0])


def test_one_template_is_the_default_everywhere():
    functions = (
        chat_inputs,
        plain_prompt,
        Pair.inputs,
        calibrate,
        hub.export,
        Reader,
        NudgedTextGenerationPipeline.preprocess,
    )
    for function in functions:
        parameters = inspect.signature(function).parameters
        named = parameters.get("base_template") or parameters["template"]
        assert named.default == nudging_hf.DEFAULT_TEMPLATE, function
    for command in ("generate", "chat", "serve", "calibrate", "compare", "analyze"):
        options = {"generate": ["?"], "compare": ["--prompts", "p", "--out", "o"], "analyze": ["--out", "o"]}
        given = [command, "--base", "b", "--nudging-model", "n", *options.get(command, [])]
        assert cli._parser(given).parse_args(given).base_template == nudging_hf.DEFAULT_TEMPLATE, command
    assert plain_chat_template() == plain_chat_template(nudging_hf.DEFAULT_TEMPLATE)
    for program in (ROOT / "examples").glob("*.py"):
        assert "base_template" not in program.read_text(encoding="utf-8"), program


def test_the_hook_runs_the_ruff_of_the_checks():
    (hook,) = re.findall(r"^ *rev: v(\S+)$", text_of(".pre-commit-config.yaml"), re.MULTILINE)
    assert f"\nruff=={hook}\n" in text_of("constraints.txt")
