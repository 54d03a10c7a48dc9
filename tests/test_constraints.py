"""Neither model writes what the caller's logits processors forbid, whatever the drafts and the batch."""

import itertools

import pytest
import torch
from running import (
    KINDS,
    SOME_DRAFT_LENGTHS,
    ForbidTokens,
    decode_in_every_way,
    decode_with_oracle,
    inputs_of,
    nudge,
    outcomes,
    random_rule,
)
from tiny import pair, prompts
from transformers import LogitsProcessor, TextIteratorStreamer
from transformers.generation import (
    ExponentialDecayLengthPenalty,
    TopKLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import nudging_hf


def often_written(chosen, given, n: int = 6, **settings) -> list[int]:
    """The `n` tokens other than EOS that the answers have most often if nothing is forbidden."""
    results = nudge(chosen, *given, max_new_tokens=30, **settings)
    written = [token for result in results for token in result.ids if token != chosen.tokenizer.eos_token_id]
    return sorted(set(written), key=lambda token: (-written.count(token), token))[:n]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bad_words_ids", "suppress_tokens", "sequence_bias", "begin_suppress_tokens"])
def test_a_forbidden_token_is_written_by_neither_model(kind, name):
    seed = len(name) % 4
    chosen = pair("qwen3", seed, kind)
    given = prompts(chosen, 2, seed)
    tokens = often_written(chosen, given, nudge_threshold=0.6)
    value = {
        "bad_words_ids": [[token] for token in tokens],
        "sequence_bias": [[[token], float("-inf")] for token in tokens],
    }.get(name, tokens)
    answers = decode_in_every_way(chosen, *given, max_new_tokens=20, nudge_threshold=0.6, **{name: value})
    assert any(any(nudged) for _, nudged, _ in answers)
    for ids, _, _ in answers:
        assert set(ids[:1] if name == "begin_suppress_tokens" else ids).isdisjoint(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forbidden_sequence_is_written_by_neither_model_nor_by_both_together(kind):
    chosen = pair("llama", 0, kind)
    for seed in range(2):
        given = prompts(chosen, 2, seed)
        free = nudge(chosen, *given, max_new_tokens=24, nudge_threshold=0.6)
        pairs = {pair for result in free for pair in itertools.pairwise(result.ids) if 0 not in pair}
        bad = sorted(pairs - {p for p in pairs if chosen.tokenizer.eos_token_id in p})
        answers = decode_in_every_way(
            chosen, *given, max_new_tokens=24, nudge_threshold=0.6, bad_words_ids=[list(pair) for pair in bad]
        )
        for ids, _, _ in answers:
            assert set(itertools.pairwise(ids)).isdisjoint(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_no_n_gram_is_repeated_by_either_model(kind):
    chosen = pair("llama", 0, kind)
    base_prompts, nudging_prompts = prompts(chosen, 2, 1)
    answers = decode_in_every_way(
        chosen, base_prompts, nudging_prompts, max_new_tokens=40, nudge_threshold=0.6, no_repeat_ngram_size=2
    )
    for prompt, (ids, _, reason) in zip(base_prompts, answers, strict=True):
        written = list(itertools.pairwise(prompt + (ids[:-1] if reason == "eos" else ids)))[len(prompt) - 1 :]
        before = list(itertools.pairwise(prompt))
        assert len(set(written)) == len(written) and set(before).isdisjoint(written)


@pytest.mark.parametrize("threshold", [0, 0.4, 1.01])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_constrained_answers_are_those_of_a_plain_decoder(kind, seed, threshold):
    """The caller's own processor forbids random tokens after any ids, sometimes EOS too."""
    chosen = pair("llama", seed, kind)
    [prompt], [nudging_prompt] = prompts(chosen, 1, seed)
    shares = (0.02, 0.1, 0.5) if kind == "two" else (0.1, 0.5, 0.9)
    rule = random_rule(chosen.tokenizer.eos_token_id, len(chosen.tokenizer), seed, shares)
    settings = {"max_new_tokens": 24}
    answer = decode_in_every_way(
        chosen,
        [prompt],
        [nudging_prompt],
        nudge_threshold=threshold,
        logits_processor=[ForbidTokens(len(prompt), rule)],
        **settings,
    )
    expected = decode_with_oracle(
        chosen, prompt, nudging_prompt, nudge_threshold=threshold, forbidden=rule, **settings
    )
    assert answer == outcomes([expected])
    written = expected.ids
    assert all(token not in rule(written[:i]) for i, token in enumerate(written))


@pytest.mark.parametrize("kind", KINDS)
def test_an_allowed_set_binds_every_token_of_its_row(kind):
    chosen = pair("qwen3", 3, kind)
    given = prompts(chosen, 2, 3)
    eos, size = chosen.tokenizer.eos_token_id, len(chosen.tokenizer)
    sets = [[*range(40, size, 2), eos], [*range(41, size, 2), eos]]
    fits = {"prefix_allowed_tokens_fn": lambda row, ids: sets[row], "max_new_tokens": 24, "nudge_threshold": 0.6}
    answers = [outcomes(nudge(chosen, *given, num_draft_tokens=drafts, **fits)) for drafts in SOME_DRAFT_LENGTHS]
    assert answers[1:] == answers[:1] * 3
    for (ids, _, _), allowed in zip(answers[0], sets, strict=True):
        assert set(ids) <= set(allowed)
    several = nudging_hf.generate(
        chosen.base, **inputs_of(chosen, *given), **fits, do_sample=True, num_return_sequences=2
    )
    pad = chosen.tokenizer.pad_token_id
    for i, ids in enumerate(several[:, max(map(len, given[0])) :].tolist()):
        assert set(ids) <= {*sets[i // 2], pad}


class Json:
    """A grammar over tokens of one letter, for `prefix_allowed_tokens_fn`: {"a":1,...} and then EOS.

    It must never be asked about a text that it has not allowed, and raises a `KeyError` if it is.
    """

    def __init__(self, tokenizer, prompt_length: int):
        self.prompt_length = prompt_length
        self.eos = tokenizer.eos_token_id
        self.ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in '{}":,1234567890abcdeinort'}
        self.letters = {i: letter for letter, i in self.ids.items()}

    def next_letters(self, text: str) -> str:
        letters, digits = "abcdeinort", "1234567890"
        if text == "":
            return "{"
        if text.endswith("}"):
            return ""
        if text[-1] in "{,":
            return '"'
        if text.count('"') % 2:
            return letters + ('"' if text[-1] != '"' else "")
        if text[-1] == '"':
            return ":"
        return digits if text[-1] == ":" else digits[:3] + ",}"

    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        text = "".join(self.letters[i] for i in ids[self.prompt_length :].tolist())
        return [self.ids[letter] for letter in self.next_letters(text)] or [self.eos]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampled"])
def test_a_grammar_binds_the_whole_answer(kind, samples):
    complete = tried = 0
    for seed in (0, 2, 3) if kind == "shared" else range(6):
        chosen = pair("llama", seed, kind)
        if "{" not in chosen.tokenizer.get_vocab() or "##a" in chosen.tokenizer.get_vocab():
            continue  # Its alphabet is too small, or it is WordPiece, where a single letter begins a word.
        given = prompts(chosen, 2, seed)
        width = max(map(len, given[0]))
        grammar = Json(chosen.tokenizer, width)
        tried += 1
        answers = []
        for drafts in SOME_DRAFT_LENGTHS:
            torch.manual_seed(seed)
            answers.append(
                outcomes(
                    nudge(
                        chosen,
                        *given,
                        max_new_tokens=30,
                        num_draft_tokens=drafts,
                        do_sample=samples,
                        prefix_allowed_tokens_fn=grammar,
                    )
                )
            )
        assert answers[1:] == answers[:1] * 3
        for ids, _, reason in answers[0]:
            end = reason == "eos"
            text = "".join(grammar.letters[i] for i in (ids[:-1] if end else ids))
            assert all(letter in grammar.next_letters(text[:i]) for i, letter in enumerate(text))
            assert end == text.endswith("}")
            complete += end
    assert tried > 1 and (complete or not samples)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_and_streamed_answers_are_bound_too(kind):
    chosen = pair("llama", 0, kind)
    given = prompts(chosen, 1, 2)
    tokens = often_written(chosen, given, n=12)
    chosen.nudging_model.generation_config.do_sample = True
    try:
        for seed in range(3):
            answers = []
            for drafts in SOME_DRAFT_LENGTHS:
                torch.manual_seed(seed)
                settings = {"do_sample": True, "temperature": 1.5, "suppress_tokens": tokens, "max_new_tokens": 24}
                answers.append(outcomes(nudge(chosen, *given, num_draft_tokens=drafts, **settings)))
            assert answers[1:] == answers[:1] * 3
            assert set(answers[0][0][0]).isdisjoint(tokens)
    finally:
        chosen.nudging_model.generation_config.do_sample = False
    streamer = TextIteratorStreamer(chosen.tokenizer, skip_prompt=True, timeout=30, skip_special_tokens=True)
    settings = {"suppress_tokens": tokens, "max_new_tokens": 24}
    ids = nudging_hf.generate(chosen.base, **inputs_of(chosen, *given), **settings, streamer=streamer)
    assert set(ids[0, len(given[0][0]) :].tolist()).isdisjoint(tokens)
    assert "".join(streamer) == chosen.tokenizer.decode(ids[0, len(given[0][0]) :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_if_only_eos_is_allowed(kind):
    chosen = pair("llama", 0, kind)
    [prompt], [nudging_prompt] = prompts(chosen, 1, 0)
    eos, size = chosen.tokenizer.eos_token_id, len(chosen.tokenizer)
    rest = frozenset(range(size)) - {eos}

    def rule(ids):
        return rest if len(ids) >= 5 else frozenset({eos})

    [(ids, nudged, reason)] = decode_in_every_way(
        chosen,
        [prompt],
        [nudging_prompt],
        max_new_tokens=20,
        nudge_threshold=0.9,
        logits_processor=[ForbidTokens(len(prompt), rule)],
    )
    assert (len(ids), ids[-1], nudged[-1], reason) == (6, eos, False, "eos")


def test_the_base_goes_on_if_the_nudging_model_may_draw_nothing():
    """The nudging model never draws a control token, so if nothing else is allowed, the base writes it."""
    chosen = pair("llama", 0, "shared")
    given = prompts(chosen, 1, 0)
    bos, eos = chosen.tokenizer.bos_token_id, chosen.tokenizer.eos_token_id
    width = len(given[0][0])
    [result] = nudge(
        chosen,
        *given,
        max_new_tokens=6,
        prefix_allowed_tokens_fn=lambda row, ids: [bos] if len(ids) < width + 3 else [*range(30, 300), eos],
    )
    assert result.ids[:3] == [bos] * 3 and result.nudged[:3] == [False] * 3


def test_a_processor_that_depends_on_scores_is_refused_unless_it_is_a_warper():
    chosen = pair("llama", 0, "shared")
    given = prompts(chosen, 1, 0)

    class Nucleus(LogitsProcessor):
        def __call__(self, input_ids, scores):
            ordered, order = scores.softmax(-1).sort(descending=True)
            out = (ordered.cumsum(-1) > 0.5).scatter(1, order, ordered.cumsum(-1) > 0.5)
            return scores.masked_fill(out, float("-inf"))

    class Greatest(TopKLogitsWarper):
        pass

    with pytest.raises(ValueError, match=r"Nucleus that forbids tokens by their scores.*`top_p`"):
        nudge(chosen, *given, max_new_tokens=6, logits_processor=[Nucleus()])
    free = nudge(chosen, *given, max_new_tokens=12)
    assert outcomes(nudge(chosen, *given, max_new_tokens=12, logits_processor=[Greatest(3)])) == outcomes(free)


def test_soft_processors_shape_the_base_alone():
    """If the base never reaches the threshold, a penalty of the call does not change the nudging model's words."""
    chosen = pair("llama", 0, "shared")
    given = prompts(chosen, 2, 1)
    settings = {"max_new_tokens": 24, "nudge_threshold": 1.01, "takeover_on_agreement": False}
    free = nudge(chosen, *given, **settings)
    biased = {"repetition_penalty": 2.0, "sequence_bias": [[[50], 9.0]], "do_sample": True, "top_k": 1, "top_p": 0.3}
    eos = chosen.tokenizer.eos_token_id
    for with_penalty, without in zip(nudge(chosen, *given, **settings, **biased), free, strict=True):
        n = min(len(with_penalty.ids), len(without.ids))
        assert with_penalty.ids[:n] == without.ids[:n] or eos in without.ids


def test_processors_that_nudging_cannot_obey_are_refused():
    chosen = pair("llama", 0, "shared")
    given = prompts(chosen, 1, 0)
    with pytest.raises(ValueError, match=r"`exponential_decay_length_penalty`.*only the nudging model ends.*max_new"):
        nudge(chosen, *given, max_new_tokens=6, exponential_decay_length_penalty=(4, 1.2))
    with pytest.raises(ValueError, match=r"`exponential_decay_length_penalty`"):
        nudge(chosen, *given, max_new_tokens=6, logits_processor=[ExponentialDecayLengthPenalty((2, 1.1), 2, 1)])
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, chosen.base)
    with pytest.raises(ValueError, match=r"UnbatchedClassifierFreeGuidance.*logits_processor"):
        nudge(chosen, *given, max_new_tokens=6, logits_processor=[guidance])


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance_scale", 1.5), ("watermarking_config", {"greenlist_ratio": 0.25, "bias": 2.0})],
    ids=["guidance_scale", "watermarking_config"],
)
def test_a_nudging_model_with_stateful_processors_is_refused(name, value):
    chosen = pair("llama", 0, "shared")
    given = prompts(chosen, 1, 0)
    config = chosen.nudging_model.generation_config
    setattr(config, name, value)
    try:
        with pytest.raises(ValueError, match=rf"`nudging_model.generation_config.{name}`"):
            nudge(chosen, *given, max_new_tokens=6)
    finally:
        setattr(config, name, None)
