"""`check_pair` finds a pair in order that is, names what is broken on purpose, and tells rounding from faults."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf
from nudging_hf.chats import DEFAULT_TEMPLATE
from nudging_hf.cli import main
from nudging_hf.pair import Pair
from nudging_hf.study import check
from nudging_hf.study.fitness import Level
from nudging_hf.study.records import prompts_of

MINI = Path(nudging_hf.__file__).parents[1] / "examples" / "mini" / "models"
PROMPTS = ["Mia has 3 pears and gets 4 more. How many pears does she have?", "Is 8 greater than 5?"]


@pytest.fixture
def parts():
    """The base, the nudging model and their tokenizers, which a test may break."""
    models = [AutoModelForCausalLM.from_pretrained(MINI / name, dtype=torch.float32) for name in ("base", "nudging")]
    return [*models, *(AutoTokenizer.from_pretrained(MINI / name) for name in ("base", "nudging"))]


def checked(parts, **settings):
    return nudging_hf.check_pair(*parts, PROMPTS, **{"max_new_tokens": 16, **settings})


def levels(found):
    return {finding.subject: finding.level for finding in found.findings}


def with_noise(model, noise):
    """Makes a model's logits depend on the width of a pass: `noise` changes those of a pass over one token."""
    forward = model.forward

    def noisy(*args, **kwargs):
        output = forward(*args, **kwargs)
        if kwargs["input_ids"].shape[1] == 1:
            noise(output.logits)
        return output

    noisy.__signature__ = None
    model.forward = noisy
    model.forward.__wrapped__ = forward
    del noisy.__signature__


def test_a_pair_in_order(parts):
    before = [model.state_dict().keys() for model in parts[:2]], [str(model.generation_config) for model in parts[:2]]
    found = checked(parts)
    assert not found.problems and found.verdict == "The pair is in order: the laws hold in 2 answers."
    assert {levels(found)[law] for law in ("drafted = undrafted", "batch = singles", "cached = recomputed")} == {
        Level.FINE
    }
    assert before == (
        [model.state_dict().keys() for model in parts[:2]],
        [str(model.generation_config) for model in parts[:2]],
    )


def end_token_that_the_template_does_not_write(parts):
    parts[1].generation_config.eos_token_id = None
    parts[3].eos_token = "<unk>" if parts[3].eos_token != "<unk>" else "<pad>"


def tokens_without_embeddings(parts):
    parts[2].add_tokens([f"a new word {n}" for n in range(40)])


def weights_that_are_nan(parts):
    parts[0].get_output_embeddings().weight.data[5] = float("nan")


def tokenizer_that_lowers_letters(parts):
    parts[3].backend_tokenizer.normalizer = normalizers.Lowercase()


def template_that_raises(parts):
    parts[3].chat_template = "{{ raise_exception('no turns, please') }}"


BROKEN = {
    "nudging model: end of a turn": end_token_that_the_template_does_not_write,
    "nudging model: chat template": template_that_raises,
    "base: ids": tokens_without_embeddings,
    "base: logits": weights_that_are_nan,
    "nudging model: text": tokenizer_that_lowers_letters,
}


@pytest.mark.parametrize("subject", BROKEN)
def test_what_is_broken_is_named(parts, subject):
    BROKEN[subject](parts)
    found = checked(parts)
    assert [problem.subject for problem in found.problems] == [subject]
    assert found.verdict.startswith(f"The pair is not in order: {subject}: ") and found.answers == 0


def test_all_that_is_broken_is_named_at_once(parts):
    several = [subject for subject in BROKEN if subject != "nudging model: chat template"]
    for subject in several:
        BROKEN[subject](parts)
    found = checked(parts)
    assert {problem.subject for problem in found.problems} == set(several)
    assert all(f"{subject}: " in found.verdict for subject in several)


def rows_that_affect_each_other(module, args, kwargs, output):
    output.logits[1:] = output.logits[1:] + output.logits[:1]


def mask_that_is_ignored(module, args, kwargs):
    return args, {**kwargs, "attention_mask": None}


@pytest.mark.parametrize("which", [0, 1], ids=["base", "nudging model"])
@pytest.mark.parametrize("breaks", [rows_that_affect_each_other, mask_that_is_ignored])
def test_a_model_whose_rows_depend_on_the_batch_is_a_fault(parts, breaks, which):
    before = breaks is mask_that_is_ignored
    hook = parts[which].register_forward_pre_hook if before else parts[which].register_forward_hook
    hook(breaks, with_kwargs=True)
    found = checked(parts, nudging_config=nudging_hf.NudgingConfig(nudge_threshold=0.7))
    assert {problem.subject for problem in found.problems} == {"batch = singles"}
    assert "batch = singles: prompt " in found.verdict and "a fault" in found.verdict


