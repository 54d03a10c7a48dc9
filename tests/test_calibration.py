"""Tests calibration: the search on synthetic curves, and the rest on tiny random pairs and the mini pair."""

import copy
import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import nudging_hf
from nudging_hf import NudgingConfig, cli, spans_of
from nudging_hf.chats import messages_of
from nudging_hf.study import report
from nudging_hf.study.calibration import (
    Calibration,
    Point,
    calibrate,
    save,
    search_by_nudge_rate,
    search_by_score,
)
from nudging_hf.study.prompt_files import read_prompts
from nudging_hf.study.prompts import Prompt, built_in_prompts

MINI = Path(__file__).parents[1] / "examples" / "mini"
QUESTIONS = ["What is the name of the thing?", "Where is the dog?", "How many trees were there?"]
PROMPTS = [Prompt(messages_of(question), pattern=r"(\w)\w*", answer="t") for question in QUESTIONS]


@pytest.fixture(scope="module")
def pair():
    tiny_pair = tiny.pair("llama", 3, "two")
    return tiny_pair.base, tiny_pair.nudging_model, tiny_pair.tokenizer, tiny_pair.nudging_tokenizer


def calibrated(pair, prompts=PROMPTS, **kwargs):
    """A calibration that tries one threshold only, unless `kwargs` say otherwise."""
    return calibrate(*pair, prompts, **{"max_new_tokens": 12, "by_score": True, "thresholds": [0.5], **kwargs})


def curve_of(rate):
    """An `attempt` for the search, with 1000 words and a nudge rate that is a function of γ."""
    return lambda threshold: Point(threshold, round(1000 * rate(threshold)), 1000, 10)


# The search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.03, 0.1, 0.2, 0.5, 0.77])
@pytest.mark.parametrize("power", [0.3, 1, 4])
def test_a_rising_rate_is_met_to_within_a_hundredth_in_seven_runs(target, power):
    attempt = curve_of(lambda threshold: threshold**power)
    found = search_by_nudge_rate(attempt, target)
    nearest = min(abs(attempt(step / 100).nudge_rate - target) for step in range(101))
    assert abs(found.chosen.nudge_rate - target) <= max(0.01, nearest)
    assert len(found.curve) <= 7
    assert [point.threshold for point in found.curve] == sorted({point.threshold for point in found.curve})


@pytest.mark.parametrize("target", [0.03, 0.1, 0.5])
def test_a_gate_whose_rate_falls_is_searched_the_other_way(target):
    found = search_by_nudge_rate(curve_of(lambda threshold: 1 - threshold / 6), target, "entropy")
    assert abs(found.chosen.nudge_rate - target) <= 0.01 and len(found.curve) <= 7
    assert found.nudge_gate == "entropy" and found.threshold == pytest.approx(6 * (1 - target), abs=0.1)


def test_the_nearer_side_of_a_jump_is_chosen():
    attempt = curve_of(lambda threshold: 0.04 if threshold < 0.33 else 0.3)
    low, high = (search_by_nudge_rate(attempt, target) for target in (0.1, 0.25))
    assert low.threshold < 0.33 and low.chosen.nudge_rate == 0.04
    assert high.threshold >= 0.33 and high.chosen.nudge_rate == 0.3
    assert "No threshold comes nearer" in low.warnings[0] and low.verdict.startswith(
        "The rate misses its target (10.0%)"
    )
    assert {0.32, 0.33} <= {point.threshold for point in low.curve}  # The search tried both sides of the jump.


@pytest.mark.parametrize(
    ("rate", "threshold", "why"),
    [(0.15, 0.0, "Every threshold nudges more"), (0.06, 1.0, "Every threshold nudges less")],
)
def test_an_unreachable_target_gives_a_warning_and_the_end_of_the_curve(rate, threshold, why):
    found = search_by_nudge_rate(curve_of(lambda threshold: rate + 0.01 * (threshold - 0.5)), 0.1)
    assert threshold in {point.threshold for point in found.curve}
    assert len(found.warnings) == 1 and why in found.warnings[0]


@pytest.mark.parametrize(("rate", "warned"), [(0.2, False), (0.201, True)])
def test_more_than_a_fifth_of_nudged_words_gives_a_warning(rate, warned):
    found = search_by_nudge_rate(curve_of(lambda threshold: rate), 0.2)
    assert any("quality falls" in warning for warning in found.warnings) == warned
    assert found.verdict.startswith("The rate is on target (20.0%): at a threshold of ")


