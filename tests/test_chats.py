"""Chats as the inputs of both models."""

import copy

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import nudging_hf
from nudging_hf import chat_inputs, plain_prompt
from nudging_hf.chats import messages_of

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}
SAID = {"role": "assistant", "content": "Because."}
AGAIN = {"role": "user", "content": "And how?"}

TEXT = st.text(alphabet="ab {}%\n\u00e9", max_size=8)


@pytest.mark.parametrize(
    ("messages", "template", "prompt"),
    [
        ([SYSTEM, USER], nudging_hf.REASONING_TEMPLATE, "Be brief.\nQuestion: Why?\n"),
        ([USER], nudging_hf.REASONING_TEMPLATE, "Question: Why?\n"),
        ([SYSTEM, USER], nudging_hf.INSTRUCTION_TEMPLATE, "Be brief.\nInstruction: Why?\n"),
        ([SYSTEM, USER], "{user}", "Why?"),
        ([USER], "{{user}} {user} {{system}}", "{user} Why? {system}"),
        ([SYSTEM, USER], "{{{system}}} {user}", "{Be brief.} Why?"),
        ([USER], "{{{system}}} {user}", "{} Why?"),
        (
            [SYSTEM, USER, SAID, AGAIN],
            nudging_hf.REASONING_TEMPLATE,
            "Be brief.\nQuestion: Why?\nBecause.\nQuestion: And how?\n",
        ),
        ([USER, {**SAID, "content": "So.\n"}, AGAIN], "Q: {user}\nA: ", "Q: Why?\nA: So.\nQ: And how?\nA: "),
        ([{**USER, "content": [{"type": "text", "text": "W"}, {"type": "text", "text": "hy"}]}], "{user}", "Why"),
    ],
)  # fmt: skip
def test_a_base_is_given_plain_text(messages, template, prompt):
    assert plain_prompt(messages, template) == prompt


@given(TEXT, TEXT)
def test_what_is_filled_in_is_not_read_again(user, system):
    messages = messages_of(user, system)
    assert plain_prompt(messages, "<{system}|{user}>") == f"<{system}|{user}>"
    assert plain_prompt(messages[1:], "<{system} \n|{user}>") == f"<|{user}>"


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "got messages of: nobody"),
        ([SYSTEM], "system"),
        ([USER, SAID], "the user last; got messages of: user, assistant"),
        ([USER, USER], "got messages of: user, user"),
        ([USER, SYSTEM, USER], "got messages of: user, system, user"),
        ([USER, SAID, {"role": "tool", "content": "7"}], "tool"),
        ([{"role": "user"}], "A message is"),
        (["Why?"], "A message is .* got 'Why\\?'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "must be text"),
        ([{"role": "user", "content": None}], "must be text"),
    ],
)
def test_no_prompt_is_made_of_something_else(messages, match):
    with pytest.raises(ValueError, match=match):
        plain_prompt(messages)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("Answer:", "needs {user} once"),
        ("{user}{user}", "needs {user} once"),
        ("{system}{system}{user}", "at most once"),
        ("{question}", "got {question}"),
        ("{}{user}", "got {}"),
        ("{user!r}", "a name alone"),
        ("{user:>9}", "a name alone"),
        ("{user", "a brace itself is written twice"),
    ],
)
def test_no_prompt_is_made_by_another_template(template, match):
    with pytest.raises(ValueError, match=match):
        plain_prompt([USER], template)


def test_chats_are_the_inputs_of_both_models():
    pair = tiny.pair("llama", 1, "two")
    chats = [[SYSTEM, USER], [USER, SAID, AGAIN]]
    inputs = chat_inputs(chats, pair.tokenizer, pair.nudging_tokenizer)
    for i, chat in enumerate(chats):
        ids = inputs.input_ids[i][inputs.attention_mask[i].bool()].tolist()
        assert ids == pair.tokenizer(plain_prompt(chat)).input_ids
        nudging_ids = inputs.nudging_input_ids[i][inputs.nudging_attention_mask[i].bool()].tolist()
        text = pair.nudging_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert nudging_ids == pair.nudging_tokenizer(text, add_special_tokens=False).input_ids
        assert inputs.attention_mask[i].tolist() == sorted(inputs.attention_mask[i].tolist())
    alone = chat_inputs(chats[0], pair.tokenizer, pair.nudging_tokenizer)
    assert alone.input_ids.tolist() == [inputs.input_ids[0][inputs.attention_mask[0].bool()].tolist()]
    settings = {"nudging_model": pair.nudging_model, "max_new_tokens": 6, "tokenizer": pair.tokenizer}
    settings["nudging_tokenizer"] = pair.nudging_tokenizer
    out = nudging_hf.generate(pair.base, **inputs, **settings)
    row = nudging_hf.generate(pair.base, **alone, **settings)
    width, length = inputs.input_ids.shape[1], alone.input_ids.shape[1]
    new = row[0, length:]
    assert torch.equal(out[0, width : width + len(new)], new)


def test_a_template_that_knows_no_system_is_given_its_text_in_the_user_s_turn():
    pair = tiny.pair("llama", 1, "two")
    strict = copy.deepcopy(pair.nudging_tokenizer)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    strict.chat_template = refusal + strict.chat_template
    given = chat_inputs([SYSTEM, USER], pair.tokenizer, strict)
    merged = {"role": "user", "content": "Be brief.\n\nWhy?"}
    assert torch.equal(given.nudging_input_ids, chat_inputs([merged], pair.tokenizer, strict).nudging_input_ids)
    strict.chat_template = "{{ raise_exception('Nothing is supported') }}"
    with pytest.raises(ValueError, match="Nothing is supported"):
        chat_inputs([USER], pair.tokenizer, strict)


def test_the_nudging_model_s_template_may_be_told_more():
    pair = tiny.pair("llama", 1, "two")
    thinking = copy.deepcopy(pair.nudging_tokenizer)
    thinking.chat_template += "{% if think %}<think>{% endif %}"
    plain, told = (
        chat_inputs([USER], pair.tokenizer, thinking, chat_template_kwargs=kwargs).nudging_input_ids[0]
        for kwargs in (None, {"think": True})
    )
    assert thinking.decode(told) == thinking.decode(plain) + "<think>"


def test_a_nudging_model_without_a_template_is_given_the_base_s_prompt():
    pair = tiny.pair("llama", 1, "two")
    plain = copy.deepcopy(pair.nudging_tokenizer)
    plain.chat_template = None
    given = chat_inputs([SYSTEM, USER], pair.tokenizer, plain)
    assert given.nudging_input_ids[0].tolist() == plain("Be brief.\nQuestion: Why?\n").input_ids


def test_no_chat_at_all_is_refused():
    pair = tiny.pair("llama", 1, "two")
    with pytest.raises(ValueError, match="There is no chat"):
        chat_inputs([], pair.tokenizer, pair.nudging_tokenizer)
