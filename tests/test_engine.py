"""Rows join and leave a running decoder, or their base is run by an engine: each answer is that of its single run."""

import random

import pytest
import torch
from running import KINDS, inputs_of, nudge, outcomes, pair_with_prompts
from test_cached_lm import supported_model
from tiny import Pair

import nudging_hf
from nudging_hf.core import predicting
from nudging_hf.core.cached_lm import cached_lm
from nudging_hf.core.decoding import NudgedDecoder
from nudging_hf.core.draft_policy import DraftLength
from nudging_hf.core.drafting import Drafter
from nudging_hf.core.generate import prepare
from nudging_hf.core.predicting import predictions
from nudging_hf.core.row import Row
from nudging_hf.integrations.engine_decoder import EngineDecoder, EnginePass

SETTINGS = [
    {},
    {"nudge_threshold": 0.7},
    {"nudge_threshold": 0.2, "nudge_gate": "margin", "takeover_on_agreement": False},
    {"nudge_gate": "rejection"},
    {"nudge_threshold": "auto", "target_nudge_rate": 0.3},
    {"do_sample": True, "temperature": 1.3, "top_k": 20},
    {"repetition_penalty": 1.4, "num_nudging_tokens": 5},
    {"suppress_tokens": list(range(20, 60))},
    {"stop_strings": ["e", "the"]},
    {"eos_token_id": list(range(70, 90))},
]


class Question:
    """A prompt with settings, and its answer in a single run.

    Args:
        number: draws the prompt and the settings.
    """

    def __init__(self, pair: Pair, prompt: list[int], nudging_prompt: list[int], number: int):
        draw = random.Random(number)
        self.settings = {"max_new_tokens": draw.choice([1, 9, 24, 40]), **draw.choice(SETTINGS)}
        if draw.random() < 0.2 and self.settings["max_new_tokens"] > 5:
            self.settings["min_new_tokens"] = 5
        torch.manual_seed(number)
        [self.answer] = outcomes(nudge(pair, [prompt], [nudging_prompt], **self.settings))
        self.pair, self.prompts, self.number = pair, ([prompt], [nudging_prompt]), number

    def row(self, **more) -> Row:
        torch.manual_seed(self.number)
        [row] = prepare(self.pair.base, **inputs_of(self.pair, *self.prompts), **self.settings, **more).rows
        return row

    def check(self, row: Row) -> None:
        assert (row.answer.ids, row.nudged, row.finish_reason) == self.answer


def questions(arch: str, kind: str, count: int) -> tuple[Pair, list[Question]]:
    pair, prompts, nudging_prompts = pair_with_prompts(arch, kind, seed=2, rows=count)
    both = zip(prompts, nudging_prompts, strict=True)
    return pair, [Question(pair, *each, number) for number, each in enumerate(both)]


