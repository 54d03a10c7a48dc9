"""Imports point downward only, and the lower layers import torch, transformers and their siblings alone."""

import ast
import sys
from pathlib import Path

import pytest

import nudging_hf

PACKAGE = Path(nudging_hf.__file__).parent
LAYERS = [
    {"config", "rounds"},
    {"gate", "bridge", "choosing", "host"},
    {"cached_lm", "prompts"},
    {"decoding"},
    {"output"},
    {"generate"},
    {"registration", "streaming"},
    {"demo"},
    {"__init__"},
    {"cli"},
]
FLOOR = {module: floor for floor, modules in enumerate(LAYERS) for module in modules}
CARRIED = [module for modules in LAYERS[:6] for module in sorted(modules)]


def imports_of(module: str) -> set[str]:
    """The names of all modules that a module imports, siblings with a leading dot."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{module} reaches out of the package"
            if node.module is None:  # from . import name: a module, or what the package itself holds
                siblings = {path.stem for path in PACKAGE.glob("*.py")}
                names |= {"." + (alias.name if alias.name in siblings else "__init__") for alias in node.names}
            else:
                names.add("." * node.level + node.module)
    return names


def test_every_module_has_its_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_imports_point_downward(module):
    siblings = {name[1:] for name in imports_of(module) if name.startswith(".")}
    assert all(FLOOR[sibling] < FLOOR[module] for sibling in siblings)


@pytest.mark.parametrize("module", CARRIED)
def test_what_a_hub_folder_carries_needs_torch_and_transformers_alone(module):
    roots = {name.split(".")[0] for name in imports_of(module) if not name.startswith(".")}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "transformers"}


def test_the_algorithm_knows_no_torch():
    assert all(name.split(".")[0] in sys.stdlib_module_names for name in imports_of("rounds"))
