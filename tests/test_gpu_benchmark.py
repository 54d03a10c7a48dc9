"""Tests the GPU script at a tiny size on a CPU: its random pair, its meter, its checks and its report."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_checks
import gpu_race
from gpu_checks import Outcome, compared
from gpu_race import ALONE, COMPILED, FIELD, FULL, TINY, Call
from markov import EOS, PAD, UNSURE, WORDS, MarkovPair, word_tokenizer
from meters import CallMeter, graphs_compiled, synchronisations
from racers import ADAPTIVE

from nudging_hf.core.gate import top1_probabilities
from nudging_hf.core.vocabulary import Vocabulary

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pair() -> MarkovPair:
    return MarkovPair(TINY.base, TINY.nudging, TINY.vocab_size, CPU, torch.float64)


@pytest.fixture
def call(pair) -> Call:
    pair.agree(0.8)
    return Call(pair, pair.prompts(2, 5, seed=1), new_tokens=40, threshold=pair.threshold())


@torch.no_grad()
def predictions_after_each_word(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy token and the top-1 probability after each word, which itself follows another word."""
    words = torch.arange(WORDS, model.config.vocab_size)
    logits = model(torch.stack([words.flip(0), words], dim=1)).logits[:, -1]
    return logits.argmax(dim=-1), top1_probabilities(logits)


def test_a_word_is_a_token_and_none_is_a_prefix_of_another():
    tokenizer = word_tokenizer(120)
    ids = tokenizer(" w00007 w00117 w00002").input_ids
    assert ids == [7, 117, 2] and tokenizer.decode(ids) == " w00007 w00117 w00002"
    vocabulary = Vocabulary(tokenizer)
    texts = [vocabulary.bytes_of(i) for i in range(WORDS, 120)]
    assert len(set(map(len, texts))) == 1 and len(set(texts)) == 118 and all(text.startswith(b" w") for text in texts)


def test_the_base_follows_its_chain_and_is_unsure_where_it_is_set_to_be(pair):
    tokens, top1 = predictions_after_each_word(pair.base)
    assert torch.equal(tokens, pair.successors[WORDS:])
    assert sorted(tokens.tolist()) == list(range(WORDS, TINY.vocab_size))  # Each word is the successor of exactly one.
    unsure = pair.is_unsure[WORDS:]
    assert unsure.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert top1[unsure].max() < 0.7 < top1[~unsure].min()
    assert top1[unsure].mean().item() == pytest.approx(sum(UNSURE) / 2, abs=0.1)


def test_the_chain_is_one_cycle(pair):
    token, seen = WORDS, set()
    while token not in seen:
        seen.add(token)
        token = pair.successors[token].item()
    assert len(seen) == TINY.vocab_size - WORDS


@pytest.mark.parametrize("share", [1.0, 0.95, 0.7, 0.0])
def test_the_models_agree_as_often_as_they_are_set_to(pair, share):
    pair.agree(share)
    tokens, top1 = predictions_after_each_word(pair.nudging)
    agreed = (tokens == pair.successors[WORDS:]).float().mean().item()
    assert agreed == pytest.approx(share, abs=0.01)
    assert top1.min() > 0.6
    assert not {EOS, PAD} & set(tokens.tolist())


def test_a_tenth_of_the_base_s_own_text_is_below_the_threshold(pair):
    ids = pair.prompts(8, 4, seed=0)
    out = pair.base.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    below = top1_probabilities(torch.stack(out.logits)) < pair.threshold()
    assert below.float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_agreement_is_changed_in_place(pair):
    head = pair.nudging.get_output_embeddings().weight
    pair.agree(0.5)
    assert pair.nudging.get_output_embeddings().weight is head


def test_prompts_depend_on_their_seed(pair):
    assert torch.equal(pair.prompts(2, 7, seed=3), pair.prompts(2, 7, seed=3))
    assert not torch.equal(pair.prompts(2, 7, seed=3), pair.prompts(2, 7, seed=4))
    assert pair.prompts(2, 7, seed=3).min() >= WORDS