@pytest.mark.parametrize("drafts", [0, "adaptive"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_rows_join_and_leave_a_running_decoder(arch, kind, drafts):
    pair, asked = questions(arch, kind, 10)
    draw = random.Random(f"{arch} {kind} {drafts}")
    base, nudging = cached_lm(pair.base, 0), cached_lm(pair.nudging_model, 0)
    decoder = NudgedDecoder(base, nudging, Drafter(drafts, DraftLength(), list))
    waiting, running, cancelled = list(asked), {}, 0
    with torch.no_grad():
        while waiting or decoder.rows:
            while waiting and len(decoder.rows) < 6 and draw.random() < 0.4:
                question = waiting.pop()
                row = question.row(return_dict_in_generate=draw.random() < 0.3)
                decoder.admit(row)
                running[row] = question
            if decoder.rows and draw.random() < 0.02:
                row = draw.choice(decoder.rows)
                if row.is_open:
                    decoder.cancel(row)
                    assert row.finish_reason == "cancelled"
                    del running[row]
                    cancelled += 1
            decoder.step()
    assert len(running) + cancelled == len(asked)
    for row, question in running.items():
        question.check(row)
        if row.request.records:
            assert len(row.predictions) >= len(row.answer.ids)
    assert not base._cached_ids and not nudging._cached_ids and base._slots is None and nudging._slots is None


def test_an_error_ends_its_own_row_alone():
    pair, asked = questions("llama", "two", 3)
    decoder = NudgedDecoder(
        cached_lm(pair.base, 0),
        cached_lm(pair.nudging_model, 0),
        Drafter(4, DraftLength(), list),
        isolates_errors=True,
    )
    rows = [question.row() for question in asked]

    class Broken:
        def put(self, token):
            raise RuntimeError("the client is gone")

    object.__setattr__(rows[1].request, "streamer", Broken())
    for row in rows:
        decoder.admit(row)
    with torch.no_grad():
        decoder.run()
    asked[0].check(rows[0])
    asked[2].check(rows[2])
    assert rows[1].finish_reason == "error" and str(rows[1].error) == "the client is gone"


class FakeEngine:
    """An engine that reads without a cache. It trims drafts, and runs some of its requests at each step."""

    def __init__(self, model, decoder: EngineDecoder, drafts: int, draw: random.Random):
        self.model, self.decoder, self.most, self.draw = model, decoder, drafts, draw
        self.texts: dict[Row, list[int]] = {}
        self.drafts: dict[Row, list[int]] = {}

    def admit(self, row: Row) -> None:
        self.decoder.admit(row)
        self.texts[row] = []

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Runs some requests, and returns those that have ended."""
        chosen = [row for row in self.texts if self.draw.random() < 0.8] or list(self.texts)[:1]
        passes = {}
        for row in chosen:
            draft = self.drafts.pop(row, [])
            draft = draft[: self.draw.choice([len(draft), len(draft), self.draw.randint(0, len(draft))])]
            ids = [*self.texts[row], *draft]
            number = len(draft) + 1
            logits = self.model(torch.tensor([[*row.answer.prompt, *ids]]), use_cache=False).logits[0, -number:]
            [said] = predictions(logits.float(), [predicting.Reading(row, ids, number)])
            passes[row] = EnginePass(draft, said)
        for row, ids in self.decoder.decide(
            passes, self.draw.choice([None, 0.1]), self.draw.choice([0, self.most])
        ).items():
            assert len(ids) <= len(passes[row].draft) + 1 and (ids or row.error is not None)
            self.texts[row] += ids
        ended = [row for row in chosen if not row.is_open and not self.decoder.pending(row)]
        for row in ended:
            self.decoder.forget(row)
            assert self.texts.pop(row) == row.answer.ids
        left = [row for row in chosen if row in self.texts]
        self.drafts |= self.decoder.drafts(left, self.most)
        return ended


@pytest.mark.parametrize(("drafts", "length"), [(0, 0), (1, 4), (4, 4), (16, 16), (16, "adaptive")])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_writes_what_a_single_run_writes(kind, drafts, length):
    """Drafts of up to `drafts` tokens, of which the nudging model writes `length`."""
    pair, asked = questions("llama", kind, 9)
    draw = random.Random(f"{kind} {drafts} {length}")
    nudging = cached_lm(pair.nudging_model, 0)
    engine = FakeEngine(pair.base, EngineDecoder(nudging, Drafter(length, DraftLength(), list)), drafts, draw)
    waiting, running, finished = list(asked), {}, 0
    while waiting or engine.texts:
        while waiting and len(engine.texts) < 5 and draw.random() < 0.5:
            question = waiting.pop()
            row = question.row()
            running[row] = question
            engine.admit(row)
        if len(engine.texts) > 1 and draw.random() < 0.01:  # The client has gone.
            row = draw.choice(list(engine.texts))
            engine.decoder.forget(row)
            del engine.texts[row], running[row]
            engine.drafts.pop(row, None)
        if engine.texts:
            for row in engine.step():
                running.pop(row).check(row)
                finished += 1
    assert not running and finished >= 7
    assert not nudging._cached_ids and nudging._slots is None and not engine.decoder.rows


def test_an_engine_keeps_on_after_an_error_in_one_row():
    pair, asked = questions("llama", "shared", 3)
    engine = FakeEngine(
        pair.base,
        EngineDecoder(cached_lm(pair.nudging_model, 0), Drafter(4, DraftLength(), list)),
        4,
        random.Random(0),
    )
    rows = [question.row() for question in asked]

    def refuse(token, nudged):
        raise RuntimeError("broken")

    rows[1].append = refuse
    for row in rows:
        engine.admit(row)
    with torch.no_grad():
        for _ in range(200):
            engine.step() if engine.texts else None
            for row in [row for row in engine.texts if row.error is not None]:
                engine.decoder.forget(row)
                del engine.texts[row]
    assert rows[1].finish_reason == "error"
    asked[0].check(rows[0])
    asked[2].check(rows[2])


@pytest.mark.parametrize("kind", ["qwen3_next", "xlstm"])
def test_rows_of_recurrent_bases_join_and_leave(kind, monkeypatch):
    base = supported_model(kind)
    pair, prompts, nudging_prompts = pair_with_prompts("llama", "two", seed=2, rows=5)
    pair = Pair(**{**vars(pair), "base": base})
    inputs = [inputs_of(pair, [a], [b]) for a, b in zip(prompts, nudging_prompts, strict=True)]
    monkeypatch.setattr(base.generation_config, "eos_token_id", pair.tokenizer.eos_token_id)
    singles = [nudging_hf.generate(base, **each, max_new_tokens=16)[0].tolist() for each in inputs]
    decoder = NudgedDecoder(
        cached_lm(base, 0), cached_lm(pair.nudging_model, 0), Drafter("adaptive", DraftLength(), list)
    )
    rows = []
    with torch.no_grad():
        for each in inputs:
            rows += prepare(base, **each, max_new_tokens=16).rows
            decoder.admit(rows[-1])
            decoder.step()
        decoder.run()
    assert [[*row.answer.prompt, *row.answer.ids] for row in rows] == singles


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_base_without_weights_are_those_of_the_base(kind):
    """An engine has the base's weights. Here it is only described."""
    pair, asked = questions("llama", kind, 6)
    with torch.device("meta"):
        described = type(pair.base)(pair.base.config)
    described.generation_config = pair.base.generation_config
    for question in asked:
        row = question.row()
        torch.manual_seed(question.number)
        [other] = prepare(described, **inputs_of(pair, *question.prompts), **question.settings).rows
        assert other.seed == row.seed and other.room == row.room and other.answer.prompt == row.answer.prompt
        assert [type(each) for each in other.base.processors] == [type(each) for each in row.base.processors]
        assert other.base.prompt.device.type == "cpu"
    with pytest.raises(ValueError, match="meta device"):
        nudging_hf.generate(described, **inputs_of(pair, *asked[0].prompts))
