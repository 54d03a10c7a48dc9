"""A marking streamer streams whole answers with their authors, nudged or plain, one answer after another."""

from dataclasses import replace

import pytest
import torch
from running import inputs_of
from tiny import byte_bpe, pair, prompts

import nudging_hf
from nudging_hf import MarkingStreamer
from nudging_hf.provenance import Piece, spans, spans_of


@pytest.fixture
def shared():
    return pair("llama", 0, "shared")


def collected(tokenizer):
    pieces = []
    return pieces, MarkingStreamer(tokenizer, lambda text, nudged: pieces.append(Piece(text, nudged)))


@pytest.mark.parametrize("kind", ["shared", "two"])
def test_streamed_spans_are_those_of_the_output(kind):
    chosen = pair("llama", 1, kind)
    pieces, streamer = collected(chosen.tokenizer)
    for seed in range(2):  # One streamer serves several answers.
        pieces.clear()
        output = nudging_hf.generate(
            chosen.base,
            **inputs_of(chosen, *prompts(chosen, 1, seed)),
            max_new_tokens=16,
            streamer=streamer,
            return_dict_in_generate=True,
        )
        # While an answer is written, nobody tells a streamer what the base would have said.
        whole = [replace(span, instead=None) for span in spans_of(output, chosen.tokenizer)[0]]
        assert pieces and spans(pieces) == whole


def test_in_a_plain_generate_the_base_writes_everything(shared):
    inputs = inputs_of(shared, *prompts(shared, 1, 0))
    pieces, streamer = collected(shared.tokenizer)
    plain = {"input_ids": inputs["input_ids"], "max_new_tokens": 20, "streamer": streamer}
    for _ in range(2):
        pieces.clear()
        ids = nudging_hf.generate(shared.base, **plain, nudging_model=None)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert "".join(piece.text for piece in pieces) == shared.tokenizer.decode(new, skip_special_tokens=True)
        assert not any(piece.nudged for piece in pieces)


def test_a_plain_generate_of_several_rows_is_refused(shared):
    inputs = inputs_of(shared, *prompts(shared, 2, 0))
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="got 2 rows"):
        shared.base.generate(**plain, max_new_tokens=4, streamer=MarkingStreamer(shared.tokenizer, print))


def test_a_character_waits_for_its_last_token():
    tokenizer = byte_bpe()
    pieces, streamer = collected(tokenizer)
    *begun, last = tokenizer("\U0001f9ff", add_special_tokens=False).input_ids
    streamer.put(torch.tensor([[1, 2, 3]]))
    streamer.put_marked(torch.tensor(begun), True)
    assert pieces == []
    streamer.put_marked(torch.tensor([last]), False)
    assert pieces == [Piece("\U0001f9ff", False)]
    streamer.put_marked(torch.tensor(begun[:1]), True)
    streamer.end()
    assert pieces[1:] == [Piece("\ufffd", True)]


def test_without_a_callback_the_answer_goes_to_standard_output(capsys, monkeypatch):
    tokenizer = byte_bpe()
    ids = tokenizer(" the other", add_special_tokens=False, return_tensors="pt").input_ids[0]
    monkeypatch.setenv("NO_COLOR", "1")
    streamer = MarkingStreamer(tokenizer)
    for _ in range(2):
        streamer.put(torch.tensor([[1, 2, 3]]))
        streamer.put_marked(ids, True)
        streamer.put_marked(ids, False)
        streamer.end()
    assert capsys.readouterr().out == " ⟦the other⟧ the other\n" * 2


def test_an_object_that_is_not_a_tokenizer_is_refused_at_once():
    with pytest.raises(ValueError, match="The tokenizer, a str, lacks"):
        MarkingStreamer("gpt2")
