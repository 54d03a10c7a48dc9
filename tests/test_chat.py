"""Tests `nudging-hf chat`: turns, commands and interrupts, with a saved pair of tiny random models."""

import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import tiny
import torch

import nudging_hf
from nudging_hf import cli
from nudging_hf.cli.arguments import load_pair
from nudging_hf.cli.conversation import completions
from nudging_hf.cli.wrapping import WordWrapper
from nudging_hf.pair import Pair

ARGUMENTS = ["--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair with two vocabularies. The nudging model's template refuses the word "forbidden"."""
    folder = tmp_path_factory.mktemp("pair")
    for name, tokenizer, seed in (("base", tiny.byte_bpe(), 1), ("nudging", tiny.metaspace_bpe(), 2)):
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        loudness = [2.0 if token[0] in "\u0120\u2581" else 1.0 for token in tokens]  # This makes the text have words.
        ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        model = tiny.tiny_model("llama", len(tokenizer), seed, *ids, loudness=loudness, eos_rate=0.008)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    template = folder / "nudging" / "chat_template.jinja"
    refusal = "{% if 'forbidden' in messages[-1]['content'] %}{{ raise_exception('No such words.') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    return folder


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """Runs a chat on lines of standard input and returns the exit code, standard output and standard error."""

    def run(*lines, options=(), command="chat"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        models = ["--base", f"{folder}/base", "--nudging-model", f"{folder}/nudging"]
        code = cli.main([command, *models, *ARGUMENTS, *map(str, options)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def asked(monkeypatch):
    """The chats that the models are given."""
    asked = []
    original = Pair.inputs

    def inputs(self, messages, base_template):
        asked.append([(message["role"], message["content"]) for message in messages])
        return original(self, messages, base_template)

    monkeypatch.setattr(Pair, "inputs", inputs)
    return asked


def saved(chat, path, *lines, options=()):
    code, out, _ = chat(*lines, f"/save {path}", options=options)
    assert code == 0
    return messages_in(path), out


def messages_in(path):
    return json.loads(path.read_text(encoding="utf-8"))["messages"]


# Turns ---------------------------------------------------------------------------------------------------------------


def test_each_line_is_a_turn_and_each_answer_is_what_generate_writes(chat, folder, tmp_path):
    lines = ("What is it?", "", "And then?")
    messages, out = saved(chat, tmp_path / "chat.json", *lines, options=["--system", "Be brief."])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    given = ["chat", "--base", f"{folder}/base", "--nudging-model", f"{folder}/nudging", "--quiet"]
    args = cli._parser(given).parse_args(given)
    pair = load_pair(args)
    for i in (2, 4):
        before = [{"role": message["role"], "content": message["content"]} for message in messages[:i]]
        inputs = pair.inputs(before, nudging_hf.DEFAULT_TEMPLATE)
        output = nudging_hf.generate(
            pair.base, **inputs, **pair.arguments, max_new_tokens=12, return_dict_in_generate=True
        )
        spans = nudging_hf.spans_of(output, pair.tokenizer)[0]
        assert messages[i]["content"] == "".join(span.text for span in spans)
        assert messages[i]["nudged_spans"] == [[span.start, span.end] for span in spans if span.nudged]
        assert messages[i]["finish_reason"] == output.finish_reasons[0]
        assert messages[i]["content"].strip() in out


def test_answers_go_to_standard_output_and_figures_to_standard_error(chat):
    code, out, err = chat("What is it?", "And then?")
    assert code == 0
    assert err.count("nudged words: ") == err.count("finished: ") == 2
    assert "nudged words" not in out
    assert chat("What is it?", "And then?", options=["--quiet"]) == (0, out, "")


def test_a_turn_that_cannot_be_answered_is_left_out_and_the_chat_goes_on(chat, asked):
    code, _, err = chat("What is it?", "This is forbidden.", "And then?")
    assert code == 0
    assert "error: The nudging model's chat template refuses the messages: No such words." in err
    assert [text for role, text in asked[-1] if role == "user"] == ["What is it?", "And then?"]


def test_an_error_of_torch_is_reported_and_the_chat_goes_on(chat, monkeypatch):
    def generate(*args, **kwargs):
        raise torch.OutOfMemoryError("Out of memory.\nMany more lines.")

    monkeypatch.setattr("nudging_hf.pair.generate", generate)
    code, _, err = chat("What is it?", "/threshold")
    assert code == 0 and "error: OutOfMemoryError: Out of memory.; /new" in err and "top1 is 0.4" in err


# Commands ------------------------------------------------------------------------------------------------------------


def test_new_starts_over(chat, asked):
    chat("What is it?", "/new", "And then?", options=["--system", "Be brief."])
    assert asked[-1] == [("system", "Be brief."), ("user", "And then?")]


def test_the_system_message_can_be_changed_and_removed(chat, asked):
    chat("One?", "/system Be brief.", "Two?", "/system", "Three?")
    assert [messages[0] for messages in asked] == [("user", "One?"), ("system", "Be brief."), ("user", "One?")]


def test_a_new_threshold_applies_from_the_next_answer_on(chat, tmp_path):
    lines = ("One?", "/threshold 0", "Two?", "/threshold 2", "Three?", "/threshold auto", "Four?")
    answers = saved(chat, tmp_path / "chat.json", *lines)[0][1::2]
    assert [answer["nudge_threshold"] for answer in answers] == [0.4, 0.0, 2.0, "auto"]
    assert len(answers[1]["nudged_spans"]) <= 1  # At most the first word is nudged.
    _, _, err = chat("/threshold", "/threshold 0.7", "/threshold", options=["--quiet"])
    assert [line for line in err.splitlines() if line] == [f"The threshold of top1 is {t}." for t in (0.4, 0.7, 0.7)]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/threshold x", "/threshold: expected a number such as 0.4, or auto, got 'x'."),
        ("/threshold -1", "`nudge_threshold` must be >= 0"),
        ("/save", "/save takes the name of a file."),
        ("/save /no/such/folder/chat.json", "The chat cannot be saved: "),
        ("/nonsense", "There is no command /nonsense; /help lists them."),
    ],
)
def test_a_wrong_command_is_reported_and_changes_nothing(chat, asked, command, message):
    code, _, err = chat("One?", command, "Two?", options=["--quiet"])
    assert code == 0 and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert [text for role, text in asked[-1] if role == "user"] == ["One?", "Two?"]


def test_saving_again_overwrites_the_chat_s_own_file_and_no_other(chat, tmp_path):
    path = tmp_path / "chat.json"
    chat("One?", f"/save {path}", "Two?", "/save")
    first = path.read_bytes()
    assert first.count(b'"user"') == 2
    _, _, err = chat("Three?", f"/save {path}")
    assert "is there already" in err and path.read_bytes() == first


def test_help_lists_every_command_and_quit_ends(chat, asked):
    _, _, err = chat("/help", "/quit", "One?")
    assert all(name in err for name in ("/new", "/system", "/threshold", "/save", "/help", "/quit"))
    assert asked == []


def test_retry_asks_the_last_question_again_and_undo_takes_it_back(chat, asked, tmp_path):
    lines = ("One?", "Two?", "/threshold 0", "/retry", "/undo", "Three?")
    messages, _ = saved(chat, tmp_path / "chat.json", *lines)
    assert [messages[-1] for messages in asked] == [("user", text) for text in ("One?", "Two?", "Two?", "Three?")]
    assert [message["content"] for message in messages[::2]] == ["One?", "Three?"]
    assert [len(messages) for messages in asked] == [1, 3, 3, 3]


def test_a_retry_that_fails_keeps_the_former_answer(chat, monkeypatch, tmp_path):
    before, _ = saved(chat, tmp_path / "chat.json", "One?")
    monkeypatch.setattr("nudging_hf.pair.generate", interrupted([]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nudging_hf.cli.chat.say", lambda text: None)
        chat(f"/load {tmp_path / 'chat.json'}", "/retry")
    assert messages_in(tmp_path / "chat.json") == before


def test_a_loaded_chat_goes_on_where_it_was_saved(chat, asked, tmp_path):
    path = tmp_path / "chat.json"
    before, _ = saved(chat, path, "One?", options=["--system", "Be brief."])
    chat(f"/load {path}", "Two?", "/save")
    after = messages_in(path)
    assert after[: len(before)] == before and after[len(before)]["content"] == "Two?"
    assert asked[-1][:2] == [("system", "Be brief."), ("user", "One?")]


def test_what_is_no_saved_chat_is_not_loaded(chat, asked, tmp_path):
    for number, text in enumerate(("{", "[]", "{}", '{"messages": [{"role": "user", "content": "Why?"}]}')):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        _, _, err = chat("One?", f"/load {path}", "Two?", options=["--quiet"])
        assert err.startswith(f"error: {path} is no chat that /save wrote: ")
        assert [text for role, text in asked[-1] if role == "user"] == ["One?", "Two?"]


def test_a_prompt_that_fills_the_context_is_warned_of(chat, monkeypatch):
    monkeypatch.setattr("nudging_hf.pair.generate", interrupted([]))
    assert "the answer may pass its context of" not in chat("One?")[2]
    err = chat("One?", options=["--max-new-tokens", 10**6])[2]
    assert "the prompt of the base has" in err and "the prompt of the nudging model has" in err


def test_commands_and_file_names_are_completed(tmp_path):
    (tmp_path / "chats").mkdir()
    (tmp_path / "chat.json").touch()
    assert completions("/s") == ["/system", "/save"] and completions("/q") == ["/quit"]
    assert completions("") == completions("Who") == completions("/system c") == []
    assert completions(f"/load {tmp_path}/ch") == [f"/load {tmp_path}/chat.json", f"/load {tmp_path}/chats/"]


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_lines_are_broken_between_words_and_nothing_else_changes(monkeypatch, pieces):
    monkeypatch.setenv("COLUMNS", "20")
    text = "Let's go through it, \033[1;32mone step\033[0m at a time.\n\n  A\tand abcdefghijklmnopqrstuvwxyz 日本 e\n"
    out = io.StringIO()
    wrapper = WordWrapper(out)
    for start in range(0, len(text), pieces):
        wrapper.write(text[start : start + pieces])
    plain = out.getvalue().replace("\033[1;32m", "").replace("\033[0m", "")
    assert out.getvalue().split() == text.split()
    assert plain.splitlines()[:2] == ["Let's go through it,", "one step at a time."]
    assert all(len(line) <= 20 for line in plain.splitlines() if "abc" not in line)


# The terminal --------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch, folder, capsys):
    """Runs a chat as in a terminal. `typed` yields lines, or raises the exception of a key such as Ctrl-C."""

    def run(typed, options=()):
        monkeypatch.setenv("NO_COLOR", "1")
        keys = iter(typed)

        def read(prompt):
            key = next(keys, EOFError)
            if key in (EOFError, KeyboardInterrupt):
                raise key
            return key

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        models = ["--base", f"{folder}/base", "--nudging-model", f"{folder}/nudging"]
        code = cli.main(["chat", *models, *ARGUMENTS, *options])
        return code, *capsys.readouterr()

    return run


def interrupted(pieces):
    """A `generate` that is interrupted after some pieces."""

    def generate(*args, streamer, **kwargs):
        for ids, nudged in pieces:
            streamer.put_marked(torch.tensor(ids), nudged)
        raise KeyboardInterrupt

    return generate


def test_an_interrupt_keeps_what_was_written_and_the_chat_goes_on(terminal, monkeypatch, tmp_path):
    tokenizer = tiny.byte_bpe()
    pieces = [(tokenizer.encode("So the", add_special_tokens=False), True), (tokenizer.encode(" other"), False)]
    monkeypatch.setattr("nudging_hf.pair.generate", interrupted(pieces))
    code, out, err = terminal(["One?", f"/save {tmp_path / 'chat.json'}"])
    assert code == 0 and "⟦So the⟧ other\n" in out and "finished: interrupted" in err
    answer = messages_in(tmp_path / "chat.json")[-1]
    assert (answer["content"], answer["nudged_spans"]) == ("So the other", [[0, 6]])
    assert answer["finish_reason"] == "interrupted"


def test_an_interrupt_before_the_first_word_leaves_the_question_out(terminal, monkeypatch, tmp_path):
    monkeypatch.setattr("nudging_hf.pair.generate", interrupted([]))
    terminal(["One?", f"/save {tmp_path / 'chat.json'}"])
    assert messages_in(tmp_path / "chat.json") == []


def test_an_interrupt_at_the_prompt_drops_the_line_and_the_end_of_input_quits(terminal, asked):
    code, _, err = terminal([KeyboardInterrupt, "One?", EOFError, "Two?"])
    assert code == 0 and "Ctrl-D quits." in err
    assert [messages[-1][1] for messages in asked] == ["One?"]


def test_a_line_that_is_not_utf_8_is_left_out_and_the_chat_goes_on(folder, asked, monkeypatch, capsys):
    data = "One, café?\n".encode() + b"Two, caf\xe9?\n/system \xe9\nThree?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    code = cli.main(["chat", "--base", f"{folder}/base", "--nudging-model", f"{folder}/nudging", *ARGUMENTS])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 0 and [messages[-1] for messages in asked] == [("user", "One, café?"), ("user", "Three?")]
    assert all(role != "system" for messages in asked for role, _ in messages)
    text = "error: The line, which is left out, is not valid utf-8: it has the byte 0xe9 after"
    assert said == [f"{text} 'Two, caf'; give it as UTF-8.", f"{text} '/system '; give it as UTF-8."]


def test_a_typed_line_that_is_not_utf_8_is_left_out(terminal, asked):
    code, _, err = terminal(["One\udce9?", "Two?", EOFError])
    assert code == 0 and [messages[-1][1] for messages in asked] == ["Two?"]
    assert "error: The line, which is left out, is not valid utf-8: it has the byte 0xe9 after 'One'" in err


def test_an_interrupt_ends_a_chat_that_is_not_typed(chat, monkeypatch):
    monkeypatch.setattr("nudging_hf.pair.generate", interrupted([([70], True)]))
    code, out, _ = chat("One?", "Two?")
    assert code == 130 and out.count("\n") == 1


# generate --html -----------------------------------------------------------------------------------------------------


def test_generate_writes_a_page_with_the_answer(chat, tmp_path):
    class Text(HTMLParser):
        text = ""

        def handle_data(self, data):
            self.text += data

    path = tmp_path / "out.html"
    options = ["--html", path, "--system", "Be <brief>.", "--threshold", 0.7]
    code, out, err = chat("What is it?", options=options, command="generate")
    page = Text()
    page.feed(path.read_text(encoding="utf-8"))
    assert code == 0 and out.strip() in page.text and "Be <brief>.\n\nWhat is it?" in page.text
    figures = err.splitlines()[-1].split(" | ")
    assert "γ = 0.7" in page.text and all(figure.split(": ")[1] in page.text for figure in figures)
    html = path.read_text(encoding="utf-8")
    assert html.count("data-tip=") > 3 and html.count("<dt>nudged words</dt>") == 1
    assert html.count("the base alone would have written:</p>") == html.count("<mark>") - 1 > 0


def test_nudges_are_explained_on_standard_error(chat):
    code, out, err = chat("What is it?", options=["--explain"], command="generate")
    told = [line for line in err.splitlines() if line.startswith("\u27e6")]
    assert code == 0 and told and all(re.search(r"\u27e7 base: .+ \(0\.\d{3}\); rank \d+$", line) for line in told)
    code, same, err = chat("What is it?", "/why")
    assert (same, [line for line in err.splitlines() if line.startswith("\u27e6")]) == (out, told)


def test_a_page_tells_of_the_last_answer(chat, tmp_path):
    path = tmp_path / "page.html"
    code, _, err = chat("One?", "/page", f"/page {path}", "/undo", "/why", "Two?", f"/page {path}")
    html = path.read_text(encoding="utf-8")
    assert code == 0 and f"Written to {path}." in err and ">One?</div>" in html
    assert "the base alone would have written:" in html
    assert "error: /page takes the name of a file." in err and "error: /why tells of the last answer, and none" in err
    assert f"error: {path} is there already: write to another file." in err
    _, _, err = chat("One?", f"/page {tmp_path / 'no' / 'page.html'}")
    assert "error: The page cannot be written: " in err


def test_a_page_in_a_missing_folder_is_refused_before_anything_is_loaded(chat, tmp_path):
    code, out, err = chat("What?", options=["--html", tmp_path / "no" / "out.html"], command="generate")
    assert (code, out) == (2, "") and f"--html: there is no folder {tmp_path / 'no'}." in err
