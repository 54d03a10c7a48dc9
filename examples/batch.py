r"""Answers several questions in one batch. Each row advances at its own pace and gets the answer that it gets alone.

Run it with the mini pair or with a real pair:

    python examples/batch.py
    python examples/batch.py --threshold 0.3 \
        --base allenai/OLMo-2-1124-7B --nudging-model allenai/OLMo-2-0425-1B-Instruct
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf

MINI = Path(__file__).parent / "mini" / "models"
SYSTEM = "Answer the question and show every step on the way."
QUESTIONS = [
    "Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?",
    'Join the last letters of the words "Breto", "Dal".',
    "How many letters do the names Lusam and Wenit have together?",
    "A coin is heads up. Tara flips the coin. Nilo passes it on. Kob reverses it. Geral leaves the coin alone. "
    "Is the coin still heads up?",
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default=MINI / "base")
parser.add_argument("--nudging-model", default=MINI / "nudging")
parser.add_argument("--threshold", type=float, default=0.4)
parser.add_argument("--device-map", help='such as "auto"; needs accelerate')
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.base)
base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto", device_map=args.device_map)
nudging_tokenizer = AutoTokenizer.from_pretrained(args.nudging_model)
nudging_model = AutoModelForCausalLM.from_pretrained(args.nudging_model, dtype="auto", device_map=args.device_map)

chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}] for question in QUESTIONS]
inputs = nudging_hf.chat_inputs(chats, tokenizer, nudging_tokenizer)
output = nudging_hf.generate(
    base,
    **inputs.to(base.device),
    tokenizer=tokenizer,
    nudging_model=nudging_model,
    nudging_tokenizer=nudging_tokenizer,
    nudge_threshold=args.threshold,
    max_new_tokens=256,
    do_sample=False,
    return_dict_in_generate=True,
)
new = output.sequences[:, inputs.input_ids.shape[1] :]
answers = tokenizer.batch_decode(new, skip_special_tokens=True)
rows = zip(QUESTIONS, answers, output.nudge_rate, output.finish_reasons, strict=True)
for question, answer, nudge_rate, reason in rows:
    print(f"{question}\n{answer}\n({nudge_rate:.0%} of the tokens nudged; ended by {reason})\n")
print(f"{output.base_forward_passes} forward passes of the base for all {len(QUESTIONS)} answers")
