"""Sampled answers: the rule that accepts draft tokens does not change the base's distribution."""

from collections import Counter

import pytest
import torch
from running import padded
from scripted import ScriptedLM
from tiny import byte_bpe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import nudging_hf
from nudging_hf.core import predicting, writing
from nudging_hf.core.decoding import NudgedDecoder
from nudging_hf.core.sampling import choose, fold_in
from nudging_hf.core.vocabulary import Vocabulary

VOCABULARY = ["<eos>", "<pad>", " a", " b", " c", " d", "e", "f"]
ROWS, ROUNDS, LENGTH = 500, 2, 4


def chi_square(counts: Counter, others: Counter) -> tuple[float, float]:
    """The statistic of the two-sample test of homogeneity, and its 0.999 quantile (Wilson and Hilferty 1931)."""
    kinds = [kind for kind in counts | others if counts[kind] + others[kind] >= 10]
    n, m = (sum(sample[kind] for kind in kinds) for sample in (counts, others))
    statistic = sum(
        (counts[kind] * (m / n) ** 0.5 - others[kind] * (n / m) ** 0.5) ** 2 / (counts[kind] + others[kind])
        for kind in kinds
    )
    freedom = len(kinds) - 1
    return statistic, freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def toy_pair():
    """Two models with a vocabulary of eight words, and their tokenizer."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    pair = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            eos_token_id=0, pad_token_id=1, initializer_range=0.5, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).double().eval()
        model.lm_head.weight.data *= 0.5
        pair.append(model)
    pair[1].generation_config.do_sample = True
    return *pair, tokenizer


def sampled(num_draft_tokens: int, seed: int) -> Counter:
    """How often each pair of a second and a third token was sampled. The base writes most of these tokens."""
    base, nudging_model, tokenizer = toy_pair()
    ids, _ = padded([[2, 3]] * ROWS, 1)
    answers: Counter = Counter()
    torch.manual_seed(seed)
    for _ in range(ROUNDS):
        out = nudging_hf.generate(
            base,
            ids,
            nudging_model=nudging_model,
            tokenizer=tokenizer,
            nudging_tokenizer=tokenizer,
            nudging_input_ids=ids,
            nudge_threshold=0.3,
            num_nudging_tokens=3,
            num_draft_tokens=num_draft_tokens,
            do_sample=True,
            max_new_tokens=LENGTH,
        )
        answers.update((second, third) for _, second, third, _ in out[:, 2:].tolist())
    return answers


def test_drafted_answers_have_the_distribution_of_undrafted_ones():
    statistic, bound = chi_square(sampled(0, seed=1), sampled(4, seed=2))
    assert statistic < bound


def test_the_statistic_finds_a_wrong_acceptance_rule(monkeypatch):
    """A rule that accepts any draft token half of the time exceeds the bound."""
    read = NudgedDecoder._read

    def read_too_kindly(self, work):
        before = {row.number: len(row.predictions) for row in work.rows}
        read(self, work)
        for row in work.rows:
            said = row.predictions._said
            for place in range(before[row.number], len(row.predictions.read)):
                if fold_in(row.seed, place) % 2:
                    said[place] = said[place]._replace(token=row.predictions.read[place])

    undrafted = sampled(0, seed=1)
    monkeypatch.setattr(NudgedDecoder, "_read", read_too_kindly)
    statistic, bound = chi_square(undrafted, sampled(4, seed=2))
    assert statistic > bound


@pytest.mark.parametrize("threshold", [0, 1.01], ids=["base", "nudging model"])
def test_each_row_and_each_place_has_a_draw_of_its_own(threshold):
    """The model that writes has the same flat distribution everywhere. Where the base does, it is asked at once."""
    tokenizer = byte_bpe()
    flat, word = 1 / len(tokenizer), Vocabulary(tokenizer).encode_after("a", " the")[0]
    base = ScriptedLM(tokenizer, lambda ids: (word, flat))
    nudging_model = ScriptedLM(tokenizer, lambda ids: (word, flat if threshold > 1 else 1 - 1e-9))
    nudging_model.generation_config.do_sample = True
    answers = nudging_hf.generate(
        base,
        torch.tensor([[5]]),
        nudging_model=nudging_model,
        tokenizer=tokenizer,
        nudging_tokenizer=tokenizer,
        nudge_threshold=threshold,
        takeover_on_agreement=False,
        do_sample=True,
        use_cache=False,
        max_new_tokens=30,
        num_return_sequences=3,
    )[:, 1:].tolist()
    for i in range(1, 4):  # Also where one answer has just one token more or less than another.
        assert len({tuple(ids[i:][:10]) for ids in answers} | {tuple(ids[i + 1 :][:10]) for ids in answers}) == 6
    assert all(len(set(ids)) > 12 for ids in answers)


def test_each_model_draws_by_keys_of_its_own(monkeypatch):
    """In a vocabulary of eight tokens, many ids of one model are places of the other."""
    keys = {predicting: set(), writing: set()}
    for module, own in keys.items():

        def choose_and_note(scores, given, own=own):
            own.update(given)
            return choose(scores, given)

        monkeypatch.setattr(module, "choose", choose_and_note)
    sampled(0, seed=1)
    assert len(keys[predicting]) > ROWS and len(keys[writing]) > ROWS
    assert keys[predicting].isdisjoint(keys[writing])


def test_a_draw_has_the_distribution_of_its_scores():
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0, float("-inf")])
    draws = 20000
    tokens, _ = choose(scores.expand(draws, 5), [fold_in(11, i) for i in range(draws)])
    expected = scores.softmax(-1) * draws
    counts = torch.bincount(tokens, minlength=5)
    assert counts[4] == 0
    statistic = ((counts - expected)[:4] ** 2 / expected[:4]).sum()
    assert statistic < 16.27  # The 0.999 quantile for three degrees of freedom.


def test_a_draw_is_a_function_of_its_key():
    scores = torch.randn(4, 50)
    keys = [1, None, 2, 3]
    tokens, best = choose(scores, keys)
    assert tokens.tolist() == [choose(scores[i : i + 1], [keys[i]])[0].item() for i in range(4)]
    assert tokens[1] == scores[1].argmax() and torch.equal(best, scores.amax(dim=-1))
    assert len({choose(torch.zeros(1, 1000), [key])[0].item() for key in range(20)}) > 15


def test_a_greedy_row_takes_the_greatest_score_beside_a_row_that_samples():
    """Also where the probabilities of two scores are the same number."""
    scores = torch.tensor([[0.1, 0.1], [0.0, 0.0]])
    scores[0, 1] = torch.nextafter(scores[0, 1], torch.tensor(1.0))
    assert choose(scores, [None, 5])[0][0] == choose(scores, [None, None])[0][0] == 1


def test_keys_mix_well():
    assert len({fold_in(a, b) for a in range(100) for b in range(100)}) == 10000
    assert fold_in(1, 2) != fold_in(2, 1)
