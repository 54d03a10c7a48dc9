"""Tests `compare`: its contestants, its figures, and runs that are killed and continued."""

import copy
import json
from itertools import pairwise

import pytest
import tiny
import torch

import nudging_hf
from nudging_hf import NudgingConfig, cli
from nudging_hf.chats import messages_of
from nudging_hf.provenance import Piece, count_nudged_words, pieces_of
from nudging_hf.study import baselines, comparison, judge
from nudging_hf.study.comparison import (
    Contestant,
    Models,
    Result,
    compare,
    contestants_of,
    counted_passes,
    take_turn,
)
from nudging_hf.study.intervals import wilson
from nudging_hf.study.journal import Journal
from nudging_hf.study.prompt_files import read_labelled_prompts
from nudging_hf.study.prompts import Prompt, first_of_each_task, tasks_of
from nudging_hf.study.reader import Answer, Reader
from nudging_hf.study.verdict import table

LENGTH = 8
ROWS = [
    {
        "messages": messages_of(f"{text} {i}?"),
        "prompt": f"{text} {i}?\n",
        "pattern": r"([a-z])",
        "answer": "aehst"[i],
        "task": text,
    }
    for text in ("What is number", "Where is tree")
    for i in range(5)
]
QUESTIONS = [Prompt(**row) for row in ROWS]


def model_of(tokenizer, seed):
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    loudness = [2.0 if piece[0] in "\u0120\u2581" else 1.0 for piece in pieces]  # This makes the text have words.
    ids = len(tokenizer), seed, tokenizer.eos_token_id, tokenizer.pad_token_id
    return tiny.tiny_model("llama", *ids, loudness=loudness, eos_rate=0.05)


def reader_of(tokenizer, seed, chat=True):
    return Reader(model_of(tokenizer, seed), tokenizer, chat)


@pytest.fixture(scope="module")
def models():
    """A pair of two vocabularies, and the models of all other contestants."""
    tokenizer = tiny.byte_bpe()
    return Models(
        base=reader_of(tokenizer, 1, chat=False),
        nudging=reader_of(tiny.metaspace_bpe(), 2),
        shared=reader_of(tokenizer, 3),
        unaligned=reader_of(tokenizer, 4, chat=False),
        large_aligned=reader_of(tokenizer, 5),
    )


def by_name(models, *thresholds):
    found, _ = contestants_of(models, [NudgingConfig(threshold) for threshold in thresholds or (0.4,)])
    return {contestant.name: contestant for contestant in found}


FEW = QUESTIONS[3:6]  # Few questions, because in-context prompts are long.


def texts(contestant):
    return [answer.text for answer in contestant.write(FEW, LENGTH)]


# Contestants --------------------------------------------------------------------------------------------------------


def test_every_contestant_with_its_models_takes_part(models):
    found, left_out = contestants_of(models, [NudgingConfig(0.2), NudgingConfig(0.6)])
    assert [contestant.name for contestant in found] == [
        "base alone",
        "nudging model alone",
        "nudged, γ = 0.2",
        "nudged, γ = 0.6",
        "nudged (shared), γ = 0.2",
        "nudged (shared), γ = 0.6",
        "ensemble (shared)",
        "proxy tuning (shared)",
        "in-context",
        "large aligned",
    ]
    assert not left_out
    assert [contestant.name for contestant in found if contestant.nudged] == [each.name for each in found[2:6]]


def test_contestants_without_their_models_are_listed_with_the_reason(models):
    strangers = Models(models.base, models.nudging, unaligned=models.unaligned)
    found, left_out = contestants_of(strangers, [NudgingConfig()])
    assert [each.name for each in found] == ["base alone", "nudging model alone", "nudged, γ = 0.4", "in-context"]
    tokens = f"the base has {len(models.base.tokenizer)} tokens, and the nudging model {len(models.nudging.tokenizer)}"
    assert tokens in left_out["ensemble"] and left_out["proxy tuning"] == left_out["ensemble"]
    assert left_out["large aligned"] == "it was not given"

    family = Models(models.base, models.shared)
    assert "ensemble" in by_name(family)
    assert "before its alignment was not given" in contestants_of(family, [])[1]["proxy tuning"]
    odd = Models(models.base, models.shared, unaligned=models.nudging)
    assert "the unaligned model" in contestants_of(odd, [])[1]["proxy tuning"]


