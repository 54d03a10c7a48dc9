"""Tests what goes to the Hub: code that does not need the package, models that nudge by themselves, and chats.

The tests are offline: transformers loads repositories from folders and from a copy of the Hub's cache.
"""

import copy
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_layers
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from packaging.requirements import Requirement
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, dynamic_module_utils, pipeline
from transformers.utils.chat_template_utils import render_jinja_template

import nudging_hf
from nudging_hf import NudgingConfig, cli, hub, plain_prompt
from nudging_hf.core import named_model
from nudging_hf.core.generate import OWN_ARGUMENTS
from nudging_hf.core.validation import UNSUPPORTED

FOLDER = Path(__file__).parents[1] / "hub_custom_code"
QUESTIONS = ["What is the name of the thing?", "Take 12 apples and 7 pears."]
PARAMETERS = {"nudge_threshold": 0.5, "num_draft_tokens": 3}
TEMPLATE = "{system}\nInstruction: {user}\n"
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """A separate folder for the code that transformers copies before it runs it."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    usual, cache = dynamic_module_utils.HF_MODULES_CACHE, str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [path for path in sys.path if path != usual])
        forget()
        yield cache
        forget()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folders of a base and of a nudging model with another vocabulary, in float64."""
    made = tiny.pair("llama", 1, "two")
    folder = tmp_path_factory.mktemp("pair")
    for name in ("base", "nudging"):
        model, tokenizer = (
            (made.base, made.tokenizer) if name == "base" else (made.nudging_model, made.nudging_tokenizer)
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(folder=folder, base=folder / "base", nudging=folder / "nudging")


@pytest.fixture(scope="module")
def out(pair, tmp_path_factory):
    """The pair, exported to one folder."""
    folder = tmp_path_factory.mktemp("out") / "pair-nudged"
    return hub.export(pair.base, pair.nudging, folder, base_template=TEMPLATE, **PARAMETERS)


@pytest.fixture(scope="module")
def loaded(out):
    return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def copy_of(folder, target, **fields):
    """A copy of a model's folder with the given fields in its generation config. `None` removes a field."""
    shutil.copytree(folder, target)
    path = target / "generation_config.json"
    kept = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
    return target


def prompts(folder, questions=QUESTIONS):
    """A left-padded batch."""
    return AutoTokenizer.from_pretrained(folder)(questions, return_tensors="pt", padding=True)


def nudged(pair, inputs, **settings):
    """The ids that `nudging_hf.generate` returns."""
    base, nudging = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair.base, pair.nudging))
    return nudging_hf.generate(base, **inputs, nudging_model=nudging, **settings)


# The code ------------------------------------------------------------------------------------------------------------


def test_the_folder_is_a_copy_of_the_package(tmp_path, capsys):
    assert cli.main(["hub", "code", str(tmp_path)]) == 0
    fresh, kept = tmp_path / "custom_generate", FOLDER / "custom_generate"
    assert capsys.readouterr().out.strip() == str(fresh)
    names = {path.name for path in fresh.iterdir()}
    assert names == {path.name for path in kept.iterdir() if path.name != "__pycache__"}, "run `make hub`"
    for name in names:
        assert (fresh / name).read_bytes() == (kept / name).read_bytes(), f"{name}: run `make hub`"
        if name.endswith(".py"):
            assert (fresh / name).read_bytes() == (test_layers.PACKAGE / "core" / name).read_bytes()


def test_the_copied_files_are_those_that_the_loader_looks_for():
    carried = hub.carried_modules()
    seen_by_loader = dynamic_module_utils.get_relative_import_files(test_layers.PACKAGE / "core" / "generate.py")
    assert {path.name for path in carried} == {Path(path).name for path in seen_by_loader} | {"generate.py"}


