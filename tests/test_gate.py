"""The gates' formulas, and the hooks for plain `generate`."""

import math

import pytest
import torch
from tiny import pair, prompts

from nudging_hf import StopWhenUnsure, Top1Recorder
from nudging_hf.core.config import DEFAULT_THRESHOLDS
from nudging_hf.core.gate import GATES, top1_probabilities


def test_top1_is_the_greatest_probability_in_float32():
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    top1 = top1_probabilities(logits)
    assert top1.shape == (2, 3) and top1.dtype == torch.float32
    torch.testing.assert_close(top1, logits.float().softmax(-1).max(-1).values)


def test_the_recorder_reads_the_raw_scores_of_a_plain_generate():
    model = pair("llama", 1, "shared").base
    [prompt], _ = prompts(pair("llama", 1, "shared"), 1, 0)
    recorder = Top1Recorder()
    plain = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=True, temperature=0.3, top_k=3,
                           logits_processor=[recorder], output_logits=True, return_dict_in_generate=True)  # fmt: skip
    expected = [top1_probabilities(step) for step in plain.logits]
    torch.testing.assert_close(torch.stack(recorder.probabilities), torch.stack(expected))


def test_a_plain_generate_ends_at_the_first_unsure_position():
    chosen = pair("llama", 1, "shared")
    [prompt], _ = prompts(chosen, 1, 0)
    for threshold in (0.2, 0.45, 0.6):
        recorder = Top1Recorder()
        chosen.base.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            logits_processor=[recorder],
            stopping_criteria=[StopWhenUnsure(recorder, threshold)],
        )
        probabilities = torch.cat(recorder.probabilities)
        assert (probabilities[:-1] >= threshold).all()
        assert len(probabilities) < 30 and probabilities[-1] < threshold


def test_a_missing_recorder_is_named_in_the_error():
    with pytest.raises(ValueError, match="logits_processor"):
        StopWhenUnsure(Top1Recorder(), 0.4)(torch.tensor([[1]]), None)


def test_scores_follow_their_formulas():
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
    tokens = torch.tensor([1, 3])
    scores = {name: gate.scores(p, tokens).tolist() for name, gate in GATES.items()}
    assert scores["top1"] == pytest.approx([0.5, 0.25])
    assert scores["entropy"] == pytest.approx([-1.029653, -math.log(4)])  # 0.5 ln 2 + 0.3 ln 10/3 + 0.2 ln 5
    assert scores["margin"] == pytest.approx([0.2, 0])
    assert scores["kad"] == scores["rejection"] == pytest.approx([0.3, 0.25])


def test_every_gate_has_its_own_default_threshold():
    assert set(GATES) == set(DEFAULT_THRESHOLDS)
