"""Races servers of OpenAI's API on the same prompts, in turn, with several numbers of clients.

    python benchmarks/servers.py --clients 1 4 16 \
        nudged=http://127.0.0.1:8000 plain=http://127.0.0.1:8001 plain-draft=http://127.0.0.1:8002

The servers must run already, each with the same base, and idle. The first contestant writes its answers to their end.
All others write as many tokens to each prompt, with `ignore_eos` where a server takes it. Each contestant answers once
untimed. Then rounds follow, in which contestants take turns. A rate is the completion tokens of all answers over the
seconds from the first request to the last answer. The table has medians over the rounds, and ratios to the contestant
that is named by `--against`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx

HELD_OUT = Path(__file__).parents[1] / "examples" / "mini" / "heldout.jsonl"


class Contestant:
    """A server, and what a request to it says besides the prompt.

    Args:
        argument: `NAME=URL` or `NAME=URL,JSON`, where the JSON object is added to each request.
    """

    def __init__(self, argument: str):
        self.name, _, rest = argument.partition("=")
        url, _, more = rest.partition(",")
        if not self.name or not url.startswith("http"):
            raise argparse.ArgumentTypeError(f"a contestant is NAME=URL, got {argument!r}")
        self.url = url.rstrip("/")
        self.more: dict[str, Any] = json.loads(more) if more else {}

    async def answer(self, client: httpx.AsyncClient, prompt: str, max_tokens: int, must_fill: bool) -> int:
        """Asks for one answer, and returns how many tokens it has."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **self.more}
        if must_fill:
            body["ignore_eos"] = True
        reply = await client.post(f"{self.url}/v1/completions", json=body)
        if reply.status_code in (400, 422) and must_fill:  # A server that does not know the field.
            del body["ignore_eos"]
            reply = await client.post(f"{self.url}/v1/completions", json=body)
        reply.raise_for_status()
        return reply.json()["usage"]["completion_tokens"]

    async def find_model(self, client: httpx.AsyncClient) -> None:
        """Asks for the name of the model that is served, unless the contestant's JSON says it."""
        models = (await client.get(f"{self.url}/v1/models")).json()["data"]
        self.model = self.more.get("model") or models[0]["id"]


async def ask_all(
    contestant: Contestant, prompts: list[str], limits: list[int], clients: int, must_fill: bool
) -> tuple[list[int], float]:
    """The tokens of all answers, and the seconds that they took together."""
    gate = asyncio.Semaphore(clients)
    limit = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limit) as client:
        await contestant.find_model(client)

        async def one(prompt: str, most: int) -> int:
            async with gate:
                return await contestant.answer(client, prompt, most, must_fill)

        began = time.perf_counter()
        tokens = await asyncio.gather(*map(one, prompts, limits))
        return list(tokens), time.perf_counter() - began


async def race(args: argparse.Namespace) -> None:
    lines = HELD_OUT.read_text().splitlines()
    chosen = lines[:: len(lines) // args.questions][: args.questions]
    prompts = [json.loads(line)["prompt"] for line in chosen]
    first, *others = args.contestants
    lengths, _ = await ask_all(first, prompts, [args.max_tokens] * len(prompts), 4, must_fill=False)
    for other in others:
        await ask_all(other, prompts, lengths, 4, must_fill=True)
    print(f"{len(prompts)} prompts, {sum(lengths)} tokens\n")
    names = [each.name for each in args.contestants]
    against = args.against or names[-1]
    head = [*(f"{name}, tokens/s" for name in names), *(f"{name} / {against}" for name in names)]
    print(f"| clients | {' | '.join(head)} |")
    print("|---:" * (1 + 2 * len(names)) + "|")
    for clients in args.clients:
        rates: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(args.rounds):
            order = args.contestants[turn % len(names) :] + args.contestants[: turn % len(names)]
            for each in order:
                limits = [args.max_tokens] * len(prompts) if each is first else lengths
                tokens, seconds = await ask_all(each, prompts, limits, clients, must_fill=each is not first)
                rates[each.name].append(sum(tokens) / seconds)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        cells = [f"{medians[name]:.1f}" for name in names]
        cells += [f"{medians[name] / medians[against]:.2f}" for name in names]
        print(f"| {clients} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="+", type=Contestant, metavar="NAME=URL[,JSON]")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="numbers of requests at once")
    parser.add_argument("--questions", type=int, default=16, help="held-out questions of the pair in miniature")
    parser.add_argument("--max-tokens", type=int, default=160, help="limit on an answer")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant answers all questions")
    parser.add_argument("--against", metavar="NAME", help="whose rate the others are divided by (default: the last)")
    asyncio.run(race(parser.parse_args()))


if __name__ == "__main__":
    main()
