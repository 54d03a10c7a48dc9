"""A row's logits depend on its own text only: not on what it read before, and not on the other rows."""

import random

import pytest
import torch
import transformers
from architectures import MODEL_TYPES, tiny
from packaging.version import Version
from tiny import pair
from transformers import GenerationConfig, PreTrainedModel

from nudging_hf.core import cache_layers, cached_lm
from nudging_hf.core.cached_lm import CachedLM, Reading, StaticCacheSettings
from nudging_hf.core.reading_mode import reading_mode

GATHER_SLOTS = cache_layers.gather_slots
ARCHITECTURES = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "olmo2"]


def uncached_logits(model, ids: list[int], keep: int) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0, -keep:]


def changed_texts(draw: random.Random, texts: list[list[int]]) -> list[list[int]]:
    """Removes up to 12 of each text's last ids, or none, and appends 1 to 9 random ids."""
    return [
        text[: max(1, len(text) - draw.choice([0, 0, 1, 3, 12]))]
        + [draw.randrange(5, 300) for _ in range(draw.randint(1, 9))]
        for text in texts
    ]


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cached_logits_equal_uncached_logits(arch, cache):
    model = pair(arch, 0, "shared").base
    draw = random.Random(arch)
    static = (
        StaticCacheSettings(max_new_tokens=150, generation_config=GenerationConfig()) if cache == "static" else None
    )
    lm = CachedLM(model, rows=4, use_cache=cache is not None, static=static)
    texts = [[draw.randrange(5, 300) for _ in range(n)] for n in (3, 17, 9, 30)]
    active = {0, 1, 2, 3}
    for step in range(12):
        if step == 8:
            lm.release(1)
            active.remove(1)
        texts = changed_texts(draw, texts)
        reading = [row for row in sorted(active) if draw.random() < 0.7] or [min(active)]
        keeps = {row: draw.randint(1, min(4, len(texts[row]))) for row in reading}
        logits = lm.read({row: Reading(list(texts[row]), keeps[row]) for row in reading})
        assert set(logits) == set(reading)
        for row in reading:
            # Gemma2 computes its softmax in float32 whatever the model's dtype.
            torch.testing.assert_close(logits[row], uncached_logits(model, texts[row], keeps[row]), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_static_cache_grows_when_texts_become_longer_than_planned(arch, monkeypatch):
    monkeypatch.setattr(cached_lm, "_STATIC_LENGTH_STEP", 64)
    model = pair(arch, 0, "shared").base
    draw = random.Random(arch)
    lm = CachedLM(model, rows=2, static=StaticCacheSettings(max_new_tokens=1, generation_config=GenerationConfig()))
    texts = [[5, 6, 7], [8, 9]]
    lengths = set()
    for _ in range(12):
        texts = [text + [draw.randrange(5, 300) for _ in range(draw.randint(1, 60))] for text in texts]
        logits = lm.read({row: Reading(list(text), 2) for row, text in enumerate(texts)})
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row], uncached_logits(model, text, 2), rtol=0, atol=1e-5)
        lengths.add(lm._slots.max_cache_len)
    assert 1 < len(lengths) < 5


@torch.no_grad()
def test_the_next_text_reuses_a_static_cache():
    model = pair("llama", 0, "shared").base
    static = StaticCacheSettings(max_new_tokens=20, generation_config=GenerationConfig())
    caches = []
    for text in ([5, 6, 7, 8], [9, 10, 11]):
        lm = CachedLM(model, rows=1, static=static)
        logits = lm.read({0: Reading(text, 2)})
        torch.testing.assert_close(logits[0], uncached_logits(model, text, 2), rtol=0, atol=1e-9)
        caches.append(lm._slots.cache.layers[0].keys.data_ptr())
        lm.release(0)
    two_at_once = CachedLM(model, rows=1, static=static), CachedLM(model, rows=1, static=static)
    for lm in two_at_once:
        lm.read({0: Reading([5, 6], 1)})
        caches.append(lm._slots.cache.layers[0].keys.data_ptr())
    assert caches[0] == caches[1] == caches[2] != caches[3]