@pytest.mark.parametrize("runner", [each for each in FIELD if not each.one_row], ids=lambda each: each.name)
def test_all_but_the_base_alone_write_the_nudged_text(call, runner):
    ids = runner.write(call)
    assert ids.shape == (2, 45) and torch.equal(ids[:, :5], call.ids)
    own = gpu_race.nudged(call, draft=0)
    alone = gpu_race.alone(call)
    assert not torch.equal(own, alone)
    assert torch.equal(ids, alone if runner is ALONE else own)


def test_assisted_generation_writes_the_base_s_own_text(call):
    call = replace(call, ids=call.ids[:1])
    assert torch.equal(gpu_race.assisted(call), gpu_race.alone(call))


def test_both_models_stepping_read_each_token_once(call):
    models = {"base": call.pair.base, "nudging": call.pair.nudging}
    with CallMeter(models) as meter:
        gpu_race.stepping_both(call)
    assert [meter.passes[name].count for name in models] == [40, 40]
    assert meter.passes["base"].fed == 2 * (5 + 39)


def test_a_call_meter_synchronizes_counts_and_restores_the_models(call):
    waited = []
    models = {"base": call.pair.base, "nudging": call.pair.nudging}
    with CallMeter(models, lambda: waited.append(1)) as meter:
        output = gpu_race.nudged(call, ADAPTIVE, return_dict_in_generate=True)
    assert meter.passes["base"].count == output.base_forward_passes > 0
    assert meter.passes["nudging"].count == output.nudging_forward_passes > 0
    assert len(waited) == 2 + 2 * (output.base_forward_passes + output.nudging_forward_passes)
    assert 0 < meter.passes["base"].seconds + meter.passes["nudging"].seconds < meter.seconds
    assert type(call.pair.base).__call__ is torch.nn.Module.__call__
    assert not {"forward", "get_compiled_call"} & set(vars(call.pair.base))


def test_a_call_meter_counts_compiled_passes_without_compiling_again(call, monkeypatch):
    # This compiles as on a GPU, except that the backend returns the uncompiled graph.
    eager = CompileConfig(backend="eager", mode=None)
    eager._compile_all_devices = True
    call = replace(call, new_tokens=8)
    kwargs = {"cache_implementation": "static", "compile_config": eager}
    before = graphs_compiled()
    expected = gpu_race.alone(call, **kwargs)
    after = graphs_compiled()
    assert after > before
    with CallMeter({"base": call.pair.base}) as meter:
        ids = gpu_race.alone(call, **kwargs)
    assert graphs_compiled() == after
    assert torch.equal(ids, expected)
    assert (meter.passes["base"].count, meter.passes["base"].fed) == (8, 2 * (5 + 7))
    torch.compiler.reset()


