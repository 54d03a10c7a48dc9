"""A slice of `make test-long`: the laws on random cases of all architectures that it has."""

import json

import long_run
import pytest

PAIRS = 12


@pytest.mark.parametrize("pair", range(PAIRS))
def test_a_random_case_is_written_the_same_in_every_way(pair):
    for number in range(2):
        long_run.check(seed=pair, number=pair * long_run._CASES_OF_A_PAIR + number)


def test_a_run_goes_on_where_it_stopped_and_names_the_cases_that_fail(tmp_path, monkeypatch, capsys):
    tried = []

    def check(seed, number):
        tried.append(number)
        assert number != 2 or "mended" in tried, "drafted: other ids"
        return "greedy"

    monkeypatch.setattr(long_run, "check", check)
    arguments = ["--seed", "5", "--journal", str(tmp_path / "journal.jsonl"), "--cases"]
    assert long_run.main([*arguments, "4"]) == 1
    printed = "".join(capsys.readouterr())
    assert "drafted: other ids" in printed and "--seed 5 --case 2" in printed and "3 of 4 cases hold" in printed
    tried.append("mended")
    assert long_run.main([*arguments, "6"]) == 0
    assert tried == [0, 1, 2, 3, "mended", 2, 4, 5]
    done = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()[1:]]
    assert sorted(each["key"]["case"] for each in done) == list(range(6))