def test_old_modules_are_removed_and_other_files_kept(tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate/forgotten.py").touch()
    (tmp_path / "README.md").write_text("mine")
    hub.write_code(tmp_path)
    assert not (tmp_path / "custom_generate/forgotten.py").exists()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_requirements_are_the_package_s_own_in_the_form_that_the_loader_reads(monkeypatch):
    own = {}
    for requirement in map(Requirement, importlib.metadata.requires("nudging-hf")):
        if requirement.marker is None:  # The requirement does not belong to an extra.
            own[requirement.name] = {str(clause) for clause in requirement.specifier}
    read = [dynamic_module_utils.split_package_version(line) for line in hub.REQUIREMENTS]
    assert ["".join(parts) for parts in read] == list(hub.REQUIREMENTS)
    for name in ("torch", "transformers"):
        assert {operator + version for package, operator, version in read if package == name} == own[name]
    dynamic_module_utils.check_python_requirements(FOLDER / "custom_generate")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.11.0")
    with pytest.raises(ImportError, match=r"transformers>=5\.12"):
        dynamic_module_utils.check_python_requirements(FOLDER / "custom_generate")


def front_matter(card):
    _, head, body = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_lists_in_the_card_of_the_code_are_those_that_the_command_writes(tmp_path):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(re.sub(r"(<!-- (\w+) -->).*?(?=<!-- end of \2 -->)", r"\1", card, flags=re.DOTALL))
    assert len(readme.read_text()) < len(card) / 2
    hub.write_code(tmp_path)
    assert readme.read_text(encoding="utf-8") == card, "run `make hub`"


def test_the_card_of_the_code_lists_every_argument_and_default():
    head, body = front_matter(FOLDER / "README.md")
    assert head["library_name"] == "transformers" and head["license"] == "apache-2.0"
    assert {"custom_generate", "nudging"} <= set(head["tags"])
    for name, default in vars(NudgingConfig()).items():
        assert f"| `{name}` | `{default!r}` |" in body
    for name in OWN_ARGUMENTS:
        assert re.search(rf"`{name}\b", body)
    for name in UNSUPPORTED.keys() - {"custom_generate"}:
        assert f"`{name}`" in body.partition("## Limits")[2]
    assert "fei2025nudging" in body


WITHOUT_THE_PACKAGE = """
    import importlib.abc, json, sys

    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "nudging_hf":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
    try:
        import nudging_hf
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("the package is there")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

    given = json.loads(sys.argv[1])
    base, nudging = (AutoModelForCausalLM.from_pretrained(given[name]) for name in ("base", "nudging"))
    tokenizer = AutoTokenizer.from_pretrained(given["base"])
    inputs = tokenizer(given["questions"], return_tensors="pt", padding=True)
    single = tokenizer(given["questions"][0], return_tensors="pt")
    keywords = {"trust_remote_code": True, "nudging_model": nudging, **given["settings"]}
    found = {}
    for source in given["sources"]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=0)
        found[source] = [
            base.generate(**inputs, custom_generate=source, **keywords).tolist(),
            base.generate(
                **single,
                custom_generate=source,
                tokenizer=tokenizer,
                stop_strings=given["stop"],
                streamer=streamer,
                **keywords,
            ).tolist(),
            "".join(streamer),
        ]
    for name in given["models"]:
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
        found[name] = model.generate(**inputs, max_new_tokens=given["settings"]["max_new_tokens"]).tolist()
    print(json.dumps(found))
"""


def put_into_cache(cache, repo_id, folder):
    """Stores `folder` as huggingface_hub stores a downloaded repository: blobs, links by commit, and a branch."""
    home = cache / f"models--{repo_id.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(SHA)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = home / "blobs" / f"{number:040x}", home / "snapshots" / SHA / path.relative_to(folder)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_folder_and_repository_write_what_the_package_writes_where_it_is_not_installed(pair, out, tmp_path):
    """Loads the code and the exported model from a folder, and by name from the Hub's cache."""
    settings = {"max_new_tokens": 24, **PARAMETERS}
    inputs, single = prompts(pair.base), prompts(pair.base, QUESTIONS[:1])
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    batch = nudged(pair, inputs, **settings)
    answer = nudged(pair, single, **settings)[0, single.input_ids.shape[1] :]
    stop = tokenizer.decode(answer[8:11])
    expected = nudged(pair, single, tokenizer=tokenizer, stop_strings=stop, **settings)
    assert expected.shape[1] < single.input_ids.shape[1] + len(answer)

    put_into_cache(tmp_path / "hub", "nudgers/code", FOLDER)
    put_into_cache(tmp_path / "hub", "nudgers/pair.v1", out)
    sources, models = [str(FOLDER), "nudgers/code"], [str(out), "nudgers/pair.v1"]
    given = {
        "base": str(pair.base),
        "nudging": str(pair.nudging),
        "questions": QUESTIONS,
        "settings": settings,
        "stop": stop,
        "sources": sources,
        "models": models,
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(WITHOUT_THE_PACKAGE), json.dumps(given)],
        cwd=tmp_path,
        env={
            "HF_HOME": str(tmp_path),
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": os.environ["PATH"],
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for source in sources:
        ids, stopped, streamed = found[source]
        assert ids == batch.tolist()
        assert stopped == expected.tolist()
        assert streamed == tokenizer.decode(expected[0, single.input_ids.shape[1] :])
    for name in models:
        assert found[name] == batch.tolist()


# A model that nudges by itself ---------------------------------------------------------------------------------------


def test_an_exported_model_writes_what_the_package_writes(pair, out, loaded):
    inputs = prompts(out)
    expected = nudged(pair, inputs, max_new_tokens=24, **PARAMETERS)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=24), expected)
    alone = prompts(out, QUESTIONS[:1])
    by_position = loaded.generate(alone.input_ids, max_new_tokens=24)
    assert torch.equal(by_position, nudged(pair, alone, max_new_tokens=24, **PARAMETERS))
    # A keyword overrides the generation config, and `nudging_model=None` uses the base alone.
    other = loaded.generate(**inputs, max_new_tokens=24, nudge_threshold=0)
    assert torch.equal(other, nudged(pair, inputs, max_new_tokens=24, **PARAMETERS | {"nudge_threshold": 0}))
    plain = AutoModelForCausalLM.from_pretrained(pair.base).generate(**inputs, max_new_tokens=24)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=24, nudging_model=None), plain)
    assert not torch.equal(expected[:, : plain.shape[1]], plain[:, : expected.shape[1]])
    assert not torch.equal(expected, other)


