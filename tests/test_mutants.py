"""The mutants of `make mutants` apply to the code as it stands, and break rules all over the decoder."""

from collections import Counter

import pytest
from mutants import MUTANTS, TESTS

RULES_OF = (
    "rounds gate answer vocabulary sampling predicting constraints token_rules limits row advance writing decoding "
    "cached_lm kv_cache preparation generate output"
).split()


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutant_applies_and_can_be_compiled(file):
    for mutant in (each for each in MUTANTS if each.file == file):
        compile(mutant.mutated(), mutant.path, "exec")


def test_every_mutant_is_one_of_a_kind_and_names_tests_that_exist():
    assert max(Counter((mutant.file, mutant.old, mutant.new) for mutant in MUTANTS).values()) == 1
    assert {mutant.file for mutant in MUTANTS} >= set(RULES_OF)
    for mutant in MUTANTS:
        for file, _, test in (name.partition("::") for name in mutant.tests):
            assert f"def {test}" in (TESTS / f"test_{file}.py").read_text(), f"{mutant.rule} {file} {test}"
