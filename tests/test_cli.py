"""Tests the command line and the demonstration's figures, with pairs of tiny random models in folders."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tiny
import torch

import nudging_hf
from nudging_hf import cli
from nudging_hf.cli.arguments import automatic_device
from nudging_hf.core.config import NudgingConfig
from nudging_hf.provenance import Piece
from nudging_hf.study import comparison, demo, verdict
from nudging_hf.study.comparison import Contestant, Result, Turn, compare, contestants_of
from nudging_hf.study.journal import Journal
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.reader import Answer, Reader

PROMPT = "What is the name of the thing?"
QUESTIONS = [
    {
        "task": task,
        "prompt": f"Question: {PROMPT} {number}\n",
        "messages": [{"role": "user", "content": f"{PROMPT} {number}"}],
        "pattern": r"(\w)",
        "answer": "a",
    }
    for task in ("names", "sums")
    for number in range(3)
]


def save(folder, model, tokenizer):
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    """A pair's folder with every model that it can hold, in two vocabularies."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer, nudging_tokenizer = tiny.byte_bpe(), tiny.metaspace_bpe()
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    for name, its, seed in (
        ("base", tokenizer, 1),
        ("nudging", nudging_tokenizer, 2),
        ("nudging-shared", tokenizer, 3),
        ("large-aligned", tokenizer, 4),
    ):
        # Tokens that begin a word get larger logits, so that the text has words.
        loudness = [2.0 if piece[0] in "\u0120\u2581" else 1.0 for piece in its.convert_ids_to_tokens(range(len(its)))]
        model = tiny.tiny_model(
            "llama", len(its), seed, its.eos_token_id, its.pad_token_id, loudness=loudness, eos_rate=0.008
        )
        save(folder / "models" / name, model, its)
    return folder


