"""Tests that the benchmarks of tokenizers run, with its default tokenizers and with given ones."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import crossing
import word_boundaries


def test_it_prints_a_cost_for_each_pair_and_text_at_each_length(capsys):
    crossing.main(["--quick"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * len(crossing.TEXTS)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert {tuple(row[:3]) for row in cells} == {
        (*pair, text) for pair in (("base", "nudging"), ("nudging", "base")) for text in crossing.TEXTS
    }
    assert all(float(cost) >= 0 for row in cells for cost in row[3:])


def test_named_tokenizers_cross_in_both_directions(capsys):
    folders = [str(crossing.MINI / name) for name in ("base", "nudging")]
    crossing.main([*folders, "--quick", "--texts", "code"])
    assert capsys.readouterr().out.count("| code |") == 2


def test_a_single_tokenizer_is_refused(capsys):
    with pytest.raises(SystemExit):
        crossing.main([str(crossing.MINI / "base")])
    assert "needs two tokenizers" in capsys.readouterr().err


def test_word_boundaries_are_counted_for_each_language(capsys):
    word_boundaries.main([str(crossing.MINI / "base")])
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| base")]
    assert [row[1].strip() for row in rows] == list(word_boundaries.TEXTS)
    for language, row in zip(word_boundaries.TEXTS, rows, strict=True):
        words, first, questions = ([float(each) for each in cell.split("→")] for cell in row[3:])
        assert words[0] <= words[1] and first[0] >= first[1] and questions[0] <= questions[1]
        assert language == "English" or words[0] < words[1]
