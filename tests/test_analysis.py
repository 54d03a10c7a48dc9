"""Tests `analyze`: its figures against a step-by-step computation on tiny random models, and continued runs."""

import json
import re
import sys

import pytest
import tiny
import torch

from nudging_hf import cli
from nudging_hf.chats import messages_of
from nudging_hf.study import analysis, report
from nudging_hf.study.analysis import Analysis, Positions, Unit, agree, tables
from nudging_hf.study.intervals import wilson
from nudging_hf.study.prompts import Prompt, spread
from nudging_hf.study.reader import Answer, Prediction, Reader

PROMPTS = [Prompt(messages_of(text), prompt=text) for text in ("One word, and another one.", "What is it?", "The")]
LENGTH = 12


def model_of(tokenizer, seed):
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    loudness = [2.0 if piece[0] in "\u0120\u2581" else 1.0 for piece in pieces]  # This makes the text have words.
    ids = len(tokenizer), seed, tokenizer.eos_token_id, tokenizer.pad_token_id
    return tiny.tiny_model("llama", *ids, loudness=loudness, eos_rate=0.01)


def reader_of(tokenizer, seed, chat=True):
    return Reader(model_of(tokenizer, seed), tokenizer, chat)


def analysis_of(base, nudging, large, **kwargs):
    options = {"threshold": 0.4, "thresholds": [0.2, 0.6], "batch_size": 2, "max_new_tokens": LENGTH}
    return Analysis(base, nudging, large, PROMPTS, **{**options, **kwargs})


def along(work):
    return [row for unit in work.units() if unit.kind == "along" for row in work.measure(unit)]


def next_token(reader, prompt, answer):
    """The logits after a prompt and the answer so far, from a pass that reads nothing else."""
    with torch.no_grad():
        return reader.model(torch.tensor([prompt + answer])).logits[0, -1]


@pytest.fixture(scope="module")
def trio():
    """Base, nudging model and large aligned model of one vocabulary."""
    tokenizer = tiny.byte_bpe()
    return reader_of(tokenizer, 1, chat=False), reader_of(tokenizer, 2), reader_of(tokenizer, 3)


@pytest.fixture(scope="module")
def trio_of_two_vocabularies():
    """The same three, but the nudging model has another vocabulary."""
    tokenizer = tiny.byte_bpe()
    return reader_of(tokenizer, 1, chat=False), reader_of(tiny.metaspace_bpe(), 2), reader_of(tokenizer, 3)


# Positions ----------------------------------------------------------------------------------------------------------


def test_positions_are_what_each_model_predicts_one_step_at_a_time(trio):
    base, nudging, large = trio
    rows = along(analysis_of(*trio))
    assert len(rows) == len(PROMPTS)
    seen = 0
    for prompt, row in zip(PROMPTS, rows, strict=True):
        asked = [reader.prompt_ids(prompt) for reader in trio]
        answer, found = [], Positions(**row["positions"])
        for p, differs, agrees in zip(found.top1, found.differs, found.small_agrees, strict=True):
            logits = [
                next_token(reader, ids, answer) for reader, ids in zip((base, nudging, large), asked, strict=True)
            ]
            tokens = [int(each.argmax()) for each in logits]
            assert p == pytest.approx(float(logits[0].softmax(-1).max()), abs=1e-5)
            assert differs == (tokens[0] != tokens[2]) and agrees == (tokens[1] == tokens[2])
            answer.append(tokens[2])  # The answer is the large model's greedy one.
            seen += 1
        assert large.vocabulary.join(answer).decode(errors="replace") == row["answer"]["text"]
        assert answer == row["answer"]["ids"]
    assert seen > len(PROMPTS)