@pytest.fixture
def models(pair_folder):
    """The arguments that name the two models."""
    return ["--base", f"{pair_folder}/models/base", "--nudging-model", f"{pair_folder}/models/nudging"]


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """Makes the environment one that permits colours."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def expected(pair_folder, prompt=PROMPT, base_prompt=None, system=None, **kwargs):
    """The answer of `nudging_hf.generate`, and its whole output."""
    base, nudging = Reader.load(pair_folder / "models/base"), Reader.load(pair_folder / "models/nudging")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    ids = base.tokenizer(base_prompt or f"Question: {prompt}\n", return_tensors="pt").input_ids
    out = nudging_hf.generate(
        base.model,
        input_ids=ids,
        tokenizer=base.tokenizer,
        nudging_model=nudging.model,
        nudging_tokenizer=nudging.tokenizer,
        nudging_input_ids=nudging.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids,
        max_new_tokens=kwargs.pop("max_new_tokens", 24),
        return_dict_in_generate=True,
        **kwargs,
    )
    new = out.sequences[0, ids.shape[1] :]
    return base.tokenizer.decode(new, skip_special_tokens=True), out


def run(capsys, *args, terminal=False):
    """Exit code, standard output and standard error. `terminal` says whether standard output is a terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: terminal)
        code = cli.main([*map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


# generate -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drafts_of_four")
def test_a_pipe_gets_the_plain_answer_and_standard_error_the_figures(pair_folder, models, capsys):
    text, full = expected(pair_folder)
    code, out, err = run(capsys, "generate", *models, "--max-new-tokens", 24, PROMPT)
    assert code == 0
    assert out.rstrip() == text.rstrip()
    figures = err.splitlines()[-1]
    assert f"base {full.base_forward_passes}, nudging model {full.nudging_forward_passes}" in figures
    assert f"tokens: {full.nudged_mask.shape[1]} in" in figures
    assert f"finished: {full.finish_reasons[0]}" in figures


@pytest.mark.parametrize("argument", [["-"], []])
def test_the_prompt_comes_from_standard_input_too(models, capsys, monkeypatch, argument):
    _, of_argument, _ = run(capsys, "generate", *models, "--max-new-tokens", 24, PROMPT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    code, out, err = run(capsys, "generate", *models, "--max-new-tokens", 24, "--quiet", *argument)
    assert (code, out, err) == (0, of_argument, "")


def test_both_prompts_follow_the_arguments(pair_folder, models, capsys):
    text, _ = expected(pair_folder, base_prompt=f"Be brief.\nQ: {PROMPT}\n", system="Be brief.")
    template = ["--system", "Be brief.", "--base-template", "{system}\\nQ: {user}\\n"]
    _, out, _ = run(capsys, "generate", *models, "--max-new-tokens", 24, *template, PROMPT)
    assert out.rstrip() == text.rstrip()


def test_a_nudging_model_without_a_template_reads_the_base_s_prompt(pair_folder, tmp_path, capsys):
    nudging = Reader.load(pair_folder / "models/nudging")
    nudging.tokenizer.chat_template = None
    save(tmp_path / "plain", nudging.model, nudging.tokenizer)
    base = ["--base", pair_folder / "models/base", "--base-template", "Q: {user}\\n"]
    args = [*base, "--nudging-model", tmp_path / "plain", "--max-new-tokens", 24, PROMPT]
    code, out, _ = run(capsys, "generate", *args)
    whole = Reader.load(pair_folder / "models/base")
    ids = whole.tokenizer(f"Q: {PROMPT}\n", return_tensors="pt").input_ids
    sequences = nudging_hf.generate(
        whole.model,
        input_ids=ids,
        tokenizer=whole.tokenizer,
        nudging_model=nudging.model,
        nudging_tokenizer=nudging.tokenizer,
        max_new_tokens=24,
    )
    assert code == 0
    assert out.rstrip() == whole.tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True).rstrip()


def test_marks_and_colour_surround_the_nudged_words_and_change_nothing_else(models, capsys):
    args = ["generate", *models, "--max-new-tokens", 24, "--quiet", PROMPT]
    _, plain, _ = run(capsys, *args)
    _, marked, _ = run(capsys, *args, "--marks")
    _, coloured, _ = run(capsys, *args, "--color", "always")
    assert "⟦" in marked and marked.replace("⟦", "").replace("⟧", "") == plain
    assert marked.replace("⟦", "\033[1;32m").replace("⟧", "\033[0m") == coloured


def test_a_terminal_gets_colour_or_marks(models, capsys, monkeypatch):
    def shown(*options):
        args = ["generate", *models, "--max-new-tokens", 8, "--quiet", *options, PROMPT]
        out = run(capsys, *args, terminal=True)[1]
        return "\033[1;32m" in out, "⟦" in out

    assert shown() == (True, False)
    assert shown("--color", "never") == (False, True)
    assert shown("--color", "never", "--no-marks") == (False, False)
    assert shown("--marks") == (True, True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == (False, True)


def test_a_seed_makes_a_sample_repeatable(models, capsys):
    args = ["generate", *models, "--max-new-tokens", 24, "--quiet", "--sample", "--temperature", 2, PROMPT]
    first, second, other = (run(capsys, *args, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--base", "/no/such/folder"], "--base: there is no folder /no/such/folder."),
        (["--nudging-model", "./nowhere"], "--nudging-model: there is no folder ./nowhere."),
        (["--base-template", "{question}"], "may have the fields {user} and {system}, got {question}"),
        (["--base-template", "{user"], "The base's template is malformed"),
        (["--base-template", "Answer:"], "needs {user} once"),
        (["--threshold", "-1"], "`nudge_threshold` must be >= 0"),
        (["--base", "mini/models/base"], "--base: there is no folder mini/models/base."),
        (["--temperature", "1"], "--temperature needs --sample"),
        (["--top-k", "1"], "--top-k needs --sample"),
        (["--sample", "--top-p", "2"], "--top-p is a probability"),
        (["--device", "nothing"], "--device nothing: "),
        (["--device", "cpu", "--device-map", "cpu"], "--device and --device-map"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(models, capsys, changed, message):
    code, out, err = run(capsys, "generate", *models, "--max-new-tokens", 4, *changed, PROMPT)
    assert (code, out) == (2, "")
    assert err.startswith("nudging-hf: error: ") and message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(models, capsys, prompt):
    code, _, err = run(capsys, "generate", *models, prompt)
    assert code == 2 and "The prompt is empty" in err


def test_a_folder_without_a_model_is_named(models, capsys, tmp_path):
    code, _, err = run(capsys, "generate", *models, "--base", tmp_path, PROMPT)
    assert code == 2 and f"--base: cannot load {tmp_path}: " in err and err.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["write"], ["generate", "--max-new-tokens", "0"], ["demo", "--questions", "-1"]])
def test_arguments_that_cannot_be_parsed_exit_with_2(args, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["demo", "--help"], ["--version"]])
def test_help_and_version_exit_with_0(args, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 0 and capsys.readouterr().out


NO_TORCH = """
import sys
from nudging_hf.cli import main
import nudging_hf
for words in ["--version"], ["--help"], *([each, "--help"] for each in sys.argv[1:]), ["hub", "push", "--help"]:
    try:
        main(words)
    except SystemExit as done:
        assert done.code == 0
assert "generate" in dir(nudging_hf) and nudging_hf.NudgingConfig().nudge_threshold == 0.4
assert not {"torch", "transformers", "huggingface_hub", "tqdm"} & set(sys.modules)
"""


def test_help_imports_neither_torch_nor_transformers():
    commands = "generate chat demo bench compare calibrate analyze serve vllm hub".split()
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_one_home():
    assert set(nudging_hf.__all__) == set(nudging_hf._HOMES)
    for name, home in nudging_hf._HOMES.items():
        assert (getattr(nudging_hf, name) is sys.modules[f"nudging_hf.{home}"]) == (name == "baselines")
    tree = ast.walk(ast.parse(Path(nudging_hf.__file__).read_text(encoding="utf-8")))
    imports = [node for node in tree if isinstance(node, ast.ImportFrom) and node.level]
    assert {alias.name for node in imports for alias in node.names} == set(nudging_hf.__all__)
    assert not hasattr(nudging_hf, "nudge")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "nudging_hf", "--version"], capture_output=True, text=True)
    assert done.stdout == f"nudging-hf {nudging_hf.__version__}\n"


def test_an_accelerator_is_chosen_and_named(models, capsys, monkeypatch):
    assert automatic_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr("nudging_hf.cli.arguments.automatic_device", lambda: "cpu:0")
    _, _, err = run(capsys, "generate", *models, "--max-new-tokens", 4, PROMPT)
    assert "nudging-hf: running on cpu:0; --device chooses another" in err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert automatic_device() == "cuda"


def test_a_threshold_above_1_is_warned_of_where_it_is_a_probability(models, capsys):
    args = ["generate", *models, "--max-new-tokens", 4, "--threshold", 2, PROMPT]
    assert "warning: the threshold 2 is no probability" in run(capsys, *args)[2]
    assert "warning" not in run(capsys, *args, "--gate", "entropy")[2]


def test_top_p_and_top_k_narrow_the_draw(models, capsys):
    args = ["generate", *models, "--max-new-tokens", 24, "--quiet", PROMPT]
    greedy = run(capsys, *args)[1]
    drawn = [run(capsys, *args, "--sample", "--temperature", 2, *narrow)[1]
             for narrow in (["--top-k", 1], ["--top-p", "1e-6"])]  # fmt: skip
    assert drawn == [greedy, greedy]


def test_a_mistyped_folder_is_told_apart_from_a_name_on_the_hub(models, pair_folder, capsys, monkeypatch):
    monkeypatch.chdir(pair_folder)
    is_offline = MagicMock(side_effect=OSError("It cannot be reached."))
    monkeypatch.setattr("nudging_hf.pair.AutoTokenizer", SimpleNamespace(from_pretrained=is_offline))
    said = {}
    for name in ("./models/bse", "models/bse", "allenai/nothing"):
        code, _, said[name] = run(capsys, "generate", *models, "--base", name, PROMPT)
        assert code == 2
    assert said["./models/bse"].endswith("--base: there is no folder ./models/bse, but there is models/base.\n")
    assert "no folder models/bse here, but there is models/base, and the Hub: It cannot be" in said["models/bse"]
    assert "no folder allenai/nothing here, and the Hub: It cannot be" in said["allenai/nothing"]


def test_a_shell_is_offered_what_may_come_next(tmp_path):
    pytest.importorskip("argcomplete")
    for line, expected in (("nudging-hf cha", "chat "), ("nudging-hf generate --top", "--top-p\v--top-k")):
        written = tmp_path / "completions"
        environment = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(written), "_ARGCOMPLETE_IFS": "\v",
                       "COMP_LINE": line, "COMP_POINT": str(len(line))}  # fmt: skip
        subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, check=True)
        assert written.read_text() == expected


