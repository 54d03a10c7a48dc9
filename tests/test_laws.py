"""The laws of nudging, over random pairs in float64: for every model, threshold, draft length and prompt."""

import itertools
import random

import pytest
import torch
from running import (
    DRAFT_LENGTHS,
    KINDS,
    UNSPACED,
    assert_same,
    decode_with_oracle,
    inputs_of,
    nudge,
    outcomes,
    pair_with_prompts,
)
from transformers import TextIteratorStreamer

import nudging_hf
from nudging_hf.core.draft_policy import GuessLength

ARCHITECTURES = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "olmo2"]
THRESHOLDS = [0, 0.2, 0.4, 0.7, 1.01]
EVERY_PAIR = list(itertools.product(ARCHITECTURES, KINDS))


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(("arch", "kind"), EVERY_PAIR)
def test_answers_are_those_of_a_plain_decoder(arch, kind, threshold):
    """Batched, cached and drafted answers equal those of an oracle without batch, cache or draft."""
    draw = random.Random(f"{arch} {kind} {threshold}")
    chosen, base_prompts, nudging_prompts = pair_with_prompts(arch, kind, draw.randrange(12), rows=draw.randint(1, 5))
    settings = {"max_new_tokens": draw.choice([7, 24, 32]), "takeover_on_agreement": draw.random() < 0.8}
    if kind == "shared":
        settings["min_new_tokens"] = draw.choice([0, 5])
    settings["num_nudging_tokens"] = draw.choice([1, 3, 16])
    results = nudge(
        chosen,
        base_prompts,
        nudging_prompts,
        nudge_threshold=threshold,
        num_draft_tokens=draw.choice(DRAFT_LENGTHS),
        **settings,
    )
    for prompt, nudging_prompt, result in zip(base_prompts, nudging_prompts, results, strict=True):
        expected = decode_with_oracle(chosen, prompt, nudging_prompt, nudge_threshold=threshold, **settings)
        assert outcomes([result]) == outcomes([expected])
        for place, probability in expected.top1.items():
            if place < len(result.ids):
                assert result.top1[place] == pytest.approx(probability, abs=1e-5)


@pytest.mark.parametrize("kind", UNSPACED)
@pytest.mark.parametrize("seed", range(4))
def test_words_of_unspaced_text_keep_the_laws(kind, seed):
    """A plain decoder with a rule of its own writes the same, whatever was drafted, and so does a row alone."""
    draw = random.Random(f"{kind} {seed}")
    chosen, *given = pair_with_prompts(ARCHITECTURES[seed], kind, seed, rows=2)
    settings = {
        "word_boundary": "unicode",
        "max_new_tokens": 20,
        "num_nudging_tokens": draw.choice([1, 3, 8, 16]),
        "takeover_on_agreement": draw.random() < 0.8,
    }
    for threshold in (draw.choice([0.3, 0.5, 1.01]), None):
        auto = {"nudge_threshold": "auto", "target_nudge_rate": 0.3} if threshold is None else {}
        own = {"nudge_threshold": threshold, **settings, **auto}
        answers = [outcomes(nudge(chosen, *given, num_draft_tokens=length, **own)) for length in (0, 4, "adaptive")]
        assert answers[1:] == answers[:1] * 2
        for i, prompts in enumerate(zip(*given, strict=True)):
            target = 0.3 if threshold is None else None
            expected = decode_with_oracle(chosen, *prompts, nudge_threshold=threshold, target=target, **settings)
            assert outcomes([expected]) == answers[0][i : i + 1]


@pytest.mark.parametrize(("arch", "kind"), EVERY_PAIR)
def test_drafted_is_sequential(arch, kind):
    chosen, base_prompts, nudging_prompts = pair_with_prompts(arch, kind, seed=1, rows=2)
    for i, threshold in enumerate(THRESHOLDS):
        answers = [
            nudge(
                chosen, base_prompts, nudging_prompts, max_new_tokens=24, nudge_threshold=threshold, num_draft_tokens=k
            )
            for k in (0, DRAFT_LENGTHS[1 + i % 4], DRAFT_LENGTHS[1 + (i + 2) % 4])
        ]
        for results in answers[1:]:
            assert_same(results, answers[0])


@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_guesses_change_nothing(kind, samples, monkeypatch):
    """The nudging model writes the same whether the guesses that it reads are right or wrong."""
    found = {"right": 0, "wrong": 0}
    observe = GuessLength.observe

    def observe_and_count(self, hits, guessed):
        found["right"] += hits
        found["wrong"] += guessed - hits
        observe(self, hits, guessed)

    monkeypatch.setattr(GuessLength, "observe", observe_and_count)
    for seed, gate in itertools.product(range(3), ["top1", "rejection"]):
        chosen, base_prompts, nudging_prompts = pair_with_prompts("qwen3", kind, seed, rows=3)
        chosen.nudging_model.generation_config.do_sample = samples
        settings = {"max_new_tokens": 40, "do_sample": samples, "nudge_gate": gate, "min_new_tokens": 4 * (seed % 2)}
        answers = []
        try:
            for drafts, length in [(0, 0), (3, 1), (5, 4), ("adaptive", 16)]:
                monkeypatch.setattr(GuessLength, "choose", lambda self, rows, length=length: length)
                torch.manual_seed(7)
                results = nudge(chosen, base_prompts, nudging_prompts, num_draft_tokens=drafts, **settings)
                answers.append(outcomes(results))
        finally:
            chosen.nudging_model.generation_config.do_sample = False
        assert answers[1:] == answers[:1] * 3
    assert found["right"] > 20 and found["wrong"] > 20


