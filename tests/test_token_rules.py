"""What may be written, and where an answer ends. No model is run: answers are lists of a few small ids."""

import time

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from nudging_hf.core.constraints import Constraint, hard_processors
from nudging_hf.core.limits import Limits
from nudging_hf.core.rounds import Lookahead, Word
from nudging_hf.core.token_rules import TokenRules

SIZE, EOS, OTHER_EOS, STOP = 12, 0, 1, 9
NEVER = float("-inf")


class Forbid(LogitsProcessor):
    """Forbids the tokens that a table has for the ids so far. It must not be asked about ids with a stop token."""

    def __init__(self, table):
        self.table = table

    def __call__(self, input_ids, scores):
        ids = tuple(input_ids[0].tolist())
        assert STOP not in ids
        scores = scores.clone()
        scores[:, list(self.table.get(ids, ()))] = NEVER
        return scores


def constraint(table, eos=(EOS,), stop_tokens=(STOP,)) -> Constraint:
    prompt = torch.zeros(1, 0, dtype=torch.long)
    return Constraint(LogitsProcessorList([Forbid(table)]), prompt, SIZE, eos, stop_tokens)


def rules(one_vocabulary: bool, **given) -> TokenRules:
    fields = {"base_eos": [EOS], "nudging_eos": [EOS], "nudging_control": torch.tensor([7]), "stop_tokens": [STOP]}
    counts = {"base_samples": False, "nudging_samples": False, "min_new_tokens": 0}
    return TokenRules(**{**fields, **counts, **given}, one_vocabulary=one_vocabulary)


class PenaltyThatForbids(RepetitionPenaltyLogitsProcessor):
    pass


