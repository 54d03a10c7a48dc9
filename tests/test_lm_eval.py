"""Tests the nudged model in lm-evaluation-harness: its answers must be those of `nudging_hf.generate`."""

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny

import nudging_hf
from nudging_hf import cli
from nudging_hf.chats import messages_of

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.utils import make_table
from packaging.version import Version
from sqlitedict import SqliteDict

from nudging_hf.integrations.lm_eval import Conversation, NudgingLM, register
from nudging_hf.provenance import pieces_of
from nudging_hf.study.comparison import Models, Result, contestants_of, take_turn
from nudging_hf.study.demo import MAX_NEW_TOKENS
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.reader import Reader

MINI = Path(__file__).parents[1] / "examples" / "mini"
QUESTION = "What is the name of the thing?"
SHORT = {"until": [], "do_sample": False, "max_gen_toks": 8}

TASK = """\
task: local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
description: "{{{{messages[0].content}}}}\\n"
doc_to_text: "{{{{messages[1].content}}}}\\n"
doc_to_target: answer
process_results: !function score.score
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: {tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

SCORE = """\
from nudging_hf.study.prompts import Prompt


def score(doc, results):
    return {"exact_match": float(Prompt(**doc).is_right(results[0]))}
"""


def write_task(folder, rows, tokens):
    """Writes a user-defined task to a folder."""
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "local.yaml").write_text(TASK.format(file=file, tokens=tokens), encoding="utf-8")
    (folder / "score.py").write_text(SCORE, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def caches_are_temporary_and_only_the_given_tasks_are_read(tmp_path, monkeypatch):
    class FewTasks(lm_eval.tasks.TaskManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", FewTasks)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))


@pytest.fixture(scope="module")
def pair():
    made = tiny.pair("llama", 3, "two")
    before = made.nudging_tokenizer.chat_template
    made.nudging_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '|' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
    )
    yield made
    made.nudging_tokenizer.chat_template = before


def model(pair, **kwargs):
    return NudgingLM(
        pretrained=pair.base,
        tokenizer=pair.tokenizer,
        nudging_model=pair.nudging_model,
        nudging_tokenizer=pair.nudging_tokenizer,
        **kwargs,
    )


def requests(contexts, **gen_kwargs):
    return [
        Instance(request_type="generate_until", doc={}, arguments=(context, {**SHORT, **gen_kwargs}), idx=0)
        for context in contexts
    ]


def package(pair, base_prompt, chat, **kwargs):
    """The answer of `nudging_hf.generate`."""
    ids = pair.tokenizer(base_prompt, return_tensors="pt").input_ids
    inputs = nudging_hf.chat_inputs(chat, pair.tokenizer, pair.nudging_tokenizer)
    output = nudging_hf.generate(
        pair.base,
        input_ids=ids,
        nudging_input_ids=inputs["nudging_input_ids"],
        tokenizer=pair.tokenizer,
        nudging_model=pair.nudging_model,
        nudging_tokenizer=pair.nudging_tokenizer,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        **kwargs,
    )
    return "".join(piece.text for piece in pieces_of(output, pair.tokenizer)[0])


CONTEXTS = [f"Q: {QUESTION * n}\nA:" for n in (1, 3, 2, 1)] + ["The cat\n\n"]


# Prompts ------------------------------------------------------------------------------------------------------------


def test_plain_text_goes_to_the_base_as_it_is_and_to_the_nudging_model_as_one_turn(pair):
    answers = model(pair, nudge_threshold=0.6).generate_until(requests(CONTEXTS), disable_tqdm=True)
    for context, answer in zip(CONTEXTS, answers, strict=True):
        assert answer == package(pair, context, messages_of(context.rstrip("\n")), nudge_threshold=0.6)
    assert len(set(answers)) > 2


def test_each_model_gets_messages_in_its_own_form_without_the_harness_s_line_breaks(pair):
    lm = model(pair)
    said = [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": f"Question: {QUESTION}\n"}]
    few = [*messages_of(f"Question: {QUESTION}", "Be brief."), {"role": "assistant", "content": "It."}, said[1]]
    answers = lm.generate_until(requests([lm.apply_chat_template(said), lm.apply_chat_template(few)]))
    clean = messages_of(f"Question: {QUESTION}", "Be brief.")
    assert answers[0] == package(pair, f"Be brief.\nQuestion: {QUESTION}\n", clean)
    ask = f"Question: {QUESTION}\n"
    assert answers[1] == package(pair, f"Be brief.\n{ask}It.\n{ask}", [*clean, few[2], clean[1]])


def test_the_base_s_template_is_the_user_s_and_may_come_from_a_command_line(pair):
    lm = model(pair, base_template="Q: {user}\\nA:")
    answer = lm.generate_until(requests([lm.apply_chat_template(messages_of(QUESTION, "Be brief."))]))
    assert answer == [package(pair, f"Q: {QUESTION}\nA:", messages_of(QUESTION, "Be brief."))]


def test_a_task_s_arguments_may_set_parameters(pair):
    lm = model(pair, nudge_threshold=0.3)
    said = lm.generate_until([*requests(CONTEXTS[:1]), *requests(CONTEXTS[:1], nudge_threshold=2.0)])
    chat = messages_of(CONTEXTS[0])
    assert said == [package(pair, CONTEXTS[0], chat, nudge_threshold=threshold) for threshold in (0.3, 2.0)]
    assert said[0] != said[1]


# Answers and results in the harness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_give_the_answers_of_single_questions_in_their_order(pair, batch_size):
    singles = model(pair, batch_size=1).generate_until(requests(CONTEXTS), disable_tqdm=True)
    assert model(pair, batch_size=batch_size).generate_until(requests(CONTEXTS), disable_tqdm=True) == singles


def test_stop_strings_end_an_answer_and_are_cut_off(pair):
    whole = model(pair).generate_until(requests(CONTEXTS), disable_tqdm=True)
    stop = whole[0][3:5]
    lm = model(pair)
    cut = lm.generate_until(requests(CONTEXTS, until=[stop, ""]), disable_tqdm=True)
    assert cut == [answer.split(stop)[0] for answer in whole]
    assert lm.get_model_info()["finish_reasons"]["stop_string"] == sum(stop in answer for answer in whole) > 0


def test_the_results_describe_the_model(pair):
    lm = model(pair, nudge_threshold=0.7, num_draft_tokens=2)
    assert lm.get_model_info()["nudge_rate"] is None
    lm.generate_until(requests(CONTEXTS), disable_tqdm=True)
    info = lm.get_model_info()
    assert (info["nudge_threshold"], info["num_draft_tokens"], info["takeover_on_agreement"]) == (0.7, 2, True)
    assert 0 < info["nudge_rate"] <= 1 and sum(info["finish_reasons"].values()) == len(CONTEXTS)
    assert info["nudging_model_num_parameters"] == pair.nudging_model.num_parameters()
    json.dumps({name: value for name, value in info.items() if name not in ("model_dtype", "model_sha")})


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_a_control_token_of_the_base_is_text_in_a_message_and_meant_in_the_harness_prompt(pair, add_bos_token):
    lm, spelt = model(pair, add_bos_token=add_bos_token), f"so {pair.tokenizer.eos_token}"

    def ends_in(context):
        return int((lm._inputs([context], 8)["input_ids"] == pair.tokenizer.eos_token_id).sum())

    assert ends_in(lm.apply_chat_template(messages_of(spelt))) == ends_in(lm.apply_chat_template(messages_of("so")))
    assert ends_in(spelt) == ends_in("so") + 1


ROWS = [
    {
        "task": "things",
        "prompt": f"Be brief.\nQuestion: {QUESTION * n}\n",
        "messages": messages_of(f"Question: {QUESTION * n}", "Be brief."),
        "pattern": r"(\w)",
        "answer": "e",
    }
    for n in (1, 3, 2, 4)
]


def evaluate(lm, folder, **kwargs):
    """The answers in the order of the rows, and the harness's results."""
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["local"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
        bootstrap_iters=0,
        **{"apply_chat_template": True, **kwargs},
    )
    rows = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in rows], results