def test_across_vocabularies_positions_are_compared_by_text_where_a_token_starts_in_both(trio_of_two_vocabularies):
    _, nudging, large = trio_of_two_vocabularies
    compared = left_out = 0
    for prompt, row in zip(PROMPTS, along(analysis_of(*trio_of_two_vocabularies)), strict=True):
        [written] = large.answers([prompt], LENGTH)
        ids = written.ids
        text = large.vocabulary.join(ids)
        reading = analysis.answer_class(large.vocabulary, nudging.vocabulary)
        answer = reading(large.vocabulary, nudging.vocabulary, large.prompt_ids(prompt), nudging.prompt_ids(prompt))
        for token in ids:
            answer.append(token)
        theirs = answer.nudging_ids()
        read = [nudging.vocabulary.join(theirs[:i]) for i in range(len(theirs))]
        starts = {len(left): i for i, left in enumerate(read) if text.startswith(left)}
        asked = nudging.prompt_ids(prompt)
        for i, agrees in enumerate(row["positions"]["small_agrees"]):
            start = len(large.vocabulary.join(ids[:i]))
            if start not in starts:
                assert agrees is None
                left_out += 1
                continue
            token = int(next_token(nudging, asked, theirs[: starts[start]]).argmax())
            mine, its = large.vocabulary.bytes_of(ids[i]), nudging.vocabulary.bytes_of(token)
            ends = token in nudging.eos
            assert agrees == (not ends and bool(its) and (mine.startswith(its) or its.startswith(mine)))
            compared += 1
        assert text.decode(errors="replace") == row["answer"]["text"]
    assert compared and left_out


def test_a_base_that_is_the_aligned_model_never_disagrees(trio):
    base = trio[0]
    for row in along(analysis_of(base, base, base)):
        assert not any(row["positions"]["differs"]) and all(row["positions"]["small_agrees"])
        assert row["positions"]["top1"]


def test_without_a_large_model_positions_are_those_of_the_nudged_answers(trio):
    base, nudging, _ = trio
    work = analysis_of(base, nudging, None, threshold=0.6)
    nudged = [row for unit in work.units() if unit.kind == "nudged" and unit.threshold == 0.6
              for row in work.measure(unit)]  # fmt: skip
    for row, other in zip(along(work), nudged, strict=True):
        assert row["answer"] == other["answer"]
        assert len(row["positions"]["top1"]) == len(row["answer"]["ids"])
        assert row["positions"]["small_agrees"] == [None] * len(row["answer"]["ids"])
    whole = tables(PROMPTS, {unit: work.measure(unit) for unit in work.units()})
    assert whole["along"]["writer"] == "nudged" and whole["agreement"]["alignment_related"] is None


@pytest.mark.parametrize(
    ("one", "other", "same_vocabulary", "expected"),
    [
        (Prediction(1, b"a", False, 1), Prediction(1, b"a", False, 1), True, True),
        (Prediction(1, b"a", False, 1), Prediction(2, b"ab", False, 1), True, False),
        (Prediction(1, b"a", False, 1), Prediction(2, b"ab", False, 1), False, True),
        (Prediction(1, b"ab", False, 1), Prediction(2, b"ac", False, 1), False, False),
        (Prediction(1, b"", False, 1), Prediction(2, b"ac", False, 1), False, False),
        (Prediction(1, b"", True, 1), Prediction(2, b"", True, 1), True, True),
        (Prediction(1, b"a", False, 1), Prediction(1, b"a", True, 1), False, False),
    ],
)
def test_agreement_compares_tokens_in_one_vocabulary_and_text_across_two(one, other, same_vocabulary, expected):
    assert agree(one, other, same_vocabulary) is expected
    assert agree(other, one, same_vocabulary) is expected


# Tables -------------------------------------------------------------------------------------------------------------


def row_of(text="", nudged=0, positions=None):
    answer = Answer(text, [7] * 20, True, words=10, nudged_words=nudged, nudged_tokens=2 * nudged)
    row = {"answer": vars(answer)}
    return row if positions is None else {**row, "positions": vars(positions)}