def test_an_interrupt_leaves_the_terminal_plain(models, capsys, monkeypatch):
    def interrupted(*args, streamer, **kwargs):
        streamer.put_marked(torch.tensor([70, 71]), True)
        raise KeyboardInterrupt

    monkeypatch.setattr("nudging_hf.pair.generate", interrupted)
    code, out, _ = run(capsys, "generate", *models, PROMPT, terminal=True)
    assert code == 130
    assert out.startswith("\033[1;32m") and out.endswith("\033[0m\n")


def test_a_closed_pipe_is_no_error(models, capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        code = cli.main(["generate", *models, "--max-new-tokens", "4", "--quiet", PROMPT])
        monkeypatch.undo()
    assert (code, capsys.readouterr().err) == (1, "")


# Bytes and encodings -------------------------------------------------------------------------------------------------

NOT_UTF_8 = b"caf\xe9, please\n"


def piped(data, encoding="utf-8"):
    """A standard input of bytes, as a process has one."""
    return io.TextIOWrapper(io.BytesIO(data), encoding=encoding)


@pytest.mark.parametrize("argument", [["-"], []])
def test_standard_input_that_is_not_utf_8_is_one_line_and_exit_code_2(models, capsys, monkeypatch, argument):
    monkeypatch.setattr(sys, "stdin", piped(NOT_UTF_8))
    code, out, err = run(capsys, "generate", *models, *argument)
    assert (code, out) == (2, "")
    said = "Standard input is not valid utf-8: it has the byte 0xe9 after 'caf'; give it as UTF-8."
    assert err == f"nudging-hf: error: {said}\n"
    assert not sys.stdin.closed


def test_standard_input_that_its_encoding_cannot_decode_is_refused_with_a_remedy(models, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", piped("café".encode(), "ascii"))
    code, _, err = run(capsys, "generate", *models)
    assert code == 2 and "is not valid ascii: it has the byte 0xc3 after 'caf'; set PYTHONUTF8=1" in err


def test_standard_input_is_read_in_its_encoding(models, capsys, monkeypatch):
    _, of_argument, _ = run(capsys, "generate", *models, "--max-new-tokens", 8, "--quiet", "two\ncafés")
    monkeypatch.setattr(sys, "stdin", piped("two\r\ncafés\r\n".encode("latin-1"), "latin-1"))
    code, out, _ = run(capsys, "generate", *models, "--max-new-tokens", 8, "--quiet")
    assert (code, out) == (0, of_argument)


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "--base", "x", "--nudging-model", "y", "caf\udce9"],
        ["generate", "--base", "x\udce9", "--nudging-model", "y", "Why?"],
        ["generate", "--base", "x", "--nudging-model", "y", "--system", "\udce9", "Why?"],
        ["generate", "--base", "x", "--nudging-model", "y", "--base-template", "{user}\udce9", "Why?"],
        ["chat", "--base", "x", "--nudging-model", "y", "--system", "\udce9"],
        ["calibrate", "--base", "x", "--nudging-model", "y", "--prompts", "\udce9"],
        ["compare", "--base", "x", "--nudging-model", "y", "--prompts", "\udce9", "--out", "z"],
        ["analyze", "--out", "\udce9"],
        ["demo", "--pair", "\udce9"],
        ["hub", "export", "\udce9", "--base", "x", "--nudging-model", "y"],
        ["eval", "--tasks", "\udce9"],
        ["\udce9"],
    ],
    ids=lambda args: args[0],
)
def test_an_argument_that_is_not_utf_8_is_one_line_and_exit_code_2(capsys, args):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    number = next(i for i, arg in enumerate(args, start=1) if "\udce9" in arg)
    assert err.startswith(f"nudging-hf: error: Argument {number} is not valid utf-8: ") and err.count("\n") == 1
    assert "it has the byte 0xe9 " in err and "; give it as UTF-8." in err