def test_cached_requests_give_the_same_answers(pair, tmp_path):
    folder = write_task(tmp_path / "task", ROWS[:2], 8)
    fresh, _ = evaluate(model(pair), folder)
    made, _ = evaluate(model(pair), folder, cache_requests=True)
    assert list((tmp_path / "requests").iterdir())
    lm = model(pair)
    lm.apply_chat_template = None  # The cached requests must be used, so nothing may render them again.
    kept, _ = evaluate(lm, folder, cache_requests=True)
    assert fresh == made == kept
    assert fresh == [package(pair, row["prompt"], row["messages"]) for row in ROWS[:2]]


def test_a_killed_run_continues(pair, tmp_path):
    folder, cache = write_task(tmp_path / "task", ROWS, 8), str(tmp_path / "answers")
    whole, results = evaluate(model(pair), folder)
    lm = model(pair)
    answers, calls = lm._answers, []

    def killed(contexts, gen_kwargs):
        calls.append(contexts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answers(contexts, gen_kwargs)

    lm._answers = killed
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, folder, use_cache=cache)
    lm = model(pair)
    resumed, again = evaluate(lm, folder, use_cache=cache)
    assert resumed == whole and again["results"] == results["results"]
    assert sum(lm.get_model_info()["finish_reasons"].values()) == 2


