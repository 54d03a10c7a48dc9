"""At each nudge, a continuation is what the base alone would have written from there."""

import copy
from itertools import pairwise

import pytest
import torch
from running import inputs_of
from tiny import pair, prompts

import nudging_hf
from nudging_hf.continuations import pieces_with_continuations, with_continuations
from nudging_hf.core.vocabulary import Vocabulary, to_text
from nudging_hf.provenance import Alternative, Piece, pieces_of


@pytest.mark.parametrize("kind", ["shared", "two"])
def test_a_continuation_is_the_base_s_own_after_the_answer_so_far(kind):
    chosen = pair("llama", 1, kind)
    inputs = inputs_of(chosen, *prompts(chosen, 3, 1))
    settings = {"max_new_tokens": 24, "num_return_sequences": 2, "do_sample": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    output = nudging_hf.generate(chosen.base, **inputs, **settings)
    vocabulary = Vocabulary(chosen.tokenizer)
    answers = pieces_with_continuations(
        chosen.base, output, chosen.tokenizer, inputs["attention_mask"], max_new_tokens=6, batch_size=4
    )
    begins = 0
    for row, (pieces, expected) in enumerate(zip(answers, pieces_of(output, chosen.tokenizer), strict=True)):
        assert [piece[:3] for piece in pieces] == [piece[:3] for piece in expected]
        prompt = inputs["input_ids"][row // 2][inputs["attention_mask"][row // 2].bool()]
        answer = output.sequences[row, inputs["input_ids"].shape[1] :]
        mask = output.nudged_mask[row].tolist()
        with_text = [i for i, token in enumerate(answer.tolist()) if vocabulary.bytes_of(token)]
        found = [
            piece.instead.continuation for piece in pieces if piece.nudged and piece.instead.continuation is not None
        ]
        starts = [i for before, i in pairwise([None, *with_text]) if mask[i] and (before is None or not mask[before])]
        for place, continuation in zip(starts, found, strict=True):
            text = torch.cat([prompt, answer[:place]])[None]
            own = chosen.base.generate(text, max_new_tokens=6, do_sample=False)[0, text.shape[1] :].tolist()
            assert continuation == to_text(vocabulary.join(own))
            first = output.base_tokens[row, place]
            begins += first == own[0]
    assert begins > 0


def test_a_continuation_ends_at_the_base_s_last_position():
    chosen = pair("gpt2", 0, "shared")
    inputs = inputs_of(chosen, *prompts(chosen, 1, 1))
    settings = {"max_new_tokens": 12, "nudge_threshold": 1.01, "return_dict_in_generate": True}
    output = nudging_hf.generate(chosen.base, **inputs, **settings)
    length = output.sequences.shape[1]
    small = copy.deepcopy(chosen.base)
    small.config.n_positions = length
    small.transformer.wpe = torch.nn.Embedding.from_pretrained(chosen.base.transformer.wpe.weight[:length])
    rows = [([], output.sequences[0].tolist(), [Piece("a", True, 0.1, Alternative(length - 2, "a", 0.1, 1))])]
    [[piece]] = with_continuations(small, chosen.tokenizer, rows)
    [[whole]] = with_continuations(chosen.base, chosen.tokenizer, rows)
    assert piece.instead.continuation and whole.instead.continuation.startswith(piece.instead.continuation)
