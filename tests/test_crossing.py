"""Tests that the benchmark of the crossing runs, with its default tokenizers and with given ones."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import crossing


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