def test_a_shared_nudging_model_of_another_vocabulary_is_refused(models):
    with pytest.raises(ValueError, match="needs the base's vocabulary"):
        Models(models.base, models.shared, shared=models.nudging)


def one_by_one(models, call, small):
    """The answers of a baseline that is called with one question at a time."""
    base = models.base
    answers = []
    for question in FEW:
        ids, _ = base.padded_prompts([question])
        inputs = {"tokenizer": base.tokenizer, "max_new_tokens": LENGTH, "do_sample": False}
        for reader in small:
            inputs["nudging_input_ids"] = reader.padded_prompts([question])[0]
            inputs |= {"nudging_model": reader.model, "nudging_tokenizer": reader.tokenizer}
        out = call(base.model, ids, **inputs)[0, ids.shape[1] :]
        answers.append(base.tokenizer.decode(out, skip_special_tokens=True).partition(baselines.STOP_STRING)[0])
    return answers


def test_each_contestant_answers_as_its_own_function_does(models):
    found = by_name(models)
    shared = models.shared

    def proxy(*args, **kwargs):
        kwargs |= {"unaligned_model": models.unaligned.model, "unaligned_tokenizer": models.unaligned.tokenizer}
        return baselines.proxy_tuning(*args, **kwargs)

    expected = {
        "base alone": one_by_one(models, lambda model, ids, **kwargs: model.generate(ids, **kwargs), []),
        "nudged, γ = 0.4": one_by_one(models, nudging_hf.generate, [models.nudging]),
        "nudged (shared), γ = 0.4": one_by_one(models, nudging_hf.generate, [shared]),
        "ensemble (shared)": one_by_one(models, baselines.ensemble, [shared]),
        "proxy tuning (shared)": one_by_one(models, proxy, [shared]),
        "in-context": one_by_one(models, baselines.in_context, []),
    }
    for name, answers in expected.items():
        assert texts(found[name]) == answers, name
    assert len({tuple(answers) for answers in expected.values()}) == len(expected)
    assert texts(found["nudging model alone"]) == alone(models.nudging)
    assert texts(found["large aligned"]) == alone(models.large_aligned)


def alone(reader):
    return [reader.text(reader.answers([question], LENGTH)[0].ids) for question in FEW]