def test_the_best_score_is_chosen_and_among_equals_the_one_with_the_fewest_nudges():
    points = {0.5: (7, 90), 0.2: (9, 80), 0.3: (9, 70), 0.4: (9, 70), 0.1: (8, 10)}
    tried = []

    def attempt(threshold):
        tried.append(threshold)
        right, nudged = points[threshold]
        return Point(threshold, nudged, 1000, 10, right)

    found = search_by_score(attempt, [*points, 0.5])
    assert found.threshold == 0.3 and found.chosen.score == 0.9 and found.warnings == ()
    assert tried == [0.1, 0.2, 0.3, 0.4, 0.5] == [point.threshold for point in found.curve]


def test_a_score_of_zero_gives_a_warning_that_shows_how_an_answer_was_read(pair):
    found = calibrated(pair, [{"question": "Where?", "answer": 18}])
    assert "No answer is right at any threshold" in found.warnings[-1]
    assert (
        "is right on none of 1. Asked “Where?”" in found.warnings[-1]
        and "the last number found nothing" in found.warnings[-1]
    )


def test_the_verdict_says_what_it_rests_on_and_what_was_not_measured():
    found = Calibration(0.4, (Point(0.4, 100, 1000, 20),), 0.1)
    assert found.verdict == (
        "The rate is on target (10.0%): at a threshold of 0.4, 10.0% of the words are nudged, measured on 20 prompts "
        "with 1,000 words of answers; quality was not measured."
    )
    scored = Calibration(0.4, (Point(0.2, 10, 1000, 20, 3), Point(0.4, 100, 1000, 20, 20))).verdict
    assert scored.startswith("The score is the best of 2 thresholds: ")
    assert scored.endswith(
        "; 20 of 20 answers are right (95 % interval: 84% to 100%), and what the base alone would score was not "
        "measured."
    )


# On models ----------------------------------------------------------------------------------------------------------


def test_a_point_counts_the_answers_of_generate(pair):
    found = calibrated(pair, thresholds=[0.3, 0.6])
    base, nudger, tokenizer, nudging_tokenizer = pair
    for point in found.curve:
        nudged = words = right = 0
        for question in QUESTIONS:
            inputs = nudging_hf.chat_inputs(messages_of(question), tokenizer, nudging_tokenizer)
            out = nudging_hf.generate(
                base,
                **inputs,
                tokenizer=tokenizer,
                nudging_model=nudger,
                nudging_tokenizer=nudging_tokenizer,
                nudge_threshold=point.threshold,
                max_new_tokens=12,
                return_dict_in_generate=True,
            )
            spans = spans_of(out, tokenizer)[0]
            text = "".join(span.text for span in spans)
            start = 0
            for word in text.split():
                start = text.index(word, start)
                end = start + len(word)
                nudged += any(span.nudged and span.start < end and span.end > start for span in spans)
                words, start = words + 1, end
            right += PROMPTS[0].is_right(text)
        assert point == Point(point.threshold, nudged, words, 3, right)
    low, high = found.curve
    assert 0 < low.nudge_rate < high.nudge_rate


def test_the_batch_size_changes_nothing(pair):
    assert calibrated(pair, batch_size=1) == calibrated(pair, batch_size=2) == calibrated(pair)


def test_the_base_s_own_prompt_is_given_only_to_the_base(pair):
    label = {"pattern": "(a)", "answer": "a"}
    plain = [Prompt(prompt.messages, **label) for prompt in PROMPTS]
    same = [Prompt(prompt.messages, f"Say: {prompt.messages[0]['content']}", **label) for prompt in PROMPTS]
    found = calibrated(pair, same)
    assert found == calibrated(pair, plain, base_template="Say: {user}")
    assert found.curve != calibrated(pair, plain).curve


def test_a_nudging_model_without_a_template_reads_the_base_s_prompt(pair):
    base, nudger, tokenizer, nudging_tokenizer = pair
    echo = "{{ messages[0]['content'] }}"
    bare, echoing = (_with_template(nudging_tokenizer, template) for template in (None, echo))
    prompts = [Prompt(prompt.messages, prompt.messages[0]["content"], "(a)", "a") for prompt in PROMPTS]
    found = [calibrated((base, nudger, tokenizer, its), prompts) for its in (bare, echoing)]
    assert found[0] == found[1]


def _with_template(tokenizer, template):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


