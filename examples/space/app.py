"""A Gradio app: ask a nudged base, watch it write, and see whose words they are.

    pip install -r requirements.txt
    python app.py

On a Space, set BASE and NUDGING_MODEL (names on the Hub) and THRESHOLD as variables. Left out, the pair in miniature
answers, where the app lies in a checkout of the project.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread

import gradio as gr
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf

MINI = Path(__file__).parents[1] / "mini" / "models"
BASE = os.environ.get("BASE", MINI / "base")
NUDGING_MODEL = os.environ.get("NUDGING_MODEL", MINI / "nudging")
THRESHOLD = float(os.environ.get("THRESHOLD", "0.4"))
DEVICE_MAP = os.environ.get("DEVICE_MAP")
SYSTEM = "Answer the question and show every step on the way."
QUESTIONS = [
    "Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?",
    'Join the last letters of the words "Breto", "Dal".',
]
NUDGED = "nudging model"

tokenizer = AutoTokenizer.from_pretrained(BASE)
base = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto", device_map=DEVICE_MAP)
nudging_tokenizer = AutoTokenizer.from_pretrained(NUDGING_MODEL)
nudging_model = AutoModelForCausalLM.from_pretrained(NUDGING_MODEL, dtype="auto", device_map=DEVICE_MAP)


def answer(question: str, threshold: float) -> Iterator[tuple[list[tuple[str, str | None]], str]]:
    """The answer as far as it is written, as stretches of text with their label, and a line of figures at the end."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Question: {question}"}]
    inputs = nudging_hf.chat_inputs(messages, tokenizer, nudging_tokenizer, base_template="{system}\n{user}\n")
    pieces: Queue = Queue()

    def write() -> None:
        try:
            output = nudging_hf.generate(
                base,
                **inputs.to(base.device),
                tokenizer=tokenizer,
                nudging_model=nudging_model,
                nudging_tokenizer=nudging_tokenizer,
                nudge_threshold=threshold,
                max_new_tokens=512,
                do_sample=False,
                streamer=nudging_hf.MarkingStreamer(tokenizer, lambda *piece: pieces.put(piece)),
                return_dict_in_generate=True,
            )
            pieces.put(output)
        except Exception as error:  # Raised again where Gradio shows it.
            pieces.put(error)

    Thread(target=write, daemon=True).start()
    written: list[tuple[str, str | None]] = []
    while isinstance(piece := pieces.get(), tuple):
        text, nudged = piece
        written.append((text, NUDGED if nudged else None))
        yield written, ""
    if isinstance(piece, Exception):
        raise gr.Error(str(piece)) from piece
    passes = f"{piece.base_forward_passes} forward passes of the base for {piece.nudged_mask.shape[1]} tokens"
    yield written, f"{piece.nudge_rate[0]:.0%} of the tokens are the nudging model's; {passes}."


with gr.Blocks(title="Nudging") as demo:
    gr.Markdown(
        f"# Nudging\nThe base is `{Path(BASE).name}`; where it is unsure, `{Path(NUDGING_MODEL).name}` writes."
    )
    asked = gr.Textbox(label="Question", value=QUESTIONS[0], lines=2)
    gamma = gr.Slider(0, 1, value=THRESHOLD, step=0.05, label="γ: the base is unsure below this top-1 probability")
    ask = gr.Button("Answer", variant="primary")
    shown = gr.HighlightedText(label="Answer", combine_adjacent=True, color_map={NUDGED: "green"}, show_legend=True)
    figures = gr.Markdown()
    gr.Examples(QUESTIONS, asked)
    gr.on([ask.click, asked.submit], answer, [asked, gamma], [shown, figures], api_name="answer")

if __name__ == "__main__":
    demo.launch()