@pytest.mark.usefixtures("drafts_of_four")
def test_a_turn_counts_words_passes_and_right_answers(models):
    nudged = by_name(models)["nudged, γ = 0.4"]
    turn = take_turn(nudged, QUESTIONS[5:8], LENGTH)
    ids, mask = models.base.padded_prompts(QUESTIONS[5:8])
    nudging_ids, nudging_mask = models.nudging.padded_prompts(QUESTIONS[5:8])
    out = nudging_hf.generate(
        models.base.model,
        ids,
        attention_mask=mask,
        tokenizer=models.base.tokenizer,
        nudging_model=models.nudging.model,
        nudging_tokenizer=models.nudging.tokenizer,
        nudging_input_ids=nudging_ids,
        nudging_attention_mask=nudging_mask,
        max_new_tokens=LENGTH,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert (turn.large_passes, turn.small_passes) == (out.base_forward_passes, out.nudging_forward_passes)
    counts = [count_nudged_words(pieces) for pieces in pieces_of(out, models.base.tokenizer)]
    assert [(answer.nudged_words, answer.words) for answer in turn.answers] == counts
    assert sum(nudged for nudged, _ in counts) > 0
    right = [question.is_right(answer.text) for question, answer in zip(QUESTIONS[5:8], turn.answers, strict=True)]
    assert turn.right == right == Result(nudged, tuple(QUESTIONS[5:8]), (turn,)).marks()
    assert turn.seconds > 0


def test_counting_passes_removes_its_hooks(models):
    with counted_passes(models.base, models.nudging) as passes:
        for reader in (models.base, models.nudging):
            reader.model(torch.tensor([[5]]))
    models.base.model(torch.tensor([[5]]))
    assert passes.total() == 2
    assert not models.base.model._forward_pre_hooks and not models.nudging.model._forward_pre_hooks


# Turns --------------------------------------------------------------------------------------------------------------


def contestant_that_says(name, say, log=None, nudged=False):
    """A contestant without models. It answers "So", written by the nudging model, and then `say(question)`."""

    def write(questions, max_new_tokens):
        if log is not None and max_new_tokens > 2:
            log.append((name, QUESTIONS.index(questions[0])))
        return [Answer.of([Piece("So", True), Piece(" " + say(question), False)], [], True) for question in questions]

    return Contestant(name, write, nudged=nudged)


def trio(log=None, stop_at=None):
    def killed(question):
        if stop_at is not None and question == QUESTIONS[stop_at]:
            raise KeyboardInterrupt
        return "x"

    return [
        contestant_that_says("base alone", lambda question: "b", log),
        contestant_that_says("nudged, γ = 0.4", lambda question: question.answer, log, nudged=True),
        contestant_that_says("ensemble", killed, log),
    ]


def test_all_answer_a_batch_before_any_answers_the_next(tmp_path):
    log, seen = [], []
    compare(trio(log), QUESTIONS, Journal(tmp_path / "j", {}), batch_size=4, progress=lambda *args: seen.append(args))
    names = [each.name for each in trio()]
    assert log == [(name, start) for start in (0, 4, 8) for name in names]
    assert seen == [(name, size) for size in (4, 4, 2) for name in names]


def test_a_killed_run_continues_with_the_same_result(tmp_path):
    whole = compare(trio(), QUESTIONS, Journal(tmp_path / "whole", {}), batch_size=4)
    path, log = tmp_path / "killed", []
    with pytest.raises(KeyboardInterrupt):
        compare(trio(stop_at=5), QUESTIONS, Journal(path, {}), batch_size=4)
    written = path.read_bytes()
    path.write_bytes(written[:-30])  # As if the run was killed while it wrote the last line.
    kept = Journal(path, {}).results
    assert len(kept) == 4
    again = compare(trio(log), QUESTIONS, Journal(path, {}), batch_size=4)
    assert log == [(name, start) for start in (4, 8) for name in [each.name for each in trio()]][1:]
    assert [result.answers for result in again] == [result.answers for result in whole]
    assert [result.turns[0].seconds for result in again] == [row["seconds"] for row in kept[:3]]

    log.clear()
    finished = compare(trio(log), QUESTIONS, Journal(path, {}), batch_size=4)
    assert not log and [result.turns for result in finished] == [result.turns for result in again]
    assert table(finished) == table(again)


# Figures ------------------------------------------------------------------------------------------------------------


def result_of(tmp_path, name, right, nudged=False):
    """The result of a contestant that answers the first `right` questions of each task rightly."""

    def say(question):
        return question.answer if QUESTIONS.index(question) % 5 < right else "9"

    def write(questions, _):
        pieces = [[Piece("0", True), Piece(f" {say(question)} 1 2", False)] for question in questions]
        return [Answer.of(each, [], True) for each in pieces]

    words = Contestant(name, write, nudged=nudged)
    [result] = compare([words], QUESTIONS, Journal(tmp_path / name, {}), batch_size=3)
    return result


def test_accuracies_and_their_intervals(tmp_path):
    result = result_of(tmp_path, "nudged", 3, nudged=True)
    assert result.accuracy() == 0.6 and result.accuracy("Where is tree") == 0.6
    assert result.interval() == wilson(6, 10) and result.interval("Where is tree") == wilson(3, 5)
    assert (result.nudge_rate, result.words) == (1 / 4, 4)
    assert result_of(tmp_path, "ensemble", 3).nudge_rate is None
    assert result_of(tmp_path, "base alone", 0).interval() == wilson(0, 10) != (0, 0)


def test_the_table_has_a_column_for_each_task_and_none_for_a_single_one(tmp_path):
    results = [result_of(tmp_path, "base alone", 1), result_of(tmp_path, "nudged", 3, nudged=True)]
    lines = table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1 and len({len(row) for row in cells}) == 1
    assert cells[0][1:4] == ["What is number", "Where is tree", "all"]
    assert set(lines[1]) == {"|", "-", ":"}
    assert cells[2][:6] == ["base alone", "20.0", "20.0", "20.0", "6 to 51", "-"]
    assert cells[3][:6] == ["nudged", "60.0", "60.0", "60.0", "31 to 83", "25.0"]
    assert cells[2][6] == "1.00" and cells[2][-2:] == ["-", "-"]
    assert tasks_of(QUESTIONS[:5]) == [] and tasks_of(QUESTIONS) == ["What is number", "Where is tree"]


def test_an_answer_without_words_has_no_time_per_word(tmp_path):
    silent = Contestant("silent", lambda questions, _: [Answer.of([], [], True)] * len(questions), nudged=True)
    [result] = compare([silent], QUESTIONS[:1], Journal(tmp_path / "j", {}))
    assert (result.nudge_rate, result.seconds_per_word) == (None, None)
    assert [cell.strip() for cell in table([result]).splitlines()[-1].split("|")][6] == "-"


# Files and the command ----------------------------------------------------------------------------------------------


def test_questions_need_an_answer_and_may_have_a_task(tmp_path):
    path = tmp_path / "questions.jsonl"
    without = {name: value for name, value in ROWS[0].items() if name != "task"}
    path.write_text("\n\n".join(json.dumps(row) for row in (*ROWS, without)) + "\n", encoding="utf-8")
    found = read_labelled_prompts(path)
    assert found[:-1] == QUESTIONS and found[-1].task == ""
    assert first_of_each_task(found, 2) == [*QUESTIONS[:2], *QUESTIONS[5:7], found[-1]]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """Saved models, and a file of questions."""
    folder = tmp_path_factory.mktemp("models")
    for name, reader in vars(models).items():
        copy.deepcopy(reader.model).float().save_pretrained(folder / name)
        reader.tokenizer.save_pretrained(folder / name)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[3:7]), encoding="utf-8")
    return folder


