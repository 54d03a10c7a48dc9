"""Many clients of a server at once: some ask badly, some go away, and the others compare what they get."""

import asyncio
import random
import time
from collections import Counter
from typing import Any, NamedTuple

import httpx


class Asked(NamedTuple):
    """The body of a request of `/v1/completions`, and the text that answers it."""

    body: dict[str, Any]
    text: str


def visit(url: str, asked: list[Asked], bad: dict[str, Any], clients: int, seconds: float, key: str = "") -> Counter:
    """Lets so many clients ask for some seconds, and counts what became of their requests.

    Args:
        url: of the server.
        asked: what a client may ask.
        bad: what makes a request one that the server refuses.
        key: the API key, if the server has one.

    Returns:
        How many requests were answered `"right"` or `"wrong"`, `"refused"`, `"cancelled"`, told that the server is
        `"busy"`, or ended with another status, as `"500"`.
    """
    return asyncio.run(_visit(url, asked, bad, clients, seconds, {"Authorization": f"Bearer {key}"} if key else {}))


async def _visit(url: str, asked: list[Asked], bad: dict, clients: int, seconds: float, headers: dict) -> Counter:
    counts: Counter = Counter()
    end = time.monotonic() + seconds
    address = f"{url}/v1/completions"

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            body, text = draw.choice(asked)
            chance = draw.random()
            if chance < 0.1:
                status = (await http.post(address, json={**body, **bad})).status_code
                outcome, expected = "refused", 400
            elif chance < 0.25:
                async with http.stream("POST", address, json={**body, "stream": True}) as stream:
                    status, outcome, expected, lines = stream.status_code, "cancelled", 200, stream.aiter_lines()
                    for _ in range(draw.randint(1, 8)):
                        await anext(lines, None)
            else:
                reply = await http.post(address, json=body)
                status, expected = reply.status_code, 200
                outcome = "right" if status == 200 and reply.json()["choices"][0]["text"] == text else "wrong"
            if status == 429:
                counts["busy"] += 1
                await asyncio.sleep(1)
            else:
                counts[outcome if status == expected else str(status)] += 1

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=clients), headers=headers) as http:
        await asyncio.gather(*map(client, range(clients)))
    return counts
