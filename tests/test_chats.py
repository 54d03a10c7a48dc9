"""Both models' inputs from chats, and chat templates that refuse or leave out messages."""

import copy

import pytest
import tiny
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nudging_hf
from nudging_hf import chat_inputs, plain_prompt
from nudging_hf.chats import messages_of
from nudging_hf.core import prompts
from nudging_hf.core.prompts import templated_ids

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
def test_the_base_gets_plain_text(messages, template, prompt):
    assert plain_prompt(messages, template) == prompt


@given(TEXT, TEXT)
def test_text_that_is_filled_in_is_not_formatted_again(user, system):
    messages = messages_of(user, system)
    assert plain_prompt(messages, "<{system}|{user}>") == f"<{system}|{user}>"
    assert plain_prompt(messages[1:], "<{system} \n|{user}>") == f"<|{user}>"


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "got messages of: nobody"),
        ([SYSTEM], "system"),
        ([USER, SAID], "the user first and last; got messages of: user, assistant"),
        ([USER, USER], "got messages of: user, user"),
        ([USER, SYSTEM, USER], "got messages of: user, system, user"),
        ([USER, SAID, {"role": "tool", "content": "7"}], "tool"),
        ([{"role": "user"}], "A message must be"),
        (["Why?"], "A message must be .* got 'Why\\?'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "must be text"),
        ([{"role": "user", "content": None}], "must be text, got None"),
        ([{"role": "user", "content": 7}], "must be text, got 7"),
        ([{"role": "user", "content": {"type": "text", "text": "Why?"}}], "must be text, got {'type'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "got a part {'type': 'text'}"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "got a part {'type': 'text', 'text': None}"),
        ([{"role": "user", "content": [{"text": "Why?"}]}], "got a part {'text': 'Why\\?'}"),
        ([{"role": "user", "content": [None]}], "got a part None"),
        ([{"role": "user", "content": [["Why?"]]}], "got a part \\['Why\\?'\\]"),
        ([{"role": None, "content": "Why?"}], "The role of a message must be .* got None"),
        ([USER, {"role": 7, "content": "So."}, USER], "The role of a message must be .* got 7"),
        ([{"role": ["user"], "content": "Why?"}], "The role of a message must be"),
        ([USER, {**SAID, "tool_calls": [{"name": "sum"}]}, AGAIN], "A message has `tool_calls`"),
        ([USER, {**SAID, "content": None, "tool_calls": [{"name": "sum"}]}, AGAIN], "A message has `tool_calls`"),
        ([USER, {**SAID, "function_call": {"name": "sum"}}, AGAIN], "A message has `function_call`"),
        (USER, "A chat must be a list of messages .*: put the message into a list"),
        ({"messages": [USER]}, "A chat must be a list of messages .* got {'messages'"),
        ("Why?", "A chat must be a list of messages .* got 'Why\\?'"),
        (None, "A chat must be a list of messages .* got None"),
        ([None], "A message must be .* got None"),
        ([[USER]], "A message must be"),
        ([{"role": "user", "content": "caf\udce9"}], "has '.udce9' at position 3, which is not a character"),
        ([{"role": "user", "content": ["\ud83d"]}], "has '.ud83d' at position 0, which is not a character"),
    ],
)
def test_malformed_chats_are_refused(messages, match):
    with pytest.raises(ValueError, match=match):
        plain_prompt(messages)
    pair = tiny.pair("llama", 1, "two")
    if messages and (
        not isinstance(messages, list) or isinstance(messages[0], dict)
    ):  # Otherwise it would be several chats, or none.
        with pytest.raises(ValueError, match=match):
            chat_inputs(messages, pair.tokenizer, pair.nudging_tokenizer)


@pytest.mark.parametrize(
    "chats", [iter([USER]), 7, [7], [USER, [USER]], [[USER], USER], [[]], ["Why?"], [[USER], None]]
)
def test_an_object_that_is_neither_a_chat_nor_a_list_of_chats_is_refused(chats):
    pair = tiny.pair("llama", 1, "two")
    with pytest.raises(ValueError, match=r"A chat must be a list|A message must be|A chat may begin|There is no chat"):
        chat_inputs(chats, pair.tokenizer, pair.nudging_tokenizer)