def arguments(folder, out, *more):
    pair = [
        "--base",
        folder / "base",
        "--nudging-model",
        folder / "nudging",
        "--large-aligned",
        folder / "large_aligned",
    ]
    asked = ["--prompts", folder / "questions.jsonl", "--batch-size", 2, "--max-new-tokens", LENGTH, "--out", out]
    return [*map(str, ["compare", *pair, *asked, *more])]


def figures(out):
    """The results that a repeated run must reproduce, which are all but the times."""
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    timed = ("seconds", "relative_time", "seconds_per_word")
    rows = [{name: value for name, value in row.items() if name not in timed} for row in report["contestants"]]
    return rows, report["says"], report["left_out"], report["setup"]  # The verdict tells the time too.


@pytest.mark.usefixtures("drafts_of_four")
def test_the_command_writes_one_table_and_a_killed_run_continues_with_the_same_result(
    folder, tmp_path, monkeypatch, capsys
):
    shared = ["--shared-nudging-model", folder / "shared", "--unaligned", folder / "unaligned"]
    assert cli.main(arguments(folder, tmp_path / "whole", *shared)) == 0
    out = capsys.readouterr().out
    page = (tmp_path / "whole" / "table.md").read_text(encoding="utf-8")
    assert out.splitlines()[0] in page and str(folder / "base") in page
    assert out.startswith(("Nudging ", "It cannot be told"))
    assert (tmp_path / "whole" / "page.html").read_text(encoding="utf-8").count("<article>") == 4 * 8
    rows, says, left_out, _ = figures(tmp_path / "whole")
    assert all(row["questions"] == 4 and f"| {row['name']} " in out for row in rows) and len(rows) == 8
    assert len(says) >= 2 * 6 and all(sentence in page for sentence in says) and not left_out

    turns, take = [], comparison.take_turn

    def killed(contestant, questions, max_new_tokens):
        if len(turns) == 11:
            raise KeyboardInterrupt
        turns.append((contestant.name, questions[0].question))
        return take(contestant, questions, max_new_tokens)

    def noted(contestant, questions, max_new_tokens):
        again.append((contestant.name, questions[0].question))
        return take(contestant, questions, max_new_tokens)

    monkeypatch.setattr(comparison, "take_turn", killed)
    assert cli.main(arguments(folder, tmp_path / "killed", *shared)) == 130
    answers = tmp_path / "killed" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-25])  # As if the run was killed while it wrote the last line.
    assert not (tmp_path / "killed" / "table.md").exists()

    again = []
    monkeypatch.setattr(comparison, "take_turn", noted)
    assert cli.main(arguments(folder, tmp_path / "killed", *shared)) == 0
    assert again[0] == turns[-1] and not set(again) & set(turns[:-1])
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")