@pytest.fixture
def sync_debug_modes(monkeypatch) -> list[str]:
    """The modes that torch is set to, in order. It replaces the call that needs a GPU."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def wait() -> None:
    warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", stacklevel=1)


def test_synchronisations_are_counted_each_time_and_by_line(sync_debug_modes):
    def work() -> None:
        warnings.warn("something else", stacklevel=1)
        for _ in range(3):
            wait()

    ((line, times),) = synchronisations(work).items()
    assert (line, times) == (f"test_gpu_benchmark.py:{wait.__code__.co_firstlineno + 1}", 3)
    assert sync_debug_modes == ["warn", "default"]


def test_the_sync_debug_mode_is_reset_after_an_error(sync_debug_modes):
    with pytest.raises(ZeroDivisionError):
        synchronisations(lambda: 1 // 0)
    assert sync_debug_modes == ["warn", "default"]


@pytest.mark.parametrize(("a_pass", "ok"), [(1, True), (2, False)])
def test_more_than_one_synchronisation_per_pass_fails_the_check(sync_debug_modes, a_pass, ok):
    class Waiting:
        def write(self, small, batch, draft, **kwargs):
            for _ in range(100 * a_pass):
                wait()
            return [], SimpleNamespace(base_forward_passes=30, nudging_forward_passes=70)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The first run is not counted and warns.
        outcome = gpu_checks.few_synchronisations(Waiting(), "nudging", 1)
    assert outcome.ok == ok and outcome.detail.startswith(f"{100 * a_pass} in 100 passes: {100 * a_pass} at ")


def test_a_timed_pass_takes_time(pair):
    seconds = gpu_race.pass_seconds(pair.base, rows=2, width=3, context=10, repeats=4)
    assert len(seconds) == 4 and min(seconds) > 0


def test_the_first_difference_of_each_answer_is_reported():
    assert compared([[1, 2], [3]], [[1, 2], [3]]) == Outcome(True)
    found = compared([[1, 2], [3, 4, 5], [7]], [[1, 2], [3, 9, 5], [7, 8]])
    assert not found.ok
    assert found.detail == "row 1 differs from its token 1 on, of 3; row 2 differs from its token 1 on, of 2"


def test_compiled_races_of_one_batch_size_are_consecutive():
    found = gpu_race.races(FULL)
    assert len({race.name for race in found}) == len(found) == 12
    batches = [race.batch for race in found if race.is_compiled]
    assert batches == sorted(batches) and set(batches) == set(FULL.batches)


def test_a_compiled_contestant_warms_up_at_every_width():
    assert [way.keywords["draft"] for way in COMPILED[-1].warm_up] == [0, 4, 8, 16, 32, ADAPTIVE]
    assert all(way.keywords["cache_implementation"] == "static" for way in COMPILED[-1].warm_up)


def test_memory_is_compared_with_weights_and_caches():
    def race(peak: int) -> dict:
        row = {"contestant": "nudged", "peak_bytes": peak, "weight_bytes": 80, "cache_bytes": 20}
        return {"contestants": [row]}

    assert gpu_race.memory_is_small(race(105)) == Outcome(
        True, "1.050 of weights and caches; without the weights, 1.25 of the caches"
    )
    assert not gpu_race.memory_is_small(race(106)).ok


UNCOMPILED = ["race at agreement 0.85, batch 1", "race at agreement 0.85, batch 2"]


@pytest.fixture
def tiny_run(monkeypatch, tmp_path):
    """Runs the script at a size that takes seconds, and returns its exit status and figures."""
    size = replace(TINY, agreements=(0.85,), rounds=1, new_tokens=6, repeats=1, check_batches=(2,), check_tokens=6)
    monkeypatch.setattr(gpu, "TINY", size)

    def start(*arguments: str) -> tuple[int, dict]:
        status = gpu.main(["--device", "cpu", "--tiny", "--no-static", "--out", str(tmp_path), *arguments])
        return status, json.loads((tmp_path / "results.json").read_text())

    return start


def test_a_run_writes_what_it_found(tiny_run, tmp_path, capsys):
    status, figures = tiny_run()
    assert status == 0
    assert len(figures["checks"]) > 10 and all(row["ok"] for row in figures["checks"])
    assert len(figures["passes"]) == 8 and all(row["seconds"][1] > 0 for row in figures["passes"])
    assert [race["name"] for race in figures["races"]] == UNCOMPILED
    field = figures["races"][0]["contestants"]
    assert [row["contestant"] for row in field] == [each.name for each in FIELD]
    assert field[0]["ratio"] == 1 and all(row["ratio"] > 0 for row in field)
    assert figures["setup"]["torch"] == torch.__version__
    assert (tmp_path / "tables.md").read_text() in capsys.readouterr().out


def test_a_failure_is_reported_and_the_rest_still_runs(tiny_run, monkeypatch, capsys):
    def raising(*args, **kwargs):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(gpu_checks.MiniPair, "write", raising)
    monkeypatch.setattr(gpu, "pass_costs", raising)
    status, figures = tiny_run("checks", "passes", "race")
    assert status == 1
    assert {row["detail"] for row in figures["checks"] if not row["ok"]} == {"RuntimeError: the device is gone"}
    assert len(figures["races"]) == len(UNCOMPILED)
    assert "FAILED  passes are timed (RuntimeError: the device is gone)" in capsys.readouterr().out


def test_pieces_left_out_when_time_is_up_are_listed(tiny_run):
    status, figures = tiny_run("race", "--minutes", "0")
    assert status == 0 and figures["races"] == []
    assert figures["left_out"] == UNCOMPILED


@pytest.mark.skipif(torch.cuda.is_available(), reason="There is a GPU.")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 0
    assert "There is no GPU here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"), [(["rase"], "unknown part rase"), (["--device", "cpu"], "give --tiny too")]
)
def test_invalid_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert message in capsys.readouterr().err