@torch.no_grad()
def test_prompts_of_very_different_lengths_need_few_logits():
    model = pair("llama", 0, "shared").base
    draw = random.Random(0)
    texts = [[draw.randrange(5, 300) for _ in range(n)] for n in (2, 150, 40)]
    widths = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    lm = CachedLM(model, rows=3)
    logits = lm.read({row: Reading(text, 2) for row, text in enumerate(texts)})
    handle.remove()
    assert max(widths) <= 64
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], uncached_logits(model, text, 2), rtol=0, atol=1e-9)
    assert lm.tokens_fed == sum(map(len, texts))


@torch.no_grad()
@pytest.mark.parametrize("max_logit_columns", [64, 4])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_first_texts_are_read_in_groups_of_similar_length(arch, max_logit_columns, monkeypatch):
    monkeypatch.setattr(cached_lm, "_MAX_PREFILL_TOKENS_ON_CPU", 40)
    monkeypatch.setattr(cached_lm, "_MAX_LOGIT_COLUMNS", max_logit_columns)
    model = pair(arch, 0, "shared").base
    draw = random.Random(arch)
    lm = CachedLM(model, rows=6)
    texts = [[draw.randrange(5, 300) for _ in range(n)] for n in (9, 41, 3, 30, 12, 11)]
    fed = []
    handle = model.register_forward_pre_hook(lambda _, args, kw: fed.append(kw["input_ids"].shape), with_kwargs=True)
    logits = lm.read({row: Reading(texts[row], 2) for row in (0, 1, 2, 3, 5)})  # Row 4 does not read.
    handle.remove()
    assert fed == [(1, 41), (1, 30), *([(3, 11)] if max_logit_columns == 64 else [(3, 9), (3, 2)])]
    assert (lm.forward_passes, lm.tokens_fed, lm.last_shape) == (len(fed), 94, None)
    for turn in range(3):
        for row in logits:
            torch.testing.assert_close(logits[row], uncached_logits(model, texts[row], 2), rtol=0, atol=1e-9)
        if turn == 1:
            lm.release(3)
        texts = changed_texts(draw, texts)
        logits = lm.read({row: Reading(list(texts[row]), 2) for row in (0, 1, 2, 3, 4, 5) if row != 3 or turn < 1})
    assert max_logit_columns == 4 or lm.last_shape is not None


@torch.no_grad()
def test_a_pass_does_not_copy_a_cache_with_spare_slots():
    model = pair("llama", 0, "shared").base
    lm = CachedLM(model, rows=2)
    text, places = [5, 6, 7], set()
    for _ in range(200):
        text = [*text, 8]
        lm.read({row: Reading(text, 1) for row in range(2)})
        places.add(lm._slots.cache.layers[0].keys.data_ptr())
    assert len(places) < 15
    torch.testing.assert_close(
        lm.read({0: Reading([*text, 9], 1)})[0], uncached_logits(model, [*text, 9], 1), rtol=0, atol=1e-9
    )


@torch.no_grad()
def test_no_token_is_read_twice():
    model = pair("llama", 0, "shared").base
    lm = CachedLM(model, rows=1)
    lm.read({0: Reading([5, 6, 7, 8], 1)})
    assert (lm.forward_passes, lm.tokens_fed) == (1, 4)
    lm.read({0: Reading([5, 6, 7, 9, 10], 2)})
    assert (lm.forward_passes, lm.tokens_fed) == (2, 6)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_a_cache_has_few_more_slots_than_its_longest_row_has_tokens(arch):
    model = pair(arch, 0, "shared").base
    draw = random.Random(1)
    lm = CachedLM(model, rows=3)
    texts = [[draw.randrange(5, 300) for _ in range(n)] for n in (4, 9, 6)]
    max_new = 9 + 12 + 1
    for _ in range(60):
        texts = changed_texts(draw, texts)
        lm.read({row: Reading(list(text), 1) for row, text in enumerate(texts)})
        longest = max(map(len, texts))
        assert lm._slots.cache.get_seq_length() <= (1.25 * longest + 64 if arch == "llama" else longest) + max_new


