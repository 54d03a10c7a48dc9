"""What the documents say is true: links resolve, modules and parameters are named, figures are computed.

`test_blocks.py` runs their lines.
"""

import ast
import inspect
import json
import re
import runpy
import shlex

import pytest
import torch
from documents import DOCUMENTS, NAMES, ROOT, commands_of, text_of
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import nudging_hf
from nudging_hf import NudgingConfig, calibrate, chat_inputs, cli, hub, plain_prompt
from nudging_hf.core.arguments import OWN_ARGUMENTS
from nudging_hf.hub import plain_chat_template
from nudging_hf.pair import Pair, load_model
from nudging_hf.pipelines import NudgedTextGenerationPipeline
from nudging_hf.study.reader import Reader

MINI = ROOT / "examples" / "mini" / "models"
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
REPOSITORY = "https://github.com/nudging-hf/nudging_hf"


def anchors_of(document):
    """The anchors that GitHub gives to headings: lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
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
    [(_, *command)] = commands_of("docs/doors.md", "nudging-hf", "generate")
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


# The site ------------------------------------------------------------------------------------------------------------


def test_the_reference_has_every_public_name():
    pages = "".join(text_of(name) for name in NAMES if name.startswith("docs/api/"))
    named = set(re.findall(r"^::: nudging_hf\.(\w+)", pages, re.MULTILINE))
    assert set(nudging_hf.__all__) <= named


def test_every_page_is_in_the_navigation_of_the_site():
    site = text_of("mkdocs.yml")
    pages = {name.removeprefix("docs/") for name in NAMES if name.startswith("docs/")}
    assert set(re.findall(r"- (?:\w+: )?(\S+\.md)$", site, re.MULTILINE)) == pages | {"index.md"}
    assert f"repo_url: {REPOSITORY}\n" in site and f"Homepage = {REPOSITORY}\n" in text_of("setup.cfg")


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("index.md", "docs/models.md#limits", "models.md#limits"),
        ("index.md", "CHANGELOG.md", f"{REPOSITORY}/blob/main/CHANGELOG.md"),
        ("doors.md", "thresholds.md", "thresholds.md"),
        ("doors.md", "../examples", f"{REPOSITORY}/blob/main/examples"),
        ("doors.md", "../README.md#use", "index.md#use"),
        ("api/remote.md", "../remote.md", "../remote.md"),
    ],
)
def test_links_of_the_site(page, link, there):
    assert HOOKS["link_from"](page, link, REPOSITORY) == there


def test_types_and_names_of_docstrings_have_no_marks_on_the_site():
    html = "(<code>`str`, *optional*</code>): see [<code>~page.render</code>], [1] and <code>a[0]</code>."
    plain = "(<code>str, optional</code>): see <code>page.render</code>, [1] and <code>a[0]</code>."
    assert HOOKS["plain_code"](html) == plain


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory():
    return runpy.run_path(str(ROOT / "examples" / "memory.py"))


def test_the_tables_of_memory_are_what_their_command_writes(memory):
    sizes = {name: memory["sizes_of"](memory["usual_config"](name)) for name in memory["SHAPES"]}
    assert memory["tables"](memory["USUAL_PAIRS"], sizes, 4096) in text_of("docs/memory.md")
    assert {name for pair in memory["USUAL_PAIRS"] for name in pair} == set(sizes)


@pytest.mark.parametrize("name", ["base", "nudging"])
def test_the_computed_sizes_are_those_of_a_model(memory, name):
    sizes = memory["sizes_of"](AutoConfig.from_pretrained(MINI / name))
    with safe_open(MINI / name / "model.safetensors", "pt") as weights:
        assert sizes.parameters == sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(MINI / name, dtype=torch.bfloat16)
    cache = model(torch.ones((1, 7), dtype=torch.long), use_cache=True)
    layers = (getattr(cache, "cache", None) or cache.past_key_values).layers
    kept = sum(each.numel() * each.element_size() for layer in layers for each in (layer.keys, layer.values))
    assert kept == sizes.cache(7)


def test_memory_refuses_what_it_cannot_compute(memory):
    with pytest.raises(ValueError, match="does not cache"):
        memory["sizes_of"](AutoConfig.for_model("qwen3_next", num_hidden_layers=4))


# Troubleshooting -----------------------------------------------------------------------------------------------------


def texts_of_the_code():
    """Each string of the package in one piece, with `…` for what is put into it."""
    for path in (ROOT / "nudging_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(each.value if isinstance(each, ast.Constant) else "…" for each in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    quoted = re.findall(r"^> (.+)$", text_of("docs/troubleshooting.md"), re.MULTILINE)
    texts = list(texts_of_the_code())
    missing = [message for message in quoted if not any(message.strip("…") in text for text in texts)]
    assert len(quoted) > 20 and missing == []
