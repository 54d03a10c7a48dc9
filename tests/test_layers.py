"""Imports point downward only, and the lower layers import torch, transformers and their siblings alone."""

import ast
import sys
from pathlib import Path

import pytest

import nudging_hf

PACKAGE = Path(nudging_hf.__file__).parent
CORE = [
    {"config", "control_tokens", "rounds", "transformers_private", "words"},
    {"arguments", "gate", "vocabulary", "sampling", "constraints", "draft_policy", "prompt_lookup"},
    {"answer", "cache_layers", "drafting", "prompt_guard"},
    {"kv_cache", "reading_mode"},
    {"state_cache", "validation"},
    {"copied_cache"},
    {"cached_lm", "prompts", "named_model"},
    {"limits", "token_rules"},
    {"row"},
    {"advance", "output", "predicting", "preparation"},
    {"writing"},
    {"decoding"},
    {"generate"},
]
LAYERS = [
    *({f"core.{module}" for module in floor} for floor in CORE),
    {
        "core",
        "study",
        "count_penalties",
        "provenance",
        "chats",
        "html_page",
        "hub_card",
        "hub_readme",
        "integrations",
    },
    {
        "encoded_chats",
        "integrations.described_base",
        "integrations.engine_decoder",
        "integrations.vllm",
        "integrations.vllm.checks",
        "integrations.vllm.logprobs",
        "integrations.vllm.params",
        "integrations.vllm.reports",
        "integrations.vllm.stop_when_unsure",
        "integrations.openai.completions",
    },
    {
        "integrations.openai.engine_probe",
        "integrations.openai.row_requests",
        "integrations.openai.shared_writer",
        "terminal",
    },
    {"integrations.openai.session"},
    {"integrations.openai.remote_base"},
    {"integrations.openai"},
    {"server", "server.engine", "server.protocol"},
    {"server.metrics", "server.prompts", "server.text"},
    {"integrations.vllm.nudger", "integrations.vllm.replies"},
    {"integrations.vllm.middleware"},
    {"integrations.vllm.runner_v1", "integrations.vllm.runner_v2"},
    {"integrations.vllm.worker"},
    {"study.intervals", "study.journal", "study.judge", "study.marking", "study.tables"},
    {"pair", "study.baselines", "study.meters", "study.report", "continuations", "page", "streaming"},
    {"study.prompts"},
    {"study.records"},
    {"study.prompt_files"},
    {"study.fitness", "study.reader", "hub", "pipelines"},
    {"tasks", "tasks.generated"},
    {"tasks.scoring"},
    {"integrations.inspect_ai", "integrations.lm_eval", "tasks.safety"},
    {"study.comparison", "study.examples", "registration"},
    {"study.verdict"},
    {"study.analysis", "study.bench", "study.calibration", "study.check", "study.safety"},
    {"study.demo", "integrations.vllm.launch"},
    {"tasks.mini"},
    {"server.row_engine", "server.replies", "server.serving"},
    {"server.in_process", "server.remote"},
    {"__init__"},
    {"server.app"},
    {"cli.streams", "cli.wrapping"},
    {"cli.arguments", "cli.files"},
    {"cli.answering"},
    {"cli.conversation"},
    {
        "cli.analyze",
        "cli.bench",
        "cli.calibrate",
        "cli.compare",
        "cli.demo",
        "cli.eval",
        "cli.generate",
        "cli.hub",
        "cli.safety",
        "cli.chat",
        "cli.check",
        "cli.serve",
        "cli.vllm",
    },
    {"cli"},
    {"__main__"},
]
FLOOR = {module: floor for floor, modules in enumerate(LAYERS) for module in modules}
CARRIED = sorted(module for module in FLOOR if module.startswith("core."))


def name_of(path: Path) -> str:
    """A module's name within the package: "cli.demo" for cli/demo.py, "cli" for cli/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


PATHS = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """The names of the package's own modules that a module imports, and those of all other modules."""
    own, others = set(), set()
    home = PATHS[module].relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(PATHS[module].read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(home) + 1, f"{module} reaches out of the package"
            start = [*home[: len(home) - node.level + 1], *(node.module or "").split(".")]
            start = ".".join(part for part in start if part)
            # from . import name: a module, or what the package itself holds
            candidates = [f"{start}.{alias.name}".strip(".") for alias in node.names]
            own |= {name if name in PATHS else start or "__init__" for name in candidates}
    return own, others


def test_every_module_has_its_floor():
    assert set(PATHS) == set(FLOOR)


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_imports_point_downward(module):
    own, _ = imports_of(module)
    assert all(FLOOR[name] < FLOOR[module] for name in own)


@pytest.mark.parametrize("module", CARRIED)
def test_what_a_hub_folder_carries_needs_torch_and_transformers_alone(module):
    """`regex` is a dependency of transformers itself, in every version that is supported."""
    _, others = imports_of(module)
    roots = {name.split(".")[0] for name in others}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "transformers", "typing_extensions", "regex"}


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_only_the_command_line_knows_the_server(module):
    own, _ = imports_of(module)
    if module != "cli.serve" and module.split(".")[0] != "server":
        assert not any(name.split(".")[0] == "server" for name in own)


def test_the_routes_of_the_server_know_no_model():
    _, others = imports_of("server.app")
    assert not {name.split(".")[0] for name in others} & {"torch", "transformers"}
    own, _ = imports_of("server.app")
    assert not own & {"server.row_engine", "server.in_process", "server.remote", "pair"}


def test_the_algorithm_knows_no_torch():
    own, others = imports_of("core.rounds")
    assert not own and all(name.split(".")[0] in sys.stdlib_module_names for name in others)