@pytest.mark.parametrize(
    "content",
    [
        ["Wh", "y?"],
        ("Wh", "y?"),
        ({"type": "text", "text": "Wh"}, "y?"),
        [{"type": "text", "text": "Why?"}, ""],
        ["Why?"],
    ],
)
def test_the_parts_of_a_content_are_joined(content):
    pair = tiny.pair("llama", 1, "two")
    in_parts, plain = (
        chat_inputs(chat, pair.tokenizer, pair.nudging_tokenizer)
        for chat in ([SYSTEM, {"role": "user", "content": content}], (SYSTEM, USER))
    )
    for name, ids in plain.items():
        assert torch.equal(in_parts[name], ids)


def test_other_fields_of_a_message_are_ignored():
    more = {**SAID, "tool_calls": None, "finish_reason": "eos", "nudged_spans": [[0, 7]]}
    assert plain_prompt([USER, more, AGAIN]) == plain_prompt([USER, SAID, AGAIN])


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
        ("{user", "write a literal brace twice"),
    ],
)
def test_malformed_base_templates_are_refused(template, match):
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


# Every content of a chat is in the nudging model's prompt -----------------------------------------------------------

REFUSAL = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# Like Phi-3's first template: it leaves out other roles.
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}<|end|>"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "<|assistant|>"
)
LAST = "<|user|>{{ messages[-1].content }}<|assistant|>"
FIRST_AND_LAST = "{{ messages[0].content }}|{{ messages[-1].content }}|"
# Templates of some multimodal models read only parts. Of a string they would read the letters, which have no type.
PARTS = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)
# Like Mistral's: the system message is in the last turn.
SYSTEM_LAST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST]{{ system ~ '\n\n' if loop.last and system else '' }}"
    "{{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' %}{{ message.content }}{% endif %}{% endfor %}"
)
# Like Qwen3's and DeepSeek-R1's: they leave out the reasoning of an earlier answer.
NO_REASONING = (
    "{% for message in messages %}{% set said = message.content.split('</think>')[-1].lstrip('\n') "
    "if message.role == 'assistant' else message.content %}{{ message.role ~ ': ' ~ said ~ '\n' }}{% endfor %}"
)
# Like SmolLM3's: it obeys a switch in the system message and removes it from the text.
SWITCH = (
    "{% for message in messages %}{{ message.content.replace('/no_think', '').rstrip() ~ '\n' }}{% endfor %}"
    "{% if '/no_think' in messages[0].content %}<think></think>{% endif %}"
)
EACH = "{% for message in messages %}<|{{ message.role }}|>{{ message.content FILTER }}<|end|>{% endfor %}"
TRIMMED = EACH.replace("FILTER", "| trim")
ESCAPED = EACH.replace("FILTER", "| tojson")
CUT = EACH.replace("FILTER", "[:20]")
NO_LINES = EACH.replace("FILTER", ".split('\n')[0]")

CONVERSATION = [SYSTEM, USER, SAID, AGAIN]


