r"""Nudges in pipelines: with strings and chats, one or many, and with the spans that each model wrote.

Run it with the mini pair or with a real pair:

    python examples/pipeline.py
    python examples/pipeline.py --device-map auto \
        --base allenai/OLMo-2-1124-7B --nudging-model allenai/OLMo-2-0425-1B-Instruct
"""

import argparse
from pathlib import Path

from transformers import pipeline

import nudging_hf

MINI = Path(__file__).parent / "mini" / "models"
SYSTEM = {"role": "system", "content": "Answer the question and show every step on the way."}
QUESTIONS = [
    "Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?",
    'Join the last letters of the words "Breto", "Dal".',
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default=str(MINI / "base"))
parser.add_argument("--nudging-model", default=str(MINI / "nudging"))
parser.add_argument("--threshold", type=float, default=0.4)
parser.add_argument("--device-map", help='such as "auto"; needs accelerate')
args = parser.parse_args()

nudging_hf.register()  # This adds the task "nudged-text-generation", and nudging_model= to "text-generation".

pipe = pipeline(
    "nudged-text-generation",
    model=args.base,
    nudging_model=args.nudging_model,
    nudge_threshold=args.threshold,
    device_map=args.device_map,
)
chats = [[SYSTEM, {"role": "user", "content": question}] for question in QUESTIONS]
for (record,) in pipe(chats, batch_size=2, return_full_text=False, return_nudged_spans=True):
    print(record["generated_text"])
    print("nudged:", [span["text"] for span in record["nudged_spans"] if span["nudged"]], end="\n\n")

print("The plain task takes nudging_model= too; a string is the base's prompt as it is:\n")
plain = pipeline("text-generation", model=args.base, device_map=args.device_map)
prompt = nudging_hf.plain_prompt(chats[0])
for model in (args.nudging_model, None):
    record = plain(prompt, nudging_model=model, max_new_tokens=80, do_sample=False, return_full_text=False)[0]
    print(f"nudging_model={model and Path(model).name}: {record['generated_text']!r}\n")
