"""Tests `nudging-hf bench`: who takes part, what is timed, and what is said of it."""

import json
import logging

import pytest
import tiny
import torch

from nudging_hf import cli
from nudging_hf.core.config import NudgingConfig
from nudging_hf.study import bench
from nudging_hf.study.bench import ASSISTED, BASE, NUDGED, Bench
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.reader import Reader

PROMPTS = [Prompt([{"role": "user", "content": text}]) for text in ("What is it?", "And then?")]


def reader(tokenizer, seed, rows=None):
    model = tiny.tiny_model("llama", rows or len(tokenizer), seed, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model.name_or_path = "tiny"
    return Reader(model, tokenizer, chat=seed > 1)


@pytest.fixture(scope="module")
def base():
    return reader(tiny.byte_bpe(), 1)


@pytest.fixture(scope="module")
def shared():
    return reader(tiny.byte_bpe(), 2)


def test_all_write_equally_many_tokens_in_turn(base, shared):
    seen = []
    progress = lambda name, answered: seen.append(name)  # noqa: E731
    found = bench.bench(base, shared, NudgingConfig(), PROMPTS, max_new_tokens=6, rounds=2, progress=progress)
    assert found.left_out == {} and seen == [BASE, NUDGED, ASSISTED] * 4
    by_call = {}
    for row in found.rows:
        by_call.setdefault((row["call"], row["round"]), set()).add(tuple(row["lengths"]))
    assert len(by_call) == 4 and all(len(lengths) == 1 for lengths in by_call.values())
    figures = found.figures()
    assert [row["contestant"] for row in figures] == [BASE, NUDGED, ASSISTED] and figures[0]["ratio"] == 1
    assert found.sentence().startswith("On cpu, with 2 prompts one at a time, the nudged base is ")


def test_assistance_by_vocabulary(base, shared):
    assert set(bench.assistance(base, shared)) == {"assistant_model"}
    other = reader(tiny.metaspace_bpe(), 2)
    sizes = [each.model.config.vocab_size for each in (base, other)]
    if sizes[0] != sizes[1]:
        assert set(bench.assistance(base, other)) == {"assistant_model", "tokenizer", "assistant_tokenizer"}
        other = reader(tiny.metaspace_bpe(), 2, rows=max(sizes))
        alike = reader(tiny.byte_bpe(), 1, rows=max(sizes))
    else:
        alike = base
    found = bench.bench(alike, other, NudgingConfig(), PROMPTS[:1], max_new_tokens=4, rounds=1)
    assert "takes for one vocabulary" in found.left_out[ASSISTED]
    assert {row["contestant"] for row in found.rows} == {BASE, NUDGED}
    assert ASSISTED not in found.sentence()


def test_the_sentence_tells_what_the_quartiles_allow():
    def row(contestant, call, seconds, extra):
        times = {"seconds": seconds, "lengths": [10], "extra_bytes": extra}
        return {"contestant": contestant, "call": call, "round": 0, **times}

    rows = [row(BASE, call, 4.0, 50) for call in range(4)]
    rows += [row(NUDGED, call, 2.0, 60) for call in range(4)]
    rows += [row(ASSISTED, call, seconds, 70) for call, seconds in enumerate((1.0, 1.5, 2.5, 4.0))]
    found = Bench(rows, {}, {"base": 100, "nudging model": 20}, "cuda:0")
    assert found.sentence() == (
        "On cuda:0, with 4 prompts one at a time, the nudged base is faster than base alone (2.00 times as fast) and "
        "about as fast as assisted generation (1.12 times, quartiles 0.69 to 1.44), with 1.20 times the memory of the "
        "base alone."
    )
    assert [each["peak_bytes"] for each in found.figures()] == [150, 180, 190]
    slow = Bench([*rows[:4], *(each | {"seconds": 8.0} for each in rows[4:8])], {}, found.weights, "cpu")
    assert "slower than base alone (0.50 times as fast)" in slow.sentence()
    untold = Bench([each | {"extra_bytes": None} for each in rows], {}, found.weights, "mps")
    assert "memory" not in untold.sentence() and untold.figures()[0]["peak_bytes"] is None


def test_the_command_prints_a_table_and_a_sentence_and_writes_json(base, shared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    for name, lm in (("base", base), ("nudging", shared)):
        lm.model.to(torch.float32).save_pretrained(tmp_path / name)
        lm.tokenizer.save_pretrained(tmp_path / name)
    models = ["--base", f"{tmp_path}/base", "--nudging-model", f"{tmp_path}/nudging"]
    options = ["--limit", "2", "--rounds", "1", "--max-new-tokens", "8", "--json", f"{tmp_path}/bench.json"]
    assert cli.main(["bench", *models, *options]) == 0
    out, err = capsys.readouterr()
    assert "Built-in prompts: 20 chats" in err
    assert err.index("Taken: 2 chats, none with an answer") < err.index("running on")
    saved = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert saved["says"] in out and [row["contestant"] for row in saved["figures"]] == [BASE, NUDGED, ASSISTED]
    assert out.startswith("|                     | tokens/s | × base alone |")