@pytest.mark.parametrize("command", ["calibrate", "compare", "analyze"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"Why?\n" + NOT_UTF_8, "line 2, holds the byte 0xe9, which is not UTF-8: save the file as UTF-8"),
        ("Why?\n".encode("utf-16"), "line 1, holds the byte 0xff, which is not UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', "line 1, is no prompt"),
        (b'{"messages": [{"role": "user", "content": "a"}], "prompt": "\\ud83d"}\n', "line 1, is no prompt"),
        (b'{"messages": [{"role": "user", "content": "a"}], "prompt": 7}\n', "`prompt` must be text, got 7"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "pattern": "(a)", "answer": [7]}\n',
            "`answer` must be text or a number, got [7]",
        ),
        (b'{"messages": "Why?"}\n', "A chat must be a list of messages"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n', "got a part {'type': 'text'}"),
    ],
)
def test_an_invalid_file_of_prompts_is_one_line_and_exit_code_2(models, capsys, tmp_path, command, data, said):
    path = tmp_path / "prompts"
    path.write_bytes(data)
    out = [] if command == "calibrate" else ["--out", tmp_path / "out"]
    code, printed, err = run(capsys, command, *models, "--prompts", path, *out)
    assert (code, printed) == (2, "")
    assert err.startswith(f"nudging-hf: error: {path}, line ") and said in err and err.count("\n") == 1