@pytest.fixture
def laws(parts):
    """The laws on two prompts, as if the answers had been written."""
    made = check._Laws(Pair(parts[0], parts[2], parts[1], parts[3]), prompts_of(PROMPTS), DEFAULT_TEMPLATE, 8, None)
    made._rates, made._reasons = [0.3], ["eos"]
    return made


def test_a_fault_is_told_before_near_ties(laws, monkeypatch):
    tie, fault = (check._Margin("the base's choice", size, 1e-6, True) for size in (1e-6, 1.0))
    margins = iter([tie, fault, tie])
    monkeypatch.setattr(check._Parting, "__init__", lambda *args: None)
    monkeypatch.setattr(check._Parting, "nearest", lambda self: next(margins))
    for number in range(3):
        laws._compare("batch = singles", number, None, [1, 2], [1, 3])
    [told] = [finding for finding in laws.findings() if finding.level is Level.PROBLEM]
    assert told.subject == "batch = singles" and "prompt 2 parts at token 2: a fault" in told.message


@pytest.mark.parametrize(("rate", "says"), [(0.0, "changes next to nothing"), (1.0, "writes most of it"), (0.3, "")])
def test_a_nudge_rate_at_an_end_of_the_scale_is_noted(laws, rate, says):
    laws._rates = [rate, rate]
    [told] = [finding for finding in laws.findings() if finding.subject == "nudge rate"]
    assert told.level is (Level.NOTE if says else Level.FINE) and says in told.message


def test_a_context_that_ends_before_the_bases_is_noted(parts):
    parts[1].config.max_position_embeddings = 40
    [contexts] = [finding for finding in checked(parts).findings if finding.subject == "contexts"]
    assert contexts.level is Level.NOTE and "40 for the nudging model" in contexts.message


def test_a_cache_that_changes_the_logits_is_a_fault(parts):
    with_noise(parts[0], lambda logits: logits.copy_(logits.roll(1, dims=-1)))
    found = checked(parts)
    assert "drafted = undrafted" in {problem.subject for problem in found.problems}
    assert "a fault" in found.verdict and "two ways of reading" in found.verdict


def test_a_near_tie_is_no_fault_and_has_its_margin(parts):
    base, _, tokenizer, _ = parts
    often = tokenizer(" is", add_special_tokens=False)["input_ids"][-1]
    head = torch.nn.Linear(base.config.hidden_size, base.config.vocab_size, bias=False)
    head.weight.data.copy_(base.get_output_embeddings().weight.data)
    twin = next(token for token in range(base.config.vocab_size - 1, 0, -1) if token not in tokenizer.all_special_ids)
    head.weight.data[twin] = head.weight.data[often]
    base.lm_head = head

    def twin_wins(logits):
        logits[..., twin] += 1e-5

    with_noise(base, twin_wins)
    found = checked(parts, max_new_tokens=40, nudging_config=nudging_hf.NudgingConfig(nudge_threshold=0.1))
    differing = [finding for finding in found.findings if "near-tie" in finding.message]
    assert differing and not found.problems, found.verdict
    assert "has a margin of" in differing[0].message and "near-ties" in found.verdict


def test_one_prompt_makes_no_batch(parts):
    with pytest.raises(ValueError, match=r"`prompts` must be two or more, so that there is a batch, got 1\."):
        nudging_hf.check_pair(*parts, PROMPTS[:1])


def test_the_command(capsys, tmp_path, monkeypatch):
    wanted = ["check", "--base", str(MINI / "base"), "--nudging-model", str(MINI / "nudging"), "--limit", "2"]
    assert main([*wanted, "--max-new-tokens", "8", "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    assert "ok       batch = singles: holds." in said and "The pair is in order" in said
    assert json.loads((tmp_path / "found.json").read_text())["findings"][0]["level"] == "ok"
    broken = copy.deepcopy(AutoModelForCausalLM.from_pretrained(MINI / "nudging"))
    weights_that_are_nan([broken])
    broken.save_pretrained(tmp_path / "nudging")
    AutoTokenizer.from_pretrained(MINI / "nudging").save_pretrained(tmp_path / "nudging")
    wanted[4] = str(tmp_path / "nudging")
    with pytest.raises(SystemExit) as ended:
        main(wanted)
    assert ended.value.code == 1 and "The pair is not in order: nudging model: logits" in capsys.readouterr().out