def test_a_cache_of_other_settings_is_refused_and_stays_as_it_was(pair, tmp_path):
    folder, cache = write_task(tmp_path / "task", ROWS[:2], 8), str(tmp_path / "answers")
    whole, _ = evaluate(model(pair, nudge_threshold=0.3), folder, use_cache=cache)
    for changed, said in (
        ({"nudge_threshold": 0.7}, r"nudge_threshold=0.3 \(now 0.7\): give each setting a file of its own"),
        ({"nudge_threshold": 0.3, "base_template": "{user}"}, "base_template="),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(model(pair, **changed), folder, use_cache=cache)
    lm = model(pair, nudge_threshold=0.3)
    assert evaluate(lm, folder, use_cache=cache)[0] == whole and not lm.get_model_info()["finish_reasons"]


def test_a_cache_that_another_model_wrote_is_refused(pair, tmp_path):
    with SqliteDict(f"{tmp_path}/answers_rank0.db", autocommit=True) as answers:
        answers["some hash"] = "an answer"
    folder = write_task(tmp_path / "task", ROWS[:1], 8)
    with pytest.raises(ValueError, match=r"pretrained=None \(now "):
        evaluate(model(pair), folder, use_cache=f"{tmp_path}/answers")


def test_the_nudge_rate_stands_in_the_table_and_with_each_sample_also_of_cached_answers(pair, tmp_path):
    register()
    folder, cache = write_task(tmp_path / "task", ROWS, 8), str(tmp_path / "answers")
    lm = model(pair)
    _, fresh = evaluate(lm, folder, use_cache=cache)
    _, kept = evaluate(model(pair), folder, use_cache=cache)
    rate = fresh["results"]["local"]["nudge_rate,none"]
    assert rate == kept["results"]["local"]["nudge_rate,none"] == lm.get_model_info()["nudge_rate"]
    rates = [sample["nudge_rate"] for sample in fresh["samples"]["local"]]
    assert min(rates) <= rate <= max(rates) and rates == [sample["nudge_rate"] for sample in kept["samples"]["local"]]
    json.dumps(rates)


def test_the_table_has_readable_headings():
    results = {"results": {"a": {"alias": "a", "nudge_rate,none": 0.1}}, "versions": {"a": 1}}
    if Version(version("pytablewriter")) < Version("1.2"):  # What the extra installs is newer.
        pytest.skip("The pytablewriter of this environment is too old.")
    head, _, row, *_ = make_table(results).splitlines()
    assert all(name in head for name in ("Tasks", "Version", "Metric", "Value")) and "nudge_rate" in row


def test_samples_are_returned_only_where_they_were_asked_for(pair, tmp_path):
    register()
    manager = lm_eval.tasks.TaskManager(include_path=str(write_task(tmp_path / "task", ROWS[:1], 8)))
    found = lm_eval.simple_evaluate(
        model=model(pair), tasks=["local"], task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert "samples" not in found and "nudge_rate,none" in found["results"]["local"]


def test_a_limit_asks_only_the_first_questions(pair, tmp_path):
    folder = write_task(tmp_path / "task", ROWS, 8)
    whole, _ = evaluate(model(pair), folder)
    assert evaluate(model(pair), folder, limit=2)[0] == whole[:2]


def test_without_a_chat_template_the_base_reads_the_same(pair, tmp_path):
    folder = write_task(tmp_path / "task", ROWS[:2], 8)
    said, _ = evaluate(model(pair), folder, apply_chat_template=False)
    assert said == [package(pair, row["prompt"], messages_of(row["prompt"].rstrip("\n"))) for row in ROWS[:2]]


# The mini pair -------------------------------------------------------------------------------------------------------


def test_the_harness_s_command_line_gives_the_accuracy_of_the_demonstration(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("world", MINI / "world.py")
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    rows = [world.row(problem) for problem in world.problem_set("dev", world.DEV_SEED, 1)]
    for row in rows[::2]:
        row["answer"] += "0"  # Otherwise all answers would be right.
    folder = write_task(tmp_path / "task", rows, MAX_NEW_TOKENS)
    models = f"pretrained={MINI}/models/base,nudging_model={MINI}/models/nudging,nudge_threshold=0.4"
    args = ["--model", "nudging_hf", "--model_args", models, "--tasks", "local", "--include_path", folder]
    args += ["--device", "cpu", "--batch_size", 3, "--apply_chat_template"]
    code = cli.main([*map(str, ["eval", *args, "--output_path", tmp_path / "out", "--log_samples"])])
    assert code == 0 and "local" in capsys.readouterr().out
    report = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    lines = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])

    two = Models(Reader.load(MINI / "models/base", chat=False), Reader.load(MINI / "models/nudging"))
    contestant = contestants_of(two, [nudging_hf.NudgingConfig(0.4)], with_rivals=False)[0][-1]
    questions = [Prompt(**row) for row in rows]
    own = Result(contestant, questions, [take_turn(contestant, questions, MAX_NEW_TOKENS)])
    assert [sample["resps"][0][0] for sample in samples] == [answer.text for answer in own.answers]
    assert report["results"]["local"]["exact_match,none"] == own.accuracy() < 1
    nudged, words = own.nudged_words
    config = report["config"]
    assert config["nudge_rate"] == nudged / words and config["nudge_threshold"] == 0.4
    assert config["nudging_model"].endswith("models/nudging") and config["nudging_model_num_parameters"] == 153840
    assert sys.argv[0] != "lm-eval"


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["loglikelihood", "loglikelihood_rolling"])
def test_texts_are_not_scored(pair, scores):
    with pytest.raises(ValueError, match="a nudged model has no probabilities"):
        getattr(model(pair), scores)([Instance(scores, {}, ("a", "b"), 0)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"nudge_threshold": -1}, "nudge_threshold"),
        ({"base_template": "{question}"}, "may have the fields"),
        ({"nudge_treshold": 0.3}, "no argument 'nudge_treshold', did you mean 'nudge_threshold'"),
        ({"nudging_mode": "x"}, "did you mean 'nudging_model'"),
        ({"nudging_strength": 1}, "no argument 'nudging_strength'; nudging has base_template, "),
        ({"max_lenght": 8}, "did you mean 'max_length'"),
        ({"think_end_token": 7}, "give the text that ends the thinking"),
        ({"nudging_model": None}, "--model_args nudging_model="),
        ({"nudging_model": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_errors_name_the_argument_to_correct(pair, kwargs, message):
    given = {"nudging_model": pair.nudging_model, "nudging_tokenizer": pair.nudging_tokenizer, **kwargs}
    with pytest.raises(ValueError, match=message):
        NudgingLM(pretrained=pair.base, tokenizer=pair.tokenizer, **given)


def test_unsupported_chat_requests_are_refused(pair):
    with pytest.raises(ValueError, match="gen_prefix"):
        model(pair).apply_chat_template(messages_of("a"), add_generation_prompt=False)
    with pytest.raises(ValueError, match="takes no name"):
        model(pair).chat_template("tool_use")
    with pytest.raises(ValueError, match="lower `max_gen_toks`"):
        model(pair, max_length=8).generate_until(requests(["a"]), disable_tqdm=True)
    assert model(pair).chat_template(False) is None
    assert model(pair).chat_template(True) == pair.nudging_tokenizer.chat_template


# Registration -------------------------------------------------------------------------------------------------------


def test_the_harness_knows_the_model_by_its_name():
    register()
    register()
    assert get_model("nudging_hf") is NudgingLM
    assert isinstance(Conversation("[]"), str)


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "nudging_hf.integrations.lm_eval")
    monkeypatch.delattr("nudging_hf.integrations.lm_eval")
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", "--model", "nudging_hf"]) == 2
    assert "nudging-hf[lm-eval]" in capsys.readouterr().err