@pytest.fixture
def standard_output(monkeypatch):
    """Replaces standard output by one of a given encoding, and returns a function that reads it."""

    def put(encoding, errors="strict"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors))
        return lambda: (sys.stdout.flush(), raw.getvalue())[1]

    return put


@pytest.fixture
def says(monkeypatch):
    """Makes the answer a given text."""

    def put(text):
        def answer(*args, streamer, **kwargs):
            streamer._show(text, False)
            raise KeyboardInterrupt

        monkeypatch.setattr("nudging_hf.cli.answering.MarkingStreamer", lambda _, show: SimpleNamespace(_show=show))
        monkeypatch.setattr("nudging_hf.pair.generate", answer)

    return put


def test_characters_that_the_output_lacks_are_escaped_with_a_note(models, capsys, standard_output, says):
    says("caf\u00e9 \U0001f600!")
    written = standard_output("ascii")
    assert cli.main(["generate", *models, "--quiet", PROMPT]) == 130
    assert written() == b"caf\\xe9 \\U0001f600!\n"
    err = capsys.readouterr().err
    said = "nudging-hf: standard output is ascii, which lacks '\\xe9', '\\U0001f600': they are shown as escapes."
    assert err.splitlines().count(said + " Set PYTHONIOENCODING=utf-8 to see the characters.") == 1
    assert sys.stdout.errors == "strict"


@pytest.mark.parametrize(
    ("encoding", "errors", "expected"),
    [
        ("utf-8", "strict", "caf\u00e9!\n".encode()),
        ("latin-1", "strict", b"caf\xe9!\n"),
        ("ascii", "replace", b"caf?!\n"),
    ],
)
def test_no_note_if_the_output_has_all_characters_or_the_user_chose_an_error_handler(
    models, capsys, standard_output, says, encoding, errors, expected
):
    says("caf\u00e9!")
    written = standard_output(encoding, errors)
    assert cli.main(["generate", *models, "--quiet", PROMPT]) == 130
    assert written() == expected and "lacks" not in capsys.readouterr().err