def test_the_nudging_model_is_loaded_once_for_a_base_in_its_dtype_and_safely(out, monkeypatch):
    seen = []
    load = AutoModelForCausalLM.from_pretrained

    def recorded(name, **options):
        model = load(name, **options)
        seen.append((Path(name).name, options["use_safetensors"], options.get("trust_remote_code"), model.dtype))
        return model

    model = load(out, trust_remote_code=True, dtype=torch.float32)
    # The package and the code in a folder use the same class of transformers.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    for _ in range(2):
        model.generate(**prompts(out), max_new_tokens=4)
    assert seen == [("nudging_model", True, False, torch.float32)]


def test_the_nudging_model_moves_with_the_base(out, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(out)
    nudging, _ = named_model.named_nudging_model(base, "./nudging_model", {})
    assert nudging.device.type == "cpu"
    monkeypatch.setattr(named_model, "input_device", lambda model: torch.device("meta"))
    again, _ = named_model.named_nudging_model(base, "./nudging_model", {})
    assert again is nudging and nudging.device.type == "meta"


def test_the_generation_config_is_the_base_s_own_with_the_given_fields(pair, out, tmp_path):
    own = GenerationConfig.from_pretrained(pair.base).to_diff_dict()
    exported = GenerationConfig.from_pretrained(out).to_diff_dict()
    assert exported == own | PARAMETERS | {"nudging_model_name_or_path": "./nudging_model"}
    # For a base without the file, transformers derives a config from the model config, and marks it.
    bare = copy_of(pair.base, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    again = GenerationConfig.from_pretrained(hub.export(bare, pair.nudging, tmp_path / "out", nudge_threshold=0.25))
    assert (again.nudge_threshold, again.nudging_model_name_or_path) == (0.25, "./nudging_model")
    assert again.eos_token_id == own["eos_token_id"] and not hasattr(again, "num_draft_tokens")
    # The base's sampling settings are kept.
    sampling = copy_of(pair.base, tmp_path / "sampling", do_sample=True, temperature=0.5)
    again = GenerationConfig.from_pretrained(hub.export(sampling, pair.nudging, tmp_path / "out2"))
    assert again.do_sample and again.temperature == 0.5


def test_weights_are_the_saved_safetensors(pair, out):
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    for exported, source in ((out, pair.base), (out / "nudging_model", pair.nudging)):
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (exported, source))
        assert ours.dtype == theirs.dtype == torch.float64
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        text = "Two  spaces; \U0001f600."
        assert (
            AutoTokenizer.from_pretrained(exported)(text).input_ids
            == AutoTokenizer.from_pretrained(source)(text).input_ids
        )


def test_a_nudging_model_on_the_hub_is_recorded_by_its_name(pair, tmp_path):
    out = hub.export(pair.base, "owner/small-chat", tmp_path / "out")
    assert GenerationConfig.from_pretrained(out).nudging_model_name_or_path == "owner/small-chat"
    assert not (out / "nudging_model").exists()
    head, body = front_matter(out / "README.md")
    assert head["base_model"] == ["owner/small-chat"] and "`owner/small-chat`" in body


def test_the_card_has_the_licence_and_the_names_that_the_models_cards_have(pair, tmp_path):
    for name, head in (("base", "license: apache-2.0\nbase_model: owner/large"), ("nudging", "license: mit")):
        shutil.copytree(getattr(pair, name), tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\n{head}\n---\n# A model\n", encoding="utf-8")
    models = tmp_path / "base", tmp_path / "nudging"
    head, _ = front_matter(hub.export(*models, tmp_path / "both") / "README.md")
    assert (head["license"], head["base_model"]) == ("other", ["owner/large"])
    head, _ = front_matter(hub.export(models[0], "owner/small", tmp_path / "named") / "README.md")
    assert (head["license"], head["base_model"]) == ("apache-2.0", ["owner/large", "owner/small"])
    out = hub.export(*models, tmp_path / "given", license="mit", base_models=["a/b"])
    head, _ = front_matter(out / "README.md")
    assert (head["license"], head["base_model"]) == ("mit", ["a/b"])


def test_a_name_without_an_owner_is_refused_also_by_a_dry_run(out, capsys):
    for dry in ([], ["--dry-run"]):
        assert cli.main(["hub", "push", str(out), "name", *dry]) == 2
        assert "'name' has no owner: give a name such as owner/name." in capsys.readouterr().err


def test_the_card_of_a_model_names_no_path_and_warns_of_missing_trust(pair, out):
    head, body = front_matter(out / "README.md")
    assert head["library_name"] == "transformers" and set(head["tags"]) == {"custom_generate", "nudging"}
    assert "base_model" not in head and str(pair.folder) not in body
    assert "nudge_threshold=0.5" in body and "nudging_hf.register()" in body
    assert "Without `trust_remote_code=True` the base alone answers" in body


def test_an_export_overwrites_only_a_model_folder_and_only_on_request(pair, tmp_path):
    out = tmp_path / "out"
    hub.export(pair.base, pair.nudging, out)
    with pytest.raises(ValueError, match=r"is there already.*overwrite=True"):
        hub.export(pair.base, pair.nudging, out)
    hub.export(pair.base, "owner/name", out, overwrite=True)
    assert not (out / "nudging_model").exists()
    # The export may read its models from the folder that it overwrites.
    hub.export(out, pair.nudging, out, overwrite=True, nudge_threshold=0.1)
    assert GenerationConfig.from_pretrained(out).nudge_threshold == 0.1
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").touch()
    with pytest.raises(ValueError, match="is no model folder"):
        hub.export(pair.base, pair.nudging, tmp_path / "letters", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "letters"}


def test_a_failed_export_keeps_the_old_folder(pair, tmp_path):
    out = hub.export(pair.base, pair.nudging, tmp_path / "out", nudge_threshold=0.1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"The nudging model: cannot load "):
        hub.export(pair.base, tmp_path / "empty", out, overwrite=True)
    assert GenerationConfig.from_pretrained(out).nudge_threshold == 0.1
    assert {path.name for path in tmp_path.iterdir()} == {"out", "empty"}


def with_auto_map(folder, target):
    """A copy of a model folder whose configs also name custom code."""
    copy_of(folder, target)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", None]}),
    ):
        path = target / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    (target / "code.py").write_text("raise SystemExit('ran')\n")
    return target


def test_code_that_models_name_is_neither_run_nor_exported(pair, tmp_path):
    folders = [with_auto_map(folder, tmp_path / folder.name) for folder in (pair.base, pair.nudging)]
    out = hub.export(*folders, tmp_path / "out", **PARAMETERS)
    assert not list(out.rglob("code.py"))
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    inputs = prompts(out)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=8), nudged(pair, inputs, max_new_tokens=8, **PARAMETERS)
    )


