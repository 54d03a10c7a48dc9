r"""Chats over several turns with a pair that has two different tokenizers.

The base reads plain text, and the nudging model reads its chat template.

    python examples/chat.py
    python examples/chat.py --device-map auto \
        --base meta-llama/Llama-3.1-70B --nudging-model Qwen/Qwen2.5-1.5B-Instruct

Text passes between the two vocabularies by itself, so nothing here configures it. `nudging-hf chat` is the
interactive form of this program.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf

MINI = Path(__file__).parent / "mini" / "models"
QUESTIONS = [
    'Join the last letters of the words "Breto", "Dal".',
    "Breto has 30 shells. Breto sells 10. Breto buys 5 more. How many shells does Breto have now?",
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("questions", nargs="*", default=QUESTIONS, help="the user's messages, one for each turn")
parser.add_argument("--base", default=MINI / "base")
parser.add_argument("--nudging-model", default=MINI / "nudging")
parser.add_argument("--threshold", type=float, default=0.4)
parser.add_argument("--device-map", help='such as "auto"; needs accelerate')
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.base)
base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto", device_map=args.device_map)
nudging_tokenizer = AutoTokenizer.from_pretrained(args.nudging_model)
nudging_model = AutoModelForCausalLM.from_pretrained(args.nudging_model, dtype="auto", device_map=args.device_map)

messages = [{"role": "system", "content": "Answer the question and show every step on the way."}]
for question in args.questions:
    messages.append({"role": "user", "content": question})
    print(f"\n> {question}")
    inputs = nudging_hf.chat_inputs(messages, tokenizer, nudging_tokenizer)
    ids = nudging_hf.generate(
        base,
        **inputs.to(base.device),
        tokenizer=tokenizer,
        nudging_model=nudging_model,
        nudging_tokenizer=nudging_tokenizer,
        nudge_threshold=args.threshold,
        max_new_tokens=256,
        do_sample=False,
        streamer=nudging_hf.MarkingStreamer(tokenizer),
    )
    answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})