def with_template(template):
    tokenizer = copy.deepcopy(tiny.pair("llama", 1, "two").nudging_tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def nudging_text(chat, template, **kwargs):
    """The text of the nudging model's prompt for a chat."""
    tokenizer = with_template(template)
    ids = chat_inputs(chat, tiny.pair("llama", 1, "two").tokenizer, tokenizer, chat_template_kwargs=kwargs)
    return tokenizer.decode(ids.nudging_input_ids[0])


@pytest.mark.parametrize("template", [REFUSAL + NO_SYSTEM, NO_SYSTEM])
@pytest.mark.parametrize("chat", [[SYSTEM, USER], CONVERSATION])
def test_without_system_support_the_system_message_moves_into_the_first_user_turn(template, chat):
    merged = [{"role": "user", "content": "Be brief.\n\nWhy?"}, *chat[2:]]
    assert nudging_text(chat, template) == nudging_text(merged, template)
    assert "Be brief." in nudging_text(chat, template)


@pytest.mark.parametrize("system", ["user", "a", "Why?", "<|end|>", "?"])
def test_a_system_message_that_occurs_in_the_template_itself_is_not_lost(system):
    merged = {"role": "user", "content": f"{system}\n\nWhy?"}
    assert nudging_text(messages_of("Why?", system), NO_SYSTEM) == nudging_text([merged], NO_SYSTEM)


def test_an_empty_system_message_does_not_move():
    assert nudging_text(messages_of("Why?", " \n"), NO_SYSTEM) == nudging_text([USER], NO_SYSTEM)


SPOKEN = st.text(alphabet="a\u00e9<>&\"'{}\\\n /", max_size=6)


@example("", "", 'a"', "a", ESCAPED)  # The escaped answer stands unescaped across the next message's quotes.
@given(SPOKEN, SPOKEN, SPOKEN, SPOKEN, st.sampled_from([TRIMMED, ESCAPED, PARTS, SYSTEM_LAST, NO_REASONING, SWITCH]))
def test_a_template_that_writes_every_message_gets_the_chat_unchanged(system, asked, said, again, template):
    chat = [*messages_of(asked, system), {"role": "assistant", "content": said}, {"role": "user", "content": again}]
    tokenizer = with_template(template)
    given = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in chat]
    expected = tokenizer.apply_chat_template(given if template == PARTS else chat, add_generation_prompt=True)
    assert templated_ids(tokenizer, chat) == expected["input_ids"]


@pytest.mark.parametrize(
    ("content", "template"),
    [
        ("<think>\nIt is so.\n</think>\n\nBecause.", NO_REASONING),
        ("<think>\nIt is so.\n</think>\n\nBecause.", TRIMMED),
        ("<think>\nIt is so.\n</think>", NO_REASONING),
    ],
)
def test_a_template_may_leave_the_reasoning_out_of_an_earlier_answer(content, template):
    chat = [USER, {"role": "assistant", "content": content}, AGAIN]
    tokenizer = with_template(template)
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert templated_ids(tokenizer, chat) == expected


def test_a_template_may_remove_a_switch_from_a_message():
    assert nudging_text(messages_of("Why?", "Be brief. /no_think"), SWITCH) == "Be brief.\nWhy?\n<think></think>"


@pytest.mark.parametrize(
    ("chat", "template", "match"),
    [
        ([USER], "{{ raise_exception('Nothing is supported') }}", "refuses the messages: Nothing is supported"),
        ([USER], "{{ 1 + messages[0].content }}", "refuses the messages: "),
        ([USER], "Hello.", "leaves out the content of message 1 of 1, of role 'user': 'Why\\?'. Set `nudging_tok"),
        ([USER, SAID, AGAIN], LAST, "leaves out the content of message 1 of 3, of role 'user': 'Why\\?'"),
        (CONVERSATION, LAST, "leaves out the content of message 1 of 3"),
        (
            [USER, SAID, AGAIN],
            FIRST_AND_LAST,
            "leaves out the content of message 2 of 3, of role 'assistant': 'Because",
        ),
        (CONVERSATION, FIRST_AND_LAST, "leaves out the content of message 2 of 3"),
        ([{**USER, "content": f"{'Why' * 30}?"}], CUT, "leaves out the content of message 1 of 1, .*\\.\\.\\. Set"),
        ([{**USER, "content": "Why?\nAnd how?"}], NO_LINES, "leaves out the content of message 1 of 1"),
        ([{**USER, "content": "<think>so</think>Why?"}], NO_REASONING.replace("assistant", "user"), "message 1 of 1"),
        ([USER, {**SAID, "content": "<think>so</think>So."}, AGAIN], CUT.replace("20", "-1"), "message 1 of 3"),
    ],
)
def test_a_template_that_leaves_out_a_content_is_refused(chat, template, match):
    with pytest.raises(ValueError, match=match):
        nudging_text(chat, template)


def test_template_arguments_may_decide_what_is_written():
    template = "{% if all %}" + TRIMMED + "{% else %}" + LAST + "{% endif %}"
    assert "Because." in nudging_text(CONVERSATION, template, all=True)
    with pytest.raises(ValueError, match="leaves out the content of message 1 of 3"):
        nudging_text(CONVERSATION, template)