def test_pickled_weights_are_refused(pair, tmp_path):
    pickled = copy_of(pair.base, tmp_path / "pickled")
    torch.save(AutoModelForCausalLM.from_pretrained(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"The base: cannot load .* its weights as safetensors"):
        hub.export(pickled, pair.nudging, tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"base": "./nowhere"}, "The base: there is no folder ./nowhere"),
        ({"nudging_model": "/nowhere/at/all"}, "The nudging model: there is no folder"),
        ({"nudging_model": "a/b/c"}, "The nudging model: there is no folder a/b/c"),
        ({"nudging_model": "a--b"}, "Cannot have -- or .. in repo_id"),
        ({"nudge_threshold": -1}, "`nudge_threshold`"),
        ({"base_template": "{question}"}, "may have the fields"),
        ({"base_template": "{user:>9}"}, "a name alone"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(pair, tmp_path, changed, match):
    given = {"base": pair.base, "nudging_model": pair.nudging, "out": tmp_path / "out"} | changed
    with pytest.raises(ValueError, match=match):
        hub.export(**given)
    assert not list(tmp_path.iterdir())


# Generation configs that transformers no longer saves ----------------------------------------------------------------

LLAMA_2 = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fields",
    [
        LLAMA_2,
        {"temperature": 0.9, "top_k": 5, "typical_p": 0.5, "min_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
        {"early_stopping": True, "length_penalty": 2.0},
        {"output_scores": True, "output_logits": True},
        {"use_cache": False, "cache_implementation": "static"},
        {"pad_token_id": -1},
    ],
    ids=lambda fields: ", ".join(fields),
)
@pytest.mark.parametrize("whose", ["base", "nudging"])
def test_fields_without_effect_are_dropped_and_named(pair, tmp_path, caplog, fields, whose):
    given = {"base": pair.base, "nudging_model": pair.nudging}
    key = "base" if whose == "base" else "nudging_model"
    given[key] = copy_of(getattr(pair, whose), tmp_path / whose, **fields)
    out = hub.export(**given, out=tmp_path / "out", **PARAMETERS)
    [said] = [record.getMessage() for record in caplog.records if record.name == "nudging_hf.hub"]
    kept = json.loads((out / ("." if whose == "base" else "nudging_model") / "generation_config.json").read_text())
    switches = {"do_sample", "use_cache"}
    for name, value in fields.items():
        if name not in switches:
            assert name not in kept and f"{name}={value!r}" in said
    assert f"of the {'base' if whose == 'base' else 'nudging model'} {str(given[key])!r}" in said
    if "pad_token_id" not in fields:  # That field determines what follows an answer.
        inputs = prompts(out)
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=8), nudged(pair, inputs, max_new_tokens=8, **PARAMETERS)
        )