def test_help_is_printed_in_any_encoding(standard_output):
    written = standard_output("ascii")
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", "--help"])
    assert exit.value.code == 0 and b"\\u27e6" in written()


SCRIPT = "import sys; from nudging_hf.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("args", "data", "streams", "said"),
    [
        ([], NOT_UTF_8, "", b"Standard input is not valid utf-8: it has the byte 0xe9 after 'caf'"),
        ([b"caf\xe9"], b"", "", b"Argument 6 is not valid utf-8: it has the byte 0xe9 after 'caf'"),
        ([], b"", "<&-", b"The prompt is empty"),
    ],
)
def test_a_process_refuses_bytes_that_it_cannot_decode(models, args, data, streams, said):
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-c", SCRIPT, "generate", *models, *args]
    done = subprocess.run(command, input=data, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"nudging-hf: error: " + said) and done.stderr.count(b"\n") == 1


# What the demonstration measures ------------------------------------------------------------------------------------


def test_spans_are_where_the_nudging_model_wrote():
    pieces = [Piece("ab", False), Piece("c", True), Piece("\u00e9", True), Piece(" d", False), Piece("e", True)]
    answer = Answer.of(pieces, [], True)
    assert [answer.text[start:end] for start, end in answer.nudged_spans] == ["c\u00e9", "e"]


# demo ---------------------------------------------------------------------------------------------------------------


NUDGED, SHARED = f"{comparison.NUDGED}, γ = 0.4", f"{comparison.NUDGED} (shared), γ = 0.4"


def contestants_in(folder):
    """The contestants whose models a folder has, and its questions."""
    models, questions = demo.load(folder), demo.read_questions(folder)
    return contestants_of(models, [NudgingConfig(0.4)], with_rivals=False)[0], questions


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)


def test_the_demo_shows_examples_and_a_table_and_writes_json(pair_folder, capsys, tmp_path, short):
    report = tmp_path / "report.json"
    args = ["--questions", 2, "--batch-size", 3, "--json", report]
    code, out, err = run(capsys, "demo", "--pair", pair_folder, *args)
    assert code == 0
    assert err.count("Loading") == 0 and out.index("[names] ") < out.index("\nThe base alone:\n")
    assert out.index("The base alone:") < out.index("The small model alone:") < out.index("The base, nudged by")
    assert out.count("[names] ") == out.count("[sums] ") == 1 and out.count("\n-> ") == 6
    assert "⟦words like these⟧" in out
    lines = out.splitlines()
    for name in (comparison.BASE, comparison.NUDGING, NUDGED, SHARED, comparison.ALIGNED):
        assert sum(line.startswith(f"| {name} ") for line in lines) == 1
    assert "/20" in err

    saved = json.loads(report.read_text(encoding="utf-8"))
    assert saved["nudge_threshold"] == 0.4 and saved["questions_per_task"] == 2
    for contestant in saved["contestants"]:
        answers = contestant["answers"]
        assert [answer["task"] for answer in answers] == ["names", "names", "sums", "sums"]
        assert contestant["right"] == sum(answer["correct"] for answer in answers)
        assert contestant["words"] == sum(len(answer["text"].split()) for answer in answers)
    nudged = saved["contestants"][2]
    assert nudged["name"] == NUDGED
    assert all(answer["nudged_spans"] for answer in nudged["answers"])


def test_a_batch_gives_the_answers_of_single_questions(pair_folder):
    contestants, questions = contestants_in(pair_folder)
    for contestant in contestants[:3]:
        together = [answer.text for n in (0, 2) for answer in contestant.write(questions[:3][n : n + 2], 8)]
        alone = [answer.text for question in questions[:3] for answer in contestant.write([question], 8)]
        assert together == alone