@torch.no_grad()
def test_most_passes_do_not_realign_the_cache(monkeypatch):
    copies = []
    monkeypatch.setattr(
        cache_layers, "gather_slots", lambda states, source: copies.append(1) or GATHER_SLOTS(states, source)
    )
    model = pair("llama", 0, "shared").base
    draw = random.Random(1)
    lm = CachedLM(model, rows=3)
    texts = [[draw.randrange(5, 300) for _ in range(n)] for n in (40, 90, 60)]
    for _ in range(100):
        texts = changed_texts(draw, texts)
        lm.read({row: Reading(list(text), 1) for row, text in enumerate(texts)})
    layers = 2 * model.config.num_hidden_layers
    assert 0 < len(copies) / layers < 10
    before = len(copies)
    single = CachedLM(model, rows=1)
    for _ in range(20):
        texts = changed_texts(draw, texts)
        single.read({0: Reading(list(texts[0]), 1)})
    assert len(copies) == before


# Recurrent states, indexers, positions counted by the cache --------------------------------------------------------

# Models with a recurrent state (beside attention layers, inside them, without any, and with one token per pass), with
# an indexer, with positions counted by the cache, and with a cache of their own class.
KINDS = ["qwen3_next", "falcon_h1", "lfm2", "mamba", "jamba", "mamba2", "zamba2", "deepseek_v32", "bart", "bloom"]
KINDS += ["minimax", "deepseek_v4", "xlstm", "rwkv"]
REFUSED_ON_OLDER_VERSIONS = {"deepseek_v32", "deepseek_v4", "zamba2"}


def supported_model(kind: str) -> PreTrainedModel:
    """A tiny model. Skips the test where transformers does not have the kind or this version caches it wrongly."""
    if kind not in MODEL_TYPES:
        pytest.skip("not in this version of transformers")
    model = tiny(kind, seed=0)
    mode = reading_mode(model)
    if mode.cache_problem is not None or not mode.is_causal:
        assert kind in REFUSED_ON_OLDER_VERSIONS and Version(transformers.__version__) < Version("5.17")
        pytest.skip("refused on this version of transformers")
    return model


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Allows for the rounding of layers that compute in float32 whatever the model's dtype."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_uncached_logits_for_other_kinds_of_caches(kind):
    model = supported_model(kind)
    draw = random.Random(kind)
    lm = cached_lm.cached_lm(model, rows=4)
    texts = [[draw.randrange(5, 300) for _ in range(n)] for n in (3, 17, 9, 17)]
    active = {0, 1, 2, 3}
    for step in range(8):
        if step == 6:
            lm.release(1)
            active.remove(1)
        reading = [row for row in sorted(active) if draw.random() < 0.7] or [min(active)]
        keeps = {row: draw.randint(1, min(4, len(texts[row]))) for row in reading}
        settled = {row: max(1, len(texts[row]) - draw.choice([0, 2, 12])) for row in reading}
        logits = lm.read({row: Reading(list(texts[row]), keeps[row], settled[row]) for row in reading})
        assert set(logits) == set(reading)
        for row in reading:
            assert_close(logits[row], uncached_logits(model, texts[row], keeps[row]))
        texts = changed_texts(draw, texts)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v4"])
