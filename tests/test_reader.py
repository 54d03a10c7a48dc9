"""Tests how prompts are read: one file in each of its forms gives the same prompts, and what is odd is refused."""

import csv
import io
import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nudging_hf.chats import messages_of
from nudging_hf.study.prompt_files import read_labelled_prompts, read_prompts
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.records import prompts_of

MINI = Path(__file__).parents[1] / "examples" / "mini"
# Any character but surrogates, control characters and the carriage return, which a table does not keep.
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))).filter(str.strip)
LINE_ENDS = st.sampled_from(["\n", "\r\n"])


def prompts_in(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return read_prompts(path)[0]


def as_table(rows, delimiter):
    written = io.StringIO()
    writer = csv.DictWriter(written, rows[0], delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


@settings(max_examples=25)
@given(
    st.lists(st.tuples(TEXT, st.integers() | st.sampled_from(["Paris", "B", "no"])), min_size=1), LINE_ENDS, st.data()
)
def test_every_form_of_a_file_gives_the_same_prompts(tmp_path_factory, rows, end, data):
    folder = tmp_path_factory.mktemp("forms")
    rows = [{"question": question, "answer": answer} for question, answer in rows]
    expected = [Prompt(messages_of(row["question"]), answer=str(row["answer"])) for row in rows]
    assert prompts_of(rows) == expected
    lines = [json.dumps(row, ensure_ascii=data.draw(st.booleans())) for row in rows]
    forms = {
        "a.jsonl": "\n".join(lines),
        "b.json": json.dumps(rows, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=False),
        "c": "\n\n".join(lines) + "\n",
        "d": json.dumps(rows, ensure_ascii=False),
        "e.csv": as_table(rows, ","),
        "f.tsv": as_table(rows, "\t"),
        "g.csv": as_table(rows, ";"),
        "h": as_table(rows, ","),
    }
    for name, text in forms.items():
        text = data.draw(st.sampled_from(["", "\ufeff"])) + text.replace("\n", end)
        assert prompts_in(folder, name, text) == expected, name


@settings(max_examples=25)
@given(st.lists(TEXT.filter(lambda text: text.strip()[0] not in "{[" and "," not in text), min_size=1), LINE_ENDS)
def test_plain_text_is_a_prompt_a_line(tmp_path_factory, texts, end):
    found = prompts_in(tmp_path_factory.mktemp("text"), "prompts.txt", end.join(texts))
    assert found == prompts_of([text.strip() for text in texts])


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}, *messages_of("Where?")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Where?"}, Prompt(messages_of("Where?"))),
        ({"prompt": CHAT}, Prompt(CHAT)),
        ({"messages": CHAT, "prompt": "Q: Where?\n"}, Prompt(CHAT, "Q: Where?\n")),
        ({"messages": [*CHAT, {"role": "assistant", "content": "There."}]}, Prompt(CHAT, answer="There.")),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Hello"},
                    {"from": "gpt", "value": "Hi."},
                ]
            },
            Prompt(messages_of("Hello", "Be brief."), answer="Hi."),
        ),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            Prompt(messages_of("Add.\n\n1, 2"), answer="3"),
        ),
        ({"instruction": "Say hello.", "input": "", "output": ""}, Prompt(messages_of("Say hello."))),
        ({"question": "Who?", "context": "Ann came."}, Prompt(messages_of("Who?\n\nAnn came."))),
        ({"input": "1 + 1 =", "target": 2, "score": 0.5}, Prompt(messages_of("1 + 1 ="), answer="2")),
        ({"question": "How?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}, Prompt(messages_of("How?"), answer="18")),
        ({"question": "Is it?", "answer": True}, Prompt(messages_of("Is it?"), answer="yes")),
        ({"Question ": "Who?", "ANSWER": 0.5, "task": 7}, Prompt(messages_of("Who?"), answer="0.5", task="7")),
        ({"question": "Who?", "system": "Be brief.", "answer": None}, Prompt(messages_of("Who?", "Be brief."))),
        ({"question": "2?", "answer": "2", "target": 2}, Prompt(messages_of("2?"), answer="2")),
        (CHAT, Prompt(CHAT)),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_fields_in_use_are_understood(record, expected):
    assert prompts_of([record]) == [expected]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "Why?"}, "expected one of `messages`, .*, got `text`"),
        ({}, "got no field"),
        (7, "got 7"),
        ({"question": " "}, "`question` is empty"),
        ({"question": 12}, "`question` must be text, got 12"),
        ({"question": "a", "prompt": "b"}, "`question`, `prompt` are several questions"),
        ({"question": "a", "answer": ["b"]}, r"`answer` must be text or a number, got \['b'\]"),
        ({"question": "a", "answer": float("nan")}, "`answer` must be text or a number, got nan"),
        ({"question": "a", "answer": "b", "output": "c"}, "`answer`, `output` differ"),
        ({"question": "a", "choices": ["b", "c"]}, "`choices` belongs to the question"),
        ({"question": "a", "pattern": "(a)"}, "`pattern` needs an `answer`"),
        ({"question": "a", "pattern": "(", "answer": "a"}, "`pattern` is no regular expression"),
        ({"question": "a", "pattern": "a", "answer": "a"}, "`pattern` must have one group, got 0"),
        ({"messages": []}, "`messages`: A chat must be a list of messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "`messages`: a content is empty"),
        ({"messages": [{"from": "human", "text": "a"}]}, "`messages`: a message must be"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "`conversations`: `from` must be one of .*, got 'tool'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "user and assistant alternate"),
        ({"messages": messages_of("a", "b"), "system": "c"}, "`system` is a second system message"),
    ],
)
def test_a_record_that_is_not_understood_is_refused_with_its_field(record, says):
    with pytest.raises(ValueError, match=f"`prompts`, number 2, is no prompt: .*{says}"):
        prompts_of(["Why?", record])