def test_fields_with_effect_and_harmless_fields_are_kept(pair, tmp_path, caplog):
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.6}
    base = copy_of(pair.base, tmp_path / "base", **sampling)
    nudging = copy_of(pair.nudging, tmp_path / "nudging", temperature=1.0, top_k=50, max_new_tokens=20)
    out = hub.export(base, nudging, tmp_path / "out")
    kept = json.loads((out / "generation_config.json").read_text())
    assert {name: kept[name] for name in sampling} == sampling
    assert json.loads((out / "nudging_model/generation_config.json").read_text())["max_new_tokens"] == 20
    assert not [record for record in caplog.records if record.name == "nudging_hf.hub"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": "many"}, r"transformers does not read: .*'str' and 'int'.* Mend it there"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_return_sequences": 2, **LLAMA_2}, "num_return_sequences"),
        ({"cache_implementation": "large"}, "cache_implementation"),
        ({"early_stopping": "soon"}, "early_stopping"),
    ],
)
@pytest.mark.parametrize("whose", ["base", "nudging_model"])
def test_an_invalid_generation_config_is_refused(pair, tmp_path, fields, match, whose):
    given = {"base": pair.base, "nudging_model": pair.nudging}
    given[whose] = copy_of(given[whose], tmp_path / "copy", **fields)
    with pytest.raises(ValueError, match=match) as caught:
        hub.export(**given, out=tmp_path / "out")
    assert str(given[whose]) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_generation_config_that_is_not_json_is_refused_and_a_missing_one_is_fine(pair, tmp_path):
    broken = copy_of(pair.base, tmp_path / "broken")
    (broken / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"The generation_config.json of the base .* does not read: "):
        hub.export(broken, pair.nudging, tmp_path / "out")
    (broken / "generation_config.json").unlink()
    hub.export(broken, pair.nudging, tmp_path / "out")