def test_the_other_parameters_are_those_given_or_else_the_base_s(pair, monkeypatch):
    less = {"max_new_tokens": 24, "thresholds": [0.3]}
    settings = NudgingConfig(num_nudging_tokens=3, takeover_on_agreement=False)
    found = calibrated(pair, nudging_config=settings, **less)
    assert found != calibrated(pair, **less)
    own = GenerationConfig(**pair[0].generation_config.to_dict(), num_nudging_tokens=3, takeover_on_agreement=False)
    monkeypatch.setattr(pair[0], "generation_config", own)
    assert found == calibrated(pair, **less)


def test_unlabelled_prompts_have_no_score(pair):
    some = [PROMPTS[0], Prompt(messages_of("Why?"))]
    found = calibrated(pair, some, by_score=False, target_nudge_rate=0.9, max_new_tokens=4)
    assert found.chosen.score is None and found.chosen.answers == 2


def test_warnings_are_logged(pair, caplog):
    with caplog.at_level(logging.WARNING):
        found = calibrated(pair)
    assert found.warnings and [record.getMessage() for record in caplog.records] == list(found.warnings)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": []}, "There are no `prompts`"),
        ({"by_score": False, "target_nudge_rate": 0}, "`target_nudge_rate`"),
        ({"by_score": False, "target_nudge_rate": 10}, "`target_nudge_rate`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"prompts": [*PROMPTS, Prompt(messages_of("Why?"))], "by_score": True}, "1 of 4 have none"),
        ({"by_score": True, "thresholds": []}, "no `thresholds`"),
        ({"by_score": True, "thresholds": [-0.1]}, "`nudge_threshold`"),
        ({"base_template": "no field"}, "needs {user} once"),
    ],
)
def test_invalid_arguments_are_refused(pair, kwargs, message):
    with pytest.raises(ValueError, match="^[^\n]*" + message.replace("{", r"\{")):
        calibrated(pair, **kwargs)


# Interrupted runs ---------------------------------------------------------------------------------------------------


def test_an_interrupted_run_continues_with_the_same_result(pair, tmp_path):
    kwargs = {"by_score": False, "target_nudge_rate": 0.865, "batch_size": 2, "max_new_tokens": 8}
    whole = calibrated(pair, **kwargs)
    assert len(whole.curve) > 2
    file, tried, again = tmp_path / "resume", [], []

    def killed(threshold, answered):
        if len(set(tried)) == 2 and tried[-1] != threshold:
            raise KeyboardInterrupt
        tried.append(threshold)

    with pytest.raises(KeyboardInterrupt):
        calibrated(pair, **kwargs, resume=file, progress=killed)
    with file.open("a") as half:
        half.write('{"threshold": 0.7')
    found = calibrated(pair, **kwargs, resume=file, progress=lambda threshold, _: again.append(threshold))
    assert found == whole
    assert again and set(again).isdisjoint(tried)

    again.clear()
    assert calibrated(pair, **kwargs, resume=file, progress=lambda threshold, _: again.append(threshold)) == whole
    assert not again


def test_a_file_of_another_setup_or_kind_is_refused(pair, tmp_path):
    file = tmp_path / "resume"
    calibrated(pair, resume=file)
    kept = file.read_text()
    for kwargs, name in (
        ({"max_new_tokens": 13}, "max_new_tokens"),
        ({"prompts": PROMPTS[:2]}, "prompts"),
        ({"base_template": "{user}"}, "base_template"),
        ({"nudging_config": NudgingConfig(num_nudging_tokens=3)}, "num_nudging_tokens"),
    ):
        with pytest.raises(ValueError, match=f"another setup \\({name} differ\\)"):
            calibrated(pair, resume=file, **kwargs)
    assert file.read_text() == kept
    setup, first, *_ = kept.splitlines()
    point = json.loads(first)
    hostile = [
        [],
        5,
        "x",
        {},
        {"threshold": 0.4},
        {**point["result"], "words": "9" * 9},
        {**point["result"], "more": 1},
    ]
    hostile += [{**point["result"], "words": value} for value in (-1, float("inf"), [[1]], None, 0.5)]
    rows = ["\n".join([setup, json.dumps({**point, "result": result}), ""]) for result in hostile]
    for text in ("[]\n", "Dear diary\n", *rows):
        file.write_text(text)
        with pytest.raises(ValueError, match="no file of finished work"):
            calibrated(pair, resume=file)
        assert file.read_text() == text