GOOD = '{"question": "Who?"}\n'


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", GOOD * 6 + '{"answer": "Ann"}\n', "line 7, is no prompt: expected one of .*, got `answer`"),
        ("a.jsonl", GOOD + "\n{'question': 'Who?'}\n", "line 3, is no JSON"),
        ("a.jsonl", '{"question": "Who?"\n' + GOOD, "line 1, is no JSON"),
        ("a.jsonl", "question,answer\nWho?,Ann\n", "line 1, is no JSON"),
        ("a.json", '[{"question": "Who?"},\n {"answer": "Ann"}]', "line 2, is no prompt"),
        ("a.json", '[{"question": "Who?"}\n {"question": "Why?"}]', "line 2, is no JSON"),
        ("a.json", '[{"question": "Who?"}', "line 1, is no JSON"),
        ("a.json", '{\n"data": [{"question": "Who?"}]}', "line 1, is no prompt: expected one of .*, got `data`"),
        ("a.json", "[]", "holds no prompts"),
        ("a.csv", "Who?,Ann\nWhy?,So\n", "line 1: expected one of .* in the header, got `Who\\?`, `Ann`"),
        ("a.csv", "question,answer\n\nWho?,Ann\nWhy, pray?,So\n", "line 4, has 3 cells, and the header has 2"),
        ("a.csv", 'question,answer\n"Who\nis it?",Ann\n,So\n', "line 4, is no prompt: `question` is empty"),
        ("a.csv", 'question,answer\nWho?,Ann\n"Why?,So\n', "line 3, is no row of a table"),
        ("a.csv", "question,question\nWho?,Ann\n", "the header has `question` more than once"),
        ("a.csv", "question\n", "holds no prompts"),
        ("a.txt", "Who?\n\x00\x01\n", r"line 2, holds the control character '\\x00'"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "line 1, holds the byte 0x89, which is not UTF-8"),
        ("a.txt", "Who?\n".encode("utf-16"), r"line 1, .* \(it seems to be UTF-16\): save the file as UTF-8"),
        ("a.txt", "Who?\n".encode("utf-16-le"), "line 1, holds the control character"),
        ("a.txt", "Who?\rWhy?\r", "lines end at a carriage return alone"),
        ("a.txt", " \n\n", "holds no prompts"),
        ("a.parquet", b"PAR1", "line 1: a file of the kind .parquet is not read"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_understood_is_refused_with_its_line(tmp_path, name, data, says):
    with pytest.raises(ValueError, match=says) as error:
        prompts_in(tmp_path, name, data)
    assert str(error.value).startswith(str(tmp_path / name))


def test_plain_text_with_commas_is_no_table(tmp_path):
    lines = ["Who, and why?", "question, or answer?", "a,b", "one\u2028two\x85three"]
    assert prompts_in(tmp_path, "a.txt", "\n".join(lines)) == prompts_of(lines)


def test_a_data_set_and_its_columns_are_read_and_a_single_text_or_a_set_of_splits_is_not():
    data = datasets.Dataset.from_list([{"question": "Who?", "answer": 7}, {"question": "Why?", "answer": None}])
    expected = [Prompt(messages_of("Who?"), answer="7"), Prompt(messages_of("Why?"))]
    assert prompts_of(data) == expected == prompts_of(expected)
    assert prompts_of(data["question"]) == prompts_of(["Who?", "Why?"])
    for wrong in (datasets.DatasetDict({"test": data}), "Who?", Path("prompts.jsonl")):
        with pytest.raises(ValueError, match=f"must be a list of prompts, got one {type(wrong).__name__}"):
            prompts_of(wrong)


def test_what_was_read_is_told_in_one_line(tmp_path):
    long = " ".join(["word"] * 13)
    rows = [{"question": "How\nmany?", "answer": 18}, {"question": "Who?", "answer": "Ann"}, {"question": "Why?"},
            {"question": "How?", "answer": long}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts, said = read_prompts(tmp_path / "a.jsonl")
    assert said == (
        f"{tmp_path / 'a.jsonl'} (JSON lines): 4 chats, 3 with answers (1 read by the last number; 1 read by what the "
        "text concludes with; 1 read by a judge alone, being too long for a rule); the first: “How many?” -> “18”"
    )
    assert [prompt.is_labelled for prompt in prompts] == [True, True, False, False]
    with pytest.raises(ValueError, match="needs the right answer to each prompt, and 2 of 4 have none"):
        read_labelled_prompts(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("id,question,gold answer\n1,Who?,Ann\n")
    assert read_prompts(tmp_path / "a.csv")[1].endswith("the first: “Who?”; ignored: `id`, `gold answer`")
    (tmp_path / "a.txt").write_text("Who?\n")
    assert read_prompts(tmp_path / "a.txt")[1].endswith(
        "(plain text, a prompt a line): 1 chat, none with an answer; the first: “Who?”"
    )
    assert "400 chats, 400 with answers (400 read by a pattern)" in read_prompts(MINI / "heldout.jsonl")[1]
