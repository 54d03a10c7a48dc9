r"""Nudges a base that an inference engine serves: its words come from the engine, the nudging model's from here.

    vllm serve allenai/OLMo-2-1124-7B
    python examples/remote_base.py --url http://localhost:8000/v1 --base allenai/OLMo-2-1124-7B \
        --nudging-model allenai/OLMo-2-0425-1B-Instruct --threshold 0.3

Without `--url` it serves the base of the pair in miniature itself, by a few lines that are no engine to rely on.
"""

import argparse
import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nudging_hf
from nudging_hf.integrations.openai import RemoteBase

MINI = Path(__file__).parent / "mini" / "models"
SYSTEM = "Answer the question and show every step on the way."
QUESTIONS = [
    "Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?",
    'Join the last letters of the words "Breto", "Dal".',
]


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[str]:
    """Serves a base on a free port while the context lasts, one greedy token at a time, in the shape of vLLM."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._start("application/json")
            self.wfile.write(b'{"data": []}')

        @torch.no_grad()
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = torch.tensor([body["prompt"]])
            self._start("text/event-stream")
            with contextlib.suppress(ConnectionError):  # Whoever has read enough hangs up.
                for left in reversed(range(body["max_tokens"])):
                    logprobs = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
                    top = logprobs.topk(body["logprobs"])
                    ids = torch.cat([ids, top.indices[None, :1]], dim=1)
                    token, logprob = f"token_id:{ids[0, -1]}", top.values[0].item()
                    told = {"tokens": [token], "token_logprobs": [logprob], "top_logprobs": [{token: logprob}]}
                    ended = int(ids[0, -1]) == model.generation_config.eos_token_id
                    reason = "stop" if ended else None if left else "length"
                    choice = {"text": tokenizer.decode(ids[0, -1:]), "logprobs": told, "finish_reason": reason}
                    self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                    if ended:
                        break

        def _start(self, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


async def ask(url: str) -> None:
    """Streams one answer, and then writes all answers at once."""
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    nudging_tokenizer = AutoTokenizer.from_pretrained(args.nudging_model)
    nudging_model = AutoModelForCausalLM.from_pretrained(args.nudging_model, dtype="auto", device_map=args.device_map)
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": each}] for each in QUESTIONS]
    inputs = nudging_hf.chat_inputs(chats, tokenizer, nudging_tokenizer)
    nudging = {
        "nudging_model": nudging_model,
        "nudging_tokenizer": nudging_tokenizer,
        "nudge_threshold": args.threshold,
        "max_new_tokens": 256,
    }
    async with RemoteBase(url, args.model or str(args.base), args.base, tokenizer) as base:
        async for text, nudged in base.stream(nudging_hf.plain_prompt(chats[0]), **nudging):
            print(f"⟦{text}⟧" if nudged else text, end="", flush=True)
        print("\n")
        for question, answer in zip(QUESTIONS, await base.generate(inputs, **nudging), strict=True):
            tokens = len(answer.ids)
            print(f"{question}\n{answer.text}")
            print(
                f"({tokens} tokens, {sum(answer.nudged)} nudged; {answer.requests} requests; {answer.finish_reason})\n"
            )


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", help="the address of a running engine's API, such as http://localhost:8000/v1")
parser.add_argument("--model", help="the base's name at the engine (default: what --base says)")
parser.add_argument("--base", default=MINI / "base")
parser.add_argument("--nudging-model", default=MINI / "nudging")
parser.add_argument("--threshold", type=float, default=0.4, help="γ (default: %(default)s)")
parser.add_argument("--device-map", help="where the nudging model runs, such as cuda:0")
args = parser.parse_args()

with contextlib.nullcontext(args.url) if args.url else engine(Path(args.base)) as address:
    asyncio.run(ask(address))
