"""A Gradio app: chat with a nudged base beside the base alone, and see whose words they are.

    pip install -r requirements.txt
    python app.py

On a Space, set BASE and NUDGING_MODEL (names on the Hub) as variables, and THRESHOLD, SYSTEM, BASE_TEMPLATE and
DEVICE_MAP if need be. Left out, the pair in miniature answers, where the app lies in a checkout of the project.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

import nudging_hf
from nudging_hf import page
from nudging_hf.continuations import pieces_with_continuations
from nudging_hf.core.config import DEFAULT_THRESHOLDS
from nudging_hf.core.gate import GATES
from nudging_hf.provenance import Piece, pieces_of, text_of

MINI = Path(__file__).parents[1] / "mini" / "models"
BASE = os.environ.get("BASE", MINI / "base")
NUDGING_MODEL = os.environ.get("NUDGING_MODEL", MINI / "nudging")
THRESHOLD = float(os.environ.get("THRESHOLD", DEFAULT_THRESHOLDS["top1"]))
SYSTEM = os.environ.get("SYSTEM", "Answer the question and show every step on the way.")
BASE_TEMPLATE = os.environ.get("BASE_TEMPLATE", "{system}\n{user}\n")
DEVICE_MAP = os.environ.get("DEVICE_MAP")
QUESTIONS = [
    "Question: Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?",
    'Question: Join the last letters of the words "Breto", "Dal".',
]
SECONDS_BETWEEN_LOOKS = 0.1

if MINI in (Path(BASE).parent, Path(NUDGING_MODEL).parent) and not MINI.exists():
    raise SystemExit("No models: set the variables BASE and NUDGING_MODEL to their names on the Hub.")
tokenizer = AutoTokenizer.from_pretrained(BASE)
base = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto", device_map=DEVICE_MAP)
nudging_tokenizer = AutoTokenizer.from_pretrained(NUDGING_MODEL)
nudging_model = AutoModelForCausalLM.from_pretrained(NUDGING_MODEL, dtype="auto", device_map=DEVICE_MAP)


class Stop(StoppingCriteria):
    """Ends answers when it is set. `forgets` says that nobody wants to see them either."""

    is_set = forgets = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_set, device=input_ids.device)


class CountingStreamer(nudging_hf.MarkingStreamer):
    """Counts the tokens that pass through it."""

    tokens = 0

    def put_marked(self, value: torch.Tensor, nudged: bool) -> None:
        self.tokens += len(value)
        super().put_marked(value, nudged)


class Writer:
    """Writes an answer in a thread of its own.

    Args:
        stop: ends the answer when it is set.
        arguments: of `generate`.

    Attributes:
        pieces: what is written so far. In the end they say what the base would have written instead of each nudge.
        error: what ended the answer, if something did.
    """

    def __init__(self, stop: Stop, arguments: dict[str, Any]):
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self._stop, self._arguments = stop, arguments
        self._began = self._ended = time.perf_counter()
        self._streamer = CountingStreamer(tokenizer, self._add)
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_at_work(self) -> bool:
        return self._thread.is_alive()

    def figures(self) -> dict[str, str]:
        tokens, seconds = self._streamer.tokens, self._ended - self._began
        pace = f"{tokens / seconds:.0f}" if seconds else "none yet"
        return {"tokens": f"{tokens} in {seconds:.1f} s", "tokens a second": pace}

    def _add(self, text: str, nudged: bool) -> None:
        self.pieces.append(Piece(text, nudged))
        self._ended = time.perf_counter()

    def _run(self) -> None:
        try:
            output = nudging_hf.generate(
                base, **self._arguments, tokenizer=tokenizer, streamer=self._streamer, stopping_criteria=[self._stop]
            )
            if hasattr(output, "nudged_mask"):
                complete = pieces_of if self._stop.is_set else partial(pieces_with_continuations, base)
                [self.pieces] = complete(output, tokenizer)
        except Exception as error:  # It is raised again where Gradio shows it.
            self.error = error


@dataclass
class Turn:
    """A question, and what the base alone and the nudged base have answered so far."""

    question: str
    threshold: float | None
    alone: list[Piece] = field(default_factory=list)
    nudged: list[Piece] = field(default_factory=list)
    figures: tuple[dict[str, str], dict[str, str]] = ({}, {})

    def shown(self) -> page.Entry:
        return {
            "The base alone": page.MarkedAnswer(self.question, text_of(self.alone), self.figures[0]),
            "Nudged": page.MarkedAnswer(self.question, self.nudged, self.figures[1]),
        }


stops: dict[str, Stop] = {}  # What ends the answers that are being written, by the session of the browser.


def end_answers(request: gr.Request) -> None:
    """Ends what is being written for a browser that no longer wants it."""
    if stop := stops.get(request.session_hash):
        stop.is_set = True


def conversation(turns: list[Turn]) -> str:
    """All turns as HTML. Probabilities are compared with γ if it was the same in all of them."""
    threshold = turns[0].threshold if len({turn.threshold for turn in turns}) == 1 else None
    return f'<div class="nudged">{page.render_part([turn.shown() for turn in turns], threshold)}</div>'


def answer(
    question: str,
    turns: list[Turn],
    threshold: float,
    gate: str,
    system: str,
    samples: bool,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    request: gr.Request,
) -> Iterator[tuple[str, str, list[Turn]]]:
    """The question box, the conversation as far as it is written, and its turns."""
    if not question.strip():
        raise gr.Error("There is no question: write one first.", print_exception=False)
    if request.session_hash in stops:
        raise gr.Error("An answer is being written: wait for it, or stop it.", print_exception=False)
    stop = stops[request.session_hash] = Stop()
    try:
        messages = [{"role": "system", "content": system}] if system.strip() else []
        for turn in turns:
            messages += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": text_of(turn.nudged)},
            ]
        messages.append({"role": "user", "content": question})
        inputs = nudging_hf.chat_inputs(messages, tokenizer, nudging_tokenizer, BASE_TEMPLATE).to(base.device)
        settings: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "do_sample": samples}
        if samples:
            settings |= {"temperature": temperature, "top_p": top_p}
        own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        pair = {"nudging_model": nudging_model, "nudging_tokenizer": nudging_tokenizer}
        knobs = {"nudge_threshold": threshold, "nudge_gate": gate, "return_dict_in_generate": True}
        # Both write at the same time and share the machine, so that it is a fair race.
        writers = [
            Writer(stop, {**own, **settings, "nudging_model": None}),
            Writer(stop, {**inputs, **settings, **pair, **knobs}),
        ]
        turn = Turn(question, threshold if gate == "top1" else None)
        is_at_work = True
        while is_at_work and not stop.forgets:
            is_at_work = any(writer.is_at_work for writer in writers)
            turn.alone, turn.nudged = (list(writer.pieces) for writer in writers)
            turn.figures = (writers[0].figures(), writers[1].figures())
            yield "", conversation([*turns, turn]), [*turns, turn]
            time.sleep(SECONDS_BETWEEN_LOOKS * is_at_work)
        for writer in writers:
            if writer.error is not None:
                raise gr.Error(str(writer.error)) from writer.error
        if stop.forgets:
            yield "", "", []
    finally:
        stop.is_set = True
        del stops[request.session_hash]


def take_back(turns: list[Turn]) -> tuple[str, list[Turn]]:
    """The last question, and the turns before it."""
    if not turns:
        raise gr.Error("There is no answer yet: ask something first.", print_exception=False)
    return turns[-1].question, turns[:-1]


def clear(request: gr.Request) -> tuple[str, str, list[Turn]]:
    if stop := stops.get(request.session_hash):
        stop.is_set = stop.forgets = True
    return "", "", []


def range_of(gate: str) -> dict[str, Any]:
    """The slider of the threshold for a gate."""
    return gr.update(maximum=GATES[gate].greatest, value=DEFAULT_THRESHOLDS[gate])


# The selector outweighs Gradio's own style of links and headings.
STYLE = page.style_within("div.nudged.nudged.nudged")
STYLE += ".nudged { color-scheme: light; } .dark .nudged { color-scheme: dark; }"

with gr.Blocks(title="Nudging", fill_width=True) as demo:
    gr.HTML(f"<style>{STYLE}</style>", padding=False)
    gr.Markdown(
        f"# Nudging\nThe base is `{Path(BASE).name}`; where it is unsure, `{Path(NUDGING_MODEL).name}` writes. Its "
        "words are underlined. Point at a word to see how sure the base was, and what it would have written itself; "
        "click on a nudge to see how the base alone would have gone on."
    )
    turns = gr.State([])
    shown = gr.HTML(label="Conversation", padding=False, apply_default_css=False)
    question = gr.Textbox(label="Question", value=QUESTIONS[0], lines=2)
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", min_width=60)
        stop, retry, clean = (gr.Button(name, min_width=60) for name in ("Stop", "Retry", "Clear"))
    gr.Examples(QUESTIONS, question)
    with gr.Accordion("Settings", open=False):
        gate = gr.Dropdown(list(GATES), value="top1", label="Gate: how the base's confidence is measured")
        threshold = gr.Slider(0, 1, value=THRESHOLD, step=0.05, label="Threshold: what the gate compares with")
        system = gr.Textbox(label="System prompt", value=SYSTEM, lines=2)
        samples = gr.Checkbox(label="Sample", value=False)
        temperature = gr.Slider(0.1, 2, value=0.7, step=0.1, label="Temperature, if it samples")
        top_p = gr.Slider(0.05, 1, value=0.95, step=0.05, label="Top-p, if it samples")
        length = gr.Slider(16, 2048, value=256, step=16, label="Tokens of an answer, at the most")
    settings = [threshold, gate, system, samples, temperature, top_p, length]
    outputs = [question, shown, turns]
    inputs = [question, turns, *settings]
    gr.on([ask.click, question.submit], answer, inputs, outputs, api_name="answer")
    retry.click(take_back, turns, [question, turns], api_name=False).success(answer, inputs, outputs, api_name=False)
    stop.click(end_answers, api_name=False)
    clean.click(clear, None, outputs, api_name=False)
    gate.change(range_of, gate, threshold, api_name=False)
    demo.unload(end_answers)

if __name__ == "__main__":
    demo.launch()