def test_encoding_arguments_are_obeyed():
    tokenizer = with_template(TRIMMED)
    for kwargs in ({}, {"truncation": True, "max_length": 9}, {"tokenizer_kwargs": {"return_token_type_ids": False}}):
        expected = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, **kwargs)["input_ids"]
        assert templated_ids(tokenizer, CONVERSATION, kwargs) == expected


def test_a_new_template_of_the_same_tokenizer_is_checked_again():
    tokenizer = with_template(TRIMMED)
    templated_ids(tokenizer, CONVERSATION)
    tokenizer.chat_template = LAST
    with pytest.raises(ValueError, match="leaves out"):
        templated_ids(tokenizer, CONVERSATION)


def test_a_template_is_checked_once_for_chats_of_one_form(monkeypatch):
    tokenizer, calls = with_template(TRIMMED), []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *args, **kw: calls.append(0) or plain(*args, **kw))
    for _ in range(10):
        templated_ids(tokenizer, CONVERSATION)
    assert len(calls) == 11
    for turns in range(200):
        templated_ids(tokenizer, [*[USER, SAID] * turns, AGAIN])
    assert len(prompts._CONTENT_ORDERS[tokenizer]) <= 64


@pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize", "return_tensors", "continue_final_message"])
def test_reserved_template_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"`chat_template_kwargs` .* got `{name}`"):
        nudging_text([USER], TRIMMED, **{name: True})


def test_the_default_nudging_prompt_is_checked_too():
    pair = tiny.pair("llama", 1, "two")
    ids = pair.tokenizer("Why is it so?", return_tensors="pt").input_ids
    settings = {"nudging_model": pair.nudging_model, "tokenizer": pair.tokenizer, "max_new_tokens": 4}
    for template in ("{{ raise_exception('No.') }}", "Hello.", "{{ messages[0].content[:5] }}"):
        with pytest.raises(ValueError, match=r"The nudging model's chat template (refuses|leaves out)"):
            nudging_hf.generate(pair.base, ids, **settings, nudging_tokenizer=with_template(template))
    [given] = prompts.nudging_prompts(ids.tolist(), pair.tokenizer, with_template(PARTS), False)
    assert pair.nudging_tokenizer.decode(given) == "user: Why is it so?"
    # A given nudging prompt does not pass through the template.
    nudging_ids = pair.nudging_tokenizer("Why?", return_tensors="pt").input_ids
    given = {"nudging_tokenizer": with_template("Hello."), "nudging_input_ids": nudging_ids}
    nudging_hf.generate(pair.base, ids, **settings, **given)


def test_a_system_message_that_neither_model_would_get_is_refused():
    pair, plain = tiny.pair("llama", 1, "two"), with_template(None)
    with pytest.raises(ValueError, match=r"Neither model would get the system message: .* Put {system} into"):
        chat_inputs([[USER], [SYSTEM, USER]], pair.tokenizer, plain, "Question: {user}\n")
    for chat in ([USER], messages_of("Why?", "")):
        given = chat_inputs(chat, pair.tokenizer, plain, "Question: {user}\n")
        assert given.nudging_input_ids[0].tolist() == plain("Question: Why?\n").input_ids


def test_the_nudging_models_template_gets_further_arguments():
    pair = tiny.pair("llama", 1, "two")
    thinking = copy.deepcopy(pair.nudging_tokenizer)
    thinking.chat_template += "{% if think %}<think>{% endif %}"
    plain, told = (
        chat_inputs([USER], pair.tokenizer, thinking, chat_template_kwargs=kwargs).nudging_input_ids[0]
        for kwargs in (None, {"think": True})
    )
    assert thinking.decode(told) == thinking.decode(plain) + "<think>"


def test_a_nudging_model_without_a_template_gets_the_bases_prompt():
    pair = tiny.pair("llama", 1, "two")
    plain = copy.deepcopy(pair.nudging_tokenizer)
    plain.chat_template = None
    given = chat_inputs([SYSTEM, USER], pair.tokenizer, plain)
    assert given.nudging_input_ids[0].tolist() == plain("Be brief.\nQuestion: Why?\n").input_ids


def test_an_empty_list_of_chats_is_refused():
    pair = tiny.pair("llama", 1, "two")
    with pytest.raises(ValueError, match="There is no chat"):
        chat_inputs([], pair.tokenizer, pair.nudging_tokenizer)