def test_tables_of_a_case_that_can_be_counted_by_hand():
    prompts = [
        Prompt(messages_of("?"), pattern=r"(\d)", answer="4"),
        Prompt(messages_of("?"), pattern="(.)", answer="b"),
    ]
    measured = {
        Unit("nudged", 1, 0.5): [row_of("a", nudged=1)],
        Unit("nudged", 0, 0.5): [row_of("3 or 4", nudged=2)],
        Unit("base", 0): [row_of("5"), row_of("a")],
        Unit("nudging model", 0): [row_of("4"), row_of("b")],
        Unit("along", 0): [
            row_of("4", positions=Positions([0.05, 0.1, 1.0], [True, False, None], [True, True, None])),
            row_of("a", positions=Positions([0.49, 0.5], [True, True], [None, False])),
        ],
    }
    found = tables(prompts, measured)
    assert found["along"] == {
        "writer": "large aligned", "threshold": None, "positions": 5, "compared": 4, "alignment_related": 3,
        "disagreement": 3 / 4, "unfinished": 0,
    }  # fmt: skip
    assert [row["positions"] for row in found["bins"]] == [1, 1, 0, 0, 1, 1, 0, 0, 0, 1]
    assert [row["disagreement"] for row in found["bins"]] == [1, 0, None, None, 1, 1, None, None, None, None]
    half = next(row for row in found["thresholds"] if row["threshold"] == 0.5)
    assert half == {"threshold": 0.5, "positions": 3 / 5, "caught": 2 / 3, "disagreement": 2 / 3, "small_agreement": 1}
    assert found["agreement"] == {"alignment_related": 1 / 2, "elsewhere": 1, "alignment_related_compared": 2}
    [point] = found["curve"]
    assert (point["accuracy"], point["nudged_words"], point["nudged_tokens"]) == (1 / 2, 3 / 20, 6 / 40)
    accuracies = {name: alone["accuracy"] for name, alone in found["alone"].items()}
    assert accuracies == {"base": 0, "nudging model": 1, "large aligned": 1 / 2}
    assert found["alone"]["base"]["interval"] == list(wilson(0, 2)) and point["interval"] == list(wilson(1, 2))
    assert found["verdict"].startswith(
        "It cannot be told from so few questions whether nudging helps: with γ = 0.5, 1"
    )
    [said] = found["nothing_right"]
    assert said.startswith("base alone is right on none of 2. Asked “?”, it wrote “5”; “4” was due")


def test_only_prompts_whose_answer_is_known_are_marked():
    prompts = [Prompt(messages_of("?"), answer="4"), Prompt(messages_of("?"))]
    row = row_of("4", positions=Positions([0.5], [True], [True]))
    found = tables(prompts, {Unit("along", 0): [row, row], Unit("base", 0): [row_of("5"), row_of("4")]})
    assert (found["alone"]["base"]["accuracy"], found["alone"]["large aligned"]["accuracy"]) == (0, 1)