@pytest.mark.parametrize(
    ("processor", "is_hard"),
    [
        (NoBadWordsLogitsProcessor([[3]], eos_token_id=0), True),
        (SequenceBiasLogitsProcessor([[[3], NEVER]]), True),
        (SequenceBiasLogitsProcessor([[[3], -9.0]]), False),
        (RepetitionPenaltyLogitsProcessor(1.5), False),
        (PenaltyThatForbids(1.5), True),
        (TemperatureLogitsWarper(0.5), False),
        (TopPLogitsWarper(0.5), False),
        (MinNewTokensLengthLogitsProcessor(1, 2, torch.tensor([0])), False),
        (Forbid({}), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_processor_is_hard_if_it_may_forbid_a_token(processor, is_hard):
    assert bool(hard_processors(LogitsProcessorList([processor]))) == is_hard


def test_a_token_is_forbidden_by_the_ids_before_it():
    each = constraint({(): {3}, (4,): {5}, (4, 6): {EOS}})
    assert each.allowed_prefix([], [3, 4]) == 0
    assert each.allowed_prefix([], [5, 4]) == 2
    assert each.allowed_prefix([], [4, 5, 6]) == 1
    assert each.allowed_prefix([4], [6, 2, 2]) == 3
    assert each.allowed_prefix([], [4, SIZE, 2]) == 1
    assert each.allowed_prefix([], [4, STOP, 2, 2]) == 2  # Nothing is asked about the place after a stop token.


def test_an_answer_may_end_where_an_eos_of_the_base_is_allowed():
    table = {(2,): {EOS, OTHER_EOS}, (3,): {EOS}, (4,): set(range(SIZE)) - {OTHER_EOS}}
    each = constraint(table, [EOS, OTHER_EOS])
    assert [each.allows_end([token]) for token in (2, 3, 4, 5)] == [False, True, True, True]
    assert [each.allows_only_end([token]) for token in (2, 3, 4, 5)] == [False, False, True, False]
    assert constraint(table, []).allows_end([2]) and not constraint(table, []).allows_only_end([4])


def test_with_two_vocabularies_a_forbidden_word_is_set_aside_or_there_are_no_words():
    words = (Word("a", (2,)), Word(" b", (3, 4)), Word(" c", (5,)))
    two = rules(one_vocabulary=False)

    def restricted(table, ended=False, given=words):
        return two.restricted(constraint(table), [8], given, ended)

    assert restricted({}) == Lookahead(words, False)
    assert restricted({}, ended=True) == Lookahead(words, True)
    assert restricted({(8,): {2}}) == restricted({(8,): {2}}, ended=True) == Lookahead((), False)
    assert restricted({(8, 2, 3): {4}}) == restricted({(8, 2, 3): {4}}, ended=True) == Lookahead(words[:2], False)
    assert restricted({(8, 2, 3, 4): {5}}) == Lookahead(words, False)  # The last word is set aside in any case.
    assert restricted({(8, 2, 3, 4): {5}}, ended=True) == Lookahead(words, False)
    assert restricted({(8, 2, 3, 4, 5): {EOS}}, ended=True) == Lookahead(words, False)
    stopping = (Word("a", (2,)), Word(" b", (STOP, 4)), Word(" c", (5,)))
    assert restricted({}, ended=True, given=stopping) == Lookahead(stopping, True)
    assert rules(one_vocabulary=True).restricted(constraint({(8,): {2}}), [8], words, True) == Lookahead(words, True)


def test_a_word_that_the_base_cannot_read_is_not_taken():
    two = rules(one_vocabulary=False, base_num_ids=4)
    words = (Word("a", (2,)), Word(" b", (3, 4)), Word(" c", (2,)))
    assert two.num_allowed(None, [], [2, 3, 4, 2]) == 2
    assert two.restricted(None, [], words, ended=True) == Lookahead(words[:2], False)


def test_with_one_vocabulary_the_nudging_model_draws_nothing_that_is_forbidden():
    one = rules(one_vocabulary=True, nudging_eos=[EOS, STOP])
    each = constraint({(2,): {3, EOS}, (4,): {3}, (5,): {EOS, STOP}})
    scores = torch.zeros(SIZE + 2)  # The nudging model has two more.

    def drawn(ids):
        return [i for i, value in enumerate(one.forbidden(each, ids, scores).tolist()) if value == NEVER]

    assert drawn([2]) == [EOS, 3]
    assert drawn([4]) == [3]
    assert drawn([5]) == [EOS, STOP]


def test_what_the_nudging_model_never_draws():
    def never(**given):
        mask = rules(one_vocabulary=True, **given).never_drawn(torch.zeros(SIZE))
        return [i for i, value in enumerate(mask.tolist()) if value == NEVER]

    assert never() == [7]
    assert never(base_num_ids=9) == [7, 9, 10, 11]
    assert never(base_num_ids=9, nudging_eos=[10]) == [7, 9, 11]


@pytest.mark.parametrize("one_vocabulary", [True, False])
def test_before_min_new_tokens_the_nudging_model_draws_neither_eos_nor_a_stop_token(one_vocabulary):
    each = rules(one_vocabulary, nudging_eos=[EOS, OTHER_EOS])
    scores = each.no_end(torch.zeros(1, 0), torch.zeros(1, SIZE))[0].tolist()
    suppressed = [i for i, value in enumerate(scores) if value == NEVER]
    assert suppressed == ([EOS, OTHER_EOS, STOP] if one_vocabulary else [EOS, OTHER_EOS])


class EndsWith(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_what_ends_an_answer_with_its_last_token():
    criteria = [MaxLengthCriteria(5), MaxLengthCriteria(6), EosTokenCriteria([EOS, 4]), EndsWith(3)]
    limits = Limits(StoppingCriteriaList(criteria), base_eos=[EOS], stop_tokens=[STOP])

    def reason(token, length, is_full=False):
        return limits.finish_reason(token, length, is_full, lambda: torch.tensor([[2, token]]))

    assert [reason(2, length) for length in (3, 4, 5)] == [None, None, "length"]
    assert [limits.room(length) for length in (3, 5)] == [2, 0]
    assert reason(2, 3, is_full=True) == "length"
    assert reason(STOP, 3) == "stop_token"
    assert reason(3, 3) == reason(4, 3) == "stopping_criteria"
    assert reason(EOS, 3) is None  # A word like any other: only the nudging model ends an answer.


def test_max_time_ends_an_answer_at_any_token():
    limits = Limits(StoppingCriteriaList([MaxTimeCriteria(60.0, initial_timestamp=time.time())]), base_eos=[])
    late = Limits(StoppingCriteriaList([MaxTimeCriteria(60.0, initial_timestamp=time.time() - 61)]), base_eos=[])
    reasons = [each.finish_reason(2, 3, False, lambda: torch.tensor([[2]])) for each in (limits, late)]
    assert reasons == [None, "time"] and [each.time_is_up() for each in (limits, late)] == [False, True]
