"""Tests that a journal keeps all finished work, wherever a process is killed."""

import json
import logging

import pytest
import tiny

from nudging_hf.study.journal import Journal, digest, model_setup

SETUP = {"base": "b", "parameters": [1, 2], "large": None}
ROWS = [{"n": 1, "text": "\u00e9\u2028\n"}, {"n": 2, "text": ""}, {"n": 3, "text": "\U0001f600"}]


def journal_of(path, rows):
    journal = Journal(path, SETUP)
    for row in rows:
        journal.once({"n": row["n"]}, lambda row=row: row)
    return journal


@pytest.mark.parametrize("name", ["j", None])
def test_results_are_read_again_in_their_order(tmp_path, name):
    path = name and tmp_path / name
    assert journal_of(path, ROWS).results == ROWS
    assert Journal(path, SETUP).results == (ROWS if path else [])


def test_finished_work_is_not_done_again(tmp_path):
    journal_of(tmp_path / "j", ROWS[:2])
    done = []
    for _ in range(2):
        journal = Journal(tmp_path / "j", SETUP)
        for row in ROWS:
            assert journal.once({"n": row["n"]}, lambda row=row: done.append(row) or row) == row
        assert journal.find({"n": 3}) == ROWS[2] and journal.find({"n": 4}) is None
    assert done == ROWS[2:]


def test_a_journal_cut_at_any_byte_continues_from_its_whole_rows(tmp_path, caplog):
    journal_of(tmp_path / "whole", ROWS)
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            journal = Journal(path, SETUP)
        assert journal.results == ROWS[: max(0, whole[:length].count(b"\n") - 1)]
        assert bool(caplog.records) == (length > 0 and whole[length - 1 : length] != b"\n")
        for row in ROWS:
            journal.once({"n": row["n"]}, lambda row=row: row)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("setup", "names"),
    [
        ({**SETUP, "base": "c"}, "base"),
        ({**SETUP, "parameters": [1], "large": "l"}, "parameters, large"),
        ({**SETUP, "more": 1}, "more"),
        ({"base": "b", "large": None}, "parameters"),
    ],
)
def test_another_setup_is_refused_with_the_differing_names_and_nothing_is_lost(tmp_path, setup, names):
    path = tmp_path / "j"
    journal_of(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"another setup \({names} differ\)"):
        Journal(path, setup)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        *("Dear diary", "Dear diary\n", "[]\n", json.dumps(SETUP) + "\n[]\n", "{}\n{\n", json.dumps(SETUP) + "\n{}\n"),
        *("\0\x1b[2J\n", "[" * 100_000 + "\n"),
    ],
    ids=range(8),
)
def test_a_file_of_another_kind_is_refused_and_not_changed(tmp_path, text):
    path = tmp_path / "j"
    path.write_text(text)
    with pytest.raises(ValueError, match="no file of finished work"):
        Journal(path, SETUP)
    assert path.read_text() == text


@pytest.mark.parametrize("result", [[], 5, "../../x", {"n": None}, {"n": [[[]]]}, {"n": 1e400}])
def test_a_result_that_cannot_be_read_is_refused_and_nothing_is_run_or_lost(tmp_path, result):
    path = tmp_path / "j"
    path.write_text(f"{json.dumps(SETUP)}\n{json.dumps({'key': {'n': 1}, 'result': result})}\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no file of finished work"):
        Journal(path, SETUP).once({"n": 1}, pytest.fail, lambda row: int(row["n"]) + 0 * len(row))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_digest_depends_only_on_the_value():
    assert digest([{"a": 1, "b": "\u00e9"}]) == digest([{"b": "\u00e9", "a": 1}]) != digest([{"a": 1, "b": "e"}])


def test_a_model_is_identified_by_name_size_and_kind():
    model = tiny.pair("llama", 3, "two").base
    assert model_setup(model) == f"LlamaForCausalLM, {model.num_parameters()} parameters, torch.float64"