# Files --------------------------------------------------------------------------------------------------------------


def test_the_built_in_prompts_are_twenty_different_questions():
    prompts = built_in_prompts()
    assert len({json.dumps(prompt.messages) for prompt in prompts}) == len(prompts) == 20


@pytest.mark.parametrize("marked", [True, False, None])
def test_a_saved_threshold_is_loaded_with_the_model_and_nothing_else_changes(pair, tmp_path, marked):
    pair[0].save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    fields = json.loads(path.read_text()) | {"temperature": 0.5, "do_sample": True, "own_field": [1]}
    if marked is None:
        path.unlink()
        del fields["own_field"], fields["temperature"], fields["do_sample"]
    else:
        path.write_text(json.dumps(fields | ({"_from_model_config": True} if marked else {})))
    assert save(Calibration(0.37, (), 0.1), tmp_path) == path
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.nudge_gate, loaded.nudge_threshold, loaded.target_nudge_rate) == ("top1", 0.37, 0.1)
    assert all(getattr(loaded, name) == value for name, value in fields.items() if name != "transformers_version")
    save(Calibration(1.5, (), nudge_gate="entropy"), tmp_path)
    again = json.loads(path.read_text())
    assert (again["nudge_gate"], again["nudge_threshold"]) == ("entropy", 1.5) and "target_nudge_rate" not in again
    assert not list(tmp_path.glob("*.new"))


def test_a_threshold_is_saved_only_to_a_model_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        save(Calibration(0.4, ()), tmp_path)


@pytest.mark.parametrize("right", [None, 5])
def test_the_curve_is_drawn(right):
    points = tuple(Point(step / 10, 10 * step, 100, 10, right) for step in range(10))
    assert report.plot_calibration(Calibration(0.1, points, 0.1)).startswith(b"\x89PNG")


# The mini pair, and the command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    spec = importlib.util.spec_from_file_location("world", MINI / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_questions(path, world, split, seed):
    rows = [world.row(problem) for problem in world.problem_set(split, seed, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(capsys, *args):
    code = cli.main(["calibrate", "--nudging-model", str(MINI / "models" / "nudging"), *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_mini_pair_meets_the_target_on_questions_that_it_was_not_calibrated_on(world, tmp_path, capsys):
    seen = write_questions(tmp_path / "seen.jsonl", world, "train", 1)
    unseen = write_questions(tmp_path / "unseen.jsonl", world, "dev", 2)
    base = shutil.copytree(MINI / "models" / "base", tmp_path / "base")
    figures, resume = tmp_path / "figures.json", tmp_path / "resume"
    args = ["--base", base, "--prompts", seen, "--resume", resume, "--json", figures, "--save-to", base]
    code, out, err = run(capsys, *args)
    assert code == 0
    saved = json.loads(figures.read_text(encoding="utf-8"))
    assert (
        f"nudge_threshold = {saved['threshold']:g}" in out
        and out.startswith("The rate is on target")
        and "threshold 0.5" in err
    )
    assert out.count(" <- |\n") == 1 and out.count("% |") >= len(saved["curve"])
    assert len(resume.read_text().splitlines()) == 1 + len(saved["curve"])

    assert run(capsys, *args)[1] == out  # The second run reads the kept answers and generates nothing.

    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.generation_config.nudge_threshold == saved["threshold"]
    folders = [MINI / "models" / name for name in ("base", "nudging")]
    found = calibrate(
        model,
        AutoModelForCausalLM.from_pretrained(folders[1]),
        *(AutoTokenizer.from_pretrained(folder) for folder in folders),
        read_prompts(unseen)[0],
        by_score=True,
        thresholds=[saved["threshold"]],
    )
    assert abs(found.chosen.nudge_rate - 0.1) <= 0.02
    assert found.chosen.score >= 0.75


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--thresholds", 0.3], "--thresholds is for --by-score"),
        (["--json", "/no/such/folder/report.json"], "--json: there is no folder"),
        (["--save-to", "/no/such/folder"], "no model's folder"),
        (["--base-template", "Answer:"], "needs {user} once"),
        (["--prompts", "/no/such/file"], "No such file"),
        (["--by-score", "--thresholds", 0.3], "20 of 20 have none"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(capsys, args, message):
    code, out, err = run(capsys, "--base", MINI / "models" / "base", *args)
    assert (code, out) == (2, "") and message in err and err.splitlines()[-1].startswith("nudging-hf: error: ")
