r"""Exports a model that includes nudging, and loads it the way a user without this package does.

Run it with the mini pair or with a real pair:

    python examples/hub_export.py
    python examples/hub_export.py --threshold 0.3 --out nudged-olmo \
        --base allenai/OLMo-2-1124-7B --nudging-model allenai/OLMo-2-0425-1B-Instruct

`nudging-hf hub push nudged-olmo OWNER/NAME` uploads it; with `--dry-run` it lists what would be uploaded.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from nudging_hf import hub

MINI = Path(__file__).parent / "mini" / "models"
QUESTION = "Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", default=MINI / "base")
parser.add_argument("--nudging-model", default=MINI / "nudging")
parser.add_argument("--threshold", type=float, default=0.4)
parser.add_argument("--out", type=Path, help="the folder to write (default: one that is removed afterwards)")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as scratch:
    out = args.out or Path(scratch, "nudged")
    hub.export(args.base, args.nudging_model, out, nudge_threshold=args.threshold)
    for path, size in hub.files_to_push(out).items():
        print(f"{size:>12,}  {path}")

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [
        {"role": "system", "content": "Answer the question and show every step on the way."},
        {"role": "user", "content": QUESTION},
    ]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    for settings in ({}, {"nudging_model": None}):
        ids = model.generate(**inputs, **settings, max_new_tokens=120, do_sample=False)
        answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"\n{'The base alone' if settings else 'Nudged'}: {answer}")