# Faulty folders are reported when they are used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"nudging_model_name_or_path": None}, "There is no nudging model: .*nudging_model_name_or_path"),
        ({"nudging_model_name_or_path": "./gone"}, "'./gone' cannot be loaded: .*correct `nudging_model_name"),
        ({"nudge_threshold": -0.5}, "`nudge_threshold` must be >= 0"),
        ({"nudge_threshold": "high"}, "`nudge_threshold` must be a finite number"),
    ],
)
def test_a_wrong_generation_config_is_an_error_that_names_the_remedy(out, tmp_path, fields, match):
    model = AutoModelForCausalLM.from_pretrained(copy_of(out, tmp_path / "wrong", **fields), trust_remote_code=True)
    with pytest.raises(ValueError, match=match):
        model.generate(**prompts(out), max_new_tokens=4)


def test_without_trust_the_base_answers_alone_unless_the_package_is_registered(pair, out):
    inputs = prompts(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(pair.base).generate(**inputs, max_new_tokens=16)
    expected = nudged(pair, inputs, max_new_tokens=16, **PARAMETERS)
    assert torch.equal(model.generate(**inputs, max_new_tokens=16), plain)
    nudging_hf.register()
    try:
        assert torch.equal(model.generate(**inputs, max_new_tokens=16), expected)
    finally:
        nudging_hf.unregister()
    assert torch.equal(model.generate(**inputs, max_new_tokens=16), plain)


@pytest.mark.parametrize("trust", [None, False])
def test_no_code_of_a_folder_runs_without_trust(pair, out, tmp_path, monkeypatch, trust):
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)  # This disables the question on the terminal.
    folder, marker = copy_of(out, tmp_path / "marked"), tmp_path / "marker"
    with (folder / "custom_generate/generate.py").open("a") as code:
        code.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).generate(**prompts(out), max_new_tokens=2)
    base, nudging = (AutoModelForCausalLM.from_pretrained(path) for path in (pair.base, pair.nudging))
    keywords = {"custom_generate": str(folder), "nudging_model": nudging, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        base.generate(**prompts(out), trust_remote_code=trust, **keywords)
    assert not marker.exists()
    base.generate(**prompts(out), trust_remote_code=True, **keywords)
    assert marker.exists()


@pytest.mark.parametrize("known", [True, False], ids=["a known class", "an unknown class"])
def test_the_nudging_model_s_own_code_is_never_run(pair, out, tmp_path, monkeypatch, known):
    """It does not run even if the base's folder is trusted, or if a user would answer "yes" at the terminal."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder, marker = copy_of(out, tmp_path / "marked"), tmp_path / "marker"
    nudging, scratch = folder / "nudging_model", tmp_path / "scratch"
    with_auto_map(nudging, scratch)
    shutil.rmtree(nudging)
    shutil.move(scratch, nudging)
    if not known:
        path = nudging / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "nobodys"}))
    for code in (nudging / "code.py", nudging / "custom_generate/generate.py"):
        code.parent.mkdir(exist_ok=True)
        code.write_text(f"open({str(marker)!r}, 'w').close()\n")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = prompts(out)
    if known:
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=8), nudged(pair, inputs, max_new_tokens=8, **PARAMETERS)
        )
    else:
        with pytest.raises(ValueError, match="Give the model itself as `nudging_model=`"):
            model.generate(**inputs, max_new_tokens=8)
    assert not marker.exists()


# Chats ---------------------------------------------------------------------------------------------------------------

texts = st.text(max_size=12) | st.sampled_from(
    ["\n", "a\n", "{{ x }}", "{% if %}", "'\"\\", "\U0001f600", "FIRST", "$later"]
)
contents = texts | st.lists(texts | texts.map(lambda text: {"type": "text", "text": text}), max_size=3)


@st.composite
def chats(draw):
    chat = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        chat += [{"role": role, "content": draw(contents)} for role in ("user", "assistant")]
    return [*chat, {"role": "user", "content": draw(contents)}]


@st.composite
def base_templates(draw):
    literals = [draw(texts).replace("{", "{{").replace("}", "}}") for _ in range(3)]
    fields = draw(st.permutations(["{user}", "{system}"])) if draw(st.booleans()) else ["{user}", ""]
    return literals[0] + fields[0] + literals[1] + fields[1] + literals[2]


def rendered(chat, template):
    return render_jinja_template([chat], chat_template=template)[0][0]


@given(chats(), base_templates())
def test_the_chat_template_writes_the_plain_prompt(chat, template):
    assert rendered(chat, hub.plain_chat_template(template)) == plain_prompt(chat, template)


@given(chats(), st.sampled_from([nudging_hf.REASONING_TEMPLATE, nudging_hf.INSTRUCTION_TEMPLATE, "{user}"]))
def test_the_chat_template_uses_the_given_opening(chat, template):
    opening = '<s>"\\\n'
    assert rendered(chat, hub.plain_chat_template(template, opening)) == opening + plain_prompt(chat, template)


roles = st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=5)


@given(roles)
def test_the_chat_template_refuses_what_the_plain_prompt_refuses(roles):
    chat = [{"role": role, "content": role} for role in roles]
    try:
        expected = plain_prompt(chat)
    except ValueError:
        with pytest.raises(TemplateError, match="chat"):
            rendered(chat, hub.plain_chat_template())
    else:
        assert rendered(chat, hub.plain_chat_template()) == expected


USER = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image", "url": "cat.png"}],
        [{"type": "text"}],
        [{"type": "text", "text": None}],
        [{"type": "text", "text": 7}],
        [{"text": "Why?"}],
        [None],
        [7],
        [["Why?"]],
        {"type": "text", "text": "Why?"},
        {},
        7,
        None,
        True,
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_the_chat_template_refuses_content_that_is_not_text(role, content):
    chat = [USER, {**USER, "role": "assistant"}, USER] if role == "assistant" else [USER]
    place = {"system": 0, "user": 0, "assistant": 1}[role]
    chat = [*chat[:place], {"role": role, "content": content}, *chat[place + (role != "system") :]]
    with pytest.raises(ValueError, match="must be text"):
        plain_prompt(chat)
    with pytest.raises(TemplateError, match="must be text"):
        rendered(chat, hub.plain_chat_template())


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "user"}],
        [{"content": "Why?"}],
        [{"role": 7, "content": "Why?"}],
        [{"role": None, "content": "Why?"}],
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "sum"}]}, USER],
        [USER, {"role": "assistant", "content": "", "function_call": {"name": "sum"}}, USER],
        ["Why?"],
        [None],
        USER,
        {0: USER},
        "Why?",
        None,
        7,
    ],
)
def test_the_chat_template_refuses_invalid_chats(chat):
    with pytest.raises(ValueError, match=r"[Mm]essage"):
        plain_prompt(chat)
    with pytest.raises(
        (TemplateError, TypeError), match=r"message|chat|text|iterable"
    ):  # transformers may refuse it first.
        rendered(chat, hub.plain_chat_template())


def test_the_chat_template_takes_parts_of_every_form():
    parts = [{"role": "user", "content": ("Wh", {"type": "text", "text": "y"}, "?")}]
    assert rendered(parts, hub.plain_chat_template()) == plain_prompt(parts) == plain_prompt([USER])


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": QUESTIONS[0]},
    {"role": "assistant", "content": "The other one."},
    {"role": "user", "content": QUESTIONS[1]},
]


def first_space():
    """A tokenizer like Llama 2's in transformers 5: it adds a space before a text, but not after a written BOS."""
    tokenizer = copy.deepcopy(tiny.metaspace_bpe())
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def add_to_texts(tokenizer, single):
    """Makes the tokenizer add special tokens to each text."""
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in single.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("made", [*tiny.TOKENIZERS.values(), first_space], ids=[*tiny.TOKENIZERS, "first_space"])
def test_a_saved_tokenizer_encodes_chats_as_plain_prompts(tmp_path, made, bos):
    """A base's own chat template is replaced. If the tokenizer adds a BOS to texts, it also adds one to chats."""
    tokenizer = copy.deepcopy(made())
    if bos:
        add_to_texts(tokenizer, f"{tokenizer.bos_token} $A")
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.chat_template
    tokenizer.chat_template = hub.plain_chat_template(TEMPLATE, hub._opening(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    ids = saved.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(plain_prompt(CHAT, TEMPLATE)).input_ids


def test_a_tokenizer_that_ends_every_text_is_refused():
    tokenizer = copy.deepcopy(tiny.metaspace_bpe())
    add_to_texts(tokenizer, "$A </s>")
    with pytest.raises(ValueError, match="no chat template can: let it add a BOS token or nothing"):
        hub._opening(tokenizer)


def test_a_pipeline_gives_the_base_its_plain_prompt(pair, out):
    chat = pipeline("text-generation", model=str(out), trust_remote_code=True)
    answer = chat(CHAT, do_sample=False, max_new_tokens=12, return_full_text=False)[0]["generated_text"]
    inputs = prompts(pair.base, [plain_prompt(CHAT, TEMPLATE)])
    expected = nudged(pair, inputs, max_new_tokens=12, **PARAMETERS)[0, inputs.input_ids.shape[1] :]
    assert answer == AutoTokenizer.from_pretrained(pair.base).decode(expected, skip_special_tokens=True)


# The command line and the Hub ----------------------------------------------------------------------------------------


class StandIn:
    """Replaces `HfApi`: records the calls, and keeps a copy of the uploaded files."""

    def __init__(self, target):
        self.calls, self.target = [], target

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        self.calls.append(("upload_folder", repo_id, options))
        shutil.copytree(folder_path, self.target, ignore=shutil.ignore_patterns(*ignore_patterns))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{SHA}")


@pytest.fixture
def api(monkeypatch, tmp_path):
    made = StandIn(tmp_path / "uploaded")
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    return made


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_export_and_push_from_the_command_line(pair, out, tmp_path, capsys, api):
    made = tmp_path / "made"
    exported = ["hub", "export", "--base", str(pair.base), "--nudging-model", str(pair.nudging), str(made)]
    settings = ["--threshold", "0.5", "--num-draft-tokens", "3", "--base-template", TEMPLATE.replace("\n", "\\n")]
    assert cli.main([*exported, *settings]) == 0
    assert files(made) == files(out)
    for name in files(made):
        same = (out / name).read_bytes().replace(b"# pair-nudged", b"# made")
        assert (made / name).read_bytes() == same, name
    assert cli.main([*exported, *settings]) == 2
    captured = capsys.readouterr()
    assert "is there already" in captured.err and "custom_generate/generate.py" in captured.out
    assert cli.main([*exported, "--overwrite", "--no-takeover-on-agreement", "--num-nudging-tokens", "8"]) == 0
    given = GenerationConfig.from_pretrained(made)
    assert given.takeover_on_agreement is False and given.num_nudging_tokens == 8
    assert not hasattr(given, "nudge_threshold") and not hasattr(given, "num_draft_tokens")

    expected = files(made)
    (made / "custom_generate/__pycache__").mkdir()
    (made / "custom_generate/__pycache__/generate.pyc").touch()
    capsys.readouterr()
    assert cli.main(["hub", "push", str(made), "owner/name", "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in listed[:-1]] == expected and not api.calls
    assert f"{len(expected)} files" in listed[-1]

    assert cli.main(["hub", "push", str(made), "owner/name", "--private", "--revision", "try"]) == 0
    assert capsys.readouterr().out == f"https://huggingface.co/owner/name/commit/{SHA}\n"
    assert [(name, options.get("private"), options.get("revision")) for name, _, options in api.calls] == [
        ("create_repo", True, None),
        ("create_branch", None, None),
        ("upload_folder", None, "try"),
    ]
    assert files(api.target) == expected


def test_a_pushed_folder_works(pair, api):
    assert hub.push(FOLDER, "owner/nudging").endswith(SHA)
    assert [name for name, _, _ in api.calls] == ["create_repo", "upload_folder"]
    base, nudging = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair.base, pair.nudging))
    inputs = prompts(pair.base)
    keywords = {"nudging_model": nudging, "max_new_tokens": 8}
    ids = base.generate(**inputs, **keywords, custom_generate=str(api.target), trust_remote_code=True)
    assert torch.equal(ids, nudged(pair, inputs, max_new_tokens=8))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("folder", "repo_id", "message"),
    [("{empty}", "owner/name", "There is no custom_generate/generate.py"), (str(FOLDER), "a/b/c", "Repo id must be")],
)
def test_an_invalid_push_does_not_contact_the_hub(tmp_path, capsys, api, dry, folder, repo_id, message):
    assert cli.main(["hub", "push", folder.format(empty=tmp_path), repo_id, *dry]) == 2
    assert message in capsys.readouterr().err and not api.calls


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (7.9e6, "7.9 MB"), (140e9, "140.0 GB")]
)
def test_sizes_are_shown_in_units_of_thousands(size, said):
    assert cli.hub._size(size) == said