def test_thresholds_are_added_absences_are_explained_and_another_setup_is_refused(
    folder, tmp_path, monkeypatch, capsys
):
    assert cli.main(arguments(folder, tmp_path)) == 0
    assert "ensemble is left out: it needs one vocabulary" in capsys.readouterr().out
    turns, take = [], comparison.take_turn
    monkeypatch.setattr(comparison, "take_turn", lambda *args: turns.append(args[0].name) or take(*args))
    assert cli.main(arguments(folder, tmp_path, "--threshold", 0.4, 0.9, "margin:0.5", "rejection:auto")) == 0
    assert set(turns) == {"nudged, γ = 0.9", "nudged, margin 0.5", "nudged, rejection auto"} and len(turns) == 6
    for row, other in pairwise(figures(tmp_path)[0][2:4]):
        assert row["nudge_rate"] < other["nudge_rate"]
    capsys.readouterr()
    assert cli.main(arguments(folder, tmp_path, "--batch-size", 5)) == 2
    assert "another setup (batch_size differ)" in capsys.readouterr().err


def test_without_answers_nothing_is_said_about_quality(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("What is number?\nWhere is tree?\n")
    assert cli.main(arguments(folder, tmp_path, "--prompts", tmp_path / "prompts.txt")) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Whether nudging helps, and which setting to take, was not measured, because no rule")
    assert " above " not in out and "95 %" not in out.partition("\n\n")[2].partition("\n\n")[0]
    assert "(plain text, a prompt a line): 2 chats, none with an answer; the first: “What is number?”" in err
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<article>") == 2 * 5


def test_a_judge_is_asked_only_what_no_rule_can_mark_and_never_twice(tmp_path, monkeypatch):
    reference = "a " * 20
    questions = [QUESTIONS[0], Prompt(messages_of("Why?")), Prompt(messages_of("How?"), answer=reference)]
    asked = []

    def grades(question, answer, reference):
        asked.append((question, answer, reference))
        return {"correct": 1} if reference else {"depth": 2, "clarity": 5}

    monkeypatch.setenv(judge.VARIABLE, "judge-1")
    monkeypatch.setattr(judge, "grades", grades)
    said = contestant_that_says("base alone", lambda question: "a")
    for _ in range(2):
        [result] = compare([said], questions, Journal(tmp_path / "j", {}), batch_size=2)
        assert asked == [("Why?", "So a", None), ("How?", "So a", reference)]
        assert result.right == [True, None, True] and result.marks() == [True, True] and result.grades() == [3.5]
    assert "grade" in table([result]) and result.as_dict(result)["grade"] == 3.5
    monkeypatch.setenv(judge.VARIABLE, "judge-2")
    compare([said], questions, Journal(tmp_path / "j", {}), batch_size=2)
    assert len(asked) == 4  # What another judge said is not taken.


def test_a_judge_that_cannot_be_asked_is_an_error_before_anything_is_loaded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(judge.VARIABLE, "judge-1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "prompts.txt").write_text("What?\n")
    assert cli.main(arguments(folder, tmp_path / "out", "--prompts", tmp_path / "prompts.txt")) == 2
    assert "The judge judge-1 could not be asked" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--threshold", "-1"], "nudge_threshold"),
        (["--threshold", "top2:0.4"], "`nudge_gate`"),
        (["--base-template", "x"], "{user}"),
        (["--prompts", "nowhere"], "nowhere"),
        (["--large-aligned", "./nowhere"], "--large-aligned: there is no folder ./nowhere"),
    ],
)
def test_invalid_arguments_are_refused(folder, tmp_path, wrong, says, capsys):
    assert cli.main([*arguments(folder, tmp_path / "out"), *wrong]) == 2
    assert says in capsys.readouterr().err