def test_a_rejected_draft_costs_no_further_pass_with_a_recurrent_state(kind):
    """The pass that reads the next draft also reads the accepted tokens again."""
    model = supported_model(kind)
    lm = CachedLM(model, rows=1)
    text = list(range(5, 15))
    lm.read({0: Reading(text, 1, len(text))})
    text = [*text, 49]
    for accepted in (0, 2, 1):
        passes, fed, unread = lm.forward_passes, lm.tokens_fed, lm.num_unread(0, text)
        draft = [40, 41, 42]
        logits = lm.read({0: Reading([*text, *draft], 4, len(text))})
        assert_close(logits[0], uncached_logits(model, [*text, *draft], 4))
        assert lm.forward_passes == passes + 1 and lm.tokens_fed == fed + unread + len(draft)
        text = [*text, *draft[:accepted], 50 + accepted]


@torch.no_grad()
def test_accepted_tokens_are_seldom_read_again_with_a_recurrent_state():
    """Many accepted tokens have a pass of their own, so passes do not widen when every draft is rejected."""
    model = tiny("qwen3_next", seed=0)
    lm = CachedLM(model, rows=1)
    text, widest, passes = list(range(5, 15)), 0, 0
    for step in range(60):
        fed, before = lm.tokens_fed, lm.forward_passes
        lm.read({0: Reading([*text, 300, 301, 302], 4, len(text))})
        if step:
            widest, passes = max(widest, lm.tokens_fed - fed), passes + lm.forward_passes - before
        text = [*text, 20 + step]
    assert widest <= 2 + 16 + 3 + 1
    assert passes <= 59 * 1.1


def join_and_leave(model, lm, draw: random.Random, places: int, steps: int) -> None:
    """Rows join and leave between readings. Each row's logits must be those of its text alone."""
    texts, next_row = {}, 0
    for _ in range(steps):
        while len(texts) < places and draw.random() < 0.6:
            lm.admit(next_row)
            texts[next_row] = [draw.randrange(5, 300) for _ in range(draw.choice([1, 4, 4, 15, 60]))]
            next_row += 1
        reading = [row for row in texts if draw.random() < 0.7]
        for row in reading:
            [texts[row]] = changed_texts(draw, [texts[row]])
        if reading:
            keeps = {row: draw.randint(1, min(4, len(texts[row]))) for row in reading}
            logits = lm.read({row: Reading(list(texts[row]), keeps[row], len(texts[row]) - 1) for row in reading})
            assert set(logits) == set(reading)
            for row in reading:
                assert_close(logits[row], uncached_logits(model, texts[row], keeps[row]))
        for row in list(texts):
            if draw.random() < 0.3:
                lm.release(row)
                del texts[row]
    for row in texts:
        lm.release(row)
    assert next_row > places + 2


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "olmo2"])
def test_rows_join_and_leave(arch, cache):
    model = pair(arch, 0, "shared").base
    static = None
    if cache == "static":
        static = StaticCacheSettings(max_new_tokens=60, generation_config=GenerationConfig(), places=5)
    lm = CachedLM(model, 0, use_cache=cache is not None, static=static)
    join_and_leave(model, lm, random.Random(f"{arch} {cache}"), places=5, steps=40)
    if cache != "static":
        assert lm._slots is None and not lm._rows and not lm._cached_ids


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_join_and_leave_other_kinds_of_caches(kind):
    model = supported_model(kind)
    join_and_leave(model, cached_lm.cached_lm(model, 0), random.Random(kind), places=4, steps=15)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "rows"), [("qwen3_next", 3), ("xlstm", 1)])
def test_at_most_two_states_are_saved_for_each_row(kind, rows):
    model = tiny(kind, seed=0)
    lm = CachedLM(model, rows=rows)
    draw = random.Random(0)
    texts = [[draw.randrange(5, 300) for _ in range(9)] for _ in range(rows)]
    for _ in range(12):
        lm.read({row: Reading(list(text), 1, len(text) - 1) for row, text in enumerate(texts)})
        texts = changed_texts(draw, texts)
        assert all(len(saved) <= 2 for saved in lm._slots._saved)