def test_tables_add_up_and_shares_rise_with_the_threshold(trio_of_two_vocabularies):
    work = analysis_of(*trio_of_two_vocabularies)
    found = tables(PROMPTS, {unit: work.measure(unit) for unit in work.units()})
    assert sum(row["positions"] for row in found["bins"]) == found["along"]["positions"] > 0
    assert sum(row["share"] for row in found["bins"]) == pytest.approx(1)
    for name in ("positions", "caught"):
        shares = [row[name] for row in found["thresholds"]]
        assert shares == sorted(shares)
    assert [row["threshold"] for row in found["curve"]] == [0.2, 0.6]
    assert all(row["accuracy"] is None for row in found["curve"])  # No right answers are known.


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_plots(monkeypatch):
    """Replaces the plots by ones that take no time. `test_report.py` tests the real ones."""
    monkeypatch.setattr(
        report, "plots", lambda *_, **__: dict.fromkeys(("positions", "disagreement", "caught"), b"...")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three saved models, and a file of prompts."""
    folder = tmp_path_factory.mktemp("models")
    for name, tokenizer, seed in (
        ("base", tiny.byte_bpe(), 1), ("nudging", tiny.metaspace_bpe(), 2), ("large", tiny.byte_bpe(), 3)
    ):  # fmt: skip
        model_of(tokenizer, seed).float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {"messages": messages_of(f"Number {i}?"), "prompt": f"Number {i}?\n", "pattern": r"(\w)", "answer": "a"}
        for i in range(5)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def arguments(folder, out, *more):
    models = ["--base", folder / "base", "--nudging-model", folder / "nudging", "--large-aligned", folder / "large"]
    asked = ["--prompts", folder / "prompts.jsonl", "--batch-size", 2, "--max-new-tokens", 8, "--thresholds", 0.3, 0.6]
    return [*map(str, ["analyze", *models, *asked, "--out", out, *more])]


@pytest.mark.usefixtures("drafts_of_four")
def test_a_killed_run_continues_and_gives_the_same_tables(folder, tmp_path, monkeypatch, quick_plots, capsys):
    assert cli.main(arguments(folder, tmp_path / "whole")) == 0
    measure, measured = Analysis.measure, []

    def killed(self, unit):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(unit)
        return measure(self, unit)

    monkeypatch.setattr(Analysis, "measure", killed)
    assert cli.main(arguments(folder, tmp_path / "killed")) == 130
    journal = tmp_path / "killed" / "units.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # As if the run was killed while it wrote the fifth line.
    assert not (tmp_path / "killed" / "tables.json").exists()

    again = []
    monkeypatch.setattr(Analysis, "measure", lambda self, unit: again.append(unit) or measure(self, unit))
    assert cli.main(arguments(folder, tmp_path / "killed")) == 0
    assert again[0] == measured[4] and not set(again) & set(measured[:4])
    page = (tmp_path / "whole" / "page.html").read_text(encoding="utf-8")
    assert "<h2>Prompt (" in page and "rank of this token" in page
    assert re.findall("<h2>(.+)</h2>", page.split("<article>")[1])[1:] == [
        "base alone", "nudging model alone", re.search("nudged, γ = 0.[36]", page)[0], "large aligned"
    ]  # fmt: skip
    for name in ("tables.json", "units.jsonl", "report.html", "page.html"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    again.clear()
    assert cli.main(arguments(folder, tmp_path / "whole")) == 0
    assert again == []


def test_more_thresholds_are_added_to_a_finished_run_and_other_prompts_are_refused(
    folder, tmp_path, monkeypatch, quick_plots, capsys
):
    assert cli.main(arguments(folder, tmp_path, "--limit", 2)) == 0
    measure, measured = Analysis.measure, []
    monkeypatch.setattr(Analysis, "measure", lambda self, unit: measured.append(unit) or measure(self, unit))
    assert cli.main(arguments(folder, tmp_path, "--limit", 2, "--thresholds", 0.3, 0.9)) == 0
    assert measured == [Unit("nudged", 0, 0.9)]
    assert [row["threshold"] for row in json.loads((tmp_path / "tables.json").read_text())["curve"]] == [0.3, 0.9]
    capsys.readouterr()
    assert cli.main(arguments(folder, tmp_path, "--limit", 3)) == 2
    assert "another setup (prompts differ)" in capsys.readouterr().err


def test_the_accuracy_is_that_of_the_answers_themselves(folder, tmp_path, quick_plots, capsys):
    assert cli.main(arguments(folder, tmp_path, "--thresholds")) == 0
    large = Reader.load(folder / "large")
    right = 0
    for i in range(5):
        ids = large.tokenizer.apply_chat_template(
            messages_of(f"Number {i}?"), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        text = large.tokenizer.decode(
            large.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True
        )
        right += Prompt(messages_of("?"), pattern=r"(\w)", answer="a").is_right(text)
    found = json.loads((tmp_path / "tables.json").read_text())
    assert found["alone"]["large aligned"]["accuracy"] == right / 5
    assert found["curve"] == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--base", "x"], "--nudging-model is missing"),
        (["--thresholds", "-1"], "nudge_threshold"),
        (["--base-template", "x"], "{user}"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_loaded(wrong, says, tmp_path, capsys):
    assert cli.main(["analyze", "--out", str(tmp_path / "out"), *wrong]) == 2
    assert says in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["analyze", "--out", str(tmp_path)]) == 2
    assert "nudging-hf[analysis]" in capsys.readouterr().err


def test_a_limit_takes_prompts_from_all_parts_of_a_file():
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(3), 9) == [0, 1, 2]
