"""Every block of Python and every command of the documents is run, or at least understood.

Blocks of Python run in the order of their page, after those of the README, offline and on a CPU. What they cannot have
there is replaced by what stands in `SUBSTITUTES`, and by nothing else. A block that does not run says why in a comment
in front of it, which readers of the page do not see.
"""

import ast
import asyncio
import functools
import importlib
import inspect
import json
import re
import runpy
import textwrap
from configparser import ConfigParser

import pytest
import torch
from documents import NAMES, ROOT, blocks_of, commands_of, text_of
from transformers import AutoConfig, AutoTokenizer, pipeline

import nudging_hf
from nudging_hf import cli
from nudging_hf.provenance import Piece

pytest.importorskip("openai")
from fake_engine import FakeEngine

from nudging_hf.integrations import openai

MINI = ROOT / "examples" / "mini" / "models"
BASES = ["allenai/OLMo-2-1124-7B", "meta-llama/Llama-2-70b-hf"]
NUDGING_MODELS = ["allenai/OLMo-2-0425-1B-Instruct", "meta-llama/Llama-2-7b-chat-hf"]
SUBSTITUTES = {
    **{f'"{name}"': repr(str(MINI / "base")) for name in BASES},
    **{f'"{name}"': repr(str(MINI / "nudging")) for name in NUDGING_MODELS},
    '"hub_custom_code"': repr(str(ROOT / "hub_custom_code")),
    'device_map={"": 0}': 'device_map={"": "cpu"}',
}
DOCSTRING_BLOCK = re.compile(r"^ *```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"docs/real_pairs.md": 1, "docs/server.md": 1}  # How many blocks a page has that are not run here.
PAGES = [name for name in NAMES if name != "README.md" and blocks_of(name, "python")]


def examples_of(path):
    """The blocks of Python in the docstrings of a module."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    return [textwrap.dedent(found[1]) for text in texts for found in DOCSTRING_BLOCK.finditer(text)]


PACKAGE = sorted((ROOT / "nudging_hf").rglob("*.py"))
EXAMPLES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): found for path in PACKAGE if (found := examples_of(path))
}


def run(text, names, line=1):
    """Runs lines in a namespace. `await` and `async with` may stand in them, as in a program with an event loop."""
    for there, here in SUBSTITUTES.items():
        text = text.replace(there, here)
    code = compile("\n" * (line - 1) + text, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    waits = eval(code, names)
    if inspect.iscoroutine(waits):
        asyncio.run(waits)


@pytest.fixture(scope="module")
def after_readme():
    """The names that the README's lines leave."""
    torch.set_num_threads(1)  # What conftest.py does for each test comes later.
    names = {}
    [block] = blocks_of("README.md", "python")
    run(block.text, names, block.line)
    yield names
    nudging_hf.unregister()


def bytes_of_4_bits(model):
    weights = [module.weight for module in model.modules() if type(module).__name__ == "Linear4bit"]
    return sum(each.numel() * each.element_size() + 4 * each.quant_state.absmax.numel() for each in weights)


def test_the_lines_of_the_readme_answer_rightly(after_readme):
    written = after_readme["tokenizer"].decode(after_readme["ids"][0], skip_special_tokens=True)
    assert written.startswith("Question: Mido has 12 pens.") and "So the answer is 19." in written


@pytest.fixture
def engine(monkeypatch, after_readme):
    """A `RemoteBase` speaks to an engine in this process, whatever its address."""
    engine = FakeEngine(after_readme["base"], after_readme["tokenizer"])
    engine.read_ahead(after_readme["ids"][0].tolist())
    monkeypatch.setattr(openai, "RemoteBase", functools.partial(openai.RemoteBase, http_client=engine.client()))


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, after_readme, engine, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names, not_run = dict(after_readme), 0
    for block in blocks_of(page, "python"):
        if block.remark:
            assert re.match("(not run|run by tests/[a-z_]+.py)[:,] ", block.remark), block.remark
            not_run += 1
        else:
            run(block.text, names, block.line)
    assert not_run == NOT_RUN.get(page, 0)
    if page == "docs/doors.md":
        assert (tmp_path / "page.html").exists() and any(span["nudged"] for span in names["spans"])
    if page == "docs/remote.md":
        assert "So the answer is 19." in names["answers"][0].text
        assert "So⟧ the answer is 19." in capsys.readouterr().out
    if page == "docs/real_pairs.md":
        memory = runpy.run_path(str(ROOT / "examples" / "memory.py"))  # What it computes is what was loaded.
        sizes = memory["sizes_of"](AutoConfig.from_pretrained(MINI / "base"))
        assert bytes_of_4_bits(names["base"]) == sizes.quantisable * memory["BYTES"]["4"]


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_example_of_a_docstring_runs(module, after_readme, engine, monkeypatch, tmp_path):
    """With the names of its module, and those of the README's lines and of a chat."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("base", "nudging"):
        (tmp_path / "models" / name).symlink_to(MINI / name)
    names = vars(importlib.import_module(module)) | after_readme
    names |= {"messages": [{"role": "user", "content": "Rosa has 4 coins."}], "prompts": [names["question"]] * 2}
    names |= {"pipeline": pipeline, "nudging_tokenizer": AutoTokenizer.from_pretrained(MINI / "nudging")}
    names |= {"RemoteBase": openai.RemoteBase, "Piece": Piece}
    monkeypatch.setattr(names["base"].generation_config, "max_new_tokens", 20)
    for example in EXAMPLES[module]:
        run(example, names)


def test_the_cells_of_the_notebook_run(monkeypatch, tmp_path, capsys):
    """In one namespace, from top to bottom. Lines for the notebook's host, such as `%pip`, are left out."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(text_of("examples/nudging.ipynb"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            lines = [line for line in cell["source"] if not line.startswith("%")]
            run("".join(lines), names)
    shown = capsys.readouterr().out
    assert "So the answer is 19." in shown and "So⟧ the answer is 19." in shown and "γ = 0.4" in shown
    assert (tmp_path / "page.html").exists()


def test_the_notebook_opens_in_colab_from_the_project_s_address():
    setup = ConfigParser()
    setup.read_string(text_of("setup.cfg"))
    home = re.search(r"Homepage = https://github\.com/(\S+)", setup["metadata"]["project_urls"])[1]
    address = f"https://colab.research.google.com/github/{home}/blob/main/examples/nudging.ipynb"
    assert address in text_of("examples/nudging.ipynb") and address in text_of("docs/notebook.md")


# Commands -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", NAMES)
def test_commands_are_understood(page):
    for _, *given in commands_of(page, "nudging-hf"):
        args, more = cli._parser(given).parse_known_args(given)
        assert not more or args.takes_more, given
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of("Makefile"), re.MULTILINE))
    for _, *given in commands_of(page, "make"):
        assert next(word for word in given if "=" not in word) in targets, given
    for _, program, *_ in commands_of(page, "python"):
        assert (ROOT / program).is_file(), program
    extras = ConfigParser()
    extras.read_string(text_of("setup.cfg"))
    for _, _, *packages in commands_of(page, "pip", "install"):
        for named in re.findall(r"\[(.*?)\]", " ".join(packages)):
            assert set(named.split(",")) <= set(extras["options.extras_require"]), named


def test_the_command_of_vllm_is_written_as_its_page_says(capsys):
    [(_, *given)] = commands_of("docs/vllm.md", "nudging-hf")
    assert cli.main([*given, "--no-on-cpu"]) == 0
    shown = re.search(r"^VLLM_USE.*?(?=\.\.\.$)", text_of("docs/vllm.md"), re.MULTILINE)[0]
    assert capsys.readouterr().out.startswith(shown)


def test_the_commands_of_the_hub_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    named = {"B": str(MINI / "base"), "A": str(MINI / "nudging")}
    for _, *given in commands_of("docs/doors.md", "nudging-hf", "hub"):
        dry = ["--dry-run"] if "push" in given else []
        assert cli.main([*(named.get(word, word) for word in given), *dry]) == 0
    assert "custom_generate/generate.py" in capsys.readouterr().out