def test_passes_are_counted_for_the_model_that_makes_them(pair_folder):
    (base, nudging, nudged, *_), questions = contestants_in(pair_folder)
    seen = []
    settings = {"max_new_tokens": 8, "batch_size": 6, "progress": lambda name, answered: seen.append(answered)}
    results = compare([base, nudging, nudged], questions, Journal(None, {}), **settings)
    assert [(r.large_passes is None, r.small_passes is None) for r in results] == [(0, 1), (1, 0), (0, 0)]
    assert all(0 < passes <= 8 for passes in (results[0].large_passes, results[1].small_passes))
    assert seen == [6, 6, 6]
    assert not base.large.model._forward_pre_hooks


def test_finished_results_are_shown_after_an_interrupt(pair_folder, capsys, monkeypatch, short):
    def interrupted(contestants, *args, **kwargs):
        if contestants[0].nudged:
            raise KeyboardInterrupt
        return compare(contestants, *args, **kwargs)

    monkeypatch.setattr(comparison, "compare", interrupted)
    code, out, _ = run(capsys, "demo", "--pair", pair_folder, "--questions", 1, "--examples", 0)
    assert code == 130
    assert f"\n| {comparison.NUDGING} " in out and f"\n| {NUDGED} " not in out


def test_companions_may_be_missing(pair_folder, tmp_path, capsys, short):
    (tmp_path / "models").mkdir()
    for name in ("heldout.jsonl", "models/base", "models/nudging"):
        (tmp_path / name).symlink_to(pair_folder / name)
    code, out, _ = run(capsys, "demo", "--pair", tmp_path, "--questions", 1, "--examples", 0)
    assert code == 0 and NUDGED in out and SHARED not in out and comparison.ALIGNED not in out


def test_the_table_and_the_sentences_report_the_figures():
    questions = (Prompt(**QUESTIONS[0]),) * 10

    def result(name, right, passes, nudged=False):
        pieces = [[Piece("So", True), Piece(" a" if i < right else " b", False)] for i in range(10)]
        answers = [Answer.of(each, [], True) for each in pieces]
        marks = [question.is_right(answer.text) for question, answer in zip(questions, answers, strict=True)]
        contestant = Contestant(name, None, SimpleNamespace(), (SimpleNamespace(),), nudged)
        return Result(contestant, questions, (Turn(1.0, passes, 7, answers, marks),))

    base, nudged = result(comparison.BASE, 2, 1000), result(NUDGED, 9, 400, nudged=True)
    [said] = verdict.sentences([base, nudged])
    assert f"{NUDGED} is above {comparison.BASE}: 9 of 10 against 2 of 10, 70 points more" in said
    lines = verdict.table([base, nudged]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert "1,000" in cells[2] and "400" in cells[3] and cells[3][3] == "50.0"
    assert verdict.sentences([base]) == []


def test_a_missing_pair_is_an_error_that_names_the_argument(capsys, tmp_path, monkeypatch):
    code, _, err = run(capsys, "demo", "--pair", tmp_path)
    assert code == 2 and "--pair" in err and str(tmp_path) in err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "nudging_hf" / "study" / "demo.py"))
    code, _, err = run(capsys, "demo")
    assert code == 2 and "--pair" in err


def test_the_pair_is_found_in_the_working_folder_or_beside_the_package_or_in_it(tmp_path, monkeypatch):
    (tmp_path / "nudging_hf" / "mini").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "here"):
        (folder / "examples" / "mini").mkdir(parents=True)
        (folder / "examples" / "mini" / "heldout.jsonl").touch()
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "nudging_hf" / "study" / "demo.py"))
    monkeypatch.chdir(tmp_path / "here")
    assert demo.find_folder().resolve() == tmp_path / "here" / "examples" / "mini"
    (tmp_path / "here" / "examples" / "mini" / "heldout.jsonl").unlink()
    assert demo.find_folder() == tmp_path / "examples" / "mini"
    (tmp_path / "examples" / "mini" / "heldout.jsonl").rename(tmp_path / "nudging_hf" / "mini" / "heldout.jsonl")
    assert demo.find_folder() == tmp_path / "nudging_hf" / "mini"
