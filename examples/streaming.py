r"""Streams an answer in three ways: in colour, to a function of yours, and as plain text from another thread.

Run it with the mini pair or with a real pair:

    python examples/streaming.py
    python examples/streaming.py --device-map auto \
        --base meta-llama/Llama-2-70b-hf --nudging-model meta-llama/Llama-2-7b-chat-hf
"""

import argparse
from pathlib import Path
from threading import Thread

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

import nudging_hf

MINI = Path(__file__).parent / "mini" / "models"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default=MINI / "base")
parser.add_argument("--nudging-model", default=MINI / "nudging")
parser.add_argument("--threshold", type=float, default=0.4)
parser.add_argument("--device-map", help='such as "auto"; needs accelerate')
parser.add_argument(
    "--question", default="Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?"
)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.base)
base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto", device_map=args.device_map)
nudging_tokenizer = AutoTokenizer.from_pretrained(args.nudging_model)
nudging_model = AutoModelForCausalLM.from_pretrained(args.nudging_model, dtype="auto", device_map=args.device_map)

messages = [
    {"role": "system", "content": "Answer the question and show every step on the way."},
    {"role": "user", "content": args.question},
]
inputs = nudging_hf.chat_inputs(messages, tokenizer, nudging_tokenizer)
call = {
    **inputs.to(base.device),
    "tokenizer": tokenizer,
    "nudging_model": nudging_model,
    "nudging_tokenizer": nudging_tokenizer,
    "nudge_threshold": args.threshold,
    "max_new_tokens": 256,
    "do_sample": False,
}

print("In a terminal, the nudging model's words are in colour:\n")
nudging_hf.generate(base, **call, streamer=nudging_hf.MarkingStreamer(tokenizer))

print("\nA function of your own receives each piece and its author:\n")


def show(text: str, nudged: bool) -> None:
    print(("nudging model: " if nudged else "base:          ") + repr(text))


nudging_hf.generate(base, **call, streamer=nudging_hf.MarkingStreamer(tokenizer, show))

print("\nThe streamers of transformers work too, this one across threads:\n")
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
writing = Thread(target=nudging_hf.generate, args=(base,), kwargs={**call, "streamer": streamer})
writing.start()
for text in streamer:
    print(text, end="", flush=True)
writing.join()
print()
