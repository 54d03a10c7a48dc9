"""Tests the benchmark: widening keeps the logits, figures match their rows, and interrupted runs continue."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import meters
import racers
import run
import scenarios
import smollm2
import tables
from racers import ADAPTIVE, BASE, OWN, RACERS, SHARED, Work
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from widen import shares, widened, with_larger_heads, with_noise

from nudging_hf.study.bench import rate_against
from nudging_hf.study.meters import PeakMemory, weight_bytes, weights
from nudging_hf.study.reader import Reader


@pytest.fixture(scope="module")
def narrow() -> dict[str, Reader]:
    """The mini pair in float64."""
    found = {}
    for name in racers.widths(1):
        lm = Reader.load(racers.MINI / "models" / name)
        found[name] = Reader(lm.model.double(), lm.tokenizer, chat=True)
    return found


@pytest.fixture(scope="module")
def questions():
    return racers.dev_questions(1)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("copies", [1, 2, 3, 8, 24])
def test_shares_are_powers_of_two_whose_sum_is_one(copies):
    parts = shares(copies)
    assert len(parts) == copies and sum(parts) == 1
    assert all(part.hex().startswith("0x1.0000000000000p") for part in parts)


def norm_in_own_dtype(norm, states):
    return norm.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", [BASE, OWN, SHARED])
def test_a_widened_model_has_the_same_logits(narrow, name, factor, monkeypatch):
    # Llama's own norm squares in float32 for any dtype, and its rounding would hide small differences.
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_own_dtype)
    lm = narrow[name]
    wide = widened(lm.model, factor)
    assert wide.config.hidden_size == factor * lm.model.config.hidden_size
    ids = torch.randint(2, 1000, (2, 40))
    with torch.no_grad():
        logits = lm.model(ids).logits
        assert (wide(ids).logits - logits).abs().max() < 1e-9
    assert logits.abs().max() > 1  # Otherwise the comparison would mean nothing.
    before = sum(each.numel() for each in lm.model.model.layers.parameters() if each.ndim == 2)
    after = sum(each.numel() for each in wide.model.layers.parameters() if each.ndim == 2)
    assert after == factor**2 * before


@torch.no_grad()
@pytest.mark.parametrize("name", [BASE, OWN])
def test_a_model_with_larger_heads_has_the_same_logits(narrow, name):
    model = narrow[name].model
    large = with_larger_heads(model, 2 * model.config.head_dim)
    ids = torch.randint(2, 1000, (2, 300))  # Long, so that rotary frequencies matter.
    expected = model(ids).logits
    # Rotary angles are computed in float32.
    torch.testing.assert_close(large(ids).logits, expected, rtol=0, atol=1e-3)
    assert large.model.layers[0].self_attn.q_proj.weight.shape[0] == 2 * len(
        model.model.layers[0].self_attn.q_proj.weight
    )


def test_widening_does_not_change_the_original_model(narrow):
    model = narrow[SHARED].model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    widened(model, 2)
    assert model.config.hidden_size == 64 and model.config.tie_word_embeddings
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_no_weight_is_rounded_in_bfloat16(narrow):
    model = narrow[SHARED].model.to(torch.bfloat16)
    wide = widened(model, 3)
    own, copies = model.model.layers[0].mlp.up_proj.weight, wide.model.layers[0].mlp.up_proj.weight
    together = copies[: len(own)].double().reshape(len(own), 3, -1).sum(dim=1)
    assert torch.equal(together, own.double())
    model.double()


@torch.no_grad()
def test_one_dnn_gives_the_same_logits_and_its_weights_are_counted():
    plain, quick = (racers.load(BASE, 2, dtype).model for dtype in ("float32", racers.ONEDNN))
    ids = torch.arange(5, 30)[None]
    torch.testing.assert_close(quick(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-3)
    assert weight_bytes(quick) == weight_bytes(plain)
    assert sum(weight.is_mkldnn for weight in weights(quick)) == 7 * plain.config.num_hidden_layers + 1


def test_a_factor_below_one_is_refused(narrow):
    with pytest.raises(ValueError, match="`factor` must be at least 1, got 0"):
        widened(narrow[SHARED].model, 0)


@pytest.mark.parametrize("small", [OWN, SHARED])
def test_a_widened_pair_writes_the_same_nudged_answers(narrow, questions, small):
    wide = {name: Reader(widened(narrow[name].model, 2), narrow[name].tokenizer, chat=True) for name in (BASE, small)}
    work = Work(questions[:2])
    answers = racers.nudged(narrow, work, small, ADAPTIVE)
    assert answers == racers.nudged(wide, work, small, ADAPTIVE)
    assert all(len(answer) > 20 for answer in answers)


def test_a_noise_share_of_0_changes_nothing_and_of_1_leaves_only_noise(narrow):
    model = narrow[SHARED].model
    weight = model.model.layers[0].mlp.up_proj.weight
    same, all_noise = (with_noise(model, share).model.layers[0].mlp.up_proj.weight for share in (0.0, 1.0))
    assert torch.equal(same, weight)
    both = torch.stack([weight.flatten(), all_noise.flatten()])
    assert both.corrcoef()[0, 1].abs() < 0.05 and (all_noise.std() / weight.std() - 1).abs() < 0.05


@pytest.mark.parametrize("small", [OWN, SHARED])
def test_a_contradicting_model_never_agrees_and_writes_short_words(narrow, questions, small):
    lm = narrow[small]
    lms = {BASE: narrow[BASE], small: Reader(widened(racers.contradicting(lm), 1), lm.tokenizer, chat=True)}
    work = Work(questions[:1], threshold=0.0).of_length(40)
    (answer,), output = racers.nudged_output(lms, work, small, ADAPTIVE)
    assert output.nudge_rate.item() < 0.15
    if small == SHARED:
        assert scenarios.own_share(lms[small], questions[0], answer[4:]) < 0.1
        assert scenarios.own_share(lm, questions[0], answer[4:]) > 0.1


@pytest.mark.parametrize("contestant", RACERS, ids=lambda each: each.name)
def test_each_contestant_writes_the_requested_length(narrow, questions, contestant):
    lms = {name: narrow[name] for name in contestant.models}
    rows = 2 if contestant.in_batches else 1
    row, _ = scenarios.measure(contestant, lms, Work(questions[:rows]).of_length(9))
    assert row["lengths"] == [9] * rows
    assert row["large"]["passes"] >= 1 and row["large"]["seconds"] + row["small"]["seconds"] <= row["seconds"]
    assert (row["small"]["passes"] > 0) == (len(contestant.models) > 1)


def test_each_row_of_a_batch_counts_with_its_own_length(narrow, questions):
    row, _ = scenarios.measure(racers.ALONE, {BASE: narrow[BASE]}, Work(questions[:2], lengths=[3, 8]))
    assert row["lengths"] == [3, 8] and row["large"]["passes"] == 8


def test_stepping_both_at_threshold_zero_is_the_base_after_the_first_word(narrow, questions):
    work = Work(questions[:1], threshold=0.0).of_length(12)
    assert racers.stepping_both(narrow, work) == racers.nudged(narrow, work, SHARED, 0)


def test_assisted_generation_writes_the_bases_own_text(narrow, questions):
    work = Work(questions[:1]).of_length(12)
    assert racers.assisted(narrow, work) == racers.base_alone(narrow, work)


def test_a_meter_counts_passes_and_restores_the_model(narrow):
    model = narrow[SHARED].model
    with meters.Meter({"it": model}) as meter:
        model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, min_new_tokens=4, max_new_tokens=4)
    assert "forward" not in vars(model)
    assert (meter.passes["it"].count, meter.passes["it"].fed) == (4, 6)
    assert 0 < meter.passes["it"].seconds < meter.seconds


def test_the_peak_of_memory_is_seen_after_the_memory_is_freed():
    with PeakMemory() as memory:
        large = torch.ones(40_000_000)
        del large
    if memory.extra_bytes is None:
        pytest.skip("This kernel does not allow resetting its high-water mark.")
    assert 150e6 < memory.extra_bytes < 250e6


def test_a_timed_pass_restores_the_cache(narrow):
    cache = scenarios.random_cache(narrow[SHARED].model, 2, 10)
    assert scenarios.timed_pass(narrow[SHARED].model, cache, 2, 3, 10) > 0
    assert cache.get_seq_length() == 10


def test_a_batch_has_questions_of_all_tasks(questions):
    assert [len(call) for call in scenarios.groups(scenarios.Size(questions=2), 1)] == [1] * 8
    (call,) = scenarios.groups(scenarios.Size(), 8)
    assert [question.task for question in call[:4]] == [question.task for question in questions]
    assert len({question.question for question in call}) == 8


def timed(contestant: str, call: int, turn: int, seconds: float, tokens: int = 10) -> dict:
    return {"contestant": contestant, "call": call, "round": turn, "seconds": seconds, "lengths": [tokens]}


def test_a_ratio_compares_rates_and_its_quartiles_are_those_of_paired_runs():
    own = [timed("a", 0, 0, 1.0), timed("a", 0, 1, 3.0), timed("a", 1, 0, 2.0), timed("a", 1, 1, 2.0)]
    alone = [timed("b", 0, 0, 4.0), timed("b", 0, 1, 6.0), timed("b", 1, 0, 4.0), timed("b", 1, 1, 8.0)]
    found = rate_against(own, alone)
    assert found["tokens_per_second"] == 20 / 4 and found["ratio"] == (5 + 6) / 4
    assert found["quartiles"] == [2.0, 3.0, 4.0]


@pytest.fixture
def tiny_run(monkeypatch, tmp_path):
    """Runs the whole benchmark at a size that takes seconds, and returns its output folder."""
    size = scenarios.Size(
        width=1, rounds=1, tasks=("letters",), repeats=1, noise=(0.5,), thresholds=(0.4,), short_answer=4,
        short_questions=1, hopeless_answer=4, long_answer=40, max_new_tokens=12,
    )  # fmt: skip
    monkeypatch.setattr(run, "QUICK", size)
    for module in (scenarios, tables):
        monkeypatch.setattr(module, "CONTEXTS", (16, 32))
        monkeypatch.setattr(module, "LONG_BIN", 16)

    def start(*arguments: str) -> Path:
        run.main(["--quick", "--out", str(tmp_path), *arguments])
        return tmp_path

    return start


def test_a_run_writes_its_figures_and_continues_after_an_interruption(tiny_run, capsys):
    folder = tiny_run()
    results = json.loads((folder / "results.json").read_text())
    (race,) = results["races"]
    assert [each["contestant"] for each in race["contestants"]] == [each.name for each in RACERS]
    assert race["contestants"][0]["ratio"] == 1 and all(each["ratio"] > 0 for each in race["contestants"])
    assert all(each["differing"] == 0 for each in race["differing_answers"].values())
    (needed,) = results["memory"]
    assert all(share is None or 1 < share < 20 for share in needed["peak_over_weights_and_caches"].values())
    assert results["passes"] and results["hopeless"] and results["agreement"] and results["long"] and results["far"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "tables.md").read_text() in capsys.readouterr().out

    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (folder / "journal.jsonl").write_text("".join(lines[:-2]))
    tiny_run()
    again = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-2] and len(again) == len(lines)


@pytest.mark.parametrize(
    "cpu, arguments, of_many_rows",
    [
        ("with avx512_bf16", [], {"bfloat16", "float32"}),
        ("with avx2", [], {"float32"}),
        ("with avx2", ["--dtype", "bfloat16"], {"bfloat16"}),
    ],
)
def test_batches_race_in_bfloat16_only_if_the_cpu_has_instructions_for_it_or_it_is_requested(
    cpu, arguments, of_many_rows, monkeypatch
):
    raced = []
    monkeypatch.setattr(run, "_cpu", lambda: cpu)
    monkeypatch.setattr(run, "race", lambda size, dtype, batch, find: raced.append((batch, dtype)) or [])
    list(run.jobs(run.parse(["race", *arguments]), run.FULL, lambda key: None))
    one_row = set(arguments[1:]) or {"bfloat16", "float32"}
    assert set(raced) == {(1, dtype) for dtype in one_row} | {(n, dtype) for n in (8, 32) for dtype in of_many_rows}


def test_answers_that_differ_by_draft_length_are_counted():
    rows = [{**timed("a", 0, 0, 1.0), "answers": ["x", "y"]}] * 2 + [{**timed("b", 0, 0, 1.0), "answers": ["x", "z"]}]
    assert tables._differing(rows) == {"differing": 1, "of": 6}


def test_an_unknown_scenario_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.parse(["rase"])
    assert "unknown scenario rase" in capsys.readouterr().err


def test_noise_leaves_the_embedding_and_is_a_share_of_each_matrix(narrow):
    model = copy.deepcopy(narrow[BASE].model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    smollm2.add_noise(model, 0.03)
    assert torch.equal(model.get_input_embeddings().weight, before["model.embed_tokens.weight"])
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name != "model.embed_tokens.weight":
            added = (weight - before[name]).std().item()
            assert added == pytest.approx(0.03 * before[name].std().item(), rel=0.1)
        else:
            assert torch.equal(weight, before[name])
