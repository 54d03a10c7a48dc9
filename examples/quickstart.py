r"""Asks one question, and prints the nudged answer and which parts the nudging model wrote.

Run it with the mini pair or with a real pair:

    python examples/quickstart.py
    python examples/quickstart.py --threshold 0.3 --device-map auto \
        --base google/gemma-2-27b --nudging-model google/gemma-2-2b-it
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

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

nudging_hf.register()  # After this, model.generate accepts nudging_model=.

tokenizer = AutoTokenizer.from_pretrained(args.base)
base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto", device_map=args.device_map)
nudging_tokenizer = AutoTokenizer.from_pretrained(args.nudging_model)
nudging_model = AutoModelForCausalLM.from_pretrained(args.nudging_model, dtype="auto", device_map=args.device_map)

# The base reads plain text, and the nudging model reads its chat template.
messages = [
    {"role": "system", "content": "Answer the question and show every step on the way."},
    {"role": "user", "content": args.question},
]
inputs = nudging_hf.chat_inputs(messages, tokenizer, nudging_tokenizer)

output = base.generate(
    **inputs.to(base.device),
    nudging_model=nudging_model,
    nudge_threshold=args.threshold,
    max_new_tokens=256,
    do_sample=False,
    return_dict_in_generate=True,
)
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))

spans = nudging_hf.spans_of(output, tokenizer)[0]
print("\nThe nudging model wrote:", [span.text for span in spans if span.nudged])
print(f"{output.nudge_rate[0]:.0%} of the tokens; the base made {output.base_forward_passes} forward passes.")
