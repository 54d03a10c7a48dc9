"""The command line, and what the demonstration measures. Pairs of tiny random models, saved as a user's would be."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

import nudging_hf
from nudging_hf import cli, demo
from nudging_hf.provenance import Piece

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
    """A pair's folder: every model that it can hold, with two vocabularies."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer, nudging_tokenizer = tiny.byte_bpe(), tiny.metaspace_bpe()
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    for name, its, seed in (
        ("base", tokenizer, 1),
        ("nudging", nudging_tokenizer, 2),
        ("nudging-shared", tokenizer, 3),
        ("large-aligned", tokenizer, 4),
    ):
        # Louder tokens that begin a word, so that the text has words.
        loudness = [2.0 if piece[0] in "\u0120\u2581" else 1.0 for piece in its.convert_ids_to_tokens(range(len(its)))]
        model = tiny.tiny_model(
            "llama", len(its), seed, its.eos_token_id, its.pad_token_id, loudness=loudness, eos_rate=0.008
        )
        save(folder / "models" / name, model, its)
    return folder


@pytest.fixture
def models(pair_folder):
    """The arguments that name two models."""
    return ["--base", f"{pair_folder}/models/base", "--nudging-model", f"{pair_folder}/models/nudging"]


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """An environment that has nothing against colours."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def expected(pair_folder, prompt=PROMPT, base_prompt=None, system=None, **kwargs):
    """The answer that the package itself gives, and its output."""
    base, nudging = demo.LM.load(pair_folder / "models/base"), demo.LM.load(pair_folder / "models/nudging")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    ids = base.tokenizer(base_prompt or prompt, return_tensors="pt").input_ids
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
    """Exit code, standard output, standard error; `terminal` says whether standard output is one."""
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


def test_both_prompts_are_as_they_were_asked_for(pair_folder, models, capsys):
    text, _ = expected(pair_folder, base_prompt=f"Be brief.\nQ: {PROMPT}\n", system="Be brief.")
    template = ["--system", "Be brief.", "--base-template", "{system}\\nQ: {user}\\n"]
    _, out, _ = run(capsys, "generate", *models, "--max-new-tokens", 24, *template, PROMPT)
    assert out.rstrip() == text.rstrip()


def test_a_nudging_model_without_a_template_reads_the_base_s_prompt(pair_folder, tmp_path, capsys):
    nudging = demo.LM.load(pair_folder / "models/nudging")
    nudging.tokenizer.chat_template = None
    save(tmp_path / "plain", nudging.model, nudging.tokenizer)
    base = ["--base", pair_folder / "models/base", "--base-template", "Q: {user}\\n"]
    args = [*base, "--nudging-model", tmp_path / "plain", "--max-new-tokens", 24, PROMPT]
    code, out, _ = run(capsys, "generate", *args)
    whole = demo.LM.load(pair_folder / "models/base")
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


def test_marks_and_colour_stand_around_the_nudged_words_and_change_nothing_else(models, capsys):
    args = ["generate", *models, "--max-new-tokens", 24, "--quiet", PROMPT]
    _, plain, _ = run(capsys, *args)
    _, marked, _ = run(capsys, *args, "--marks")
    _, coloured, _ = run(capsys, *args, "--color", "always")
    assert "⟦" in marked and marked.replace("⟦", "").replace("⟧", "") == plain
    assert marked.replace("⟦", "\033[1;32m").replace("⟧", "\033[0m") == coloured


def test_a_terminal_gets_colour_or_else_marks(models, capsys, monkeypatch):
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
        (["--base-template", "{question}"], "knows the fields {user} and {system}, got {question}"),
        (["--base-template", "{user"], "The base's template: "),
        (["--base-template", "Answer:"], "needs {user} once"),
        (["--threshold", "-1"], "`nudge_threshold` must be >= 0"),
        (["--temperature", "1"], "--temperature needs --sample"),
        (["--device", "nothing"], "--device nothing: "),
        (["--device", "cpu", "--device-map", "cpu"], "--device and --device-map"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(models, capsys, changed, message):
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


def test_an_interrupt_leaves_the_terminal_plain(models, capsys, monkeypatch):
    def interrupted(*args, streamer, **kwargs):
        streamer.put_marked(torch.tensor([70, 71]), True)
        raise KeyboardInterrupt

    monkeypatch.setattr("nudging_hf.cli.answering.generate", interrupted)
    code, out, _ = run(capsys, "generate", *models, PROMPT, terminal=True)
    assert code == 130
    assert out.startswith("\033[1;32m") and out.endswith("\033[0m\n")


def test_a_reader_that_has_had_enough_is_no_error(models, capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        code = cli.main(["generate", *models, "--max-new-tokens", "4", "--quiet", PROMPT])
        monkeypatch.undo()
    assert (code, capsys.readouterr().err) == (1, "")


# What the demonstration measures ------------------------------------------------------------------------------------


def test_the_last_match_is_the_answer_given():
    question = demo.Question([{"role": "user", "content": "q"}], "p", r"(\d+)", "42", "sums")
    assert question.given("First 7, then 42.") == "42"
    assert question.given("42, no: 7.") == "7"
    assert question.given("Who knows?") is None
    assert demo.Answer(question, [Piece("4", True), Piece("2", False)]).correct
    assert not demo.Answer(question, []).correct


def test_spans_are_where_the_nudging_model_wrote():
    question = demo.Question(**QUESTIONS[0])
    answer = demo.Answer(
        question, [Piece("ab", False), Piece("c", True), Piece("\u00e9", True), Piece(" d", False), Piece("e", True)]
    )
    assert [answer.text[start:end] for start, end in answer.nudged_spans] == ["c\u00e9", "e"]


# demo ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)


def test_the_demo_shows_examples_and_a_table_and_writes_json(pair_folder, capsys, tmp_path, short):
    report = tmp_path / "report.json"
    args = ["--questions", 2, "--batch-size", 3, "--json", report]
    code, out, err = run(capsys, "demo", "--pair", pair_folder, *args)
    assert code == 0
    assert out.count("[names] ") == out.count("[sums] ") == 1 and out.count("\n-> ") == 2
    assert "⟦words like these⟧" in out
    lines = out.splitlines()
    for name in (demo.BASE, demo.NUDGING, demo.NUDGED, demo.SHARED, demo.ALIGNED):
        assert sum(line.startswith(f"{name}  ") for line in lines) == 1
    assert "/20" in err

    saved = json.loads(report.read_text(encoding="utf-8"))
    assert saved["nudge_threshold"] == 0.4 and saved["questions_per_task"] == 2
    for contestant in saved["contestants"]:
        answers = contestant["answers"]
        assert [answer["task"] for answer in answers] == ["names", "names", "sums", "sums"]
        assert contestant["right"] == sum(answer["correct"] for answer in answers)
        assert contestant["words"] == sum(len(answer["text"].split()) for answer in answers)
    nudged = saved["contestants"][2]
    assert nudged["name"] == demo.NUDGED
    assert all(answer["nudged_spans"] for answer in nudged["answers"])


def test_a_batch_gives_the_answers_of_single_questions(pair_folder, short):
    pair = demo.Pair.load(pair_folder)
    for contestant in demo.contestants(pair)[:3]:
        together = demo.evaluate(contestant, pair.questions[:3], 0.4, batch_size=2)
        alone = demo.evaluate(contestant, pair.questions[:3], 0.4, batch_size=1)
        assert [answer.text for answer in together.answers] == [answer.text for answer in alone.answers]


def test_passes_are_counted_where_they_are_made(pair_folder, short):
    pair = demo.Pair.load(pair_folder)
    base, nudging, nudged, *_ = demo.contestants(pair)
    seen = []
    results = [demo.evaluate(c, pair.questions, 0.4, 6, seen.append) for c in (base, nudging, nudged)]
    assert [(r.large_passes is None, r.small_passes is None) for r in results] == [(0, 1), (1, 0), (0, 0)]
    assert all(0 < passes <= 8 for passes in (results[0].large_passes, results[1].small_passes))
    assert seen == [6, 6, 6]
    assert not pair.base.model._forward_pre_hooks


def test_what_was_finished_is_shown_after_an_interrupt(pair_folder, capsys, monkeypatch, short):
    def evaluate(contestant, *args):
        if contestant.is_nudged:
            raise KeyboardInterrupt
        return whole(contestant, *args)

    whole = demo.evaluate
    monkeypatch.setattr(demo, "evaluate", evaluate)
    code, out, _ = run(capsys, "demo", "--pair", pair_folder, "--questions", 1, "--examples", 0)
    assert code == 130
    assert f"\n{demo.NUDGING}  " in out and f"\n{demo.NUDGED}  " not in out


def test_companions_may_be_missing(pair_folder, tmp_path, capsys, short):
    (tmp_path / "models").mkdir()
    for name in ("heldout.jsonl", "models/base", "models/nudging"):
        (tmp_path / name).symlink_to(pair_folder / name)
    code, out, _ = run(capsys, "demo", "--pair", tmp_path, "--questions", 1, "--examples", 0)
    assert code == 0 and demo.NUDGED in out and demo.SHARED not in out and demo.ALIGNED not in out


def test_the_sentences_are_made_of_the_figures():
    question = demo.Question(**QUESTIONS[0])

    def result(name, right, passes):
        answers = [
            demo.Answer(question, [Piece("So", True), Piece(" a" if i < right else " b", False)]) for i in range(10)
        ]
        contestant = demo.Contestant(name, large=SimpleNamespace(), small=SimpleNamespace())
        return demo.Result(contestant, answers, passes, 7, 1.0)

    said = " ".join(demo.summary([result(demo.BASE, 2, 1000), result(demo.NUDGED, 9, 400)]))
    assert "Right answers to 10 questions: 9 nudged, 2 by the base alone." in said
    assert "+7 against the base alone." in said
    assert "50% of the words" in said and "400 forward passes for them, and 1,000 for its own" in said
    assert demo.summary([result(demo.BASE, 2, 1000)]) == []


def test_a_missing_pair_is_an_error_that_names_the_argument(capsys, tmp_path, monkeypatch):
    code, _, err = run(capsys, "demo", "--pair", tmp_path)
    assert code == 2 and "--pair" in err and str(tmp_path) in err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "nudging_hf" / "demo.py"))
    code, _, err = run(capsys, "demo")
    assert code == 2 and "--pair" in err


def test_the_pair_is_found_here_or_beside_the_package(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "here"):
        (folder / "examples" / "mini").mkdir(parents=True)
        (folder / "examples" / "mini" / "heldout.jsonl").touch()
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "nudging_hf" / "demo.py"))
    monkeypatch.chdir(tmp_path / "here")
    assert demo.find_pair().resolve() == tmp_path / "here" / "examples" / "mini"
    (tmp_path / "here" / "examples" / "mini" / "heldout.jsonl").unlink()
    assert demo.find_pair() == tmp_path / "examples" / "mini"


@pytest.mark.parametrize(
    "row", ["{", "[]", '{"task": "sums"}', json.dumps({**QUESTIONS[0], "pattern": "("}),
            json.dumps({**QUESTIONS[0], "pattern": "a"}), json.dumps({**QUESTIONS[0], "messages": []})]
)  # fmt: skip
def test_a_row_that_is_no_question_is_named(tmp_path, row):
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + row + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        demo.read_questions(path)
