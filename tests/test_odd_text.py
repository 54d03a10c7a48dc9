"""Text that only scripted models write: the nudging model's text reaches the answer unchanged."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedLM, writer_of

import nudging_hf
from nudging_hf.core.answer import ends_inside_character
from nudging_hf.core.vocabulary import Vocabulary, to_text

LOSSLESS = ["byte_bpe", "other_byte_bpe", "metaspace_bpe", "unigram"]
TEXTS = {
    "double and trailing spaces": "one  two   three  ",
    "newline-only words": "one \n two\n\n \n three",
    "leading spaces": "  one two",
    "an emoji in every word": "so 😀 we 😀😀 are é here€",
    "one long word": "pneumonoultramicroscopicsilicovolcanoconiosis and more",
    "one long word of emoji": "😀😁😂🤣😃😄😅😆😉😊 end",
    "spelt control tokens": "a <eos> b </s> c <|end|> d <pad> [SEP] <unk>",
    "a lookahead that ends with an emoji, after a space that is no token": "<<<<<<<<<<<<<a 😀",
    "a script without spaces": "昨天夜里河水上涨到了早晨，低处的田地已经被水淹没。",
    "accents on letters, written apart": "Cafe\u0301 nai\u0308ve \u1112\u1161\u11ab",
    "one letter": "x",
    "nothing": "",
}


def tokenizer(name: str):
    return getattr(tiny, name)()


def write(base_name: str, nudging_name: str, base_says, text: str, threshold=0.5, **kwargs):
    """The nudged output of a base with a script and a nudging model that writes `text`, and the prompt's length.

    Args:
        base_says: takes the answer's ids and returns the base's next token and its probability.
    """
    ours, theirs = tokenizer(base_name), tokenizer(nudging_name)
    prompt = torch.tensor([Vocabulary(ours).encode_after("a", "Now:\n")])
    nudging_prompt = torch.tensor([Vocabulary(theirs).encode_after("a", "Now:\n")])
    return nudging_hf.generate(
        ScriptedLM(ours, lambda ids: base_says(ids[prompt.shape[1] :])),
        prompt,
        nudging_model=ScriptedLM(theirs, writer_of(text, theirs, nudging_prompt.shape[1])),
        tokenizer=ours,
        nudging_tokenizer=theirs,
        nudging_input_ids=nudging_prompt,
        nudge_threshold=threshold,
        max_new_tokens=200,
        use_cache=False,
        return_dict_in_generate=True,
        **kwargs,
    ), prompt.shape[1]


def text_of(output, prompt_length: int, name: str) -> str:
    return to_text(Vocabulary(tokenizer(name)).join(output.sequences[0, prompt_length:].tolist()))


def never_sure(name: str, thinks_of: str = "\x7f"):
    """The script of a base that is never sure, and whose token begins no word."""
    token = Vocabulary(tokenizer(name)).encode_after("a", thinks_of)[-1]
    return lambda answer: (token, 0.1)


@pytest.mark.parametrize("nudging_name", LOSSLESS)
@pytest.mark.parametrize("base_name", LOSSLESS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_with_an_unsure_base_the_nudging_models_text_is_the_answer(base_name, nudging_name, text):
    output, prompt_length = write(base_name, nudging_name, never_sure(base_name), text)
    assert text_of(output, prompt_length, base_name) == text
    assert output.finish_reasons == ["eos"]
    assert output.nudged_mask[0, :-1].all()
    control = Vocabulary(tokenizer(base_name)).control
    assert set(output.sequences[0, prompt_length:-1].tolist()).isdisjoint(control)
    assert output.sequences[0, -1] == tokenizer(base_name).eos_token_id


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet="abz \n.é😀<>|/", max_size=40), st.sampled_from(LOSSLESS), st.sampled_from(LOSSLESS))
def test_any_text_reaches_the_answer_unchanged(text, base_name, nudging_name):
    output, prompt_length = write(base_name, nudging_name, never_sure(base_name), text)
    assert text_of(output, prompt_length, base_name) == text


@pytest.mark.parametrize("drafts", [0, 5])
@pytest.mark.parametrize("nudging_name", LOSSLESS)
def test_a_base_that_is_unsure_within_a_character_finishes_it(nudging_name, drafts):
    """The base is sure of the emoji's first byte and unsure of the others."""
    emoji = "One 😀 two."
    vocabulary = Vocabulary(tokenizer("byte_bpe"))
    wanted = vocabulary.encode_after("\n", emoji)
    unsure = never_sure("byte_bpe")
    first_byte = next(i for i in range(len(wanted)) if ends_inside_character(vocabulary.join(wanted[: i + 1])))

    def says(answer):
        if answer != wanted[: len(answer)] or len(answer) < first_byte:
            return unsure(answer)
        if len(answer) == first_byte:
            return wanted[len(answer)], 0.9
        return (wanted[len(answer)], 0.1) if ends_inside_character(vocabulary.join(answer)) else unsure(answer)

    output, prompt_length = write("byte_bpe", nudging_name, says, "One " + "x" * 40, num_draft_tokens=drafts)
    ids = output.sequences[0, prompt_length:].tolist()
    whole = next(
        i for i in range(first_byte + 1, len(wanted)) if not ends_inside_character(vocabulary.join(wanted[: i + 1]))
    )
    assert ids[: whole + 1] == wanted[: whole + 1]
    assert not output.nudged_mask[0, first_byte : whole + 1].any()
    assert whole > first_byte


def test_wordpiece_writes_what_it_can():
    """It has no line breaks. Words without ids are joined with the next word, and decoding ends."""
    text = "\n\n the cat\n sat on the mat"
    output, prompt_length = write("wordpiece", "byte_bpe", never_sure("wordpiece", thinks_of=" 7"), text)
    assert text_of(output, prompt_length, "wordpiece").split() == text.split()
    assert output.finish_reasons == ["eos"]


def test_if_no_nudging_word_can_be_written_the_base_goes_on_or_the_answer_ends():
    newlines = "\n" * 40
    eos = tokenizer("wordpiece").eos_token_id
    output, prompt_length = write("wordpiece", "byte_bpe", lambda answer: (eos, 0.9), newlines)
    assert (output.finish_reasons, output.sequences.shape[1]) == (["stuck"], prompt_length)
    the = Vocabulary(tokenizer("wordpiece")).encode_after("", "the")[0]
    output, prompt_length = write("wordpiece", "byte_bpe", lambda answer: (the, 0.1), newlines)
    assert output.sequences[0, prompt_length].item() == the
