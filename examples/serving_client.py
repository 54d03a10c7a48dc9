r"""Asks a nudged model that `transformers serve` serves, with OpenAI's client.

    nudging-hf hub export --base examples/mini/models/base --nudging-model examples/mini/models/nudging nudged
    transformers serve nudged --trust-remote-code --port 8000
    python examples/serving_client.py --url http://localhost:8000/v1 --model nudged

Without `--url` it does all three itself, in a folder that it removes afterwards.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

from nudging_hf import hub

MINI = Path(__file__).parent / "mini" / "models"
MESSAGES = [
    {"role": "system", "content": "Answer the question and show every step on the way."},
    {
        "role": "user",
        "content": "Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?",
    },
]


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """Serves a model folder on a free port while the context lasts, and yields the address of its API."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--trust-remote-code"]
    process = subprocess.Popen(
        [*command, "--host", "localhost", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health"):
                break
            if process.poll() is not None:
                raise SystemExit(f"The server ended with {process.returncode}: try `transformers serve {folder}`.")
            time.sleep(0.5)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def ask(url: str, model: str) -> None:
    """Asks one question with streaming, and once more without, with another threshold."""
    client = OpenAI(base_url=url, api_key="none")
    for chunk in client.chat.completions.create(model=model, messages=MESSAGES, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    parameters = {"generation_config": json.dumps({"nudge_threshold": 0.2, "max_new_tokens": 256})}
    answer = client.chat.completions.create(model=model, messages=MESSAGES, extra_body=parameters)
    print(f"\nWith γ = 0.2: {answer.choices[0].message.content}")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", help="the address of a running server, such as http://localhost:8000/v1")
parser.add_argument("--model", default="nudged", help="the model's name at the server (default: %(default)s)")
parser.add_argument("--base", default=MINI / "base")
parser.add_argument("--nudging-model", default=MINI / "nudging")
args = parser.parse_args()

if args.url is not None:
    ask(args.url, args.model)
else:
    with tempfile.TemporaryDirectory() as folder:
        hub.export(args.base, args.nudging_model, Path(folder, "nudged"), nudge_threshold=0.4)
        with server(Path(folder, "nudged")) as url:
            ask(url, str(Path(folder, "nudged")))