@pytest.mark.parametrize(("arch", "kind"), EVERY_PAIR)
def test_batch_is_singles(arch, kind):
    chosen, base_prompts, nudging_prompts = pair_with_prompts(arch, kind, seed=2, rows=4)
    for threshold in THRESHOLDS:
        settings = {"max_new_tokens": 24, "nudge_threshold": threshold}
        together = nudge(chosen, base_prompts, nudging_prompts, **settings)
        alone = [nudge(chosen, [p], [n], **settings)[0] for p, n in zip(base_prompts, nudging_prompts, strict=True)]
        assert_same(together, alone)


@pytest.mark.parametrize(("arch", "kind"), EVERY_PAIR)
def test_cached_is_recomputed(arch, kind):
    chosen, base_prompts, nudging_prompts = pair_with_prompts(arch, kind, seed=3, rows=3)
    for threshold in (0.2, 0.7):
        settings = {"max_new_tokens": 24, "nudge_threshold": threshold, "num_draft_tokens": 4}
        cached = nudge(chosen, base_prompts, nudging_prompts, **settings)
        recomputed = nudge(chosen, base_prompts, nudging_prompts, use_cache=False, **settings)
        assert_same(cached, recomputed)
    static = nudge(chosen, base_prompts, nudging_prompts, cache_implementation="static", **settings)
    assert_same(static, recomputed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_streamed_is_returned(kind, seed):
    chosen, base_prompts, nudging_prompts = pair_with_prompts("llama", kind, seed, rows=1)
    inputs = inputs_of(chosen, base_prompts, nudging_prompts)
    streamer = TextIteratorStreamer(chosen.tokenizer, skip_prompt=True, timeout=30, skip_special_tokens=True)
    pieces: list[tuple[str, bool]] = []
    marking = nudging_hf.MarkingStreamer(chosen.tokenizer, lambda text, nudged: pieces.append((text, nudged)))
    for each in (streamer, marking):
        ids = nudging_hf.generate(chosen.base, **inputs, max_new_tokens=40, streamer=each)
    text = chosen.tokenizer.decode(ids[0, len(base_prompts[0]) :], skip_special_tokens=True)
    assert "".join(streamer) == text
    # The marking streamer keeps the space of a first token, which some decoders drop.
    assert "".join(piece for piece, _ in pieces).removeprefix(" ") == text.removeprefix(" ")
    assert any(nudged for _, nudged in pieces)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_above_one_the_nudging_model_writes_alone(arch):
    for seed in range(3):
        chosen, base_prompts, nudging_prompts = pair_with_prompts(arch, "shared", seed, rows=1)
        [result] = nudge(
            chosen, base_prompts, nudging_prompts, max_new_tokens=40, nudge_threshold=1.01, takeover_on_agreement=False
        )
        eos = chosen.nudging_model.generation_config.eos_token_id
        others = sorted(set(chosen.nudging_tokenizer.all_special_ids) - {eos})
        own = chosen.nudging_model.generate(
            torch.tensor(nudging_prompts), max_new_tokens=40, do_sample=False, suppress_tokens=others
        )[0, len(nudging_prompts[0]) :].tolist()
        if own[-1] == eos:
            own[-1] = chosen.base.generation_config.eos_token_id  # The end mark is the base's.
        assert result.ids == own


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_at_zero_the_base_goes_on_alone_after_the_first_word(arch):
    for seed in range(3):
        chosen, base_prompts, nudging_prompts = pair_with_prompts(arch, "shared", seed, rows=1)
        [result] = nudge(chosen, base_prompts, nudging_prompts, max_new_tokens=40, nudge_threshold=0)
        first = result.nudged.index(False) if False in result.nudged else len(result.nudged)
        begun = torch.tensor([base_prompts[0] + result.ids[:first]])
        own = chosen.base.generate(begun, max_new_tokens=40, do_sample=False)[0, begun.shape[1] :].tolist()
        eos = chosen.base.generation_config.eos_token_id
        alone = own[: own.index(eos)] if eos in own else own
        written = result.ids[: -1 if result.reason == "eos" else None][first : first + len(alone)]
        if written or not alone:  # Otherwise the nudging model ended the answer in its first lookahead.
            assert written == alone[: len(written)] and not any(result.nudged[first : first + len(written)])
            assert len(written) == len(alone) or len(result.ids) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_answer_depends_on_its_seed_alone(kind):
    """Drafts and the cache do not change a sampled answer either, seed by seed and token by token."""
    chosen, base_prompts, nudging_prompts = pair_with_prompts("llama", kind, seed=4, rows=3)
    chosen.nudging_model.generation_config.do_sample = True
    try:
        answers = []
        for drafts, use_cache in [(0, True), (4, True), ("adaptive", True), (4, False)]:
            torch.manual_seed(7)
            answers.append(
                nudge(
                    chosen,
                    base_prompts,
                    nudging_prompts,
                    max_new_tokens=32,
                    do_sample=True,
                    temperature=0.8,
                    num_draft_tokens=drafts,
                    use_cache=use_cache,
                )
            )
        for results in answers[1:]:
            assert_same(results, answers[0])
        for result in answers[0]:  # Where the base wrote, it wrote what it would have written.
            own = zip(result.ids, result.base_tokens, result.nudged, strict=True)
            assert all(
                token == said
                for token, said, nudged in list(own)[: -1 if result.reason == "eos" else None]
                if not nudged
            )
            assert max(result.base_ranks) > 1
        torch.manual_seed(8)
        other = nudge(chosen, base_prompts, nudging_prompts, max_new_tokens=32, do_sample=True, temperature=0.8)
        assert [r.ids for r in other] != [r.ids for r in answers[0]]
    finally:
        chosen.nudging_model.generation_config.do_sample = False
